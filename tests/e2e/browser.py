"""Debian's Chromium, driven over its own debugging protocol: enough to type, click, wait and look."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--no-first-run", "--disable-quic",
         "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"]  # fmt: skip
WAIT_S = 20.0


class Page:
    """One tab. Every call is a round trip; nothing runs between calls."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._number = loop, socket, 0
        self.errors: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; exceptions of the page that came before it are kept."""
        return self._loop.run_until_complete(self._call(method, params))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = json.loads((await asyncio.wait_for(self._socket.receive(), WAIT_S)).data)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self._note(message["params"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])

    def _note(self, params: dict[str, Any]) -> None:
        entry = params.get("entry") or params["exceptionDetails"]
        if entry.get("level", "error") == "error":
            self.errors.append(str(entry.get("text")) + " " + str(entry.get("url", "")))

    def run(self, script: str) -> Any:
        """Evaluate an expression of JavaScript and return its value."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true, and return it."""
        until = time.monotonic() + WAIT_S
        while not (value := self.run(script)):
            assert time.monotonic() < until, (
                f"{script} did not become true; status: {self.run('document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def press(self, key: str, code: int = 0, text: str = "") -> None:
        """Press and release a key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            words = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **words)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Set the viewport and the colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the viewport."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def open_page(chromium: str, address: str, profile: Path) -> Iterator[Page]:
    """Open an address in a fresh browser that ends with the block."""
    process = subprocess.Popen(
        [chromium, *FLAGS, f"--user-data-dir={profile}", "--window-size=1200,900", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    loop = asyncio.new_event_loop()
    session: aiohttp.ClientSession | None = None
    try:
        port = _wait_for(profile / "DevToolsActivePort").splitlines()[0]

        async def connect() -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
            session = aiohttp.ClientSession()
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                target = next(tab for tab in await answer.json() if tab["type"] == "page")
            return session, await session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=1 << 28)

        session, socket = loop.run_until_complete(connect())
        page = Page(loop, socket)
        for domain in ("Page", "Runtime", "Log", "DOM"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=address)
        yield page
    finally:
        if session is not None:
            loop.run_until_complete(session.close())
        loop.close()
        process.terminate()
        process.wait(20)


def _wait_for(path: Path) -> str:
    until = time.monotonic() + WAIT_S
    while not path.exists() or not path.read_text().strip():
        assert time.monotonic() < until, f"the browser did not write {path}"
        time.sleep(0.05)
    return path.read_text()
