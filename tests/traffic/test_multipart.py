"""Uploads: what a form says of its model, wherever the pieces that it comes in are cut."""

import asyncio
import contextlib
import itertools
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_proxy.domain.config import Server
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic import multipart
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.multipart import Upload

BOUNDARY = "----b0undary"
AUDIO = bytes(range(256)) * 3 + b"\r\n------b0undar\r\n--" + b"\r\n"


class Content:
    """A request's body as it comes in."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = [piece for piece in pieces if piece]

    def at_eof(self) -> bool:
        """Whether all of it was read."""
        return not self.pieces

    async def readany(self) -> bytes:
        """The next piece."""
        return self.pieces.pop(0)


class Request:
    """As much of a request as an upload needs."""

    def __init__(self, pieces: list[bytes], kind: str) -> None:
        self.content = Content(pieces)
        self.headers = {"Content-Type": kind}
        self.raw_headers = ((b"Content-Type", kind.encode()),)
        self.head: dict[bytes, bytes] = {b"content-type": kind.encode()}
        self.request = self
        self.held = 0


def part(head: str, value: bytes) -> bytes:
    """One part of a form."""
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + value + b"\r\n"


def field(name: str, value: bytes) -> bytes:
    """A field."""
    return part(f'Content-Disposition: form-data; name="{name}"', value)


END = f"--{BOUNDARY}--\r\n".encode()
FILE = part('Content-Disposition: form-data; name="file"; filename="model"\r\nContent-Type: audio/wav', AUDIO)
KIND = f"multipart/form-data; boundary={BOUNDARY}"


def cut_at(data: bytes, places: list[int]) -> list[bytes]:
    """The same bytes in pieces."""
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def received(pieces: list[bytes], kind: str = KIND, limit: int = 2**26) -> Upload:
    """The upload."""
    call: Any = Request(pieces, kind)
    return asyncio.run(Upload.receive(cast("Call", call), Server(max_body_size=limit), Budget()))


def refusal(body: bytes, kind: str = KIND, limit: int = 2**26) -> str:
    """The code with which a form is refused."""
    with pytest.raises(RequestError) as refused:
        received([body], kind, limit)
    assert refused.value.message.startswith("cannot ")
    return refused.value.code


@settings(deadline=None)
@given(places=st.lists(st.integers(0, 2000), max_size=12), where=st.integers(0, 2), size=st.integers(1, 500))
def test_a_form_is_found_and_kept_however_it_is_cut(places: list[int], where: int, size: int) -> None:
    """Its model's name, all its bytes, and with another name all its other bytes."""
    parts = [FILE, field("language", b"model")]
    parts.insert(where, field("model", b"an-alias"))
    body = b"".join(parts) + END
    parts[where] = field("model", b"chat")
    with received(cut_at(body, places)) as upload:
        assert upload.model == "an-alias"
        assert b"".join(upload.pieces(size)) == body
        assert len(upload) == len(body)
        renamed = upload.renamed("chat")
        pieces = list(renamed.pieces(size))
        assert b"".join(pieces) == b"".join(parts) + END
        assert len(renamed) == sum(map(len, pieces))
        assert max(map(len, pieces)) <= max(size, len("chat"))
        assert b"".join(renamed.pieces(size)) == b"".join(pieces), "a second try sends it from the beginning"


@settings(deadline=None)
@given(cut=st.integers(0, 1200))
def test_a_form_that_ends_early_is_refused(cut: int) -> None:
    """Wherever it ends, before its last boundary."""
    body = field("model", b"chat") + FILE + END
    whole = len(body) - len(b"\r\n")
    assert refusal(body[: min(cut, whole - 1)]) == "bad_request"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (FILE + END, "missing_model"),
        (field("model", b"") + END, "missing_model"),
        (field("Model", b"chat") + END, "missing_model"),
        (part('Content-Disposition: form-data; name="file"; filename="model"', b"chat") + END, "missing_model"),
        (field("model", b"x" * 2000) + END, "missing_model"),
        (field("model", b"\xff") + END, "bad_request"),
        (END, "missing_model"),
        (b"", "bad_request"),
        (b'{"model": "chat"}', "bad_request"),
        (field("model", b"chat").replace(b"\r\n\r\n", b"\r\n") + END, "bad_request"),
    ],
    ids="none empty case filename endless bytes no-parts nothing json no-blank-line".split(),
)
def test_a_form_without_a_usable_model_is_refused(body: bytes, code: str) -> None:
    """With the code that says why."""
    assert refusal(body) == code


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=x",
        "text/plain",
    ],
)
def test_another_content_type_is_refused(kind: str) -> None:
    """Before anything is read."""
    assert refusal(field("model", b"chat") + END, kind) == "unsupported_media_type"


def test_the_last_of_several_models_counts() -> None:
    """As for Starlette's forms; both are kept, the last is the one renamed."""
    body = field("model", b"first") + field("x", b"first") + field("model", b"last") + END
    with received([body]) as upload:
        assert upload.model == "last"
        assert b"".join(upload.renamed("chat").pieces(99)) == body.replace(b"last", b"chat")


def test_a_boundary_may_be_quoted_and_a_name_bare() -> None:
    """As RFC 2046 and RFC 7578 allow."""
    body = part("content-disposition: form-data; name=model", b"chat") + END
    with received([body], f'Multipart/Form-Data; charset=utf-8; boundary="{BOUNDARY}"') as upload:
        assert upload.model == "chat"


def test_a_form_over_the_limit_is_refused_as_soon_as_it_is() -> None:
    """The rest is not read."""
    body = field("model", b"chat") + field("file", b"x" * 10_000) + END
    assert refusal(body, limit=len(body) - 1) == "request_too_large"
    pieces = cut_at(body, [1000, 2000, 3000])
    call: Any = Request(pieces, KIND)
    with pytest.raises(RequestError):
        asyncio.run(Upload.receive(call, Server(max_body_size=1500), Budget()))
    assert len(call.content.pieces) == 2
    with received([body], limit=len(body)) as upload:
        assert len(upload) == len(body)


def test_a_form_of_very_many_parts_is_refused() -> None:
    """As by engines: it would take them, and the event loop, far longer than its bytes."""
    many = field("model", b"chat") + field("x", b"") * 1999
    with received([many + END]) as upload:
        assert upload.model == "chat"
    assert refusal(many + field("x", b"") + END) == "bad_request"


def test_others_have_their_turn_while_a_form_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much of it came at once, it is parsed in steps of 16 KiB."""
    fed: list[int] = []
    feed = multipart._Finder.feed

    def counted(finder: multipart._Finder, data: bytes) -> None:
        fed.append(len(data))
        feed(finder, data)

    monkeypatch.setattr(multipart._Finder, "feed", counted)
    body = field("model", b"chat") + field("x", bytes(100_000)) + END
    with received([body]) as upload:
        assert upload.model == "chat"
    assert sum(fed) == len(body)
    assert max(fed) == 16 * 1024


def test_a_large_form_lies_in_a_file_and_goes_with_it() -> None:
    """From a megabyte on; nothing of it is left afterwards."""
    body = field("model", b"chat") + field("file", b"x" * 3_000_000) + END
    with received(cut_at(body, [*range(0, 3_000_000, 65_536)])) as upload:
        file: Any = upload._file
        assert file._rolled
        assert b"".join(upload.pieces(2**18)) == body
    assert file.closed


@given(
    kind=st.binary(max_size=40) | st.binary(max_size=9).map(lambda odd: b"multipart/form-data; boundary=b; " + odd),
    body=st.lists(
        st.sampled_from(
            [
                b"--b",
                b"\r\n",
                b"--",
                b"Content-Disposition: form-data; ",
                b'name="model"',
                b"\xff",
                b"\0",
                b"name*=utf-8''%ff",
                b'"',
                b";",
                b"=",
                b"chat",
            ]
        )
    ).map(b"".join),
)
def test_no_form_is_a_fault(kind: bytes, body: bytes) -> None:
    """Whatever its bytes and those of its Content-Type are: it is taken, or refused with a reason."""

    async def receive() -> None:
        request = Request([body], "")
        request.raw_headers = ((b"Content-Type", kind),)
        with await Upload.receive(cast("Call", request), Server(), Budget()) as upload:
            assert upload.model

    with contextlib.suppress(RequestError):
        asyncio.run(receive())
