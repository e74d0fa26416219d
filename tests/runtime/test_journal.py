"""The journal's native protocol: what is sent for what is logged."""

import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog

from vllm_proxy import logsetup
from vllm_proxy.runtime import journal, logline
from vllm_proxy.runtime.journal import Journal, datagram
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.traffic.access_log import AccessLog

type Entry = dict[str, str]


def read(data: bytes) -> Entry:
    """The fields of a datagram, as the journal reads them."""
    found: Entry = {}
    while data:
        head, _, data = data.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + size], data[9 + size :]
        found[name.decode()] = value.decode()
    return found


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    """In the place of the journal."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "journal"))
        server.settimeout(30)
        yield server


@pytest.fixture
def native(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Iterator[LogWriter]:
    """A daemon's log whose stderr is the journal."""
    before = structlog.get_config()
    stat = os.fstat(sys.stderr.fileno())
    monkeypatch.setattr(journal, "SOCKET", listening.getsockname())
    with LogWriter(2) as writer:
        environ = {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}
        form = logsetup.with_fields(logsetup.resolve("auto", environ), writer, environ)
        assert form == "native"
        logsetup.set_up("info", form, writer)
        yield writer
    cast("Any", writer.deliver).__self__.close()
    structlog.configure(**before)


def received(listening: socket.socket) -> Entry:
    """The next entry."""
    return read(listening.recv(2**20))


@pytest.mark.usefixtures("native")
def test_an_entry_can_be_found_by_its_model_its_instance_and_its_place(listening: socket.socket) -> None:
    """And reads as before: the facts stand in the message, too."""
    structlog.get_logger().error("the engine failed", instance="org/chat/0", reason="crashed")
    entry = received(listening)
    assert entry["MESSAGE"] == "the engine failed instance='org/chat/0' reason='crashed'"
    assert (entry["MODEL"], entry["INSTANCE"], entry["PRIORITY"]) == ("org/chat", "org/chat/0", "3")
    assert entry["SYSLOG_IDENTIFIER"] == "vllm-proxy"
    assert entry["CODE_FILE"] == __file__
    assert entry["CODE_FUNC"] == "test_an_entry_can_be_found_by_its_model_its_instance_and_its_place"
    assert entry["CODE_LINE"].isdigit()


@pytest.mark.usefixtures("native")
def test_a_traceback_is_one_entry(listening: socket.socket) -> None:
    """With its request, and without the values of variables."""
    secret = "a-" + "prompt"
    try:
        int(f"x{len(secret)}")
    except ValueError:
        structlog.get_logger().exception("a request failed", request_id="r-1", model="chat")
    entry = received(listening)
    first, second, *_, last = entry["MESSAGE"].splitlines()
    assert (first, second) == ("a request failed request_id='r-1' model='chat'", "Traceback (most recent call last):")
    assert last.startswith("ValueError: invalid literal")
    assert (entry["REQUEST_ID"], entry["MODEL"]) == ("r-1", "chat")
    assert secret not in str(entry)


def test_lines_of_engines_have_their_instance_and_their_priority(listening: socket.socket, native: LogWriter) -> None:
    """So `-p err` shows what an engine calls an error; and no line can pretend to be about another model."""
    output = logsetup.Output(native, "native", requests=True, engines=True)
    forged = f"<0>MODEL=other{logline.END_OF_FIELDS}text{logline.BREAK}more"
    lines = ["INFO 11-27 ready", "(EngineCore pid=7) ERROR 11-27 no memory", "WARNING 11-27 slow", forged]
    output.pass_on("chat/0", lines)
    found = [received(listening) for _ in lines]
    assert [entry["PRIORITY"] for entry in found] == ["6", "3", "4", "6"]
    assert {(entry["MODEL"], entry["INSTANCE"]) for entry in found} == {("chat", "chat/0")}
    assert found[1]["MESSAGE"] == "chat/0 | (EngineCore pid=7) ERROR 11-27 no memory"


def test_a_request_is_found_by_its_id(listening: socket.socket, native: LogWriter) -> None:
    """Its line in the access log."""
    call: Any = SimpleNamespace(
        started_at=0.0, ended_at=1.0, first_byte_at=0.0, request_id=b"r-7", engine_id=b"e-7", instance="chat/1",
        model="chat",
        request=SimpleNamespace(method="POST"), route="/v1/chat/completions", status=200, bytes_out=5,
        caller=SimpleNamespace(is_anonymous=True, name=""), client=None, code=None,
    )  # fmt: skip
    AccessLog(native, "native").write(call)
    entry = received(listening)
    assert (entry["REQUEST_ID"], entry["MODEL"], entry["INSTANCE"]) == ("r-7", "chat", "chat/1")
    assert entry["MESSAGE"].startswith("request id=r-7 ")


def test_secrets_are_hidden_in_fields_and_messages(listening: socket.socket, native: LogWriter) -> None:
    """As in every other form."""
    native.mask = lambda text: text.replace("s3cret-value", "***")
    structlog.get_logger().info("an engine said", instance="chat/0", words="s3cret-value")
    assert "s3cret" not in str(received(listening))


def test_what_is_no_entry_is_a_message() -> None:
    """As Python itself writes it, or a command; a priority in front counts."""
    assert read(datagram("plain words")) == {
        "PRIORITY": "6", "SYSLOG_IDENTIFIER": "vllm-proxy", "MESSAGE": "plain words",
    }  # fmt: skip
    assert read(datagram("<3>bad"))["PRIORITY"] == "3"


def test_a_message_that_no_datagram_holds_is_cut(listening: socket.socket) -> None:
    """The rest of it is lost, and the next entry comes."""
    to = Journal(listening.getsockname())
    assert to.send("x" * 2**20 + "\nnext\n") == 0
    long, following = received(listening), received(listening)
    assert (len(long["MESSAGE"]) < 2**18, long["MESSAGE"][-5:], following["MESSAGE"]) == (True, "[...]", "next")
    to.close()


def test_what_the_journal_does_not_take_is_counted(tmp_path: Path) -> None:
    """As lines that cannot be written are: the writer says how many are missing."""
    to = Journal(str(tmp_path / "gone"))
    assert to.send("one\ntwo\nhalf") == 2
    to.close()
    assert not journal.takes_entries(str(tmp_path / "gone"))


def test_where_there_is_no_journal_socket_lines_have_their_priority_in_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container, say; and where stderr is something else than the journal."""
    stat = os.fstat(sys.stderr.fileno())
    environ = {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "gone"))
    writer = LogWriter(2)
    assert logsetup.with_fields("journal", writer, environ) == "journal"
    assert logsetup.with_fields("journal", writer, {}) == "journal"
    assert logsetup.with_fields("text", writer, environ) == "text"
