"""Finds members of a large JSON object without decoding it, in steps that are short enough for an event loop.

For `body` and `asked`. It does not validate: a text that is no JSON gives some result, and whoever parses it reports
the error.
"""

import re
from collections.abc import Collection, Generator, Iterator, Mapping

type Spans = Mapping[bytes, tuple[int, int]]  # of values, by their names

_STEP = 128 * 1024  # bytes looked at between two steps, about
_STEP_TURNS = 2_000  # or turns of the loop, one for each string, comma and bracket
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)  # possessive: no backtracking
_PLAIN = re.compile(rb'[^"\[\]{},:]*+')
_PLAIN_INSIDE = re.compile(rb'[^"\[\]{}]*+')  # in a deeper value no comma and no colon means anything
_SPACE = b" \t\r\n"
_OPENING, _CLOSING = b"[{", b"]}"
_BEGIN = b"[", b'["'  # what is no plain text at the begin of an array of texts or of arrays


def find_members(text: bytes, names: Collection[bytes]) -> Iterator[Spans]:  # noqa: C901 - one state machine
    """Yield often; the last yield is the spans of the last values of these members of the outermost object.

    Only members of that object count, not those inside other values, and not text inside strings. A text that is no
    JSON gives some answer or none: whoever parses it will say so.
    """
    found: dict[bytes, tuple[int, int]] = {}
    longest = 6 * max(map(len, names))  # every character may be written as an escape
    position, depth, turns, stepped_at = 0, 0, 0, 0
    key: bytes | None = None  # of the member that is being read, once its colon was seen
    string: bytes | None = None  # the last string at depth 1
    begin = 0  # of the value that is being read
    while position < len(text):
        turns += 1
        if turns >= _STEP_TURNS or position - stepped_at >= _STEP:
            turns, stepped_at = 0, position
            yield found
        plain = _PLAIN if depth <= 1 else _PLAIN_INSIDE
        end = plain.match(text, position, position + _STEP).end()  # type: ignore[union-attr] # matches the empty string
        if end >= len(text):
            break
        if end == position + _STEP:
            position = end
            continue
        byte = text[end]
        position = end + 1
        if byte == 0x22:  # "
            close = yield from _string_end(text, position, found)
            if depth == 1 and key is None:
                string = text[position:close] if close - position <= longest else None
            position = close + 1
        elif byte in _OPENING:
            depth += 1
        elif byte == 0x3A and depth == 1 and key is None:  # :
            key, begin = string, position
        elif byte in _CLOSING or byte == 0x2C:
            if depth == 1:
                if key is not None and (name := _unescaped(key)) in names:
                    found[name] = _without_space(text, begin, end)
                key = string = None
            depth -= byte in _CLOSING
            if depth == 0:
                break
    yield found


def count_elements(text: bytes, begin: int, limit: int) -> Iterator[int]:
    """Yield often; the last yield is how many elements the array in text[begin:limit] has, of texts or of arrays.

    1 where it has none, and of every other value.
    """
    position, depth, turns, stepped_at, count, seen = begin, 0, 0, begin, 1, 0
    while position < limit:
        turns += 1
        if turns >= _STEP_TURNS or position - stepped_at >= _STEP:
            turns, stepped_at = 0, position
            yield count
        plain = _PLAIN if depth <= 1 else _PLAIN_INSIDE
        end = plain.match(text, position, position + _STEP).end()  # type: ignore[union-attr] # as above
        if end == position + _STEP:
            position = end
            continue
        if end >= limit:
            break
        byte = text[end]
        if seen < len(_BEGIN) and byte not in _BEGIN[seen]:
            break
        seen += 1
        position = end + 1
        if byte == 0x22:  # "
            position = (yield from _string_end(text, position, count)) + 1
        elif byte in _OPENING:
            depth += 1
        elif byte in _CLOSING:
            depth -= 1
        elif byte == 0x2C and depth == 1:
            count += 1
    yield count


def _without_space(text: bytes, begin: int, end: int) -> tuple[int, int]:
    """The span of a value, without the spaces around it."""
    value = text[begin:end].rstrip(_SPACE)
    return begin + len(value) - len(value.lstrip(_SPACE)), begin + len(value)


def _string_end[T](text: bytes, position: int, found: T) -> Generator[T, None, int]:
    """The index of the quote that ends the string which begins at `position`, or the text's length."""
    while True:
        end = _STRING.match(text, position, position + _STEP).end()  # type: ignore[union-attr] # as above
        if end >= len(text):
            return len(text)
        if text[end] == 0x22 and end < position + _STEP:
            return end
        if end == position:  # a backslash with nothing behind it
            return len(text)
        position = end
        yield found


def _unescaped(key: bytes) -> bytes:
    """A key as it is meant: JSON may write any character as an escape."""
    if b"\\" not in key:
        return key
    return re.sub(rb"\\u00([0-7][0-9A-Fa-f])", lambda match: bytes([int(match[1], 16)]), key)
