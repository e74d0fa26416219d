"""A summary of the fleet in one sentence, for `systemctl status` and the demo.

Its length is bounded however large the fleet is, since systemd drops long messages. Updates are debounced to four a
second, but for the outcome of a reload or a write, which is shown at once. It shows no value of the configuration:
every user of the machine can read it.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence

from vllm_proxy.domain.lifecycle import Phase, State
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.tls import Certificate

_NAMED = 5  # models of each state
_LONGEST = 1500  # characters: systemd drops a message of more than 4,096 bytes
_LONGEST_PROBLEM = 300
_BETWEEN_SECONDS = 0.25
_ORDER = (State.LOADING, State.UNLOADING, State.ERROR, State.STOPPED)


class StatusLine:
    """Passes the sentence to `show` after changes, debounced: at most four times a second.

    `show`: whether it is shown now; else it is tried again.
    """

    def __init__(self, sentence: Callable[[], str], show: Callable[[str], bool]) -> None:
        self._sentence = sentence
        self._show = show
        self._loop = asyncio.get_running_loop()
        self._shown_at = self._loop.time() - _BETWEEN_SECONDS
        self._timer: asyncio.TimerHandle | None = None

    def changed(self, _: object = None) -> None:
        """Show the sentence soon."""
        if self._timer is None:
            self._timer = self._loop.call_at(self._shown_at + _BETWEEN_SECONDS, self.show)

    def show(self) -> None:
        """Show the sentence now."""
        self.close()
        self._shown_at = self._loop.time()
        if not self._show(self._sentence()):
            self.changed()

    def close(self) -> None:
        """Cancel an update that is pending."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def sentence(reconciler: Reconciler, desired: Desired | None = None, certificate: Certificate | None = None) -> str:
    """The fleet in one sentence: "2 of 3 models ready; loading: chat; error: old; on demand: spare".

    Counted are models that are wanted, and others while they are ready.
    """
    ready, missing, on_demand, sleeping = 0, 0, list[Model](), list[Model]()
    by_state = defaultdict[State, list[Model]](list)
    for model in reconciler.models():
        if not model.spec.policy.enabled:
            continue
        state = model.state
        missing += model.is_wanted and state is not State.READY
        if state is State.READY:
            ready += 1
        elif state is State.SLEEPING:
            sleeping.append(model)
        elif state is not State.STOPPED or model.stopped_by_hand:
            by_state[state].append(model)
        elif model.awaits_request:
            on_demand.append(model)
        else:  # between two engines: it starts soon, unless the daemon ends
            by_state[State.STOPPED if reconciler.stopping.is_set() else State.LOADING].append(model)
    text = f"{ready} of {ready + missing} models ready"
    for state in _ORDER:
        if state in by_state:
            text += f"; {state}: {_named(by_state[state])}"
    text += f"; sleeping: {_named(sleeping)}" if sleeping else ""
    text += f"; on demand: {_named(on_demand)}" if on_demand else ""
    if left := list(reconciler.not_ended()):
        text += f"; not ended: {_listed(left)}"
    problems = _problems(reconciler, desired, certificate)
    return _cut(text, _LONGEST - len(problems)) + problems


def _problems(reconciler: Reconciler, desired: Desired | None, certificate: Certificate | None) -> str:
    """What concerns no single model."""
    text = ""
    if devices := reconciler.room.machines.problem:
        text += f"; devices: {_cut(devices, _LONGEST_PROBLEM)}"
    if desired is not None and desired.rejected is not None:
        first = desired.rejected.places()[0]  # not what stands there: every user of this machine may read it
        text += f"; configuration rejected: {_cut(first, _LONGEST_PROBLEM)}"
    return text + ("" if certificate is None else _certificate(certificate))


def _certificate(certificate: Certificate) -> str:
    return f"; certificate rejected: {_cut(certificate.error, _LONGEST_PROBLEM)}" if certificate.error else ""


def _named(models: Sequence[Model]) -> str:
    """The first ones, and how many more there are."""
    shown = [_with_progress(model) for model in models[:_NAMED]]
    return _listed([*shown, *(model.spec.id for model in models[_NAMED:])])


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _with_progress(model: Model) -> str:
    """The id, and for a model that loads its phase, how much of that is done, and how long it may take.

    Also for one that falls asleep: its engine is not being ended.
    """
    if any(one.phase is Phase.FALLING_ASLEEP for one in model.instances) and model.state is State.UNLOADING:
        return f"{model.spec.id} ({Phase.FALLING_ASLEEP})"
    loading = next((one for one in model.instances if one.state is State.LOADING), None)
    if model.state is not State.LOADING or loading is None or loading.phase is None:
        return model.spec.id
    facts = loading.phase.value
    if loading.waiting_because is not None:
        facts += f": {_cut(loading.waiting_because, _LONGEST_PROBLEM)}"
    if loading.fraction is not None:
        facts += f" {loading.fraction:.0%}"
    if left := round(loading.seconds_left() or 0):
        facts += f", about {left} s left"
    return f"{model.spec.id} ({facts})"
