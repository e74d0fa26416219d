"""Expositions of several engines as one: each series gets the labels of its engine, each family is there once.

Texts are not parsed but rewritten, a family at a time, since values do not matter here: twenty engines have 6,500
series. What Prometheus would not read is left out, so that no engine makes the others' series unreadable
(tests/domain/test_relabel.py): all but a label of its own that is there twice, which no library for metrics writes, and
which would take three times as long to see as all the rest.
"""

import re
from functools import cache

_HELP = b"# HELP "
_AFTER = b"\n# HELP "
_OURS = b"vllm_proxy_"  # beside which a family of this name would be there twice
_NAME = rb"[a-zA-Z_:][a-zA-Z0-9_:]*+"
# What a float cannot hold is an error for Prometheus, not infinity.
_NUMBER = (
    rb"(?:[-+]?+(?:[0-9]{1,20}+(?:\.[0-9]*+)?+(?:[eE](?:-[0-9]++|\+?+[0-9]{1,2}+))?+"
    rb"|[0-9](?:\.[0-9]*+)?+[eE]\+?+[0-2][0-9]{2}|Inf)|NaN)"
)
_LABEL = rb"(?!__)[a-zA-Z_][a-zA-Z0-9_]*+="
_NEXT = rb"(?:,|(?=\}))"
_VALUE = rb'"[^"\\\n]*+(?:\\[\\"n][^"\\\n]*+)*+"'
_SAMPLES = re.compile(
    rb"(?:" + _NAME + rb"(?:\{(?:" + _LABEL + _VALUE + _NEXT + rb")*+\})?+ " + _NUMBER + rb"(?: [0-9]{1,18}+)?+\n)*+"
)
_EXPLANATION = re.compile(
    rb"(" + _NAME + rb") [^\n]*+\n(# TYPE (" + _NAME + rb") (?:counter|gauge|histogram|summary|untyped)\n)"
)
_SERIES = re.compile(rb"^(" + _NAME + rb")(?:\{\}|(\{))?", re.MULTILINE)


class Merged:
    """What several engines say of themselves. `prefix`: of the families that are kept; `names`: of the labels given."""

    def __init__(self, prefix: str, *names: str) -> None:
        self._prefix = prefix.encode()
        self._names = [name.encode() + b'="' for name in names]
        self._is_simple = _simple(*names).fullmatch
        self._families: dict[bytes, list[bytes]] = {}  # by name: two lines that explain it, and samples

    def add(self, text: bytes, *values: str) -> None:
        """One engine's exposition. Its labels come first; their values hold no quotes and no backslashes.

        A family that another engine explains as of another type is left out, and so is when a series was made.
        """
        if not _is_text(text):
            return
        own = b",".join(name + value.encode() + b'"' for name, value in zip(self._names, values, strict=True))
        prefix, families, is_simple, lead = self._prefix, self._families, self._is_simple, b"{" + own + b","
        for block in self._kept(text).split(_HELP)[1:]:
            if not block.startswith(prefix):
                continue
            name = block[: block.find(b" ")]
            parts = families.get(name)
            # As nearly always: the same words as another engine's, and nothing that must be looked at closely.
            if parts is not None and block.startswith(parts[0]) and is_simple(block, len(parts[0])):
                parts.append(block[len(parts[0]) :].replace(b"{", lead))
            elif not (prefix and name.endswith(b"_created")):
                self._add_family(name, block, own)

    def text(self) -> bytes:
        """All of them."""
        return b"".join(part for parts in self._families.values() for part in (_HELP, *parts))

    def _kept(self, text: bytes) -> bytes:
        """From its first family with the prefix to its last: half of what vLLM says is of others."""
        wanted = _HELP + self._prefix
        first, last = text.find(wanted), text.rfind(wanted)
        after = text.find(_AFTER, last)
        return b"" if first < 0 else text[first : after + 1] if after >= 0 else text[first:]

    def _add_family(self, name: bytes, block: bytes, own: bytes) -> None:
        if name.startswith(_OURS):
            return
        parts = self._families.get(name)
        if parts is not None and block.startswith(parts[0]):
            explained = len(parts[0])
        else:
            explanation = _EXPLANATION.match(block)
            if explanation is None or explanation[1] != name or explanation[3] != name:
                return
            if parts is not None and not parts[0].endswith(explanation[2]):
                return
            explained = explanation.end()
        samples = self._relabelled(block[explained:], own)
        if samples is not None and parts is not None:
            parts.append(samples)
        elif samples is not None:
            self._families[name] = [block[:explained], samples]

    def _relabelled(self, samples: bytes, own: bytes) -> bytes | None:
        """They, with labels put in front of those that are there; None: these are no samples."""
        for name in self._names:
            for mark in (b"{", b",") if name in samples else ():
                if mark + b"exported_" + name in samples:
                    return None
                samples = samples.replace(mark + name, mark + b"exported_" + name)
        if _SAMPLES.fullmatch(samples) is None:
            return None
        return _SERIES.sub(lambda found: found[1] + b"{" + own + (b"," if found[2] else b"}"), samples)


@cache
def _simple(*names: str) -> re.Pattern[bytes]:
    """Samples that all have labels, none of these names, and no value with a brace or an escape: nearly all have."""
    label = rb"(?!(?:" + b"|".join(map(re.escape, map(str.encode, names))) + rb")=)" + _LABEL
    return re.compile(
        rb"(?:" + _NAME + rb"\{(?:" + label + rb'"[^"\\\n{}]*+"' + _NEXT + rb")++\} " + _NUMBER + rb"\n)*+"
    )


def _is_text(text: bytes) -> bool:
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
