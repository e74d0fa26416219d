"""Keys are written into the right one of two files, and only where both are valid together."""

import os
from functools import partial
from pathlib import Path

import pytest

from vllm_proxy.domain.file import edit_keys
from vllm_proxy.domain.file.edit_keys import KeyTexts
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.errors import ConfigError, RequestError
from vllm_proxy.fleet.changes import KeyFiles
from vllm_proxy.fleet.store import Store
from vllm_proxy.runtime.referenced import ReferencedFiles

HASH, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
SERVER = '[server]\nkeys_file = "keys.toml"  # not in git\n'
CI = f'[keys.ci]\nhash = "{HASH}"\n'

new = partial(edit_keys.create, name="new", keys={"hash": OTHER})
disable = partial(edit_keys.patch, name="ci", change={"enabled": False})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration that names a file for keys, which is not there yet."""
    (tmp_path / "models.toml").write_text(SERVER)
    return tmp_path


def files_in(folder: Path, *, credentials: Path | None = None, keys_file: str | None = None) -> KeyFiles:
    """Those of the configuration there."""
    file = folder / "models.toml"
    return KeyFiles(
        Store(file),
        lambda data, files: parse_config(data, str(file), files=files),
        ReferencedFiles(folder, None if credentials is None else str(credentials)),
        keys_file,
    )


def test_the_first_key_makes_the_file(folder: Path) -> None:
    """Which the configuration already names; that one is not touched."""
    change = files_in(folder).change(new)
    assert not (folder / "keys.toml").exists()
    assert [change.config.keys["new"].source, change.before] == ["keys_file", None]
    change.write()
    assert (folder / "keys.toml").read_text() == f'[keys.new]\nhash = "{OTHER}"\n'
    assert (folder / "keys.toml").stat().st_mode & 0o7 == 0
    assert (folder / "models.toml").read_text() == SERVER


def written(file: Path) -> tuple[int, int]:
    """Which file it is, and when it was written: reading it changes neither."""
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def test_only_the_file_that_has_the_key_is_written(folder: Path) -> None:
    """And what it means with the other one is known before."""
    (folder / "keys.toml").write_text(CI)
    (folder / "models.toml").write_text(SERVER + f'[keys.here]\nhash = "{OTHER}"\n')
    before = written(folder / "models.toml")
    change = files_in(folder).change(disable)
    change.write()
    assert not change.config.keys["ci"].enabled
    assert change.config.keys["here"].enabled
    assert written(folder / "models.toml") == before
    assert (folder / "keys.toml").read_text() == CI + "enabled = false\n"


def test_what_changes_nothing_writes_nothing(folder: Path) -> None:
    """Not even where nobody could write."""
    (folder / "keys.toml").write_text(CI)
    (folder / "keys.toml").chmod(0o444)
    change = files_in(folder).change(partial(edit_keys.finish, name="ci"))
    change.write()
    with pytest.raises(RequestError) as error:
        files_in(folder).change(disable).write()
    assert error.value.code == "config_read_only"


def test_the_environment_may_name_the_file(folder: Path) -> None:
    """It is stronger than the configuration, as for every key of the server."""
    (folder / "models.toml").write_text("")
    (folder / "others.toml").write_text(CI)
    assert files_in(folder, keys_file="others.toml")._read()[1:] == ("others.toml", CI.encode())


@pytest.mark.parametrize("has_file", [True, False])
def test_the_revision_is_of_both_files(folder: Path, has_file: bool) -> None:  # noqa: FBT001 - a table of cases
    """A change of either is a mismatch for who has read before; without a keys file it is the configuration's alone."""
    (folder / "models.toml").write_text((SERVER if has_file else "") + f'[keys.here]\nhash = "{OTHER}"\n')
    (folder / "keys.toml").write_text(CI)
    files = files_in(folder)
    config = files.change(lambda texts: texts).config
    assert (config.keys_revision == config.revision) is not has_file
    files.change(lambda texts: texts, config.keys_revision)
    for file in ("models.toml", "keys.toml") if has_file else ("models.toml",):
        before = (folder / file).read_text()
        (folder / file).write_text(before + "# mine\n")
        with pytest.raises(RequestError) as error:
            files.change(lambda texts: texts, config.keys_revision)
        assert error.value.code == "revision_mismatch"
        (folder / file).write_text(before)
    files.change(lambda texts: texts, config.keys_revision)


@pytest.mark.parametrize(
    ("config", "keys", "problem"),
    [
        (SERVER, "[keys\n", "this is no TOML"),
        (SERVER, CI + "[models.x]\nmodel = 'x'\n", "tables [keys.NAME] alone"),
        (SERVER + CI, CI, "is in"),
        ("[server]\nprt = 1\n" + CI, "", "did you mean port"),
        ("\ufeff" + CI, "", "byte order mark"),
        ("[server\n" + CI, "", "this is no TOML"),
        (SERVER + "keys = 5\n", CI, "unknown key"),
        ("keys = 5\n" + SERVER, CI, "expected tables [keys.NAME]"),
        ("[server]\nkeys_file = 5\n" + CI, "", "expected a string"),
        ('[server]\nkeys_file = "a\\u0000b"\n' + CI, "", "expected the path of a file"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_already_is_said_as_such(folder: Path, config: str, keys: str, problem: str) -> None:
    """By whoever wants to write; nothing is written."""
    (folder / "models.toml").write_text(config)
    (folder / "keys.toml").write_text(keys)
    for edit in (new, disable):
        with pytest.raises(ConfigError) as error:
            files_in(folder).change(edit)
        assert any(problem in line for line in error.value.lines()), error.value.lines()


def test_a_file_that_is_not_utf_8_is_said_to_be_so(folder: Path) -> None:
    """Either of them."""
    (folder / "keys.toml").write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError, match="1 problem"):
        files_in(folder).change(new)
    (folder / "models.toml").write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError) as error:
        files_in(folder).change(new)
    assert "expected UTF-8" in error.value.lines()[0]


def test_a_change_elsewhere_needs_the_file_that_is_missing(folder: Path) -> None:
    """Only a new key makes it: what is written must be what a daemon would start with."""
    (folder / "models.toml").write_text(SERVER + CI)
    with pytest.raises(ConfigError) as error:
        files_in(folder).change(disable)
    assert "keys.toml" in error.value.lines()[0]


def test_what_would_be_invalid_is_refused(folder: Path) -> None:
    """With the place of what is wrong, in the file where it would stand."""
    (folder / "keys.toml").write_text(CI)
    with pytest.raises(ConfigError) as error:
        files_in(folder).change(partial(edit_keys.create, name="new", keys={"hash": "planted"}))
    (problem,) = error.value.problems
    assert problem.path.startswith("keys.new.hash")
    assert problem.file == str(folder / "keys.toml")
    assert "planted" not in str(error.value.lines())


def test_a_credential_cannot_be_written(folder: Path) -> None:
    """Keys in the configuration itself can."""
    (folder / "models.toml").write_text('[server]\nkeys_file = "credential:keys"\n' + CI)
    (folder / "credentials").mkdir()
    (folder / "credentials" / "keys").write_text(f'[keys.there]\nhash = "sha256:{"3" * 64}"\n')
    files = files_in(folder, credentials=folder / "credentials")
    with pytest.raises(RequestError, match="change it where it comes from") as error:
        files.change(new)
    assert error.value.code == "config_read_only"
    files.change(disable).write()
    assert "enabled = false" in (folder / "models.toml").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_file_that_root_makes_is_the_owners_of_the_configuration(folder: Path) -> None:
    """Or the daemon, which is another user, could not read its own keys."""
    os.chown(folder / "models.toml", 12345, 23456)
    files_in(folder).change(new).write()
    found = (folder / "keys.toml").stat()
    assert (found.st_uid, found.st_gid) == (12345, 23456)


def test_an_edit_sees_what_is_on_disk(folder: Path) -> None:
    """Whatever was read before."""
    seen: list[KeyTexts] = []

    def look(texts: KeyTexts) -> KeyTexts:
        seen.append(texts)
        return texts

    files = files_in(folder)
    (folder / "keys.toml").write_text(CI)
    files.change(look)
    (folder / "keys.toml").write_text("# nothing\n")
    files.change(look)
    assert seen == [KeyTexts(SERVER, CI), KeyTexts(SERVER, "# nothing\n")]
