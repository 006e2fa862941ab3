"""A real browser without a window, driven over a pipe by Chromium's own protocol (DevTools)."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

# Names that are no number of this machine lead nowhere.
_OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
# Roles of what can be used.
_ACTIVE = ("button", "textbox", "combobox", "listbox", "spinbutton", "tab")


class Browser:
    """One page of Chromium.

    Args:
        folder: for its profile.
        width, height: of the window, in pixels.

    Attributes:
        requested: addresses that the page asked for so far.
        said: errors on the page's console.
    """

    def __init__(self, folder: Path, width: int = 1280, height: int = 1000) -> None:
        program = shutil.which("chromium")
        if program is None:
            pytest.skip("chromium is not installed")
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", _OFFLINE]
        command += [f"--user-data-dir={folder}", "--disable-background-networking", "--remote-debugging-pipe"]
        commands_read, self._write = os.pipe()
        self._read, answers_write = os.pipe()
        # Chromium reads commands from file 3 and writes answers to file 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{commands_read} 4>&{answers_write}', "browser"]
        pipes = (commands_read, answers_write)
        self._process = subprocess.Popen([*shell, *command, "about:blank"], pass_fds=pipes, stderr=subprocess.DEVNULL)
        for end in pipes:
            os.close(end)
        self._rest, self._numbers = b"", itertools.count(1)
        self._session: str | None = None
        self.requested: list[str] = []
        self.said: list[str] = []
        page = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Accessibility"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._read)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == number:
                assert "error" not in told, told["error"]
                return told["result"]
            self._note(told)

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)

    def resize(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 120) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"!!({script})"):
            assert time.monotonic() < deadline, f"not within {seconds} s: {script}\n{self.text()[-3000:]}\n{self.said}"
            time.sleep(0.1)

    def text(self) -> str:
        """What can be read on the page."""
        return self.evaluate("document.body.innerText")

    def focus(self, name: str) -> None:
        """Put the keyboard on the input or button that a screen reader calls so."""
        node = self._node(name)
        self.send("DOM.focus", backendNodeId=node)

    def type(self, text: str) -> None:
        """Write over what the focused input holds, key by key."""
        self.evaluate("document.activeElement.select()")
        for letter in text:
            self.press(letter)

    def paste(self, text: str) -> None:
        """Put a text over what the focused input holds."""
        self.evaluate("document.activeElement.select()")
        self.send("Input.insertText", text=text)

    def press(self, key: str, **more: Any) -> None:
        """A key, down and up."""
        codes = {"Enter": 13, "Tab": 9, "ArrowDown": 40, "Escape": 27}
        event = {
            "key": key,
            "windowsVirtualKeyCode": codes[key] if key in codes else ord(key.upper()) if key.isalnum() else 0,
        }
        event |= {"text": "\r" if key == "Enter" else key} if key == "Enter" or len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **event, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, name: str) -> None:
        """The button that a screen reader calls so."""
        node = self._node(name)
        self.send("DOM.scrollIntoViewIfNeeded", backendNodeId=node)
        left, top, _, _, right, bottom, *_ = self.send("DOM.getBoxModel", backendNodeId=node)["model"]["content"]
        where = {"x": (left + right) / 2, "y": (top + bottom) / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def names(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader tells of."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]

    def picture(self, file: Path, whole: bool = True) -> None:
        """The page as PNG."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _node(self, name: str) -> int:
        for node in self.send("Accessibility.getFullAXTree")["nodes"]:
            called = not node["ignored"] and node.get("name", {}).get("value") == name
            if called and node["role"]["value"] in _ACTIVE:
                return node["backendDOMNodeId"]
        raise AssertionError(f"nothing is called {name!r}: {self.names()}")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 20)
            assert more, "the browser is gone"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, told: dict[str, Any]) -> None:
        method, about = told.get("method"), told.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requested.append(about["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.said.append(str(about["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and about["type"] == "error":
            self.said.append(str([one.get("value") for one in about["args"]]))
