"""Tokens as answers tell them, and as they are guessed before there is an answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.tokens import KEPT, Estimate, Tokens, of_event, of_head, of_json, of_stream

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        (b'{"type":"transcription.done","text":"a","usage":{"prompt_tokens":4,"completion_tokens":2}}', Tokens(4, 2)),
        (b'{"usage": {"prompt_tokens": 4, "total_tokens": 4}}', Tokens(4)),
        (b'{"usage":{"prompt_tokens":4,"completion_tokens":null,"prompt_tokens_details":null}}', Tokens(4)),
        (b'{"usage":{"prompt_tokens":4,"prompt_tokens_details":{"cached_tokens":3,"multimodal_tokens":{"image":2}}}}',
         Tokens(4, 0, 3)),
        (b'{"usage":{"input_tokens":4,"input_tokens_details":{"cached_tokens":3},"output_tokens":2}}', Tokens(4, 2, 3)),
        (b'{"usage":{"input_tokens":1,"output_tokens":2,"cache_read_input_tokens":3,"cache_creation_input_tokens":4}}',
         Tokens(8, 2, 3)),
        (b'{"usage":null}', None),
        (b'{"usage":{}}', None),
        (b'{"usage":{"type":"duration","seconds":3}}', None),
        (b'{"usage":{"prompt_tokens":"many"}}', None),
        (b'{"usage":{"prompt_tokens":4', None),
        (b'{"usage":{"a":{"b":{"c":1}', None),
        (b'{"usage":{"prompt_tokens":4,"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}}", None),
        (b'{"usage":' + b'{"x":' * 150 + b"1" + b"}" * 151, None),
        (b'{"usage":{"prompt_tokens":-4,"completion_tokens":2}}', None),
        (b'{"usage":{"prompt_tokens":4,"completion_tokens":%d}}' % 10**30, None),
        (b'{"tools":[{"usage":{"prompt_tokens":4}}],"usage":null}', None),
        (b'{"text":"\\"usage\\":{\\"prompt_tokens\\":4}"}', None),
        (b"", None),
    ],
)  # fmt: skip
def test_an_event_tells_its_tokens_in_the_words_of_any_api(data: bytes, tokens: Tokens | None) -> None:
    """OpenAI's, the responses API's and Anthropic's, whose input leaves cached tokens out; nothing else counts."""
    assert of_event(data) == tokens


def test_images_count_where_cohere_bills_them_apart() -> None:
    """The prompt is both."""
    billed = b'"meta":{"billed_units":{"input_tokens":3,"image_tokens":5}}'
    assert of_json("/v2/embed", b"", billed) == Tokens(8)


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/tokenize", "/v1/responses/{id}"])
def test_a_route_without_tokens_takes_none_whatever_it_answers(path: str) -> None:
    """Seconds of audio are no tokens, and a stored response was counted when it was made."""
    text = b'{"usage":{"prompt_tokens":4,"completion_tokens":2}}'
    assert of_json(path, text, text) == of_stream(path, text) == Tokens()


@given(st.binary(max_size=200) | st.text('{}"a:,', max_size=30).map(str.encode))
def test_no_bytes_are_an_error(text: bytes) -> None:
    """Whatever stands behind a mark, it is tokens or nothing."""
    for mark in (b'"usage":', b'"billed_units":', b'"choices":[],"usage":', b'},"usage":'):
        for path in (CHAT, "/v2/embed", "/rerank", "/v1/messages"):
            for found in (of_json(path, mark + text, mark + text), of_stream(path, mark + text), of_head(mark + text)):
                assert found is None or isinstance(found, Tokens)


def test_a_usage_is_shorter_than_what_is_kept() -> None:
    """With every field that vLLM has, and numbers of 7 digits."""
    details = b'{"cached_tokens":1000000,"created_cache_tokens":1000000,"multimodal_tokens":{"image":1,"video":1}}'
    text = (
        b'"choices":[],"usage":{"prompt_tokens":1000000,"total_tokens":1000000,"completion_tokens":1000000,'
        b'"prompt_tokens_details":%s,"completion_tokens_details":{"reasoning_tokens":1000000}}' % details
    )
    assert of_stream(CHAT, text[:KEPT]) == Tokens(1_000_000, 1_000_000, 1_000_000)


def test_a_token_is_four_bytes_before_the_first_answer_and_then_what_it_was() -> None:
    """At most the model's length."""
    estimate = Estimate()
    assert estimate.prompt(4000, binary=False) == 1001
    assert estimate.prompt(4000, most=512, binary=False) == 512
    for _ in range(20):
        estimate.learn(Tokens(100, 10), 800, binary=False)
    assert estimate.prompt(4000, binary=False) == 501


def test_what_was_learned_long_ago_counts_less() -> None:
    """A model whose prompts change is known again after some millions of tokens."""
    estimate = Estimate()
    for length in (8_000_000, 2_000_000):
        for _ in range(10):
            estimate.learn(Tokens(1_000_000), length, binary=False)
    assert estimate.prompt(1_000_000, binary=False) == pytest.approx(500_000, rel=0.05)


def test_a_body_with_files_takes_what_such_bodies_took() -> None:
    """The mean, whatever its length; before the first one a bound, so that no limit keeps it from being learned."""
    estimate = Estimate()
    assert estimate.prompt(10_000_000, binary=True) == 4096
    assert estimate.prompt(400, binary=True) == 101
    for tokens in (200, 400):
        estimate.learn(Tokens(tokens, 1), 10_000_000, binary=True)
    assert estimate.prompt(10_000_000, binary=True) == estimate.prompt(5, binary=True) == 301
    assert estimate.prompt(4000, binary=False) == 1001  # nothing was learned of texts


@given(outputs=st.lists(st.integers(0, 5000), min_size=1, max_size=200))
def test_nine_of_ten_of_the_last_answers_are_within_the_guess(outputs: list[int]) -> None:
    """Of the last 64; no smaller value has as many."""
    estimate = Estimate()
    assert estimate.output == 256
    for tokens in outputs:
        estimate.learn(Tokens(1, tokens), 10, binary=False)
    recent, guess = outputs[-64:], estimate.output
    assert 10 * sum(tokens <= guess for tokens in recent) >= 9 * len(recent)
    assert 10 * sum(tokens < guess for tokens in recent) < 9 * len(recent)


def test_what_ran_no_prompt_teaches_nothing() -> None:
    """As counting tokens does."""
    estimate = Estimate()
    estimate.learn(Tokens(), 1000, binary=False)
    assert (estimate.output, estimate.prompt(4000, binary=False)) == (256, 1001)
