"""Whether teacher, student and task of --env lm fit together, as a table before the first token."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from agents.methods import GATED
from agents.metrics import HIGH_DIVERGENCE
from agents.pair import differing_entries
from agents.prompts import PromptStream
from distill_env.divergence import entropy, project, reverse_kl, support
from distill_env.env import DistillVectorEnv
from distill_env.models.base import TokenModel, TrainableModel, start_teacher
from distill_env.models.hub import absent_ids, id_range, load_tokenizer
from distill_env.models.names import base_of
from distill_env.ragged import PAD
from distill_env.randomness import Purpose, episode_keys, inverse_cdf, uniform
from distill_env.tasks.base import SPLITS, Prompt
from distill_env.tasks.registry import make_task
from experiments.running.build import LOADED_FLAGS, make_env, make_student
from experiments.running.config import Acceptable, RunConfig
from experiments.running.data_table import data_table
from experiments.running.lm_arguments import (
    head_rows,
    require_models,
    student_tokenizer,
    task_arguments,
    teacher_tokenizer,
)
from experiments.running.memory_estimate import estimate, free_bytes, local_teachers
from experiments.running.section import errors_name_flags

Status = Literal["ok", "warning", "error", "accepted"]
COLOURS: dict[Status, str] = {"ok": "green", "warning": "bold yellow", "error": "bold red", "accepted": "yellow"}
ACCEPTABLE = get_args(Acceptable)
PROBED_PROMPTS, PROBED_TOKENS = 8, 16
FAR = 0.9  # share of hard positions above which a student hardly learns from its own completions
MATERIAL = 0.1  # difference of two shares of hard positions
MARK = "answermark"
USER, ASSISTANT = {"role": "user", "content": "question"}, {"role": "assistant", "content": MARK}
CONVERSATIONS = ([USER], [{"role": "system", "content": "system"}, USER], [USER, ASSISTANT, USER])


@dataclass(frozen=True)
class Row:
    """The result of a check, and what to change if it is not ok."""

    name: str
    status: Status
    result: str
    change: str = ""


def tokenizer_row(teacher: Any, student: Any, heads: Mapping[str, int]) -> Row:
    """Teacher and student map every text to the same id.

    Args:
        teacher, student: tokenizers.
        heads: rows of the models' heads.
    """
    if differing := differing_entries(teacher, student):
        result = f"{differing:,} entries differ between teacher and student"
        return Row("tokenizer", "error", result, "take a student of the teacher's family")
    used = id_range(teacher)
    vocab_size = min([used, *heads.values()])
    result = f"the same mapping, {vocab_size:,} ids; logits are cut to these"
    if absent := len(absent_ids(teacher, vocab_size)):
        result += f"; {absent:,} of them are no token, and never drawn"
    if used > vocab_size:
        result += f"; of {used:,} ids of the tokenizer, those that a head lacks are never drawn"
    return Row("tokenizer", "ok", result)


def special_tokens_row(teacher: Any, student: Any) -> Row:
    """Both have the same bos and eos, which are trained. A different pad or unk is a warning."""
    ids = {name: [getattr(t, f"{name}_token_id") for t in (teacher, student)] for name in ("bos", "eos", "pad", "unk")}
    differing = [name for name, (a, b) in ids.items() if a != b]
    result = ", ".join(
        f"{name} {_id(a)}" if a == b else f"{name} {_id(a)} of teacher, {_id(b)} of student"
        for name, (a, b) in ids.items()
    )
    if teacher.eos_token_id is None:
        return Row("special_tokens", "error", result, "name the token that ends a completion with --eos-token")
    status: Status = "error" if {"bos", "eos"} & {*differing} else "warning" if differing else "ok"
    change = f"set the teacher's {', '.join(differing)} in the student's tokenizer_config.json" if differing else ""
    if "eos" in differing:
        change += f", or the eos of both with --eos-token '{teacher.eos_token}'"
    return Row("special_tokens", status, result, change)


def end_of_turn_row(tokenizer: Any, ends: Mapping[str, frozenset[int]], turn_end: int | None) -> Row:
    """Completions end with the tokenizer's eos in this run, and with the same token outside of it.

    Args:
        tokenizer: of the teacher.
        ends: ids that end a completion of teacher and student by their generation_config.json or config.json.
        turn_end: id after an assistant's turn in the chat template; None if there is none or it is not used.
    """
    eos = tokenizer.eos_token_id
    tokens = {who: ", ".join(_token(tokenizer, i) for i in sorted(ids)) or "none" for who, ids in ends.items()}
    where = f"completions end with {_token(tokenizer, eos)}"
    if turn_end not in (None, eos):
        token = _token(tokenizer, turn_end)
        change = f"--eos-token '{tokenizer.convert_ids_to_tokens(turn_end)}', or --chat no"
        return Row("end_of_turn", "error", f"{where}, but the chat template ends a turn with {token}", change)
    without = [who for who, ids in ends.items() if eos not in ids]
    if without:
        result = f"{where}, but by itself the {without[0]} ends them with {tokens[without[0]]}"
        change = f"add {eos} to eos_token_id in generation_config.json of the {' and the '.join(without)}"
        return Row("end_of_turn", "error", result, change)
    if len(set(ends.values())) > 1:
        result = f"{where}; outside of this run " + "; ".join(f"the {who} with {ids}" for who, ids in tokens.items())
        return Row("end_of_turn", "warning", result, "set one eos_token_id in both generation_config.json")
    others = frozenset().union(*ends.values()) - {eos}
    if others:
        where += f"; {', '.join(_token(tokenizer, i) for i in sorted(others))} end them only outside of this run"
    return Row("end_of_turn", "ok", where)


def chat_template_row(teacher: Any, student: Any, used: bool) -> Row:
    """Both chat templates turn a conversation into the same text. `used`: whether prompts use the teacher's."""
    if not used:
        return Row("chat_template", "ok", "not used: prompts are plain text")
    if student.chat_template is None:
        result, change = "the teacher's; the student has none", "--chat-template FILE for both, or --chat no"
        return Row("chat_template", "error", result, change)
    if teacher.chat_template == student.chat_template:
        return Row("chat_template", "ok", "the same")
    if conversations(teacher) == conversations(student):
        return Row("chat_template", "ok", "different templates with the same text for three conversations")
    change = "--chat-template FILE for both, such as the teacher's chat_template.jinja, or --chat no"
    return Row("chat_template", "error", "teacher and student turn a conversation into different texts", change)


def conversations(tokenizer: Any) -> list[str | None]:
    """Three conversations as text by a chat template; None for one that it refuses."""
    return [render(tokenizer, turns, add_generation_prompt=True) for turns in CONVERSATIONS]


def render(tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception:  # a template may raise anything
        return None


def turn_end_token(tokenizer: Any) -> int | None:
    """The special token after an assistant's turn in the chat template, if any."""
    text = render(tokenizer, CONVERSATIONS[2][:2]) or ""
    ids = tokenizer(text.partition(MARK)[2], add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    return next((i for i in ids if i in special), None)


def end_tokens(name: str, **options: Any) -> frozenset[int]:
    """Ids that end a completion of a model by its generation_config.json, or else by its config.json."""
    from transformers import AutoConfig, GenerationConfig  # slow, and other environments do without

    name = base_of(name)
    ids = None
    if "gguf_file" not in options:
        with suppress(OSError):  # many have none
            ids = GenerationConfig.from_pretrained(name).eos_token_id
    if ids is None:
        ids = AutoConfig.from_pretrained(name, **options).get_text_config(decoder=True).eos_token_id
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


def _id(number: int | None) -> str:
    return "none" if number is None else str(number)


def _token(tokenizer: Any, number: int | None) -> str:
    return f"{tokenizer.convert_ids_to_tokens(number)} ({number})" if number is not None else "none"


def context_row(
    longest: int, allowed: int, lengths: Mapping[str, int | None], because: Mapping[str, str] | None = None
) -> Row:
    """Prompts and completions fit into the contexts.

    Args:
        longest: tokens of the longest prompt and the horizon.
        allowed: --max-prompt-tokens and the horizon.
        lengths: context lengths of teacher and student; None is no limit.
        because: what sets a length that is less than the context.
    """
    parts = [f"{who} {n:,}{(because or {}).get(who, '')}" if n else f"{who} any" for who, n in lengths.items()]
    result = "; ".join([f"{longest:,} tokens", *parts])
    short = min((n for n in lengths.values() if n), default=allowed)
    if longest > short:
        return Row("context", "error", result, f"lower --max-prompt-tokens or --max-new-tokens by {longest - short}")
    if allowed > short:
        result += f"; --max-prompt-tokens allows {allowed:,}"
        change = f"with longer prompts, lower --max-prompt-tokens by {allowed - short}"
        return Row("context", "warning", result, change)
    return Row("context", "ok", result)


def memory_row(needs: Mapping[str, int], loaded: int, free: int) -> Row:
    """There is enough free memory.

    Args:
        needs: bytes by purpose.
        loaded: bytes of them that are in use already.
        free: bytes.
    """
    total, missing = sum(needs.values()), sum(needs.values()) - loaded
    parts = ", ".join(f"{name} {decimal(size)}" for name, size in needs.items())
    result = f"about {decimal(total)}, {decimal(missing)} of it not yet in use, {decimal(free)} free; {parts}"
    if missing <= 0.8 * free:
        return Row("memory", "ok", result)
    remedies = {
        "gradients": "--lora-rank",
        "AdamW": "--lora-rank",
        "key/value caches": "a lower --rows, --max-prompt-tokens or --max-new-tokens",
        "teacher's distributions of a batch": "a lower --batch-size or --teacher-buffer-gib, or --top-k",
        "drafts or backward pass": "a lower --rows, --micro-batch or --chunk-positions, or --gradient-checkpointing",
    }
    largest = max(remedies, key=lambda name: needs.get(name, 0))
    return Row("memory", "error" if missing > free else "warning", result, f"for {largest}: {remedies[largest]}")


def weights_row(models: Mapping[str, Any]) -> Row:
    """Numbers of weights. That all are finite was checked when they were loaded."""
    counts = []
    for who, model in models.items():
        all_of_it = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        counts.append(f"{who} {all_of_it:,}" + (f", trainable {trainable:,}" if trainable else ""))
    return Row("weights", "ok", f"all finite; {', '.join(counts)}")


def probe(teacher: TokenModel, student: TokenModel, prompts: Sequence[Prompt], length: int, seed: int) -> Any:
    """The beginnings of completions by the student, and the log-probabilities of both models there.

    Returns:
        Log-probabilities of student and teacher, [n, T, V] each, and a mask of the positions, bool [n, T].
    """
    ids = [prompt.ids for prompt in prompts]
    keys = episode_keys(seed, np.arange(len(ids)))
    own, theirs = [student.start(ids)], start_teacher(teacher, prompts)[:, None]
    tokens = torch.empty(len(ids), 0, dtype=torch.long)
    alive = torch.ones(len(ids), dtype=torch.bool)
    for t in range(length - 1):
        drawn = inverse_cdf(own[-1], uniform(keys, t, Purpose.STUDENT)).cpu()
        alive = alive & (drawn != student.eos_token_id)
        if not bool(alive.any()) or bool(own[-1].isnan().any()):
            break
        tokens = torch.cat([tokens, torch.where(alive, drawn, PAD)[:, None]], 1)
        own.append(student.extend(tokens[:, -1:])[:, 0])
    if tokens.shape[1]:
        theirs = torch.cat([theirs, teacher.extend(tokens)], 1)
    exists = torch.cat([torch.ones(len(ids), 1, dtype=torch.bool), tokens != PAD], 1)
    return torch.stack(own, 1).cpu(), theirs.cpu(), exists


def teacher_row(log_probs: Tensor) -> Row:
    """The teacher's log-probabilities [m, V] are finite or -inf."""
    if wrong := int((log_probs.isnan() | log_probs.isposinf()).any(-1).sum()):
        result = f"its log-probabilities are NaN or inf at {wrong} of {len(log_probs)} positions"
        return Row("teacher", "error", result, "load it with --dtype float32, or --attn-implementation eager")
    mean_entropy = float(entropy(log_probs).mean())
    return Row("teacher", "ok", f"finite at {len(log_probs)} positions of the student, entropy {mean_entropy:.3f} nats")


def divergence_row(student: Tensor, teacher: Tensor, tau: float, own_text: bool = True) -> Row:
    """D_t at positions [m, V] of the first batch; `own_text`: whether the student learns on completions of its own."""
    if bool(student.isnan().any()) or bool(teacher.isnan().any()):
        return Row("divergence", "error", "D_t of the first batch is NaN", "check the weights of both")
    divergence = reverse_kl(student, teacher).clamp(min=0)
    hard = float((divergence >= tau).double().mean())
    result = f"D_t {float(divergence.mean()):.3f} nats, {hard:.0%} of {len(divergence)} positions above {tau:g}"
    if hard > FAR and own_text:
        change = (
            "begin with a student closer to the teacher (--agent fkl --teacher-writes reference first), or raise --tau"
        )
        return Row("divergence", "warning", result, change)
    return Row("divergence", "ok", result)


def truncation_row(
    student: Tensor, teacher: Tensor, ids: Tensor, tau: float, gate_reads: Literal["whole", "truncated"], fixed: bool
) -> Row:
    """D_t at positions [m, V] of the first batch beside the truncated one.

    Args:
        student, teacher: log-probabilities [m, V]; of a server those beyond its likeliest ids share its mass equally.
        ids: int64 [m, k], the support, padded with -1.
        tau: threshold, nats.
        gate_reads: which of the two the gate reads.
        fixed: whether tau is a number that nothing adapts, and D_t is what it is compared with.
    """
    both = {
        "whole": reverse_kl(student, teacher).clamp(min=0),
        "truncated": reverse_kl(project(student, ids), project(teacher, ids)).clamp(min=0),
    }
    hard = {name: float((d >= tau).double().mean()) for name, d in both.items()}
    shown = [f"{name} {float(d.mean()):.3f} nats, {hard[name]:.0%} above {tau:g}" for name, d in both.items()]
    result = f"D_t {'; '.join(shown)}; the gate reads the {gate_reads} one"
    if gate_reads == "truncated" and fixed and abs(hard["whole"] - hard["truncated"]) > MATERIAL:
        change = "let --tau auto or --budget choose tau for what the gate reads, or take --score jensen_shannon"
        return Row("truncation", "warning", result, change)
    return Row("truncation", "ok", result)


def file_rows(config: RunConfig) -> list[Row]:
    """Checks of tokenizers and configurations, before the weights are loaded."""
    teacher, student = load_tokenizer(teacher_tokenizer(config)), load_tokenizer(student_tokenizer(config))
    used = config.data.task != "text" and config.data.chat != "no" and teacher.chat_template is not None
    remote = {"trust_remote_code": config.loading.trust_remote_code}
    gguf = {"gguf_file": config.teacher.gguf_file} if config.teacher.gguf_file else {}
    ends = {"student": end_tokens(config.student.model, **remote)}
    for name, model in config.teacher.local.items():
        ends[f"teacher {name}".rstrip()] = end_tokens(model, **remote, **gguf)
    if config.data.eos_token:  # the student's folder will say so
        ends["student"] = frozenset({int(teacher.eos_token_id)})
    return [
        tokenizer_row(teacher, student, head_rows(config)),
        special_tokens_row(teacher, student),
        end_of_turn_row(teacher, ends, turn_end_token(teacher) if used else None),
        chat_template_row(teacher, student, used),
    ]


def data_row(task: Any, path: str) -> Row:
    """There are prompts to train on, to validate and to test.

    Args:
        task: of the run.
        path: of its data.
    """
    counts = {split: len(task.prompts(split)) for split in SPLITS}
    result = "prompts: " + (", ".join(f"{split} {n:,}" for split, n in counts.items() if n) or "none")
    missing = [split for split in SPLITS[:3] if not counts[split]]
    if missing:
        result += f"; none to {'train on' if missing[0] == 'train' else missing[0].removesuffix('ion') + 'e'}"
        change = f"add a file named {missing[0]}, or give one file, of which parts are held out"
        if Path(path).is_file():
            change = "give the file another name: one that begins with test is the test split"
        return Row("data", "error", result, change)
    if {*task.prompts("test")} == {*task.prompts("train")}:
        result += "; the same in each, since there are few"
    return Row("data", "ok", result)


def model_rows(config: RunConfig, env: DistillVectorEnv, student: Any, shards: int = 1) -> list[Row]:
    """Checks of the loaded models and the task."""
    teacher: Any = env.teacher
    models = {"teacher": teacher, "student": student}
    lengths = {who: model.max_length for who, model in models.items()}
    because = {who: model.limit.because for who, model in models.items() if hasattr(model, "limit")}
    longest = env.max_prompt_length + env.max_new_tokens
    allowed = (config.data.max_prompt_tokens or env.max_prompt_length) + env.max_new_tokens
    contexts = [context_row(longest, allowed, lengths, because)]
    if env.teacher_sees_more:  # its prompts are others
        theirs = {"teacher": lengths.pop("teacher")}
        longest_of_teacher = env.max_teacher_prompt_length + env.max_new_tokens
        of_teacher = context_row(longest_of_teacher, longest_of_teacher, theirs, because)
        contexts = [context_row(longest, allowed, lengths, because), replace(of_teacher, name="teacher_context")]
    local = local_teachers(teacher)
    if not local:
        rows = [weights_row({"student": student.model}), *contexts]
    else:
        needs = estimate(config, env, student.model, shards)
        memory = memory_row(needs, needs["teacher"] + needs["student"], free_bytes(student.model.device))
        rows = [weights_row({"student": student.model, **local}), *contexts, memory]
    if any(context.status == "error" for context in contexts):
        return rows
    seed, size = config.agent_options.seed, min(PROBED_PROMPTS, config.agent_options.batch_size)
    prompts = PromptStream(env.prompts, seed).take(0, size)
    method = config.method or GATED
    gate, own_text = method.gate, not method.cacheable
    tau = gate.threshold if gate.score == "divergence" and gate.tau != "auto" else HIGH_DIVERGENCE
    length = min(PROBED_TOKENS, env.max_new_tokens)
    own, read, exists = probe(teacher.fork(), student.fork(), prompts, length, seed)
    rows += [teacher_row(read[exists]), divergence_row(own[exists], read[exists], tau, own_text)]
    if config.method is not None and method.truncates and rows[-1].status != "error":
        ids = support(read[exists], method.top_k, method.top_p)
        assert ids is not None
        whole = method.reads_in_rollout and not config.teacher.is_served
        fixed = method.gated and not method.budget and gate.score == "divergence" and gate.tau != "auto"
        rows.append(truncation_row(own[exists], read[exists], ids, tau, "whole" if whole else "truncated", fixed))
    return rows


def mark_accepted(rows: Iterable[Row], accept: Sequence[str]) -> list[Row]:
    """The rows, errors that are accepted by name marked."""
    accepted = {*accept} & {*ACCEPTABLE}
    return [replace(r, status="accepted") if r.status == "error" and r.name in accepted else r for r in rows]


def table_of(rows: Iterable[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("check", "", "result", "what to change"):
        table.add_column(name, overflow="fold")
    for row in rows:
        status = f"[{COLOURS[row.status]}]{row.status}[/]"
        status += f"\n--accept {row.name}" if row.status == "accepted" else ""
        table.add_row(row.name, status, escape(row.result), escape(row.change))
    return table


def raise_errors(rows: Iterable[Row]) -> None:
    """Raise ValueError, in one line, if a row is an error."""
    errors = [row for row in rows if row.status == "error"]
    if not errors:
        return
    first = errors[0]
    accepting = f", or --accept {first.name}" if first.name in ACCEPTABLE else ""
    others = f" (and {', '.join(row.name for row in errors[1:])})" if errors[1:] else ""
    raise ValueError(f"preflight: {first.name}: {first.result}; {first.change}{accepting}{others}")


def checked_pair(
    config: RunConfig, console: Console, rows: int, shards: int = 1
) -> tuple[DistillVectorEnv, TrainableModel]:
    """The training environment and the student of a run of --env lm, after all checks. It prints their table.

    Args:
        config: of the run.
        console: for the table.
        rows: of the environment.
        shards: processes that the student will be split over.

    Raises:
        ValueError: in one line, for the first error that is not accepted.
    """
    require_models(config)
    result = mark_accepted(file_rows(config), config.loading.accept)
    try:
        raise_errors(result)
        with errors_name_flags(LOADED_FLAGS):
            task: Any = make_task(config.data.task, **task_arguments(config))
        result.append(data_row(task, config.data.path))
        if hasattr(task, "report"):
            console.print(data_table(task, config))
        raise_errors(result)
        env = make_env(config, "train", rows, purpose="train")
        student = make_student(config, env)
        result += mark_accepted(model_rows(config, env, student, shards), config.loading.accept)
    finally:
        console.print(table_of(result, f"teacher {', '.join(config.teacher.models)}, student {config.student.model}"))
    raise_errors(result)
    return env, student
