"""The report in a browser: Chromium without a window, as wide as a desk and as a phone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from experiments.reporting.page import to_html
from tests.experiments.reporting.test_report import HOSTILE, hostile_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the path (apt-get install chromium)")

# What a reader does, and what the page then is; the outcome is left in the title of the page around it.
PROBE = """
<script>
const tokens = [...document.querySelectorAll(".text .token")], tip = document.querySelector(".tip");
const column = (table, i) => [...table.tBodies[0].rows].map((row) => row.cells[i].dataset.value ?? null);
const table = document.getElementById("contenders-table");
const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.startsWith("correct chains"));
table.tHead.rows[0].cells[at].firstElementChild.click();
const falling = column(table, at);
table.tHead.rows[0].cells[at].firstElementChild.click();
const rising = column(table, at);
tokens[2].focus();
const shown = { hidden: tip.hidden, text: tip.textContent, inside: tip.getBoundingClientRect().right <= innerWidth };
tokens[2].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
const moved = document.activeElement === tokens[3];
tokens[3].dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
const closed = tip.hidden;
tokens[1].click();
parent.document.title = JSON.stringify({
  width: innerWidth, page: document.documentElement.scrollWidth, hacked: "hacked" in window, falling, rising, shown,
  moved, closed, tapped: !tip.hidden, texts: tokens.map((t) => t.textContent), scripts: document.scripts.length,
  classes: tokens.slice(0, 4).map((t) => t.className), images: document.images.length,
  pictures: [...document.querySelectorAll(".svg svg")].map((s) => s.getBoundingClientRect().width),
});
</script>
"""


def browse(page: Path, *flags: str) -> str:
    """Open a page, and what the browser prints."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # Chromium's sandbox refuses root
    done = subprocess.run([*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


@pytest.mark.parametrize("width", [1200, 360])
def test_the_page_works_in_a_browser(width: int, tmp_path: Path) -> None:
    """In a frame of that width, since no window is as narrow as a phone."""
    inner = html.escape(to_html(hostile_page()).replace("</body>", PROBE + "</body>"))
    frame = f'<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{inner}"></iframe>'
    page = tmp_path / "frame.html"
    page.write_text(f"<!doctype html><title>nothing</title>{frame}", encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browse(page, "--window-size=1300,1000", "--dump-dom"), re.DOTALL)
    assert title is not None
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    assert found["width"] == width
    assert found["page"] == width  # wide tables scroll in their own box
    assert not found["hacked"]
    assert (found["scripts"], found["images"]) == (3, 0)
    assert found["texts"][:3] == ["7", HOSTILE, HOSTILE]
    assert ["hard" in c for c in found["classes"]] == [False, False, True, True]
    assert ["rewritten" in c for c in found["classes"]] == [False, False, True, False]
    numbers = [float(v) for v in found["falling"] if v is not None]
    assert len(numbers) > 2
    assert numbers == sorted(numbers, reverse=True)
    assert found["rising"] == [*map(str, sorted(numbers)), *[None] * (len(found["rising"]) - len(numbers))]
    assert not found["shown"]["hidden"]
    assert found["shown"]["inside"]
    assert "0.800 nats" in found["shown"]["text"]
    assert HOSTILE in found["shown"]["text"]
    assert (found["moved"], found["closed"], found["tapped"]) == (True, True, True)
    assert found["pictures"]
    assert all(0 < w <= width for w in found["pictures"])


@pytest.mark.parametrize("width", [1200, 360])
def test_a_screenshot_is_not_blank(width: int, tmp_path: Path) -> None:
    from PIL import Image

    page, picture = tmp_path / "report.html", tmp_path / "screen.png"
    page.write_text(to_html(hostile_page()), encoding="utf-8")
    browse(page, f"--window-size={width},900", f"--screenshot={picture}")
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1_000_000)
        assert image.width == width
    assert colours is not None
    assert len(colours) > 100
