"""What the daemon has in the file system, and somebody takes away: its Unix sockets, its state directory."""

from pathlib import Path

import aiohttp
import pytest

from tests.harness import daemon, fake_engines, until, vllm_proxy
from vllm_proxy.engine.state import StateDirectory
from vllm_proxy.errors import StartupError
from vllm_proxy.listen import listen_for_commands

MODEL = '[models.chat]\nmodel = "org/chat"\n'


async def answers(socket: Path) -> bool:
    """Whether somebody listens there."""
    if not socket.exists():
        return False
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session,
        session.get("http://localhost/health") as answer,
    ):
        return answer.status == 200


async def test_the_file_of_a_unix_socket_that_is_removed_is_made_anew(tmp_path: Path, port_start: int) -> None:
    """The control socket, for its owner alone, and those for clients; that is logged, and commands work again."""
    port = port_start + 199
    listens = f'[server]\nlisten = ["127.0.0.1:{port}", "unix:clients.sock"]\n'
    async with daemon(listens + fake_engines(port_start) + MODEL, tmp_path) as running:
        sockets = running.state_dir / "control.sock", tmp_path / "clients.sock"
        modes = [socket.stat().st_mode for socket in sockets]
        for _ in range(2):
            for socket in sockets:
                assert await answers(socket)
                socket.unlink()
            for socket in sockets:
                await until(lambda socket=socket: answers(socket), bool)  # type: ignore[misc]
        assert [socket.stat().st_mode for socket in sockets] == modes
        await running.logged("the file of a Unix socket was removed, and is made anew")
        assert (await vllm_proxy(tmp_path, "plan"))[:2] == (0, "nothing to do\n")
    assert not any(socket.exists() for socket in sockets)


async def test_another_file_in_the_place_of_a_socket_is_told_and_left_alone(tmp_path: Path, port_start: int) -> None:
    """It is somebody's; once it is gone, the socket is made anew."""
    async with daemon(fake_engines(port_start) + MODEL, tmp_path) as running:
        socket = running.state_dir / "control.sock"
        socket.unlink()
        socket.write_text("mine")
        await running.logged("nobody can connect by a Unix socket any more")
        assert socket.read_text() == "mine"
        socket.unlink()
        await until(lambda: answers(socket), bool)


async def test_a_control_socket_on_which_another_daemon_listens_is_not_taken(tmp_path: Path, port_start: int) -> None:
    """As where two have one runtime directory: commands for the first would go to the second, and then to nobody."""
    async with daemon(fake_engines(port_start) + MODEL, tmp_path) as running:
        socket = running.state_dir / "control.sock"
        with pytest.raises(StartupError, match="another process listens on it"):
            listen_for_commands(socket)
        assert await answers(socket)


async def test_a_state_directory_that_another_daemon_has_by_now_is_not_written(tmp_path: Path, port_start: int) -> None:
    """It was removed under this one: the record of the other's engines must not be replaced by this one's."""
    async with daemon(fake_engines(port_start) + MODEL, tmp_path) as running:
        await running.all_ready()
        (pid,) = await running.pids("chat")
        running.state_dir.rename(tmp_path / "removed")
        with StateDirectory(running.state_dir) as theirs:
            theirs.file.write_text("theirs")
            await until(lambda: answers(running.state_dir / "control.sock"), bool)
            await running.write("POST", "/models/chat/restart", status=202)
            await running.once("chat", lambda one: one["state"] == "ready" and one["pid"] != pid)
            await running.logged("was removed, and is another daemon's now; restart this one")
            assert theirs.file.read_text() == "theirs"
