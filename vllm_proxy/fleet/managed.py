"""The devices that are managed: as their inventory last saw them, with what `[devices]` says.

The room asks `machine` what there is. Where nothing is known of them nobody manages them, and engines take turns.
"""

from collections.abc import Callable
from typing import Protocol

import structlog

from vllm_proxy.domain.config import Devices
from vllm_proxy.domain.placement import Machine
from vllm_proxy.engine.device_source import SourceError
from vllm_proxy.engine.devices import Inventory
from vllm_proxy.engine.machine_memory import machine_memory

log = structlog.get_logger()


class Machines(Protocol):
    """Where the room learns what there is."""

    def machine(self) -> Machine | None:
        """The devices; None: nobody manages them."""

    @property
    def problem(self) -> str | None:
        """What ought to be known of them and is not, with the reason."""

    @property
    def unmanaged(self) -> str | None:
        """Why nobody manages them, for people; None: they are managed."""

    def host_budget(self) -> int | None:
        """Bytes of the machine's memory that sleepers may have; None: nobody keeps count."""

    def use(self, rules: Devices) -> None:
        """The file says this of them now."""

    def wake(self) -> None:
        """Somebody waits for room."""


class Unmanaged:
    """Nobody manages the devices."""

    def machine(self) -> Machine | None:
        """None."""
        return None

    def host_budget(self) -> int | None:
        """None."""
        return None

    @property
    def problem(self) -> None:
        """None."""

    @property
    def unmanaged(self) -> str:
        """Nobody looks at them."""
        return "nobody looks at them"

    def use(self, rules: Devices) -> None:
        """Nothing to do."""

    def wake(self) -> None:
        """Nothing to do."""


class Managed:
    """The devices of an inventory."""

    def __init__(
        self,
        inventory: Inventory,
        rules: Devices,
        default_share: Callable[[], float | None] = lambda: None,
        host_total: int = 0,
    ) -> None:
        """`default_share`: the part of a device that vLLM takes where nobody says how much, where that is known.

        `host_total`: bytes of the machine's memory.
        """
        self._host_total = host_total
        self.inventory = inventory
        self.rules = rules
        self._default_share = default_share

    def machine(self) -> Machine | None:
        """As they were last seen."""
        inventory = self.inventory
        if not inventory.managed:
            return None
        share = self._default_share()
        looks = inventory.looked_at, inventory.seen_at
        return Machine(inventory.devices, inventory.usable, self.rules, *looks, default_share=share)

    def host_budget(self) -> int | None:
        """A part of the machine's memory, or a size."""
        return self.rules.host_bytes(self._host_total)

    @property
    def problem(self) -> str | None:
        """What the last looks could not tell."""
        return self.inventory.problem

    @property
    def unmanaged(self) -> str | None:
        """Because the file says so, they cannot be looked at, or there are none."""
        if self.inventory.managed:
            return None
        if self.rules.source == "none":
            return 'the file says so: [devices] source = "none"'
        return self.problem or 'no GPU was found; [devices] source = "cpu" manages the memory of the processors'

    def look(self, rules: Devices) -> Machine | None:
        """As the file would have them that says this, without devices where nobody manages any; None: not known."""
        inventory = self.inventory
        if rules.source == "none":
            return Machine({}, frozenset(), rules)
        if rules.source != self.rules.source or (inventory.problem is not None and not inventory.managed):
            return None
        return Machine(inventory.devices, inventory.usable, rules, default_share=self._default_share())

    def use(self, rules: Devices) -> None:
        """What the file says counts from now on; another source is looked at."""
        self.rules = rules
        self.inventory.use(rules.source)

    def wake(self) -> None:
        """Look at them now, and often."""
        self.inventory.wake()

    async def follow(self, asked: Callable[[], bool], changed: Callable[[], None]) -> None:
        """Look again and again until cancelled, often while `asked`; call `changed` after what is new."""
        await self.inventory.follow(asked, changed)


def host_total() -> int:
    """Bytes of the machine's memory; 0: not known."""
    try:
        return machine_memory().total
    except (OSError, SourceError) as error:
        log.warning("it is not known how much memory the machine has: no engine may sleep there", why=str(error))
        return 0
