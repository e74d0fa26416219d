"""Pictures of the page, from a daemon with fake engines: `python -m tests.browser.pictures FOLDER [SCREEN...]`.

Each screen is written as NAME-WIDTH-THEME.png: on a desk and on a phone, light and dark. What they show is the fleet of
an afternoon: models in every state on two devices, requests in flight, a failure.
"""

import asyncio
import contextlib
import itertools
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.browser.chromium import Browser, Page, browser
from tests.fakes.ledger import GIB, Devices
from tests.harness import OPEN, Daemon, daemon, fake_engines, port_block

SCREENS = ("fleet", "model/chat", "requests", "events", "devices", "config", "play", "keys", "usage")
SIZES = ((1280, 900), (390, 844))
THEMES = ("light", "dark")
_FAILS = (
    "ValueError: Free memory on device cuda:0 (31.2/79.1 GiB) on startup is less than desired GPU memory utilization "
    "(0.9, 71.2 GiB)."
)


def _models(folder: Path) -> str:
    return f"""
[models.chat]
model = "Qwen/Qwen3-8B"
aliases = ["gpt-4o-mini"]
replicas = 2
[models.coder]
model = "Qwen/Qwen3-Coder-30B-A3B"
args = {{ fake_phase_until = "weights={folder}/loaded" }}
[models.embed]
model = "BAAI/bge-m3"
[models.vision]
model = "Qwen/Qwen3-VL-32B"
args = {{ fake_exit_at = "load", fake_exit_text = "{_FAILS}" }}
[models.vision.restart]
max_failures = 1
[models.guard]
model = "meta-llama/Llama-Guard-4-12B"
start = "on-demand"
[models."org/summarise"]
model = "org/summarise-7b"
enabled = false
"""


@contextlib.asynccontextmanager
async def afternoon(folder: Path) -> AsyncIterator[Daemon]:
    """A daemon whose models are in every state, with three clients that ask one of them without an end."""
    folder.mkdir(parents=True, exist_ok=True)
    with Devices(folder / "devices.toml", {"0": 80 * GIB, "1": 80 * GIB}) as devices:
        options = f'[defaults]\ngpu_memory_utilization = 0.3\n[defaults.args]\nfake_ledger = "{devices.file}"\n'
        text = fake_engines(port_block()) + OPEN + devices.config + options + _models(folder)
        async with daemon(text, folder) as running:
            for model, state in (("chat", "ready"), ("embed", "ready"), ("vision", "error")):
                await running.once(model, lambda it, state=state: it["state"] == state)  # type: ignore[misc]
            clients = [asyncio.create_task(_asks(running, 0.04 + 0.02 * number)) for number in range(3)]
            try:
                yield running
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)


async def _asks(running: Daemon, interval: float) -> None:
    body = {
        "model": "chat", "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "hello"}], "fake": {"chunks": 40, "interval": interval},
    }  # fmt: skip
    while True:
        async with running.session.post("/v1/chat/completions", json=body) as answer:
            await answer.read()


async def take(found: Browser, running: Daemon, folder: Path, screens: Sequence[str]) -> list[Path]:
    """Write each screen in each size and theme; returns the files."""
    page = await found.page(f"{running.url}/ui/")
    await page.front()
    await page.until("document.querySelectorAll('tbody tr').length === 6")
    if "fleet" in screens:  # a point of the last hour is taken every ten seconds, and looked for every twenty
        await page.until("document.querySelector('.spark polyline')")
    files = []
    for screen in screens:
        await page.evaluate(f"location.hash = '#/{screen}'")
        name = screen.partition("/")[0]
        await page.until(f"document.querySelector('main').className === '{name}'")
        await page.until(_SHOWN.get(name, "document.querySelector('main h1')"))
        for (width, height), theme in itertools.product(SIZES, THEMES):
            await page.looks(width, height, theme)
            await _painted(page)
            files.append(folder / f"{name}-{width}-{theme}.png")
            await page.picture(files[-1])
    await page.close()
    return files


_SHOWN = {
    "model": "document.querySelector('.log div') && document.querySelector('.requests tbody tr')",
    "requests": "document.querySelectorAll('main table').length === 2 && document.querySelector('.requests tbody tr')",
    "devices": "document.querySelectorAll('.device').length === 2",
}


async def _painted(page: Page) -> None:
    """Two frames later all is drawn as it now looks."""
    await page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


async def main(folder: Path, screens: Sequence[str]) -> None:
    """Make them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        async with afternoon(place / "daemon") as running, browser(place / "profile") as found:
            for file in await take(found, running, folder, screens):
                print(f"wrote {file}")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:] or SCREENS))
