"""The manual pages of `vllm_proxy/docs`, for `vllm-proxy help`: lists them, and finds the text that a word refers to.

A word is the name of a page, the heading of a section in one (which the name of its page may precede), or a number
that such a heading ends with ("Exit status 78", "Clients get 503"), or what a row of a table begins with. Of others
the sections are listed that have all of them. Needs no daemon, no configuration and no network. How a page is printed
is in `terminal`.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from vllm_proxy.errors import STATUS, VllmProxyError

TOPICS = (
    "start install nixos security limits adapters moderation configuration changes scheduling page commands api errors"
    " operating faults metrics performance"
).split()
_FIRST = ("errors", "operating")  # whose sections are meant where several pages have one of that name
_HEADING = re.compile(r"^(#{2,6}) (.*)$")
_NUMBER = re.compile(r".* (\d+)")
_NEAR = 3
_MOST_FOUND = 12  # sections, of a search
_TITLE_COUNTS = 10  # as many words in the text


class UnknownTopicError(VllmProxyError):
    """There is nothing about that."""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with all that stands below it, smaller headings included. `name`: as an address has it."""

    name: str
    title: str
    text: str


def topics() -> Iterator[tuple[str, str]]:
    """Name and first sentence of each page."""
    for name in TOPICS:
        _, _, rest = page(name).partition("\n\n")
        yield name, " ".join(rest.partition("\n\n")[0].split())


def contents() -> str:
    """What `vllm-proxy help` says alone: the topics, Markdown."""
    listed = "\n".join(f"- **{name}**: {about_it}" for name, about_it in topics())
    return f"""# vllm-proxy

{listed}

`vllm-proxy help TOPIC` prints one of these pages, `vllm-proxy help [TOPIC] SECTION` a section of one by its heading,
and `vllm-proxy help CODE` what an error code, a reason, an HTTP status or an exit status means and what to do.
"""


@cache
def page(name: str) -> str:
    """The text of a page, Markdown."""
    return files("vllm_proxy").joinpath("docs", f"{name}.md").read_text(encoding="utf-8")


@cache
def sections(name: str) -> Sequence[Section]:
    """The sections of a page, in its order."""
    lines = page(name).splitlines()
    code = False
    headings: list[tuple[int, int, str]] = []  # line, depth, title
    for number, line in enumerate(lines):
        code ^= line.startswith("```")
        if not code and (found := _HEADING.match(line)):
            headings.append((number, len(found[1]), found[2]))
    ends = [
        next((line for line, depth, _ in headings[place + 1 :] if depth <= headings[place][1]), len(lines))
        for place in range(len(headings))
    ]
    return [
        Section(anchor(title), title, "\n".join(lines[line:end]).strip() + "\n")
        for (line, _, title), end in zip(headings, ends, strict=True)
    ]


def anchor(title: str) -> str:
    """The address of a heading within its page, as forges make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def about(words: str) -> str:
    """A page, a section, the row of a table, the sections of all error codes with a status, or which have the words.

    Raises:
        UnknownTopicError: there is none; names near ones.

    """
    words = words.strip()
    wanted = anchor(words)
    if wanted in TOPICS:
        return page(wanted)
    topic, _, rest = words.partition(" ")
    if topic in TOPICS and (inside := [one.text for one in sections(topic) if one.name == anchor(rest)]):
        return inside[0]
    if topic in TOPICS and rest:
        words, wanted = rest, anchor(rest)
    known = _known()
    found = [known[wanted].text] if wanted in known else []
    found += [known[code].text for code, status in STATUS.items() if str(status) == wanted and not found]
    found += _rows(words)
    near = [name for name in known if f"-{wanted}-" in f"-{name}-"] if wanted else []
    if not found and len(near) == 1:
        found = [known[near[0]].text]
    if not found and (mentioning := _mentioning(words)):
        found = [f"# Sections with {words}\n", "\n".join(mentioning) + "\n"]
    if found:
        return "\n".join(found)
    near = near or difflib.get_close_matches(wanted, dict.fromkeys([*TOPICS, *known]), n=_NEAR)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    msg = f"cannot find anything about {words!r}: {hint}`vllm-proxy help` lists the topics"
    raise UnknownTopicError(msg)


def _mentioning(words: str) -> list[str]:
    """How to print each section that has all of the words, those that are most about them first."""
    wanted = [re.compile(rf"(?<!\w){re.escape(word)}s?(?!\w)", re.IGNORECASE) for word in words.split()]
    found: list[tuple[int, str]] = []
    for topic in TOPICS:
        for section in sections(topic):
            title, _, text = section.text.partition("\n")
            own = re.split(r"\n#{2,6} ", text, maxsplit=1)[0]
            counts = [_TITLE_COUNTS * len(word.findall(title)) + len(word.findall(own)) for word in wanted]
            if all(counts):
                found.append((-sum(counts), f"- `vllm-proxy help {topic} {section.name}`: {section.title}"))
    return [line for _, line in sorted(found, key=lambda one: one[0])[:_MOST_FOUND]]


@cache
def _known() -> dict[str, Section]:
    """Every section by its name, and by the number that it ends with."""
    found: dict[str, Section] = {}
    for name in (*_FIRST, *(other for other in TOPICS if other not in _FIRST)):
        for section in sections(name):
            found.setdefault(section.name, section)
            if number := _NUMBER.fullmatch(section.title):
                found.setdefault(number[1], section)
    return found


def _rows(words: str) -> Iterator[str]:
    """Tables of one row: a key, with or without its table's name, a metric, a command, a word that a page explains."""
    is_it = re.compile(rf"\| (?:`[^`]+`, )*`([\w-]+[. ])?{re.escape(words)}`(?:, `[^`]+`)* \|")
    for name in TOPICS:
        lines = page(name).splitlines()
        heads = [number for number, line in enumerate(lines) if line.startswith(("| ---", "|---"))]
        for number, line in enumerate(lines):
            if is_it.match(line):
                head = max(place for place in heads if place < number)
                yield "\n".join([*lines[head - 1 : head + 1], line, ""])
