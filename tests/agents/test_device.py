"""Models on a device: the tests of `helpers/on_stand_in_device.py`, in a process of their own."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.paths import HELPERS, REPOSITORY


def test_on_the_stand_in_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HELPERS / "on_stand_in_device.py")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
