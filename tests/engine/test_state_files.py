"""What cannot be written of the state is written as soon as it can be. In virtual time."""

import tomllib
from pathlib import Path

from structlog.testing import capture_logs

from tests.engine.virtual import passes, virtual
from vllm_proxy.engine.state_files import StateFiles


def nothing() -> None:
    """They may be written."""


@virtual
async def test_what_cannot_be_written_is_written_once_it_can_be(tmp_path: Path) -> None:
    """The newest of it, within seconds, though nothing happens; until then the problem is shown, and logged once."""
    state, file = StateFiles(nothing), tmp_path / "engines.toml"
    file.mkdir()  # does to root what a read-only directory does to others
    with capture_logs() as logs:
        for number in range(3):
            state.replace(file, {"number": number})
        await passes(60)
        assert state.problem == f"cannot write {file}: Is a directory"
        file.rmdir()
        await passes(5.1)
        assert tomllib.loads(file.read_text()) == {"number": 2}
        assert state.problem is None
        await passes(60)
    assert [entry["event"] for entry in logs] == ["the state cannot be written", "the state is written again"]


@virtual
async def test_one_file_that_cannot_be_written_keeps_no_other_back(tmp_path: Path) -> None:
    """Each is tried by itself; and none any more once it is closed."""
    state, bad, good = StateFiles(nothing), tmp_path / "a.toml", tmp_path / "b.toml"
    bad.mkdir()
    state.replace(bad, {"a": 1})
    state.replace(good, {"b": 1})
    assert tomllib.loads(good.read_text()) == {"b": 1}
    assert state.problem == f"cannot write {bad}: Is a directory"
    state.close()
    bad.rmdir()
    await passes(60)
    assert not bad.exists()


@virtual
async def test_files_that_are_anothers_by_now_are_left_alone(tmp_path: Path) -> None:
    """Whatever was to be written."""

    def refuse() -> None:
        raise OSError("it is another daemon's")

    state = StateFiles(refuse)
    state.replace(tmp_path / "engines.toml", {"a": 1})
    await passes(60)
    assert not (tmp_path / "engines.toml").exists()
    assert state.problem == f"cannot write {tmp_path}/engines.toml: it is another daemon's"
    state.close()
