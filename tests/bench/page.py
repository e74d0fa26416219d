"""What the page costs a browser: `python -m tests.bench.page` prints it, with many models of which one is busy.

Chromium's own figures, while the page is in front and nobody touches it: how much of a second its script and its layout
take, how much it holds; and how long it takes from its address to a row for each model.
"""

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from tests.browser.chromium import Page, browser
from tests.harness import OPEN, Daemon, daemon, fake_engines, port_block

_ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
_EVERY_SECONDS = 0.05  # twenty requests a second: each look at the fleet has something new
_SETTLED_SECONDS = 3.0
_PARTS = {"ScriptDuration": "script", "LayoutDuration": "layout", "RecalcStyleDuration": "style", "TaskDuration": "all"}


async def _measure(models: int, seconds: float) -> None:
    text = OPEN + '[models.chat]\nmodel = "org/chat"\n' + "".join(
        f'[models.m{number:03}]\nmodel = "org/m{number}"\nstart = "on-demand"\n' for number in range(models - 1)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with (
            daemon(fake_engines(port_block()) + text, folder) as running,
            browser(folder / "browser") as chromium,
        ):
            await running.once("chat", lambda one: one["state"] == "ready")
            page = await chromium.page()
            await page.front()
            await page.looks()
            began = time.monotonic()
            await page.open(f"{running.url}/ui/")
            await page.until(f"document.querySelectorAll('main tbody tr').length === {models}")
            print(f"{models} models: all rows after {time.monotonic() - began:.2f} s")
            async with _busy(running):
                await asyncio.sleep(_SETTLED_SECONDS)
                before = await _figures(page)
                await asyncio.sleep(seconds)
                after = await _figures(page)
    spent = after["Timestamp"] - before["Timestamp"]
    for figure, part in _PARTS.items():
        print(f"  {part:8} {(after[figure] - before[figure]) / spent * 1000:8.2f} ms of each second")
    print(f"  {'heap':8} {after['JSHeapUsedSize'] / 1e6:8.1f} MB")


async def _figures(page: Page) -> dict[str, float]:
    await page.call("Performance.enable")
    found = await page.call("Performance.getMetrics")
    return {one["name"]: one["value"] for one in found["metrics"]}


@contextlib.asynccontextmanager
async def _busy(running: Daemon) -> AsyncIterator[None]:
    async def ask() -> None:
        while True:
            await running.post("/v1/chat/completions", _ASK)
            await asyncio.sleep(_EVERY_SECONDS)

    asking = asyncio.create_task(ask())
    try:
        yield
    finally:
        asking.cancel()
        await asyncio.wait({asking})


def main() -> None:
    """Measure, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    asyncio.run(_measure(options.models, options.seconds))


if __name__ == "__main__":
    main()
