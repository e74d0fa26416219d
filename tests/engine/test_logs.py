"""Engine output on disk."""

import errno
import os
import re
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from vllm_proxy.engine.logs import LogReader, cut, last_lines, size_of

KIB, MIB = 2**10, 2**20


def written(tmp_path: Path, data: bytes) -> Path:
    """A log file with these bytes."""
    file = tmp_path / "chat.log"
    file.write_bytes(data)
    return file


def append(file: Path, data: bytes) -> None:
    """As an engine writes."""
    with file.open("ab") as log:
        log.write(data)


def read_all(reader: LogReader) -> list[str]:
    """Everything up to the file's end, the unfinished line too."""
    return read_more(reader) + reader.flush()


def read_more(reader: LogReader) -> list[str]:
    """All that has ended."""
    lines = reader.read()
    while reader.more:
        lines += reader.read()
    return lines


def test_the_last_lines_come_in_order(tmp_path: Path) -> None:
    """At most as many as asked for, the last one with or without its end."""
    file = written(tmp_path, b"one\ntwo\nthree")
    assert last_lines(file, 2) == ("two", "three")
    assert last_lines(file, 9) == ("one", "two", "three")


def test_no_lines_are_no_lines(tmp_path: Path) -> None:
    """Asked for none it gives none, not all."""
    assert last_lines(written(tmp_path, b"one\ntwo\n"), 0) == ()
    assert last_lines(written(tmp_path, b"one\ntwo\n"), -1) == ()


def test_what_an_earlier_engine_wrote_is_left_out(tmp_path: Path) -> None:
    """A crash is never explained with the lines of the engine before."""
    file = written(tmp_path, b"Error of yesterday\n")
    since = size_of(file)
    assert last_lines(file, 20, since) == ()
    append(file, b"today\n")
    assert last_lines(file, 20, since) == ("today",)


def test_a_place_beyond_the_end_is_none(tmp_path: Path) -> None:
    """A file that somebody emptied has other lines since, all of them new."""
    assert last_lines(written(tmp_path, b"one\n"), 9, since=1000) == ("one",)


@pytest.mark.parametrize("length", [1, 100, 5000])
def test_it_reads_back_as_far_as_the_lines_need(tmp_path: Path, length: int) -> None:
    """Ten thousand lines at most, whatever their length, as long as they lie in the last 8 MiB."""
    written_lines = [f"{number} " + "x" * length for number in range(30_000 if length < 5000 else 3_000)]
    file = written(tmp_path, "\n".join(written_lines).encode() + b"\n")
    for count in (1, 20, 10_000):
        got = last_lines(file, count)
        assert list(got) == written_lines[-count:][-len(got) :]
        assert len(got) == count or sum(len(line) + 1 for line in got) > 7 * MIB
    assert len(last_lines(file, 10**9)) <= 10_000


def test_no_more_than_8_mib_are_read(tmp_path: Path) -> None:
    """A line that is longer than that has lost its beginning; `most_bytes` makes it less."""
    (line,) = last_lines(written(tmp_path, b"x" * 9 * MIB), 2)
    assert len(line) == 8 * MIB
    assert last_lines(written(tmp_path, b"first\nsecond\n"), 9, most_bytes=10) == ("second",)


def test_a_line_that_is_very_long_is_whole(tmp_path: Path) -> None:
    """However many blocks it spans."""
    long = "very " + "lüng " * 2**19
    file = written(tmp_path, f"before\n{long}end\nafter".encode())
    assert last_lines(file, 9) == ("before", long + "end", "after")


def test_blank_lines_hide_nothing(tmp_path: Path) -> None:
    """Megabytes of them are passed over, up to the 8 MiB that are looked at."""
    assert last_lines(written(tmp_path, b"the cause\n" + b"\n" * 4 * MIB), 9) == ("the cause",)
    assert last_lines(written(tmp_path, b"the cause\r" + b"\r" * 4 * MIB), 9) == ("the cause",)


def test_bytes_that_are_no_text_are_shown_as_such(tmp_path: Path) -> None:
    """A broken byte never hides the line it is in."""
    assert last_lines(written(tmp_path, b"bad \xff byte\n"), 1) == ("bad \ufffd byte",)


@pytest.mark.parametrize("bar", [b"10%\r50%\r90%", b"\r10%\r50%\r90%\n", b"10%\r90%\r\r\n", b"10%\r90%\r"])
def test_of_a_progress_bar_the_last_state_is_kept(tmp_path: Path, bar: bytes) -> None:
    """It is one line, and its earlier states take no place from others."""
    assert last_lines(written(tmp_path, b"before\n" + bar), 2) == ("before", "90%")


COLOURS = {
    b"plain\ttext": "plain\ttext",
    b"\x1b[1;32mgreen\x1b[0m": "green",
    b"\x1b[2K\x1b[Aup": "up",
    b"\x1b]0;title\x07shown": "shown",
    b"\x1b]8;;http://x\x1b\\link": "link",
    b"\x1b]0;never ended": "0;never ended",
    b"\x1b(Bset": "set",
    b"a\x00b\x07c\x08d\x7fe\x0bf\x1c": "abcdef",
    "\x9bnext\x85".encode(): "next",
    "\u202eturned\u202c \u2066apart\u2069\u2028ended\u2029".encode(): "turned apartended",
    "\u200eא\u200d\t\U0001f468".encode(): "\u200eא\u200d\t\U0001f468",
    b"half\x1b[": "half",
    b"half\x1b": "half",
    "100%|██████| ünï".encode(): "100%|██████| ünï",
}


@pytest.mark.parametrize(("raw", "shown"), COLOURS.items())
def test_what_only_a_terminal_understands_is_left_out(tmp_path: Path, raw: bytes, shown: str) -> None:
    """Colours, cursor moves and control characters are no text, whichever way a line is read."""
    file = written(tmp_path, raw + b"\n")
    assert last_lines(file, 1) == (shown,)
    assert LogReader(file, 0).read() == [shown]


def test_blank_lines_are_left_out(tmp_path: Path) -> None:
    """Also those that have nothing but colours."""
    file = written(tmp_path, b"\n\none\n \t\r\n\x1b[0m\ntwo\n\n")
    assert last_lines(file, 9) == ("one", "two")
    assert LogReader(file, 0).read() == ["one", "two"]


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """Before the first start there is no log, which is no error."""
    assert size_of(tmp_path / "none") == 0
    for path in (tmp_path / "none", tmp_path):
        assert last_lines(path, 5) == ()
        assert LogReader(path, 0).read() == []
        assert LogReader(path, 10**9).read() == []
        assert cut(path, 0, 0) == 0


def test_a_reader_gives_each_line_once_and_only_when_it_has_ended(tmp_path: Path) -> None:
    """Whichever of the three ends it has; of a bar each state is one."""
    file = written(tmp_path, b"old\n")
    reader = LogReader(file, size_of(file))
    assert reader.read() == []
    append(file, b"one\r\ntwo\n10%\r20%\rbeg")
    assert reader.read() == ["one", "two", "10%", "20%"]
    assert reader.read() == []
    append(file, b"un\n")
    assert reader.read() == ["begun"]
    append(file, b"never ended")
    assert reader.read() == []
    assert reader.flush() == ["never ended"]
    assert reader.flush() == []


def test_the_pieces_of_a_long_line_end_between_words(tmp_path: Path) -> None:
    """So a secret that stands where one ends is in one piece, and is found there."""
    file = tmp_path / "log"
    file.write_bytes(b"a " * (8 * KIB - 5) + b"hf_this-is-a-secret " + b"b" * 100 + b"\n")
    reader = LogReader(file, 0)
    pieces = read_more(reader)
    assert [len(piece) for piece in pieces] == [16 * KIB - 10, 120]
    assert pieces[1].startswith("hf_this-is-a-secret ")
    assert last_lines(file, 1) == ("".join(pieces),)


def test_a_line_that_does_not_end_comes_in_pieces(tmp_path: Path) -> None:
    """16 KiB are held back at most, and no character is torn apart."""
    file = written(tmp_path, b"x" + "ü€".encode() * 8000)
    reader = LogReader(file, 0)
    pieces = read_more(reader)
    assert [len(piece.encode()) for piece in pieces] == [16 * KIB - 1, 16 * KIB - 1]
    assert "".join(pieces + reader.flush()) == "x" + "ü€" * 8000


def test_at_most_16_kib_are_read_at_a_time(tmp_path: Path) -> None:
    """So that an engine that writes without end stops nobody else; whether there is more is said."""
    reader = LogReader(written(tmp_path, b"1234567\n" * 4 * KIB), 0)
    assert [(len(reader.read()), reader.more) for _ in range(3)] == [(2 * KIB, True), (2 * KIB, False), (0, False)]


def test_a_reader_far_behind_skips_and_says_so(tmp_path: Path) -> None:
    """More than 4 MiB: it goes on near the end, with a whole line, and every byte is accounted for."""
    line = b"the same number of bytes in each\n"
    file = written(tmp_path, line * (4 * MIB // len(line)))
    assert len(LogReader(file, 0).read()) > 1
    append(file, line * 2)
    told, *lines = read_all(LogReader(file, 0))
    assert told == f"[{size_of(file) - len(line) * len(lines)} bytes skipped]"
    assert set(lines) == {line.decode().strip()}


def test_a_file_that_became_shorter_is_another_one(tmp_path: Path) -> None:
    """It is read from its start, after what had been begun in the old one; so is one that comes back."""
    file = written(tmp_path, b"one\ntwo\nthree was beg")
    reader = LogReader(file, 0)
    assert reader.read() == ["one", "two"]
    file.write_bytes(b"new\n")
    assert reader.read() == ["three was beg", "new"]
    file.unlink()
    assert reader.read() == []
    file.write_bytes(b"back\n")
    assert reader.read() == ["back"]


@settings(deadline=None)
@given(
    raw=some.lists(
        some.sampled_from([b"\n", b"\r", b"\x1b[0m", "€".encode(), b"\xff", b"x" * 9000, b"a"])
        | some.binary(max_size=9)
    ),
    cuts=some.lists(some.integers(0, 30_000), max_size=8),
)
def test_it_does_not_matter_how_bytes_arrive(raw: list[bytes], cuts: list[int]) -> None:
    """Any bytes in any portions give the lines that they give at once."""
    data = b"".join(raw)
    with tempfile.TemporaryDirectory() as folder:
        at_once = read_more(LogReader(written(Path(folder), data), 0))
        file = written(Path(folder), b"")
        reader, lines, start = LogReader(file, 0), [], 0
        for end in [*sorted(cuts), len(data)]:
            append(file, data[start:end])
            start = max(start, end)
            lines += read_more(reader)
    assert lines == at_once


def test_a_small_file_is_not_cut(tmp_path: Path) -> None:
    """Up to the limit nothing happens."""
    file = written(tmp_path, b"one\n" * 25)
    assert cut(file, limit=100, keep=10) == 0
    assert size_of(file) == 100
    append(file, b"x")
    assert cut(file, limit=100, keep=200) == 0
    assert size_of(file) == 101


def test_a_cut_file_is_the_same_one_with_its_last_lines(tmp_path: Path) -> None:
    """Inode and mode stay, it begins with a whole line, and an engine that has it open goes on at its end."""
    file = written(tmp_path, b"".join(b"line %d\n" % number for number in range(1000)))
    file.chmod(0o640)
    before, size = file.stat(), size_of(file)
    with file.open("ab") as engine:
        moved = cut(file, limit=1000, keep=100)
        engine.write(b"goes on\n")
    after = file.stat()
    assert (after.st_ino, stat.S_IMODE(after.st_mode)) == (before.st_ino, 0o640)
    assert moved == size - (after.st_size - len(b"goes on\n"))
    kept = file.read_text().splitlines()
    assert kept == [f"line {number}" for number in range(1000 - len(kept) + 1, 1000)] + ["goes on"]
    assert 90 <= sum(len(line) + 1 for line in kept[:-1]) <= 100


def test_a_file_without_lines_is_cut_anywhere(tmp_path: Path) -> None:
    """It must not grow without end for want of a line end."""
    file = written(tmp_path, b"x" * 5000)
    assert cut(file, limit=1000, keep=100) == 4900
    assert file.read_bytes() == b"x" * 100


def test_a_full_disk_that_copies_on_write_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the front can be written over, the file is emptied first."""

    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = written(tmp_path, b"one\ntwo\nthree\n")
    monkeypatch.setattr(os, "pwrite", no_space)
    assert cut(file, limit=10, keep=8) == 8
    assert file.read_bytes() == b"three\n"


def test_what_is_appended_while_it_is_cut_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that writes between the copy's first look and its last loses nothing."""
    file = written(tmp_path, b"one\ntwo\nthree\n")
    pwrite, late = os.pwrite, [b"six\n", b"five\n", b"four\n"]

    def writes_on(fd: int, data: bytes, offset: int) -> int:
        if late:
            append(file, late.pop())
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", writes_on)
    assert cut(file, limit=10, keep=8) == 8
    assert file.read_bytes() == b"three\nfour\nfive\nsix\n"


def test_a_flood_loses_its_middle_and_not_its_end_when_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that writes faster than can be copied; the copy ends, soon."""
    file = written(tmp_path, b"one\ntwo\nthree\n")
    pwrite, writes = os.pwrite, [MIB, MIB, MIB, 0]

    def floods(fd: int, data: bytes, offset: int) -> int:
        if writes:
            append(file, b"x" * writes.pop(0) + b"\nend %d\n" % len(writes))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", floods)
    assert cut(file, limit=10, keep=8) == 8
    found = file.read_bytes()
    assert found.startswith(b"three\n")
    assert found.endswith(b"\nend 1\n\nend 0\n")
    assert re.search(rb"\n\[\d+ bytes skipped\]\n", found)
    assert len(found) < 2 * MIB


def test_a_flood_that_does_not_end_is_cut_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop waits for a bounded number of copies, not for a moment in which the engine is silent."""
    file = written(tmp_path, b"one\ntwo\nthree\n")
    pwrite, copies = os.pwrite, 0

    def floods(fd: int, data: bytes, offset: int) -> int:
        nonlocal copies
        copies += 1
        append(file, b"more\n" * 1000)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", floods)
    assert cut(file, limit=10, keep=8) == 8
    assert 10 < copies < 100
    assert file.read_bytes().startswith(b"three\nmore\n")


STEPS = some.lists(some.one_of(some.integers(1, 40), some.just("read"), some.just("cut")), max_size=40)


@settings(deadline=None)
@given(steps=STEPS)
@example(steps=[14, 40, 40, 40, 40])
def test_a_reader_loses_no_line_when_its_file_is_cut(steps: list[int | str]) -> None:
    """Each line comes once, in order, or its bytes are among those that were told as skipped."""
    with tempfile.TemporaryDirectory() as folder:
        file = written(Path(folder), b"")
        reader, got, count, size = LogReader(file, 0), [], 0, 0
        for step in steps:
            if isinstance(step, int):
                data = b"".join(b"line %d" % number + b"." * number + b"\n" for number in range(count, count + step))
                count, size = count + step, size + len(data)
                append(file, data)
            elif step == "cut":
                reader.shift(cut(file, limit=3000, keep=1000))
            else:
                got += reader.read()
        got += reader.read()
        while reader.more:  # a look takes 16 KiB at most
            got += reader.read()
    told = [line for line in got if line.startswith("[")]
    lines = [line for line in got if not line.startswith("[")]
    numbers = [int(line.removeprefix("line ").rstrip(".")) for line in lines]
    assert numbers == sorted(set(numbers))
    assert numbers[-1:] == [count - 1] * (count > 0)
    skipped = sum(int(line.split()[0][1:]) for line in told)
    assert sum(len(line) + 1 for line in lines) + skipped == size


def test_a_line_begun_before_the_cut_is_whole_after_it(tmp_path: Path) -> None:
    """What is held back does not depend on the file any more."""
    file = written(tmp_path, b"one\n" * 1000 + b"beg")
    reader = LogReader(file, 0)
    assert len(reader.read()) == 1000
    reader.shift(cut(file, limit=1000, keep=100))
    append(file, b"un\n")
    assert reader.read() == ["begun"]


def test_a_reader_that_is_not_told_of_a_cut_finds_its_place(tmp_path: Path) -> None:
    """A client that follows the output gets nothing twice because the daemon has cut the file."""
    lines = [f"line {number}" for number in range(2000)]
    file = written(tmp_path, "\n".join(lines[:1990]).encode() + b"\n")
    reader = LogReader(file, 0)
    assert read_more(reader) == lines[:1990]
    append(file, "\n".join(lines[1990:]).encode() + b"\nbeg")
    assert cut(file, limit=1000, keep=3000)
    append(file, b"un\n")
    assert read_more(reader) == [*lines[1990:], "begun"]


def test_an_engine_takes_64_mib_of_disk_at_most(tmp_path: Path) -> None:
    """One byte more and the file is cut to its last MiB."""
    file = written(tmp_path, b"")
    os.truncate(file, 64 * MIB)
    assert cut(file) == 0
    os.truncate(file, 64 * MIB + 1)
    assert cut(file) == 63 * MIB + 1
    assert size_of(file) == MIB


def test_a_path_that_is_something_else_for_a_moment_holds_nothing_up(tmp_path: Path) -> None:
    """As /proc/PID/fd/1 of a shell that has it in a pipe: nobody waits for that, and nothing is read twice."""
    pipe, file, path = tmp_path / "pipe", written(tmp_path, b"one\ntwo\n"), tmp_path / "1"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # a read would wait for what it writes
    path.symlink_to(file)
    reader = LogReader(path, 0)
    assert reader.read() == ["one", "two"]
    path.unlink()
    path.symlink_to(pipe)
    assert reader.read() == []
    assert (size_of(path), last_lines(path, 5), cut(path, 1, 1)) == (0, (), 0)
    path.unlink()
    path.symlink_to(file)
    append(file, b"three\n")
    assert reader.read() == ["three"]
    os.close(writer)
