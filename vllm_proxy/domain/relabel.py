"""Expositions of several engines as one: each series gets the labels of its engine, each family is there once.

Texts are not parsed but rewritten, a family at a time, since values do not matter here: twenty engines have 6,500
series. What does not look like samples is left out, so that no engine makes the others' series unreadable
(tests/domain/test_relabel.py).
"""

import re

_HELP = b"# HELP "
_NAME = rb"[a-zA-Z_:][a-zA-Z0-9_:]*+"
_NUMBER = rb"[-+]?+(?:[0-9]++(?:\.[0-9]*+)?+(?:[eE][-+]?+[0-9]++)?+|Inf|NaN)"
_LABEL = rb"[a-zA-Z_][a-zA-Z0-9_]*+="
# Of a simple one each line has labels, and no value of these has a brace or needs escapes: nearly all are.
_SIMPLE = re.compile(rb"(?:" + _NAME + rb"\{(?:" + _LABEL + rb'"[^"\\\n{}]*+",?+)++\} ' + _NUMBER + rb"\n)*+")
_VALUE = rb'"[^"\\\n]*+(?:\\[\\"n][^"\\\n]*+)*+"'
_SAMPLES = re.compile(
    rb"(?:" + _NAME + rb"(?:\{(?:" + _LABEL + _VALUE + rb",?+)*+\})?+ " + _NUMBER + rb"(?: [0-9]++)?+\n)*+"
)
_EXPLANATION = re.compile(
    rb"(" + _NAME + rb") [^\n]*+\n(# TYPE (" + _NAME + rb") (?:counter|gauge|histogram|summary|untyped)\n)"
)
_SERIES = re.compile(rb"^(" + _NAME + rb")(?:\{\}|(\{))?", re.MULTILINE)


class Merged:
    """What several engines say of themselves. `prefix`: of the families that are kept."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self._families: dict[bytes, list[bytes]] = {}  # by name: two lines that explain it, and samples

    def add(self, text: bytes, **labels: str) -> None:
        """One engine's exposition. The labels come first; their values hold no quotes and no backslashes.

        A family that another engine explains as of another type is left out, and so is when a series was made.
        """
        if not _is_text(text):
            return
        for label in labels:
            written = label.encode() + b'="'
            if written in text:
                for mark in (b"{", b","):
                    text = text.replace(mark + written, mark + b"exported_" + written)
        own = ",".join(f'{label}="{value}"' for label, value in labels.items()).encode()
        prefix, without_created = self._prefix, bool(self._prefix)
        for block in text.split(_HELP)[1:]:
            if block.startswith(prefix):
                name = block[: block.find(b" ")]
                if not (without_created and name.endswith(b"_created")):
                    self._add_family(name, block, own)

    def text(self) -> bytes:
        """All of them."""
        return b"".join(part for parts in self._families.values() for part in (_HELP, *parts))

    def _add_family(self, name: bytes, block: bytes, own: bytes) -> None:
        parts = self._families.get(name)
        if parts is not None and block.startswith(parts[0]):  # as nearly always
            explained = len(parts[0])
        else:
            explanation = _EXPLANATION.match(block)
            if explanation is None or explanation[1] != name or explanation[3] != name:
                return
            if parts is not None and not parts[0].endswith(explanation[2]):
                return
            explained = explanation.end()
        samples = _relabelled(block, explained, own)
        if samples is not None and parts is not None:
            parts.append(samples)
        elif samples is not None:
            self._families[name] = [block[:explained], samples]


def _is_text(text: bytes) -> bool:
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _relabelled(block: bytes, at: int, own: bytes) -> bytes | None:
    """The samples from there on, with labels put in front of those that are there; None: these are no samples."""
    samples = block[at:]
    if _SIMPLE.fullmatch(samples):
        return samples.replace(b"{", b"{" + own + b",")
    if _SAMPLES.fullmatch(samples) is None:
        return None
    return _SERIES.sub(lambda found: found[1] + b"{" + own + (b"," if found[2] else b"}"), samples)
