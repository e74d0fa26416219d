"""HTTP resources and documents: requests become calls, results become JSON.

Nothing is decided here: handlers call `fleet` and `traffic`, and answer with what these return.
"""
