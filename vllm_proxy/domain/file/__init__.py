"""models.toml as text: parsed into a `Config`, searched for line numbers, edited.

Pure; the file itself is read and written by `fleet/store.py`.
"""
