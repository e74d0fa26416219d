"""Checks of ours for schemathesis, which imports this module (SCHEMATHESIS_HOOKS): no answer shows a secret."""

import os
from pathlib import Path
from typing import Any

import schemathesis

from tests.fuzz import HIDDEN

_hidden = Path(os.environ[HIDDEN]).read_text(encoding="utf-8").split("\n")


def no_secret_is_told(_context: object, response: Any, case: Any) -> None:  # noqa: ANN401 - schemathesis' own
    """Not in its head, not in its body: no key of the configuration, no hash, no value of an environment."""
    if case.operation.label == "GET /config":  # the exact text, for administrators
        return
    told = response.content.decode("utf-8", "replace") + str(response.headers)
    for secret in _hidden:
        if secret in told:
            message = f"an answer holds {secret[:6]}..."
            raise AssertionError(message)


def an_error_is_in_the_envelope(_context: object, response: Any, case: Any) -> None:  # noqa: ANN401 - as above
    """`{"error": {"message", "code", ...}}`, and an X-Request-Id on everything."""
    assert response.headers.get("x-request-id"), "an answer has no X-Request-Id"
    is_ours = "x-vllm-proxy-instance" not in response.headers
    if response.status_code >= 400 and response.content and is_ours and case.operation.label != "GET /ready":
        error = response.json()["error"]
        assert error["message"].startswith(("cannot ", "missing", "expected")), "an error says nothing"
        assert isinstance(error["code"], str), "an error has no code"


for check in (no_secret_is_told, an_error_is_in_the_envelope):
    schemathesis.check(check)
