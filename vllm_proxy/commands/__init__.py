"""What each command does: `run` of a module of its name takes the parsed options and returns the exit status.

A module imports only what its command needs (see `cli`), and the types of answers not at all when it runs.
"""
