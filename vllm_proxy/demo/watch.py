"""Progress of the demo on the terminal: the state of the fleet at each change, then a command to try.

Only observes the reconciler; nothing is started or stopped here.
"""

import asyncio
import contextlib
import sys
import time
from pathlib import Path

from vllm_proxy.domain.lifecycle import State
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.status import sentence

_SHOWN = {"chat", "embed"}  # the models that the commands to try are for
_STILL_SECONDS = 30.0


def watch(reconciler: Reconciler, address: str, file: Path, place: str = "") -> None:
    """Print the fleet's state at each change, and once what to try, when both models are ready.

    `file`: the demo's models.toml; `place`: what commands need to find this daemon.
    """
    start = time.monotonic()
    said, invited = "", False
    loop = asyncio.get_running_loop()

    def say() -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {said}", file=sys.stderr, flush=True)

    def changed(_model: Model | None = None) -> None:
        nonlocal said, invited
        now = sentence(reconciler)
        if now == said:
            return
        said = now
        say()
        ready = {model.spec.id for model in reconciler.models() if model.state is State.READY}
        if not invited and ready >= _SHOWN:
            invited = True
            with contextlib.suppress(OSError):  # the daemon serves all the same
                print(_invitation(address, file, place, needs_key=bool(reconciler.config.keys)), flush=True)

    def still() -> None:
        """Say that nothing has changed, for who watches a terminal for minutes."""
        if not invited and not reconciler.stopping.is_set():
            say()
            loop.call_later(_STILL_SECONDS, still)

    print("Starting vLLM twice; on two cores this takes one to four minutes. Ctrl-C stops everything.", file=sys.stderr)
    reconciler.listen(changed)
    changed()
    loop.call_later(_STILL_SECONDS, still)


def _invitation(address: str, file: Path, place: str, *, needs_key: bool) -> str:
    base = address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")  # noqa: S104 - shown, not listened on
    socket = file.parent / "control.sock"  # who may use it needs no key
    key = ' \\\n  -H "Authorization: Bearer $KEY"' if needs_key else ""
    return f"""
Ready: {base}/v1 speaks the OpenAI API, with models "chat" and "embed". Try:

curl -s {base}/v1/chat/completions -H 'Content-Type: application/json'{key} \\
  -d '{{"model": "chat", "temperature": 0, "max_tokens": 32,
       "messages": [{{"role": "user", "content": "Name the capital of France."}}]}}'

curl -s {base}/v1/embeddings -H 'Content-Type: application/json'{key} \\
  -d '{{"model": "embed", "input": "Hello"}}'

What next (from a checkout: `sh packaging/dev run vllm-proxy ...`):

  the file, followed as you save it   {file}
  what an edit would do               vllm-proxy plan{place}
  another value without an editor     curl --unix-socket {socket} \\
                                        -X PATCH localhost/models/chat --json '{{"max_in_flight": 4}}'
  what an engine says                 vllm-proxy logs --follow{place} chat
  the page                            {base}/
  all routes                          {base}/docs
"""
