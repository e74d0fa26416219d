"""A change of one model or key leaves the rest of the file as it is, byte for byte."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.file import edit
from vllm_proxy.domain.file.edit import EditError, TableName, create, delete, patch, put, tables_in

FILE = """\
# The servers of the lab.
[server]
port = 8000  # fixed by the firewall

[defaults]
gpu_memory_utilization = 0.9

# Chat for everybody.
# Ask Ada before you touch it.
[models.chat]
model = "org/chat"   # the small one
max_model_len = 4096  # tokens
aliases = [
    "gpt",  # for the web page
]

# how vLLM runs it
[models.chat.args]
kv_cache_dtype = 'fp8'
hf_overrides = { a = 1, b = 2 }  # from the paper

# Embeddings.
[models."org/embed"]
model = "org/embed"

# the end
"""

CHAT, A, B = ("models", "chat"), ("models", "a"), ("models", "b")


def test_a_changed_value_is_changed_in_its_place() -> None:
    """Its comment stays, and so does every other byte."""
    new = patch(FILE, CHAT, {"max_model_len": 8192})
    assert new == FILE.replace("max_model_len = 4096  # tokens", "max_model_len = 8192  # tokens")


def test_an_option_is_changed_however_it_is_spelled() -> None:
    """`kv-cache-dtype` and `kv_cache_dtype` are one, and the file's spelling stays."""
    new = patch(FILE, CHAT, {"args": {"kv-cache-dtype": "auto"}})
    assert new == FILE.replace("kv_cache_dtype = 'fp8'", 'kv_cache_dtype = "auto"')


def test_a_key_within_a_line_is_changed_there() -> None:
    """The other keys of the inline table and the comment behind it stay."""
    new = patch(FILE, CHAT, {"args": {"hf_overrides": {"b": 3}}})
    assert new == FILE.replace("b = 2 }  # from", "b = 3 }  # from")
    new = patch(FILE, CHAT, {"args": {"hf_overrides": {"c": True}}})
    assert new == FILE.replace("b = 2 }  # from", "b = 2, c = true }  # from")
    new = patch(FILE, CHAT, {"args": {"hf_overrides": {"b": None}}})
    assert new == FILE.replace("{ a = 1, b = 2 }  # from", "{ a = 1 }  # from")


def test_a_new_key_comes_behind_the_last_one_of_its_table() -> None:
    """In front of the comment that belongs to the next table."""
    new = patch(FILE, CHAT, {"replicas": 2})
    assert new == FILE.replace("]\n\n# how", "]\nreplicas = 2\n\n# how")
    new = patch(FILE, CHAT, {"args": {"seed": 1}})
    assert new == FILE.replace("# from the paper\n", "# from the paper\nseed = 1\n")


def test_a_new_table_comes_below_the_models_last_one() -> None:
    """As a table of its own, since the model is written so."""
    new = patch(FILE, CHAT, {"restart": {"max_failures": 2}})
    assert new == FILE.replace("# from the paper\n", "# from the paper\n\n[models.chat.restart]\nmax_failures = 2\n")


def test_null_removes() -> None:
    """A key with its line; a table with its header and the comment directly above it."""
    assert patch(FILE, CHAT, {"max_model_len": None}) == FILE.replace("max_model_len = 4096  # tokens\n", "")
    gone = """# how vLLM runs it
[models.chat.args]
kv_cache_dtype = 'fp8'
hf_overrides = { a = 1, b = 2 }  # from the paper

"""
    assert patch(FILE, CHAT, {"args": None}) == FILE.replace(gone, "")


def test_put_sets_all_keys_and_touches_only_those_that_differ() -> None:
    """What is left out is gone; what is equal keeps its text."""
    keys = {"model": "org/chat", "aliases": ["gpt"], "max_model_len": None, "dtype": "half"}
    args = FILE[FILE.index("# how") : FILE.index("# Embed")]
    expected = FILE.replace("max_model_len = 4096  # tokens\n", "").replace(args, "")
    assert put(FILE, CHAT, keys) == expected.replace("]\n\n# Embed", ']\ndtype = "half"\n\n# Embed')


def test_delete_takes_a_model_with_the_comments_directly_above_it() -> None:
    """The next model's comment and what a blank line separates stay."""
    start, end = FILE.index("# Chat for"), FILE.index("# Embed")
    assert delete(FILE, CHAT) == FILE[:start] + FILE[end:]
    assert delete(FILE, ("models", "org/embed")) == FILE[: FILE.index("# Embed")] + "# the end\n"


def test_create_appends_a_table() -> None:
    """Tables of the model get headers of their own; nulls are left out; the id is quoted where it must be."""
    new = create(
        FILE,
        ("models", "org/new"),
        {"model": 'a"b', "replicas": 2, "dtype": None, "args": {"x": {"y": None}, "z": [1]}},
    )
    assert new == FILE + (
        '\n[models."org/new"]\nmodel = "a\\"b"\nreplicas = 2\n\n[models."org/new".args]\nx = {}\nz = [1]\n'
    )


def test_the_first_model_of_an_empty_file() -> None:
    """No blank line in front of it."""
    assert create("", A, {"model": "m"}) == '[models.a]\nmodel = "m"\n'
    assert create("[server]\nport = 1", A, {"model": "m"}) == '[server]\nport = 1\n\n[models.a]\nmodel = "m"\n'


@pytest.mark.parametrize("change", [{}, {"max_model_len": 4096}, {"args": {}}, {"replicas": None}])
def test_a_patch_that_changes_nothing_changes_no_byte(change: dict[str, Any]) -> None:
    """Whatever it names."""
    assert patch(FILE, CHAT, change) == FILE


FORMS = {
    "tables": '[models.a]\nmodel = "x" # c1\n# c2\n[models.a.args]\ns = 1\n\n[models.b] # c3\nmodel = "y"\n',
    "apart": '[models.a]\nmodel = "x"\n[models.b] # c3\nmodel = "y"\n# c2\n[models.a.args] # c1\ns = 1\n',
    "inline args": '[models.a]\nmodel = "x"\nargs = { s = 1 } # c1\n\n# c2\n[models.b] # c3\nmodel = "y"\n',
    "dotted": '[models.a]\nmodel = "x"\nargs.s = 1 # c1\n\n# c2\n[models.b] # c3\nmodel = "y"\n',
    "dotted from the top": '# c1\nmodels.a.model = "x" # c2\nmodels.a.args.s = 1\nmodels.b.model = "y" # c3\n',
    "below models": '[models] # c1\na.model = "x" # c2\na.args = { s = 1 }\nb.model = "y" # c3\n',
    "inline": '[models]\n# c1\na = { model = "x", args = { s = 1 } } # c2\nb = { model = "y" } # c3\n',
    "implied": '[models.a.args] # c1\ns = 1\n[models.b] # c3\nmodel = "y"\n# c2\n[models.a]\nmodel = "x"\n',
    "quoted": "[models.'a']\n'model' = 'x' # c1\n[models.'a'.'args']\n's' = 1\n[models.b] # c3\nmodel = 'y'\n",
    "windows": '[models.a]\r\nmodel = "x" # c1\r\nargs.s = 1\r\n\r\n# c2\r\n[models.b] # c3\r\nmodel = "y"\r\n',
    "strings": '[models.a]\nmodel = "x"\nargs.s = 1\nx = """\n[models.z]\n# no"""\n\n[models.b] # c3\nmodel = "y"\n',
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {"model": "new"},
    {"replicas": 2},
    {"args": {"s": 2}},
    {"args": {"t": "x"}},
    {"args": {"t": {"u": [1, "a"]}}},
    {"args": None},
    {"args": {"s": None}},
    {"args": {"s": None, "t": 1}},
    {"env": {"A": "1"}},
    {"restart": {"backoff": "1s", "max_failures": 2}},
    {"args": 5, "model": "odd"},
    {"args": 1},
    {"description": 'quotes " and \\ and \n and \x7f and ü'},
]


def merged(target: Any, change: Any) -> Any:  # noqa: ANN401 - JSON
    """RFC 7396, as it stands there."""
    if not isinstance(change, dict):
        return change
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def pruned(value: Any) -> Any:  # noqa: ANN401 - TOML
    """Without empty tables."""
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in ((key, pruned(item)) for key, item in value.items()) if item != {}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_patch_is_possible_in_every_form_of_toml(form: str, change: dict[str, Any]) -> None:
    """It means exactly what was asked, and what belongs to others stays."""
    text = FORMS[form]
    new = patch(text, A, change)
    wanted = tomllib.loads(text)
    wanted["models"]["a"] = merged(wanted["models"]["a"], change)
    assert pruned(tomllib.loads(new)) == pruned(wanted)
    assert "# c3" in new
    assert "\r\n" not in new.replace("\r\n", "") + "x" or "\r\n" in text
    assert ("\n" in new.replace("\r\n", "")) == ("\n" in text.replace("\r\n", ""))


@pytest.mark.parametrize("form", FORMS)
def test_delete_and_create_are_possible_in_every_form_of_toml(form: str) -> None:
    """The other model stays as it is."""
    gone = delete(FORMS[form], A)
    assert tables_in(gone, "models") == {"b": {"model": "y"}}
    assert "# c3" in gone
    again = create(gone, A, {"model": "x", "args": {"s": 1}})
    assert tables_in(again, "models")["a"] == {"model": "x", "args": {"s": 1}}
    assert again.startswith(gone.rstrip()[:20])


def test_models_in_one_line_can_be_changed_too() -> None:
    """The whole table is within one value."""
    text = 'models = { a = { model = "x" } } # c\n'
    assert create(text, B, {"model": "y"}) == 'models = { a = { model = "x" }, b = { model = "y" } } # c\n'
    assert tables_in(delete(create(text, B, {"model": "y"}), A), "models") == {"b": {"model": "y"}}


KEYS = """\
# Who may use this. Ask Ada.

[keys.ci]  # the build servers
hash = "sha256:1f"  # of May
scopes = ["inference"]
expires_at = 2027-01-01T00:00:00Z

# Everybody.
[keys.anonymous]
scopes = []
"""
CI, NEW = ("keys", "ci"), ("keys", "new")
NEW_KEY = {"hash": "sha256:aa", "scopes": ["read", "metrics"], "expires_at": datetime(2027, 6, 1, 12, tzinfo=UTC)}
NEW_TABLE = '[keys.new]\nhash = "sha256:aa"\nscopes = ["read", "metrics"]\nexpires_at = 2027-06-01T12:00:00Z\n'


def test_a_key_is_changed_like_a_model() -> None:
    """Hashes, times with their offset and booleans are written as TOML has them; every other byte stays."""
    new = patch(KEYS, CI, {"hash": ["sha256:2e", "sha256:1f"]})
    assert new == KEYS.replace('"sha256:1f"  #', '["sha256:2e", "sha256:1f"]  #')
    new = patch(KEYS, CI, {"expires_at": datetime(2028, 1, 1, tzinfo=timezone(timedelta(hours=2)))})
    assert new == KEYS.replace("2027-01-01T00:00:00Z", "2028-01-01T00:00:00+02:00")
    new = patch(KEYS, CI, {"enabled": False, "expires_at": None})
    assert new == KEYS.replace("expires_at = 2027-01-01T00:00:00Z", "enabled = false")
    assert delete(KEYS, CI) == KEYS[: KEYS.index("[keys.ci]")] + KEYS[KEYS.index("# Everybody.") :]


@pytest.mark.parametrize(
    "text",
    ["", "# Keys of the lab.\n", "# no newline", "[server]\nport = 1\n", FILE, KEYS, "[keys]\n", "[keys]\n# c\n"],
)
def test_a_new_key_is_put_at_the_end(text: str) -> None:
    """Of a file that is empty, has only comments, no newline at its end, or tables of other kinds."""
    before = text if text.endswith("\n") or not text else text + "\n"
    assert create(text, NEW, NEW_KEY) == (before and before + "\n") + NEW_TABLE


@pytest.mark.parametrize(
    "text",
    [
        'keys.ci.hash = "sha256:1f"  # c\n',
        '[keys]\nci.hash = "sha256:1f"  # c\nci.enabled = true\n',
        '[keys]\nci = { hash = "sha256:1f" }  # c\n',
        'keys = { ci = { hash = "sha256:1f" } }  # c\n',
        "keys = {}  # c\n",
    ],
)
def test_a_new_key_has_its_place_however_the_others_are_written(text: str) -> None:
    """Dotted, or in one line: what is there stays, with its comment."""
    new = create(text, NEW, NEW_KEY)
    assert tomllib.loads(new)["keys"] == {**tomllib.loads(text)["keys"], "new": NEW_KEY}
    assert "# c\n" in new
    assert tables_in(delete(new, NEW), "keys") == tables_in(text, "keys")


def test_a_key_and_a_model_of_one_name_are_two() -> None:
    """The one is changed and deleted, the other stays."""
    text = create(FILE, ("keys", "chat"), {"hash": "sha256:1f"})
    assert delete(text, ("keys", "chat")) == FILE
    assert delete(text, CHAT) == create(delete(FILE, CHAT), ("keys", "chat"), {"hash": "sha256:1f"})


@pytest.mark.parametrize(
    ("edited", "message"),
    [
        (lambda: create(KEYS, CI, {"hash": "x"}), 'cannot write key "ci": there is one already'),
        (lambda: patch(KEYS, NEW, {"hash": "x"}), 'cannot write key "new": the file has no table of that name'),
        (lambda: delete("keys.new = 1", NEW), 'cannot write key "new": the file has no table of that name'),
        (lambda: create("keys = 1", NEW, {}), "cannot write the file: keys is no table in it"),
        (lambda: patch(KEYS, CI, {"hash": ["planted", None]}), "cannot write keys.ci.hash[1]: TOML has no null"),
        (lambda: patch(KEYS, CI, {"hash": "planted\ud800"}), "cannot write keys.ci.hash: TOML has no half of"),
        (lambda: create("", ("keys", "\ud800"), {}), "cannot write keys: TOML has no half of a surrogate pair"),
    ],
)
def test_what_is_wrong_with_a_key_is_said_of_the_key(edited: Callable[[], str], message: str) -> None:
    """By its name, and without a value."""
    with pytest.raises(EditError) as caught:
        edited()
    assert str(caught.value).startswith(message)
    assert "planted" not in str(caught.value)


NESTED: list[Any] = []
for _ in range(60):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, None], "cannot write models.chat.metadata.x[1]: TOML has no null"),
        ([{"y": {"z": None}}], "cannot write models.chat.metadata.x[0].y.z: TOML has no null"),
        (2**63, "cannot write models.chat.metadata.x: TOML has no integers of more than 64 bits"),
        ({"a b": -(2**63) - 1}, 'cannot write models.chat.metadata.x."a b": TOML has no integers'),
        (float("nan"), "cannot write models.chat.metadata.x: JSON has no nan"),
        ("\ud800", "cannot write models.chat.metadata.x: TOML has no half of a surrogate pair"),
        ({"\ud800": 1}, "cannot write models.chat.metadata.x: TOML has no half of a surrogate pair"),
        (NESTED, "more than 50 tables and lists"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("how", [patch, put])
def test_what_toml_cannot_hold_is_refused(how: Any, value: Any, message: str) -> None:  # noqa: ANN401 - JSON
    """With the path of the key, before anything is written."""
    with pytest.raises(EditError) as caught:
        how(FILE, CHAT, {"model": "x", "metadata": {"x": value}})
    assert message in str(caught.value)


def test_an_option_that_is_given_twice_is_refused() -> None:
    """Which of the two was meant cannot be known."""
    with pytest.raises(EditError, match="twice"):
        patch(FILE, CHAT, {"args": {"kv-cache-dtype": "auto", "kv_cache_dtype": "fp8"}})
    new = FILE.replace("'fp8'", '"auto"')
    assert patch(FILE, CHAT, {"args": {"kv-cache-dtype": "auto", "kv_cache_dtype": None}}) == new
    assert patch(FILE, CHAT, {"args": {"kv_cache_dtype": None, "kv-cache-dtype": "auto"}}) == new


def test_a_model_that_is_not_as_the_caller_says_is_refused() -> None:
    """There already, or not there, or no table, or in a file that is no TOML."""
    with pytest.raises(EditError, match="there is one already"):
        create(FILE, CHAT, {"model": "x"})
    for how in (put, patch):
        with pytest.raises(EditError, match="no table of that name"):
            how("[models]\na = 5\n", A, {"model": "x"})
    with pytest.raises(EditError, match="no table of that name"):
        delete(FILE, ("models", "nobody"))
    with pytest.raises(EditError, match="models is no table"):
        create("[[models]]\na = 5\n", A, {"model": "x"})
    with pytest.raises(EditError, match="no TOML"):
        create("[models", A, {"model": "x"})


def test_a_table_that_only_deeper_headers_name_can_be_changed() -> None:
    """It gets a header of its own in front of them, and nobody else's table gets the key."""
    text = "# i\n[models.a.args.h.i]\nx = 1\n\n[models.b]\nmodel = 'y'\n"
    assert patch(text, A, {"args": {"h": {"j": 1}}}) == "[models.a.args.h]\nj = 1\n\n" + text
    gone = patch(text, A, {"args": {"h": {"i": None}}})
    assert gone == "[models.a.args.h]\n\n[models.b]\nmodel = 'y'\n"


def test_lists_written_as_tables_can_be_around() -> None:
    """A key beside them is set, and they are replaced as one value."""
    text = "[models.a]\nmodel = 'x'\n\n[[models.a.args.l]]\nx = 1\n[[models.a.args.l]] # c\nx = 2\n"
    new = patch(text, A, {"args": {"z": 1}})
    assert new == text.replace("[[models.a.args.l]]\nx = 1", "[models.a.args]\nz = 1\n\n[[models.a.args.l]]\nx = 1")
    assert patch(text, A, {"args": {"l": [1]}}) == "[models.a]\nmodel = 'x'\n\n[models.a.args]\nl = [1]\n"


def test_what_the_last_key_leaves_is_an_empty_table() -> None:
    """As the merge patch says, in every form."""
    assert patch("[models.a]\nargs.s = 1 # c\n", A, {"args": {"s": None}}) == "[models.a]\nargs = {}\n"
    assert patch("[models.a]\nargs = { s = 1 } # c\n", A, {"args": {"s": None}}) == "[models.a]\nargs = {} # c\n"
    text = "[models.a.args] # c\ns = 1 # d\n"
    assert patch(text, A, {"args": {"s": None}}) == "[models.a.args] # c\n"


def test_a_commented_option_goes_with_its_table_and_a_comment_behind_a_blank_line_stays() -> None:
    """What stands directly below the last key is its table's, unless it stands directly above the next header."""
    text = "[models.a]\nmodel = 'x'\n# replicas = 2\n\n# Of the house.\n\n[models.b]\nmodel = 'y'\n"
    assert delete(text, A) == "# Of the house.\n\n[models.b]\nmodel = 'y'\n"
    text = "[models.a]\nmodel = 'x'\n# b's\n[models.b]\nmodel = 'y'\n"
    assert delete(text, A) == "# b's\n[models.b]\nmodel = 'y'\n"


def test_indentation_and_spacing_are_kept() -> None:
    """A new key stands below the key before it; an inline table keeps the spaces of what stays."""
    text = "[models.a]\n  model = 'x'\n  args = {a=1,b = 'q' ,c=3}\n"
    assert patch(text, A, {"replicas": 2}) == text + "  replicas = 2\n"
    assert patch(text, A, {"args": {"a": 7}}) == text.replace("a=1", "a=7")
    assert patch(text, A, {"args": {"a": None}}) == text.replace("a=1,", "")
    assert patch(text, A, {"args": {"c": None}}) == text.replace(" ,c=3", "")
    assert patch(text, A, {"args": {"b": None}}) == text.replace(",b = 'q'", "")


def test_one_is_not_true() -> None:
    """Python's equality would call these changes none."""
    text = "[models.a]\nargs.x = 1\n"
    for value, written in ((True, "true"), (1.0, "1.0"), ("1", '"1"')):
        assert patch(text, A, {"args": {"x": value}}) == text.replace("1", written)


def test_a_file_that_holds_what_json_cannot_is_no_hindrance() -> None:
    """Dates and nan of others, and of the same table written anew."""
    text = "[models.b]\nmetadata = { x = nan, d = 1979-05-27T07:32:00Z }\n"
    new = patch(text, B, {"metadata": {"n.m": {"o": 1}}})
    assert new == text.replace("00Z }", '00Z, "n.m" = { o = 1 } }')


def test_a_change_that_would_lose_a_comment_of_another_value_is_refused() -> None:
    """Dotted keys inside an inline table are written anew, but not with a list over many lines among them."""
    text = "[models.a]\nargs = { h.x = 1, l = [ # one\n1] }\n"
    with pytest.raises(EditError, match="take it apart"):
        patch(text, A, {"args": {"h": {"x": 2}}})


JSON = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.\"' -\n", max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(st.sampled_from(sorted(FORMS)), st.dictionaries(st.sampled_from(["args", "metadata", "x-y"]), JSON, max_size=3))
def test_any_json_is_written_as_what_it_is(form: str, keys: dict[str, Any]) -> None:
    """In every form, types and all; or it is refused, and never written as something else."""
    new = put(FORMS[form], A, {"model": "x", **keys})
    found = tables_in(new, "models")["a"]
    assert repr(pruned(found)) == repr(pruned({key: keys.get(key, "x") for key in found}))
    assert pruned(found).keys() == pruned({"model": "x", **keys}).keys()
    assert tables_in(new, "models")["b"] == {"model": "y"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("8192", "8193"), "mean something else"),
        (("8192", "8192.0"), "mean something else"),
        (('"org/embed"]\nmodel', '"org/embed"]\nreplicas = 1\nmodel'), "mean something else"),
        (("port = 8000  #", "port = 8_000  #"), "line of another table"),
        (("# fixed by the firewall", "# fixed"), "line of another table"),
        (("# The servers of the lab.\n", ""), "comment would be lost"),
        (("  # tokens", ""), "comment would be lost"),
        (("# how vLLM runs it", "# how it runs"), "comment would be lost"),
        (("# the end", "# the end\n# the end"), "comment would be lost"),
        (
            ("# Chat for everybody.\n# Ask Ada", "# Ask Ada before\n# Chat for everybody. # Ada"),
            "comment would be lost",
        ),
        (("[server]", "[server"), "no TOML"),
    ],
    ids=str,
)
def test_the_proof_finds_damage(damage: tuple[str, str], message: str) -> None:
    """Whatever made it: a value, a type, a key of another, a line, a comment."""
    new = patch(FILE, CHAT, {"max_model_len": 8192})
    before = tomllib.loads(FILE)
    wanted = {**before["models"]["chat"], "max_model_len": 8192}
    edit._verify(before, FILE, new, CHAT, wanted)
    assert damage[0] in new
    with pytest.raises(EditError, match=message):
        edit._verify(before, FILE, new.replace(*damage, 1), CHAT, wanted)


# Any small file


@dataclass(frozen=True)
class Line:
    """One line of a generated file, and the table that it is of; None for everybody's."""

    text: str
    owner: TableName | None


NAMES: dict[TableName, str] = {  # a model and a key may have one name
    ("models", "a"): "a", ("models", "org/b"): '"org/b"', ("models", "c.d:e"): "'c.d:e'", ("models", "f"): "f",
    ("keys", "a"): "a", ("keys", "c.d"): '"c.d"', ("keys", "f"): "f",
}  # fmt: skip
FIRST = {"models": "model", "keys": "hash"}
INNER = {"models": "args", "keys": "limits"}
PLAIN = {
    "models": {"model": "'x y'", "max_model_len": "0x10", "aliases": '["p", "q"]'},
    "keys": {"hash": "['sha256:1', \"sha256:2\"]", "expires_at": "2027-01-01T00:00:00+02:00", "enabled": "true"},
}
ARGS = {"s": "1", "a_b": "1.0", "h": "{ i = 1, 'j k' = { l = 1979-05-27T07:32:00Z } }"}
INLINE = f"{{ {', '.join(f'{key} = {value}' for key, value in ARGS.items())} }}"
LAST = [Line(text, None) for text in ("[server]", 'port = 1 # "', 'x = """', '[models.z]#"""', "")]


class Writer:
    """Writes lines with comments everywhere, each of them unlike the others."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.count = 0

    def note(self) -> str:
        """A comment or none."""
        self.count += 1
        return f"# {self.count}: \"'[" if self.draw(st.booleans()) else ""

    def above(self, owner: TableName | None) -> list[Line]:
        """A line of comment, or none."""
        return [Line(note, owner)] if (note := self.note()) else []

    def line(self, text: str, owner: TableName | None) -> Line:
        """A line with a comment behind it, or without."""
        return Line(f"{text}  {self.note()}".rstrip(), owner)

    def keys(self, prefix: str, owner: TableName, written: dict[str, str], *, of: TableName | None) -> list[Line]:
        """Keys with the comments above them, which go only where the table goes."""
        result: list[Line] = []
        for key, value in written.items():
            result += [*self.above(of), self.line(f"{prefix}{key} = {value}", owner)]
        return result

    def block(self, header: str, lines: list[Line], owner: TableName | None) -> list[Line]:
        """A table, and what may stand between it and the next."""
        found = [*self.above(owner), self.line(f"[{header}]", owner), *lines, *self.above(owner), Line("", None)]
        return [*found, *self.above(None), Line("", None)]


@st.composite
def files(draw: st.DrawFn) -> list[Line]:
    """Some models and keys in any form and order."""
    writer = Writer(draw)
    top, blocks = [Line("# top", None), Line("", None)], [LAST]
    named: dict[str, list[Line]] = {"models": [], "keys": []}
    flat = draw(st.sampled_from(["top", "named"]))  # a file has one of them: TOML forbids both
    for owner in draw(st.lists(st.sampled_from(sorted(NAMES)), min_size=1, max_size=4, unique=True)):
        kind, name = owner[0], NAMES[owner]
        form = draw(st.sampled_from(["flat", "inline", "tables", "mixed", "implied"]))
        first, inner = FIRST[kind], INNER[kind]
        args = draw(st.sampled_from([{f"{inner}.{key}": value for key, value in ARGS.items()}, {inner: INLINE}]))
        if form in {"flat", "inline"}:
            written = {f".{first}": "'x'", **{f".{key}": value for key, value in args.items()}}
            if form == "inline":
                written = {"": f"{{ {first} = 'x', {inner} = {INLINE} }}"}
            if flat == "top":
                top += writer.keys(f"{kind}.{name}", owner, written, of=None)
            else:
                named[kind] += writer.keys(name, owner, written, of=None)
        elif form == "implied":
            lines = writer.keys("", owner, {"i": "1", "'j k'": "{ l = true }"}, of=owner)
            blocks.append(writer.block(f"{kind}.{name}.{inner}.h", lines, owner))
        else:
            lines = writer.keys("", owner, PLAIN[kind] | (args if form == "mixed" else {}), of=owner)
            blocks.append(writer.block(f"{kind}.{name}", lines, owner))
        if form == "tables":
            lines = writer.keys("  ", owner, ARGS, of=owner)
            blocks.append(writer.block(f" {kind} . {name} . {inner} ", lines, owner))
    blocks += [writer.block(kind, lines, None) for kind, lines in named.items() if lines]
    return top + [line for found in draw(st.permutations(blocks)) for line in found]


def joined(lines: list[Line], end: str) -> str:
    """The text of a file."""
    return "".join(line.text + end for line in lines)


def owners(text: str) -> list[TableName]:
    """The models and keys in it."""
    return sorted((kind, name) for kind in INNER for name in tables_in(text, kind))


def table(text: str, name: TableName) -> Any:  # noqa: ANN401 - TOML
    """One of them."""
    return tables_in(text, name[0])[name[1]]


def is_within(some: list[str], of: list[str]) -> bool:
    """Whether all of the one are in the other, in their order."""
    rest = iter(of)
    return all(item in rest for item in some)


def typed(value: object) -> str:
    """Tells 1, 1.0 and true apart, and not the order of keys."""
    if isinstance(value, dict):
        return str(sorted((key, typed(item)) for key, item in value.items()))
    return f"[{', '.join(map(typed, value))}]" if isinstance(value, list) else repr(value)


OFFSETS = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=-8))])
MOMENTS = st.datetimes(timezones=OFFSETS).map(lambda moment: moment.replace(fold=0))
VALUES = st.one_of(
    st.none(), JSON, MOMENTS, st.sampled_from([1, 1.0, True, {}, {"i": None}, {"i": 2, "n": {"m": None}}])
)
OPTIONS = st.dictionaries(st.sampled_from(["s", "a-b", "a_b", "h", "new", "x.y"]), VALUES, max_size=3)
HASHES = st.lists(st.sampled_from(["sha256:1", "sha256:2", "sha256:3"]), min_size=1, max_size=4)
PATCHES = {
    "models": st.dictionaries(
        st.sampled_from(["model", "max_model_len", "aliases", "metadata", "env", "args", "a b"]),
        VALUES | OPTIONS, max_size=3,
    ) | st.fixed_dictionaries({"args": OPTIONS}),
    "keys": st.dictionaries(
        st.sampled_from(["hash", "scopes", "models", "enabled", "expires_at", "limits", "a b"]),
        VALUES | OPTIONS | HASHES, max_size=3,
    ) | st.fixed_dictionaries({"hash": HASHES, "enabled": st.booleans(), "expires_at": MOMENTS}),
}  # fmt: skip
ENDS = st.sampled_from(["\n", "\r\n"])


def others(lines: list[Line], name: TableName) -> list[str]:
    """What is not of this table; blank lines may go with what they separate."""
    return [line.text for line in lines if line.owner != name and line.text]


def checked(lines: list[Line], end: str, new: str, name: TableName, wanted: object) -> None:
    """The new text means what is wanted, and has what is not of this table."""
    expected = {"models": {}, "keys": {}, **tomllib.loads(joined(lines, end))}
    expected[name[0]].pop(name[1], None)
    if wanted is not None:
        expected[name[0]][name[1]] = wanted
    assert typed({"models": {}, "keys": {}, **tomllib.loads(new)}) == typed(expected)
    assert is_within(others(lines, name), new.split(end))
    assert end == "\n" or "\n" not in new.replace("\r\n", "")


@given(st.data(), files(), ENDS)
def test_any_patch_of_any_file(data: st.DataObject, lines: list[Line], end: str) -> None:
    """It means what RFC 7396 says, and what belongs to others stays, in its order."""
    text = joined(lines, end)
    name = data.draw(st.sampled_from(owners(text)))
    change: dict[str, Any] = data.draw(PATCHES[name[0]])
    old = table(text, name)
    options = change.get("args")
    if isinstance(options, dict) and "a_b" in old.get("args", {}) and "a-b" in options:
        meant = {key: value for key, value in options.items() if key != "a_b"}
        change = {**change, "args": meant}
        wanted = merged(old, {**change, "args": {key.replace("a-b", "a_b"): value for key, value in meant.items()}})
    else:
        wanted = merged(old, change)
    new = patch(text, name, change)
    checked(lines, end, new, name, wanted)
    assert patch(new, name, change) == new
    assert patch(new, name, {}) == new
    assert put(text, name, wanted) == new or typed(table(put(text, name, wanted), name)) == typed(wanted)


@given(
    st.data(), files(), ENDS, st.dictionaries(st.sampled_from(["replicas", "max_model_len", "z"]), st.integers(1, 9))
)
def test_what_is_only_set_takes_no_comment_away(
    data: st.DataObject, lines: list[Line], end: str, change: dict[str, Any]
) -> None:
    """Nor anything else but the value's own letters."""
    text = joined(lines, end)
    name = data.draw(st.sampled_from(owners(text)))
    new = patch(text, name, {**change, INNER[name[0]]: {"a_b": 2, **change}})
    before = [line.text.partition("  # ")[2] or line.text for line in lines if "#" in line.text]
    after = [line.partition("  # ")[2] or line for line in new.split(end) if "#" in line]
    assert after == before


@given(st.data(), files(), ENDS)
def test_any_table_of_any_file_can_go_and_come_back(data: st.DataObject, lines: list[Line], end: str) -> None:
    """Nothing of it is left, and all of the others."""
    text = joined(lines, end)
    name = data.draw(st.sampled_from(owners(text)))
    keys = table(text, name)
    assert put(text, name, keys) == text
    gone = delete(text, name)
    checked(lines, end, gone, name, None)
    assert [line for line in gone.split(end) if line] == others(lines, name)
    again = create(gone, name, keys)
    checked(lines, end, again, name, keys)
    assert again.startswith(gone)


def test_adapters_are_added_changed_and_removed_one_by_one() -> None:
    """A merge patch names those that it is about; the others, and their comments, stay."""
    ours = '[models.chat.adapters.support]  # ours\npath = "adapters/support"\n\n# Embeddings.'
    assert tables_in(patch(FILE, CHAT, {"adapters": {"a": {"path": "a/b"}}}), "models")["chat"]["adapters"] == {
        "a": {"path": "a/b"}
    }
    text = FILE.replace("# Embeddings.", ours)
    text = patch(text, CHAT, {"adapters": {"x.y": {"path": "org/x", "description": "d"}}})
    text = patch(text, CHAT, {"adapters": {"x.y": {"path": "org/y", "description": None}}})
    assert tables_in(text, "models")["chat"]["adapters"] == {
        "support": {"path": "adapters/support"}, "x.y": {"path": "org/y"},
    }  # fmt: skip
    assert ours.partition("\n\n")[0] in text
    text = patch(text, CHAT, {"adapters": {"support": None}})
    assert tables_in(text, "models")["chat"]["adapters"] == {"x.y": {"path": "org/y"}}
    text = patch(text, CHAT, {"adapters": None})
    assert tables_in(text, "models") == tables_in(FILE, "models")
