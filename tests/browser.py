"""Drive a headless Chromium over its debugging pipe: open a file, evaluate scripts, press and move the pointer."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser_or_skip() -> str:
    """The browser's program; skips the test where there is none."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium here (Debian: apt-get install chromium)")


class Page:
    """One page of the browser, with everything that its console and its scripts complained of."""

    def __init__(self, commands: int, answers: int, process: subprocess.Popen[bytes]) -> None:
        self.commands, self.answers, self.process = commands, answers, process
        self.buffer, self.number, self.session = b"", 0, ""
        self.complaints: list[str] = []

    def attach(self) -> None:
        """Open an empty page, and listen to it."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol, and wait for its answer."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.commands, data) :]
        number = self.number
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser was silent for {SECONDS:.0f} s (exit status {self.process.poll()})"
            part = os.read(self.answers, 1 << 20)
            assert part, "the browser has ended"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(" ".join(str(value.get("value", value)) for value in params["args"]))
        elif message.get("method") == "Log.entryAdded":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, file: Path, *, width: int = 1000, height: int = 900, dark: bool = False) -> None:
        """Show a file, and wait until the page says that it is ready or has failed."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Page.navigate", url="about:blank")  # so that nothing of an earlier page is taken for this one's
        self.send("Page.navigate", url=file.resolve().as_uri())
        self.wait_for("location.protocol === 'file:' && document.documentElement?.dataset.state !== undefined")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.value(condition):
            assert time.monotonic() < end, f"never true: {condition}; {self.complaints}"
            time.sleep(0.02)

    def value(self, script: str) -> Any:
        """The value of an expression, as JSON has it; promises are waited for."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def draw(self, selector: str, points: list[tuple[float, float]]) -> None:
        """Draw a line through points of an element, given as shares of its width and height, by the pointer."""
        box = self.value(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        places = [(box["left"] + x * box["width"], box["top"] + y * box["height"]) for x, y in points]
        kinds = ["mousePressed", *["mouseMoved"] * (len(places) - 1)]
        for kind, (x, y) in [*zip(kinds, places, strict=True), ("mouseReleased", places[-1])]:
            buttons = {"button": "left", "buttons": 1, "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **buttons)

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file in a file input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def screenshot(self, file: Path) -> None:
        """Write what the page shows, as PNG."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextmanager
def browser_page(profile: Path) -> Generator[Page]:
    """A page of a new browser, which ends with the block."""
    program = browser_or_skip()
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    # The browser reads commands from descriptor 3 and answers on 4. root may not use its sandbox.
    options = "--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe --disable-dev-shm-usage"
    script = f'exec "$0" {options} "$@" 3<&{their_in} 4>&{their_out}'
    process = subprocess.Popen(
        ["bash", "-c", script, program, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(their_in, their_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_in)
    os.close(their_out)
    page = Page(our_out, our_in, process)
    try:
        page.attach()
        yield page
    finally:
        os.close(our_out)
        os.close(our_in)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
