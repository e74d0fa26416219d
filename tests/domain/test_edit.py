"""A change of one model leaves the rest of the file as it is, byte for byte."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.edit import EditError, create, delete, models_in, patch, put

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


def test_a_changed_value_is_changed_in_its_place() -> None:
    """Its comment stays, and so does every other byte."""
    new = patch(FILE, "chat", {"max_model_len": 8192})
    assert new == FILE.replace("max_model_len = 4096  # tokens", "max_model_len = 8192  # tokens")


def test_an_option_is_changed_however_it_is_spelled() -> None:
    """`kv-cache-dtype` and `kv_cache_dtype` are one, and the file's spelling stays."""
    new = patch(FILE, "chat", {"args": {"kv-cache-dtype": "auto"}})
    assert new == FILE.replace("kv_cache_dtype = 'fp8'", 'kv_cache_dtype = "auto"')


def test_a_key_within_a_line_is_changed_there() -> None:
    """The other keys of the inline table and the comment behind it stay."""
    new = patch(FILE, "chat", {"args": {"hf_overrides": {"b": 3}}})
    assert new == FILE.replace("b = 2 }  # from", "b = 3 }  # from")
    new = patch(FILE, "chat", {"args": {"hf_overrides": {"c": True}}})
    assert new == FILE.replace("b = 2 }  # from", "b = 2, c = true}  # from")
    new = patch(FILE, "chat", {"args": {"hf_overrides": {"b": None}}})
    assert new == FILE.replace("{ a = 1, b = 2 }  # from", "{ a = 1  }  # from")


def test_a_new_key_comes_behind_the_last_one_of_its_table() -> None:
    """In front of the comment that belongs to the next table."""
    new = patch(FILE, "chat", {"replicas": 2})
    assert new == FILE.replace("]\n\n# how", "]\nreplicas = 2\n\n# how")
    new = patch(FILE, "chat", {"args": {"seed": 1}})
    assert new == FILE.replace("# from the paper\n", "# from the paper\nseed = 1\n")


def test_a_new_table_comes_below_the_models_last_one() -> None:
    """As a table of its own, since the model is written so."""
    new = patch(FILE, "chat", {"restart": {"max_failures": 2}})
    assert new == FILE.replace("# from the paper\n", "# from the paper\n\n[models.chat.restart]\nmax_failures = 2\n")


def test_null_removes() -> None:
    """A key with its line; a table with its header and the comment directly above it."""
    assert patch(FILE, "chat", {"max_model_len": None}) == FILE.replace("max_model_len = 4096  # tokens\n", "")
    gone = """# how vLLM runs it
[models.chat.args]
kv_cache_dtype = 'fp8'
hf_overrides = { a = 1, b = 2 }  # from the paper

"""
    assert patch(FILE, "chat", {"args": None}) == FILE.replace(gone, "")


def test_put_sets_all_keys_and_touches_only_those_that_differ() -> None:
    """What is left out is gone; what is equal keeps its text."""
    keys = {"model": "org/chat", "aliases": ["gpt"], "max_model_len": None, "dtype": "half"}
    args = FILE[FILE.index("# how") : FILE.index("# Embed")]
    expected = FILE.replace("max_model_len = 4096  # tokens\n", "").replace(args, "")
    assert put(FILE, "chat", keys) == expected.replace("]\n\n# Embed", ']\ndtype = "half"\n\n# Embed')


def test_delete_takes_a_model_with_the_comments_directly_above_it() -> None:
    """The next model's comment and what a blank line separates stay."""
    start, end = FILE.index("# Chat for"), FILE.index("# Embed")
    assert delete(FILE, "chat") == FILE[:start] + FILE[end:]
    assert delete(FILE, "org/embed") == FILE[: FILE.index("# Embed")] + "# the end\n"


def test_create_appends_a_table() -> None:
    """Tables of the model get headers of their own; nulls are left out; the id is quoted where it must be."""
    new = create(FILE, "org/new", {"model": 'a"b', "replicas": 2, "dtype": None, "args": {"x": {"y": None}, "z": [1]}})
    assert new == FILE + (
        '\n[models."org/new"]\nmodel = "a\\"b"\nreplicas = 2\n\n[models."org/new".args]\nx = {  }\nz = [1]\n'
    )


def test_the_first_model_of_an_empty_file() -> None:
    """No blank line in front of it."""
    assert create("", "a", {"model": "m"}) == '[models.a]\nmodel = "m"\n'
    assert create("[server]\nport = 1", "a", {"model": "m"}) == '[server]\nport = 1\n\n[models.a]\nmodel = "m"\n'


@pytest.mark.parametrize("change", [{}, {"max_model_len": 4096}, {"args": {}}, {"replicas": None}])
def test_a_patch_that_changes_nothing_changes_no_byte(change: dict[str, Any]) -> None:
    """Whatever it names."""
    assert patch(FILE, "chat", change) == FILE


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
    new = patch(text, "a", change)
    wanted = tomllib.loads(text)
    wanted["models"]["a"] = merged(wanted["models"]["a"], change)
    assert pruned(tomllib.loads(new)) == pruned(wanted)
    assert "# c3" in new
    assert "\r\n" not in new.replace("\r\n", "") + "x" or "\r\n" in text
    assert ("\n" in new.replace("\r\n", "")) == ("\n" in text.replace("\r\n", ""))


@pytest.mark.parametrize("form", FORMS)
def test_delete_and_create_are_possible_in_every_form_of_toml(form: str) -> None:
    """The other model stays as it is."""
    gone = delete(FORMS[form], "a")
    assert models_in(gone) == {"b": {"model": "y"}}
    assert "# c3" in gone
    again = create(gone, "a", {"model": "x", "args": {"s": 1}})
    assert models_in(again)["a"] == {"model": "x", "args": {"s": 1}}
    assert again.startswith(gone.rstrip()[:20])


def test_models_in_one_line_can_be_changed_too() -> None:
    """The whole table is within one value."""
    text = 'models = { a = { model = "x" } } # c\n'
    assert create(text, "b", {"model": "y"}) == 'models = { a = { model = "x" }, b = { model = "y" }} # c\n'
    assert models_in(delete(create(text, "b", {"model": "y"}), "a")) == {"b": {"model": "y"}}


@pytest.mark.parametrize("value", [[1, None], 2**63, float("nan"), "\ud800"])
def test_what_toml_cannot_hold_is_refused(value: Any) -> None:  # noqa: ANN401 - JSON
    """With a reason, before anything is written."""
    with pytest.raises(EditError, match="cannot write"):
        patch(FILE, "chat", {"metadata": {"x": value}})


JSON = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.\"' -\n", max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(st.sampled_from(sorted(FORMS)), st.dictionaries(st.sampled_from(["args", "metadata", "x-y"]), JSON, max_size=3))
def test_any_json_is_written_as_what_it_is(form: str, keys: dict[str, Any]) -> None:
    """In every form, types and all; or it is refused, and never written as something else."""
    new = put(FORMS[form], "a", {"model": "x", **keys})
    found = models_in(new)["a"]
    assert repr(pruned(found)) == repr(pruned({key: keys.get(key, "x") for key in found}))
    assert pruned(found).keys() == pruned({"model": "x", **keys}).keys()
    assert models_in(new)["b"] == {"model": "y"}
