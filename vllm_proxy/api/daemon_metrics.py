"""The series of the daemon itself, a part of `/metrics`: its configuration, its event loop, its log, its process.

All are few, and made anew for each scrape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from vllm_proxy import __version__
from vllm_proxy.api.by_model import Lines
from vllm_proxy.domain.exposition import Family
from vllm_proxy.domain.histogram import Histogram
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.runtime.own_process import OwnProcess
from vllm_proxy.runtime.turns import LoopLag

CONNECTIONS = Family("vllm_proxy_connections", "gauge", "Connections of clients.")
BUFFERED = Family(
    "vllm_proxy_buffered_bytes", "gauge", "Bytes of request bodies that are held, in TMPDIR too."
)  # fmt: skip
OVERHEAD = Family(
    "vllm_proxy_overhead_seconds", "histogram", "Time in the daemon itself before the engine was sent the request."
)
INFO = Family("vllm_proxy_config_info", "gauge", "The configuration that is applied.", ("revision",))
RELOADS = Family("vllm_proxy_config_reloads_total", "counter", "Looks at the file, by result.", ("result",))
REJECTED = Family("vllm_proxy_config_rejected", "gauge", "1 where the file on disk is refused now, and not applied.")
PENDING = Family(
    "vllm_proxy_config_pending_restart", "gauge", "Keys of the file whose change waits for a restart of the daemon."
)
LEFT = Family("vllm_proxy_engines_not_ended", "gauge", "Engines that live and could not be ended.")
LAG = Family(
    "vllm_proxy_loop_lag_seconds", "histogram", "How late the event loop was, looked at ten times a second."
)  # fmt: skip
MOST_LAG = Family(
    "vllm_proxy_loop_lag_max_seconds", "gauge", "The latest that the event loop was in the last one to two minutes."
)
DROPPED = Family(
    "vllm_proxy_log_lines_dropped_total",
    "counter",
    "Lines of the daemon's log that nobody read, or that could not be written.",
)
TASKS = Family("vllm_proxy_tasks", "gauge", "Tasks of the event loop: about one for each open connection.")
BUILD = Family(
    "vllm_proxy_build_info",
    "gauge",
    "The daemon's version, and those of vLLM that its models run; empty where that is not known.",
    ("version", "vllm"),
)
CPU = Family("process_cpu_seconds_total", "counter", "Processor time of the daemon, without its engines.")
VIRTUAL = Family("process_virtual_memory_bytes", "gauge", "Virtual memory of the daemon.")
RESIDENT = Family("process_resident_memory_bytes", "gauge", "Resident memory of the daemon.")
STARTED = Family("process_start_time_seconds", "gauge", "When the daemon started, in seconds since the epoch.")
FILES = Family("process_open_fds", "gauge", "Open file descriptors of the daemon.")
MOST_FILES = Family("process_max_fds", "gauge", "The most file descriptors that the daemon may open.")
FAMILIES = (
    *(CONNECTIONS, BUFFERED, OVERHEAD, INFO, RELOADS, REJECTED, PENDING, LEFT, LAG, MOST_LAG, DROPPED, TASKS, BUILD),
    *(CPU, VIRTUAL, RESIDENT, STARTED, FILES, MOST_FILES),
)


class File(Protocol):
    """The configuration's file, as `fleet/desired.py` follows it."""

    @property
    def reloads(self) -> Mapping[str, int]:
        """Looks at it, by result."""

    @property
    def rejected(self) -> Exception | None:
        """Why it is not what runs."""

    @property
    def vllm(self) -> str:
        """The versions of vLLM that its models run."""

    def pending_restart(self) -> list[str]:
        """Keys whose change waits for a restart."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """Of what the daemon's own series are made."""

    file: File
    lag: LoopLag
    log: LogWriter
    overhead: Histogram


def lines(daemon: Daemon, revision: str, *, not_ended: int) -> Lines:
    """But those of clients and of the process."""
    file, lag = daemon.file, daemon.lag
    yield OVERHEAD, OVERHEAD.lines(daemon.overhead)
    yield INFO, INFO.line(1, revision)
    for result in ("accepted", "rejected", "unchanged"):
        yield RELOADS, RELOADS.line(file.reloads.get(result, 0), result)
    yield REJECTED, REJECTED.line(file.rejected is not None)
    yield PENDING, PENDING.line(len(file.pending_restart()))
    yield LEFT, LEFT.line(not_ended)
    yield LAG, LAG.lines(lag.seconds)
    yield MOST_LAG, MOST_LAG.line(lag.most())
    yield DROPPED, DROPPED.line(daemon.log.dropped)
    yield BUILD, BUILD.line(1, __version__, file.vllm)


def of_clients(connections: int, buffered: int, tasks: int) -> Lines:
    """What they have of the daemon now."""
    yield CONNECTIONS, CONNECTIONS.line(connections)
    yield BUFFERED, BUFFERED.line(buffered)
    yield TASKS, TASKS.line(tasks)


def of_process(process: OwnProcess) -> Lines:
    """With the names that Prometheus' own client libraries give them."""
    yield CPU, CPU.line(process.cpu_seconds)
    yield VIRTUAL, VIRTUAL.line(process.virtual_bytes)
    yield RESIDENT, RESIDENT.line(process.resident_bytes)
    yield STARTED, STARTED.line(process.started_at)
    yield FILES, FILES.line(process.open_files)
    yield MOST_FILES, MOST_FILES.line(process.most_files)
