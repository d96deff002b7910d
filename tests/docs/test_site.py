"""The documentation builds without a warning, and reading it needs no network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import REPOSITORY

pytestmark = pytest.mark.docs
# What a browser fetches by itself: scripts, styles, fonts, pictures, frames; not links that a reader follows.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|audio|video)[^>]+\bsrc=["'](?:https?:)?//[^"']+"""
    r"""|<link(?=[^>]+\brel=["'](?:stylesheet|preload|preconnect|icon|modulepreload))[^>]+\bhref=["'](?:https?:)?//[^"']+"""
    r"""|@import\s+(?:url\()?["']?(?:https?:)?//[^"')]+|url\(["']?(?:https?:)?//[^"')]+""",
    re.I,
)


def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs mkdocs, extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fetched = {}
    for path in (tmp_path / "site").rglob("*"):
        if path.suffix in (".html", ".css"):
            fetched |= {str(path.name): match[0] for match in FETCHED.finditer(path.read_text())}
    assert fetched == {}
    assert (tmp_path / "site/environment.html").read_text().count("rewrite_cost")  # the manual of the class is there


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://unpkg.com/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css?family=Roboto">',
        '<link href="//fonts.gstatic.com" rel="preconnect">',
        "@font-face{src:url(https://fonts.gstatic.com/x.woff2)}",
    ],
)
def test_what_is_fetched_would_be_seen(text: str) -> None:
    assert FETCHED.search(text)
    assert not FETCHED.search(
        '<a href="https://gymnasium.farama.org">Gymnasium</a><link rel="canonical" href="https://x.y">'
    )
