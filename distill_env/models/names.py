"""What a name stands for: a model, the folder of an adapter, or BASE+ADAPTER. Light to import."""

from __future__ import annotations

import json
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"  # peft's name
ADAPTERS = {"word_problems": Path(__file__).parents[1] / "data" / "word_problems_teacher"}  # where trained adapters are


def is_adapter(path: str | Path) -> bool:
    """Whether this is the folder of an adapter, by itself."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def base_and_adapter(name: str | Path) -> tuple[str, Path] | None:
    """The two parts of BASE+ADAPTER, the adapter merged into the base; None for any other name.

    Raises:
        ValueError: if what follows the last plus is no adapter, or for the name of an adapter alone.
    """
    if str(name) in ADAPTERS and not Path(name).exists():
        raise ValueError(f"teacher: {str(name)!r} is an adapter; expected BASE+{name} with the folder of its base")
    base, plus, last = str(name).rpartition("+")
    if not plus or "://" in base or Path(name).exists():
        return None
    adapter = ADAPTERS.get(last, Path(last))
    if not is_adapter(adapter):
        expected = f"a folder with {ADAPTER_CONFIG} or {', '.join(ADAPTERS)}"
        if last in ADAPTERS:
            expected = "that experiments/making/train_word_teacher.py has trained it"
        raise ValueError(f"adapter: {last!r} in {str(name)!r}; expected {expected}")
    return base, adapter


def base_of(name: str | Path) -> str:
    """The name of an adapter's base model; any other name is returned as it is."""
    if parts := base_and_adapter(name):
        return parts[0]
    if not is_adapter(name):
        return str(name)
    return str(json.loads((Path(name) / ADAPTER_CONFIG).read_text())["base_model_name_or_path"])
