"""models.toml as text: read, searched, edited."""
