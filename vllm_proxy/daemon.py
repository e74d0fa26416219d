"""The composition root: creates and connects all parts, handles signals, and shuts down gracefully.

Owns the order in which things are opened and closed. Graceful shutdown: stop accepting, drain the requests in flight
for at most `shutdown_timeout`, stop the engines, close the rest in reverse order. What a model or a request does is
decided elsewhere.
"""

import asyncio
import contextlib
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

import aiohttp
import structlog

from vllm_proxy import tls
from vllm_proxy.api import app
from vllm_proxy.domain.config import Config
from vllm_proxy.domain.file.parse import problems_at
from vllm_proxy.domain.listener import Kind
from vllm_proxy.engine import scratch
from vllm_proxy.engine.adapter_source import AdapterSources
from vllm_proxy.engine.adapter_store import AdapterStore
from vllm_proxy.engine.adapters import HttpAdapters
from vllm_proxy.engine.cgroup import Cgroups
from vllm_proxy.engine.check import OptionCheck
from vllm_proxy.engine.devices import Inventory
from vllm_proxy.engine.find import find_vllm, has_gpus
from vllm_proxy.engine.launch import Launcher
from vllm_proxy.engine.nap import HttpNap
from vllm_proxy.engine.options import OptionTables
from vllm_proxy.engine.ports import Ports
from vllm_proxy.engine.probe import HttpProbe
from vllm_proxy.engine.process import become_subreaper, reap_orphans
from vllm_proxy.engine.program import Programs
from vllm_proxy.engine.state import StateDirectory
from vllm_proxy.engine.variables import Variables
from vllm_proxy.errors import ConfigError, NotEndedError, StartupError
from vllm_proxy.fleet.adapter_use import AdapterUse
from vllm_proxy.fleet.changes import KeyFiles
from vllm_proxy.fleet.dependencies import Dependencies
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.loop import FleetLoop
from vllm_proxy.fleet.managed import Managed, host_total
from vllm_proxy.fleet.objections import Hardware
from vllm_proxy.fleet.old_logs import remove_old_logs
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.store import Store
from vllm_proxy.fleet.usage_ledger import UsageLedger, keeping_usage
from vllm_proxy.fleet.watch import watch
from vllm_proxy.listen import Listeners, accept_all, inherited, listen, listen_for_commands, notice_departed_clients
from vllm_proxy.logsetup import Output
from vllm_proxy.places import read_config_file
from vllm_proxy.runtime import clock, descriptors, threads
from vllm_proxy.runtime.background import keep_running, log_faults, run_once
from vllm_proxy.runtime.threads import Disk
from vllm_proxy.runtime.turns import LoopLag
from vllm_proxy.settings import Settings
from vllm_proxy.status import StatusLine, sentence
from vllm_proxy.systemd import Systemd, inherited_sockets, watchdog_seconds
from vllm_proxy.traffic import traces
from vllm_proxy.traffic.access import Access
from vllm_proxy.traffic.access_log import AccessLog
from vllm_proxy.traffic.front import FrontRunner
from vllm_proxy.traffic.keyring import Keyring
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.registry import Registry

log = structlog.get_logger()

_SWITCH_SECONDS = 0.001  # Python's default is 5 ms, and a request may wait for several
_FIRST_REQUEST_SECONDS = 1.0  # for connections that were accepted before a stop to send their request
_WRITE_SECONDS = 2.0  # for a write of the file that has begun: its disk may hang
_HANDLER_SECONDS = 2.0  # for handlers to end once the engines are gone


def read_config(settings: Settings) -> Config:
    """The configuration file, settings from outside applied, and the certificate that it names looked at.

    Raises:
        ConfigError: when it is missing, unreadable or invalid.

    """
    file = settings.config_file
    data = read_config_file(file)
    config = settings.parse(data, settings.files.lenient())
    try:
        tls.load(config.server, settings.files)
    except tls.PairError as error:
        found = [(("server", error.key), str(error))]
        raise ConfigError(str(file), problems_at(found, data.decode(), settings.overrides)) from None
    return config


async def serve(
    settings: Settings, config: Config, output: Output, on_listening: Callable[[Reconciler, str], None] | None = None
) -> None:
    """Run until SIGTERM or SIGINT. `on_listening` is called with the reconciler and the address once it listens.

    Raises:
        StartupError: when the port or the state directory is taken.
        NotEndedError: when engines live on that it could not end.

    """
    for warning in settings.warnings:
        log.warning("look at a setting", why=warning)
    if watchdog_seconds(os.environ) is not None:
        faulthandler.enable()  # systemd ends a hung daemon with SIGABRT: its stack says where it hangs
    open_files = descriptors.raise_limit()
    become_subreaper()
    log_faults(asyncio.get_running_loop())
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(clock.Pulse())
        state = stack.enter_context(StateDirectory(settings.state_dir, settings.scratch))
        await asyncio.to_thread(scratch.sweep, settings.scratch, settings.state_dir)
        stack.callback(keep_running(reap_orphans, "reaping of orphans").cancel)
        held = inherited(inherited_sockets(os.environ), config.server)
        if held:
            note = log.warning if {"host", "port", "listen"} & config.server.model_fields_set else log.info
            note("systemd holds the sockets: server.host, server.port and server.listen have no effect",
                 listens=[one.listener.url for one in held])  # fmt: skip
        clients = held or listen(config.server, settings.config_file.parent)
        for one in clients:
            stack.callback(one.close)
            notice_departed_clients(one.socket)
        listeners = Listeners(clients, listen_for_commands(settings.control_socket))
        stack.callback(listeners.commands.close)
        shared, launcher, managed = _dependencies(settings, config, state, listeners.ports(), stack,
                                        output=output, open_files=open_files)  # fmt: skip
        await shared.adapters.open()
        await launcher.variables.follow(config)
        await _follow_devices(managed, shared.loop, stack)
        reconciler = Reconciler(config, shared, state, launcher.fingerprint)
        stack.callback(keep_running(partial(remove_old_logs, reconciler, settings.state_dir), "old logs").cancel)
        keyring = Keyring(config)
        store = Store(settings.config_file)
        store.tidy()
        key_files = KeyFiles(store, settings.parse, settings.files, settings.keys_file)
        disk = stack.enter_context(contextlib.closing(Disk("the configuration's file")))
        plans = stack.enter_context(contextlib.closing(Disk("plans", 1)))
        desired = Desired(store, settings.parse, reconciler, launcher.check, launcher.ports,
                          files=settings.files, key_files=key_files, keyring=keyring, offload=disk, plans=plans,
                          hide_secrets=launcher.variables.follow,
                          hardware=_hardware(managed, shared.loop, state, launcher),
                          address_is_given=bool(held))  # fmt: skip
        _warn_of_access(keyring, config, listeners)
        certificate = _certificate(settings, reconciler, stack)
        ledger = await stack.enter_async_context(keeping_usage(settings.state_dir, _WRITE_SECONDS))
        await _run(desired, listeners, certificate, ledger, stack, output=output, on_listening=on_listening)
    if hanging := threads.running():
        log.warning("calls that have not come back are left behind; a disk does not answer", calls=hanging)
    if left := reconciler.not_ended():
        listed = "; ".join(f"cannot end {instance}: {why}" for instance, why in left.items())
        raise NotEndedError(f"{listed}. The next daemon tries again, and so does `vllm-proxy stop --all`")


def _warn_of_access(keyring: Keyring, config: Config, listeners: Listeners) -> None:
    """Say once what is open, or closed, to others than this machine."""
    for warning in config.warnings():
        log.warning(warning)
    if keyring.opens_nothing() and any(one.listener.kind is Kind.ELSEWHERE for one in listeners):
        log.warning(
            "nobody can use this address: there are no keys; `vllm-proxy keys new NAME` makes one, and"
            ' [keys.anonymous] with scopes = ["inference"] opens inference to whoever can connect'
        )


async def _run(
    desired: Desired,
    listeners: Listeners,
    certificate: tls.Certificate,
    ledger: UsageLedger,
    stack: contextlib.AsyncExitStack,
    *,
    output: Output,
    on_listening: Callable[[Reconciler, str], None] | None,
) -> None:
    reconciler = desired.reconciler
    engines = aiohttp.ClientSession(trust_env=False)
    stack.push_async_callback(engines.close)
    access = Access(lambda: reconciler.config.server, desired.keyring, listeners.addresses())
    systemd = Systemd()
    pinging = keep_running(systemd.ping_watchdog, "watchdog")
    stack.callback(pinging.cancel)
    stopping = _handle_stop_signals(reconciler)
    changed, asked = _handle_sighup()  # before READY=1, after which systemd may send SIGHUP
    status = StatusLine(lambda: sentence(reconciler, desired, certificate), systemd.status)
    stack.callback(status.close)
    reconciler.listen(status.changed)
    desired.listen(lambda _: status.show())  # before who wanted it is answered, and looks
    certificate.listen(status.changed)
    lag = LoopLag()
    watching = keep_running(lag.watch, "loop lag")
    stack.callback(watching.cancel)
    lines = AccessLog(output.writer, output.form) if output.requests else None
    metering = Metering(reconciler.registry, ledger.usage, ledger.spent)
    metering.adopt(reconciler.config)
    desired.keyring.listen(lambda: metering.adopt(desired.keyring.config))
    parts = app.Parts(reconciler, desired, reconciler.registry, engines, access, lines, lag, output.writer,
                      output.masking.mask, certificate, metering, ledger,
                      str(listeners.commands.listener.address).removeprefix("unix:"), _traces(stack))  # fmt: skip
    runner = app.build(parts, _HANDLER_SECONDS)
    following: asyncio.Task[None] | None = None
    for misfit in await desired.objections.standing():
        log.warning("a model can never run on this machine", model=misfit.model, key=misfit.key, why=misfit.message)
    reconciler.start()
    try:
        await runner.setup()
        await accept_all(listeners, lambda one: runner.accept(one.socket, one.listener, certificate.context), stack)
        _tune_python()
        status.show()
        systemd.ready()
        following = keep_running(
            partial(_follow_file, desired, certificate, systemd, changed, asked), "following the file"
        )
        urls = [one.listener.url for one in listeners.clients]
        log.info("listening", address=", ".join(urls), models=len(reconciler.config.models))
        if on_listening:
            on_listening(reconciler, urls[0])
        await stopping.wait()
    finally:
        await _stop(desired, runner, systemd, following)
        log.info("stopped")


def _traces(stack: contextlib.AsyncExitStack) -> traces.Traces | None:
    found = traces.from_environment(os.environ)
    if found is not None:
        stack.push_async_callback(found.close)
    return found


async def _stop(desired: Desired, runner: FrontRunner, systemd: Systemd, following: asyncio.Task[None] | None) -> None:
    reconciler = desired.reconciler
    systemd.stopping()
    systemd.status("stopping")
    log.info("stopping")
    extending = keep_running(partial(systemd.extend, reconciler.longest_stop()), "time to stop")
    try:
        if following is not None:
            following.cancel()
            await asyncio.wait({following})
        await desired.close(_WRITE_SECONDS)
        reconciler.registry.disable_keep_alive()
        await runner.drain(_FIRST_REQUEST_SECONDS)
    finally:  # whatever failed before, no engine is leaked
        await reconciler.stop()
        await runner.cleanup()
        if not await desired.close(_WRITE_SECONDS):
            log.error("a change of the file has not come to its end: its disk does not answer", file=str(desired.file))
        extending.cancel()


async def _follow_file(
    desired: Desired, certificate: tls.Certificate, systemd: Systemd, changed: asyncio.Event, asked: asyncio.Event
) -> None:
    """Reload when the file `changed`, or when SIGHUP `asked` for it, until cancelled."""
    look = partial(watch, desired.files, changed.set, lambda: desired.fingerprint, offload=desired.offload)
    watching = keep_running(look, "watch of the file")
    try:
        while True:
            await changed.wait()
            changed.clear()
            by_signal = asked.is_set()
            asked.clear()
            if by_signal:
                systemd.reloading()
            try:
                await (desired.reload() if by_signal else desired.follow())
            except ConfigError:
                pass  # logged by `desired`
            except Exception:  # later changes are followed all the same
                log.exception("the configuration could not be followed")
            if by_signal:
                await certificate.look()
                systemd.ready()
    finally:
        watching.cancel()
        await asyncio.wait({watching})


def _dependencies(
    settings: Settings,
    config: Config,
    state: StateDirectory,
    taken_ports: list[int],
    stack: contextlib.AsyncExitStack,
    *,
    output: Output,
    open_files: int,
) -> tuple[Dependencies, Launcher, Managed]:
    # No keep-alive for health checks: such a connection would outlive the engine's readiness.
    health_checks = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), trust_env=False)
    stack.push_async_callback(health_checks.close)
    env = settings.engine_environment
    programs = Programs(settings.config_file.parent, env, find_vllm(env))
    disk = Disk("vLLM's files")
    stack.callback(disk.close)
    check = OptionCheck(programs, OptionTables(settings.state_dir / "options", offload=disk), disk)
    stack.push_async_callback(check.close)
    check.prefetch(model.engine for model in config.models.values())
    variables = Variables(settings.files, output.masking, env, disk)
    stack.callback(variables.close)
    stopping = asyncio.Event()
    launcher = Launcher(
        programs=programs,
        check=check,
        variables=variables,
        scratch=settings.scratch,
        has_gpus=has_gpus(),
        ports=Ports(config.engine.port_start, config.engine.port_end, taken_ports),
        state=state,
        pass_on=output.pass_on,
        cgroups=Cgroups.find(),
        open_files=open_files,
        stopping=stopping,
    )
    inventory = Inventory(config.devices.source, settings.config_file.parent, env, launcher.owned)
    stack.callback(inventory.close)
    managed = Managed(inventory, config.devices, check.default_share, host_total())
    store = AdapterStore(settings.state_dir / "adapters", AdapterSources(programs, variables, disk), disk)
    shared = Dependencies(launcher, FleetLoop(managed), Registry(), HttpProbe(health_checks),
                          HttpNap(health_checks), AdapterUse(HttpAdapters(health_checks), store), asyncio.Event(),
                          stopping, mask=output.masking.mask)  # fmt: skip
    return shared, launcher, managed


def _hardware(managed: Managed, loop: FleetLoop, state: StateDirectory, launcher: Launcher) -> Hardware:
    return Hardware(managed.look, loop.room.place_of, lambda spec: state.memory(launcher.fingerprint(spec)))


async def _follow_devices(managed: Managed, loop: FleetLoop, stack: contextlib.AsyncExitStack) -> None:
    """Know them before anything starts, and follow them."""
    await managed.inventory.look()
    following = keep_running(partial(managed.follow, loop.room.is_asked, loop.room.look), "watch of the devices")
    stack.callback(following.cancel)


def _certificate(settings: Settings, reconciler: Reconciler, stack: contextlib.AsyncExitStack) -> tls.Certificate:
    """What clients are shown, followed on disk."""
    try:
        pair = tls.load(reconciler.config.server, settings.files)
    except tls.PairError as error:  # since `read_config` has looked
        raise StartupError(str(error)) from None
    disk = Disk("the certificate's files")
    stack.callback(disk.close)
    certificate = tls.Certificate(pair, lambda: reconciler.config.server, settings.files, disk)
    following = keep_running(certificate.follow, "watch of the certificate")
    stack.callback(following.cancel)
    return certificate


def _handle_stop_signals(reconciler: Reconciler) -> asyncio.Event:
    """Set on the first SIGTERM or SIGINT; a second one skips the wait for requests."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            log.warning("a second signal: not waiting for requests any more")
            reconciler.skip_drain()
        stopping.set()
        run_once(in_time, "end of the wait for requests")

    async def in_time() -> None:
        await clock.sleep(reconciler.config.server.shutdown_timeout)
        reconciler.skip_drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopping


def _handle_sighup() -> tuple[asyncio.Event, asyncio.Event]:
    """Both are set on SIGHUP: the file may have changed, and the result of a reload is awaited."""
    changed, asked = asyncio.Event(), asyncio.Event()

    def hang_up() -> None:
        asked.set()
        changed.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
    return changed, asked


def _tune_python() -> None:
    """Freeze what the garbage collector need not scan again, and collect rarely: a request makes few cycles.

    A shorter switch interval lets requests run while a thread parses a configuration.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.set_threshold(20_000, 20, 50)
