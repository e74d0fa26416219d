"""Eight clients that ask again and again, a connection a request, until standard input ends.

    load.py raw|openai PORT     prints a line for every hundred answers, then what became of all requests, as JSON

`raw` never tries again; `openai` is the OpenAI client with its usual two retries.
"""

import collections
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable

import openai

CLIENTS = 8
MESSAGES = [{"role": "user", "content": "hi"}]


class Load:
    """What became of the requests so far: how many were answered, and the errors."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self.answered = 0
        self.refused = 0
        self.failed: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0
        self.stop = threading.Event()

    def run(self) -> None:
        """One client."""
        while not self.stop.is_set():
            since = time.monotonic()
            try:
                self._ask()
            except ConnectionRefusedError:
                self.refused += 1
            except Exception as error:  # noqa: BLE001 - every kind is what we are here for
                with self._lock:
                    self.failed[repr(error)] += 1
            else:
                self._note(time.monotonic() - since)

    def _note(self, seconds: float) -> None:
        with self._lock:
            self.answered += 1
            self.slowest = max(self.slowest, seconds)
            if self.answered % 100 == 0:
                print(self.answered, flush=True)


def raw(port: int) -> Callable[[], None]:
    """Asks once with the standard library."""
    body = json.dumps({"model": "chat", "messages": MESSAGES})

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200 or json.loads(text)["object"] != "chat.completion":
                raise ValueError(f"{answer.status} {text!r}")
        finally:
            connection.close()

    return ask


def with_openai(port: int) -> Callable[[], None]:
    """Asks with the OpenAI client."""

    def ask() -> None:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", timeout=60) as client:
            answer = client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "hi"}])
            assert answer.choices[0].message.content

    return ask


def main() -> None:
    """Run until standard input ends."""
    kind, port = sys.argv[1], int(sys.argv[2])
    load = Load(raw(port) if kind == "raw" else with_openai(port))
    threads = [threading.Thread(target=load.run) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    load.stop.set()
    for thread in threads:
        thread.join()
    result = {"answered": load.answered, "refused": load.refused, "failed": load.failed, "slowest": load.slowest}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
