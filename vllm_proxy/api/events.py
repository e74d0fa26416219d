"""`GET /events`: changes of models, of devices and of the configuration, as server-sent events.

Publishing never waits: each reader has a bounded queue, and one that falls too far behind is disconnected.
"""

import asyncio
import contextlib

import msgspec
from aiohttp import web

from vllm_proxy.api import devices
from vllm_proxy.api.models import adapters
from vllm_proxy.api.reply import ALIVE, begin_events
from vllm_proxy.domain import device_resources, resources
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.errors import ConfigError
from vllm_proxy.fleet.desired import Desired, Outcome, Written
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.supervisor import Supervisor
from vllm_proxy.runtime.background import spawn

_MOST_WAITING = 1000  # events that a reader may be behind
_NOTICEABLE = 0.01  # of a device's total
_SILENT_SECONDS = 15.0  # then a comment keeps the stream alive


class Events:
    """The readers of the stream."""

    def __init__(self, reconciler: Reconciler, desired: Desired) -> None:
        self._reconciler = reconciler
        self._readers: set[asyncio.Queue[bytes | None]] = set()
        self._shown: dict[str, resources.ModelEvent] = {}  # the last event of each model
        self._devices: dict[str, device_resources.Device] = {}  # as readers know each device, by id
        reconciler.listen(self._model)
        desired.listen(self._config)
        reconciler.room.listen(self._room)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The handler."""
        response = await begin_events(request)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(_MOST_WAITING)
        self.add(queue)
        stopping = spawn(self._reconciler.stopping.wait(), "end of an event stream")
        stopping.add_done_callback(lambda _: _close(queue))
        try:
            await response.write(ALIVE)  # from here on no event is missed
            with self._reconciler.watchers:
                while (event := await _next(queue)) is not None:
                    await response.write(event)
        finally:
            self._readers.discard(queue)
            stopping.cancel()
        return response

    def add(self, reader: asyncio.Queue[bytes | None]) -> None:
        """Send a reader what happens from now on. What is, it is told by `GET`."""
        if not self._readers:
            self._devices = {device["id"]: device for device in devices.shown(self._reconciler.room)}
        self._readers.add(reader)

    def _model(self, model: Model) -> None:
        """Called when the state, the reason or the phase of one of its instances changed, or an adapter's."""
        if not self._readers:
            self._shown.clear()
            return
        model_id = model.spec.id
        diagnosis = model.diagnosis
        event: resources.ModelEvent = {
            "id": model_id,
            "state": model.state if self._reconciler.knows(model_id) else State.STOPPED,
            "reason": diagnosis.reason if diagnosis else None,
            "message": model.message,
            "adapters": adapters(model),
            "instances": [_instance(one) for one in model.instances],
        }
        if self._shown.get(model_id) != event:
            self._shown[model_id] = event
            self._publish("model", event)

    def _room(self) -> None:
        """Called after every decision about room, and after what is new of the devices."""
        if not self._readers:
            return
        for device in devices.shown(self._reconciler.room):
            known = self._devices.get(device["id"])
            if known is None or _is_noticeable(known, device):
                self._devices[device["id"]] = device
                self._publish("device", device)

    def _config(self, outcome: Outcome | Written | ConfigError) -> None:
        if isinstance(outcome, Written):
            author = outcome.author
            written: resources.WriteEvent = {
                "who": author.who, "what": author.what, "before": outcome.before, "after": outcome.after,
            }  # fmt: skip
            self._publish("write", written)
            return
        if isinstance(outcome, ConfigError):
            rejected: resources.ConfigRejected = {
                "result": "rejected",
                "problems": resources.problems_of(outcome.problems),
            }
            self._publish("config", rejected)
            return
        accepted: resources.ConfigAccepted = {
            "result": "accepted", "revision": outcome.revision, "keys": outcome.keys,
        }  # fmt: skip
        self._publish("config", accepted)
        if outcome.changes:
            changes = resources.changes_of(outcome.changes)
            planned: resources.PlanEvent = {"revision": outcome.revision, "changes": changes}
            self._publish("plan", planned)

    def _publish(self, kind: str, value: object) -> None:
        event = b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(value))
        for queue in list(self._readers):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                self._readers.discard(queue)
                _close(queue)


def _instance(one: Supervisor) -> resources.InstanceState:
    reason = one.diagnosis.reason if one.diagnosis else None
    return {"index": one.index, "state": one.state, "phase": one.phase, "reason": reason}


def _is_noticeable(before: device_resources.Device, after: device_resources.Device) -> bool:
    """Whether a device changed in more than a little of what is free, which may do so at every look."""
    if any(before[key] != after[key] for key in ("total", "reserve", "holds", "promised_to")):
        return True
    if before["free"] is None or after["free"] is None:
        return before["free"] != after["free"]
    return abs(before["free"] - after["free"]) >= after["total"] * _NOTICEABLE


def _close(queue: asyncio.Queue[bytes | None]) -> None:
    """End a reader's stream; where its queue is full, an event makes room for that."""
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(None)


async def _next(queue: asyncio.Queue[bytes | None]) -> bytes | None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SILENT_SECONDS):
            return await queue.get()
    return ALIVE
