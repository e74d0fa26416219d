"""One ready engine, as requests see it: its address, its connections, and what is in flight there.

Made by a supervisor and counted by the registry; everything runs on the event loop.
"""

import asyncio
from collections.abc import Callable

from vllm_proxy.domain.address import Address
from vllm_proxy.runtime.background import notify
from vllm_proxy.traffic.wire import Pool

_SUSPECT_FAILURES = 3


class Endpoint:
    """One ready engine, as requests see it."""

    def __init__(
        self, instance: str, address: Address, credential: str, max_model_len: int | None, tasks: tuple[str, ...] = ()
    ) -> None:
        self.instance = instance  # "chat/0"
        self.address = address
        self.credential = credential
        self.max_model_len = max_model_len  # tokens, as the engine says
        self.tasks = tasks  # of `domain.tasks`, as the engine says; (): it does not
        self.adapters: frozenset[str] = frozenset()  # those that it holds, by their ids
        self.in_flight = 0
        self.bit = 0  # by which its model remembers what it was sent; 0: nothing is known
        self.failures = 0  # connections in a row that gave no answer
        self.ejected = False  # the circuit is open: no requests until a health check succeeds
        self.idle_since = 0.0  # of the loop's clock: when its last request ended, or it was added
        self.pool = Pool(address)
        model_id = instance.rpartition("/")[0]
        self.answer_headers = self.answer_headers_of(model_id)
        self.own_headers = f"Host: {address.authority}\r\nAuthorization: Bearer {credential}\r\n".encode()
        self.suspect = asyncio.Event()  # so many failures in a row that a health check decides
        self._idle: asyncio.Future[None] | None = None  # made where somebody waits
        self._when_idle: list[Callable[[], None]] = []

    def answer_headers_of(self, model_id: str) -> bytes:
        """Lines of an answer of this instance, for the model or an adapter of it."""
        return f"X-Vllm-Proxy-Model: {model_id}\r\nX-Vllm-Proxy-Instance: {self.instance}\r\n".encode()

    async def wait_idle(self) -> None:
        """Until no request is in flight here."""
        if self.in_flight:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call it once, when no request is in flight here any more. There is one."""
        if self._idle is None:
            self._idle = asyncio.get_running_loop().create_future()
        self._when_idle.append(callback)

    def failed(self) -> None:
        """A connection to this engine gave no answer."""
        self.failures += 1
        if self.failures >= _SUSPECT_FAILURES:
            self.suspect.set()

    def add(self, count: int) -> None:
        """So many requests more. For the registry alone, which counts those of the model too."""
        self.in_flight += count
        assert self.in_flight >= 0, "a permit was given back twice"
        if not self.in_flight and self._idle is not None:
            self._idle.set_result(None)
            self._idle = None
            told, self._when_idle = self._when_idle, []
            notify(told)
