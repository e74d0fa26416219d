"""Engine output on disk."""

from pathlib import Path

from vllm_proxy.engine.logs import last_lines, size_of


def written(tmp_path: Path, data: bytes) -> Path:
    """A log file with these bytes."""
    file = tmp_path / "chat.log"
    file.write_bytes(data)
    return file


def test_the_last_lines_come_in_order(tmp_path: Path) -> None:
    """At most as many as asked for, the last one with or without its end."""
    file = written(tmp_path, b"one\ntwo\nthree")
    assert last_lines(file, 2) == ("two", "three")
    assert last_lines(file, 9) == ("one", "two", "three")


def test_no_lines_are_no_lines(tmp_path: Path) -> None:
    """Asked for none it gives none, not all."""
    assert last_lines(written(tmp_path, b"one\ntwo\n"), 0) == ()


def test_what_an_earlier_engine_wrote_is_left_out(tmp_path: Path) -> None:
    """A crash is never explained with the lines of the engine before."""
    file = written(tmp_path, b"Error of yesterday\n")
    since = size_of(file)
    assert last_lines(file, 20, since) == ()
    with file.open("ab") as log:
        log.write(b"today\n")
    assert last_lines(file, 20, since) == ("today",)


def test_only_the_end_of_a_large_file_is_read(tmp_path: Path) -> None:
    """64 KiB at most, whatever the number of lines."""
    file = written(tmp_path, b"x\n" * 100_000 + b"last\n")
    lines = last_lines(file, 1_000_000)
    assert lines[-1] == "last"
    assert sum(len(line) + 1 for line in lines) == 64 * 1024


def test_bytes_that_are_no_text_are_shown_as_such(tmp_path: Path) -> None:
    """A broken byte never hides the line it is in."""
    assert last_lines(written(tmp_path, b"bad \xff byte\n"), 1) == ("bad \ufffd byte",)


def test_a_progress_bar_is_one_line_a_step(tmp_path: Path) -> None:
    """The last state of a bar is what is shown, not the whole of it."""
    assert last_lines(written(tmp_path, b"10%\r50%\r90%"), 1) == ("90%",)


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """Before the first start there is no log, which is no error."""
    assert size_of(tmp_path / "none") == 0
    assert last_lines(tmp_path / "none", 5) == ()
    assert last_lines(tmp_path, 5) == ()
