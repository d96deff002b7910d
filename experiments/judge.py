"""Win-rate: a judge compares answers pair by pair, in both orders.

    python experiments/judge.py pairs runs/a runs/b --out pairs.jsonl
    python experiments/judge.py pairs runs/a runs/a --writer-b teacher --out pairs.jsonl
    python experiments/judge.py api pairs.jsonl --model gpt-4.1            # the key is in $OPENAI_API_KEY
    python experiments/judge.py api pairs.jsonl --model NAME --base-url http://localhost:8000/v1 --key-variable ''
    python experiments/judge.py local pairs.jsonl --model PATH_OR_ID

Pairs are JSON objects, one a line, with the texts `prompt`, `answer_a` and `answer_b`; whatever else they hold stays
unread. Every verdict goes at once into another such file: `judge`, `pair` (its line), `order` (`ab` or `ba`: who was
shown first), `verdict` (`first`, `second`, `tie`, or null if the reply holds none), `said`, and `key`, which names what
the judge was told. The same command goes on where it was interrupted, and asks again where there is no verdict.

A pair is won by the answer that is preferred in both orders, and a tie otherwise, since judges prefer a position: Zheng
et al. 2023 (arXiv 2306.05685), section 3.4. The win-rate counts ties half; its interval resamples prompts.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import tyro
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.answering.judges import Judge, LocalJudge, Question, Reply, ServedJudge, Verdict
from experiments.comparing.statistics import Estimate, bootstrap
from experiments.running.cli import exit_code, read_flags
from experiments.running.completions_file import FILE, Writer, read_lines, write_lines
from experiments.running.signals import signals_raise
from experiments.running.tracking import cell, finite, progress_bar, write_json

GIVE_UP = 20
"""So many replies without any verdict end the judging: every further one may cost money."""

Order = Literal["ab", "ba"]
Winner = Literal["a", "b", "tie"]
ORDERS: tuple[Order, ...] = ("ab", "ba")
WINNERS: dict[Order, dict[Verdict, Winner]] = {
    "ab": {"first": "a", "second": "b", "tie": "tie"},
    "ba": {"first": "b", "second": "a", "tie": "tie"},
}


@dataclass(frozen=True)
class Pairs:
    """Put the answers of two runs to the same prompts side by side."""

    a: tyro.conf.Positional[Path]
    """A run's folder with answers.jsonl (evaluate.py --answers writes it), or such a file."""
    b: tyro.conf.Positional[Path]
    """The other one; the same again to compare its writers."""
    out: Path = Path("pairs.jsonl")
    """The file of pairs."""
    writer_a: Writer = "student"
    """Who wrote the answers of a."""
    writer_b: Writer = "student"
    """Who wrote those of b."""
    split: Literal["test", "ood"] = "test"
    """Whose prompts."""
    samples: int = 1
    """Up to so many answers to a prompt."""


@dataclass(frozen=True)
class Judging:
    """What both judges need."""

    pairs: tyro.conf.Positional[Path]
    """The file of pairs."""
    model: str
    """The judge: its name at the endpoint; or a folder or hub id."""
    out: Path | None = None
    """The file of verdicts; by default that of the pairs with .verdicts.jsonl."""
    summary: Path | None = None
    """Write the numbers into this JSON file as well."""


@dataclass(frozen=True)
class Api(Judging):
    """Ask an endpoint that speaks OpenAI's protocol."""

    base_url: str = ""
    """Its address, with the /v1; by default $OPENAI_BASE_URL, or OpenAI's own."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the key, which is never written anywhere; '' for a server that wants none."""
    timeout: float = 120.0
    """Seconds without an answer after which a try has failed."""
    retries: int = 4
    """Further tries after one that failed, waiting longer each time."""
    concurrency: int = 4
    """Questions at a time."""
    temperature: float | None = 0.0
    """Of its replies; None leaves it to the server."""
    max_tokens: int = 0
    """Of a reply; 0 leaves it to the server."""

    def judge(self) -> Judge:
        return ServedJudge(
            self.model,
            self.base_url,
            self.key_variable,
            self.timeout,
            self.retries,
            self.concurrency,
            self.temperature,
            self.max_tokens,
        )


@dataclass(frozen=True)
class Local(Judging):
    """Ask a local causal language model for its likeliest verdict."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of its weights."""
    device: str = "cpu"
    """Where it runs."""

    def judge(self) -> Judge:
        return LocalJudge(self.model, self.dtype, self.device)


Command = (
    Annotated[Pairs, tyro.conf.subcommand("pairs")]
    | Annotated[Api, tyro.conf.subcommand("api")]
    | Annotated[Local, tyro.conf.subcommand("local")]
)


def main(args: Sequence[str] | None = None) -> int:
    """Do what is asked. Returns the exit code."""
    console = Console()

    def work() -> None:
        command: Pairs | Api | Local = read_flags(Command, args, __doc__)  # type: ignore[arg-type]
        with signals_raise():
            if isinstance(command, Pairs):
                console.print(make_pairs(command), highlight=False, soft_wrap=True)
            else:
                judge_pairs(command, console)

    try:
        return exit_code(work)
    except KeyboardInterrupt as stop:
        console.print("stopped; the same command goes on")
        return getattr(stop, "exit_code", 130)


# ---------------------------------------------------------------------- pairs


def make_pairs(command: Pairs) -> str:
    """Write the file of pairs, and say how many there are.

    Raises:
        ValueError: if there are none.
    """
    if command.samples < 1:
        raise ValueError(f"samples: {command.samples}; accepted: at least 1")
    a = read_answers(command, "a", command.a, command.writer_a)
    b = read_answers(command, "b", command.b, command.writer_b)
    shared = [key for key in a if key in b]
    if not shared:
        raise ValueError(f"a, b: {command.a} and {command.b} share no prompt; accepted: runs of one task")
    write_lines(command.out, ({"prompt": key[0], "answer_a": a[key], "answer_b": b[key]} for key in shared))
    alone = len(a) + len(b) - 2 * len(shared)
    left = f"; {alone:,} answers without a partner are left out" if alone else ""
    return f"{len(shared):,} pairs in {command.out}{left}"


def read_answers(command: Pairs, flag: str, path: Path, writer: Writer) -> dict[tuple[str, int], str]:
    """Answers by prompt and number."""
    if path.is_dir() and not (path / FILE).exists():
        raise ValueError(
            f"{flag}: {str(path)!r} has no {FILE}; make it: python experiments/evaluate.py {path} "
            f"--answers {path / FILE}"
        )
    lines = read_lines(path / FILE if path.is_dir() else path, flag, ("split", "writer", "prompt", "answer"))
    found: dict[tuple[str, int], str] = {}
    seen: Counter[str] = Counter()
    for line in lines:
        if (line["split"], line["writer"]) == (command.split, writer):
            if seen[line["prompt"]] < command.samples:
                found[line["prompt"], seen[line["prompt"]]] = line["answer"]
            seen[line["prompt"]] += 1
    if not found:
        raise ValueError(f"writer_{flag}: {str(path)!r} has no answers of the {writer} in the split {command.split}")
    return found


# ---------------------------------------------------------------------- verdicts


class Pair(NamedTuple):
    prompt: str
    a: str
    b: str

    def question(self, order: Order) -> Question:
        return Question(self.prompt, *((self.a, self.b) if order == "ab" else (self.b, self.a)))


def judge_pairs(command: Api | Local, console: Console) -> Summary:
    """Ask what has not been asked, and show what came of it.

    Raises:
        ValueError: in one line, if the judge cannot go on, or has said nothing; verdicts so far are on disk.
    """
    lines = read_lines(command.pairs, "pairs", ("prompt", "answer_a", "answer_b"))
    if not lines:
        raise ValueError(f"pairs: {str(command.pairs)!r} is empty; accepted: an object a line")
    pairs = [Pair(line["prompt"], line["answer_a"], line["answer_b"]) for line in lines]
    out = command.out or command.pairs.with_suffix(".verdicts.jsonl")
    judge = command.judge()
    with locked(out):
        verdicts = ask(judge, pairs, out, console)
    summary = summarise(pairs, verdicts)
    show(summary, f"{command.pairs}, judged by {judge.name}", console)
    if command.summary:
        write_json(command.summary, finite(asdict(summary)))
    console.print(f"verdicts in {out}", highlight=False, soft_wrap=True)
    return summary


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Two processes do not write into one file."""
    try:
        with FileLock(out.with_name(out.name + ".lock"), blocking=False):
            yield
    except Timeout:
        raise ValueError(f"out: {str(out)!r} is being written by another process; accepted: another --out") from None


def ask(judge: Judge, pairs: Sequence[Pair], out: Path, console: Console) -> dict[str, Verdict]:
    """The verdicts on all questions, by key: those in `out`, and the others once they are there."""
    asked: dict[str, tuple[Question, int, Order]] = {}  # two pairs of the same words are asked about once
    for number, pair in enumerate(pairs, 1):
        for order in ORDERS:
            question = pair.question(order)
            asked.setdefault(question.key, (question, number, order))
    verdicts = read_verdicts(out, judge.name, set(asked))
    todo = [question for key, (question, _, _) in asked.items() if key not in verdicts]
    there = len(asked) - len(todo)
    if there:
        console.print(f"{there:,} of {len(asked):,} verdicts are there", highlight=False)
    if not todo:
        return verdicts
    silent = 0
    with out.open("a", encoding="utf-8") as file, progress_bar(console) as progress:
        bar = progress.add_task("judging", total=len(asked), completed=there)

        def keep(question: Question, reply: Reply) -> None:
            nonlocal silent
            _, number, order = asked[question.key]
            line = {"judge": judge.name, "pair": number, "order": order, "verdict": reply.verdict, "said": reply.said}
            file.write(json.dumps(line | {"key": question.key}) + "\n")
            file.flush()
            progress.advance(bar)
            if reply.verdict is not None:
                verdicts[question.key] = reply.verdict
                return
            silent += 1
            if not verdicts and silent >= min(GIVE_UP, len(todo)):
                last = repr(" ".join(reply.said.split())[:120])
                raise ValueError(f"model: {silent} replies of {judge.name} hold no verdict; the last: {last}")

        try:
            judge.ask(todo, keep)
        except ValueError as error:
            kept = f"{len(verdicts):,} of {len(asked):,} verdicts are in {out}, and the same command goes on"
            raise ValueError(f"{error}; {kept}") from None
    return verdicts


def read_verdicts(out: Path, judge: str, keys: set[str]) -> dict[str, Verdict]:
    """What an earlier call has left; half a line at the end, of one that was killed, is cut off.

    Raises:
        ValueError: if it is of another judge or on other pairs.
    """
    if not out.exists():
        return {}
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with out.open("r+b") as file:
            file.truncate(whole)
    verdicts: dict[str, Verdict] = {}
    for line in read_lines(out, "out", ("judge", "key")):
        if line["judge"] != judge or line["key"] not in keys:
            what = f"verdicts of {line['judge']}" if line["judge"] != judge else "verdicts on other pairs"
            raise ValueError(f"out: {str(out)!r} holds {what}; accepted: another --out")
        if line.get("verdict") in get_args(Verdict):
            verdicts[line["key"]] = line["verdict"]
    return verdicts


# ---------------------------------------------------------------------- the win-rate


@dataclass(frozen=True)
class Summary:
    """What a judge thinks of the pairs that it judged in both orders."""

    win_rate: Estimate
    """Of a: wins and half of the ties, the mean over prompts, with its interval."""
    wins_a: int
    wins_b: int
    ties: int
    consistent: float
    """Share of these pairs with the same verdict in both orders."""
    first: float
    """Share of the answer shown first among all verdicts that are no tie: 50 % without a preference for a position."""
    unjudged: int
    """Pairs without a verdict in one order or both."""


def combine(ab: Winner, ba: Winner) -> Winner:
    """The verdict on a pair from those in both orders."""
    return ab if ab == ba else "tie"


def summarise(pairs: Sequence[Pair], verdicts: dict[str, Verdict]) -> Summary:
    """The numbers of the pairs that were judged in both orders.

    Raises:
        ValueError: if no pair was judged in both orders.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    outcomes: Counter[Winner] = Counter()
    same, first = [], []
    for pair in pairs:
        said = [verdicts.get(pair.question(order).key) for order in ORDERS]
        known = [v for v in said if v is not None]
        if len(known) < len(said):
            continue
        ab, ba = (WINNERS[order][verdict] for order, verdict in zip(ORDERS, known, strict=True))
        outcome = combine(ab, ba)
        outcomes[outcome] += 1
        scores[pair.prompt].append({"a": 1.0, "tie": 0.5, "b": 0.0}[outcome])
        same.append(ab == ba)
        first += [verdict == "first" for verdict in known if verdict != "tie"]
    if not scores:
        raise ValueError(
            f"pairs: none of {len(pairs)} has a verdict in both orders; the replies are in the verdicts' file"
        )
    estimate = bootstrap([[float(np.mean(s)) for s in scores.values()]], np.mean)
    return Summary(
        estimate,
        outcomes["a"],
        outcomes["b"],
        outcomes["tie"],
        float(np.mean(same)),
        float(np.mean(first)) if first else float("nan"),
        len(pairs) - outcomes.total(),
    )


def show(summary: Summary, title: str, console: Console) -> None:
    table = Table(title=escape(title), title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    rate = summary.win_rate
    interval = f" [{rate.low:.1%}, {rate.high:.1%}]" if np.isfinite(rate.low) else ""
    table.add_row("win-rate of a, ties half", escape(f"{rate.value:.1%}{interval}"))
    table.add_row("a wins, b wins, ties", f"{summary.wins_a:,}, {summary.wins_b:,}, {summary.ties:,}")
    table.add_row("same verdict in both orders", cell("{:.1%}", summary.consistent))
    table.add_row("for the answer shown first", cell("{:.1%}", summary.first))
    if summary.unjudged:
        table.add_row("pairs without a verdict", f"{summary.unjudged:,}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
