"""`python -m tests.browser.pictures [FOLDER]`: the pictures in the README, of the page and of `status`.

Taken in the real headless Chromium. `chat` is of `vllm-proxy demo`, with real vLLM; the others are of a daemon with
fake engines on two devices that everything happens to at once: one model is ready and busy, one loads, one failed, one
waits to be asked, one is disabled.
"""

import asyncio
import contextlib
import html
import os
import pty
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.browser.chromium import Page, browser
from tests.browser.screens import click, fill, has
from tests.fakes.ledger import GIB, Devices
from tests.harness import OPEN, PLAIN, Daemon, daemon, fake_engines, port_block, running_command

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
_SIZES = ((1280, 800), (390, 844))
_TERMINAL = (1000, 330)
_NO_MEMORY = (
    "ValueError: Free memory on device cuda:0 (31.2/79.1 GiB) on startup is less than desired GPU memory utilization"
    " (0.9, 71.2 GiB)."
)
_MODELS = """
[defaults]
gpu_memory_utilization = 0.3
[defaults.args]
fake_ledger = "{ledger}"

# The one for everybody.
[models.chat]
model = "Qwen/Qwen3-8B"
description = "Chat, for everybody"
aliases = ["gpt-4o-mini"]
replicas = 2
balance = "prefix"
max_model_len = 32768
max_num_seqs = 64

[models.embed]
model = "BAAI/bge-m3"
description = "For the search"
aliases = ["text-embedding-3-small"]

# Started by its first request; it gives its GPU back.
[models.guard]
model = "meta-llama/Llama-Guard-4-12B"
start = "on-demand"
idle_timeout = "15m"
max_model_len = 8192

[models.summarise]
model = "org/summarise-7b"
description = "Nobody has asked for it since spring"
enabled = false
max_model_len = 16384
max_num_seqs = 16
queue_size = 20
queue_timeout = "2m"
request_timeout = "10m"

[models.coder]
model = "Qwen/Qwen3-Coder-30B-A3B"
args = {{ fake_phase_until = "weights={folder}/never" }}

[models.vision]
model = "Qwen/Qwen3-VL-32B"
args = {{ fake_exit_at = "load", fake_exit_text = "{no_memory}" }}
restart.max_failures = 1
"""
_COLOURS = {"1": "font-weight:bold", "2": "opacity:.65", "31": "color:#ff8272", "32": "color:#5fd7a0",
            "33": "color:#e5b454", "36": "color:#6fc3df"}  # fmt: skip
# Past what makes the engines fakes.
_TO_THE_MODELS = """(box => {
  const above = box.value.slice(0, box.value.indexOf("# The one for everybody")).split("\\n").length - 1;
  const line = parseFloat(getComputedStyle(box).lineHeight);
  for (let at = box; at !== document.body; at = at.parentElement) at.scrollTop = above * line;
})(document.querySelector("textarea"))"""
_STYLED = re.compile(r"\x1b\[(\d+)m(.*?)\x1b\[0m", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Picture:
    """One of them."""

    name: str
    width: int
    height: int


SHOTS = (
    *(Picture(f"fleet-{width}-{theme}", width, height) for width, height in _SIZES for theme in ("light", "dark")),
    *(Picture(f"plan-{width}-{theme}", width, height) for width, height in _SIZES for theme in ("light", "dark")),
    Picture("status", *_TERMINAL),
)
OF_DEMO = tuple(
    Picture(f"chat-{width}-{theme}", width, height) for width, height in _SIZES for theme in ("light", "dark")
)
_LOAD_SECONDS = 900.0  # two vLLM starts side by side on two slow cores


@contextlib.asynccontextmanager
async def _busy(folder: Path) -> AsyncIterator[Daemon]:
    with Devices(folder / "devices", {"0": 80 * GIB, "1": 80 * GIB}) as devices:
        models = _MODELS.format(ledger=devices.file, folder=folder, no_memory=_NO_MEMORY)
        async with daemon(fake_engines(port_block()) + OPEN + devices.config + models, folder / "daemon") as running:
            await running.once("chat", lambda model: model["state"] == "ready")
            await running.once("embed", lambda model: model["state"] == "ready")
            await running.once("vision", lambda model: model["state"] == "error")
            tasks = [asyncio.create_task(_ask(running, 0.05 + 0.02 * number)) for number in range(3)]
            try:
                yield running
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(running: Daemon, interval: float) -> None:
    """Chat on and on."""
    body = {"model": "chat", "stream": True, "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": "Hi"}], "fake": {"chunks": 20, "interval": interval}}  # fmt: skip
    while True:
        async with running.session.post("/v1/chat/completions", json=body) as answer:
            await answer.read()


async def _themes(page: Page, name: str, folder: Path, before: str = "0") -> None:
    for width, height in _SIZES:
        for theme in ("light", "dark"):
            await page.looks(width, height, theme)
            await page.evaluate(before)
            await page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            await page.picture(folder / f"{name}-{width}-{theme}.png")


async def _status(page: Page, running: Daemon, folder: Path) -> None:
    """What `vllm-proxy status` writes to a terminal of 110 columns, on one."""
    text = html.escape(await asyncio.to_thread(_on_terminal, running, 110, "status"), quote=False)
    text = _STYLED.sub(lambda found: f'<span style="{_COLOURS[found[1]]}">{found[2]}</span>', text)
    await page.looks(*_TERMINAL)
    style = "margin:0;padding:18px;background:#10151a;color:#d6dde3;font:14.5px/1.45 monospace"
    style += ";white-space:pre-wrap;overflow:hidden"
    await page.evaluate(f"document.body.style = {style!r}; document.body.innerHTML = {text!r}")
    await page.picture(folder / "status.png")


def _on_terminal(running: Daemon, columns: int, *command: str) -> str:
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
    environment.pop("NO_COLOR", None)
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe(PLAIN[0], [*PLAIN, *command, "--state-dir", str(running.runtime_dir)], environment)
    text = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while piece := os.read(terminal, 65536):
            text += piece
    os.close(terminal)
    os.waitpid(pid, 0)
    shown = f"$ vllm-proxy {' '.join(command)}\n" + text.decode().replace("\r\n", "\n")
    return shown.rstrip()


async def take(folder: Path) -> None:
    """Make each of `SHOTS`."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        async with _busy(place) as running, browser(place / "profile") as chromium:
            page = await chromium.page(f"{running.url}/ui/")
            await page.until("document.querySelectorAll('tbody tr').length >= 6")
            await page.until("document.querySelector('.spark polyline')")  # rates of more than one moment
            await _themes(page, "fleet", folder)
            await page.evaluate("location.hash = '#/config'")
            await page.until("document.querySelector('textarea')?.value.includes('max_num_seqs = 64')")
            await page.evaluate(
                "(box => { box.value = box.value.replace('max_num_seqs = 64', 'max_num_seqs = 128');"
                " box.dispatchEvent(new Event('input', {bubbles: true})) })(document.querySelector('textarea'))"
            )
            await page.until("document.body.innerText.includes('64 -> 128')")
            await _themes(page, "plan", folder, _TO_THE_MODELS)
            await _status(await chromium.page("about:blank"), running, folder)


async def of_demo(running: Daemon, folder: Path) -> None:
    """Make each of `OF_DEMO`: its chat model has answered in the Playground."""
    with tempfile.TemporaryDirectory() as scratch:
        async with browser(Path(scratch) / "profile") as chromium:
            page = await chromium.page(f"{running.url}/ui/#/play/chat")
            await page.front()
            await page.until("document.querySelector('#play-model').value === 'chat'")
            await fill(page, "temperature", "0")
            await fill(page, "max tokens", "48")
            await fill(page, "Message", "What is the capital of Italy?")
            await click(page, "Send")
            await page.until(has(".told", "first token"))
            await _themes(page, "chat", folder)


async def _all(folder: Path) -> None:
    await take(folder)
    with tempfile.TemporaryDirectory() as scratch:
        async with running_command(Path(scratch), "demo", seconds=_LOAD_SECONDS) as running:
            await running.until("2 of 2 models ready", _LOAD_SECONDS)
            await of_demo(running, folder)


def main(arguments: Sequence[str]) -> None:
    """Into the folder that the README shows, or another one."""
    folder = Path(arguments[0]) if arguments else PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(_all(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
