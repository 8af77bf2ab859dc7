"""A headless Chromium, as far as the pages need one."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Browser", "Layout", "Opened"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
)
_CONSOLE = re.compile(r":CONSOLE[^\]]*\] (.*)")
# Opens a page in frames of several widths and says what it finds there.
_FRAMES = """<!doctype html><body><script>
const widths = {widths}, page = {page}, found = [];
for (const width of widths) {{
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${{width}}px;height:600px;border:0`;
  frame.addEventListener("load", () => {{
    const root = frame.contentDocument.documentElement;
    const marks = [...root.querySelectorAll("svg rect, svg circle")];
    const sizes = marks.map((mark) => mark.getBoundingClientRect());
    found.push({{
      width, reach: root.scrollWidth, marks: marks.length,
      drawn: sizes.filter((size) => size.width > 0 && size.height > 0).length,
    }});
    if (found.length === widths.length) {{
      const answer = document.createElement("pre");
      answer.id = "found";
      answer.textContent = JSON.stringify(found);
      document.body.append(answer);
    }}
  }});
  frame.srcdoc = page;
  document.body.append(frame);
}}
</script></body>
"""


@dataclass(frozen=True)
class Opened:
    """A page as the browser shows it.

    Attributes:
        dom: The document after it has loaded, as HTML.
        console: What the browser complained of: errors of scripts, refused requests.
    """

    dom: str
    console: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How a page lies in a window.

    Attributes:
        width: Of the window, in CSS pixels.
        reach: How far the page reaches to the right.
        marks: How many shapes its pictures have.
        drawn: How many of them have an area.
    """

    width: int
    reach: int
    marks: int
    drawn: int


@dataclass(frozen=True)
class Browser:
    """A browser that is started anew for every page.

    Attributes:
        program: Its file.
        folder: Where its profiles go.
    """

    program: str
    folder: Path

    @classmethod
    def find(cls, folder: Path) -> Browser | None:
        """Returns the browser of this machine, None where there is none."""
        program = next(filter(None, map(shutil.which, _NAMES)), None)
        return None if program is None else cls(program, folder)

    def open(self, page: Path) -> Opened:
        """Loads a page from its file."""
        # Chromium refuses to run as root in its sandbox.
        sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        profile = f"--user-data-dir={self.folder / 'profile'}"
        done = subprocess.run(
            [self.program, *_FLAGS, *sandbox, profile, "--dump-dom", page.resolve().as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return Opened(done.stdout, tuple(_CONSOLE.findall(done.stderr)))

    def layouts(self, page: Path, *widths: int) -> list[Layout]:
        """Lays a page out in windows of some widths."""
        text = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
        frames = self.folder / "frames.html"
        frames.write_text(_FRAMES.format(widths=list(widths), page=text), encoding="utf-8")
        answer = re.search(r'<pre id="found">(.*?)</pre>', self.open(frames).dom)
        assert answer is not None, "the page did not load in a frame"
        found: list[dict[str, Any]] = json.loads(html.unescape(answer[1]))
        return sorted((Layout(**each) for each in found), key=lambda each: each.width)
