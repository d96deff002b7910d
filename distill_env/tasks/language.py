"""What the tasks of language models share: from examples as text to prompts as token ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from distill_env.models.hub import TokenizerName, id_range, load_tokenizer, reason_of
from distill_env.tasks.base import SPLITS, Grade, Place, Prompt, Split
from distill_env.tasks.encoding import continuations, opening, token_ids
from distill_env.tasks.report import DataReport
from distill_env.tasks.sources import Data, HubTable, read_rows
from distill_env.tasks.teacher_columns import read_teacher_columns

SMALLEST_TRAIN = 20  # examples; a smaller train split is used as validation and test, too


@dataclass(frozen=True)
class Example:
    """A question as text, with its reference completion and final answer if the data has them."""

    question: str
    solution: str | None = None  # the reference completion as text
    final_answer: str | None = None
    difficulty: int = 0
    before: tuple[tuple[str, str], ...] = ()  # role and content of the conversation's earlier messages
    place: Place | None = field(default=None, compare=False)  # of its row in the data
    teacher: str = ""  # the name of its teacher, where there are several
    # what the teacher reads: a text in place of the question, or roles and contents in place of all messages
    teacher_prompt: str | tuple[tuple[str, str], ...] | None = None

    @property
    def text(self) -> str:
        """The earlier messages and the question, without roles."""
        return "\n\n".join([*(content for _, content in self.before), self.question])

    @property
    def opening(self) -> str:
        """What the user says first, by which a conversation belongs to a split."""
        return next((content for role, content in self.before if role == "user"), self.question)


class Reading(NamedTuple):
    """What a task reads in a row."""

    examples: list[Example]
    unread: list[str]  # filled columns that mean nothing to the task


class LanguageTask:
    """A tokenizer, its reasoning steps, and prompts by split.

    Args:
        tokenizer: folder or hub id.
        max_new_tokens: default horizon.
        max_prompt_tokens: longer prompts are left out.
        step_pattern: a regular expression; a token whose text contains a match ends a reasoning step. By default a
            token with a newline does, so that a step is a line.
        vocab_size: the number of ids that the models share, of which no prompt may have a higher one; by default the
            tokenizer's largest id + 1.
    """

    graded = False
    max_teacher_prompt_tokens: int | None = None  # prompts that are longer for the teacher are left out
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
        self.report = DataReport()
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

    def _set_prompts(self, prompts: Mapping[Split, Sequence[Prompt]], skip_bad_rows: bool = False) -> None:
        """Use these prompts, without those that are too long.

        Raises:
            ValueError: for a split of which none remains; and for a prompt that has no token, or one that the models do
                not have, unless such rows are skipped.
        """
        report, most, longest = self.report, self.max_prompt_tokens, self.max_teacher_prompt_tokens
        fits: dict[int, bool] = {}  # of the prompts that can be used
        lengths, bad = [], set()
        for split, part in prompts.items():
            for i, prompt in enumerate(part, 1):
                if id(prompt) in fits or id(prompt) in bad:  # in several splits
                    continue
                place = prompt.place or Place(f"{split} split", "prompt", i)
                if problem := self._problem(prompt):
                    bad.add(id(prompt))
                    report.bad.append((place, problem))
                    continue
                lengths.append(len(prompt.ids))
                fits[id(prompt)] = most is None or len(prompt.ids) <= most
                report.long += [] if fits[id(prompt)] else [place]
                if fits[id(prompt)] and longest is not None and len(prompt.ids_for_teacher) > longest:
                    fits[id(prompt)] = False
                    report.long_for_teacher.append(place)
                report.references += fits[id(prompt)] and prompt.reference_completion is not None
        report.raise_bad(skip_bad_rows)
        report.usual_length = sorted(lengths)[(9 * len(lengths) - 1) // 10] if lengths else 0
        for split, part in prompts.items():
            usable = [p for p in part if id(p) in fits]
            self._splits[split] = tuple(p for p in usable if fits[id(p)])
            report.prompts[split] = len(self._splits[split])
            if not usable:
                report.raise_empty(split)
            if not self._splits[split]:
                short, limit = [len(p.ids) for p in usable], f"max_prompt_tokens: {most}"
                usual = f"; {report.usual_length} keeps nine of ten prompts"
                if most is None or min(short) <= most:
                    short = [len(p.ids_for_teacher) for p in usable if most is None or len(p.ids) <= most]
                    limit, usual = f"max_teacher_prompt_tokens: {longest}", ""
                raise ValueError(
                    f"{limit} leaves no prompt of the {split} split; expected at least {min(short)}, the length of the "
                    f"shortest of {len(short)}{usual}"
                )

    def _problem(self, prompt: Prompt) -> str:
        """Why a prompt cannot be used; empty if it can."""
        if not prompt.ids or not prompt.ids_for_teacher:
            return "the prompt has no token; expected at least one"
        highest = max(*prompt.ids, *prompt.ids_for_teacher, *(prompt.reference_completion or ()), 0)
        if highest < self.vocab_size:
            return ""
        token = self.tokenizer.convert_ids_to_tokens(highest)
        return f"the token {token!r}, id {highest}, is none of the models'; expected text without it"

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        if split not in SPLITS:
            raise ValueError(f"split: {split!r} is unknown; expected one of {', '.join(SPLITS)}")
        return self._splits.get(split, ())

    def _set_examples(
        self, examples: Mapping[Split, Sequence[Example]], wording: Wording, skip_bad_rows: bool = False
    ) -> None:
        """Use the prompts of these examples."""
        shown = max(wording.few_shot, wording.teacher_few_shot) > 0
        self.wording, self._train = wording, examples.get("train", ()) if shown else ()
        self._set_prompts(wording.encode(examples, self.tokenizer, self.report), skip_bad_rows)

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
        chat, few_shot, seed, chat_template_kwargs, teacher_prompt, teacher_few_shot: see `Wording`.
        max_teacher_prompt_tokens: prompts that are longer for the teacher are left out.
        max_new_tokens: default horizon; None for the task's own.
        max_prompt_tokens, step_pattern, vocab_size: see `LanguageTask`.
        skip_bad_rows: leave out rows that cannot be used instead of raising; `report` has them.
        references: whether a row of the train split without a reference completion is one that cannot be used.

    Raises:
        ValueError: for damaged data, with the first places, or an argument out of range.
    """

    hub: ClassVar[HubTable] = {}  # the data without a path
    horizon = 256
    plain, solution, request = "{}", "{}", ""  # see `Wording`
    # the examples in a row's columns; raises ValueError, without the place, for a row that cannot be used
    read_row: Callable[[dict[str, Any]], Reading]

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
        *,
        chat_template_kwargs: Mapping[str, Any] | str = "",
        skip_bad_rows: bool = False,
        references: bool = False,
        teacher_prompt: str = "",
        teacher_few_shot: int = 0,
        max_teacher_prompt_tokens: int | None = None,
    ) -> None:
        super().__init__(tokenizer, max_new_tokens or self.horizon, max_prompt_tokens, step_pattern, vocab_size)
        examples = complete_splits(self._read_examples(path))
        if references and "train" in examples:
            self._drop_without_reference(examples)
        form = (self.plain, self.solution, self.request)
        options = read_template_kwargs(chat_template_kwargs)
        wording = Wording(chat, few_shot, seed, *form, options, teacher_prompt, teacher_few_shot)
        self.max_teacher_prompt_tokens = max_teacher_prompt_tokens
        self._set_examples(examples, wording, skip_bad_rows)

    def _read_examples(self, path: Data) -> dict[Split, list[Example]]:
        """The examples of each split; what is not read is in the report."""
        report = self.report
        examples: dict[Split, list[Example]] = {}
        for split, rows in read_rows(path, self.hub, report).items():
            examples[split] = part = []
            for place, row in rows:
                try:
                    found, unread = self.read_row(row)
                    of_teacher = read_teacher_columns(row)
                    if len(found) > 1 and "teacher_prompt" in of_teacher:
                        raise ValueError("teacher_prompt for several completions; expected train_on last")
                except ValueError as error:
                    report.bad.append((place, str(error)))
                    continue
                part += [replace(example, place=place, **of_teacher) for example in found]
                report.unread.update(name for name in unread if name.partition(".")[0] not in of_teacher)
        return examples

    def _drop_without_reference(self, examples: dict[Split, list[Example]]) -> None:
        """Leave out what cannot be trained on; a row of which some part can is not bad."""
        able = {example.place for example in examples["train"] if example.solution}
        bad = dict.fromkeys(e.place for e in examples["train"] if e.place not in able and e.place is not None)
        self.report.bad += [(place, "no reference completion; expected one") for place in bad]
        examples["train"] = [example for example in examples["train"] if example.solution]


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
        template_kwargs: names and values that the chat template gets, such as enable_thinking.
        teacher_prompt: what the teacher reads in place of a question, with {prompt}, {solution} and {answer} for the
            question, its reference completion and its final answer; an example's own `teacher_prompt` comes first.
        teacher_few_shot: number of solved examples before each question for the teacher, if more than few_shot.
    """

    chat: bool | None = None
    few_shot: int = 0
    seed: int = 0
    plain: str = "{}"
    solution: str = "{}"
    request: str = ""
    template_kwargs: tuple[tuple[str, Any], ...] = ()
    teacher_prompt: str = ""
    teacher_few_shot: int = 0

    def encode(
        self, examples: Mapping[Split, Sequence[Example]], tokenizer: Any, report: DataReport | None = None
    ) -> dict[Split, list[Prompt]]:
        """Prompts in the order of the examples. An example that is in two splits is one prompt.

        Args:
            examples: by split.
            tokenizer: whose template is used.
            report: to which examples are added that the template refuses, or that lack what the teacher is to read.
                They are left out. Without a report the teacher reads the latter as the student does.

        Raises:
            ValueError: for too few solved examples, a chat without a template, or one that refuses all examples; and
                for one that refuses an example, if there is no report.
        """
        if self.chat and not tokenizer.chat_template:
            raise ValueError(
                "chat: the tokenizer has no chat template; expected one (chat_template), or prompts without a chat"
            )
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        for name, _ in self.template_kwargs:
            if not chat or name not in str(tokenizer.chat_template):
                where = "in the chat template" if chat else "without a chat template"
                raise ValueError(f"chat_template_kwargs: {name!r} has no effect {where}; expected one of its variables")
        distinct = list({id(e): e for es in examples.values() for e in es}.values())
        if self.teacher_prompt and "{prompt}" not in self.teacher_prompt:
            raise ValueError(f"teacher_prompt: {self.teacher_prompt!r:.60}; expected a text with {{prompt}}")
        train = examples.get("train", ())
        shots = self._shots("few_shot", self.few_shot, train)
        more = max(self.few_shot, self.teacher_few_shot)
        teacher_shots = shots if more == self.few_shot else self._shots("teacher_few_shot", more, train)

        def text_of(example: Example, shots: Sequence[Example], count: int) -> str:
            solved = [s for s in shots if s.question != example.question][:count]
            return self._conversation(example, solved, tokenizer) if chat else self._plainly(example, solved)

        texts, read, refused = {}, {}, []
        for example in distinct:
            try:
                text, seen = text_of(example, shots, self.few_shot), self._for_teacher(example, report is not None)
                if seen is not example or more > self.few_shot:
                    read[id(example)] = text_of(seen, teacher_shots, more)
                texts[id(example)] = text
            except ValueError as error:
                if report is None or example.place is None:
                    raise
                refused.append((example.place, str(error)))
        if refused and report is not None:
            if not texts:  # of the template, not of the data
                raise ValueError(refused[0][1])
            report.bad += refused
            distinct = [e for e in distinct if id(e) in texts]
        if report is not None and not chat:
            report.joined += sum(bool(e.before) for e in distinct)
        begin, ids = () if chat else opening(tokenizer), token_ids(tokenizer, list(texts.values()))
        form = "{}" if chat else self.solution
        solutions = [form.format(e.solution) if e.solution else "" for e in distinct]
        references = continuations(tokenizer, list(texts.values()), solutions)
        end = (tokenizer.eos_token_id,)
        ids_of_teacher = token_ids(tokenizer, list(read.values()))
        teacher_ids = {key: (*begin, *i) for key, i in zip(read, ids_of_teacher, strict=True)}
        prompts = {}
        for e, i, r in zip(distinct, ids, references, strict=True):
            completion = (*r, *end) if e.solution else None
            prompt = Prompt((*begin, *i), e.text, e.difficulty, completion, e.final_answer, place=e.place)
            prompts[id(e)] = replace(prompt, teacher_ids=teacher_ids.get(id(e)), teacher=e.teacher)
        return {split: [prompts[id(e)] for e in es if id(e) in prompts] for split, es in examples.items()}

    def _for_teacher(self, example: Example, strict: bool) -> Example:
        """The example as the teacher reads it. Raises ValueError if it lacks what the template shows and `strict`."""
        given = example.teacher_prompt
        if given is None and self.teacher_prompt:
            known = {"prompt": example.question, "solution": example.solution, "answer": example.final_answer}
            missing = [name for name, value in known.items() if value is None and f"{{{name}}}" in self.teacher_prompt]
            if missing and strict:
                raise ValueError(f"teacher_prompt shows the {missing[0]}, and there is none; expected one")
            if not missing:
                given = re.sub(r"\{(prompt|solution|answer)\}", lambda m: str(known[m[1]]), self.teacher_prompt)
        if given is None:
            return example
        if isinstance(given, str):
            return replace(example, question=given)
        return replace(example, question=given[-1][1], before=given[:-1])

    def _shots(self, argument: str, count: int, train: Sequence[Example]) -> list[Example]:
        """`count` chosen examples, and one more in place of a question that is among them."""
        if count < 0:
            raise ValueError(f"{argument}: {count}; expected at least 0")
        if count == 0:
            return []
        solved = list({e.question: e for e in train if e.solution}.values())
        if len(solved) <= count:
            raise ValueError(f"{argument}: {count}; expected fewer than the {len(solved)} solved train examples")
        chosen = np.random.default_rng(self.seed).choice(len(solved), count + 1, replace=False)
        return [solved[i] for i in chosen]

    def _conversation(self, example: Example, solved: Sequence[Example], tokenizer: Any) -> str:
        turns = [turn for s in solved for turn in (*s.before, ("user", s.question), ("assistant", str(s.solution)))]
        request = "" if solved else self.request
        turns += [*example.before, ("user", example.question + request)]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            options = dict(self.template_kwargs)
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options))
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


def read_template_kwargs(value: Mapping[str, Any] | str) -> tuple[tuple[str, Any], ...]:
    """Names and values for a chat template, from a mapping or a JSON object; empty for none.

    Raises:
        ValueError: for text that is no JSON object.
    """
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value or "{}")
    if not isinstance(value, Mapping):
        raise ValueError(
            f'chat_template_kwargs: {value!r}; expected a JSON object, such as {{"enable_thinking": false}}'
        )
    return tuple(value.items())


def complete_splits(examples: Mapping[Split, Sequence[Example]]) -> dict[Split, list[Example]]:
    """Split a tenth of train off as validation and test where these are missing, by a hash of the user's first text.

    If train has less than `SMALLEST_TRAIN` examples, or one part would be empty, all of train is used as each of them.
    """
    complete = {split: list(es) for split, es in examples.items()}
    train = complete.get("train")
    missing: list[Split] = [s for s in ("validation", "test") if s not in complete]
    if not train or not missing:
        return complete
    parts: dict[Split, list[Example]] = {s: [] for s in ("train", *missing)}
    for example in train:
        split = split_of(example.opening)
        parts[split if split in parts else "train"].append(example)
    if len(train) < SMALLEST_TRAIN or not all(parts.values()):
        parts = dict.fromkeys(parts, train)
    return complete | parts


def split_of(text: str) -> Split:
    """train, validation or test, by a hash of the text."""
    bucket = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"
