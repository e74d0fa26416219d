"""Keys: their names, globs and changes; and that no table of keys is a fault, or shows what it holds."""

import math
import re
import string
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_proxy.domain.config import Config
from vllm_proxy.domain.file import edit_keys
from vllm_proxy.domain.file.edit_keys import KeyTexts
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.key_table import KeyTable
from vllm_proxy.domain.keys import (
    ALL,
    RANDOM_BYTES,
    Key,
    Scope,
    changes,
    closure,
    hash_of,
    is_mistyped,
    name_problem,
    new_key,
    own_key_problem,
    without_included,
)
from vllm_proxy.domain.limits import Rate
from vllm_proxy.domain.references import NoFiles
from vllm_proxy.errors import ConfigError, VllmProxyError

HASH = hash_of("k" * 40)
MARK = "Zq7"  # stands in every text that a table of keys is given, and so in no message
NUMBER = 987654321  # as above, of the numbers


class Given(NoFiles):
    """Files by reference."""

    def __init__(self, **files: bytes) -> None:
        self._files = files

    def read(self, text: str) -> bytes:
        """What was given."""
        return self._files[text] if text in self._files else super().read(text)


def problems(text: str | bytes, **files: bytes) -> list[str]:
    """What is wrong with a configuration, as it is shown; with files that it names."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    try:
        parse_config(data, "models.toml", files=Given(**files))
    except ConfigError as error:
        return [str(error), *error.lines()]
    return []


# Names and keys


@given(st.text(max_size=70) | st.text(string.ascii_lowercase + string.digits + "._-", max_size=70))
@example("a\n")
@example("\u0130")
@example("env")
@example("env-admin")
@example("anonymous")
def test_a_name_is_what_its_pattern_says(name: str) -> None:
    """Of ASCII letters in lower case, digits and . _ -; two names are the environment's."""
    good = re.fullmatch("[a-z0-9][a-z0-9._-]*", name) and name.isascii() and "\n" not in name and len(name) <= 64
    assert (name_problem(name) is None) == bool(good and name not in {"env", "env-admin"})


@given(st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES), st.integers(0, 51), st.characters())
def test_a_key_is_found_by_scanners_and_a_mistyped_one_is_told(random: bytes, at: int, other: str) -> None:
    """`vp-` and 49 characters; one other character anywhere behind that, or one less, and the sum does not fit."""
    key = new_key(random)
    assert re.fullmatch(r"vp-[A-Za-z0-9_-]{43}[0-9A-Za-z]{6}", key)
    assert not is_mistyped(key)
    assert own_key_problem(key) is None
    changed = key[:at] + other + key[at + 1 :]
    assert is_mistyped(changed) == (changed != key and changed.startswith("vp-"))
    assert is_mistyped(key[:-1])


@given(st.text(max_size=60))
def test_no_text_is_a_fault_as_a_key(text: str) -> None:
    """It is a key of somebody's own, or there is a reason why not, which does not repeat it."""
    problem = own_key_problem(text)
    assert is_mistyped(text) in {True, False}
    if problem is None:
        assert len(text) >= 32
        assert re.fullmatch("[!-~]+", text)
    elif len(text) > 3 and text in problem:  # a word of the message itself
        assert any(text in str(own_key_problem(other)) for other in ("", "~", "\n" * 40))


# Globs


def _matches(glob: str, name: str) -> bool:
    """By the words of fnmatch(3), a character at a time: what is there is compared with another way to read it."""
    if not glob:
        return not name
    first = glob[0]
    if first == "*":
        return any(_matches(glob[1:], name[start:]) for start in range(len(name) + 1))
    if not name:
        return False
    if first == "[" and (end := glob.find("]", 2 if glob[1:2] != "!" else 3)) > 0:
        inside = glob[1:end]
        negated = inside.startswith("!")
        return (_among(inside.removeprefix("!"), name[0]) != negated) and _matches(glob[end + 1 :], name[1:])
    return (first == "?" or first == name[0]) and _matches(glob[1:], name[1:])


def _among(letters: str, letter: str) -> bool:
    found, at = False, 0
    while at < len(letters):
        if at + 2 < len(letters) and letters[at + 1] == "-":
            found = found or letters[at] <= letter <= letters[at + 2]
            at += 3
        else:
            found = found or letters[at] == letter
            at += 1
    return found


NAMES = st.text("abAB/.:-", min_size=1, max_size=5)
GLOBS = st.text("abAB/.:-*?", max_size=5) | st.sampled_from(
    ["[ab]*", "[!a]", "[a-b]?", "*[/.]*", "[a", "a]", "**", "[]"]
)


@given(st.lists(GLOBS, max_size=3), st.dictionaries(NAMES, st.lists(NAMES, max_size=2), max_size=4))
@example(["*"], {"a": []})
@example(["A"], {"a": ["A"]})
def test_globs_allow_what_they_match_and_the_aliases_of_its_ids(globs: list[str], models: dict[str, list[str]]) -> None:
    """In the case of the letters; one for an alias alone does not allow the id."""
    found = Key("ci", (), ALL, tuple(globs)).allowed(models)
    hit = {name for name in {*models, *(alias for aliases in models.values() for alias in aliases)}
           if any(_matches(glob, name) for glob in globs)}  # fmt: skip
    expected = hit | {alias for model_id, aliases in models.items() if model_id in hit for alias in aliases}
    if found is None:
        assert "*" in globs
    else:
        assert found == expected


# What a table may say

_TEXTS = st.one_of(
    st.text(max_size=8).map(lambda text: MARK + text),
    st.sampled_from([
        f"vp-{MARK}", f"sha256:{MARK}", f"credential:{MARK}", f"credential:../{MARK}", f"{MARK}\0", f"/{MARK}",
        f"sk-{MARK}{'x' * 40}", f"https://u:{MARK}@h/",
    ]),
)  # fmt: skip
_TIMES = st.one_of(st.datetimes(), st.datetimes(timezones=st.just(UTC)), st.dates(), st.times())
_PLAIN: st.SearchStrategy[Any] = st.one_of(
    _TEXTS, st.just(NUMBER), st.just(float(NUMBER)), st.just(-NUMBER), st.booleans(), _TIMES, st.just(math.inf)
)
_ANYTHING = st.recursive(
    _PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "file", "hash"]), inner, max_size=2)
    ),
    max_leaves=5,
)
_KNOWN = st.sampled_from(sorted(KeyTable.model_fields))
_GOOD = st.fixed_dictionaries(
    {},
    optional={
        "hash": st.sampled_from([HASH, [HASH], [HASH, hash_of("x" * 32)]]),
        "scopes": st.lists(st.sampled_from([*Scope]), max_size=3),
        "models": st.lists(st.sampled_from(["*", "a*"]), max_size=2),
        "enabled": st.booleans(),
    },
)
_NAMED = st.sampled_from(["ci", "anonymous", "admin", "env", "UPPER", "a b", "-x", ""])
_ODD_KEYS = st.dictionaries(_KNOWN | st.sampled_from(["hashes", "x"]), _ANYTHING, max_size=3)
_TABLES = st.one_of(
    st.builds(lambda good, odd: {**good, **odd}, _GOOD, _ODD_KEYS),
    _TEXTS.map(lambda text: {"file": text}),
    _TEXTS.map(lambda text: {"hash": text}),
    st.builds(lambda good, text: {**good, "hash": [HASH, text]}, _GOOD, _TEXTS),
)
_KEYS = st.one_of(st.dictionaries(_NAMED, _TABLES | _ANYTHING, max_size=3), _ANYTHING)


def shows(found: list[str]) -> bool:
    """Whether a message shows something of what a table holds."""
    return any(MARK in line or str(NUMBER)[:7] in line for line in found)


@given(_KEYS)
def test_no_table_of_keys_is_a_fault_and_no_message_shows_what_it_holds(keys: object) -> None:
    """In the configuration and in a file of its own: it means something, or each problem says what was expected."""
    text = tomli_w.dumps({"keys": keys})
    found = problems(text)
    assert not shows(found)
    beside = problems('[server]\nkeys_file = "k"\n', k=text.encode())
    assert not shows(beside)
    assert bool(found) == bool(beside)


@given(_KEYS, st.floats(0, 1), st.sampled_from(["", "=", '"', "[", "]", "\n", "'''", "#", "{", "x"]), st.integers(0, 9))
def test_a_table_of_keys_that_is_no_toml_shows_nothing_either(keys: object, at: float, put: str, cut: int) -> None:
    """Something is put in or left out anywhere, as by a hand that slips: also where that is the name of the table."""
    text = tomli_w.dumps({"keys": keys})
    place = round(at * len(text))
    broken = text[:place] + put + text[place + cut :]
    assert not shows(problems(broken))
    assert not shows(problems('[server]\nkeys_file = "k"\n', k=broken.encode()))


@pytest.mark.parametrize(
    "text",
    [
        f"[keys.ci]\nhash = {MARK}",
        f"[keys.ci]\nhash = sha256:{MARK}",
        f"[key.ci]\nhash = sha256:{MARK}",
        f"[kyes.ci]\nhash = {MARK}",
        f"[keys.ci\nhash = {MARK}",
        f"hash = vp-{MARK}",
        f"keys = {MARK}",
        f"keys.ci = {MARK}",
        f"keys.ci.hash = {MARK}",
        f"keys = {{ ci = {{ hash = {MARK} }} }}",
        f"[keys.ci]\nhash = [\n  {MARK}\n]",
        f"[keys.ci]\nhash: {MARK}",
        f"[keys]\nci: {MARK}",
        f"[keys.ci]\ndescription = x\nfoo = {MARK}",
        f'[keys.ci]\nhash = "{MARK}',
        f"[keys.ci]\nfile = {MARK}",
        f'[keys.ci]\nfile = "{MARK}"',
        f'[keys.ci]\nfile = "credential:{MARK}"',
    ],
)
def test_a_key_that_was_pasted_is_not_shown(text: str) -> None:
    """Without its quotes, in the place of its hash or of a file, below a header that is misspelt."""
    assert (found := problems(text))
    assert not shows(found)
    assert (found := problems('[server]\nkeys_file = "k"', k=text.encode()))
    assert not shows(found)


@pytest.mark.parametrize(
    "text",
    [
        '[keys.ci.limits."{}"]\nx = 1',
        '[keys."{}"]\nscopes = []',
        '[keys]\n"{}" = "inference"',
        '[keys.ci]\n"{}" = true',
        '[keys.ci."{}"]\na = 1',
    ],
)
def test_a_key_that_was_pasted_as_a_name_is_not_shown(text: str) -> None:
    """A name is no longer than 64 lower-case letters: what is none, and as long as a key, may be one."""
    key = new_key(b"x" * RANDOM_BYTES)
    for found in (problems(text.format(key)), problems('[server]\nkeys_file = "k"', k=text.format(key).encode())):
        assert found
        assert not [line for line in found if key in line]


@given(st.binary(max_size=80) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"\xff\xfe[\0k\0")
@example(b"[keys.a]\nhash = 1" + b"0" * 5000)
@example(b"a" + b".a" * 3000 + b" = 1")
@example(b"keys = " + b"[" * 5000)
def test_no_bytes_in_a_file_of_keys_are_a_fault(data: bytes) -> None:
    """They are keys, or there is a problem that names the file."""
    problems('[server]\nkeys_file = "k"\n', k=data)
    problems('[keys.ci]\nfile = "k"\n', k=data)


@given(st.binary(max_size=80))
def test_what_a_file_holds_in_the_place_of_a_key_is_not_shown(data: bytes) -> None:
    """It is a key, or the message says what was expected."""
    found = problems('[keys.ci]\nfile = "k"\n', k=MARK.encode() + data)
    assert not shows(found)


def test_the_key_is_the_first_line_of_its_file() -> None:
    """Whatever stands below: comments in any language, a line end of another system."""
    key = "k" * 40
    for data in (key, f"{key}\n", f"{key}\r\n", f"  {key}  \n\n# für das Tor\n"):
        config = parse_config(b'[keys.ci]\nfile = "k"\n', "models.toml", files=Given(k=data.encode()))
        assert hash_of(key).endswith(config.keys["ci"].digests[0].hex())


def test_a_glob_of_limits_that_matches_no_model_is_told() -> None:
    """It is no error, since the model may come later; one that is as long as a key is not repeated."""
    text = '[models.chat]\nmodel = "m"\n[keys.ci]\nfile = "k"\n[keys.ci.limits]\nchta = {}\n'
    config = parse_config(f'{text}"{"x" * 32}" = {{}}\n'.encode(), "models.toml", files=Given(k=b"k" * 40))
    assert config.warnings() == [
        "[keys.ci.limits] has a glob 'chta', which matches no model",
        "[keys.ci.limits] has a glob '***', which matches no model",
    ]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ("chat = {}", ["'chat' without a limit"]),
        ('chat = {}\n"c*" = {tokens_per_minute = 1}', []),  # all but that one
        (
            'chat = {}\n"x*" = {tokens_per_minute = 1}\n"c*" = {}',
            ["'chat' without a limit", "'x*', which matches no model", "'c*' without a limit"],
        ),
    ],
)
def test_a_table_of_limits_that_limits_nothing_is_told(limits: str, expected: list[str]) -> None:
    """But for one that takes its models out of another's limits."""
    text = f'[models.chat]\nmodel = "m"\n[keys.ci]\nfile = "k"\n[keys.ci.limits]\n{limits}\n'
    found = parse_config(text.encode(), "models.toml", files=Given(k=b"k" * 40)).warnings()
    assert found == [f"[keys.ci.limits] has a glob {one}" for one in expected]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("tokens_per_minute = 99", "[keys.ci] has max_output_tokens of no less than its tokens_per_minute"),
        ("tokens_per_month = 100", "[keys.ci] has max_output_tokens of no less than its tokens_per_month"),
        (
            "limits.chat.tokens_per_minute = 9",
            "[keys.ci] has max_output_tokens of no less than tokens_per_minute for 'chat'",
        ),
        ("tokens_per_minute = 101\nlimits.chat.requests_per_minute = 1", ""),
    ],
)
def test_an_answer_that_never_fits_is_told(keys: str, expected: str) -> None:
    """A request that asks for no length holds `max_output_tokens` and its prompt, so all of them would be refused."""
    text = f'[models.chat]\nmodel = "m"\n[keys.ci]\nfile = "k"\nmax_output_tokens = 100\n{keys}\n'
    found = parse_config(text.encode(), "models.toml", files=Given(k=b"k" * 40)).warnings()
    tail = ": a request that asks for no shorter answer is always refused"
    assert found == ([expected + tail] if expected else [])


def of_keys(text: str) -> Config:
    """A configuration with these keys."""
    return parse_config(text.encode(), "models.toml", files=Given(k=b"k" * 40, l=b"l" * 40))


def test_the_way_to_engines_that_take_turns_and_back_names_its_cause() -> None:
    """The first key with limits, a revoked one too, or `server.fair`; a second one changes nothing."""
    none, fair = (of_keys(f'{text}[keys.a]\nfile = "k"\n') for text in ("", "[server]\nfair = true\n"))
    one = of_keys('[keys.a]\nfile = "k"\n[keys.b]\nfile = "l"\nenabled = false\npriority = 1\n')
    two = of_keys('[keys.a]\nfile = "k"\nweight = 2\n[keys.b]\nfile = "l"\npriority = 1\n')
    cost = ": all whose args have no scheduling-policy are replaced"
    in_order = " engines take requests in the order of their keys from now on" + cost
    assert one.warnings(since=none) == ["because of [keys.b]" + in_order]
    assert fair.warnings(since=none) == ["because of server.fair" + in_order]
    assert [two.warnings(since=one), fair.warnings(since=two), one.warnings()] == [[], [], []]
    assert none.warnings(since=two) == [
        f"engines take requests as they come from now on, as [keys.a] asks for no order any more{cost}"
    ]


def test_an_unknown_key_of_limits_is_told_with_those_that_there_are() -> None:
    """They are not those of the key's own table."""
    (_, found) = problems('[keys.ci]\nfile = "k"\n[keys.ci.limits.chat]\nmodels = 1\n', k=b"k" * 40)
    assert found.endswith("unknown key; expected one of requests_per_minute, tokens_per_minute")


# What a change does

_OF_KEYS = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.builds(
        Key,
        st.just("x"),
        st.sampled_from([(), (b"1",), (b"1", b"2")]),
        st.sampled_from([ALL, frozenset[Scope]()]),
        enabled=st.booleans(),
        description=st.sampled_from(["", "d"]),
    ),
)


@given(_OF_KEYS, _OF_KEYS)
def test_changes_tell_of_each_key_once(before: Mapping[str, Key], after: Mapping[str, Key]) -> None:
    """Added, changed or removed; what says the same is not told, and there and back is nothing."""

    def says(key: Key) -> tuple[Key, str]:
        return key, key.description

    found = changes(before, after)
    told = [*found["added"], *found["changed"], *found["removed"]]
    assert len(told) == len(set(told))
    assert set(found["added"]) == after.keys() - before.keys()
    assert set(found["removed"]) == before.keys() - after.keys()
    both = before.keys() & after.keys()
    assert set(found["changed"]) == {name for name in both if says(before[name]) != says(after[name])}
    assert changes(before, before) == {"added": [], "changed": [], "removed": []}
    back = changes(after, before)
    assert (back["added"], back["removed"], set(back["changed"])) == (
        [name for name in before if name not in after],
        [name for name in after if name not in before],
        set(found["changed"]),
    )


@given(st.lists(st.sampled_from([*Scope])))
def test_scopes_are_shown_as_short_as_they_can_be(scopes: list[Scope]) -> None:
    """And mean the same."""
    shown = without_included(closure(scopes))
    assert closure(shown) == closure(scopes)
    assert all(closure(one for one in shown if one is not left) != closure(shown) for left in shown)


# What is sent, and what is in the file then

_WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)
_SENT = st.fixed_dictionaries(
    {},
    optional={
        "description": _WORDS,
        "scopes": st.lists(st.sampled_from([scope.value for scope in Scope]), max_size=3),
        "models": st.lists(_WORDS.filter(bool), max_size=2),
        "enabled": st.booleans(),
        "isolate_cache": st.booleans(),
        "requests_per_minute": st.integers(0, 10**15),
        "tokens_per_month": st.integers(0, 10**15),
        "priority": st.integers(-1000, 1000),
        "weight": st.floats(0.001, 1000),
        "limits": st.dictionaries(
            _WORDS.filter(bool),
            st.fixed_dictionaries({}, optional={"tokens_per_minute": st.integers(0, 10**15)}),
            max_size=3,
        ),
        "expires_at": st.datetimes(
            min_value=datetime(1970, 1, 2),  # noqa: DTZ001 - the strategy adds the offset
            timezones=st.sampled_from([UTC, timezone(timedelta(hours=2)), timezone(-timedelta(hours=9, minutes=30))]),
        ).map(lambda when: when.isoformat(timespec="milliseconds")),
    },
)


@given(st.sampled_from(["ci", "a.b", "0", "anonymous", "x" * 64]), _SENT, st.booleans())
def test_what_is_sent_for_a_new_key_is_what_the_file_means(name: str, sent: dict[str, Any], beside: bool) -> None:  # noqa: FBT001 - made by hypothesis
    """Through JSON, TOML and back, in either file; the key that is told is the one whose hash is there."""
    key, table = edit_keys.issued(name, sent, b"r" * RANDOM_BYTES)
    server = '[server]\nkeys_file = "k"\n' if beside else ""
    texts = edit_keys.create(KeyTexts(server, "# keys\n" if beside else None), name, table)
    config = parse_config(texts.config.encode(), "models.toml", files=Given(k=(texts.keys_file or "").encode()))
    found = config.keys[name]
    assert [HASH_OF + one.hex() for one in found.digests] == ([] if key is None else [hash_of(key)])
    assert found.scopes == closure(sent.get("scopes", ["inference"]))
    assert found.models == tuple(sent.get("models", ["*"]))
    assert (found.enabled, found.isolate_cache) == (sent.get("enabled", True), sent.get("isolate_cache", False))
    limits = found.limits
    assert (limits.rate, limits.tokens_per_month) == (
        Rate(sent.get("requests_per_minute", 0)),
        sent.get("tokens_per_month", 0),
    )
    assert (limits.priority, limits.weight) == (sent.get("priority", 0), sent.get("weight", 1.0))
    assert dict(limits.models) == {
        glob: Rate(0, rate.get("tokens_per_minute", 0)) for glob, rate in sent.get("limits", {}).items()
    }
    assert found.description == sent.get("description", "")
    when = sent.get("expires_at")
    assert found.expires_at == (None if when is None else datetime.fromisoformat(when).timestamp())


HASH_OF = "sha256:"
_ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.text(max_size=9) | st.just("ci"), st.dictionaries(_KNOWN | st.text(max_size=5), _ODD, max_size=4))
def test_whatever_is_sent_is_written_or_refused(name: str, sent: dict[str, Any]) -> None:
    """Never a fault, and what is written is TOML that means a configuration or tells its problems."""
    texts = KeyTexts(f'[keys.ci]\nhash = "{HASH}"\n')
    for how in (edit_keys.create, edit_keys.patch):
        try:
            _, table = edit_keys.issued(name, sent, b"r" * RANDOM_BYTES)
            written = how(texts, name, table if how is edit_keys.create else sent)
        except VllmProxyError:
            continue
        problems(written.config)
