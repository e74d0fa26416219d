"""What the server knows of its engine: whether it works, and what it counts. And the requests that change that.

A frozen engine is one whose core is stopped, whoever stopped it: no token comes, no counter moves, `/health` is 200.
"""

import argparse
import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import fake_core  # type: ignore[import-not-found] # beside this script
import fake_log  # type: ignore[import-not-found] # as above
import fake_metrics  # type: ignore[import-not-found] # as above

COMMANDS = {
    "freeze": "stop the core: nothing goes on, nothing is counted, new requests hang",
    "busy": "requests hang without a byte, but counters move with each look at them",
    "thaw": "neither of these any more",
    "sick": "/health answers 503",
    "well": "/health answers 200",
    "lose-core": "kill the core, as the kernel would; the server notices by itself",
    "die": "the core is dead and the server ends at once, exit code 0",
}
FATAL = {"lose-core", "die"}


class Request:
    """One request that is in the engine."""

    def __init__(self) -> None:
        self.task = asyncio.current_task()
        self.runs = False  # the scheduler has taken it; else it waits there
        self.ended = False  # by the engine, before its answer was whole


class Engine:
    """The engine."""

    def __init__(self, options: argparse.Namespace, core: fake_core.Core, log: fake_log.Log) -> None:
        self.options = options
        self.core = core
        self.log = log
        self.running = asyncio.Event()  # not: it is frozen
        self.answering = asyncio.Event()  # not: it is busy
        self.admitting = asyncio.Event()  # not: the scheduler is paused, and new requests wait there
        self.stepping = asyncio.Event()  # not: those that ran are frozen as well
        self.drained = asyncio.Event()  # none runs
        for event in (self.running, self.answering, self.admitting, self.stepping, self.drained):
            event.set()
        self.sick = options.fake_unhealthy
        self.over = False
        self.listens_at = 0.0
        self.requests: set[Request] = set()
        self.shown_requests = 0  # as of the last step
        self.prompt_tokens = self.generated_tokens = self.steps = 0
        self._exposition: fake_metrics.Exposition | None = None  # made when somebody asks

    def core_changed(self) -> None:
        """The kernel says that something has become of the core."""
        for change in self.core.changes():
            if change == "died":
                self.dead()
            elif change == "stopped":
                self.running.clear()
            elif not self.over:
                self.running.set()

    def dead(self) -> None:
        """End as vLLM does when its core is dead: exit code 0."""
        self.log.core_died()
        self.core.tidy()
        os._exit(0)

    def stop(self) -> None:
        """SIGTERM: the core ends. Without a time to drain, streams freeze."""
        if not self.options.shutdown_timeout:
            self.over = True
            self.running.clear()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
        self.core.end()

    @contextmanager
    def request(self) -> Iterator[Request]:
        """One request, while it is in the engine."""
        request = Request()
        self.requests.add(request)
        try:
            yield request
        finally:
            self.requests.discard(request)
            self._look_who_runs()
            if self.running.is_set():
                self.shown_requests = len(self.requests)

    async def turn(self, prompt: int = 0, generated: int = 0, *, first: bool = False) -> None:
        """One step of a request, once the engine works; tokens are counted. `first`: it is new to the scheduler."""
        gates = (self.running, self.answering, self.admitting if first else self.stepping)
        while not all(gate.is_set() for gate in gates):
            for gate in gates:
                await gate.wait()
        self.count(prompt, generated)

    async def admit(self, request: Request) -> None:
        """The first step of a request."""
        await self.turn(prompt=1, first=True)
        request.runs = True
        self._look_who_runs()

    @property
    def paused(self) -> bool:
        """Whether the scheduler is."""
        return not self.admitting.is_set()

    def pause(self, *, everybody: bool) -> None:
        """Pause the scheduler for new requests, or for `everybody`."""
        self.admitting.clear()
        if everybody:
            self.stepping.clear()
        else:
            self.stepping.set()

    def resume(self) -> None:
        """Schedule everybody again."""
        self.admitting.set()
        self.stepping.set()

    def abort(self) -> None:
        """End all requests, those that wait included: each answer ends there, for the reason "abort"."""
        for request in self.requests:
            request.runs, request.ended = False, True
            if request.task is not None:
                request.task.cancel()
        self._look_who_runs()

    def _look_who_runs(self) -> None:
        if any(request.runs for request in self.requests):
            self.drained.clear()
        else:
            self.drained.set()

    def count(self, prompt: int, generated: int) -> None:
        """The tokens of one step."""
        self.prompt_tokens += prompt
        self.generated_tokens += generated
        self.steps += 1
        self.shown_requests = len(self.requests)

    def control(self, command: str) -> None:
        """Do one of COMMANDS."""
        if command == "freeze":
            self.running.clear()  # the kernel's word comes later
            self.core.signal(signal.SIGSTOP)
        elif command == "busy":
            self.answering.clear()
        elif command == "thaw":
            self.core.signal(signal.SIGCONT)
            self.running.set()
            self.answering.set()
        elif command in {"sick", "well"}:
            self.sick = command == "sick"
        elif command == "lose-core":
            self.core.signal(signal.SIGKILL)
        elif command == "die":
            self.core.signal(signal.SIGKILL)
            self.core.wait()
            self.dead()

    def state(self) -> dict[str, object]:
        """Its processes, its shared memory, whether its core stands still; when it was started, and listened."""
        core = self.core
        return {
            "pid": os.getpid(),
            "core": core.pid,
            "workers": core.workers,
            "segment": core.segment or None,
            "frozen": not self.running.is_set(),
            "born_at": float(os.environ.get("FAKE_BORN_AT", "0")),  # as whoever started it says
            "listens_at": self.listens_at,
        }

    def metrics(self) -> str:
        """The counters, as Prometheus reads them. A frozen engine's stand still, a busy one's move."""
        if self._exposition is None:
            of_vllm = not self.options.fake_no_metrics
            self._exposition = fake_metrics.Exposition(self.options.served_model_name[0], of_vllm=of_vllm)
        if self.running.is_set() and not self.answering.is_set():
            self.count(1, 1)
        steps = ("iteration_tokens_total_bucket", "iteration_tokens_total_count")  # each has a token
        text: str = self._exposition.text({
            "num_requests_running": self.shown_requests,
            "kv_cache_usage_perc": min(1.0, self.shown_requests / 100),
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.generated_tokens,
            **dict.fromkeys(steps, self.steps),
            "iteration_tokens_total_sum": self.prompt_tokens + self.generated_tokens,
        })  # fmt: skip
        return text
