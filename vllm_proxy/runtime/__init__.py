"""The daemon's own process: its tasks, threads, clock, files and log.

Knows nothing of models, engines or requests (import-linter: the ring `runtime`).
"""
