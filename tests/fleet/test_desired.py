"""Edits, writes, crashes, hands and time in any order: what is desired is what runs in the end. In virtual time."""

import asyncio
import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from structlog.testing import capture_logs

from tests.engine.virtual import Stage, VirtualLoop, now, passes, settle, virtual
from vllm_proxy.domain.config import Config, EngineDefaults, EngineSpec, ModelSpec, revision_of
from vllm_proxy.domain.file import edit, edit_keys
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.keys import digest, hash_of
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.domain.options import OptionTable
from vllm_proxy.domain.references import Files
from vllm_proxy.engine.ports import Ports
from vllm_proxy.engine.state import StateDirectory
from vllm_proxy.errors import ConfigError, RequestError
from vllm_proxy.fleet.changes import KeyEdit, KeyFiles
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.outcome import Author
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.store import Store
from vllm_proxy.runtime.referenced import ReferencedFiles
from vllm_proxy.runtime.threads import Offload
from vllm_proxy.traffic.keyring import Keyring

ME = Author("uid 0", "PUT /config")
NAMES = st.sampled_from(["a", "b", "c"])
KEYS = st.fixed_dictionaries(
    {"model": st.sampled_from(["good", "good", "other", "bad"])},
    optional={
        "replicas": st.integers(1, 3),
        "enabled": st.booleans(),
        "replace": st.sampled_from(["auto", "surge", "drain"]),
        "start": st.sampled_from(["always", "on-demand"]),
        "devices": st.sampled_from([[0], [1], [0, 1]]),
        "queue_size": st.integers(0, 2),
        "drain_timeout": st.integers(0, 100),
        "restart": st.fixed_dictionaries({"max_failures": st.integers(1, 3)}),
    },
)


async def at_once[**P, T](function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """In place of a thread."""
    await asyncio.sleep(0)
    return function(*args, **kwargs)


class NoCheck:
    """No vLLM tells its options."""

    versions = frozenset[str]()

    async def problems(self, _model: ModelSpec) -> list[tuple[str, str]]:
        """None."""
        return []

    async def of_engine(self, _engine: EngineDefaults) -> OptionTable | None:
        """Nothing is known."""
        return None

    def prefetch(self, specs: Iterable[EngineSpec]) -> None:
        """Nothing is learnt."""


def desired_of(store: Store, reconciler: Reconciler, offload: Offload, plans: Offload | None = None) -> Desired:
    """The desired state of a file, and of those that it names."""
    files = ReferencedFiles(store.file.parent, None)

    def parse(data: bytes, files: Files) -> Config:
        return parse_config(data, str(store.file), files=files)

    ports = Ports(9000, 9999, [])
    keyring = Keyring(reconciler.config)
    key_files = KeyFiles(store, parse, files)
    return Desired(
        store, parse, reconciler, NoCheck(), ports,
        files=files, key_files=key_files, keyring=keyring, offload=offload, plans=plans,
    )  # fmt: skip


class Fleet(RuleBasedStateMachine):
    """A reconciler with its file, and everybody who may meddle."""

    @initialize()
    def begin(self) -> None:
        """An empty file."""
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "models.toml"
        self.file.write_text("# mine\n")
        self.logs = contextlib.ExitStack()
        self.logs.enter_context(capture_logs())
        self.run(self._begin)

    async def _begin(self) -> None:
        self.stage = Stage()
        self.stage.launcher.teardown_seconds = 3
        config = parse_config(self.file.read_bytes(), "")
        state = StateDirectory(Path(self.folder.name) / "state")
        self.reconciler = Reconciler(config, self.stage.shared, state, lambda spec: spec.model)
        store = Store(self.file, fsync=lambda _descriptor: None)
        self.desired = desired_of(store, self.reconciler, at_once)
        self.keyring = self.desired.keyring
        self.reconciler.start()

    def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """In virtual time."""
        self.runner.run(work())

    @rule(models=st.dictionaries(NAMES, KEYS, max_size=3))
    def save(self, models: dict[str, dict[str, Any]]) -> None:
        """An editor writes the whole file."""
        text = "# mine\n"
        for name, keys in models.items():
            text = edit.create(text, ("models", name), keys)
        self.file.write_text(text)

    @rule()
    def save_rubbish(self) -> None:
        """An editor is in the middle of something."""
        self.file.write_text(self.file.read_text() + "[models.b\n")

    @rule(name=NAMES, keys=KEYS)
    def write(self, name: str, keys: dict[str, Any]) -> None:
        """POST where there is none, else PUT."""

        def change(data: bytes) -> bytes:
            text = data.decode()
            there = name in edit.tables_in(text, "models")
            return (edit.put if there else edit.create)(text, ("models", name), keys).encode()

        self.run(lambda: self._write(change))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        """DELETE."""

        def change(data: bytes) -> bytes:
            text = data.decode()
            return (edit.delete(text, ("models", name)) if name in edit.tables_in(text, "models") else text).encode()

        self.run(lambda: self._write(change))

    @rule(name=NAMES)
    def key(self, name: str) -> None:
        """A key is made, or taken away."""

        def change(texts: edit_keys.KeyTexts) -> edit_keys.KeyTexts:
            if texts.where(name) is not None:
                return edit_keys.delete(texts, name)
            return edit_keys.create(texts, name, {"hash": hash_of(name)})

        self.run(lambda: self._write_key(name, change))

    async def _write_key(self, name: str, change: KeyEdit) -> None:
        with contextlib.suppress(ConfigError, RequestError):
            config = await self.desired.write_keys(change, None, ME)
            in_file = name in edit.tables_in(self.file.read_text(), "keys")
            assert in_file == (name in config.keys) == (self.keyring.find(digest(name.encode())) is not None)

    async def _write(self, change: Callable[[bytes], bytes]) -> None:
        with contextlib.suppress(ConfigError, RequestError):
            await self.desired.write(change, None, ME)

    @rule()
    def reload(self) -> None:
        """The watch tells of a change."""
        self.run(self._reload)

    async def _reload(self) -> None:
        with contextlib.suppress(ConfigError):
            await self.desired.reload()

    @rule(which=st.integers(0, 9), code=st.sampled_from([0, 1, 2]))
    def crash(self, which: int, code: int) -> None:
        """An engine dies."""
        self.run(lambda: self._crash(which, code))

    async def _crash(self, which: int, code: int) -> None:
        living = [engine for engine in self.stage.launcher.engines if not engine.exited.done()]
        if living:
            living[which % len(living)].die(code)
        await settle()

    @rule(name=NAMES, what=st.sampled_from(["start", "stop", "restart", "request"]))
    def by_hand(self, name: str, what: str) -> None:
        """Somebody, or a request."""
        self.run(lambda: self._by_hand(name, what))

    async def _by_hand(self, name: str, what: str) -> None:
        with contextlib.suppress(RequestError):
            getattr(self.reconciler.model(name), what)()
        await settle()

    @rule(seconds=st.sampled_from([0, 1, 5, 100]))
    def time_passes(self, seconds: float) -> None:
        """Engines become ready, or fail."""
        self.run(lambda: self._time(seconds))

    async def _time(self, seconds: float) -> None:
        for _ in range(10):
            for engine in self.stage.launcher.engines:
                if not engine.exited.done() and engine.spec is not None:
                    if engine.spec.model == "bad":
                        engine.die()
                    else:
                        engine.listens = True
            await passes(seconds / 10)  # the clock moves only once all that can happen has
        await settle()

    @invariant()
    def never_two_engines_of_one_instance(self) -> None:
        """Whatever is being replaced."""
        if hasattr(self, "stage"):
            living = Counter(
                engine.place.instance for engine in self.stage.launcher.engines if engine.reaped_at is None
            )
            assert max(living.values(), default=0) <= 1

    def teardown(self) -> None:
        """At rest running equals desired; after a stop nothing is left."""
        if hasattr(self, "stage"):
            try:
                self.run(self._rest)
            finally:
                self.logs.close()
                self.runner.close()
                self.folder.cleanup()

    async def _rest(self) -> None:
        text = self.file.read_text().replace("[models.b\n", "").replace('"bad"', '"good"')
        self.file.write_text(text + "\n# the end\n")
        await self.desired.reload()
        await self._time(100)  # what has died rests
        for model in self.reconciler.models():
            if model.stopped_by_hand or any(one.state is State.ERROR for one in model.instances):
                model.start()
        await self._until_nothing_moves()
        config = parse_config(self.file.read_bytes(), "")
        assert self.reconciler.config.revision == config.revision
        assert [model.spec.id for model in self.reconciler.models()] == list(config.models)
        assert self.reconciler.config.keys == config.keys
        for model in self.reconciler.models():
            self._check_at_rest(config.models[model.spec.id], model.state, [one.state for one in model.instances])
        await self.reconciler.stop()
        assert all(engine.reaped_at is not None for engine in self.stage.launcher.engines)

    async def _until_nothing_moves(self) -> None:
        """For longer than any timeout or backoff of these models lasts."""
        seen: list[object] = []
        while seen[-5:] != [self._moment()] * 5:
            assert len(seen) < 60, "it never comes to rest"
            seen.append(self._moment())
            await self._time(100)

    def _moment(self) -> object:
        engines = len(self.stage.launcher.engines)
        return engines, [[(one.state, one.phase) for one in model.instances] for model in self.reconciler.models()]

    def _check_at_rest(self, spec: ModelSpec, state: State, instances: list[State]) -> None:
        policy = spec.policy
        living = [
            engine
            for engine in self.stage.launcher.engines
            if engine.reaped_at is None and engine.place.instance.startswith(f"{spec.id}/")
        ]
        if not policy.enabled:
            assert (state, living) == (State.STOPPED, [])
        elif policy.start == "always" or state is not State.STOPPED:
            assert instances == [State.READY] * policy.replicas
            assert [engine.spec for engine in living] == [spec.engine] * policy.replicas
        else:
            assert living == []


TestFleet = Fleet.TestCase
TestFleet.settings = settings(
    max_examples=settings().max_examples // 4,  # each takes many events: `--hypothesis-profile thorough` for more
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class Disk:
    """Calls what it is given, but for the function that hangs until `answers`."""

    def __init__(self, hangs: str) -> None:
        self.hangs = hangs
        self.answers = asyncio.Event()
        self.asked = asyncio.Event()

    async def __call__[**P, T](self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """In place of a thread."""
        if function.__name__ == self.hangs:
            self.asked.set()
            await self.answers.wait()
        return function(*args, **kwargs)


async def following(folder: Path, disk: Disk, plans: Disk | None = None) -> Desired:
    """A file without models that is followed."""
    file = folder / "models.toml"
    file.write_text("# old\n")
    stage = Stage()
    reconciler = Reconciler(parse_config(b"# old\n", ""), stage.shared, StateDirectory(folder), lambda spec: spec.model)
    reconciler.start()
    return desired_of(Store(file), reconciler, disk, plans)


@virtual
async def test_a_write_that_hangs_is_told_so_and_holds_up_no_stop(tmp_path: Path) -> None:
    """Who waits for it learns that it may still happen, who waits behind it that nothing has; the end is bounded."""
    disk = Disk("write")
    desired = await following(tmp_path, disk)
    first = asyncio.ensure_future(desired.write(lambda _: b"# first\n", None, ME, blind=True))
    await disk.asked.wait()
    await passes(10)
    second = asyncio.ensure_future(desired.write(lambda _: b"# second\n", None, ME, blind=True))
    with pytest.raises(
        RequestError, match="has not answered for 30 s; the file is the old one or the new one"
    ) as error:
        await first
    assert error.value.code == "config_not_written"
    with pytest.raises(RequestError, match="nothing has changed"):
        await second
    began = now()
    assert await desired.close(2) is False
    assert now() == pytest.approx(began + 2)
    disk.answers.set()
    assert await desired.close(2) is True
    assert desired.file.read_bytes() == b"# first\n", (
        "what has begun comes to its end, what waited behind it never does"
    )
    assert desired.fingerprint == revision_of(b"# first\n")
    await desired.write(lambda _: b"# third\n", None, ME, blind=True)
    assert desired.fingerprint == revision_of(b"# third\n")


@virtual
async def test_a_read_that_hangs_is_a_rejection_until_the_disk_answers(tmp_path: Path) -> None:
    """It is seen everywhere a rejected file is; when the disk answers the file is followed without another change."""
    disk = Disk("_read_new")
    desired = await following(tmp_path, disk)
    told: list[object] = []
    desired.listen(told.append)
    desired.file.write_text("# new\n")
    with capture_logs(), pytest.raises(ConfigError) as error:
        await desired.reload()
    assert "its disk has not answered for 30 s" in error.value.lines()[0]
    assert desired.rejected is told[0]
    disk.answers.set()
    await settle()
    assert desired.rejected is None
    assert desired.fingerprint == revision_of(b"# new\n")


@virtual
async def test_who_only_reads_waits_no_longer_than_that_either(tmp_path: Path) -> None:
    """`GET /config`."""
    desired = await following(tmp_path, Disk("_read"))
    with pytest.raises(ConfigError, match="1 problem"):
        await desired.text()
    assert now() == pytest.approx(30)


@virtual
async def test_a_disk_that_hangs_while_it_is_waited_for_a_writer_is_a_rejection(tmp_path: Path) -> None:
    """After the time for each of both looks, of which the second is that of any reload."""
    desired = await following(tmp_path, Disk("_peek"))
    desired.file.write_text("# new\n")
    await desired.follow()
    assert now() == pytest.approx(30)
    assert desired.fingerprint == revision_of(b"# new\n")


@pytest.mark.parametrize("rubbish", ["", "# a part\n", "[models.b\n"])
def test_what_is_written_again_while_it_is_read_is_not_followed_before_that_has_ended(
    tmp_path: Path, rubbish: str
) -> None:
    """Though it had been quiet until then; neither adopted nor rejected is what was there in between."""

    class Writer(Disk):
        """Truncates the file just before it is read for the first time, and goes on a moment later."""

        async def __call__[**P, T](self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
            if function.__name__ == "_read_new" and not self.asked.is_set():
                self.asked.set()
                file.write_text(rubbish)
                asyncio.get_running_loop().call_later(0.02, file.write_text, "# whole\n")
            return function(*args, **kwargs)

    file = tmp_path / "models.toml"

    @virtual
    async def run() -> None:
        disk = Writer("")
        desired = await following(tmp_path, disk)
        told: list[object] = []
        desired.listen(told.append)
        desired.file.write_text("# first\n")
        assert (await desired.follow()).revision == revision_of(b"# whole\n")
        assert disk.asked.is_set()
        assert [getattr(one, "revision", one) for one in told] == [revision_of(b"# whole\n")]

    run()


@virtual
async def test_who_never_ends_writing_is_not_waited_for(tmp_path: Path) -> None:
    """What is there after a second is followed: a file that changes for ever must not hide every change."""

    class Writer(Disk):
        """Changes the file whenever somebody looks at it."""

        async def __call__[**P, T](self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
            if function.__name__ == "_peek":
                desired.file.write_text(desired.file.read_text() + "#\n")
            return function(*args, **kwargs)

    desired = await following(tmp_path, Writer(""))
    outcome = await desired.follow()
    assert outcome.revision == revision_of(desired.file.read_bytes())
    assert now() == pytest.approx(1.0, abs=0.1)


@virtual
async def test_plans_that_take_long_hold_up_no_write(tmp_path: Path) -> None:
    """Whoever may read can have them computed, and a revocation must not wait for that; they are told to come again."""
    computing = Disk("parse")
    desired = await following(tmp_path, Disk(""), plans=computing)
    planning = asyncio.ensure_future(desired.plan(b"# plan\n", trusted=False))
    await computing.asked.wait()
    await desired.write(lambda _: b"# written\n", None, ME, blind=True)
    assert desired.fingerprint == revision_of(b"# written\n")
    with pytest.raises(RequestError) as refused:
        await planning
    assert (refused.value.code, refused.value.retry_after) == ("overloaded", 10)


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_a_write_is_tried_again_where_an_editor_saves_meanwhile(tmp_path: Path, saves: int) -> None:
    """Of what is there by then; who saves again and again is told, and nothing of his is lost."""
    file, left = tmp_path / "models.toml", saves

    class Editor(Disk):
        """Saves the file just before it would be written."""

        async def __call__[**P, T](self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
            nonlocal left
            if function.__name__ == "write" and left:
                left -= 1
                file.write_text(file.read_text() + "# saved\n")
            return function(*args, **kwargs)

    @virtual
    async def run() -> None:
        desired = await following(tmp_path, Editor(""))
        writing = desired.write(lambda data: data + b"# written\n", None, ME)
        if saves < 3:
            await writing
        else:
            with pytest.raises(RequestError, match="another program has just done so"):
                await writing

    run()
    assert file.read_text() == "# old\n" + "# saved\n" * saves + "# written\n" * (saves < 3)


@virtual
async def test_a_listener_that_fails_keeps_no_other_from_being_told(tmp_path: Path) -> None:
    """Of the file, and of a model; what was adopted is adopted."""
    desired = await following(tmp_path, Disk(""))
    told: list[str] = []

    def broken(_: object) -> None:
        raise ValueError("a bug")

    desired.listen(broken)
    desired.listen(lambda _: told.append("file"))
    desired.reconciler.listen(broken)
    desired.reconciler.listen(lambda model: told.append(model.state))
    with capture_logs() as logs:
        await desired.write(lambda _: b'[models.a]\nmodel = "m"\n', None, ME, blind=True)
        await settle()
    assert set(told) == {"file", State.LOADING}
    assert {entry["event"] for entry in logs if entry["log_level"] == "error"} == {"a listener failed"}
    assert "a" in desired.reconciler.specs()
    await desired.reconciler.stop()
