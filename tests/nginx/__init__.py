"""Tests with a real nginx."""
