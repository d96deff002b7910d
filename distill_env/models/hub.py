"""Tokenizers, by folder or hub id."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer is read from, if a name does not say it all."""

    name: str
    gguf_file: str = ""
    trust_remote_code: bool = False

    def __str__(self) -> str:
        return self.name


TokenizerName = str | Path | TokenizerSource


@lru_cache(maxsize=8)
def load_tokenizer(source: TokenizerName) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoTokenizer

    name = str(source)
    options: dict[str, Any] = {}
    if isinstance(source, TokenizerSource):
        options = {"trust_remote_code": source.trust_remote_code}
        options |= {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # what Transformers raises differs with the damage
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"tokenizer: {name!r} is no folder with a tokenizer and no hub id: {reason}") from None
