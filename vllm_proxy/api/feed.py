"""`GET /events?fleet=1`: the fleet as it is, then only what changed of it, and what has happened.

A model is encoded once for all readers, and only when something of it changed; that is looked at at most twice a
second, while somebody reads. A reader that has lost its connection needs no replay of states: it begins with all again.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import msgspec
from aiohttp import web

from vllm_proxy.api.happenings import Entry, Happenings, event
from vllm_proxy.api.models import change_of, rfc3339
from vllm_proxy.api.rates import Rates
from vllm_proxy.api.readers import Reader, Readers, new_reader, relay
from vllm_proxy.domain.feed_resources import Brief, ConfigState, Replica
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.domain.resources import problems_of
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.supervisor import Supervisor
from vllm_proxy.runtime.background import keep_running
from vllm_proxy.runtime.turns import in_turns

_PAUSE_SECONDS = 0.5
_MEBIBYTE = 2**20  # the memory of processes is told in steps of it: it changes at every look


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What changes of a replica without anybody being notified."""

    in_flight: int
    memory: int | None
    kv: float | None
    left: float | None


type _Watched = tuple[int, int, float, float | None, tuple[_Numbers, ...]]  # in flight, queued, requests/s, tokens/s


class Feed:
    """The readers of the stream, and what they know."""

    def __init__(self, reconciler: Reconciler, desired: Desired, happenings: Happenings, rates: Rates) -> None:
        self._reconciler = reconciler
        self._desired = desired
        self._happenings = happenings
        self._rates = rates
        self._readers = Readers()
        self._new: list[tuple[Reader, str | None]] = []  # who is still to be told what is, and what it knows
        self._asked = asyncio.Event()  # somebody reads
        self._is_current = False  # whether what readers know was looked at within the last pause
        self._known: dict[str, bytes] = {}  # each model as readers know it
        self._watched: dict[str, _Watched] = {}  # as it was then
        self._changed: set[str] = set()  # models that have said so since
        self._order: list[str] = []
        self._config = b""
        reconciler.listen(self._model)
        happenings.listen(self._happened)

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """It looks at the fleet inside the block, while somebody reads."""
        task = keep_running(self._follow, "feed of the fleet")
        yield
        task.cancel()

    async def stream(self, request: web.Request, known: str | None) -> web.StreamResponse:
        """The handler. `known`: the last happening that a reader knows."""
        reader = new_reader()
        self._new.append((reader, known))
        if self._is_current:
            self._admit()
        self._asked.set()
        try:
            return await relay(request, reader, self._reconciler)
        finally:
            self._readers.discard(reader)
            self._new = [new for new in self._new if new[0] is not reader]

    def _model(self, model: Model) -> None:
        """Called when what a model shows has changed."""
        if self._asked.is_set():
            self._changed.add(model.spec.id)

    def _happened(self, entry: Entry) -> None:
        if self._readers:
            self._readers.publish(entry.happened)

    async def _follow(self) -> None:
        while True:
            self._is_current = False
            if not (self._readers or self._new):
                self._asked.clear()
                self._known, self._watched, self._order, self._config = {}, {}, [], b""
                self._changed.clear()
                await self._asked.wait()
            await self._look()
            self._admit()
            self._is_current = True
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _look(self) -> None:
        """Tell readers what has changed."""
        changed, held = [], self._reconciler.room.held()
        async for model in in_turns(self._reconciler.models()):
            name = model.spec.id
            if self._reconciler.knows(name) and (found := self._brief_if_changed(model, held)) is not None:
                changed.append((name, found))
        told = [(name, found) for name, found in changed if self._known.get(name) != found]
        self._known.update(told)
        order = [model.spec.id for model in self._reconciler.models()]
        gone = self._known.keys() - set(order)
        for name in gone:
            del self._known[name]
            self._watched.pop(name, None)
        if told or gone or order != self._order:
            new_order = order if order != self._order else None
            self._order = order
            self._readers.publish(_fleet([found for _, found in told], list(gone), new_order))
        config = self._config_state()
        if config != self._config:
            self._config = config
            self._readers.publish(config)

    def _admit(self) -> None:
        """Tell new readers what is: in one step with their place among the others, so they miss nothing."""
        new, self._new = self._new, []
        for reader, known in new:
            there = [name for name in self._order if name in self._known]
            reader.put_nowait(_fleet([self._known[name] for name in there], [], self._order))
            if known:
                reset, entries = self._happenings.since(known)
                reader.put_nowait(reset + b"".join([entry.happened for entry in entries]))
            reader.put_nowait(self._config)
            self._readers.add(reader)

    def _brief_if_changed(self, model: Model, held: Mapping[str, Mapping[str, int]]) -> bytes | None:
        name = model.spec.id
        in_flight, queued = self._reconciler.registry.counts(name)
        numbers = tuple([_numbers(one, held.get(one.name, {})) for one in model.instances])
        watched = in_flight, queued, *self._rates.now(name), numbers
        if self._watched.get(name) == watched and name not in self._changed:
            return None
        self._changed.discard(name)
        self._watched[name] = watched
        return msgspec.json.encode(_brief(model, watched))

    def _config_state(self) -> bytes:
        rejected = self._desired.rejected
        state: ConfigState = {
            "revision": self._reconciler.config.revision,
            "problems": problems_of(rejected.problems) if rejected else [],
            "pending_restart": self._desired.pending_restart(),
        }
        return event("config", state)


def _fleet(models: list[bytes], gone: list[str], order: list[str] | None) -> bytes:
    """The event, of models that are encoded already."""
    return event("fleet", {"models": [msgspec.Raw(one) for one in models], "gone": gone, "order": order})


def _numbers(one: Supervisor, takes: Mapping[str, int]) -> _Numbers:
    endpoint, engine, left = one.endpoint, one.engine, one.seconds_left()
    memory = max(takes.values(), default=0)
    if not memory and engine is not None:
        memory = engine.memory_bytes // _MEBIBYTE * _MEBIBYTE
    return _Numbers(
        endpoint.in_flight if endpoint else 0,
        memory or None,
        one.meter.kv_usage if endpoint and one.meter else None,
        None if left is None else float(round(left)),
    )


def _brief(model: Model, watched: _Watched) -> Brief:
    in_flight, queued, rps, tps, numbers = watched
    spec, diagnosis = model.spec, model.diagnosis
    return {
        "id": spec.id,
        "state": model.state,
        "reason": diagnosis.reason if diagnosis else None,
        "message": model.message,
        "change": change_of(model),
        "description": spec.policy.description,
        "aliases": spec.policy.aliases,
        "source": spec.engine.model,
        "start": spec.policy.start,
        "enabled": spec.policy.enabled,
        "in_flight": in_flight,
        "queued": queued,
        "rps": rps,
        "tps": tps,
        "replicas": [_replica(one, its) for one, its in zip(model.instances, numbers, strict=True)],
    }


def _replica(one: Supervisor, numbers: _Numbers) -> Replica:
    engine, diagnosis = one.engine, one.diagnosis
    return {
        "index": one.index,
        "state": one.state,
        "phase": one.phase,
        "reason": diagnosis.reason if diagnosis else None,
        "message": diagnosis.message if diagnosis else one.waiting_because,
        "progress": 1.0 if one.state is State.READY else one.fraction,
        "left": numbers.left,
        "pid": engine.pid if engine else None,
        "port": engine.place.address.port if engine else None,
        "since": rfc3339(one.ready_at) if one.state is State.READY else None,
        "restarts": one.restarts,
        "in_flight": numbers.in_flight,
        "memory": numbers.memory,
        "kv": numbers.kv,
    }
