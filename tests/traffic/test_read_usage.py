"""What an answer that is not metered tells of its tokens is at hand when it has ended, however its reads were cut."""

import itertools

import pytest

from tests.traffic.test_exchange import CHUNKED, DONE, EVENTS, LAST, Run
from vllm_proxy.domain import tokens
from vllm_proxy.domain.tokens import Tokens
from vllm_proxy.traffic.relay import usage_of

TOLD = b'{"choices":[],"usage":{"prompt_tokens":5,"total_tokens":9,"completion_tokens":4}}'
USAGE = b"data: %s\n\n" % TOLD
CHUNK = b"%x\r\n%s\r\n" % (len(USAGE), USAGE)
PARTS = (CHUNKED + EVENTS, CHUNK, DONE, LAST)


@pytest.mark.parametrize("cuts", list(itertools.product([False, True], repeat=3)), ids=str)
def test_a_stream_that_tells_it_before_its_end(cuts: tuple[bool, ...]) -> None:
    """Its usage, [DONE] and its last chunk come in one read or in several."""
    pieces = [PARTS[0]]
    for cut, part in zip(cuts, PARTS[1:], strict=True):
        if cut:
            pieces.append(part)
        else:
            pieces[-1] += part
    run = Run().feed(*pieces)
    assert tokens.of_event(usage_of(run.exchange)) == Tokens(5, 4, 0)


def test_a_body_that_tells_it_at_its_end() -> None:
    """In its last KiB; a text that speaks of usage is none."""
    text = b'{"content":"\\"usage\\":{\\"prompt_tokens\\":1}","usage":{"prompt_tokens":5,"completion_tokens":4}}'
    run = Run().feed(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text), text)
    assert tokens.of_event(usage_of(run.exchange)) == Tokens(5, 4, 0)


def test_an_answer_that_does_not_tell_it() -> None:
    """Nothing is guessed."""
    assert usage_of(Run().feed(CHUNKED + EVENTS, DONE, LAST).exchange) == b""
    assert usage_of(Run().feed(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").exchange) == b""
