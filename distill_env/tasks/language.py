"""What the tasks of language models share: from examples as text to prompts as token ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from distill_env.models.hub import TokenizerName, id_range, load_tokenizer, reason_of
from distill_env.tasks.base import SPLITS, Grade, Prompt, Split
from distill_env.tasks.encoding import continuations, opening, token_ids
from distill_env.tasks.sources import Data, HubTable, read_rows

SMALLEST_TRAIN = 20  # examples; a smaller train split is used as validation and test, too


@dataclass(frozen=True)
class Example:
    """A question as text, with its reference completion and final answer if the data has them."""

    question: str
    solution: str | None = None  # the reference completion as text
    final_answer: str | None = None
    difficulty: int = 0
    before: tuple[tuple[str, str], ...] = ()  # role and content of the conversation's earlier messages


class LanguageTask:
    """A tokenizer, its reasoning steps, and prompts by split.

    Args:
        tokenizer: folder or hub id.
        max_new_tokens: default horizon.
        max_prompt_tokens: longer prompts are left out; `dropped` counts them.
        step_pattern: a regular expression; a token whose text contains a match ends a reasoning step. By default a
            token with a newline does, so that a step is a line.
        vocab_size: the number of ids that the models share, of which no prompt may have a higher one; by default the
            tokenizer's largest id + 1.
    """

    graded = False
    wording: Wording | None = None  # how questions become prompts; None: a prompt is plain text

    def __init__(
        self,
        tokenizer: TokenizerName,
        max_new_tokens: int,
        max_prompt_tokens: int | None,
        step_pattern: str,
        vocab_size: int | None = None,
    ) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        self.vocab_size = id_range(self.tokenizer) if vocab_size is None else vocab_size
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer: {str(tokenizer)!r} has no end-of-sequence token")
        self.eos_token_id = int(self.tokenizer.eos_token_id)
        self.step_end_ids = self._step_ends(step_pattern)
        self.max_new_tokens = max_new_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self.dropped = 0
        self._splits: dict[Split, tuple[Prompt, ...]] = {}
        self._train: Sequence[Example] = ()  # the examples that few-shot prompts show

    def _step_ends(self, pattern: str) -> frozenset[int]:
        try:
            ends = re.compile(pattern or "\n")
        except re.error as error:
            raise ValueError(f"step_pattern: {pattern!r}; expected a regular expression ({error})") from None
        every = sorted(i for i in self.tokenizer.get_vocab().values() if i < self.vocab_size)
        pieces = self.tokenizer.batch_decode([[i] for i in every])
        ids = frozenset(i for i, piece in zip(every, pieces, strict=True) if ends.search(piece))
        if pattern and not ids:
            raise ValueError(f"step_pattern: {pattern!r} matches no token; expected a match in the text of one")
        return ids

    def _set_prompts(self, prompts: Mapping[Split, Sequence[Prompt]]) -> None:
        """Use these prompts, without those that are too long.

        Raises:
            ValueError: if none remains, or for one that has no token or a token that the models do not have.
        """
        most = self.max_prompt_tokens
        lengths = {id(p): len(p.ids) for ps in prompts.values() for p in ps}  # a prompt may be in several splits
        for prompt in (p for ps in prompts.values() for p in ps if not p.ids):
            raise ValueError(f"path: the prompt {prompt.text[:40]!r} has no token; expected at least one")
        for prompt in {id(p): p for ps in prompts.values() for p in ps}.values():
            highest = max(*prompt.ids, *(prompt.reference_completion or ()), 0)
            if highest >= self.vocab_size:
                raise ValueError(
                    f"path: {prompt.text[:40]!r} has the token {self.tokenizer.convert_ids_to_tokens(highest)!r}, id "
                    f"{highest}, which the models do not have; expected text without it"
                )
        for split, all_prompts in prompts.items():
            self._splits[split] = tuple(p for p in all_prompts if most is None or len(p.ids) <= most)
        self.dropped = 0 if most is None else sum(length > most for length in lengths.values())
        if self.dropped == len(lengths):
            raise ValueError(
                f"max_prompt_tokens: {most}; expected at least {min(lengths.values())}, the length of the shortest of "
                f"{len(lengths)} prompts"
            )

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        if split not in SPLITS:
            raise ValueError(f"split: {split!r} is unknown; expected one of {', '.join(SPLITS)}")
        return self._splits.get(split, ())

    def _set_examples(self, examples: Mapping[Split, Sequence[Example]], wording: Wording) -> None:
        """Use the prompts of these examples."""
        self.wording, self._train = wording, examples.get("train", ()) if wording.few_shot else ()
        self._set_prompts(wording.encode(examples, self.tokenizer))

    def make_prompts(self, texts: Sequence[str | Example]) -> list[Prompt]:
        """Prompts from the user's texts or examples, worded as the task's own."""
        if self.wording is None:
            plain = [x.question if isinstance(x, Example) else x for x in texts]
            begin, ids = opening(self.tokenizer), token_ids(self.tokenizer, plain)
            return [Prompt((*begin, *i), text) for i, text in zip(ids, plain, strict=True)]
        asked = [x if isinstance(x, Example) else Example(x) for x in texts]
        examples: dict[Split, Sequence[Example]] = {"train": self._train, "test": asked}
        return self.wording.encode(examples, self.tokenizer)["test"]

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        return Grade(0.0, False, None)

    def decode(self, tokens: Sequence[int]) -> str:
        """Ids to text; special tokens and padding are not shown."""
        return str(self.tokenizer.decode([int(t) for t in tokens if t >= 0], skip_special_tokens=True))


class ExampleTask(LanguageTask):
    """Prompts from rows of data. A subclass defines `read_row`, and may have data and words of its own.

    Args:
        tokenizer: folder or hub id.
        path: see `sources.read_rows`; missing validation and test splits are split off train.
        chat, few_shot, seed: see `Wording`.
        max_new_tokens: default horizon; None for the task's own.
        max_prompt_tokens, step_pattern, vocab_size: see `LanguageTask`.

    Raises:
        ValueError: for damaged data, or an argument out of range.
    """

    hub: ClassVar[HubTable] = {}  # the data without a path
    horizon = 256
    plain, solution, request = "{}", "{}", ""  # see `Wording`
    read_row: Callable[[str, dict[str, Any]], Example]  # from a row's place, for messages, and its columns

    def __init__(
        self,
        tokenizer: TokenizerName,
        path: Data = "",
        chat: bool | None = None,
        few_shot: int = 0,
        seed: int = 0,
        max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        step_pattern: str = "",
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(tokenizer, max_new_tokens or self.horizon, max_prompt_tokens, step_pattern, vocab_size)
        rows = read_rows(path, self.hub)
        examples = {split: [self.read_row(*row) for row in part] for split, part in rows.items()}
        wording = Wording(chat, few_shot, seed, self.plain, self.solution, self.request)
        self._set_examples(complete_splits(examples), wording)


@dataclass(frozen=True)
class Wording:
    """How examples become prompts: as a conversation, or as plain text.

    Args:
        chat: use the tokenizer's chat template; None uses it if there is one.
        few_shot: number of solved examples of the train split before each question.
        seed: of their choice; they are the same for all questions, but never the question itself.
        plain: format of a question in plain text.
        solution: format of the solution after it; questions and solutions are separated by an empty line.
        request: added to a question in a chat without solved examples.
    """

    chat: bool | None = None
    few_shot: int = 0
    seed: int = 0
    plain: str = "{}"
    solution: str = "{}"
    request: str = ""

    def encode(self, examples: Mapping[Split, Sequence[Example]], tokenizer: Any) -> dict[Split, list[Prompt]]:
        """Prompts in the order of the examples. An example that is in two splits is one prompt.

        Raises:
            ValueError: for too few solved examples, or a chat without a template.
        """
        if self.chat and not tokenizer.chat_template:
            raise ValueError("chat: the tokenizer has no chat template; expected one, or prompts without a chat")
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        distinct = list({id(e): e for es in examples.values() for e in es}.values())
        shots = self._shots(examples.get("train", ()))
        texts = []
        for example in distinct:
            solved = [s for s in shots if s.question != example.question][: self.few_shot]
            texts.append(self._conversation(example, solved, tokenizer) if chat else self._plainly(example, solved))
        begin, ids = () if chat else opening(tokenizer), token_ids(tokenizer, texts)
        form = "{}" if chat else self.solution
        solutions = [form.format(e.solution) if e.solution else "" for e in distinct]
        references = continuations(tokenizer, texts, solutions)
        end = (tokenizer.eos_token_id,)
        prompts = {
            id(e): Prompt((*begin, *i), e.question, e.difficulty, (*r, *end) if e.solution else None, e.final_answer)
            for e, i, r in zip(distinct, ids, references, strict=True)
        }
        return {split: [prompts[id(e)] for e in es] for split, es in examples.items()}

    def _shots(self, train: Sequence[Example]) -> list[Example]:
        """The chosen examples, and one more in place of a question that is among them."""
        if self.few_shot < 0:
            raise ValueError(f"few_shot: {self.few_shot}; expected at least 0")
        if self.few_shot == 0:
            return []
        solved = list({e.question: e for e in train if e.solution}.values())
        if len(solved) <= self.few_shot:
            raise ValueError(f"few_shot: {self.few_shot}; expected fewer than the {len(solved)} solved train examples")
        chosen = np.random.default_rng(self.seed).choice(len(solved), self.few_shot + 1, replace=False)
        return [solved[i] for i in chosen]

    def _conversation(self, example: Example, solved: Sequence[Example], tokenizer: Any) -> str:
        turns = [turn for s in solved for turn in (*s.before, ("user", s.question), ("assistant", str(s.solution)))]
        request = "" if solved else self.request
        turns += [*example.before, ("user", example.question + request)]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is a program, which may raise anything
            roles = " ".join(role for role, _ in turns)
            raise ValueError(
                f"chat: the tokenizer's template fails for the roles {roles} ({type(error).__name__}: "
                f"{reason_of(error)}); expected roles that it accepts, or prompts without a chat"
            ) from None

    def _plainly(self, example: Example, solved: Sequence[Example]) -> str:
        def question(e: Example) -> str:
            return "\n\n".join([*(content for _, content in e.before), self.plain.format(e.question)])

        return "\n\n".join([*(question(s) + self.solution.format(s.solution) for s in solved), question(example)])


def complete_splits(examples: Mapping[Split, Sequence[Example]]) -> dict[Split, list[Example]]:
    """Split a tenth of train off as validation and as test, where these are missing, by a hash of the question.

    If train has less than `SMALLEST_TRAIN` examples, or one part would be empty, all of train is used as each of them.
    """
    complete = {split: list(es) for split, es in examples.items()}
    train = complete.get("train")
    missing: list[Split] = [s for s in ("validation", "test") if s not in complete]
    if not train or not missing:
        return complete
    parts: dict[Split, list[Example]] = {s: [] for s in ("train", *missing)}
    for example in train:
        split = split_of(example.question)
        parts[split if split in parts else "train"].append(example)
    if len(train) < SMALLEST_TRAIN or not all(parts.values()):
        parts = dict.fromkeys(parts, train)
    return complete | parts


def split_of(text: str) -> Split:
    """train, validation or test, by a hash of the text."""
    bucket = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"
