"""`GET /devices`: how much memory each device has, who has it, and who gets what becomes free.

Reads what the room last knew, and looks at nothing itself; events have the same form.
"""

from collections.abc import Iterable, Mapping

from aiohttp import web

from vllm_proxy.api.reply import Answers, Reply
from vllm_proxy.domain import device_resources
from vllm_proxy.domain.inventory import Seen
from vllm_proxy.domain.ledger import Device, Hold
from vllm_proxy.fleet.room import EARLIER, Room


def list_devices(room: Room) -> Answers[device_resources.Devices]:
    """`GET /devices`."""

    async def handle(_request: web.Request) -> Reply[device_resources.Devices]:
        machines = room.machines
        return Reply({"devices": shown(room), "unmanaged": machines.unmanaged, "problem": machines.problem})

    return handle


def shown(room: Room) -> list[device_resources.Device]:
    """Every device that is managed, as REST shows it."""
    machine = room.machines.machine()
    if machine is None:
        return []
    devices, holds = room.memory()
    promised = {name: instance for instance, where in room.moves.place.items() for name in where}
    return [_device(one, devices[name], holds, promised) for name, one in machine.seen.items()]


def _device(one: Seen, device: Device, holds: Iterable[Hold], promised: Mapping[str, str]) -> device_resources.Device:
    return {
        "id": one.id,
        "index": one.index,
        "name": one.product,
        "kind": one.kind,
        "unified": one.unified,
        "total": one.total,
        "free": one.free,
        "reserve": one.total - int(device.room),
        "foreign": [{"pid": other.pid, "name": other.name, "bytes": other.bytes} for other in one.foreign],
        "holds": [
            {"instance": hold.name.removeprefix(EARLIER), "bytes": hold.takes[one.name], "standing": hold.standing}
            for hold in holds
            if one.name in hold.takes
        ],
        "promised_to": promised.get(one.name),
    }
