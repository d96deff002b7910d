"""One thread a process: the models of the tests are small, and the processes of pytest-xdist share the cores."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of DISTILL_DATA: gsm8k/, math500/, svamp/, wikitext2/ and others, as their authors publish them."""
    folder = Path(os.environ.get("DISTILL_DATA", "."))
    if not (folder / "gsm8k/train.jsonl").is_file():
        pytest.skip("needs real data: set DISTILL_DATA to a folder with gsm8k/train.jsonl and others")
    return folder
