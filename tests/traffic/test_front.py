"""The seam to aiohttp's inside: these fail, by name, when a new aiohttp moves what front.py stands on."""

import importlib.metadata
import inspect

from aiohttp import StreamReader, base_protocol, web, web_protocol, web_request
from aiohttp.http_exceptions import LineTooLong

from vllm_proxy.traffic import direct


def test_the_aiohttp_is_one_that_the_seam_was_written_for() -> None:
    """Another minor version wants a look at front.py, then a change here."""
    assert importlib.metadata.version("aiohttp").startswith("3.14.")


def test_the_server_takes_what_the_front_gives_it() -> None:
    """web.Server keeps handler, factory, loop and options under these names."""
    source = inspect.getsource(web.Server)
    for name in ("self._loop", "self._kwargs", "self.request_handler", "self.request_factory"):
        assert name in source
    assert list(inspect.signature(web.Server._make_request).parameters)[1:] == [
        "message", "payload", "protocol", "writer", "task",
    ]  # fmt: skip


def test_a_connection_calls_what_the_front_overrides() -> None:
    """pause_writing, resume_writing, connection_lost and handle_error exist with these parameters."""
    handler = web_protocol.RequestHandler
    assert list(inspect.signature(handler.handle_error).parameters) == ["self", "request", "status", "exc", "message"]
    assert list(inspect.signature(handler.connection_lost).parameters) == ["self", "exc"]
    for name in ("pause_writing", "resume_writing"):
        assert list(inspect.signature(getattr(handler, name)).parameters) == ["self"]
    assert isinstance(inspect.getattr_static(handler, "writing_paused"), property)
    assert issubclass(LineTooLong, Exception)


def test_a_written_answer_has_what_the_server_asks_of_a_response() -> None:
    """finish_response calls prepare and write_eof, start reads keep_alive: nothing else, so nothing else is made."""
    source = inspect.getsource(web_protocol.RequestHandler.finish_response)
    assert "resp.prepare" in source
    assert "resp.write_eof()" in source
    start = inspect.getsource(web_protocol.RequestHandler.start)
    assert "resp.keep_alive" in start
    assert direct.Sent(keep_alive=True).keep_alive is True
    assert direct.Sent(keep_alive=False).keep_alive is False


def test_a_request_shows_what_the_relay_reads_of_it() -> None:
    """raw_path, raw_headers, version, keep_alive, transport and content are properties of BaseRequest."""
    for name in ("raw_path", "raw_headers", "version", "keep_alive", "transport", "content", "protocol", "method"):
        assert hasattr(web_request.BaseRequest, name), name


def test_a_connection_has_what_the_looks_at_it_read() -> None:
    """What a connection does now, and the timer of its rest, are kept under these names; the server has all of them."""
    slots = {*web_protocol.RequestHandler.__slots__, *base_protocol.BaseProtocol.__slots__}
    assert slots >= {
        "_messages", "_waiter", "_current_request", "_request_count", "_keepalive_handle", "_lingering_time",
        "_paused", "_reading_paused", "_upgraded", "transport",
    }  # fmt: skip
    assert "self._process_keepalive" in inspect.getsource(web_protocol.RequestHandler)
    assert "self._lingering_time" in inspect.getsource(web_protocol.RequestHandler.start)
    assert "self._connections" in inspect.getsource(web.Server)
    assert hasattr(StreamReader, "set_exception")


def test_a_connection_has_what_is_answered_past_the_servers_loop() -> None:
    """`direct_connection` does what `start` and `_handle_request` do, with what they keep under these names."""
    handler = web_protocol.RequestHandler
    assert {*handler.__slots__, *base_protocol.BaseProtocol.__slots__} >= {
        "_buffer_paused", "_close", "_force_close", "_handler_waiter", "_keepalive", "_keepalive_timeout", "_loop",
        "_next_keepalive_close_time", "_read_bufsize", "_request_in_progress", "_task_handler",
    }  # fmt: skip
    for name in ("_pause_reading_for_buffer", "_resume_reading_for_buffer", "_pause_transport_reading"):
        assert list(inspect.signature(getattr(handler, name)).parameters) == ["self"]
    assert list(inspect.signature(handler.finish_response).parameters) == ["self", "request", "resp", "start_time"]
    assert list(inspect.signature(handler.shutdown).parameters) == ["self", "timeout"]
    source = inspect.getsource(handler.connection_lost)
    assert "self._task_handler.cancel()" in source


def test_a_request_keeps_its_parts_under_the_names_that_are_made_when_asked_for() -> None:
    """What `direct.ReadRequest` does not set, nor makes, is no part of aiohttp's request."""
    parts = {name for name in web_request.BaseRequest.ATTRS if name.startswith("_")}
    never = {"_post", "_read_bytes", "_client_max_fields", "_task"}  # defaults of the class, and what no handler reads
    given = {"_message", "_payload", "_protocol", "_method", "_version", "_transport_peername", "_loop"}
    inherited = {name for name in parts if name.startswith(("_content_", "_stored_", "_parsed_"))}
    assert parts - never - given - inherited == set(direct._MADE)
