"""Win rates: pairs of completions of two runs, a judge's verdicts on them in both orders, and what these amount to.

A pair is won by the completion that is preferred in both orders, and a tie otherwise, since judges prefer a position:
Zheng et al. 2023 (arXiv 2306.05685), section 3.4. The win rate counts a tie as half a win.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import tyro
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill_env.checks import check_range
from experiments.answering.judges import Judge, Question, Reply, Verdict
from experiments.comparing.statistics import Estimate, proportion
from experiments.running.cli import progress_bar
from experiments.running.completions_file import FILE, Writer, read_lines, write_lines
from experiments.running.metric_display import cell
from experiments.running.run_folder import finite, write_json

MAX_SILENT = 20  # replies without a verdict before the judging is given up: each may cost money

Order = Literal["ab", "ba"]  # which completion the judge reads first
Winner = Literal["a", "b", "tie"]
WINNERS: dict[Order, dict[Verdict, Winner]] = {
    "ab": {"first": "a", "second": "b", "tie": "tie"},
    "ba": {"first": "b", "second": "a", "tie": "tie"},
}


@dataclass(frozen=True)
class PairsConfig:
    """Pair the completions of two runs by prompt."""

    a: tyro.conf.Positional[Path]
    """Folder of a run whose completions were written by evaluate.py, or the file of completions."""
    b: tyro.conf.Positional[Path]
    """Folder or file of the other run; the same again to compare two of its writers."""
    out: Path = Path("pairs.jsonl")
    """File of pairs to write."""
    writer_a: Writer = "student"
    """Writer of the completions of a."""
    writer_b: Writer = "student"
    """Writer of the completions of b."""
    split: Literal["test", "ood"] = "test"
    """Split of the prompts."""
    samples: int = 1
    """Maximum number of pairs per prompt."""


@dataclass(frozen=True)
class JudgingConfig:
    """Ask a judge which completion of each pair is better."""

    pairs: tyro.conf.Positional[Path]
    """File of pairs."""
    out: Path | None = None
    """File of verdicts, continued if it exists; by default that of the pairs, ending in .verdicts.jsonl."""
    summary: Path | None = None
    """JSON file to write the win rate into as well."""


class Pair(NamedTuple):
    prompt: str
    a: str
    b: str

    def question(self, order: Order) -> Question:
        return Question(self.prompt, *((self.a, self.b) if order == "ab" else (self.b, self.a)))


@dataclass(frozen=True)
class Summary:
    """The verdicts on the pairs that were judged in both orders."""

    win_rate: Estimate
    """Wins of a and half of the ties, as a share: the mean over prompts with its interval."""
    wins_a: int
    wins_b: int
    ties: int
    consistent: float
    """Share of the pairs with the same verdict in both orders."""
    first: float
    """Share of the verdicts, ties aside, for the completion shown first: 50 % for a judge without position bias."""
    unjudged: int
    """Pairs without a verdict in one order or both."""


def make_pairs(config: PairsConfig) -> str:
    """Write the file of pairs, and return a line that says how many there are.

    Raises:
        ValueError: if there are none.
    """
    check_range(config, "samples", least=1)
    a = read_completions(config, "a", config.a, config.writer_a)
    b = read_completions(config, "b", config.b, config.writer_b)
    shared = [key for key in a if key in b]
    if not shared:
        raise ValueError(f"a, b: {config.a} and {config.b} share no prompt; expected runs of one task")
    write_lines(config.out, ({"prompt": key[0], "completion_a": a[key], "completion_b": b[key]} for key in shared))
    return f"wrote {len(shared):,} pairs to {config.out}; {len(a) + len(b) - 2 * len(shared):,} completions unpaired"


def read_completions(config: PairsConfig, argument: str, path: Path, writer: Writer) -> dict[tuple[str, int], str]:
    """The texts of a writer's completions by prompt and number."""
    file = path / FILE if path.is_dir() else path
    if path.is_dir() and not file.exists():
        command = f"python experiments/evaluate.py {path} --completions {file}"
        raise ValueError(f"{argument}: {str(path)!r} has no {FILE}; expected it to be written by: {command}")
    texts: dict[tuple[str, int], str] = {}
    count: Counter[str] = Counter()
    for line in read_lines(file, argument, ("split", "writer", "prompt", "completion")):
        prompt = line["prompt"]
        if (line["split"], line["writer"]) == (config.split, writer) and count[prompt] < config.samples:
            texts[prompt, count[prompt]] = line["completion"]
            count[prompt] += 1
    if not texts:
        raise ValueError(
            f"writer_{argument}: {str(file)!r} has no completions of the {writer} in split {config.split}; expected "
            "a writer and a split of that file"
        )
    return texts


def judge_pairs(config: JudgingConfig, judge: Judge, console: Console) -> None:
    """Ask the judge about the pairs that have no verdict yet, and print the win rate.

    Raises:
        ValueError: in one line, if the judge fails, or no reply holds a verdict; verdicts so far are on disk.
    """
    lines = read_lines(config.pairs, "pairs", ("prompt", "completion_a", "completion_b"))
    if not lines:
        raise ValueError(f"pairs: {str(config.pairs)!r} is empty; expected one JSON object per line")
    pairs = [Pair(line["prompt"], line["completion_a"], line["completion_b"]) for line in lines]
    out = config.out or config.pairs.with_suffix(".verdicts.jsonl")
    try:
        with FileLock(out.with_name(out.name + ".lock"), blocking=False):
            verdicts = collect_verdicts(judge, pairs, out, console)
    except Timeout:
        raise ValueError(f"out: {str(out)!r} is being written by another process; expected another file") from None
    summary = summarise(pairs, verdicts)
    console.print(summary_table(summary, f"{config.pairs}, judged by {judge.name}"))
    if config.summary:
        write_json(config.summary, finite(asdict(summary)))
    console.print(f"verdicts in {out}", highlight=False, soft_wrap=True)


def collect_verdicts(judge: Judge, pairs: Sequence[Pair], out: Path, console: Console) -> dict[str, Verdict]:
    """The verdicts on all questions by their keys: those in the file `out`, and the others, which are added to it."""
    questions: dict[str, tuple[Question, int, Order]] = {}  # pairs with the same words are judged once
    for number, pair in enumerate(pairs, 1):
        for order in WINNERS:
            question = pair.question(order)
            questions.setdefault(question.key, (question, number, order))
    verdicts = read_verdicts(out, judge.name, set(questions))
    remaining = [question for key, (question, _, _) in questions.items() if key not in verdicts]
    if not remaining:
        return verdicts
    silent, total = 0, len(questions)
    with out.open("a", encoding="utf-8") as file, progress_bar(console) as progress:
        bar = progress.add_task("judging", total=total, completed=len(verdicts))

        def on_reply(question: Question, reply: Reply) -> None:
            nonlocal silent
            _, number, order = questions[question.key]
            line = {"judge": judge.name, "pair": number, "order": order, "verdict": reply.verdict, "reply": reply.text}
            file.write(json.dumps(line | {"key": question.key}) + "\n")
            file.flush()
            progress.advance(bar)
            if reply.verdict is not None:
                verdicts[question.key] = reply.verdict
                return
            silent += 1
            if not verdicts and silent >= min(MAX_SILENT, len(remaining)):
                last = repr(" ".join(reply.text.split())[:120])
                raise ValueError(f"model: {silent} replies of {judge.name} without a verdict; the last: {last}")

        try:
            judge.ask(remaining, on_reply)
        except ValueError as error:
            progress_so_far = f"{len(verdicts):,} of {total:,} verdicts are in {out}, and the same command continues"
            raise ValueError(f"{error}; {progress_so_far}") from None
    return verdicts


def read_verdicts(out: Path, judge: str, keys: set[str]) -> dict[str, Verdict]:
    """The verdicts of an earlier call, by key. A last line that is cut short, as a kill may leave it, is removed.

    Raises:
        ValueError: if they are of another judge or on other pairs.
    """
    if not out.exists():
        return {}
    data = out.read_bytes()
    complete = data.rfind(b"\n") + 1
    if complete < len(data):
        with out.open("r+b") as file:
            file.truncate(complete)
    verdicts: dict[str, Verdict] = {}
    for line in read_lines(out, "out", ("judge", "key")):
        if line["judge"] != judge or line["key"] not in keys:
            content = f"verdicts of {line['judge']}" if line["judge"] != judge else "verdicts on other pairs"
            raise ValueError(f"out: {str(out)!r} holds {content}; expected another file")
        if line.get("verdict") in get_args(Verdict):
            verdicts[line["key"]] = line["verdict"]
    return verdicts


def combine(ab: Winner, ba: Winner) -> Winner:
    """The winner of a pair from its winners in both orders."""
    return ab if ab == ba else "tie"


def summarise(pairs: Sequence[Pair], verdicts: dict[str, Verdict]) -> Summary:
    """The win rate from the pairs that were judged in both orders.

    Raises:
        ValueError: if there are none.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    outcomes: Counter[Winner] = Counter()
    same: list[bool] = []
    first: list[bool] = []
    for pair in pairs:
        given = {order: verdicts.get(pair.question(order).key) for order in WINNERS}
        known = {order: verdict for order, verdict in given.items() if verdict is not None}
        if len(known) < len(given):
            continue
        ab, ba = (WINNERS[order][verdict] for order, verdict in known.items())
        outcome = combine(ab, ba)
        outcomes[outcome] += 1
        scores[pair.prompt].append({"a": 1.0, "tie": 0.5, "b": 0.0}[outcome])
        same.append(ab == ba)
        first += [verdict == "first" for verdict in known.values() if verdict != "tie"]
    if not scores:
        raise ValueError(f"pairs: none of {len(pairs)} has a verdict in both orders; see the replies in the verdicts")
    win_rate = proportion([float(np.mean(s)) for s in scores.values()])
    position = float(np.mean(first)) if first else float("nan")
    a, b, ties = outcomes["a"], outcomes["b"], outcomes["tie"]
    return Summary(win_rate, a, b, ties, float(np.mean(same)), position, len(pairs) - outcomes.total())


def summary_table(summary: Summary, title: str) -> Table:
    table = Table("", title=escape(title), title_justify="left")
    table.add_column("", justify="right")
    table.add_row("win rate of a (a tie counts half)", escape(summary.win_rate.text("{:.1%}")))
    table.add_row("wins of a, wins of b, ties", f"{summary.wins_a:,}, {summary.wins_b:,}, {summary.ties:,}")
    table.add_row("same verdict in both orders", cell("{:.1%}", summary.consistent))
    table.add_row("verdicts for the completion shown first", cell("{:.1%}", summary.first))
    table.add_row("pairs without a verdict", f"{summary.unjudged:,}")
    return table
