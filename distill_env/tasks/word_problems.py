"""Word problems in plain English, from a grammar: no data to download, and every step of a solution can be checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_env.models.hub import TokenizerName
from distill_env.tasks.base import SPLITS, Grade, Prompt, Split
from distill_env.tasks.language import Example, LanguageTask, Wording, read_template_kwargs, split_of
from distill_env.tasks.word_grammar import Event, Phrasing, Story, tell_story

EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)(?!\d)")
ANSWER = re.compile(r"The answer is (\d+)\.\s*")
SIZES: dict[Split, int] = {"train": 1000, "validation": 50, "test": 100, "ood": 50}  # prompts of each kind
# operations, phrasing and largest number of each kind of story
WITHIN: tuple[tuple[int, Phrasing, int], ...] = tuple((n, "plain", 20) for n in (1, 2, 3, 4))
BEYOND: tuple[tuple[int, Phrasing, int], ...] = (
    *((n, "plain", 20) for n in (5, 6)),
    *((n, "new", 20) for n in (2, 4)),
    *((n, "plain", 60) for n in (2, 4)),
)


class WordProblemsTask(LanguageTask):
    """Problems of one to four operations; out of distribution are five and six, unseen phrasings, and larger numbers.

    A solution writes one equation in each line and ends in `The answer is N.`: see `word_grammar`. Sums may be formed
    in any order that the story allows. The difficulty is the number of operations. The splits are disjoint, by a hash
    of the text.

    Args:
        tokenizer: folder or hub id.
        path: not used; the grammar makes the problems.
        chat: use the tokenizer's chat template; None is plain text, on which its teacher is trained.
        few_shot, seed, chat_template_kwargs, teacher_prompt, teacher_few_shot: see `Wording`.
        max_teacher_prompt_tokens: prompts that are longer for the teacher are left out.
        max_new_tokens: default horizon.
        max_prompt_tokens, step_pattern, vocab_size: see `LanguageTask`.
    """

    graded = True

    def __init__(
        self,
        tokenizer: TokenizerName,
        path: str = "",
        chat: bool | None = None,
        few_shot: int = 0,
        seed: int = 0,
        max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        step_pattern: str = "",
        vocab_size: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | str = "",
        teacher_prompt: str = "",
        teacher_few_shot: int = 0,
        max_teacher_prompt_tokens: int | None = None,
    ) -> None:
        if path:
            raise ValueError(f"path: {path!r} with word_problems; expected none, since the problems are made")
        super().__init__(tokenizer, max_new_tokens or 128, max_prompt_tokens, step_pattern, vocab_size)
        self._stories: dict[str, Story] = {}
        examples: dict[Split, list[Example]] = {}
        for split in SPLITS:
            stories = list(stories_of(split))
            self._stories |= {story.text: story for story in stories}
            examples[split] = [example_of(s) for s in stories]
        options = read_template_kwargs(chat_template_kwargs)
        form = ("Question: {}\nAnswer:", " {}", "")
        self.max_teacher_prompt_tokens = max_teacher_prompt_tokens
        wording = Wording(bool(chat), few_shot, seed, *form, options, teacher_prompt, teacher_few_shot)
        self._set_examples(examples, wording)

    def draw(self, rng: np.random.Generator, n: int) -> list[Prompt]:
        """n prompts of new problems for supervised training, kinds in equal parts, none of them held out."""
        held_out = {p.text for split in SPLITS[1:] for p in self.prompts(split)}
        kinds = WITHIN + BEYOND
        order = (rng.permutation(n) + rng.integers(len(kinds))) % len(kinds)
        stories: list[Story] = []
        while len(stories) < n:
            story = tell_story(rng, *kinds[order[len(stories)]])
            if story.text not in held_out and split_of(story.text) == "train":
                stories.append(story)
        assert self.wording is not None
        return self.wording.encode({"train": [example_of(s) for s in stories]}, self.tokenizer)["train"]

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        """Grade the final answer and every equation.

        `correct`: the completion ends, and its last line states the right answer. `chain_correct`: its equations, one a
        line, also lead there, each from numbers of the story or of earlier lines, none of them used twice. `way` is the
        equations in order.
        """
        story = self._stories.get(prompt.text)
        if story is None:
            return Grade(0.0, False, None)
        ended = len(tokens) > 0 and tokens[-1] == self.eos_token_id
        *lines, last = self.decode(tokens).strip().split("\n")
        stated = ANSWER.fullmatch(last)
        value = stated[1] if stated and ended else None
        correct = value is not None and int(value) == story.answer
        equations = [EQUATION.findall(line) for line in lines]
        in_form = all(len(found) == line.count("=") == 1 for found, line in zip(equations, lines, strict=True))
        steps = [Equation(int(a), sign, int(b), int(c)) for found in equations for a, sign, b, c in found]
        chain = correct and in_form and is_solution(steps, story.events)
        way = "; ".join(map(str, steps)) if chain else None
        return Grade(float(chain), correct, chain, way, final_value=value)


@dataclass(frozen=True)
class Equation:
    """left sign right = result."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        numbers = (self.left, self.right) if self.sign == "-" else sorted((self.left, self.right))
        return f" {self.sign} ".join(map(str, numbers))

    @property
    def holds(self) -> bool:
        a, b = self.left, self.right
        return self.result == {"+": a + b, "-": a - b, "*": a * b}[self.sign]


def is_solution(steps: Sequence[Equation], events: Sequence[Event]) -> bool:
    """Whether the steps, in this order, compute what is left after the events.

    A step may multiply the two numbers of an event; add what comes to what comes, or what goes to what goes; or take
    one from the other. It uses numbers of the story and results of earlier steps, each of them once.
    """
    open_products = [e for e in events if len(e.factors) > 1]
    amounts = [(e.sign, e.amount) for e in events if len(e.factors) == 1]
    return all(step.holds for step in steps) and _leads_to_one(list(steps), open_products, amounts)


def _leads_to_one(steps: list[Equation], products: list[Event], amounts: list[tuple[int, int]]) -> bool:
    """Whether the steps use up all products and join all amounts, (sign, size), into one that is there."""
    if not steps:
        return not products and len(amounts) == 1 and amounts[0][0] == 1
    step, rest = steps[0], steps[1:]
    if step.sign == "*":
        factors = sorted((step.left, step.right))
        return any(
            _leads_to_one(rest, products[:i] + products[i + 1 :], [*amounts, (event.sign, event.amount)])
            for i, event in enumerate(products)
            if sorted(event.factors) == factors
        )
    for i, (sign, size) in enumerate(amounts):
        for j, (other_sign, other_size) in enumerate(amounts):
            fits = (size, other_size) == (step.left, step.right) and (sign == other_sign) == (step.sign == "+")
            if i != j and fits:
                others = [a for k, a in enumerate(amounts) if k not in (i, j)]
                if _leads_to_one(rest, products, [*others, (sign, step.result)]):
                    return True
    return False


def example_of(story: Story) -> Example:
    return Example(story.text, story.solution, str(story.answer), story.operations)


def stories_of(split: Split) -> Iterator[Story]:
    """The stories of a split, the same at every call and different from each other."""
    seen = set()
    for kind, (operations, phrasing, largest) in enumerate(BEYOND if split == "ood" else WITHIN):
        rng = np.random.default_rng([SPLITS.index(split), kind])
        count = 0
        while count < SIZES[split]:
            story = tell_story(rng, operations, phrasing, largest)
            if story.text not in seen and (split == "ood" or split_of(story.text) == split):
                seen.add(story.text)
                count += 1
                yield story
