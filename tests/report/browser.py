"""A headless Chromium that opens a local page and gives back what the page became."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .parsing import Node, page

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--enable-logging=stderr",
    "--v=0",
    "--window-size=1200,1600",
    "--virtual-time-budget=4000",
)


def find_browser() -> str | None:
    """The path of a Chromium or Chrome, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@dataclass
class Opened:
    """A page after its script ran: the tree, and what the browser wrote to the console."""

    root: Node
    console: list[str]


def open_page(browser: str, path: Path, fragment: str = "") -> Opened:
    """Open `path` (with a `#fragment`) in a fresh profile and dump the document."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        url = path.resolve().as_uri() + (f"#{fragment}" if fragment else "")
        command = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Opened(page(done.stdout), console)
