"""Expositions of several engines as one: each series gets the labels of its engine, each family is there once.

Texts are not parsed but rewritten, a family at a time, since values do not matter here: twenty engines have 6,500
series. What does not look like samples is left out, so that no engine makes the others' series unreadable
(tests/domain/test_relabel.py).
"""

import re

_HEAD = b"\n# HELP "
_NAME = rb"[a-zA-Z_:][a-zA-Z0-9_:]*+"
_NUMBER = rb"[-+0-9.eEINa-z]++"
_LABEL = rb'[a-zA-Z_][a-zA-Z0-9_]*+="(?:[^"\\\n]|\\.)*+"'
# Quick, for nearly all: each line has labels, and none of them a brace.
_PLAIN = re.compile(rb"(?:" + _NAME + rb"\{[^\n{}]++\} " + _NUMBER + rb"\n)*+")
_SAMPLES = re.compile(rb"(?:" + _NAME + rb"(?:\{(?:" + _LABEL + rb",?+)*+\})? " + _NUMBER + rb"(?: [0-9]++)?\n)*+")
_SERIES = re.compile(rb"^(" + _NAME + rb")(?:\{\}|(\{))?", re.MULTILINE)


class Merged:
    """What several engines say of themselves. `prefix`: of the families that are kept."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self._families: dict[bytes, list[bytes]] = {}  # a head of two lines, and samples

    def add(self, text: bytes, **labels: str) -> None:
        """One engine's exposition. The labels come first; their values hold no quotes and no backslashes.

        A family that another engine explains as of another type is left out, and so is when a series was made.
        """
        own = ",".join(f'{label}="{value}"' for label, value in labels.items()).encode()
        for block in (b"\n" + text).split(_HEAD)[1:]:
            name = block[: block.find(b" ")]
            if name.startswith(self._prefix) and not (self._prefix and name.endswith(b"_created")):
                self._add_family(name, block if block.endswith(b"\n") else block + b"\n", own, labels)

    def text(self) -> bytes:
        """All of them."""
        return b"".join(part for parts in self._families.values() for part in parts)

    def _add_family(self, name: bytes, block: bytes, own: bytes, labels: dict[str, str]) -> None:
        explained = block.find(b"\n") + 1
        end = block.find(b"\n", explained) + 1
        kind, samples = block[explained:end], block[end:]
        if not kind.startswith(b"# TYPE " + name + b" "):
            return
        for label in labels:
            written = label.encode() + b'="'
            if written in samples:
                for before in (b"{", b","):
                    samples = samples.replace(before + written, before + b"exported_" + written)
        relabelled = _relabelled(samples, own)
        if relabelled is None:
            return
        parts = self._families.get(name)
        if parts is None:
            parts = self._families[name] = [b"# HELP " + block[:explained], kind]
        if parts[1] == kind:
            parts.append(relabelled)


def _relabelled(samples: bytes, own: bytes) -> bytes | None:
    """With labels put in front of those that are there; None: these are no samples."""
    if _PLAIN.fullmatch(samples) and samples.count(b'"') == 2 * samples.count(b'="'):
        return samples.replace(b"{", b"{" + own + b",")
    if _SAMPLES.fullmatch(samples) is None:
        return None
    return _SERIES.sub(lambda found: found[1] + b"{" + own + (b"," if found[2] else b"}"), samples)
