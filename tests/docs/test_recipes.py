"""The recipes for other libraries run, each where its library is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_code_blocks import Block, blocks_of
from tests.helpers.paths import REPOSITORY

PAGE = REPOSITORY / "docs/reinforcement_learning.md"
NEEDS = "skip, needs "
RECIPES = [b for b in blocks_of(PAGE) if b.language == "python" and b.directive.startswith(NEEDS)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.directive.removeprefix(NEEDS))
def test_a_recipe_runs(recipe: Block, tmp_path: Path) -> None:
    library = recipe.directive.removeprefix(NEEDS)
    found = subprocess.run([sys.executable, "-c", f"import {library}"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"needs {library}")
    script = tmp_path / "recipe.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{recipe.code}")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_recipe_fits_on_a_screen() -> None:
    assert len(RECIPES) >= 4
    assert all(len(recipe.code.strip().splitlines()) <= 15 for recipe in RECIPES)
