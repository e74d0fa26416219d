"""The process of the daemon: its tasks, threads, time, files and log."""
