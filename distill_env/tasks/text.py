"""Open text: the student continues passages of a corpus."""

from __future__ import annotations

from pathlib import Path

from distill_env.models.hub import TokenizerName
from distill_env.tasks.base import Prompt, Split
from distill_env.tasks.encoding import opening, token_ids
from distill_env.tasks.language import LanguageTask
from distill_env.tasks.sources import Data, HubTable, columns_of, find_files, kind_of, read_file, read_rows, read_text

HUB: HubTable = {
    split: ("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in ("train", "validation", "test")
}


class TextTask(LanguageTask):
    """Consecutive passages of a corpus: their first tokens are the prompt, the next ones the reference completion.

    Nothing is graded. Missing validation and test splits are the last tenths of train.

    Args:
        path: see `sources.read_rows`; a text file is one text, other rows have a `text`. Empty: WikiText-2 of the hub.
        prompt_tokens: length of a prompt, without the beginning-of-sequence token that some tokenizers put before it.
        tokenizer, max_new_tokens, max_prompt_tokens, step_pattern, vocab_size: see `LanguageTask`; max_new_tokens is
            also the length of the reference completions.
    """

    def __init__(
        self,
        tokenizer: TokenizerName,
        path: Data = "",
        prompt_tokens: int = 32,
        max_new_tokens: int = 48,
        max_prompt_tokens: int | None = None,
        step_pattern: str = "",
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(tokenizer, max_new_tokens, max_prompt_tokens, step_pattern, vocab_size)
        if prompt_tokens < 1:
            raise ValueError(f"prompt_tokens: {prompt_tokens}; expected at least 1")
        passage, begin = prompt_tokens + max_new_tokens, opening(self.tokenizer)
        prompts: dict[Split, list[Prompt]] = {}
        for split, text in read_corpus(path).items():
            (ids,) = token_ids(self.tokenizer, [text])
            cut = [ids[i : i + passage] for i in range(0, len(ids) - passage + 1, passage)]
            if not cut:
                raise ValueError(f"path: the {split} text has {len(ids)} tokens; expected at least {passage}")
            parts = [((*begin, *p[:prompt_tokens]), tuple(p[prompt_tokens:])) for p in cut]
            prompts[split] = [Prompt(p, self.decode(p), reference_completion=completion) for p, completion in parts]
        self._set_prompts(_complete(prompts))


def read_corpus(path: Data) -> dict[Split, str]:
    """The text of each split. Raises ValueError as `sources.read_rows` does, and for rows without a `text`."""
    if not isinstance(path, str | Path) or not path or not Path(path).exists():
        parts = {s: [_text_of(*row) for row in rows] for s, rows in read_rows(path, HUB).items()}
    else:
        parts = {s: [t for f in files for t in _texts(f)] for s, files in find_files(path).items()}
    return {split: "\n\n".join(texts) for split, texts in parts.items()}


def _texts(file: Path) -> list[str]:
    return [read_text(file)] if kind_of(file) == ".txt" else [_text_of(*row) for row in read_file(file)]


def _text_of(where: object, row: dict[str, object]) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise ValueError(f"path: {where}: the columns are {columns_of(row)}; expected the column text")
    return text


def _complete(prompts: dict[Split, list[Prompt]]) -> dict[Split, list[Prompt]]:
    """With the last tenths of train as the missing splits; all of train if it is too short."""
    train, tenth = prompts.get("train", []), len(prompts.get("train", [])) // 10
    missing: list[Split] = [s for s in ("validation", "test") if s not in prompts]
    if tenth == 0:
        return prompts | dict.fromkeys(missing, train)
    parts: dict[Split, list[Prompt]] = {}
    for split in reversed(missing):
        train, parts[split] = train[:-tenth], train[-tenth:]
    return prompts | parts | {"train": train}
