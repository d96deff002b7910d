"""What the tasks of language models share: from examples in words to prompts in token ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_env.models.hub import TokenizerName, load_tokenizer
from distill_env.tasks.base import SPLITS, Grade, Prompt, Split

FEWEST = 20  # examples that are split; fewer serve as every split


@dataclass(frozen=True)
class Example:
    """A question in words and what is known of its answer."""

    question: str
    solution: str | None = None  # a reference answer in words
    answer: str | None = None  # its final value
    difficulty: int = 0
    before: tuple[tuple[str, str], ...] = ()  # role and content of earlier messages of a conversation


class LanguageTask:
    """A tokenizer, its reasoning steps, and prompts by split.

    Args:
        tokenizer: folder or hub id.
        max_new_tokens: default horizon.
        max_prompt_tokens: longer prompts are left out; `dropped` counts them.
        step_pattern: a regular expression; a token whose own text it matches somewhere ends a reasoning step. By
            default a token with a newline does, so that a step is a line.
    """

    graded = False
    wording: Wording | None = None  # how questions are put; None: a prompt is plain text

    def __init__(
        self, tokenizer: TokenizerName, max_new_tokens: int, max_prompt_tokens: int | None, step_pattern: str
    ) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        self.vocab_size = len(self.tokenizer)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer: {str(tokenizer)!r} has no end-of-sequence token")
        self.eos_token_id = int(self.tokenizer.eos_token_id)
        self.step_end_ids = self._step_ends(step_pattern)
        self.max_new_tokens = max_new_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self.dropped = 0
        self._splits: dict[Split, tuple[Prompt, ...]] = {}
        self._solved: Sequence[Example] = ()  # what solved examples are taken from

    def _step_ends(self, pattern: str) -> frozenset[int]:
        try:
            ends = re.compile(pattern or "\n")
        except re.error as error:
            raise ValueError(f"step_pattern: {pattern!r} is no regular expression ({error})") from None
        pieces = self.tokenizer.batch_decode([[i] for i in range(self.vocab_size)])
        ids = frozenset(i for i, piece in enumerate(pieces) if ends.search(piece))
        if pattern and not ids:
            raise ValueError(f"step_pattern: no token's text matches {pattern!r}; it is matched against single tokens")
        return ids

    def _keep(self, prompts: Mapping[Split, Sequence[Prompt]]) -> None:
        """Take these prompts, but for those that are too long. Raises ValueError if none is left."""
        most = self.max_prompt_tokens
        for prompt in (p for ps in prompts.values() for p in ps if not p.ids):
            raise ValueError(f"task_path: the prompt {prompt.text[:40]!r} has no token; accepted: one at least")
        for split, all_of_it in prompts.items():
            self._splits[split] = tuple(p for p in all_of_it if most is None or len(p.ids) <= most)
        shared = len({id(p) for ps in prompts.values() for p in ps})
        kept = len({id(p) for ps in self._splits.values() for p in ps})
        self.dropped = shared - kept
        if not kept:
            shortest = min(len(p.ids) for ps in prompts.values() for p in ps)
            raise ValueError(
                f"max_prompt_tokens: {most}; accepted: at least {shortest}, the shortest of {shared} prompts"
            )

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        if split not in SPLITS:
            raise ValueError(f"split: {split!r}; accepted: {', '.join(SPLITS)}")
        return self._splits.get(split, ())

    def _ask(self, examples: Mapping[Split, Sequence[Example]], wording: Wording) -> None:
        """Take these examples, so worded."""
        self.wording, self._solved = wording, examples.get("train", ()) if wording.few_shot else ()
        self._keep(wording.encode(examples, self.tokenizer))

    def ask(self, texts: Sequence[str]) -> list[Prompt]:
        """Prompts of the user's own, put as the task puts its own."""
        if self.wording is None:
            ids = [self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
            return [Prompt(tuple(i), text) for i, text in zip(ids, texts, strict=True)]
        asked: dict[Split, Sequence[Example]] = {"train": self._solved, "test": [Example(text) for text in texts]}
        return self.wording.encode(asked, self.tokenizer)["test"]

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        return Grade(0.0, False, None)

    def decode(self, tokens: Sequence[int]) -> str:
        """Ids to text; special tokens and padding are not shown."""
        return str(self.tokenizer.decode([int(t) for t in tokens if t >= 0], skip_special_tokens=True))


@dataclass(frozen=True)
class Wording:
    """How examples are put to a model: as a conversation, or plainly between fixed words.

    Args:
        chat: use the tokenizer's chat template; None does so if it has one.
        few_shot: so many solved examples of the train split stand before each question.
        seed: of their choice; they are the same for all questions, but never the question itself.
        plain: a question, with what stands around it, if there is no chat.
        answer: an answer after that; questions and answers are separated by an empty line.
        request: is added to a question in a chat without solved examples.
    """

    chat: bool | None = None
    few_shot: int = 0
    seed: int = 0
    plain: str = "{}"
    answer: str = "{}"
    request: str = ""

    def encode(self, examples: Mapping[Split, Sequence[Example]], tokenizer: Any) -> dict[Split, list[Prompt]]:
        """Prompts in the examples' order. An example of two splits is one prompt.

        Raises:
            ValueError: for too few solved examples, or a chat without a template.
        """
        if self.chat and not tokenizer.chat_template:
            raise ValueError("chat: yes, but the tokenizer has no chat template; accepted: auto, no")
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        distinct = list({id(e): e for es in examples.values() for e in es}.values())
        shots = self._shots(examples.get("train", ()))
        texts = []
        for example in distinct:
            solved = [s for s in shots if s.question != example.question][: self.few_shot]
            texts.append(self._conversation(example, solved, tokenizer) if chat else self._plainly(example, solved))
        bare = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        ids = tokenizer(texts, add_special_tokens=not chat, **bare)["input_ids"]
        form = "{}" if chat else self.answer
        solutions = [form.format(e.solution) if e.solution else "" for e in distinct]
        references = tokenizer(solutions, add_special_tokens=False, **bare)["input_ids"]
        end = (tokenizer.eos_token_id,)
        prompts = {
            id(e): Prompt(tuple(i), e.question, e.difficulty, (*r, *end) if e.solution else None, e.answer)
            for e, i, r in zip(distinct, ids, references, strict=True)
        }
        return {split: [prompts[id(e)] for e in es] for split, es in examples.items()}

    def _shots(self, train: Sequence[Example]) -> list[Example]:
        """The chosen examples and one more, for the questions that are among them."""
        if self.few_shot < 0:
            raise ValueError(f"few_shot: {self.few_shot}; accepted: 0 or more")
        if self.few_shot == 0:
            return []
        solved = list({e.question: e for e in train if e.solution}.values())
        if len(solved) <= self.few_shot:
            raise ValueError(f"few_shot: {self.few_shot}; accepted: fewer than the {len(solved)} solved train examples")
        chosen = np.random.default_rng(self.seed).choice(len(solved), self.few_shot + 1, replace=False)
        return [solved[i] for i in chosen]

    def _conversation(self, example: Example, solved: Sequence[Example], tokenizer: Any) -> str:
        turns = [turn for s in solved for turn in (*s.before, ("user", s.question), ("assistant", str(s.solution)))]
        request = "" if solved else self.request
        turns += [*example.before, ("user", example.question + request)]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is a program, and raises what it likes
            said, roles = " ".join(str(error).split()), " ".join(role for role, _ in turns)
            raise ValueError(
                f"chat: the tokenizer's template refuses the roles {roles} ({type(error).__name__}: {said}); accepted: "
                "messages as it wants them, or no"
            ) from None

    def _plainly(self, example: Example, solved: Sequence[Example]) -> str:
        def question(e: Example) -> str:
            return "\n\n".join([*(content for _, content in e.before), self.plain.format(e.question)])

        return "\n\n".join([*(question(s) + self.answer.format(s.solution) for s in solved), question(example)])


def complete_splits(examples: Mapping[Split, Sequence[Example]]) -> dict[Split, list[Example]]:
    """Validation and test, where they are missing, are a tenth of train each, by a hash of the question, and leave it.
    If train has under `FEWEST` examples, or a tenth would be empty, all of train serves as what is missing."""
    found = {split: list(es) for split, es in examples.items()}
    train = found.get("train")
    missing: list[Split] = [s for s in ("validation", "test") if s not in found]
    if not train or not missing:
        return found
    parts: dict[Split, list[Example]] = {s: [] for s in ("train", *missing)}
    for example in train:
        split = _split_of(example.question)
        parts[split if split in parts else "train"].append(example)
    if len(train) < FEWEST or not all(parts.values()):
        parts = dict.fromkeys(parts, train)
    return found | parts


def _split_of(text: str) -> Split:
    bucket = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"
