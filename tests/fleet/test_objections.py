"""What speaks against a file: it is judged by what this machine has, and by what was adopted before."""

from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.engine.virtual import Stage, virtual
from tests.fleet.test_desired import ME, NoCheck, at_once
from vllm_proxy.domain.config import Config, Devices, ModelSpec
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.inventory import Seen
from vllm_proxy.domain.ledger import Kind
from vllm_proxy.domain.placement import Machine
from vllm_proxy.domain.plan import plan
from vllm_proxy.domain.references import Files
from vllm_proxy.engine.ports import Ports
from vllm_proxy.engine.state import StateDirectory
from vllm_proxy.errors import ConfigError, Problem
from vllm_proxy.fleet.changes import KeyFiles
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.objections import Hardware, Objections
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.store import Store
from vllm_proxy.runtime.referenced import ReferencedFiles
from vllm_proxy.traffic.keyring import Keyring

GIB = 2**30


def hardware(*sizes: float) -> Hardware:
    """A machine whose GPUs have so many GiB."""
    seen = {
        str(index): Seen(
            str(index), f"GPU-{index}", index, "GPU", Kind.GPU, unified=False, total=int(size * GIB), free=None
        )
        for index, size in enumerate(sizes)
    }

    def look(table: Devices) -> Machine:
        return Machine(seen, frozenset(seen), table)

    return Hardware(look, place_of=lambda model: ("0",) if model.engine.memory == 10 * GIB else None)


def text(*models: str, reserve: str = "0B") -> bytes:
    """A file of models, each "NAME MEMORY [START]"."""
    lines = [f'devices.reserve = "{reserve}"']
    for one in models:
        name, memory, start = [*one.split(), "on-demand"][:3]
        lines += [f"[models.{name}]", 'model = "m"', f'memory = "{memory}"', f'start = "{start}"']
    return "\n".join(lines).encode()


async def told(before: bytes, after: bytes, machine: Hardware | None = None) -> dict[str, str]:
    """What speaks against going from one file to another, by path."""
    running = parse_config(before, "")
    objections = Objections(NoCheck(), hardware(80) if machine is None else machine, lambda: running, at_once)
    return {one.path: one.message for one in await objections.to_sizes(parse_config(after, ""), after)}


async def paths(before: bytes, after: bytes, machine: Hardware | None = None) -> set[str]:
    """As above, where alone."""
    return {*await told(before, after, machine)}


async def test_a_model_that_can_never_run_here_speaks_against_a_file() -> None:
    """At its key, on its line, with the sum."""
    after = text("chat 20GiB", "code 90GiB")
    running = parse_config(text(), "")
    (problem,) = await Objections(NoCheck(), hardware(80), lambda: running, at_once).to_sizes(
        parse_config(after, ""), after
    )
    assert problem == Problem(8, "models.code.memory", "needs 90.6 GiB on a GPU, and engines may have 80.0 of GPU 0")
    assert after.decode().splitlines()[7] == 'memory = "90GiB"'


async def test_what_are_always_to_run_have_to_stand_together() -> None:
    """The others come and go."""
    chat = "chat 50GiB always"
    assert await paths(text(), text(chat, "code 50GiB")) == set()
    found = await told(text(chat, "code 50GiB"), text(chat, "code 50GiB always"))
    assert found.keys() == {"models.code.start"}
    assert "50.6 (chat) + 50.6 (code) = 101.2 GiB, and engines may have 80.0 (GPU 0)" in found["models.code.start"]


async def test_what_was_adopted_speaks_against_no_other_change() -> None:
    """A daemon starts with such a file, and runs what fits."""
    broken = "code 90GiB", "chat 50GiB always", "embed 50GiB always"
    assert await paths(text(*broken), text(*broken, "other 10GiB")) == set()
    assert await paths(text(*broken), text("new 10GiB", *broken[::-1])) == set(), "in any order"
    assert await paths(text(*broken), text(*broken, "other 91GiB")) == {"models.other.memory"}
    assert await paths(text(*broken), text(*broken, "other 1GiB always")) == {"models.other.start"}


async def test_what_is_mended_step_by_step_is_not_refused() -> None:
    """Of the sum of those that are always to run it is enough that less is missing."""
    broken = "chat 50GiB always", "embed 50GiB always", "code 50GiB always"
    less = "chat 40GiB always", *broken[1:]
    assert await paths(text(*broken), text(*less)) == set()
    assert await paths(text(*broken), text(*broken[1:])) == set()
    assert await paths(text(*less), text(*broken)) == {"models.chat.start"}, "the one that was changed"


async def test_a_model_that_is_changed_has_to_fit_now() -> None:
    """Less is not enough. What is no matter of its size may be changed as before."""
    broken = text("code 90GiB")
    assert await paths(broken, text("code 85GiB")) == {"models.code.memory"}
    assert await paths(broken, text("code 90GiB", "code2 90GiB")) == {"models.code2.memory"}
    assert await paths(broken, broken + b'\ndescription = "mine"\nreplicas = 2') == set()
    assert await paths(broken, broken + b"\nenabled = false") == set(), "what is off wants nothing"
    assert await paths(broken + b"\nenabled = false", broken) == {"models.code.memory"}


async def test_less_room_is_judged_too() -> None:
    """Devices are as the new file has them; more room is never worse."""
    fits = "code 79GiB"
    assert await paths(text(fits), text(fits, reserve="1GiB")) == {"models.code.memory"}
    assert await paths(text("code 90GiB", reserve="1GiB"), text("code 90GiB")) == set()
    assert await paths(text("code 90GiB"), text("code 90GiB", reserve="1GiB")) == {"models.code.memory"}


async def test_where_nobody_manages_devices_bytes_of_them_speak_against_a_file() -> None:
    """Nobody could say what share that is. Where nobody has looked, nothing is known to be wrong."""
    nobody = hardware()
    found = await told(text("old 10GiB"), text("old 10GiB", "chat 10GiB", "none 0B"), nobody)
    assert found.keys() == {"models.chat.memory"}
    assert "gpu_memory_utilization" in found["models.chat.memory"]
    assert await paths(text(), text("chat 900GiB"), Hardware()) == set()


async def test_what_was_learned_of_an_engine_counts() -> None:
    """Two that have no KV cache stand together, though each has to find much when it starts."""
    both = "chat 70GiB always", "embed 70GiB always"
    assert await paths(text(), text(*both)) == {"models.embed.start"}
    learned = replace(hardware(80), measured=lambda _: GIB)
    assert await paths(text(), text(*both), learned) == set()


async def test_what_was_adopted_and_cannot_run_is_known() -> None:
    """For the log of a daemon that starts."""
    running = parse_config(text("code 90GiB", "chat 10GiB"), "")
    (one,) = await Objections(NoCheck(), hardware(80), lambda: running, at_once).standing()
    assert (one.model, one.key) == ("code", "memory")


async def test_what_has_no_room_beside_what_always_runs_is_warned_of_and_refused_nowhere() -> None:
    """Its requests fail, and the others serve: that may be meant so for a while."""
    chat, code = "chat 50GiB always", "code 40GiB"
    running = parse_config(text(chat, code), "")
    (one,) = await Objections(NoCheck(), hardware(80), lambda: running, at_once).standing()
    assert (one.model, one.key) == ("code", "memory")
    assert one.message == (
        "cannot serve code: it needs 40.6 GiB on a GPU and 29.4 can be had: chat (always) has 50.6 of 80.0"
    )
    assert await paths(text(chat), text(chat, code)) == set()


# Files


def following(folder: Path, before: bytes, machine: Hardware, check: NoCheck | None = None) -> Desired:
    """A file that is followed on such a machine."""
    file = folder / "models.toml"
    file.write_bytes(before)
    store, files = Store(file), ReferencedFiles(folder, None)

    def parse(data: bytes, files: Files) -> Config:
        return parse_config(data, str(file), files=files)

    config = parse(before, files)
    reconciler = Reconciler(config, Stage().shared, StateDirectory(folder), lambda spec: spec.model)
    reconciler.start()
    return Desired(
        store, parse, reconciler, check or NoCheck(), Ports(9000, 9999, []),
        files=files, key_files=KeyFiles(store, parse, files), keyring=Keyring(config), offload=at_once,
        hardware=machine,
    )  # fmt: skip


@virtual
async def test_a_reload_of_what_cannot_run_is_refused_and_what_runs_goes_on(tmp_path: Path) -> None:
    """Until the file is mended; the problem is told as any other of a file."""
    desired = following(tmp_path, text("chat 10GiB"), hardware(80))
    desired.file.write_bytes(text("chat 10GiB", "code 90GiB"))
    with capture_logs() as logs, pytest.raises(ConfigError) as refused:
        await desired.reload()
    assert refused.value.lines() == [
        f"{desired.file}:8: models.code.memory: needs 90.6 GiB on a GPU, and engines may have 80.0 of GPU 0"
    ]
    assert desired.rejected is refused.value
    assert [entry["event"] for entry in logs] == ["the configuration is rejected, what runs goes on"]
    assert [*desired.reconciler.specs()] == ["chat"]
    desired.file.write_bytes(text("chat 10GiB", "code 60GiB"))
    await desired.reload()
    assert [*desired.reconciler.specs()] == ["chat", "code"]
    await desired.reconciler.stop()


@virtual
async def test_a_write_of_what_cannot_run_is_refused_and_others_are_not(tmp_path: Path) -> None:
    """Though the file that was adopted has a model that cannot run."""
    broken = text("code 90GiB")
    desired = following(tmp_path, broken, hardware(80))
    with pytest.raises(ConfigError) as refused:
        await desired.write(lambda data: data + b'\n[models.more]\nmodel = "m"\nmemory = "91GiB"\n', None, ME)
    assert [problem.path for problem in refused.value.problems] == ["models.more.memory"]
    assert desired.file.read_bytes() == broken
    await desired.write(lambda data: data + b'\n[models.more]\nmodel = "m"\nmemory = "9GiB"\n', None, ME)
    assert [*desired.reconciler.specs()] == ["code", "more"]
    await desired.reconciler.stop()


# Plans


async def test_each_step_of_a_plan_has_its_place_or_why_there_is_none() -> None:
    """A start and a replacement need one; what is changed live does not."""
    running = parse_config(text("chat 20GiB", "embed 10GiB", "old 1GiB"), "")
    after = text("chat 90GiB", "embed 10GiB", "new 10GiB", "later 20GiB") + b'\ndescription = "x"'
    desired = parse_config(after.replace(b"[models.embed]", b'[models.embed]\ndescription = "y"'), "")
    actions = plan(desired.models, running.models)
    objections = Objections(NoCheck(), hardware(80), lambda: running, at_once)
    names = [f"{one.kind} {one.model}" for one in actions]
    found = dict(zip(names, await objections.prospects(desired, actions), strict=True))
    assert {name: (one.place, one.misfit is None) for name, one in found.items()} == {
        "update embed": (None, True),
        "stop old": (None, True),
        "replace chat": (None, False),
        "start new": (("0",), True),
        "start later": (None, True),
    }


ADOPTED = b'[models.chat]\nmodel = "m"\n'


class Checked(NoCheck):
    """vLLM takes no option `sed`; `asked` says of which models that was looked at."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def problems(self, model: ModelSpec) -> list[tuple[str, str]]:
        """As the parser of vLLM has it."""
        self.asked.append(model.id)
        return [("args.sed", "unknown option; did you mean seed?")] if "sed" in model.engine.args else []


@virtual
async def test_a_plan_refuses_the_options_that_a_write_refuses(tmp_path: Path) -> None:
    """With their paths and lines; of who may not name programs no other is looked at, nor in another environment."""
    check = Checked()
    desired = following(tmp_path, ADOPTED, hardware(80), check)
    wrong = ADOPTED + b"args = { sed = 1 }\n"
    for trusted in (True, False):
        with pytest.raises(ConfigError) as refused:
            await desired.plan(wrong, trusted=trusted)
        assert refused.value.problems == (Problem(3, "models.chat.args.sed", "unknown option; did you mean seed?"),)
    check.asked.clear()
    for more in (b'command = ["/tmp/mine"]', b'env = { PYTHONPATH = "/tmp/mine" }'):
        planned = await desired.plan(wrong + more, trusted=False)
        assert [one.model for one in planned.actions] == ["chat"]
    assert check.asked == []
    with pytest.raises(ConfigError):
        await desired.plan(wrong + b'command = ["/tmp/mine"]', trusted=True)
    await desired.reconciler.stop()
