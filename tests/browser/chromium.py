"""A real browser, driven through the Chrome DevTools Protocol: what a page shows, complains about and fetches."""

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_WAIT_SECONDS = 180.0  # beside real vLLM, which may take every processor
REBOUND = "evil.example"  # a name of somebody else, who lets it mean this machine
_FLAGS = (
    "--headless=new", "--no-sandbox", "--remote-debugging-port=0", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--mute-audio", "--window-size=1400,1000",
    # Nothing leaves this machine.
    f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, browser: "Browser", target: str, session: str) -> None:
        self.requests: list[str] = []  # every URL that it asked for
        self.complaints: list[str] = []  # its console's errors and warnings, uncaught exceptions, what CSP refused
        self._under_way: dict[str, str] = {}  # by its id in the browser: the URL of a request that has not ended
        self._browser = browser
        self._target = target
        self._session = session
        self._loaded = asyncio.Event()
        self._heard = asyncio.Event()

    async def call(self, method: str, **params: object) -> Any:  # noqa: ANN401 - JSON
        """Call a method of the protocol."""
        return await self._browser.call(method, params, self._session)

    async def open(self, url: str) -> None:
        """Go there; what is seen begins anew."""
        self.requests.clear()
        self.complaints.clear()
        answer = await self.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        await self.until("document.readyState === 'complete'")

    async def evaluate(self, expression: str) -> Any:  # noqa: ANN401 - JSON
        """What an expression is in the page, once a promise is kept."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression holds in the page."""
        look = f"new Promise(done => {{ const look = () => ({expression}) ? done() : setTimeout(look, 20); look() }})"
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                await self.evaluate(look)
        except TimeoutError:
            message = f"never held: {expression}; complaints: {self.complaints}"
            raise AssertionError(message) from None

    async def follow(self, expression: str) -> None:
        """Evaluate what leads to another page, and wait until that is there."""
        self._loaded.clear()
        await self.evaluate(f"setTimeout(() => {{ {expression} }})")
        async with asyncio.timeout(_WAIT_SECONDS):
            await self._loaded.wait()

    async def complains(self, of: str) -> None:
        """Wait until it complains of this."""
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                while not any(of in complaint for complaint in self.complaints):
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            message = f"never complained of {of}, but: {self.complaints}"
            raise AssertionError(message) from None

    async def holds(self, of: str, number: int) -> None:
        """Wait until so many requests of it are under way whose URL has this in it: streams do not end."""
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                while sum(of in url for url in self._under_way.values()) != number:
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            message = f"never held {number} of {of}, but: {list(self._under_way.values())}"
            raise AssertionError(message) from None

    async def text(self) -> str:
        """What the page shows."""
        found: str = await self.evaluate("document.body.innerText")
        return found

    async def picture(self, file: Path) -> None:
        """A PNG of what it looks like."""
        answer = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(answer["data"]))

    async def looks(self, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        """Its size in pixels of CSS, and the theme that its user prefers."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        features = [{"name": "prefers-color-scheme", "value": theme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def press(self, key: str, *held: str) -> None:
        """Press a key, as `Tab`, `Enter` or `s`, while those of `Control` and `Shift` are held that are named."""
        modifiers = sum({"Control": 2, "Shift": 8}[name] for name in held)
        code = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}.get(key) or ord(key.upper())
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 and not modifiers else "")
        sent = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **sent, **({"text": text} if text else {}))
        await self.call("Input.dispatchKeyEvent", type="keyUp", **sent)

    async def close(self) -> None:
        """Close the tab, which asks nothing: one that asks whether to leave would stay, with its connections."""
        await self._browser.call("Target.closeTarget", {"targetId": self._target})

    async def front(self) -> None:
        """Show it, and hide the others."""
        await self.call("Page.bringToFront")

    def heard(self, method: str, params: dict[str, Any]) -> None:
        """Take note of an event."""
        self._heard.set()
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
            self._under_way[params["requestId"]] = params["request"]["url"]
        elif method in {"Network.loadingFinished", "Network.loadingFailed"}:
            self._under_way.pop(params["requestId"], None)
        elif method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning", "assert"}:
            self.complaints.append(str([value.get("value", value) for value in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
            self.complaints.append(f"{params['entry']['text']} ({params['entry'].get('url')})")
        elif method == "Audits.issueAdded" and params["issue"]["code"] == "ContentSecurityPolicyIssue":
            self.complaints.append(str(params["issue"]["details"]))


class Browser:
    """A running browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._pages: dict[str, Page] = {}

    async def page(self, url: str = "about:blank") -> Page:
        """A new tab that shows this."""
        target = await self.call("Target.createTarget", {"url": "about:blank"})
        attached = await self.call("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        page = self._pages[attached["sessionId"]] = Page(self, target["targetId"], attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            await page.call(f"{domain}.enable")
        await page.open(url)
        return page

    async def call(self, method: str, params: object, session: str | None = None) -> Any:  # noqa: ANN401 - JSON
        """Call a method of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(message | ({"sessionId": session} if session else {}))
        async with asyncio.timeout(_WAIT_SECONDS):
            return await answer

    async def listen(self) -> None:
        """Take in what it says, until it is gone."""
        async for message in self._socket:
            said = message.json()
            if "id" in said:
                self._answered(self._answers.pop(said["id"]), said)
            elif page := self._pages.get(said.get("sessionId", "")):
                page.heard(said["method"], said["params"])

    @staticmethod
    def _answered(answer: asyncio.Future[Any], said: dict[str, Any]) -> None:
        if answer.done():  # nobody waits any more
            return
        if "error" in said:
            answer.set_exception(AssertionError(said["error"]))
        else:
            answer.set_result(said["result"])


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Browser]:
    """A browser whose profile is in this folder; it and all its processes end with the block."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    assert program, "no chromium here: `apt-get install chromium`, or leave these tests out with -m 'not browser'"
    process = await asyncio.create_subprocess_exec(
        program, *_FLAGS, f"--user-data-dir={folder}", "about:blank",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        async with asyncio.timeout(_WAIT_SECONDS):
            address = await _address(process.stderr)
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            found = Browser(socket)
            tasks = [asyncio.create_task(found.listen()), asyncio.create_task(_drain(process.stderr))]
            try:
                yield found
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _address(stderr: asyncio.StreamReader) -> str:
    """Where it is driven: it says so as it starts."""
    lines = []
    async for raw in stderr:
        lines.append(line := raw.decode(errors="replace").strip())
        if line.startswith("DevTools listening on "):
            return line.removeprefix("DevTools listening on ")
    raise AssertionError("\n".join(lines[-20:]))


async def _drain(stderr: asyncio.StreamReader) -> None:
    while await stderr.read(65536):
        pass
