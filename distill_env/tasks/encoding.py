"""From texts to token ids as a model reads them: what a tokenizer puts before a text, and what follows a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# contexts in which a text is tokenised whose own context would merge with its beginning
NEUTRAL = ("\n", "a", "0", "|")


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without the special tokens that the tokenizer adds."""
    if not texts:
        return []
    bare = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    ids: list[list[int]] = tokenizer(list(texts), **bare, verbose=False)["input_ids"]
    return ids


def opening(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts before every text, such as a beginning-of-sequence token."""
    for text in ("a", "0", "+"):  # one that is no unknown token
        whole, (bare,) = tokenizer(text)["input_ids"], token_ids(tokenizer, [text])
        if bare and not {*bare} & {*tokenizer.all_special_ids}:
            return tuple(whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)])
    return ()


def continuations(tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text after its prompt.

    A tokenizer may put a mark before every text, so a text alone may begin otherwise than after a prompt: both are
    tokenised together, and the prompt's ids are cut off. Where the last letters of a prompt and the first of a text are
    one token, this is impossible; such a text is tokenised after another one.
    """
    ids = _after(tokenizer, prompts, texts)
    for context in NEUTRAL:
        left = [i for i, found in enumerate(ids) if found is None]
        for i, found in zip(left, _after(tokenizer, [context] * len(left), [texts[i] for i in left]), strict=True):
            ids[i] = found
    return [token_ids(tokenizer, [text])[0] if found is None else found for found, text in zip(ids, texts, strict=True)]


def _after(tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]) -> list[list[int] | None]:
    """The ids of each text after its prompt; None where one token holds the end of the prompt and more."""
    before = token_ids(tokenizer, prompts)
    both = token_ids(tokenizer, [prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    return [ids[len(b) :] if ids[: len(b)] == b else None for b, ids in zip(before, both, strict=True)]
