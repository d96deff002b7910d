"""A grammar of word problems in plain English: what happens to somebody's things, and what is left in the end.

A story is a list of events. Each adds to what somebody has or takes away from it, a number or so many times a number.
Operations are the products and the sums and differences that join the events. The number of operations is the
difficulty. Sentences about other things distract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

NAMES = (
    *("Ada", "Ben", "Clara", "Daniel", "Eva", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kate", "Liam", "Mia", "Noah"),
    *("Olga", "Paul", "Rosa", "Simon", "Tara", "Victor"),
)
# things, what they come in, what happens to some of them
THINGS = (
    ("apples", "baskets", "eats"),
    ("stickers", "sheets", "uses"),
    ("marbles", "bags", "loses"),
    ("cookies", "boxes", "eats"),
    ("pencils", "packs", "breaks"),
    ("eggs", "cartons", "cooks"),
    ("candles", "boxes", "burns"),
    ("cards", "packs", "loses"),
    ("flowers", "bunches", "sells"),
    ("buttons", "jars", "sews on"),
    ("tickets", "rolls", "uses"),
    ("peaches", "crates", "sells"),
)
MOST_PACKS = 10
Phrasing = Literal["plain", "new"]
T = TypeVar("T")
START: dict[Phrasing, tuple[tuple[str, str], ...]] = {
    "plain": (
        ("{name} has {a} {things}.", "{name} has {p} {packs} with {q} {things} each."),
        ("{name} starts with {a} {things}.", "{name} starts with {p} {packs} of {q} {things}."),
        ("There are {a} {things} on {name}'s table.", "There are {p} {packs} of {q} {things} on {name}'s table."),
    ),
    "new": (
        ("In {name}'s kitchen one can count {a} {things}.", "{name} owns {p} {packs}, and {q} {things} fit into each."),
    ),
}
GAIN: dict[Phrasing, tuple[tuple[str, str], ...]] = {
    "plain": (
        ("{name} buys {a} more.", "{name} buys {p} {packs} of {q} more."),
        ("{friend} gives {name} {a} {things}.", "{friend} gives {name} {p} {packs} of {q} {things}."),
        ("Then {name} finds {a} {things}.", "Then {name} finds {p} {packs} with {q} {things} each."),
        ("Another {a} {things} arrive by post.", "Another {p} {packs} of {q} {things} arrive by post."),
    ),
    "new": (
        ("{a} {things} come on top, a present from {friend}.", "{p} {packs} come on top, each with {q} {things}."),
        ("A delivery brings {a} further {things}.", "A delivery brings {p} further {packs}, {q} {things} in each."),
    ),
}
LOSS: dict[Phrasing, tuple[tuple[str, str], ...]] = {
    "plain": (
        ("{name} {uses} {a}.", "{name} {uses} {q} on each of {p} days."),
        ("{name} gives {a} {things} to {friend}.", "{name} gives {q} {things} to each of {p} friends."),
        ("Then {name} {uses} {a} of them.", "Then {name} {uses} {q} a day for {p} days."),
        ("{friend} takes {a} {things} away.", "{friend} takes {p} {packs} of {q} {things} away."),
    ),
    "new": (
        ("{friend} borrows {a} of the {things} and keeps them.", "{p} guests help themselves to {q} {things} each."),
        ("By the evening {a} {things} are gone.", "For {p} days, {q} {things} disappear every day."),
    ),
}
DISTRACTOR = (
    "{friend} is {a} years old.",
    "The house has {a} windows.",
    "{friend} has {a} {others}.",
    "The bus to town takes {a} minutes.",
    "{name} lives at number {a}.",
    "It is the {a}th of the month.",
)
QUESTION: dict[Phrasing, tuple[str, ...]] = {
    "plain": ("How many {things} does {name} have now?", "How many {things} does {name} have in the end?"),
    "new": ("What is the number of {things} that {name} is left with?",),
}


@dataclass(frozen=True)
class Event:
    """A change by `sign` times the product of one or two numbers."""

    sign: int
    factors: tuple[int, ...]

    @property
    def amount(self) -> int:
        return math.prod(self.factors)


@dataclass(frozen=True)
class Story:
    """A word problem and a solution in steps."""

    text: str
    solution: str
    events: tuple[Event, ...]

    @property
    def answer(self) -> int:
        return sum(e.sign * e.amount for e in self.events)

    @property
    def operations(self) -> int:
        return len(self.events) - 1 + sum(len(e.factors) - 1 for e in self.events)


def tell_story(rng: np.random.Generator, operations: int, phrasing: Phrasing = "plain", largest: int = 20) -> Story:
    """A random story.

    Args:
        rng: of all choices.
        operations: at least 1.
        phrasing: which templates.
        largest: of the numbers; of two factors the first is at most `MOST_PACKS`, the second half of this.
    """
    events = _draw_events(rng, operations, largest)
    name, friend, stranger = rng.choice(NAMES, 3, replace=False)
    (things, packs, uses), (others, *_) = (THINGS[i] for i in rng.choice(len(THINGS), 2, replace=False))
    words = {"name": name, "friend": friend, "things": things, "packs": packs, "uses": uses}
    sentences = []
    for i, event in enumerate(events):
        kind = START if i == 0 else GAIN if event.sign > 0 else LOSS
        single, product = _pick(rng, kind[phrasing])
        if len(event.factors) == 1:
            sentences.append(single.format(**words, a=event.factors[0]))
        else:
            sentences.append(product.format(**words, p=event.factors[0], q=event.factors[1]))
    if rng.random() < 0.5:
        extra = _pick(rng, DISTRACTOR).format(name=name, friend=stranger, others=others, a=rng.integers(2, largest + 1))
        sentences.insert(int(rng.integers(1, len(sentences) + 1)), extra)
    sentences.append(_pick(rng, QUESTION[phrasing]).format(**words))
    return Story(" ".join(sentences), solve(rng, events, things, packs), tuple(events))


def solve(rng: np.random.Generator, events: Sequence[Event], things: str, packs: str) -> str:
    """One of the correct solutions: products first or when they are needed; in the order of the story, or gains and
    losses apart."""
    amounts: dict[int, int] = {}
    lines: list[str] = []

    def amount(i: int) -> int:
        if i not in amounts:
            event = events[i]
            if len(event.factors) == 2:
                p, q = event.factors
                lines.append(f"{p} times {q} {things}: {p} * {q} = {p * q}.")
            amounts[i] = event.amount
        return amounts[i]

    if rng.random() < 0.5:
        for i in range(len(events)):
            amount(i)
    gains = [i for i, e in enumerate(events) if e.sign > 0]
    losses = [i for i, e in enumerate(events) if e.sign < 0]
    if len(losses) > 1 and rng.random() < 0.5:
        total, lost = amount(gains[0]), amount(losses[0])
        for i in gains[1:]:
            total = _add(lines, "Together", total, amount(i))
        for i in losses[1:]:
            lost = _add(lines, "Gone", lost, amount(i))
        total = _subtract(lines, total, lost)
    else:
        total = amount(0)
        for i in range(1, len(events)):
            more = amount(i)
            total = _add(lines, "Now", total, more) if events[i].sign > 0 else _subtract(lines, total, more)
    return "\n".join([*lines, f"The answer is {total}."])


def _add(lines: list[str], word: str, a: int, b: int) -> int:
    lines.append(f"{word}: {a} + {b} = {a + b}.")
    return a + b


def _subtract(lines: list[str], a: int, b: int) -> int:
    lines.append(f"Left: {a} - {b} = {a - b}.")
    return a - b


def _draw_events(rng: np.random.Generator, operations: int, largest: int) -> list[Event]:
    """Events with that many operations, of which somebody always has enough."""
    products = int(rng.integers(0, (operations + 1) // 2 + 1))
    count = operations + 1 - products
    with_product = set(rng.choice(count, products, replace=False).tolist())
    events: list[Event] = []
    total = 0
    for i in range(count):
        if i in with_product:
            numbers = rng.integers(2, np.array([MOST_PACKS, largest // 2]) + 1)
        else:
            numbers = rng.integers(2, largest + 1, 1)
        event = Event(1, tuple(numbers.tolist()))
        if i > 0 and event.amount < total and rng.random() < 0.5:
            event = Event(-1, event.factors)
        events.append(event)
        total += event.sign * event.amount
    return events


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]
