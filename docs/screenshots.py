"""Pictures of the built site, wide and narrow, light and dark, and a report of what does not fit.

    uv run --group docs python docs/screenshots.py                    # all pages: the report alone
    uv run --group docs python docs/screenshots.py --out shots usage  # one page: the report, and four pictures

The exit status is 1 where something is hidden at 1400 px, where a page scrolls sideways at 390 px (tables and code may
scroll within their own boxes there, and are counted), or where a page asks another host for anything. Chromium is
driven by its DevTools protocol over a pipe: JSON messages, each ended by a zero byte. It needs no package.
"""

import argparse
import base64
import contextlib
import fcntl
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

WIDTHS = {1400: 900, 390: 844}  # a laptop's window, a telephone: width and height in CSS pixels
SCHEMES = ("light", "dark")
MAX_HEIGHT = 12_000  # CSS pixels of a picture; what lies below is cut off
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Runs in the page. A box is what holds its overflow back (it scrolls or hides it); what has no box spills over.
MEASURE = """
(async () => {
  await document.fonts.ready;
  await new Promise(done => setTimeout(done, 150));  // the theme wraps tables once it has loaded
  const found = [], root = document.documentElement, article = document.querySelector("article");
  const says = element => element.textContent.trim().replace(/\\s+/g, " ").slice(0, 60);
  const past = root.scrollWidth - root.clientWidth;
  if (past > 0) found.push({kind: "page", by: past, text: ""});
  const edge = article ? article.parentElement.getBoundingClientRect().right + 1 : 0, boxes = new Set();
  for (const element of article ? article.querySelectorAll("*") : []) {
    const style = getComputedStyle(element), by = element.scrollWidth - element.clientWidth;
    if (style.overflowX != "visible") boxes.add(element);
    if (!element.clientWidth || style.position == "absolute" || style.display == "inline") continue;
    if (boxes.has(element) && by > 1)
      found.push({kind: ["auto", "scroll"].includes(style.overflowX) ? "scrolls" : "hidden", by, text: says(element)});
    else if (element.getBoundingClientRect().right > edge && !element.parentElement.closest("[data-spills]")) {
      let box = element.parentElement;
      while (box != article && !boxes.has(box)) box = box.parentElement;
      if (box != article) continue;
      element.dataset.spills = "";
      found.push({kind: "spills", by: Math.round(element.getBoundingClientRect().right - edge), text: says(element)});
    }
  }
  for (const {name} of performance.getEntriesByType("resource"))
    if (!name.startsWith(location.origin) && !name.startsWith("data:")) found.push({kind: "host", by: 0, text: name});
  return {found, height: root.scrollHeight};
})()
"""


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, command: str, profile: str) -> None:
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        # Chromium reads messages from descriptor 3 and writes to 4: copies from above both, so that neither is lost.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_child, from_child)]

        def place() -> None:
            for at, end in enumerate(high, start=3):
                os.dup2(end, at)

        flags = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [command, *flags, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_child, from_child, *high):
            os.close(end)
        self._unread = b""
        self._events: list[dict[str, Any]] = []
        self._last = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its result; events that come before are kept."""
        self._last += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._last, "method": method, "params": params, **session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"Chromium refused {method}: {answer['error']['message']}")
                return dict(answer["result"])
            self._events.append(answer)

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._receive())

    def close(self) -> None:
        """End Chromium."""
        with contextlib.suppress(OSError, RuntimeError):
            self._session = None
            self.call("Browser.close")
        self._process.wait(timeout=30)
        os.close(self._in)
        os.close(self._out)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            if not (more := os.read(self._in, 1 << 20)):
                raise RuntimeError("Chromium ended before it answered.")
            self._unread += more
        message, self._unread = self._unread.split(b"\0", 1)
        return dict(json.loads(message))


def find_chromium(names: Sequence[str] = NAMES) -> str:
    """The path of a Chromium.

    Raises:
        FileNotFoundError: None of `names` is on the path.
    """
    for name in names:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(f"None of {', '.join(names)} is on PATH: install Chromium to take pictures of the site.")


def pages(site: Path) -> list[str]:
    """The pages of a built site as paths of their URLs: ``""`` is the home page, ``"usage/"`` another."""
    found = (page.parent.relative_to(site).as_posix() for page in site.rglob("index.html"))
    return sorted("" if page == "." else f"{page}/" for page in found)


def chosen(site: Path, wanted: Sequence[str]) -> list[str]:
    """The pages named in `wanted` (``usage``, ``decisions/core``, ``index`` for the home page), or all.

    Raises:
        ValueError: A name is no page.
    """
    every = pages(site)
    names = ["" if name.strip("/") == "index" else name.strip("/") + "/" for name in wanted] or every
    if missing := sorted(set(names) - set(every)):
        raise ValueError(f"No such page: {', '.join(missing)}. The site has {', '.join(every)}.")
    return names


def picture_name(page: str, width: int, scheme: str) -> str:
    """The name of a picture's file: ``decisions_core-390-dark.png``."""
    return f"{page.strip('/').replace('/', '_') or 'index'}-{width}-{scheme}.png"


def is_fault(kind: str, width: int) -> bool:
    """Whether a finding fails the check: a box that scrolls does so on a wide screen only."""
    return kind != "scrolls" or width >= 1000


def report(found: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]) -> tuple[list[str], int]:
    """Lines for the reader, and the number of faults. `found` has the findings of each page and width."""
    lines, faults, scrolling = [], 0, 0
    for (page, width), findings in found.items():
        for finding in findings:
            if is_fault(finding["kind"], width):
                faults += 1
                lines.append(f"/{page} at {width} px: {finding['kind']} {finding['by']} px  {finding['text']}".rstrip())
            else:
                scrolling += 1
    lines.append(f"{len({page for page, _ in found})} pages: {faults} faults, {scrolling} boxes scroll where narrow")
    return lines, faults


@contextlib.contextmanager
def serve(site: Path) -> Iterator[str]:
    """Serve a folder on a free port of this machine; the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def look(browser: Browser, address: str, names: Sequence[str], out: Path | None) -> dict[tuple[str, int], Any]:
    """Measure every page at every width, and take its pictures where `out` is given."""

    def resize(width: int, height: int) -> None:
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    found = {}
    for width, height in WIDTHS.items():
        resize(width, height)
        for scheme in SCHEMES if out else SCHEMES[:1]:
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.call("Emulation.setEmulatedMedia", features=media)
            for page in names:
                browser.open(address + quote(page))
                answer = browser.call("Runtime.evaluate", expression=MEASURE, awaitPromise=True, returnByValue=True)
                measured = answer["result"]["value"]
                found[page, width] = measured["found"]
                if out:
                    resize(width, min(measured["height"], MAX_HEIGHT))
                    shot = browser.call("Page.captureScreenshot")
                    (out / picture_name(page, width, scheme)).write_bytes(base64.b64decode(shot["data"]))
                    resize(width, height)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, look, report; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("page", nargs="*", help="such as usage, or index for the home page; all without one")
    parser.add_argument("--site", type=Path, help="a site that is built already; without it, mkdocs builds one")
    parser.add_argument("--out", type=Path, help="take pictures, and write them here")
    options = parser.parse_args(arguments)
    command = find_chromium()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        site = options.site or Path(scratch, "site")
        if not options.site:
            root = Path(__file__).parents[1]
            build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(site)]
            subprocess.run(build, cwd=root, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
        names = chosen(site, options.page)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        browser = Browser(command, str(Path(scratch, "profile")))
        try:
            with serve(site) as address:
                found = look(browser, address, names, options.out)
        finally:
            browser.close()
    lines, faults = report(found)
    print("\n".join(lines))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
