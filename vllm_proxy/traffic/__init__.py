"""A request, from the client's bytes to an engine's and back."""
