"""Which secrets are hidden when: those that are in use, and the last ones that were."""

import re
import threading
import time
from collections.abc import Iterable

import pytest

from vllm_proxy.domain import secrets
from vllm_proxy.runtime import masking
from vllm_proxy.runtime.masking import Masking

TEXT = "of the file: file-secret; of an engine: engine-secret\n"


def test_nothing_is_hidden_where_there_are_no_secrets() -> None:
    """The text itself comes back."""
    assert Masking().mask(TEXT) is TEXT


def test_what_the_file_and_the_engines_hold_is_hidden() -> None:
    """Also when it is in use no more: it may stand in what was written before."""
    hidden = Masking()
    hidden.configure(["file-secret"])
    assert hidden.mask(TEXT) == "of the file: ***; of an engine: engine-secret\n"
    with hidden.held(["engine-secret"]):
        hidden.learn()
        assert hidden.mask(TEXT) == "of the file: ***; of an engine: ***\n"
    hidden.configure([])
    assert hidden.mask(TEXT) == "of the file: ***; of an engine: ***\n"


def test_of_those_that_were_in_use_the_last_thousand_are_hidden() -> None:
    """Those that are in use are never forgotten, however many come and go."""
    hidden = Masking()
    hidden.configure(["file-secret"])
    with hidden.held(["engine-secret", "file-secret"]):
        hidden.learn()
        for number in range(3):
            hidden.note(f"former-{number}-{one:05}" for one in range(1000))
        assert hidden.mask(TEXT) == "of the file: ***; of an engine: ***\n"
        assert hidden.mask("former-0-00000 former-2-00000 former-2-00999") == "former-0-00000 *** ***"


def test_two_engines_may_hold_the_same_secret() -> None:
    """It is in use until the last of them has ended."""
    hidden = Masking()
    with hidden.held(["engine-secret"]):
        with hidden.held(["engine-secret"]):
            hidden.learn()
        for one in range(2):
            hidden.note(f"former-{one}-{number:05}" for number in range(1000))
        assert "engine-secret" not in hidden.mask(TEXT)


def test_a_long_text_is_looked_at_in_pieces_of_whole_lines() -> None:
    """No secret is missed between two of them, and a line that is longer than a piece is one."""
    hidden = Masking()
    hidden.configure(["file-secret", "engine-secret"])
    text = TEXT * (3 * masking._PIECE // len(TEXT)) + "x" * 2 * masking._PIECE + TEXT + "file-secret"
    found = hidden.mask(text)
    assert "secret" not in found
    assert found.count("***") == text.count("secret")
    assert found.replace("***", "") == text.replace("file-secret", "").replace("engine-secret", "")


def test_thousands_of_secrets_hold_up_no_line() -> None:
    """The pattern is made once, and not with each line."""
    hidden = Masking()
    hidden.configure(f"secret-{number}-of-many" for number in range(5000))
    patterns = hidden._patterns
    for _ in range(100):
        assert hidden.mask(f"a secret-{4999}-of-many at {time.monotonic()}").startswith("a *** at")
    assert hidden._patterns is patterns


def test_a_new_secret_costs_a_small_pattern_and_not_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start of an engine has one: of a thousand that are known, few are looked at anew, and none is forgotten."""
    sizes: list[int] = []
    pattern = secrets.pattern

    def counted(values: Iterable[str]) -> re.Pattern[str] | None:
        sizes.append(len(found := list(values)))
        return pattern(found)

    hidden = Masking()
    hidden.configure(f"secret-{number:04}-of-many" for number in range(1000))
    monkeypatch.setattr(secrets, "pattern", counted)
    for number in range(100):
        with hidden.held([f"credential-{number:03}-of-one"]):
            hidden.learn()
            assert hidden.mask(f"a credential-{number:03}-of-one") == "a ***"
        assert hidden.mask("secret-0999-of-many credential-000-of-one") == "*** ***"
    assert sum(size >= 1000 for size in sizes) == 3
    assert sorted(sizes)[-4] == masking._MOST_YOUNG


@pytest.mark.parametrize(("first", "then"), [("one-secret", "one-secret-longer"), ("a-longer-secret", "longer-secret")])
def test_of_secrets_that_are_in_one_another_nothing_is_left(first: str, then: str) -> None:
    """Whichever of them comes later."""
    hidden = Masking()
    hidden.configure([first])
    hidden.note([then])
    assert hidden.mask(f"{first} {then}") == "*** ***"


def test_an_engine_ends_while_others_secrets_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes a while in a thread; the event loop, on which an engine begins and ends, waits for none of it."""
    hidden, learns, ended = Masking(), threading.Event(), threading.Event()
    in_time: list[bool] = []

    def slow(_: Iterable[str]) -> None:
        learns.set()
        in_time.append(ended.wait(10))

    monkeypatch.setattr(secrets, "pattern", slow)
    with hidden.held(["engine-secret"]):
        thread = threading.Thread(target=hidden.learn)
        thread.start()
        learns.wait()
        with hidden.held(["second-secret"]):
            pass
    ended.set()
    thread.join()
    assert in_time == [True]
