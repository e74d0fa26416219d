"""Every exception that this program raises on purpose, and the HTTP status of each error code.

For all rings, so nothing is imported from them here. A message has the form "cannot X: why" and says what to do. A
`RequestError` becomes an HTTP answer in `traffic/envelope.py`; any other exception that reaches a request is a bug.
tests/test_house.py checks that every code that is raised has a status.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

_SHOWN = 3  # problems in a message; all of them are listed beside it
_NAMED = 10  # models that there are, where one is asked for that is not


class VllmProxyError(Exception):
    """The root of all of them."""


class StartupError(VllmProxyError):
    """The daemon cannot start; exit status 1."""


class NotEndedError(VllmProxyError):
    """The daemon has stopped and engines live that it could not end; exit status 1."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing wrong with a configuration.

    `line` counts from 1, 0 where it cannot be known; `path` is the dotted key, "" for the file as a whole. `file`: the
    one that it is in, where that is not the file that was read but one that this names.
    """

    line: int
    path: str
    message: str
    file: str = ""

    def render(self, file: str) -> str:
        """`FILE:LINE: key.path: message`, as compilers print it, so that editors can jump there."""
        return f"{self.place(file)}: {self.message}"

    def place(self, file: str) -> str:
        """`FILE:LINE: key.path`: where it is, without any value of the file."""
        file = self.file or file
        place = f"{file}:{self.line}" if self.line else file
        return f"{place}: {self.path}" if self.path else place


def as_json(problem: Problem) -> dict[str, str | int]:
    """A problem as the API has it (`resources.Problem`)."""
    shown: dict[str, str | int] = {"path": problem.path, "line": problem.line, "message": problem.message}
    return shown | ({"file": problem.file} if problem.file else {})


class ConfigError(VllmProxyError):
    """A configuration that cannot be used, with every problem in it; exit status 78."""

    def __init__(self, file: str, problems: Sequence[Problem], attached: Mapping[str, str] | None = None) -> None:
        """`attached`: the files that it names, as in `Config`; where one is mended, it is to be read again."""
        super().__init__(f"cannot use {file}: {len(problems)} problem(s)")
        self.file = file
        self.attached = attached or {}
        self.problems = tuple(sorted(set(problems)))

    def lines(self) -> list[str]:
        """The problems, one a line."""
        return [problem.render(self.file) for problem in self.problems]

    def places(self) -> list[str]:
        """Where the problems are, one a line: for everybody, since a message may repeat what the file says.

        A problem of the file as a whole (it cannot be read) reveals nothing of its content, and is shown.
        """
        return [
            problem.place(self.file) if problem.line or problem.path else problem.render(self.file)
            for problem in self.problems
        ]


class NoDaemonError(VllmProxyError):
    """No daemon listens; exit status 3."""


class LostError(VllmProxyError):
    """The daemon was there, and is gone; exit status 3."""


class CommandError(VllmProxyError):
    """The daemon refused, could not do it, or does not answer; exit status 1."""


class RefusedError(CommandError):
    """The daemon refuses its configuration file; exit status 78."""

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message)
        self.problems = problems


class OutputError(VllmProxyError):
    """What a command prints cannot be written; exit status 1."""


class RequestError(VllmProxyError):
    """A request that cannot be served. `code` is a key of `STATUS`, and described in docs/errors.md."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after  # seconds

    @property
    def status(self) -> int:
        """The HTTP status of the code."""
        return STATUS[self.code]


def model_not_found(name: str, usable: Iterable[str] = ()) -> RequestError:
    """Of a model that is not there, and of one that is not for the caller: in the same words, so as to tell nothing.

    `usable`: those that there are for this caller; the first ten are named.
    """
    msg = f"cannot find model {name!r}: there is no such model, or this key may not use it"
    if named := list(islice(usable, _NAMED + 1)):
        more = " and more, which GET /v1/models lists" if len(named) > _NAMED else ""
        msg = f"{msg}; there is {', '.join(named[:_NAMED])}{more}"
    return RequestError("model_not_found", msg, param="model")


class AccessError(RequestError):
    """A caller that may not do this. `challenge`: what WWW-Authenticate says (RFC 6750)."""

    def __init__(self, code: str, message: str, challenge: str) -> None:
        super().__init__(code, message)
        self.challenge = challenge


class LimitError(RequestError):
    """A limit of the caller's key is reached."""

    def __init__(
        self,
        code: Literal["rate_limit_exceeded", "insufficient_quota"],
        message: str,
        kind: Literal["requests", "tokens", "insufficient_quota"],
        wait: float,
    ) -> None:
        """`kind`: the error's type, as OpenAI has it. `wait`: seconds until it may be sent again; inf: never."""
        super().__init__(code, message, retry_after=None if wait == math.inf else math.ceil(wait))
        self.kind = kind
        self.wait = wait


class InvalidError(RequestError):
    """A configuration that a request asked for and that cannot be used, with every problem in it."""

    def __init__(
        self, code: Literal["invalid_model", "invalid_key", "invalid_config"], problems: Sequence[Problem]
    ) -> None:
        shown = [f"{item.path}: {item.message}" if item.path else item.message for item in problems[:_SHOWN]]
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        super().__init__(code, f"cannot apply this: {'; '.join(shown)}{more}")
        self.problems = tuple(problems)


class EngineFailedError(RequestError):
    """An engine gave no answer, and none of it was passed on."""

    def __init__(self, message: str) -> None:
        super().__init__("engine_failed", message)


class LateRequestError(RequestError):
    """A client did not send its request in time. The code is that of an answer that took too long, the status is not.

    With 408 the client was too slow, with 504 the engine.
    """

    def __init__(self, message: str) -> None:
        super().__init__("request_timeout", message)

    @property
    def status(self) -> int:
        """408, Request Timeout."""
        return 408


STATUS = {
    "invalid_json": 400,
    "missing_model": 400,
    "invalid_max_tokens": 400,
    "bad_request": 400,
    "content_filter": 400,
    "missing_api_key": 401,
    "invalid_api_key": 401,
    "expired_api_key": 401,
    "missing_scope": 403,
    "isolation_unavailable": 403,
    "host_not_allowed": 403,
    "origin_not_allowed": 403,
    "model_not_found": 404,
    "key_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_cancelled": 410,
    "model_exists": 409,
    "key_exists": 409,
    "key_conflict": 409,
    "config_read_only": 409,
    "sleep_not_enabled": 409,
    "revision_mismatch": 412,
    "request_too_large": 413,
    "unsupported_media_type": 415,
    "expectation_failed": 417,
    "invalid_model": 422,
    "invalid_key": 422,
    "invalid_config": 422,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "headers_too_large": 431,
    "internal_error": 500,
    "unsupported_endpoint": 501,
    "engine_failed": 502,
    "model_error": 503,
    "model_disabled": 503,
    "model_stopped": 503,
    "no_room": 503,
    "queue_full": 503,
    "overloaded": 503,
    "usage_unavailable": 503,
    "moderation_unavailable": 503,
    "shutting_down": 503,
    "queue_timeout": 504,
    "not_rolled_out": 504,
    "request_timeout": 504,
    "config_not_written": 507,
    "storage_full": 507,
}
