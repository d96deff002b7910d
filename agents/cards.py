"""What the model cards of all students have, and the card of a student that Python code made."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

import distill_env

CARD = """{front_matter}

# {title}

A student of `{teacher}`, which began as `{student}`, distilled by `{method}` of distill_env.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

student = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```

## Settings

| | |
| --- | --- |
{settings}

## Versions

{versions}
"""


def card(path: Path, student: str, teacher: str, method: str, settings: Mapping[str, Any]) -> str:
    """`README.md` of a student.

    Args:
        path: of its folder.
        student, teacher: names of the models.
        method: its name.
        settings: by name.
    """
    rows = "\n".join(f"| `{name}` | {value} |" for name, value in settings.items())
    parts = {"front_matter": front_matter(student, method), "title": path.name, "path": path, "settings": rows}
    return CARD.format(student=student, teacher=teacher, method=method, versions=versions(), **parts)


def front_matter(student: str, method: str, transformer: bool = True, licence: str = "") -> str:
    """YAML between dashes. A licence or a base model that is not known is left out; the hub refuses a wrong one.

    Args:
        student: folder or hub id of the initial student; empty for a new one.
        method: the name of what trained it.
        transformer: whether it is a Transformers model.
        licence: of the initial weights; empty for that in the model card beside them.
    """
    data = ModelCardData(
        license=licence or _licence_beside(student),
        library_name="transformers" if transformer else None,
        pipeline_tag="text-generation" if transformer else None,
        base_model=student if student and not Path(student).exists() else None,
        tags=["distill-env", "distillation", method],
    )
    return f"---\n{data.to_yaml()}\n---"


def _licence_beside(student: str) -> str | None:
    with suppress(OSError, ValueError, yaml.YAMLError):
        return (metadata_load(Path(student) / "README.md") or {}).get("license")
    return None


def versions(*more: str) -> str:
    """Versions of the packages that the weights depend on; `more` are further ones."""
    own = [f"distill_env {distill_env.__version__}", f"Python {platform.python_version()}"]
    return ", ".join([*own, *(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", *more))])
