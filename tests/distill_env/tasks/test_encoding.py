"""Texts become the ids that a model reads: a reference as it stands after its prompt, and what opens every text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from distill_env.tasks.encoding import continuations, opening, token_ids
from distill_env.tasks.registry import make_task

CHAT = "<s>{% for m in messages %}[{{ m.content }}]{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
SYMBOLS = ["<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz.:[]\nHQ0|", "He", "▁He", "d.", "\n\n"]
MERGES = [("H", "e"), ("▁", "He"), ("d", "."), ("\n", "\n")]


def sentencepiece(chat: str | None = None, end: bool = False) -> Any:
    """A tokenizer that marks the beginning of every text as a space, and puts `<s>` before it, as Llama's does."""
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(SYMBOLS)}, MERGES))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=chat)


def symbols(ids: Any) -> list[str]:
    return [SYMBOLS[i] for i in ids]


def write(folder: Path, tokenizer: Any, **row: str) -> dict[str, str]:
    tokenizer.save_pretrained(folder)
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    return {"path": str(folder / "train.jsonl"), "tokenizer": str(folder)}


@pytest.mark.parametrize(("template", "prompt"), [(CHAT, "<s> ▁ [ a s k ]"), (None, "<s> ▁ a s k")])
def test_a_reference_has_the_ids_that_it_has_after_its_prompt(
    template: str | None, prompt: str, tmp_path: Path
) -> None:
    """Alone it would begin with a mark of its own."""
    tokenizer = sentencepiece(template)
    assert symbols(token_ids(tokenizer, ["He"])[0]) == ["▁He"]
    task = make_task("instruct", **write(tmp_path, tokenizer, prompt="ask", completion="He"))
    (read,) = task.prompts("train")
    assert symbols(read.ids) == prompt.split(" ")
    assert symbols(read.reference_completion) == ["He", "</s>"]


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("good", "He", ["He"]),
        ("good", " He", ["▁He"]),
        ("good", ". He", [".", "▁He"]),  # the prompt's last letter and the point would be one token
        ("good\n", "\nHe", ["\n", "He"]),  # and so would two line ends, also after another line end
        ("good", "", []),
    ],
)
def test_a_text_after_a_prompt(prompt: str, text: str, expected: list[str]) -> None:
    (ids,) = continuations(sentencepiece(), [prompt], [text])
    assert symbols(ids) == expected


@pytest.mark.parametrize("end", [False, True])
def test_every_text_begins_as_the_tokenizer_begins_it(end: bool, tmp_path: Path) -> None:
    """And ends where it ends: a prompt has no end token, whatever the tokenizer adds."""
    tokenizer = sentencepiece(end=end)
    assert symbols(opening(tokenizer)) == ["<s>"]
    where = write(tmp_path, tokenizer, text="abcdefgh" * 30)
    text: Any = make_task("text", **where, prompt_tokens=3, max_new_tokens=2)
    passages = [p for split in ("train", "validation", "test") for p in text.prompts(split)]
    assert {symbols(p.ids)[0] for p in passages} == {"<s>"}
    assert {len(p.ids) for p in passages} == {4}
    assert {len(p.reference_completion or ()) for p in passages} == {2}
    assert symbols(text.make_prompts(["ab"])[0].ids) == ["<s>", "▁", "a", "b"]
    (prompt,) = make_task("instruct", **where | {"path": _questions(tmp_path)}).prompts("train")
    assert symbols(prompt.ids) == ["<s>", "▁", "a", "b"]


def _questions(folder: Path) -> str:
    (folder / "questions.txt").write_text("ab\n")
    return str(folder / "questions.txt")


def test_a_tokenizer_that_adds_nothing_has_no_opening() -> None:
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert opening(tokenizer) == ()
