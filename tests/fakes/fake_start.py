"""How the fake starts: phase by phase, each with its lines and its faults. Until it listens it imports little."""

import argparse
import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import NoReturn

import fake_core  # type: ignore[import-not-found] # beside this script
import fake_ledger  # type: ignore[import-not-found] # as above
import fake_log  # type: ignore[import-not-found] # as above
import fake_options  # type: ignore[import-not-found] # as above

_DEFAULT_TEXT = "RuntimeError: Engine core initialization failed."


class Start:
    """One start."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.log = fake_log.Log(options)
        self.core: fake_core.Core | None = None
        self.memory: fake_ledger.Memory | None = None  # None: it uses no device

    def reach(self, phase: str) -> None:
        """Go through a phase."""
        self.log.opening(phase)
        self.faults(phase)
        self.remember(phase)
        self.log.closing(phase)

    def remember(self, phase: str) -> None:
        """Take the memory of a phase."""
        memory, options = self.memory, self.options
        if memory is None:
            return
        with_cache = options.fake_hold is None
        if phase == "load":
            self.or_fail(lambda: memory.start(profiles=with_cache))
        elif phase == "weights":
            self.or_fail(lambda: memory.load(options.fake_weights if with_cache else options.fake_hold))
        elif phase == "compile" and with_cache:
            self.or_fail(memory.allocate)
            self.log.values["kv"] = fake_ledger.gib(memory.kv)

    def faults(self, phase: str) -> None:
        """What was asked for in a phase: to wait, to hang, to end."""
        options = self.options
        if phase == "load":
            if options.fake_garbage_log:
                fake_log.garbage()
            for name in options.fake_tell:
                text = f"ValueError: {name} is {os.environ.get(name)}, in JSON {json.dumps(os.environ.get(name))}\n"
                fake_log.write(fake_log.ERR, text.encode())
            time.sleep(options.fake_load_seconds)
            if options.fake_load_until:
                self.until(options.fake_load_until)
        for where, file in options.fake_phase_until:
            if where == phase:
                self.until(file)
        if options.fake_hang_at == phase:
            self.hang()
        if options.fake_exit_at == phase:
            self.fail()

    def until(self, file: str) -> None:
        """Wait for a file, unless the core dies."""
        while not os.path.exists(file):  # noqa: PTH110 - imports nothing
            if self.core is not None and "died" in self.core.changes():
                self.core_failed()
            time.sleep(0.01)

    def hang(self) -> NoReturn:
        """For ever. The death of the core ends a start, as it does in vLLM, which watches it."""
        if self.core is not None:
            self.core.wait()
            self.core_failed()
        while True:
            signal.pause()

    def core_failed(self) -> NoReturn:
        """The core is dead before the server listens."""
        assert self.core is not None
        self.log.core_failed(self.core.code)
        self.core.end()
        os._exit(1)

    def or_fail(self, take: Callable[[], None]) -> None:
        """Take memory; where the devices refuse, that is the end of the core, and then of the server."""
        assert self.core is not None
        try:
            take()
        except fake_ledger.RefusedError as error:
            self.log.core_refused(str(error))
            self.core.end()
            os._exit(1)

    def fail(self) -> NoReturn:
        """End as a failed start does, or all of a sudden by a signal, which leaves the core alone."""
        number, text = self.options.fake_exit_signal, self.options.fake_exit_text
        if text or not number:
            fake_log.write(fake_log.ERR, f"{text or _DEFAULT_TEXT}\n".encode())
        if number:
            die_by(number)
        if self.core is not None:
            self.core.end()
        os._exit(self.options.fake_exit_code)


def die_by(number: int) -> NoReturn:
    """End by a signal, without a core file."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    while True:
        signal.pause()


def bind(options: argparse.Namespace) -> socket.socket:
    """Take the port, or the file. A taken one is an OSError that nobody catches: a traceback and exit code 1."""
    family = socket.AF_UNIX if options.uds else socket.AF_INET
    address = options.uds or (options.host or "0.0.0.0", options.port)
    thief = socket.socket(family)
    if options.fake_steal_port:
        thief.bind(address)
        thief.listen()
    listener = socket.socket(family)
    if family == socket.AF_INET:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as uvloop, under the real one
    listener.bind(address)
    thief.close()
    return listener


def has_devices(options: argparse.Namespace) -> bool:
    """Whether it computes on devices; else it does on the CPU."""
    return options.fake_ledger is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def memory_of(options: argparse.Namespace, core: fake_core.Core) -> fake_ledger.Memory | None:
    """The memory of the devices that it may use."""
    if not has_devices(options):
        return None
    world = math.prod(getattr(options, name.replace("-", "_")) for name in fake_options.WORLD)
    return fake_ledger.Memory(
        options.fake_ledger, options.served_model_name[0], core.workers or [core.pid], world,
        share=options.gpu_memory_utilization, context=options.fake_context, delay=options.fake_release_delay,
        residue=options.fake_residue if options.enable_sleep_mode else None,
    )  # fmt: skip


def main() -> None:
    """Import, bind, load, listen, serve."""
    options = fake_options.parse()
    if options.fake_ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start = Start(options)
    start.reach("import")
    listener = bind(options)
    start.reach("bind")
    if options.enable_sleep_mode and not has_devices(options):
        start.log.cannot_sleep()
        os._exit(1)
    start.core = fake_core.Core(options, listener)
    start.log.core = start.core.pid
    start.memory = memory_of(options, start.core)
    for phase in ("load", "weights", "profile", "compile", "capture"):
        start.reach(phase)
    import fake_server  # type: ignore[import-not-found] # the first that needs asyncio

    fake_server.run(start, listener)
