"""A headless Chromium that a test drives over two pipes, by the Chrome DevTools Protocol."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from required import absent

PATIENCE = 60  # seconds for one answer of a browser on a busy machine
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"),
    *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-proxy-server"),  # whatever it asks for itself
)


class Browser:
    """One tab. ``events``: what it told of itself, as (method, values)."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.left, self.number, self.session = b"", 0, ""
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": values}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self.number:
            self.events.append((answer["method"], answer["params"]))
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def visit(self, address: str) -> None:
        """Until all of the page is loaded."""
        self.events.clear()
        self.ask("Page.navigate", url=address)
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self.run("0")

    def run(self, code: str) -> Any:
        """The JSON value of a JavaScript expression, awaited."""
        answer = self.ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def complaints(self) -> list[str]:
        """Errors of scripts, and what the page's policy forbade."""
        texts = [str(values["exceptionDetails"]) for name, values in self.events if name == "Runtime.exceptionThrown"]
        return texts + [values["entry"]["text"] for name, values in self.events if name == "Log.entryAdded"]

    def requests(self) -> list[str]:
        return [values["request"]["url"] for name, values in self.events if name == "Network.requestWillBeSent"]

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.left:
            ready, _, _ = select.select([self.reading], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser has been silent for {PATIENCE} s"
            received = os.read(self.reading, 1 << 20)
            assert received, "the browser has ended"
            self.left += received
        message, self.left = self.left.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer


@contextmanager
def opened(profile: Path, *switches: str) -> Iterator[Browser]:
    """A browser with a new profile, which has ended when the block has."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        absent("no Chromium here")
    asked, answered = os.pipe(), os.pipe()
    given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (asked[0], answered[1])]  # above 3 and 4, where they go
    command = [program, *SWITCHES, *switches, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{given[0]} 4>&{given[1]}', "bash", *command],
            pass_fds=given,
            stdout=log,
            stderr=log,
        )
    for end in (asked[0], answered[1], *given):
        os.close(end)
    try:
        browser = Browser(answered[0], asked[1])
        yield browser
        browser.session = ""
        browser.ask("Browser.close")
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        os.close(asked[1])
        os.close(answered[0])
