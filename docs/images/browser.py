"""Shows TensorBoard in a headless Chromium, for the screenshot in the README and for the test that reads the charts.

The module controls Chromium by the DevTools protocol over a pipe, for which Python's standard library is enough.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")

FLAGS = (
    "--headless",
    "--no-sandbox",  # needed as root in containers; the browser opens no page but TensorBoard
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)

START = """
import fcntl, os, sys
orders, answers = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(orders, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""A Python program that starts Chromium, which reads orders from descriptor 3 and answers on descriptor 4."""

FIND_ALL = """
function findAll(selector, root = document) {
  const found = [...root.querySelectorAll(selector)];
  for (const element of root.querySelectorAll("*")) {
    if (element.shadowRoot) found.push(...findAll(selector, element.shadowRoot));
  }
  for (const frame of root.querySelectorAll("iframe")) {
    if (frame.contentDocument) found.push(...findAll(selector, frame.contentDocument));
  }
  return found;
}
"""
"""JavaScript: `findAll`, a querySelectorAll that also searches the shadow roots and frames of TensorBoard's page."""


def find_chromium() -> str | None:
    """Returns the path of Chromium, None if it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Runs TensorBoard on `logdir` at a free port inside the context, and yields its address."""
    line = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", "--load_fast", "false"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            said = []
            for text in server.stderr:
                said.append(text)
                found = re.search(r"http://\S+?:(\d+)/", text)
                if found:
                    break
            else:
                raise RuntimeError(f"TensorBoard ended: {''.join(said)}")
            yield f"http://127.0.0.1:{found.group(1)}/"
        finally:
            server.terminate()


class Browser:
    """One page of a headless Chromium, as a context manager.

    Args:
        path: path of the program.
        size: width and height of the page in pixels.
    """

    def __init__(self, path: str, size: tuple[int, int] = (1400, 1000)):
        self._path, self._size = path, size
        self._calls = 0
        self._buffer = b""
        self._session: str | None = None

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        width, height = self._size
        line = [self._path, *FLAGS, f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(to_browser), str(from_browser), *line],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its process group: with all child processes
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def call(self, method: str, timeout: float = 60.0, **parameters: Any) -> dict[str, Any]:
        """Sends one order of the DevTools protocol, waits for the result and returns it."""
        self._calls += 1
        order: dict[str, Any] = {"id": self._calls, "method": method, "params": parameters}
        if self._session is not None:
            order["sessionId"] = self._session
        os.write(self._out, json.dumps(order).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            message = self._receive(deadline)
            if message.get("id") == self._calls:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return dict(message["result"])

    def _receive(self, deadline: float) -> dict[str, Any]:
        """Returns the next message of the browser, which may be an event."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._in, 1 << 16) if ready else b""
            if not chunk:
                raise RuntimeError("the browser does not answer" if not ready else "the browser has ended")
            self._buffer += chunk
        text, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(text))

    def open(self, address: str) -> None:
        """Opens the page at an address."""
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression, which may use `findAll`; None if the expression raises an error."""
        result = self.call("Runtime.evaluate", expression=f"{FIND_ALL}; {script}", returnByValue=True)
        return result["result"].get("value")

    def wait(self, script: str, timeout: float = 60.0) -> Any:
        """Evaluates a JavaScript expression until its value is true, and returns the value.

        Raises:
            TimeoutError: the value was not true within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.25)
        raise TimeoutError(f"the page never had: {script}")

    def screenshot(self, path: Path) -> None:
        """Writes a picture of the page to a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
