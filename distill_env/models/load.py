"""From names and paths to models. Weights are loaded once per process; every caller gets a batch of its own."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from distill_env.models.base import TrainableModel


def load_model(name: str | Path, **kwargs: Any) -> TrainableModel:
    """A teacher by name, frozen. A second call with the same arguments shares its weights.

    Args:
        name: `sums` or `coins` (the shipped teachers), `markov` or `two_modes` (tables in closed form), a folder
            written by `save_pretrained`, a hub id, or the URL of a completions server.
        kwargs: arguments of the table, of `CausalLM.load` (vocab_size, dtype, device, ...), or of `ServedModel`.

    Raises:
        ValueError: if there is no such model.
    """
    model: Any = _weights(str(name), tuple(sorted(kwargs.items())))
    return model.fork()


@lru_cache(maxsize=8)
def _weights(name: str, kwargs: tuple[tuple[str, Any], ...]) -> Any:
    model = build_model(name, **dict(kwargs))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def build_model(name: str | Path, **kwargs: Any) -> Any:
    """The same with weights of its own, which may be trained."""
    from distill_env.models import tabular

    name = str(name)
    if is_served(name):
        from distill_env.models.served import ServedModel

        return ServedModel(name, **kwargs)
    if name in ("markov", "two_modes"):
        return getattr(tabular, name)(**kwargs)
    if (Path(name) / "table.safetensors").is_file():
        return tabular.TabularModel.load(name)
    from distill_env.models.causal_lm import CausalLM
    from distill_env.models.toy import TEACHERS

    return CausalLM.load(TEACHERS.get(name, name), **kwargs)


def is_served(name: str | Path) -> bool:
    """Whether the name is the URL of a server."""
    return str(name).startswith(("http://", "https://"))
