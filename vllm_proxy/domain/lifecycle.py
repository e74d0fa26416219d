"""The state machine of one instance: states, events, transitions, and the backoff before a restart.

States change only by this table. A pair that is not in it is a bug and raises; a late event of an earlier engine is
ignored. The diagram in ARCHITECTURE.md is generated from it (tests/test_house.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """What an instance, and a model, is. The values are those of the REST API."""

    STOPPED = "stopped"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    SLEEPING = "sleeping"  # its engine lives and has given its memory back
    ERROR = "error"


class Event(StrEnum):
    """What can happen to an instance."""

    START = "start"  # somebody wants it to run
    LISTENING = "listening"  # the engine proved that it serves this instance's own name
    DIED = "died"  # any exit nobody asked for, whatever its code
    STALLED = "stalled"  # it lives, but nothing moves
    GAVE_UP = "gave up"  # too many failures in a row, or one that no retry can mend
    STOP = "stop"  # somebody wants it gone
    SLEPT = "slept"  # it gave its memory back, which was verified
    RESUMED = "resumed"  # it was to give way, and nobody waits for its room any more
    GONE = "gone"  # the last process of the engine was reaped


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.STOPPED, Event.START): State.LOADING,
    (State.LOADING, Event.LISTENING): State.READY,
    (State.LOADING, Event.DIED): State.LOADING,  # waits in phase "backoff"
    (State.LOADING, Event.GAVE_UP): State.ERROR,
    (State.LOADING, Event.STOP): State.UNLOADING,
    (State.LOADING, Event.SLEPT): State.SLEEPING,  # it waited for room to wake, and nobody waits for it any more
    (State.READY, Event.DIED): State.LOADING,
    (State.READY, Event.STALLED): State.LOADING,
    (State.READY, Event.STOP): State.UNLOADING,
    (State.ERROR, Event.START): State.LOADING,
    (State.ERROR, Event.STOP): State.UNLOADING,
    (State.UNLOADING, Event.GONE): State.STOPPED,
    (State.UNLOADING, Event.SLEPT): State.SLEEPING,
    (State.UNLOADING, Event.STOP): State.UNLOADING,  # what was to sleep is to end
    (State.SLEEPING, Event.START): State.LOADING,
    (State.SLEEPING, Event.STOP): State.UNLOADING,
    (State.SLEEPING, Event.DIED): State.STOPPED,  # nobody waits for it
    (State.UNLOADING, Event.RESUMED): State.READY,
}


_ENDS_AN_ENGINE = frozenset({Event.DIED, Event.STALLED, Event.GONE})


@dataclass(frozen=True, slots=True)
class Life:
    """Where an instance is. `generation` counts its engines: it grows when one is over."""

    state: State = State.STOPPED
    generation: int = 0

    def after(self, event: Event, generation: int) -> "Life":
        """What follows an event that concerns the engine of this generation; a late one changes nothing."""
        assert generation <= self.generation, "an event of an engine that is still to come"
        if generation < self.generation:
            return self
        return Life(after(self.state, event), self.generation + (event in _ENDS_AN_ENGINE))


class Phase(StrEnum):
    """How far an instance is within its state."""

    QUEUED = "queued"  # waits for room on its devices, for an engine that could not be ended, or for a port
    IMPORTING = "importing"  # Python, PyTorch, vLLM
    DOWNLOADING = "downloading"
    LOADING_WEIGHTS = "loading_weights"
    PROFILING = "profiling"  # how much memory is left for the KV cache
    COMPILING = "compiling"
    CAPTURING_GRAPHS = "capturing_graphs"
    STARTING_SERVER = "starting_server"
    SERVING = "serving"
    DRAINING = "draining"
    FALLING_ASLEEP = "falling_asleep"
    SLEEPING = "sleeping"
    WAKING = "waking"
    STOPPING = "stopping"
    BACKOFF = "backoff"


class Reason(StrEnum):
    """Why an instance is not ready; stable codes, each shown with a sentence."""

    INVALID_ARGUMENTS = "invalid_arguments"
    COMMAND_NOT_FOUND = "command_not_found"
    MODEL_UNAVAILABLE = "model_unavailable"
    SECRET_UNAVAILABLE = "secret_unavailable"  # noqa: S105 - what `env` refers to cannot be read
    OUT_OF_MEMORY = "out_of_memory"
    INSUFFICIENT_MEMORY = "insufficient_memory"  # less is free than the share that was asked for
    PORT_IN_USE = "port_in_use"
    STARTUP_TIMEOUT = "startup_timeout"
    CRASHED = "crashed"
    STALLED = "stalled"
    KILLED = "killed"
    NOT_ENDED = "not_ended"  # an engine lives that was to be ended: this one's, or one in whose place it is to start
    DOES_NOT_FIT = "does_not_fit"  # its devices cannot have what it needs, or other programs hold that
    GAVE_WAY = "gave_way"  # another model waited for its room
    WAKE_FAILED = "wake_failed"  # it slept, and was started anew in place of being woken
    SLEEP_FAILED = "sleep_failed"  # it was to sleep, and was ended instead
    REPLACEMENT_FAILED = "replacement_failed"
    STOPPED_BY_HAND = "stopped_by_hand"


# What no retry can mend before somebody changes the spec.
FINAL = frozenset({Reason.INVALID_ARGUMENTS, Reason.COMMAND_NOT_FOUND, Reason.DOES_NOT_FIT})


def after(state: State, event: Event) -> State:
    """The state that follows."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        msg = f"no transition from {state} on {event}"
        raise AssertionError(msg) from None


def best(states: Iterable[State]) -> State:
    """A model is as good as its best instance."""
    order = (State.READY, State.LOADING, State.SLEEPING, State.UNLOADING, State.ERROR, State.STOPPED)
    return min(states, key=order.index, default=State.STOPPED)


def backoff_seconds(failures: int, first: float, longest: float, jitter: float) -> float:
    """The backoff before the next start after so many failures in a row.

    `jitter`, 0 to 1, takes off up to a quarter, so that engines that failed together do not all restart at once (a
    thundering herd).
    """
    doubled: float = first * 2.0 ** min(failures - 1, 32)
    return min(doubled, longest) * (1 - jitter / 4)


def diagram() -> str:
    """The table as a Mermaid diagram, for ARCHITECTURE.md."""
    rows = [f"    {start} --> {end}: {event}" for (start, event), end in TRANSITIONS.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {State.STOPPED}", *rows])
