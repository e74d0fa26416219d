"""What becomes of the configuration: the outcome of a reload or a write, what a plan says, who has written.

Made by `desired`; for the API, the events and the status line.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_proxy.domain.keys import KeyChanges, changes
from vllm_proxy.domain.plan import Action, Prospect


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a reload or a write."""

    revision: str
    changes: tuple[Action, ...]
    keys: KeyChanges = field(default_factory=lambda: changes({}, {}))
    settings: list[str] = field(default_factory=list)  # as `plan.settings` has them
    warnings: list[str] = field(default_factory=list)  # of what was not so before


class Plan(NamedTuple):
    """What adopting a file would change."""

    actions: tuple[Action, ...]
    prospects: list[Prospect]  # what would become of each
    restart: list[str]  # keys that would wait for a restart
    keys: KeyChanges
    settings: list[str]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Author:
    """Who wants something changed, and how."""

    who: str  # "key ci", "uid 1000", "anonymous"
    what: str  # "PATCH /models/chat"
    commit: Callable[[], None] = field(default=lambda: None, compare=False)  # raises where it may not be done any more


@dataclass(frozen=True, slots=True)
class Written:
    """Something was changed, or commanded by hand: then the revisions are one."""

    author: Author
    before: str
    after: str
