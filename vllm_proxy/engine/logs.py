"""Reads the output of engines on disk: follows it, finds the last lines, truncates files that grow too long.

Engines append (O_APPEND) and do not coordinate with anybody, so a file is truncated in place and never replaced.
Nothing here raises for a file that is gone or cannot be read, and nothing waits: a path may be an engine's own output
in /proc, which a shell in front of it has somewhere else for a moment, in a pipe maybe.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vllm_proxy.domain.units import NO_TEXT

_CHUNK = 16 * 1024  # is read at a time: little enough for a turn of the event loop
_COPY = 256 * 1024
_MOST_COPIES = 50  # at once: some milliseconds, whatever an engine writes meanwhile
_LONGEST_LINE = 16 * 1024  # is held back until it ends
_LONGEST_WORD = 1024  # of a longer one, in a line that is too long, the pieces are shown apart
_MOST_BEHIND = 4 * 2**20
_NEAR_END = 256 * 1024  # there a reader goes on that was too far behind
_SEEN = 1024  # of what was read last: enough to find it again
_TAIL_BLOCK = 64 * 1024
_MOST_STATES = 100  # of a bar are looked at for one that shows something
_MOST_LOOKED_AT = 200_000  # lines, for those that show something
_MOST_TAIL = 8 * 2**20
_MOST_LINES = 10_000
_LINE_END = re.compile(rb"[\r\n]")
# Escape sequences (colours, cursor moves; titles and the like up to their end), then characters that are no text.
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]?" + f"|[{NO_TEXT}]"
)


def size_of(log_file: Path) -> int:
    """Bytes written so far; 0 where there is no file yet."""
    return _size(log_file) or 0


def _size(path: Path) -> int | None:
    """As `size_of`; None where there is something else."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _opened(path: Path) -> BinaryIO:
    """The file, to be read.

    Raises:
        OSError: it cannot be read, or is none.

    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no file")
    return os.fdopen(descriptor, "rb")


class LogReader:
    """Follows one file. A bar that rewrites itself gives a line each time; blank lines are left out."""

    def __init__(self, path: Path, position: int) -> None:
        """`position`: the byte to begin at."""
        self._path = path
        self._position = position
        self._rest = b""  # of a line that has not ended; its bytes lie before the position
        self._seen = b""  # what lies before the position
        self._skipped = 0  # not reported yet, bytes
        self.more = False  # whether the last look left something to be read

    def read(self) -> list[str]:
        """The lines that ended since, from at most 16 KiB; far behind, the next of the newest ones."""
        size = _size(self._path)
        if size is None:
            self.more = False
            return []
        lines = self._find_place() if size < self._position else []
        skips = size - self._position > _MOST_BEHIND
        if skips:
            self._skip(size - _NEAR_END)
        data = self._next() if size > self._position else b""
        self.more = len(data) > 0 and size > self._position
        if skips and (end := _LINE_END.search(data)):
            self._skipped += end.end()
            data = data[end.end() :]
        if self._skipped:
            lines.append(f"[{self._skipped} bytes skipped]")
            self._skipped = 0
        *ended, self._rest = _LINE_END.split(self._rest + data) if data else (self._rest,)
        lines += [text for line in ended if line for piece in _pieces(line) if (text := _text(piece))]
        *begun, self._rest = _pieces(self._rest)
        return lines + [text for piece in begun if (text := _text(piece))]

    def flush(self) -> list[str]:
        """The last line, where it has not ended and never will."""
        text, self._rest = _text(self._rest), b""
        return [text] if text else []

    def shift(self, moved: int) -> None:
        """`cut` has moved the file's contents by so many bytes."""
        self._skip(max(self._position, moved))
        self._position -= moved

    def _skip(self, position: int) -> None:
        if position > self._position:
            self._skipped += position - self._position + len(self._rest)
            self._position, self._rest, self._seen = position, b"", b""

    def _next(self) -> bytes:
        try:
            with _opened(self._path) as file:
                file.seek(self._position)
                data = file.read(_CHUNK)
        except OSError:
            return b""
        self._position += len(data)
        self._seen = (self._seen + data[-_SEEN:])[-_SEEN:]
        return data

    def _find_place(self) -> list[str]:
        """The file is shorter than it was: cut for another reader, or another one, which is read from its start."""
        self._position, head = 0, b""
        with contextlib.suppress(OSError), _opened(self._path) as file:
            head = file.read(_MOST_BEHIND)
        found = head.find(self._seen) if self._seen else -1
        if found >= 0:
            self._position = found + len(self._seen)
            return []
        self._seen = b""
        return self.flush()


def cut(path: Path, limit: int = 64 * 2**20, keep: int = 2**20) -> int:
    """Shorten a file that is larger than `limit` to its last lines, `keep` bytes of them; by how much positions moved.

    It stays the same file, written over from its front, then truncated: on a full disk there is room for nothing else.
    What an engine appends meanwhile is moved too, of a flood its end; lost is what comes between the last look and the
    truncation.
    """
    size = size_of(path)
    if size <= max(limit, keep):
        return 0
    try:
        with path.open("r+b", buffering=0) as file:
            tail = os.pread(file.fileno(), keep, size - keep)
            line_end = _LINE_END.search(tail)
            start = size - keep + (line_end.end() if line_end else 0)
            try:
                _move_to_front(file.fileno(), start)
            except OSError:  # a copy-on-write file system that is full: it has room once the old blocks are gone
                os.truncate(file.fileno(), 0)
                with path.open("ab") as again:
                    again.write(tail[start - size + keep :])
            return start
    except OSError:
        return 0


def _move_to_front(file: int, start: int) -> None:
    """Of an engine that writes faster than this copies, what is in between is left out, and its last lines stay."""
    end, kept = 0, os.fstat(file).st_size
    for _ in range(_MOST_COPIES):
        behind = os.fstat(file).st_size - start - _COPY
        if start >= kept and behind > 0:
            end += os.pwrite(file, b"\n[%d bytes skipped]\n" % behind, end)
            start += behind
        if not (block := os.pread(file, _COPY, start)):
            break
        end += os.pwrite(file, block, end)
        start += len(block)
    os.truncate(file, end)


def last_lines(log_file: Path, count: int, since: int = 0, most_bytes: int = _MOST_TAIL) -> tuple[str, ...]:
    """The last lines written after byte `since`, at most `count` and 10,000, from at most 8 MiB; oldest first.

    For a thread: it may take long. Of a bar that rewrites itself the last state is given. A `since` beyond the end is
    of another file: all is given.
    """
    found: list[str] = []
    count = min(count, _MOST_LINES)
    try:
        with _opened(log_file) as file:
            size = os.fstat(file.fileno()).st_size
            begin = since if since <= size else 0
            floor = max(begin, size - most_bytes)
            end, rest = size, list[bytes]()  # the line that the last block begins in the middle of, its end first
            looked_at = 0
            while end > floor and len(found) < count and looked_at < _MOST_LOOKED_AT:
                start = max(floor, end - _TAIL_BLOCK)
                file.seek(start)
                block = file.read(end - start)
                first, *lines = block.split(b"\n")
                if block.strip():
                    looked_at += len(lines)
                if lines:
                    lines[-1] += b"".join(reversed(rest))
                    found += _last_states(lines)
                    rest = []
                rest.append(first)
                end = start
    except OSError:
        return ()
    if len(found) < count and (floor == begin or not found):  # else it is the end of a line
        found += _last_states([b"".join(reversed(rest))])
    return tuple(reversed(found[: max(count, 0)]))


def _last_states(lines: list[bytes]) -> Iterator[str]:
    """The last first; of each what is left to see, none for a blank one."""
    for line in reversed(lines):
        if line and (text := _last_state(line)):
            yield text


def _last_state(line: bytes) -> str:
    end = len(line.rstrip())
    for _ in range(_MOST_STATES):
        start = line.rfind(b"\r", 0, end) + 1
        if text := "".join(map(_text, _pieces(line[start:end]))):  # in pieces, to bound the time spent on a long line
            return text
        if start == 0:
            break
        end = start - 1
    return ""


def _pieces(line: bytes) -> Iterator[bytes]:
    """A line that is too long comes in pieces, none of which ends within a character or a word (a secret)."""
    begin = 0
    while len(line) - begin > _LONGEST_LINE:
        most = begin + _LONGEST_LINE
        end = line.rfind(b" ", most - _LONGEST_WORD, most) + 1
        end = end or next((at for at in range(most, most - 4, -1) if line[at] & 0xC0 != 0x80), most)
        yield line[begin:end]
        begin = end
    yield line[begin:]


def _text(line: bytes) -> str:
    """What a terminal would show; empty if blank."""
    text = line.decode("utf-8", errors="replace")
    if not text.isprintable():
        text = _CONTROL.sub("", text)
    return "" if text.isspace() else text
