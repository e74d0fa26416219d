"""Engine output on disk."""

from pathlib import Path

_TAIL_BYTES = 64 * 1024


def size_of(log_file: Path) -> int:
    """Bytes written so far; 0 where there is no file yet."""
    try:
        return log_file.stat().st_size
    except OSError:
        return 0


def last_lines(log_file: Path, count: int, since: int = 0) -> tuple[str, ...]:
    """The last lines written after byte `since`, at most `count`, read from at most 64 KiB."""
    try:
        with log_file.open("rb") as file:
            start = max(since, size_of(log_file) - _TAIL_BYTES)
            file.seek(start)
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(text.splitlines()[-count:]) if count > 0 else ()
