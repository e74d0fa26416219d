"""Expositions of several engines as one: each series gets the labels of its engine, each family is there once.

Texts are not parsed but rewritten: twenty engines have 6,500 series. From one scrape to the next nearly always numbers
alone change, so the words between them are looked at once, and then only compared. What Prometheus would not read is
left out, so that no engine makes the others' series unreadable (tests/domain/test_relabel.py).
"""

import re
from dataclasses import dataclass, replace
from itertools import compress
from typing import NamedTuple

_HELP = b"# HELP "
_AFTER = b"\n# HELP "
_MOST_REMEMBERED = (
    2**20
)  # bytes of one engine; vLLM 0.32 has 54 KB for each of its ranks, and four times so much is held
_MOST_FAMILIES = 5000  # of one engine, each of which takes 25 us; vLLM 0.32 has 92
_EXPLAINING = 2  # lines at the head of a family
_CREATED = b"_created"
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
    rb"(?:\n"
    + _NAME
    + rb"(?:\{(?:"
    + _LABEL
    + _VALUE
    + _NEXT
    + rb")*+\})?+ "
    + _NUMBER
    + rb"(?: [0-9]{1,18}+)?+(?=\n|\Z))*+"
)
_NUMBERS = re.compile(rb"(?:[0-9]{1,20}+\.[0-9]++\n|" + _NUMBER + rb"\n)*+")  # as nearly all are written, first
_EXPLANATION = re.compile(
    rb"(" + _NAME + rb") [^\n]*+\n# TYPE (" + _NAME + rb") (?:counter|gauge|histogram|summary|untyped)(?=\n|\Z)"
)
_LABEL_NAMES = re.compile(rb"[{,]([a-zA-Z_][a-zA-Z0-9_]*+)=" + _VALUE)
_SERIES = re.compile(rb"^(" + _NAME + rb")(?:\{\}|(\{))?", re.MULTILINE)


# One of one engine: its name, the two lines that explain it, and samples, each after a newline.
type _Family = tuple[bytes, bytes, bytes]


class Merged:
    """What several engines say of themselves. `prefix`: of the families that are kept; `names`: of the labels given.

    `before`: of the scrape before with the same prefix and names, which makes this one cheaper.
    """

    def __init__(self, prefix: str, *names: str, before: "Merged | None" = None) -> None:
        self._prefix = prefix.encode()
        self._names = [name.encode() for name in names]
        self._families: dict[bytes, list[bytes]] = {}  # by name: two lines that explain it, and samples
        self._before = {} if before is None else before._said_by  # noqa: SLF001 - of this class, too
        self._said_by: dict[tuple[str, ...], _Said] = {}  # by the values of its labels

    def add(self, text: bytes, *values: str) -> None:
        """One engine's exposition. Its labels come first; their values hold no quotes and no backslashes.

        A family that another engine explains as of another type is left out, and so is when a series was made; and
        all of an engine that has thousands of families.
        """
        kept = self._kept(text)
        if not _is_text(kept) or kept.count(_AFTER) >= _MOST_FAMILIES:  # one more than there are of these
            return
        said = self._before.get(values)
        if said is None or said.kept != kept:
            said = self._said(kept, values, said)
        if len(kept) <= _MOST_REMEMBERED:
            self._said_by[values] = said
        for name, explanation, samples in said.families:
            parts = self._families.setdefault(name, [explanation])
            if parts[0] == explanation or parts[0].endswith(explanation[explanation.index(b"\n") :]):
                parts.append(samples)

    def forget(self) -> None:
        """Keep nothing but what makes the next scrape cheaper."""
        self._families, self._before = {}, {}

    def text(self, first: bytes = b"") -> bytes:
        """All of them, after what comes first."""
        return b"".join([first, *(part for parts in self._families.values() for part in (_HELP, *parts, b"\n"))])

    def _kept(self, text: bytes) -> bytes:
        """From its first family with the prefix to its last, with no newline at the end: half of vLLM's are others."""
        wanted = _HELP + self._prefix
        first, last = text.find(wanted), text.rfind(wanted)
        after = text.find(_AFTER, last)
        return b"" if first < 0 else text[first:after] if after >= 0 else text[first:].removesuffix(b"\n")

    def _said(self, kept: bytes, values: tuple[str, ...], before: "_Said | None") -> "_Said":
        template = None if before is None else before.template
        families = None if template is None else template.filled(kept)
        if families is None:
            own = b",".join(
                name + b'="' + value.encode() + b'"' for name, value in zip(self._names, values, strict=True)
            )
            blocks = [(block, self._is_wanted(block), self._family(block, own)) for block in _blocks(kept)]
            families, template = [family for _, _, family in blocks if family is not None], _template(blocks)
        return _Said(kept, families, template)

    def _is_wanted(self, block: bytes) -> bool:
        """By its name."""
        name = block[: block.find(b" ")]
        is_created = self._prefix and name.endswith(_CREATED)
        return name.startswith(self._prefix) and not name.startswith(_OURS) and not is_created

    def _family(self, block: bytes, own: bytes) -> _Family | None:
        """One, with its samples under our labels; None: it is not wanted, or Prometheus would not read it."""
        explanation = _EXPLANATION.match(block) if self._is_wanted(block) else None
        if explanation is None or explanation[1] != explanation[2]:
            return None
        samples = self._relabelled(block[explanation.end() :], own)
        return None if samples is None else (explanation[1], explanation[0], samples)

    def _relabelled(self, samples: bytes, own: bytes) -> bytes | None:
        """They, with labels put in front of those that are there; None: these are no samples."""
        for name in self._names:
            for mark in (b"{", b","):
                if mark + b"exported_" + name + b"=" in samples:
                    return None
                samples = samples.replace(mark + name + b"=", mark + b"exported_" + name + b"=")
        if _SAMPLES.fullmatch(samples) is None or any(map(_has_twice, samples.split(b"\n"))):
            return None
        return _SERIES.sub(lambda found: found[1] + b"{" + own + (b"," if found[2] else b"}"), samples)


class _Said(NamedTuple):
    """What one engine said: that, what was made of it, and what helps to make the same of it with other numbers."""

    kept: bytes
    families: list[_Family]
    template: "_Template | None"


@dataclass(frozen=True, slots=True)
class _Template:
    """What an engine says of itself but for its numbers: where they are in it, and what is written around them."""

    count: int  # of families
    size: int  # bytes of the words before numbers
    has_words: list[bool]  # by line: whether it is compared, as it explains a family that is kept, or starts one
    explanations: list[bytes]  # those
    has_number: list[bool]  # by line: whether it is a sample of a family that is kept
    words: list[bytes]  # of each sample before its number
    pieces: list[bytes]  # words of ours, and after each the place of its number
    families: list[tuple[bytes, bytes, slice]]  # name, explanation, and which pieces are its samples

    def filled(self, kept: bytes) -> list[_Family] | None:
        """What it makes of this; None: there are other words, or something that is no number."""
        lines = kept.split(b"\n")
        if len(lines) != len(self.has_words) or kept.count(_AFTER) != self.count - 1:
            return None
        if [*compress(lines, self.has_words)] != self.explanations:
            return None
        samples = [*compress(lines, self.has_number)]
        numbers = [*map(bytes.removeprefix, samples, self.words)]
        written = b"\n".join([*numbers, b""])
        if _NUMBERS.fullmatch(written) is None:
            return None
        if sum(map(len, samples)) - len(written) + len(numbers) != self.size:  # of a line nothing was taken off
            return None
        pieces = self.pieces.copy()
        pieces[1::2] = numbers
        return [(name, explanation, b"".join(pieces[at])) for name, explanation, at in self.families]


def _template(blocks: list[tuple[bytes, bool, _Family | None]]) -> _Template | None:
    """Of blocks, whether they are wanted, and what was made of them; None: not all, or a sample has a time."""
    made = _Template(len(blocks), 0, [], [], [], [], [], [])
    for block, is_wanted, family in blocks:
        if is_wanted and family is None:
            return None
        lines = (_HELP + block).split(b"\n")
        compared = 1 if family is None else _EXPLAINING
        others = len(lines) - compared
        made.has_words.extend([True] * compared + [False] * others)
        made.explanations.extend(lines[:compared])
        made.has_number.extend([False] * compared + [family is not None] * others)
        if family is None:
            continue
        name, explanation, samples = family
        first = len(made.pieces)
        for before, after in zip(lines[compared:], samples.split(b"\n")[1:], strict=True):
            words, _, number = after.rpartition(b" ")
            if not (words.endswith(b"}") and before.endswith(b" " + number)):
                return None
            made.words.append(before.removesuffix(number))
            made.pieces.extend((b"\n" + words + b" ", number))
        made.families.append((name, explanation, slice(first, len(made.pieces))))
    return replace(made, size=sum(map(len, made.words)))


def _blocks(kept: bytes) -> list[bytes]:
    """One for each family, which starts with its name."""
    return (b"\n" + kept).split(_AFTER)[1:]


def _has_twice(sample: bytes) -> bool:
    """Whether a label is there twice."""
    names = _LABEL_NAMES.findall(sample)
    return len(names) != len(set(names))


def _is_text(text: bytes) -> bool:
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
