"""`GET /events`: changes of models, of devices and of the configuration, as server-sent events.

With `fleet` it is another stream, which is in `feed`. What is kept of these events, for readers that connect anew, is
in `happenings`.
"""

from aiohttp import web

from vllm_proxy.api import devices
from vllm_proxy.api.feed import Feed
from vllm_proxy.api.happenings import Entry, Happenings, event
from vllm_proxy.api.models import adapters
from vllm_proxy.api.readers import Reader, Readers, new_reader, relay
from vllm_proxy.domain import device_resources, resources
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.errors import ConfigError
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.outcome import Outcome, Written
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.supervisor import Supervisor

_NOTICEABLE = 0.01  # of a device's total


class Events:
    """The readers of the stream."""

    def __init__(self, reconciler: Reconciler, desired: Desired, happenings: Happenings, feed: Feed) -> None:
        """`feed`: for who asks for `fleet`."""
        self._reconciler = reconciler
        self._happenings = happenings
        self._feed = feed
        self._readers = Readers()
        self._shown: dict[str, resources.ModelEvent] = {}  # the last event of each model
        self._devices: dict[str, device_resources.Device] = {}  # as readers know each device, by id
        reconciler.listen(self._model)
        desired.listen(self._config)
        reconciler.room.listen(self._room)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The handler."""
        known = request.headers.get("Last-Event-ID") or request.query.get("since")
        if request.query.get("fleet", "0").lower() not in {"", "0", "false"}:
            return await self._feed.stream(request, known)
        reader = new_reader()
        if known:
            reset, entries = self._happenings.since(known)
            reader.put_nowait(reset + b"".join([entry.plain for entry in entries]))
        self.add(reader)
        try:
            return await relay(request, reader, self._reconciler)
        finally:
            self._readers.discard(reader)

    def add(self, reader: Reader) -> None:
        """Send a reader what happens from now on. What is, it is told by `GET`."""
        if not self._readers:
            self._devices = {device["id"]: device for device in devices.shown(self._reconciler.room)}
        self._readers.add(reader)

    def _model(self, model: Model) -> None:
        """Called when the state, the reason or the phase of one of its instances changed, or an adapter's."""
        entry = self._happenings.of_model(model)
        if not self._readers:
            self._shown.clear()
            if entry is None:
                return
        model_id = model.spec.id
        diagnosis = model.diagnosis
        shown: resources.ModelEvent = {
            "id": model_id,
            "state": model.state if self._reconciler.knows(model_id) else State.STOPPED,
            "reason": diagnosis.reason if diagnosis else None,
            "message": model.message,
            "adapters": adapters(model),
            "instances": [_instance(one) for one in model.instances],
        }
        if entry is not None:
            self._happenings.tell(entry, ("model", shown))
            self._told(entry)
        elif self._shown.get(model_id) != shown:
            self._readers.publish(event("model", shown))
        if self._readers:
            self._shown[model_id] = shown

    def _room(self) -> None:
        """Called after every decision about room, and after what is new of the devices."""
        if not self._readers:
            return
        for device in devices.shown(self._reconciler.room):
            known = self._devices.get(device["id"])
            if known is None or _is_noticeable(known, device):
                self._devices[device["id"]] = device
                self._readers.publish(event("device", device))

    def _config(self, outcome: Outcome | Written | ConfigError) -> None:
        self._told(self._happenings.of_file(outcome))

    def _told(self, entry: Entry) -> None:
        if self._readers:
            self._readers.publish(entry.plain)


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
