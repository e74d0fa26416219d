"""Counting what answers took, and taking the usage out of streams: fed by hand, and with answers that vLLM 0.32 gave.

`answers` holds whole answers as they came from vLLM. What else an exchange does holds of a metered one too:
`test_exchange.py`.
"""

import asyncio
import itertools
import re
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traffic.test_exchange import Client, Engine, cut_at
from vllm_proxy.domain.tokens import Tokens
from vllm_proxy.traffic.exchange import Ending
from vllm_proxy.traffic.sieve import MeteredExchange
from vllm_proxy.traffic.wire import EngineConnection

ANSWERS = Path(__file__).parent / "answers"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
NONE = Tokens()
TOOK = {  # route, tokens as vLLM's own counters rose, but for the prompt of n answers, which these count n times
    "batch": (f"{CHAT}/batch", Tokens(66, 6)),
    "chat": (CHAT, Tokens(33, 3)),
    "chat_cached": (CHAT, Tokens(260, 2, 256)),
    "chat_error": (CHAT, None),
    "chat_n3": (CHAT, Tokens(33, 9)),
    "chat_prompt_logprobs": (CHAT, Tokens(33, 3)),  # more than a KiB of them, behind the usage
    "chat_stream": (CHAT, None),  # nobody asked for it
    "chat_stream_continuous": (CHAT, Tokens(33, 3)),  # usage in every event
    "chat_stream_logprobs": (CHAT, Tokens(33, 6)),
    "chat_stream_usage": (CHAT, Tokens(33, 3)),
    "classify": ("/classify", Tokens(7)),
    "completions": (COMPLETIONS, Tokens(4, 3)),
    "completions_stream": (COMPLETIONS, None),
    "completions_stream_usage": (COMPLETIONS, Tokens(4, 3)),
    "completions_two_prompts": (COMPLETIONS, Tokens(6, 12)),
    "count_tokens": (f"{MESSAGES}/count_tokens", NONE),
    "detokenize": ("/detokenize", NONE),
    "embeddings_base64": ("/v1/embeddings", Tokens(8)),
    "embeddings_bytes": ("/v1/embeddings", Tokens(8)),  # in the head
    "embeddings_bytes_only": ("/v1/embeddings", None),  # nowhere
    "generative_scoring": ("/generative_scoring", Tokens(12, 2)),
    "messages": (MESSAGES, Tokens(33, 3)),
    "messages_cached": (MESSAGES, Tokens(260, 2, 256)),
    "messages_cached_stream": (MESSAGES, Tokens(260, 2, 256)),
    "pooling": ("/pooling", Tokens(4)),
    "rerank": ("/v1/rerank", Tokens(17)),
    "responses": (RESPONSES, Tokens(33, 3)),
    "responses_background": (RESPONSES, None),  # accepted, and not answered yet
    "responses_cached_stream": (RESPONSES, Tokens(260, 2, 256)),
    "score": ("/score", Tokens(11)),
    "tokenize": ("/tokenize", NONE),
    "v2_embed": ("/v2/embed", Tokens(4)),
}
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CONTENT = b'data: {"choices":[{"delta":{"content":"\\"choices\\":[],\\"usage\\":{\\"prompt_tokens\\":9}"}}]}\n\n'
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"
EVENT_ERROR = b"data: broke\n\n"
LAST = b"0\r\n\r\n"


def chunk(text: bytes) -> bytes:
    """One chunk."""
    return b"%x\r\n%s\r\n" % (len(text), text)


def decoded(framed: bytes) -> bytes:
    """The text of a chunked body that is whole or ends behind a chunk."""
    texts = []
    while framed and framed != LAST:
        size, _, framed = framed.partition(b"\r\n")
        length = int(size, 16)
        assert framed[length : length + 2] == b"\r\n"
        texts.append(framed[:length])
        framed = framed[length + 2 :]
    return b"".join(texts)


class Run:
    """A metered exchange with both ends."""

    def __init__(self, *, path: str = CHAT, strip: bool = True, http10: bool = False) -> None:
        loop = asyncio.new_event_loop()
        self.client = Client()

        async def make() -> MeteredExchange:
            made = MeteredExchange(self.client, b"", EVENT_ERROR, http10=http10, no_body=False, close=False)
            made.meter(path, strip=strip, on_body=None)
            return made

        self.exchange = loop.run_until_complete(make())
        self.exchange.connection = cast("EngineConnection", Engine())
        loop.close()

    def feed(self, *pieces: bytes) -> "Run":
        """Bytes from the engine, as long as the exchange wants them."""
        for piece in pieces:
            if piece and not self.exchange.ended.done():
                self.exchange.feed(piece)
        return self

    @property
    def body(self) -> bytes:
        """What the client got behind the head."""
        return self.client.got.partition(b"\r\n\r\n")[2]

    @property
    def ending(self) -> Ending | None:
        """How it ended, None while it goes on."""
        return self.exchange.ended.result() if self.exchange.ended.done() else None


def recorded(name: str) -> bytes:
    """An answer of vLLM's."""
    return (ANSWERS / f"{name}.http").read_bytes()


def test_every_recorded_answer_is_in_the_table() -> None:
    """A file that nobody reads would prove nothing."""
    assert {file.stem for file in ANSWERS.iterdir()} == set(TOOK)


@pytest.mark.parametrize("name", TOOK)
@pytest.mark.parametrize("step", [1, 7, 100, 1000, 1_000_000])
@pytest.mark.parametrize("http10", [False, True])
def test_the_tokens_of_a_recorded_answer_are_found_however_it_comes(name: str, step: int, *, http10: bool) -> None:
    """On every route; and every byte of its body is passed on."""
    path, tokens = TOOK[name]
    answer = recorded(name)
    run = Run(path=path, strip=False, http10=http10)
    run.feed(*(answer[n : n + step] for n in range(0, len(answer), step)))
    assert run.ending is Ending.WHOLE
    assert run.exchange.tokens == tokens
    body = answer.partition(b"\r\n\r\n")[2]
    assert run.body == (decoded(body) if http10 and b"transfer-encoding" in answer else body)


@pytest.mark.parametrize(("metered", "unmetered"), [("chat_stream_usage", "chat_stream"),
                                                    ("completions_stream_usage", "completions_stream")])  # fmt: skip
def test_a_metered_stream_is_the_unmetered_one_but_for_the_fingerprint(metered: str, unmetered: str) -> None:
    """Of the same request to real vLLM: only `system_fingerprint`, ids and the time differ, and no event more."""
    run = Run(path=TOOK[metered][0]).feed(recorded(metered))
    expected = decoded(recorded(unmetered).partition(b"\r\n\r\n")[2])

    def same(text: bytes) -> bytes:
        text = re.sub(rb',"system_fingerprint":"[^"]*"', b"", text)
        return re.sub(rb'"id":"[^"]*"|"created":\d+', b"", text)

    assert same(decoded(run.body)) == same(expected)
    assert run.exchange.tokens == TOOK[metered][1]
    assert expected.count(b"fingerprint") == 1


@pytest.mark.parametrize("name", ["chat_stream_usage", "chat_stream_logprobs", "completions_stream_usage"])
def test_the_usage_is_taken_out_of_a_recorded_stream_in_every_split(name: str) -> None:
    """In two reads and byte by byte: exactly the chunk with the usage is missing, with its framing."""
    answer = recorded(name)
    body = answer.partition(b"\r\n\r\n")[2]
    usage = re.search(rb"[0-9a-f]+\r\ndata: [^\n]*\"choices\":\[\],[^\n]*\n\n\r\n", body)
    assert usage
    expected = body.replace(usage[0], b"")
    for at in range(len(answer)):
        run = Run(path=TOOK[name][0]).feed(answer[:at], answer[at:])
        assert (run.body, run.exchange.tokens, run.ending) == (expected, TOOK[name][1], Ending.WHOLE), at
    run = Run(path=TOOK[name][0]).feed(*(answer[n : n + 1] for n in range(len(answer))))
    assert (run.body, run.exchange.tokens, run.ending) == (expected, TOOK[name][1], Ending.WHOLE)
    assert run.exchange.body_bytes == len(expected)


@settings(max_examples=400)
@given(
    events=st.lists(
        st.sampled_from(
            [CONTENT, CONTENT, USAGE, b": ping\n\n", b"data: a\r\n\r\n", b"data: %s\n\n" % (b"y" * 40_000)]
        ),
        max_size=6,
    ),
    chunks=st.lists(st.integers(0, 10**6), max_size=8),
    places=st.lists(st.integers(0, 10**6), max_size=8),
    fine=st.booleans(),
    http10=st.booleans(),
)
def test_only_the_events_with_usage_are_taken_out_however_all_is_cut(
    events: list[bytes], chunks: list[int], places: list[int], *, fine: bool, http10: bool
) -> None:
    """Into chunks of any size, several events in one or one in several, and into reads of any size."""
    text = b"".join([*events, DONE])
    pieces = [piece for piece in cut_at(text, chunks) if piece]
    framed = b"".join(map(chunk, pieces)) + LAST
    reads = cut_at(framed, [*places, *range(0, len(framed), 3 if len(framed) < 2000 else 5000)] if fine else places)
    run = Run(http10=http10).feed(CHUNKED, *reads)
    assert run.ending is Ending.WHOLE
    expected = b"".join(event for event in [*events, DONE] if event != USAGE)
    assert (run.body if http10 else decoded(run.body)) == expected
    assert run.exchange.tokens == (Tokens(5, 7) if USAGE in events else None)


@settings(max_examples=300)
@given(
    events=st.lists(st.sampled_from([CONTENT, USAGE, b": ping\n\n", b"data: %s\n\n" % (b"y" * 40_000)]), max_size=4),
    chunks=st.lists(st.integers(0, 10**6), max_size=6),
    places=st.lists(st.integers(0, 10**6), max_size=6),
    path=st.sampled_from([CHAT, COMPLETIONS, MESSAGES, RESPONSES]),
)
def test_a_stream_that_is_only_read_passes_as_it_came(
    events: list[bytes], chunks: list[int], places: list[int], path: str
) -> None:
    """With its framing; and its tokens are found where the route has them."""
    framed = b"".join(chunk(piece) for piece in cut_at(b"".join([*events, DONE]), chunks) if piece) + LAST
    run = Run(strip=False, path=path).feed(CHUNKED, *cut_at(framed, places))
    assert (run.ending, run.body) == (Ending.WHOLE, framed)
    if path in {CHAT, COMPLETIONS}:
        assert run.exchange.tokens == (Tokens(5, 7) if USAGE in events else None)


def test_a_usage_event_that_shares_its_chunk_leaves_the_rest_of_it() -> None:
    """The chunk is framed anew."""
    run = Run().feed(CHUNKED, chunk(CONTENT + USAGE), chunk(USAGE + DONE) + LAST)
    assert run.body == chunk(CONTENT) + chunk(DONE) + LAST
    assert run.exchange.tokens == Tokens(5, 7)


@pytest.mark.parametrize("http10", [False, True])
def test_an_event_that_is_too_long_to_be_held_is_passed_on_before_its_end(*, http10: bool) -> None:
    """All but a few KiB of it, whatever its chunks; and the usage behind it is taken out nevertheless."""
    long = b"data: {%s}\n\n" % (b"y" * 100_000)
    framed = chunk(long)
    run = Run(http10=http10).feed(CHUNKED, framed[:50_000], framed[50_000:90_000])
    assert len(run.body) > 89_000
    run.feed(framed[90_000:])
    assert run.body.rstrip().endswith(b"}")
    run.feed(chunk(CONTENT), chunk(USAGE), chunk(DONE) + LAST)
    assert (run.body if http10 else decoded(run.body)) == long + CONTENT + DONE
    assert (run.ending, run.exchange.tokens) == (Ending.WHOLE, Tokens(5, 7))


@pytest.mark.parametrize("http10", [False, True])
@pytest.mark.parametrize("chunks", [1, 100])
def test_an_event_with_usage_that_does_not_end_is_not_held_for_ever(*, http10: bool, chunks: int) -> None:
    """However its chunks are cut: some 64 KiB of it are, then it goes on as it is."""
    piece = b"z" * 20_000
    begin = USAGE[:-2] + piece
    framed = chunk(begin) if chunks > 1 else b"%x\r\n%s" % (100_000_000, begin)
    run = Run(http10=http10).feed(CHUNKED, framed)
    for number in range(2, 100):
        run.feed(chunk(piece) if chunks > 1 else piece)
        assert len(run.body) > number * len(piece) - 100_000
    assert run.exchange.tokens == Tokens(5, 7)


@pytest.mark.parametrize("cut", range(1, len(chunk(USAGE))))
def test_a_stream_that_breaks_inside_the_usage_is_cut(cut: int) -> None:
    """As any that breaks inside an event; it did not tell what it took."""
    run = Run().feed(CHUNKED, chunk(CONTENT), chunk(USAGE)[:cut])
    assert run.body == chunk(CONTENT)
    run.exchange.lost(None)
    assert (run.ending, run.client.cut, run.exchange.tokens) == (Ending.BROKEN, True, None)
    assert EVENT_ERROR not in run.body


def test_a_stream_that_breaks_behind_the_usage_says_so_and_has_told_what_it_took() -> None:
    """The client sees the error behind the last content; the tokens are exact."""
    run = Run().feed(CHUNKED, chunk(CONTENT), chunk(USAGE))
    run.exchange.lost(ConnectionResetError())
    assert (run.ending, run.client.cut, run.exchange.tokens) == (Ending.BROKEN, False, Tokens(5, 7))
    assert run.body == chunk(CONTENT) + chunk(EVENT_ERROR) + LAST


def test_a_stream_that_ends_early_has_counted_its_events() -> None:
    """Whole ones, about one for each token; anything else has none."""
    run = Run().feed(CHUNKED, chunk(CONTENT) * 3, chunk(CONTENT), chunk(CONTENT)[:50])
    run.exchange.abandon()
    assert (run.exchange.events, run.exchange.tokens) == (4, None)
    whole = Run().feed(CHUNKED, chunk(CONTENT) * 3, chunk(USAGE), chunk(DONE) + LAST)
    assert whole.exchange.events == 5
    assert Run().feed(recorded("chat")).exchange.events == 0
    assert Run().feed(recorded("embeddings_bytes")).exchange.events == 0


@pytest.mark.parametrize("broken_off", [False, True])
def test_the_first_event_of_a_message_tells_no_tokens_yet(*, broken_off: bool) -> None:
    """It has the prompt's, and 0 of the answer's; only the last event counts."""
    answer = recorded("messages_cached_stream")
    assert answer.count(b'"usage":{') == 2
    end = answer.index(b"event: message_delta") if broken_off else answer.index(b"event: message_stop")
    run = Run(path=MESSAGES).feed(answer[:end])
    assert run.exchange.tokens == (None if broken_off else Tokens(260, 2, 256))


def test_a_long_answer_is_read_where_its_usage_stands() -> None:
    """At the beginning of a ranking, at the end of embeddings, in the middle of a chat with its prompt's tokens."""
    usage = b'"usage":{"prompt_tokens":5,"completion_tokens":7}'
    filler = b"1," * 100_000
    for path, body in (
        ("/v2/rerank", b'{"id":"x",%s,"results":[%s0]}' % (usage, filler)),
        ("/v1/embeddings", b'{"data":[%s0],%s}' % (filler, usage)),
        (CHAT, b'{"choices":[],%s,"prompt_token_ids":[%s0]}' % (usage, filler)),
    ):
        for step in (1000, 65_536, 10**7):
            pieces = [body[n : n + step] for n in range(0, len(body), step)]
            run = Run(path=path).feed(JSON + b"Content-Length: %d\r\n\r\n" % len(body), *pieces)
            assert (run.exchange.tokens, run.body) == (Tokens(5, 7), body)
            framed = b"".join(map(chunk, pieces)) + LAST
            run = Run(path=path).feed(JSON + b"Transfer-Encoding: chunked\r\n\r\n", *cut_at(framed, [999, 40_000]))
            assert (run.exchange.tokens, run.body) == (Tokens(5, 7), framed)


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("http10", [False, True])
def test_reads_that_end_with_an_event_pass_as_any_other(*, strip: bool, http10: bool) -> None:
    """Those that are not looked into: one event, several, and a usage that goes over the chunks of one read."""
    for at in range(1, len(USAGE)):
        halves = chunk(CONTENT) + chunk(USAGE[:at]) + chunk(USAGE[at:])
        run = Run(strip=strip, http10=http10)
        run.feed(CHUNKED, chunk(CONTENT), chunk(CONTENT) * 2, chunk(CONTENT), halves, chunk(DONE) + LAST)
        assert (run.ending, run.exchange.tokens) == (Ending.WHOLE, Tokens(5, 7))
        text = CONTENT * 5 + (b"" if strip else USAGE) + DONE
        assert (run.body if http10 else decoded(run.body)) == text


def test_an_answer_that_has_not_begun_tells_nothing() -> None:
    """Neither one that was lost before its head nor one that was declined."""
    run = Run()
    run.exchange.lost(None)
    assert (run.ending, run.exchange.tokens, run.exchange.events) == (Ending.UNANSWERED, None, 0)


def test_reads_of_many_sizes_keep_the_order() -> None:
    """Whole events, halves and several at once, in turn: nothing is lost, doubled or overtaken."""
    events = [b'data: {"choices":[{"n":%d}]}\n\n' % n for n in range(60)]
    framed = b"".join(chunk(event) for event in [*events, USAGE, DONE]) + LAST
    edges = itertools.accumulate(itertools.cycle([33, 34, 100, 5, 68, 1, 34]), initial=0)
    edge = list(itertools.takewhile(lambda at: at < len(framed), edges))
    reads = [framed[start:end] for start, end in itertools.pairwise([*edge, len(framed)])]
    run = Run().feed(CHUNKED, *reads)
    assert run.body == b"".join(chunk(event) for event in [*events, DONE]) + LAST
    assert run.exchange.tokens == Tokens(5, 7)
