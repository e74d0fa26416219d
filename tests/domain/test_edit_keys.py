"""Keys are edited where they stand, in the configuration or in the file that it names."""

import tomllib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.file.edit_keys import KeyTexts, create, delete, finish, issued, patch, rotate
from vllm_proxy.domain.keys import hash_of, is_mistyped
from vllm_proxy.errors import RequestError

ONE, TWO, THREE, FOUR, FIVE = (f"sha256:{digit * 64}" for digit in "12345")
CONFIG = f"""\
[models.chat]
model = "org/chat"

# The build servers. Ask Ada.
[keys.ci]
hash = "{ONE}"  # of May
scopes = ["inference"]

[keys.sops]
file = "credential:sops"

[keys.anonymous]
scopes = ["inference"]
"""
KEYS_FILE = f"""\
# Not in git.
[keys.me]
hash = ["{ONE}", "{TWO}"]  # being rotated
"""
BOTH = KeyTexts(CONFIG, KEYS_FILE)


def test_a_new_key_goes_into_the_keys_file_where_there_is_one() -> None:
    """Also where that is empty or not there yet; else into the configuration."""
    table = '[keys.new]\nhash = "x"\n'
    assert create(BOTH, "new", {"hash": "x"}) == KeyTexts(CONFIG, f"{KEYS_FILE}\n{table}")
    assert create(KeyTexts(CONFIG, ""), "new", {"hash": "x"}) == KeyTexts(CONFIG, table)
    assert create(KeyTexts(CONFIG), "new", {"hash": "x"}) == KeyTexts(f"{CONFIG}\n{table}")


@pytest.mark.parametrize(("name", "changed"), [("ci", "config"), ("me", "keys_file")])
def test_a_key_is_changed_where_it_stands(name: str, changed: str) -> None:
    """By a patch, a rotation, its end; the other text stays as it is, and every comment does."""
    for after in (
        patch(BOTH, name, {"enabled": False}),
        rotate(BOTH, name, THREE),
        finish(rotate(BOTH, name, THREE), name),
    ):
        assert (after.config != CONFIG, after.keys_file != KEYS_FILE) == (changed == "config", changed == "keys_file")
        for comment in ("# The build servers. Ask Ada.", "# of May", "# Not in git.", "# being rotated"):
            assert comment in after.config + str(after.keys_file)


def test_a_deleted_key_is_gone_from_where_it_stood() -> None:
    """The other text stays as it is."""
    assert delete(BOTH, "me") == KeyTexts(CONFIG, "")
    gone = delete(BOTH, "ci")
    assert gone == KeyTexts(CONFIG[: CONFIG.index("# The build")] + CONFIG[CONFIG.index("[keys.sops]") :], KEYS_FILE)


def test_a_rotation_puts_the_new_hash_behind_the_others_and_its_end_keeps_that_alone() -> None:
    """The last one is the newest; a key that has only one stays as it is."""
    rotated = rotate(BOTH, "ci", TWO)
    assert rotated.config == CONFIG.replace(f'"{ONE}"', f'["{ONE}", "{TWO}"]')
    assert finish(rotated, "ci").config == CONFIG.replace(ONE, TWO)
    assert finish(BOTH, "ci") == BOTH


def test_a_key_has_four_hashes_at_most() -> None:
    """The fifth is refused, with the way out; after it one more goes in."""
    full = rotate(rotate(BOTH, "me", THREE), "me", FOUR)
    with pytest.raises(RequestError, match="which is the most; `vllm-proxy keys rotate me --finish`") as error:
        rotate(full, "me", FIVE)
    assert error.value.code == "key_conflict"
    assert tomllib.loads(str(rotate(finish(full, "me"), "me", FIVE).keys_file))["keys"]["me"]["hash"] == [FOUR, FIVE]


def test_a_time_comes_as_text_and_is_written_as_a_time() -> None:
    """With the offset that was said; null takes it away again."""
    after = patch(BOTH, "ci", {"expires_at": "2027-01-01T00:00:00+02:00"})
    assert after.config == CONFIG.replace(
        '["inference"]\n', '["inference"]\nexpires_at = 2027-01-01T00:00:00+02:00\n', 1
    )
    assert patch(after, "ci", {"expires_at": None}) == BOTH
    created = create(KeyTexts(""), "new", {"hash": "x", "expires_at": "2027-01-01T00:00:00Z"})
    assert created.config == '[keys.new]\nhash = "x"\nexpires_at = 2027-01-01T00:00:00Z\n'


@pytest.mark.parametrize(
    ("edited", "code", "message"),
    [
        (lambda: create(BOTH, "ci", {}), "key_exists", 'cannot create key "ci": there is one'),
        (lambda: create(BOTH, "me", {}), "key_exists", 'cannot create key "me": there is one'),
        (lambda: patch(BOTH, "nobody", {}), "key_not_found", 'cannot find key "nobody"'),
        (lambda: delete(BOTH, "nobody"), "key_not_found", 'cannot find key "nobody"'),
        (lambda: rotate(BOTH, "nobody", ONE), "key_not_found", 'cannot find key "nobody"'),
        (lambda: patch(BOTH, "env", {}), "key_conflict", 'cannot change key "env": VLLM_PROXY_API_KEY gives it'),
        (lambda: finish(BOTH, "env-admin"), "key_conflict", "VLLM_PROXY_ADMIN_KEY gives it"),
        (lambda: rotate(BOTH, "sops", ONE), "key_conflict", "put another key into that file"),
        (lambda: finish(BOTH, "sops"), "key_conflict", "put another key into that file"),
        (lambda: rotate(BOTH, "anonymous", ONE), "key_conflict", "it is for who sends no key"),
        (lambda: patch(BOTH, "ci", {"hash": ["planted", None]}), "invalid_key", "keys.ci.hash[1]: TOML has no null"),
        (lambda: patch(BOTH, "ci", {"expires_at": "planted"}), "invalid_key", "keys.ci.expires_at: expected a time"),
        (lambda: patch(BOTH, "ci", {"expires_at": "2027-01-01"}), "invalid_key", "with its offset"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_with_a_key_is_refused_with_the_way_out(
    edited: Callable[[], KeyTexts], code: str, message: str
) -> None:
    """And without a word of what stands in it."""
    with pytest.raises(RequestError) as error:
        edited()
    assert error.value.code == code
    assert message in error.value.message
    assert "planted" not in error.value.message


@pytest.mark.parametrize(
    ("name", "keys", "made"),
    [
        ("ci", {"scopes": ["read"]}, True),
        ("ci", {"hash": None}, True),
        ("ci", {"hash": ONE}, False),
        ("ci", {"file": "ci.key"}, False),
        ("anonymous", {"scopes": []}, False),
    ],
)
def test_a_key_is_made_unless_one_is_brought_along(name: str, keys: dict[str, Any], made: bool) -> None:  # noqa: FBT001 - a table of cases
    """Or is for who has none. Its table has its hash alone."""
    key, table = issued(name, keys, bytes(32))
    assert (key is not None) is made
    if key is None:
        assert table == keys
    else:
        assert not is_mistyped(key)
        assert table == {**keys, "hash": hash_of(key)}
        assert key not in str(table)


HASHES = st.sampled_from([ONE, TWO, THREE, FOUR, FIVE])
STEPS: st.SearchStrategy[list[tuple[Any, ...]]] = st.lists(
    st.tuples(st.just(rotate), HASHES)
    | st.tuples(st.just(finish))
    | st.tuples(st.just(patch), st.just({"scopes": []})),
    max_size=8,
)


@given(st.sampled_from(["ci", "me"]), STEPS)
def test_whatever_is_done_to_a_key_its_newest_hash_is_the_last(name: str, steps: list[tuple[Any, ...]]) -> None:
    """And the texts mean exactly that."""
    texts, hashes = BOTH, [ONE] if name == "ci" else [ONE, TWO]
    for how, *rest in steps:
        if how is rotate and len(hashes) == 4:
            continue
        texts = how(texts, name, *rest)
        hashes = [*hashes, *rest] if how is rotate else hashes[-1:] if how is finish else hashes
    found = texts.table(name)["hash"]
    assert (found if isinstance(found, list) else [found]) == hashes
