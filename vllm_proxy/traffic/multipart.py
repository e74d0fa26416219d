"""Uploads: a multipart form is spooled to a temporary file, and its field `model` is found as it arrives.

A form is never held in memory as a whole, and only the model's name in it is replaced. The file is removed with the
`with` block of its `Upload`.
"""

import asyncio
import contextlib
import re
import tempfile
from collections.abc import Iterator
from typing import IO, Self

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from vllm_proxy.domain.config import Server
from vllm_proxy.errors import RequestError
from vllm_proxy.runtime.turns import in_turns
from vllm_proxy.traffic.body import check_head
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.call import Call

_IN_MEMORY = 1024 * 1024  # larger uploads go to a file
_NAME_LIMIT = 1024
_STEP = 16 * 1024  # bytes that are parsed in one: of tiny parts that takes some milliseconds
_MOST_PARTS = 2000  # as what vLLM reads forms with: a thousand files and a thousand fields
_BOUNDARY = re.compile(rb"[ -~]{0,69}[!-~]")  # RFC 2046, section 5.1.1, which allows fewer signs still


class Upload:
    """A received form. `with upload:` removes its file."""

    def __init__(self, file: IO[bytes], size: int, model: str, span: tuple[int, int]) -> None:
        self._file = file
        self._size = size
        self._span = span  # of the model's name in the file
        self._name: bytes | None = None  # what stands there instead
        self.model = model

    @classmethod
    async def receive(cls, call: Call, server: Server, budget: Budget) -> Self:
        """Read a form to its end.

        Raises:
            RequestError: as `check_head`, `missing_model`, `request_timeout` where it stops coming, and
                `storage_full` where it cannot be kept.

        """
        check_head(call, server, budget)
        request = call.request
        finder = _Finder(next((value for name, value in request.raw_headers if name.lower() == b"content-type"), b""))
        file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by __exit__, or below
        try:
            size = await _spool(call, file, finder, server, budget)
            model, span = finder.result()
            _check_span(file, span, model)
            return cls(file, size, model, span)
        except BaseException:
            with contextlib.suppress(OSError):  # what it still buffers finds no room either
                file.close()
            raise

    def renamed(self, model_id: str) -> Self:
        """The same form with another `model`; every other byte stays."""
        self._name = model_id.encode()
        return self

    def __len__(self) -> int:
        if self._name is None:
            return self._size
        return self._size - (self._span[1] - self._span[0]) + len(self._name)

    def pieces(self, size: int) -> Iterator[bytes]:
        """All of it, from the beginning, in pieces of at most `size` bytes."""
        if self._name is None:
            yield from self._part(0, self._size, size)
            return
        yield from self._part(0, self._span[0], size)
        yield self._name
        yield from self._part(self._span[1], self._size, size)

    def _part(self, start: int, end: int, size: int) -> Iterator[bytes]:
        while start < end:
            self._file.seek(start)
            piece = self._file.read(min(size, end - start))
            start += len(piece)
            yield piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _check_span(file: IO[bytes], span: tuple[int, int], model: str) -> None:
    """A name that does not stand in one piece could not be replaced."""
    try:
        file.seek(span[0])  # writes what was buffered
        found = file.read(span[1] - span[0])
    except OSError as error:
        raise _not_kept(error) from None
    if found != model.encode():
        raise RequestError("bad_request", "cannot read the form: its field model is no plain text")


async def _spool(call: Call, file: IO[bytes], finder: "_Finder", server: Server, budget: Budget) -> int:
    content, size = call.request.content, 0
    while not content.at_eof():
        data = await content.readany()
        budget.take(call, len(data), server)
        size += len(data)
        async for start in in_turns(range(0, len(data), _STEP)):
            finder.feed(data[start : start + _STEP])
        try:
            await asyncio.to_thread(file.write, data) if size > _IN_MEMORY else file.write(data)
        except OSError as error:
            raise _not_kept(error) from None
    return size


def _not_kept(error: OSError) -> RequestError:
    """The folder for temporary files is full, or there is none."""
    place = tempfile.tempdir or "it"
    msg = f"cannot keep this upload in the folder for temporary files: {error.strerror}; make room in {place}"
    return RequestError("storage_full", f"{msg}, or set TMPDIR to another")


class _Finder:
    """Follows a form part by part and remembers where the field `model` is."""

    def __init__(self, content_type: bytes) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise RequestError("unsupported_media_type", "cannot read the body: expected multipart/form-data")
        if not _BOUNDARY.fullmatch(boundary):
            msg = "cannot read the form: expected a boundary of at most 70 printable ASCII characters"
            raise RequestError("bad_request", msg)
        self._parser = MultipartParser(boundary, {
            "on_part_begin": self._begin, "on_header_field": self._field, "on_header_value": self._value,
            "on_header_end": self._header, "on_part_data": self._data, "on_end": self._end,
        })  # fmt: skip
        self._parts = 0
        self._offset = 0  # of the data that is being parsed
        self._header_name = self._header_value = b""
        self._is_model = self._complete = False
        self._span: tuple[int, int] | None = None
        self._name = b""

    def feed(self, data: bytes) -> None:
        """The next bytes of the form."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise RequestError("bad_request", f"cannot read the form: {error}") from None
        self._offset += len(data)

    def result(self) -> tuple[str, tuple[int, int]]:
        """The model's name and where it stands."""
        if not self._complete:
            raise RequestError("bad_request", "cannot read the form: it ends before its last boundary")
        if self._span is None or not self._name:
            msg = "cannot route this request: its form has no field model; GET /v1/models lists them"
            raise RequestError("missing_model", msg, param="model")
        return self._name.decode("utf-8", errors="replace"), self._span

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise RequestError("bad_request", f"cannot read the form: it has more than {_MOST_PARTS} parts")
        self._is_model = False
        self._header_name = self._header_value = b""

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_value)
            self._is_model = options.get(b"name") == b"model"
            if self._is_model:
                self._span, self._name = None, b""  # the last one counts, as for engines
        self._header_name = self._header_value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_model:
            return
        begin = self._span[0] if self._span else self._offset + start
        self._span = (begin, self._offset + end)
        self._name += data[start:end]
        if len(self._name) > _NAME_LIMIT:
            raise RequestError(
                "missing_model", "cannot route this request: its model's name is too long", param="model"
            )

    def _end(self) -> None:
        self._complete = True
