"""Progress of the demo on the terminal: the state of the fleet at each change, then a command to try.

Only observes the reconciler; nothing is started or stopped here.
"""

import sys
import time
from pathlib import Path

from vllm_proxy.domain.lifecycle import State
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.status import sentence


def watch(reconciler: Reconciler, address: str, file: Path, place: str = "") -> None:
    """Print the fleet's state at each change, and what to try once all models are ready.

    `file`: the demo's models.toml; `place`: what commands need to find this daemon.
    """
    start = time.monotonic()
    said = ""

    def changed(_model: Model | None = None) -> None:
        nonlocal said
        now = sentence(reconciler)
        if now == said:
            return
        said = now
        print(f"[{time.monotonic() - start:4.0f} s] {now}", file=sys.stderr, flush=True)
        if all(status.state is State.READY for status in reconciler.models()):
            print(_invitation(address, file, place), flush=True)

    print(
        "Starting vLLM twice; on two cores this takes one to three minutes. Ctrl-C stops everything.", file=sys.stderr
    )
    reconciler.listen(changed)
    changed()


def _invitation(address: str, file: Path, place: str) -> str:
    base = address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")  # noqa: S104 - shown, not listened on
    socket = file.parent / "control.sock"  # who may use it needs no key
    return f"""
Ready: {base}/v1 speaks the OpenAI API, with models "chat" and "embed". Try:

curl -s {base}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "chat", "temperature": 0, "max_tokens": 32,
       "messages": [{{"role": "user", "content": "Name the capital of France."}}]}}'

curl -s {base}/v1/embeddings -H 'Content-Type: application/json' \\
  -d '{{"model": "embed", "input": "Hello"}}'

What next (from a checkout: `sh packaging/dev run vllm-proxy ...`):

  the file, followed as you save it   {file}
  what an edit would do               vllm-proxy plan{place}
  another value without an editor     curl --unix-socket {socket} \\
                                        -X PATCH localhost/models/chat --json '{{"max_in_flight": 4}}'
  what an engine says                 vllm-proxy logs --follow{place} chat
  all routes                          {base}/docs
"""
