"""Effects: processes, files, sockets and time. `api` sees `reconciler` and `registry` alone."""
