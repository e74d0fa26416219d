"""HTTP: translate, never decide."""
