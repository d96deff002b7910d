"""Prompts: a JSONL or text file of prompts for any causal language model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_env.models.small import TEACHERS
from distill_env.tasks import Grade, Prompt, Split

PROMPT_KEYS = ("prompt", "instruction", "question", "text")
ANSWER_KEYS = ("completion", "output", "answer", "response")
EXAMPLE_PATH = Path(__file__).parents[1] / "data" / "example_prompts.txt"


def read_prompts(path: str | Path) -> list[dict[str, str]]:
    """Rows of a `.jsonl` or `.json` file, or the lines of a text file: `{"prompt": ..., "completion": ... or absent}`.

    Raises:
        ValueError: for a file that cannot be read so, in one line that names the file, the line and what is accepted.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts: {str(path)!r} is not a file; accepted: a text file, .jsonl or .json")
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".json", ".jsonl"):
        rows: list[Any] = [{"prompt": line} for line in text.splitlines() if line.strip()]
    else:
        try:
            if path.suffix == ".json":
                rows = json.loads(text)
            else:
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts: {str(path)!r} is not valid {path.suffix}: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"prompts: {str(path)!r} holds no prompts")
    return [_read_row(row, f"{path}, row {i + 1}") for i, row in enumerate(rows)]


def _read_row(row: Any, where: str) -> dict[str, str]:
    if not isinstance(row, dict):
        raise ValueError(f"prompts: {where}: an object is expected, with one of the keys {', '.join(PROMPT_KEYS)}")
    prompt = next((row[key] for key in PROMPT_KEYS if isinstance(row.get(key), str)), None)
    if not prompt:
        raise ValueError(f"prompts: {where}: none of the keys {', '.join(PROMPT_KEYS)} holds a text")
    if isinstance(row.get("input"), str) and row["input"]:
        prompt = f"{prompt}\n\n{row['input']}"
    completion = next((row[key] for key in ANSWER_KEYS if isinstance(row.get(key), str)), None)
    return {"prompt": prompt} | ({"completion": completion} if completion else {})


class PromptsTask:
    """Prompts of a file, tokenised once with the teacher's tokenizer.

    The split is by a hash of the prompt: a tenth each for validation and test (`ood` is empty), the rest trains. A
    file too small for that (under 20 prompts) serves all three.

    Args:
        path: text file (a prompt a line), `.jsonl` or `.json` (rows with `prompt` or `instruction` and maybe `input`,
            and maybe `completion` or `output`).
        tokenizer: folder or hub id.
        chat_template: wrap prompts as user messages; None does so if the tokenizer has a template.
        max_new_tokens: default horizon.
        max_prompt_tokens: longer prompts are an error, unless `drop_long` leaves them out.
    """

    graded = False

    def __init__(
        self,
        path: str | Path = EXAMPLE_PATH,
        tokenizer: str | Path = TEACHERS["sums"],
        chat_template: bool | None = None,
        max_new_tokens: int = 48,
        max_prompt_tokens: int | None = None,
        drop_long: bool = False,
    ) -> None:
        from distill_env.models.load import load_tokenizer

        self.tokenizer = load_tokenizer(tokenizer)
        self.vocab_size = len(self.tokenizer)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer: {str(tokenizer)!r} has no end-of-sequence token")
        self.eos_token_id = int(self.tokenizer.eos_token_id)
        pieces = self.tokenizer.batch_decode([[i] for i in range(self.vocab_size)])
        self.step_end_ids = frozenset(i for i, piece in enumerate(pieces) if "\n" in piece)
        self.max_new_tokens = max_new_tokens
        chat = bool(self.tokenizer.chat_template) if chat_template is None else chat_template
        self._splits: dict[Split, list[Prompt]] = {"train": [], "validation": [], "test": [], "ood": []}
        rows = read_prompts(path)
        for i, row in enumerate(rows):
            ids = self._encode(row["prompt"], chat)
            if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
                if drop_long:
                    continue
                raise ValueError(
                    f"prompts: prompt {i + 1} has {len(ids)} tokens, more than max_prompt_tokens = {max_prompt_tokens}"
                    "; shorten it, raise the limit or drop long prompts"
                )
            completion = row.get("completion")
            reference = None
            if completion is not None:
                encoded = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
                reference = (*encoded, self.eos_token_id)
            prompt = Prompt(ids, row["prompt"], reference=reference)
            self._splits[_split_of(row["prompt"])].append(prompt)
        everything = [p for split in self._splits.values() for p in split]
        if not everything:
            raise ValueError(f"prompts: no prompt of {str(path)!r} has at most {max_prompt_tokens} tokens")
        if len(everything) < 20 or not all(self._splits[s] for s in ("train", "validation", "test")):
            self._splits = {"train": everything, "validation": everything, "test": everything, "ood": []}

    def _encode(self, text: str, chat: bool) -> tuple[int, ...]:
        if chat:
            message = [{"role": "user", "content": text}]
            rendered = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            return tuple(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])
        return tuple(self.tokenizer(text)["input_ids"])

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return tuple(self._splits[split])

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        return Grade(0.0, False, False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Ids to text; special tokens and padding are not shown."""
        return str(self.tokenizer.decode([int(t) for t in tokens if t >= 0], skip_special_tokens=True))


def _split_of(text: str) -> Split:
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"
