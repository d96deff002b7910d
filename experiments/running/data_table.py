"""What became of the data of --env lm, as a table: rows read, prompts used, what was left out and why."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from distill_env.tasks.base import SPLITS
from distill_env.tasks.report import DataReport, places
from experiments.running.config import RunConfig

REASONS = 8  # that the table lists


def data_table(task: Any, config: RunConfig) -> Table:
    """The table of a language task of a run."""
    report: DataReport = task.report
    table = Table(title=escape(f"task {config.data.task} {config.data.path}".strip()), title_justify="left")
    table.add_column("")
    table.add_column("number", justify="right")
    table.add_column("which", overflow="fold")
    if report.rows:
        table.add_row("rows read", f"{report.rows:,}", "")
    counts = ", ".join(f"{split} {report.prompts[split]:,}" for split in SPLITS if split in report.prompts)
    with_reference = f"; with a reference completion {report.references:,}" if report.references else ""
    table.add_row("prompts", f"{sum(report.prompts.values()):,}", counts + with_reference)
    reasons = report.reasons()
    for reason, found in reasons[:REASONS]:
        what = reason.partition("; expected")[0]
        table.add_row(f"[yellow]left out[/]: {escape(what)}", f"{len({*found}):,}", escape(places(found)))
    if len(reasons) > REASONS:
        rest = [place for _, found in reasons[REASONS:] for place in found]
        table.add_row(f"[yellow]left out[/] for {len(reasons) - REASONS} other reasons", f"{len(rest):,}", "")
    if report.long:
        text = f"[yellow]left out[/]: prompts longer than {config.data.max_prompt_tokens} tokens"
        keeps = f"; --max-prompt-tokens {report.usual_length} keeps nine of ten"
        table.add_row(text, f"{len(report.long):,}", escape(places(report.long)) + keeps)
    if report.long_for_teacher:
        text = f"[yellow]left out[/]: teacher's prompts longer than {config.data.max_teacher_prompt_tokens} tokens"
        table.add_row(text, f"{len(report.long_for_teacher):,}", escape(places(report.long_for_teacher)))
    horizon = config.environment.max_new_tokens or task.max_new_tokens
    prompts = {id(p): p for split in SPLITS for p in task.prompts(split)}.values()
    if cut := [p for p in prompts if len(p.reference_completion or ()) > horizon]:
        text = f"[yellow]cut[/]: reference completions longer than {horizon} tokens"
        table.add_row(text, f"{len(cut):,}", escape(places(p.place for p in cut if p.place)))
    if report.joined:
        text = "[yellow]messages joined by empty lines[/], without roles: there is no chat template"
        table.add_row(text, f"{report.joined:,}", "--chat-template FILE gives one")
    if report.unread:
        columns = ", ".join(f"{column} ({count:,})" for column, count in report.unread.most_common())
        table.add_row("columns not read", "", escape(columns))
    if report.files:
        table.add_row("not read: no split in the name", "", escape(", ".join(report.files)))
    return table
