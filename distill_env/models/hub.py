"""Around Transformers and the Hugging Face hub: tokenizers, optional packages, progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distill_env.models.names import base_and_adapter


@dataclass(frozen=True)
class TokenizerSource:
    """A folder or hub id of a tokenizer, how it is read, and what it gets instead of its own."""

    name: str
    gguf_file: str = ""
    trust_remote_code: bool = False
    chat_template: str = ""  # file with a Jinja template
    eos_token: str = ""

    def __str__(self) -> str:
        return self.name


TokenizerName = str | Path | TokenizerSource | Any  # the last one is a tokenizer itself


def load_tokenizer(source: TokenizerName) -> Any:
    """The tokenizer of a folder or hub id; a tokenizer is returned as it is.

    Raises:
        ValueError: if there is none.
    """
    return source if hasattr(source, "get_vocab") else _read_tokenizer(source)


@lru_cache(maxsize=8)
def _read_tokenizer(source: str | Path | TokenizerSource) -> Any:
    from transformers import AutoTokenizer

    parts = base_and_adapter(str(source))
    name = parts[0] if parts else str(source)  # an adapter's folder may have its own
    options: dict[str, Any] = {}
    if isinstance(source, TokenizerSource):
        options = {"trust_remote_code": source.trust_remote_code}
        options |= {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # its type depends on the damage
        raise ValueError(
            f"tokenizer: {name!r} cannot be loaded; expected a folder with a tokenizer or a hub id ({reason_of(error)})"
        ) from None
    if isinstance(source, TokenizerSource) and source.chat_template:
        tokenizer.chat_template = _read_template(Path(source.chat_template))
    if isinstance(source, TokenizerSource) and source.eos_token:
        if source.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token: {source.eos_token!r} is not in the vocabulary of {name!r}; expected a token")
        tokenizer.eos_token = source.eos_token
    return tokenizer


def _read_template(path: Path) -> str:
    try:
        template = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"chat_template: {str(path)!r} cannot be read ({reason}); expected a Jinja template") from None
    if not template.strip():
        raise ValueError(f"chat_template: {str(path)!r} is empty; expected a Jinja template")
    return template


def id_range(tokenizer: Any) -> int:
    """The largest id of a tokenizer, plus one. There may be fewer entries: ids may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def absent_ids(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids below `vocab_size` that no entry of the tokenizer has, ascending."""
    return tuple(sorted({*range(vocab_size)} - {*tokenizer.get_vocab().values()}))


def reason_of(error: Exception) -> str:
    """The text of an error in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def require(package: str, argument: str, extra: str) -> None:
    """Raise ValueError, with what to install, if a package that this argument needs is missing."""
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise ValueError(f"{argument} needs the package {name}; install it with pip install 'distill-env[{extra}]'")


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without Transformers' progress bars for each file that it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
