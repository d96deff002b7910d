r"""Malformed input of every kind ends in one clear line, with an exit code that is not 0, and loses nothing.

A case is what is done and the words that its line has to hold: where the mistake is, what was given, what is accepted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents.checkpoint import checkpoints
from distill_env.env import DistillVectorEnv
from distill_env.models.hub import load_tokenizer
from distill_env.models.load import build_model
from distill_env.models.tabular import TabularModel, markov
from distill_env.tasks.grading import grade as grading
from distill_env.tasks.grading.grade import Verifier, grade
from distill_env.tasks.registry import make_task
from experiments import ablate, compare, evaluate, report
from experiments.running import lifecycle as run_module
from experiments.running.config import flag_names
from experiments.running.config_file import default_config
from tests.helpers.paths import REPOSITORY

V, EOS, CONTEXT = 257, 256, 64
SMALL = "--env categorical --iterations 4 --checkpoint-every 2 --batch-size 4 --draft-length 2 --eval-samples 2"
SMALL += " --validate-every 4 --track none"


@dataclasses.dataclass(frozen=True)
class World:
    """What is good, to be damaged in copies."""

    lm: Path  # a language model of one layer and 64 tokens of context, a token a byte and `<e>` the end
    other: Path  # the same with another tokenizer
    chat: dict[str, Path]  # tokenizers by what their chat template is
    run: Path  # a finished run of four iterations, checkpoints 2 and 4


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **({"eos_token": "<e>"} | options))


TEMPLATES = {
    "alternating": "{% if messages[0].role != 'user' %}{{ raise_exception('must alternate') }}{% endif %}<a>",
    "broken": "{% for m in messages %}",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("good")
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    special = {"eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=CONTEXT, **shape, **special))
    for name, tokens in (("lm", tokenizer()), ("other", tokenizer(eos_token="<end>"))):
        model.save_pretrained(root / name)
        tokens.save_pretrained(str(root / name))
    chat = {}
    for name, template in TEMPLATES.items():
        tokenizer(chat_template=template).save_pretrained(str(root / name))
        chat[name] = root / name
    assert run_module.main([*SMALL.split(), "--out", str(root / "runs"), "--name", "run"]) == 0
    return World(root / "lm", root / "other", chat, root / "runs/run")


Act = Callable[[World, Path], int | None]  # given an empty folder; an exit code, or None if it should have raised


def said(act: Act, world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line: what was raised, or what a command printed before it gave an exit code that is not 0."""
    capsys.readouterr()
    try:
        code = act(world, folder)
    except (ValueError, OSError, FloatingPointError) as error:
        line = str(error)
    else:
        assert code, f"accepted: {capsys.readouterr().out[-500:]}"
        line = capsys.readouterr().err.strip()
        assert line.startswith("error ")
    assert line.splitlines() == [line]
    assert len(line) < 900
    return line


def check(case: tuple[Any, ...], world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    act, *words = case
    line = said(act, world, folder, capsys)
    for word in words:
        assert str(word) in line, line


# ---------------------------------------------------------------------- flags


def kind_of(hint: Any) -> Any:
    """int, float or the choices of a field; None for others."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if isinstance(hint, types.UnionType):
        hint = next(k for k in get_args(hint) if k is not types.NoneType)
    return hint if hint in (int, float) else None


FREE_BELOW = {"task_reward", "log_prob_floor"}  # may be negative
MAY_BE_INFINITE = {"rewrite_cost", "tau", "score_clip", "loss_clip", "max_grad_norm"}


def flags() -> Iterator[tuple[str, str, str]]:
    """An agent that has the flag, the flag, and a value that is none for it, for every number and every choice."""
    configs: list[Any] = [default_config(agent, "categorical") for agent in ("m:Agent", "ppo", "gated")]
    agents = [(config, config.agent) for config in configs]
    seen: set[tuple[type, str]] = set()
    while agents:
        config, agent = agents.pop()
        hints = get_type_hints(type(config))
        for field in dataclasses.fields(config):
            name, kind = flag_names(type(config))[field.name], kind_of(hints[field.name])
            if dataclasses.is_dataclass(value := getattr(config, field.name)):
                agents.append((value, agent))
            if (type(config), name) in seen:
                continue
            seen.add((type(config), name))
            if isinstance(kind, tuple):
                yield agent, name, f"{kind[0]}{kind[0][-1]}"  # a near miss
            elif kind is int:
                yield agent, name, "-1"
            elif kind is float:
                yield from ((agent, name, value) for value in ("nan", "-inf"))
                yield from ((agent, name, value) for value in ["inf"] * (name not in MAY_BE_INFINITE))
                yield from ((agent, name, value) for value in ["-0.5"] * (name not in FREE_BELOW))


@pytest.mark.parametrize(("agent", "name", "value"), list(flags()))
def test_a_flag_out_of_range(
    agent: str, name: str, value: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every numeric flag and every choice of every agent; nothing is left behind."""
    out = tmp_path / "runs"
    arguments = ["--agent", agent, "--env", "categorical", f"--{name.replace('_', '-')}={value}", "--out", str(out)]
    line = said(lambda *_: run_module.main(arguments), world, tmp_path, capsys)
    assert name in line.replace("-", "_")
    assert value in line or str(float(value)) in line
    assert not out.exists()


FLAGS: dict[str, tuple[str, ...]] = {
    # zeros, and numbers above what there is
    "--iterations 0": ("iterations: 0", "at least 1"),
    "--max-new-tokens 0": ("max_new_tokens: 0", "at least 1"),
    "--max-new-tokens 100000000000000": ("out of memory", "max_new_tokens"),
    "--max-prompt-tokens 0": ("max_prompt_tokens: 0", "at least 1"),
    "--draft-limit 0": ("draft_limit: 0", "at least 1"),
    "--draft-limit 1000000000000000": ("out of memory",),
    "--batch-size 0": ("batch_size: 0", "at least 1"),
    "--batch-size 1000000000000000": ("out of memory", "batch_size"),
    "--rows 65 --batch-size 64": ("rows: 65", "at most the batch size, 64"),
    "--eval-prompts 0": ("eval_prompts: 0", "at least 1"),
    "--eval-samples 0": ("eval_samples: 0", "at least 1"),
    "--validate-every 0": ("validate_every: 0", "at least 1"),
    "--threads 1000000": ("threads: 1000000", "at most 4096"),
    "--seed 9223372036854775808": ("seed: 9223372036854775808", "at most 9223372036854775807"),
    "--student-width 18": ("student_width: 18", "multiple of 4"),
    "--student-layers 0": ("student_layers: 0", "at least 1"),
    "--warm-start 1.5": ("warm_start: 1.5", "at most 1"),
    "--rewrite-top-p 0": ("rewrite_top_p: 0.0", "(0, 1]"),
    "--rewrite-top-p 1.1": ("rewrite_top_p: 1.1", "(0, 1]"),
    "--log-prob-floor 0": ("log_prob_floor: 0.0", "below 0"),
    "--log-prob-floor=5": ("log_prob_floor: 5.0", "below 0"),
    "--learning-rate 0": ("learning_rate: 0.0", "positive"),
    "--alpha 0": ("alpha: 0.0", "positive"),
    "--smoothing 1": ("smoothing: 1.0", "[0, 1)"),
    "--score-clip 0": ("score_clip: 0.0", "positive"),
    "--beta 0": ("beta: 0.0", "(0, 1)"),
    "--skew 1": ("skew: 1.0", "(0, 1)"),
    "--top-p 0": ("top_p", "(0, 1]"),
    "--agent ppo --n-epochs 0": ("n_epochs: 0", "at least 1"),
    "--agent ppo --gamma 1.01": ("gamma: 1.01", "[0, 1]"),
    # names
    "--agent gatedd": ("agent: 'gatedd'", "accepted: sft"),
    "--agent Gated": ("agent: 'Gated'", "gated"),
    "--agent ''": ("agent: ''", "gated"),
    "--agent :": ("agent: ':'", "package.module:Class"),
    "--agent no_such_module:Agent": ("agent: 'no_such_module:Agent'", "package.module:Class"),
    "--agent json:NoSuchClass": ("agent: 'json:NoSuchClass'", "package.module:Class"),
    "--agent json:JSONDecoder": ("agent: 'json:JSONDecoder' has no learn, act, save, load", "agents.base.Agent"),
    "--env sum": ("env: 'sum'", "sums, coins"),
    "--no-such-flag 3": ("--no-such-flag",),
    "--tua 0.3": ("--tua",),
    "--tau": ("--tau",),
    "--tau much": ("--tau", "'much'"),
    "--iterations 1.5": ("--iterations", "'1.5'"),
    "--max-new-tokens many": ("--max-new-tokens", "'many'"),
    "gated": ("gated",),
    "--name ../elsewhere": ("name: '../elsewhere'", "one folder under --out"),
    "--name /tmp/elsewhere": ("name: '/tmp/elsewhere'", "one folder under --out"),
    "--name a/b": ("name: 'a/b'", "one folder under --out"),
    "--name ..": ("name: '..'", "one folder under --out"),
    "--name .": ("name: '.'", "one folder under --out"),
    f"--name {'x' * 300}": ("name: 'xxx", "200 bytes"),
    "--push-to-hub student": ("push_to_hub: 'student'", "user/name"),
    "--push-to-hub a/b/c": ("push_to_hub: 'a/b/c'", "user/name"),
    "--student /nowhere": ("/nowhere", "accepted: a folder"),
    "--resume --name nothing": ("nothing' holds no run", "config.json"),
    # contradictions
    "--task-reward 1": ("task_reward: 1.0", "set --gamma 1"),
    "--budget 0.1 --teacher-writes never": ("budget: 0.1", "hard or soft"),
    "--budget 0.1 --tau inf": ("budget: 0.1", "finite tau"),
    "--budget 1": ("budget: 1.0", "in (0, 1)"),
    "--cumulative --step-reduction mean": ("step_reduction: 'mean'", "accepted: none"),
    "--weighting soft --hand_over_rest": ("weighting: soft", "accepted: written, hard"),
    "--score rank --top-k 3": ("rank", "drop top_k"),
    "--loss todi --top-p 0.9": ("loss: 'todi'", "drop top_k and top_p"),
    "--loss negative": ("with loss negative", "accepted: never"),
    "--loss reverse --forward-kl-anneal 10": ("forward_kl_anneal", "accepted: weighted"),
    "--agent gate_only --estimator sampled": ("estimator: sampled", "take estimator exact"),
    "--agent rkl --importance-weights": ("importance: with writer 'never'", "accepted: random"),
    "--agent minillm --top-k 3": ("importance", "drop top_k"),
    "--agent minillm --teacher-rate-anneal 5": ("importance", "accepted: random, under 1, 0"),
    # language models
    "--env lm --student x": ("teacher: --env lm needs --teacher",),
    "--env lm --teacher x": ("student: --env lm needs --student",),
    "--env lm --teacher /nowhere --student /nowhere": ("tokenizer: '/nowhere'", "no folder with a tokenizer"),
    "--env lm --teacher LM --student LM": ("task_path: none is given", ".jsonl"),
    "--env lm --teacher LM --student OTHER --task-path DATA": ("preflight: tokenizer: 2 entries differ", "family"),
    "--env lm --teacher LM --student LM --task-path DATA --few-shot 5": ("few_shot: 5", "fewer than the 3 solved"),
    "--env lm --teacher LM --student LM --task-path DATA --chat yes": ("chat: yes", "no chat template"),
    "--env lm --teacher LM --student LM --task-path DATA --step-pattern [": ("step_pattern: '['", "regular"),
    "--env lm --teacher LM --student LM --task-path DATA --max-prompt-tokens 2": ("max_prompt_tokens: 2", "at least 5"),
    "--env lm --teacher LM --student LM --task-path DATA --max-new-tokens 60": ("context of 64", "lower"),
    "--env lm --teacher LM --student LM --task text --few-shot 2": ("few_shot, chat", "accepted: 0"),
    "--env lm --teacher LM --student LM --task-path LONG": ("max_prompt_tokens: 256", "at least 300, the shortest"),
}


@pytest.mark.parametrize("line", FLAGS)
def test_a_command_line_that_is_wrong(
    line: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is left behind."""
    data, long = tmp_path / "data.jsonl", tmp_path / "long.txt"
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "output": "x"}) + "\n" for i in range(3)))
    long.write_text("x" * 300)
    paths = {"LM": world.lm, "OTHER": world.other, "DATA": data, "LONG": long}
    arguments = [str(paths.get(word, word)) for word in shlex.split(line)]
    if "--env" not in arguments and "--resume" not in arguments:
        arguments = ["--env", "categorical", *arguments]

    def act(*_: Any) -> int:
        return run_module.main([*arguments, "--out", str(tmp_path / "runs")])

    check((act, *FLAGS[line]), world, tmp_path, capsys)
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------- data


def json_line(**row: Any) -> str:
    return json.dumps(row) + "\n"


def messages(*turns: Any) -> str:
    return json_line(messages=[dict(zip(("role", "content"), turn, strict=False)) for turn in turns])


NO_PROMPT = ("line 1: the columns are", "accepted: prompt, instruction")
NO_MATHS = ("line 1: the columns are", "accepted: question and answer")
NO_ROLE = ("line 1: messages need a role (system, user, assistant)",)
NO_USER = ("line 1: messages have no text of the user",)

DATA: dict[str, tuple[Any, ...]] = {
    # broken files
    "cut in a text": ("instruct", "a.jsonl", '{"prompt": "x"}\n{"prompt": "y', "line 2: not valid JSON"),
    "cut in a key": ("instruct", "a.jsonl", '{"prompt": "x"}\n{"pro', "line 2: not valid JSON"),
    "two on a line": ("instruct", "a.jsonl", '{"prompt": "x"} {"prompt": "y"}', "line 1: not valid JSON: Extra data"),
    "single quotes": ("instruct", "a.jsonl", "{'prompt': 'x'}", "line 1: not valid JSON"),
    "a comma too many": ("instruct", "a.jsonl", '{"prompt": "x",}', "line 1: not valid JSON"),
    "a list cut": ("instruct", "a.json", '[{"prompt": "x"}', "a.json: not valid JSON"),
    "a list of nothing": ("instruct", "a.json", "[]", "holds no rows"),
    "an empty list file": ("instruct", "a.json", "", "a.json: not valid JSON"),
    "an object for a list": ("instruct", "a.json", '{"train": []}', "dict; accepted: a list of objects"),
    "null for a list": ("instruct", "a.json", "null", "NoneType; accepted: a list of objects"),
    "numbers for rows": ("instruct", "a.json", "[1, 2]", "row 1: int; accepted: an object"),
    "lists for rows": ("instruct", "a.json", '[[{"prompt": "x"}]]', "row 1: list; accepted: an object"),
    "null for a row": ("instruct", "a.jsonl", "null\n", "line 1: NoneType; accepted: an object"),
    "a text for a row": ("instruct", "a.jsonl", '"x"\n', "line 1: str; accepted: an object"),
    "nested too deeply": ("instruct", "a.jsonl", '{"a":' * 10**5, "line 1: not valid JSON: nested too deeply"),
    "two marks of UTF-8": ("instruct", "a.jsonl", '\ufeff\ufeff{"prompt": "x"}', "line 1: not valid JSON"),
    "UTF-16": ("instruct", "a.jsonl", '{"prompt": "x"}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "UTF-16 without a mark": ("instruct", "a.txt", "hello".encode("utf-16-le"), "NUL at character 1", "UTF-8"),
    "Latin-1": ("instruct", "a.txt", b"caf\xe9", "not UTF-8 at byte 3; accepted: UTF-8"),
    "NUL bytes": ("instruct", "a.jsonl", b'{"prompt": "x\0y"}', "NUL at character 13"),
    "nothing but NUL": ("instruct", "a.txt", b"\0" * 99, "NUL at character 0"),
    "an empty file": ("instruct", "a.jsonl", "", "holds no rows"),
    "empty lines": ("instruct", "a.txt", " \n\t\n\n", "holds no rows"),
    "another format": ("instruct", "a.xml", "<a/>", "unknown format; accepted: .jsonl"),
    "no format": ("instruct", "a", "x", "unknown format; accepted: .jsonl"),
    "compressed": ("instruct", "a.jsonl.gz", b"\x1f\x8b\x08", "unknown format; accepted: .jsonl"),
    "half a surrogate pair": ("instruct", "a.jsonl", r'{"prompt": "\ud800"}', "line 1: half of a surrogate pair"),
    "no file": ("instruct", "", "", "is not there; accepted: a file"),
    "an empty folder": ("instruct", "folder/", "", "holds nothing readable", "accepted: a file"),
    "a folder without splits": ("instruct", "folder/b.txt", "x", "holds a.txt, b.txt; name one of them"),
    # CSV and Parquet
    "CSV of a header": ("instruct", "a.csv", "prompt\n", "holds no rows"),
    "CSV of nothing": ("instruct", "a.csv", "", "holds no rows"),
    "CSV, a quotation not closed": ("instruct", "a.csv", 'prompt\n"x\ny\n', "not valid CSV: unexpected end"),
    "CSV, commas not quoted": ("instruct", "a.csv", "prompt\nHello, you\n", "row 1: has more fields", "in quotes"),
    "CSV, a short row": ("instruct", "a.csv", "output,prompt\nx\n", "row 1: the columns are output, prompt (NoneType)"),
    "CSV, semicolons": ("instruct", "a.csv", "prompt;output\nx;y\n", "the columns are prompt;output; accepted"),
    "CSV, a huge field": ("instruct", "a.csv", f"prompt\n{'x' * 200_000}\n", "not valid CSV: field larger"),
    "CSV, other columns": ("instruct", "a.csv", "a,b\n1,2\n", "row 1: the columns are a, b; accepted"),
    "Parquet of nothing": ("instruct", "a.parquet", b"", "not valid Parquet", "0 bytes"),
    "Parquet cut": ("instruct", "a.parquet", b"PAR1", "not valid Parquet"),
    "Parquet damaged": ("instruct", "a.parquet", b"PAR1" + bytes(100) + b"PAR1", "not valid Parquet"),
    # columns
    "no columns": ("instruct", "a.jsonl", "{}\n", "line 1: the columns are none", "accepted: prompt, instruction"),
    "other columns": ("instruct", "a.jsonl", json_line(a=1, b="x"), "the columns are a (int), b; accepted: prompt"),
    "columns of mathematics": ("instruct", "a.jsonl", json_line(problem="x", level=3), *NO_PROMPT),
    "null for a prompt": ("instruct", "a.jsonl", json_line(prompt=None), "prompt (NoneType)", *NO_PROMPT),
    "a number for a prompt": ("instruct", "a.jsonl", json_line(prompt=3), "prompt (int)", *NO_PROMPT),
    "a list for a prompt": ("instruct", "a.jsonl", json_line(prompt=["x"]), "prompt (list)", *NO_PROMPT),
    "nan for a prompt": ("instruct", "a.jsonl", '{"prompt": NaN}', "prompt (float)", *NO_PROMPT),
    "an empty prompt": ("instruct", "a.jsonl", json_line(prompt=""), "line 1: prompt is empty; accepted: a text"),
    "a prompt of spaces": ("instruct", "a.jsonl", json_line(prompt=" \t\n\u2003"), "line 1: prompt is empty"),
    "the third is empty": ("instruct", "a.jsonl", json_line(prompt="x") * 2 + json_line(prompt=""), "line 3: prompt"),
    "a number for an answer": ("instruct", "a.jsonl", json_line(prompt="x", output=3), "no text in output (int)"),
    "a list for an answer": ("instruct", "a.jsonl", json_line(prompt="x", answer=["y"]), "no text in answer (list)"),
    "an object for an input": ("instruct", "a.jsonl", json_line(instruction="x", input={}), "no text in input (dict)"),
    "a text for messages": ("instruct", "a.jsonl", json_line(messages="hi"), *NO_PROMPT),
    "no messages": ("instruct", "a.jsonl", messages(), *NO_USER),
    "a text for a message": ("instruct", "a.jsonl", json_line(messages=["hi"]), *NO_ROLE),
    "an unknown role": ("instruct", "a.jsonl", messages(("bot", "x")), *NO_ROLE),
    "a role in capitals": ("instruct", "a.jsonl", messages(("User", "x")), *NO_ROLE),
    "a list for a role": ("instruct", "a.jsonl", messages((["user"], "x")), *NO_ROLE),
    "a message of nothing": ("instruct", "a.jsonl", messages(("user",)), *NO_ROLE),
    "null for a message": ("instruct", "a.jsonl", messages(("user", None)), *NO_ROLE),
    "an empty message": ("instruct", "a.jsonl", messages(("user", " ")), *NO_USER),
    "the system alone": ("instruct", "a.jsonl", messages(("system", "x")), *NO_USER),
    "the system at the end": ("instruct", "a.jsonl", messages(("user", "x"), ("system", "y")), *NO_USER),
    "two answers": ("instruct", "a.jsonl", messages(("user", "x"), *[("assistant", "y")] * 2), *NO_USER),
    "no turns": ("instruct", "a.jsonl", json_line(turns=[]), *NO_PROMPT),
    "a number for a turn": ("instruct", "a.jsonl", json_line(turns=[3]), *NO_PROMPT),
    # problems with an answer
    "no answer": ("gsm8k", "a.jsonl", json_line(question="x"), *NO_MATHS),
    "null for an answer": ("gsm8k", "a.jsonl", json_line(question="x", answer=None), "answer (NoneType)", *NO_MATHS),
    "an empty answer": ("gsm8k", "a.jsonl", json_line(question="x", answer=""), "the answer is empty"),
    "nothing after the mark": ("gsm8k", "a.jsonl", json_line(question="x", answer="y\n####"), "the answer is empty"),
    "an empty question": ("gsm8k", "a.jsonl", json_line(question=" ", answer="#### 3"), "the problem is empty"),
    "a list for a question": ("gsm8k", "a.jsonl", json_line(question=["x"], answer="3"), "question is", "a text or"),
    "an object for the answer": ("gsm8k", "a.jsonl", json_line(question="x", answer={"a": 1}), "answer is", "a text"),
    "true for an answer": ("gsm8k", "a.jsonl", json_line(question="x", answer=True), "answer is 'True'"),
    "nan for an answer": ("gsm8k", "a.jsonl", '{"question": "x", "answer": NaN}', "answer is 'nan'; accepted"),
    "infinity for an answer": ("gsm8k", "a.jsonl", '{"question": "x", "answer": 1e999}', "answer is 'inf'; accepted"),
    "five thousand digits": ("gsm8k", "a.jsonl", json_line(question="x", answer="9" * 5000), "5000 char", "up to 500"),
    "no box": ("math", "a.jsonl", json_line(problem="x", solution="4"), *NO_MATHS),
    "half a box": ("math", "a.jsonl", json_line(problem="x", solution=r"\boxed{4"), *NO_MATHS),
    "an empty box": ("math", "a.jsonl", json_line(problem="x", solution=r"\boxed{}"), *NO_MATHS),
    "no body": ("svamp", "a.jsonl", json_line(Body="", Question="", Answer=3), "the problem is empty"),
    "no result": ("svamp", "a.jsonl", json_line(Body="x", Question="y", Answer=""), "the answer is empty"),
    # texts
    "a short text": ("text", "a.txt", "short", "the train text has 5 tokens; accepted: at least 80"),
    "no text": ("text", "a.txt", "", "the train text has 0 tokens"),
    "a number for a text": ("text", "a.jsonl", json_line(text=3), "the columns are text (int); accepted: text"),
    "prompts for a text": ("text", "a.jsonl", json_line(prompt="x"), "the columns are prompt; accepted: text"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_that_are_damaged(name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, file, content, *words = DATA[name]
    if "arquet" in name:
        pytest.importorskip("pyarrow", reason="needs pyarrow, extra tasks")
    path = tmp_path / (file or "nowhere.jsonl")
    if "/" in file:
        path = tmp_path / "folder"
        path.mkdir()
        for part in ("a.txt", "b.txt")[: 2 * len(content)]:
            (path / part).write_text(content)
    elif file:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def act(*_: Any) -> None:
        make_task(task, path=str(path), tokenizer=str(world.lm))

    check((act, "task_path: ", *words), world, tmp_path, capsys)


def with_template(name: str) -> Act:
    def act(world: World, folder: Path) -> None:
        (folder / "a.jsonl").write_text(messages(("system", "x"), ("user", "y")))
        make_task("instruct", path=str(folder / "a.jsonl"), tokenizer=str(world.chat[name]))

    return act


def with_task(**options: Any) -> Act:
    def act(world: World, folder: Path) -> None:
        (folder / "a.jsonl").write_text("".join(json_line(prompt=f"say {i}", output="x") for i in range(3)))
        make_task(**({"name": "instruct", "path": str(folder / "a.jsonl"), "tokenizer": str(world.lm)} | options))

    return act


TASKS: dict[str, tuple[Any, ...]] = {
    "a template that refuses the roles": (with_template("alternating"), "chat: ", "system user", "must alternate"),
    "a template that is broken": (with_template("broken"), "chat: ", "TemplateSyntaxError", "or no"),
    "shots below 0": (with_task(few_shot=-1), "few_shot: -1; accepted: 0 or more"),
    "shots of all there is": (with_task(few_shot=3), "few_shot: 3; accepted: fewer than the 3"),
    "prompts longer than wanted": (with_task(max_prompt_tokens=4), "max_prompt_tokens: 4; accepted: at least 5"),
    "no pattern": (with_task(step_pattern="(?P<"), "step_pattern: '(?P<' is no regular expression"),
    "a pattern of no token": (with_task(step_pattern="two words"), "no token's text matches 'two words'"),
    "an unknown task": (with_task(name="instructt"), "task: unknown task 'instructt'; accepted: categorical, sums"),
    "no tokenizer": (with_task(tokenizer="/nowhere"), "tokenizer: '/nowhere' is no folder with a tokenizer"),
    "a prompt of 0 tokens": (with_task(name="text", prompt_tokens=0), "prompt_tokens: 0; accepted: at least 1"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_cannot_be(name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(TASKS[name], world, tmp_path, capsys)


# ---------------------------------------------------------------------- models


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    """A JSON file with other values; None takes the key away."""

    def damage(folder: Path) -> None:
        fields = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))

    return damage


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def cut(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-50]) and None


def lose(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def weights(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return damage


def one(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[name].view(-1)[77:78].fill_(value) and None


W, CONFIG = "model.safetensors", "config.json"
BERT = BertConfig(vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
UNLOADABLE = ("no causal language model can be loaded from", "accepted: a folder with config.json and weights")

MODELS: dict[str, tuple[Any, ...]] = {
    "weights cut": (cut(W), *UNLOADABLE, "incomplete"),
    "weights empty": (write(W, b""), *UNLOADABLE, "header"),
    "weights of text": (write(W, b"hello"), *UNLOADABLE, "header"),
    "a header of 2^64 bytes": (write(W, b"\xff" * 8 + bytes(100)), *UNLOADABLE, "header too large"),
    "no weights": (lose(W), *UNLOADABLE, "model.safetensors"),
    "one NaN": (weights(W, one("model.embed_tokens.weight", math.nan)), *UNLOADABLE, "model.embed_tokens.weight"),
    "one infinity": (weights(W, one("lm_head.weight", math.inf)), *UNLOADABLE, "not numbers, lm_head.weight"),
    "no mass": (weights(W, lambda t: t["lm_head.weight"].fill_(-math.inf)), *UNLOADABLE, "not numbers"),
    "overflowing": (weights(W, lambda t: t["lm_head.weight"].fill_(3e38)), "probabilities", "are not numbers", "lm"),
    "a tensor lost": (weights(W, lambda t: t.pop("model.norm.weight")), *UNLOADABLE, "1 of its", "model.norm.weight"),
    "another shape": (weights(W, lambda t: t.update({"model.norm.weight": torch.ones(9)})), *UNLOADABLE, "norm"),
    "other tensors": (weights(W, lambda t: (t.clear(), t.update(x=torch.ones(2)))), *UNLOADABLE, "missing"),
    "no config": (lose(CONFIG), *UNLOADABLE, "config.json"),
    "config cut": (cut(CONFIG), *UNLOADABLE, "not a valid JSON file"),
    "config empty": (write(CONFIG, b""), *UNLOADABLE, "not a valid JSON file"),
    "config of bytes": (write(CONFIG, b"\xff\xfe\0"), *UNLOADABLE, "not a valid JSON file"),
    "config of null": (write(CONFIG, b"null"), *UNLOADABLE),
    "config of a list": (write(CONFIG, b"[]"), *UNLOADABLE),
    "an unknown architecture": (edit(CONFIG, model_type="llamaa"), *UNLOADABLE, "`llamaa`"),
    "no architecture": (edit(CONFIG, model_type=None, architectures=None), *UNLOADABLE, "model_type"),
    "code of its own": (edit(CONFIG, model_type="x", auto_map={"AutoConfig": "x.X"}), *UNLOADABLE, "custom code"),
    "a text for a number": (edit(CONFIG, vocab_size="many"), *UNLOADABLE, "vocab_size"),
    "a negative vocabulary": (edit(CONFIG, vocab_size=-3), *UNLOADABLE),
    "no heads": (edit(CONFIG, num_attention_heads=0), *UNLOADABLE),
    "heads that do not divide": (edit(CONFIG, num_attention_heads=3), *UNLOADABLE, "multiple"),
    "more layers than weights": (edit(CONFIG, num_hidden_layers=2), *UNLOADABLE, "9 of its weights are missing"),
    "another width": (edit(CONFIG, hidden_size=16), *UNLOADABLE, "of another shape"),
    "more ids than rows": (edit(CONFIG, vocab_size=300), *UNLOADABLE, "of another shape"),
    "a shard lost": (
        lambda f: (lose(W)(f), write(f"{W}.index.json", b'{"metadata": {}, "weight_map": {"a": "b"}}')(f)),
        *UNLOADABLE,
    ),
    "an encoder alone": (lambda f: BertForMaskedLM(BERT).save_pretrained(f), "BertLMHeadModel is not supported"),
    "an encoder and a decoder": (edit(CONFIG, model_type="t5", architectures=None), *UNLOADABLE, "T5Config"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_damaged(name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And Transformers prints no table beside the line."""
    damage, *words = MODELS[name]
    shutil.copytree(world.lm, tmp_path / "lm")
    damage(tmp_path / "lm")

    def act(_: World, folder: Path) -> None:
        build_model(folder / "lm", vocab_size=V, eos_token_id=EOS)

    check((act, *words), world, tmp_path, capsys)
    assert capsys.readouterr().err == ""


def damaged(damage: Callable[[Path], Any], *roles: str) -> Act:
    """The command line with a damaged teacher, student, or both."""

    def act(world: World, folder: Path) -> int:
        shutil.copytree(world.lm, folder / "bad")
        damage(folder / "bad")
        (folder / "data.txt").write_text("one\ntwo\n")
        paths = {role: folder / "bad" if role in roles else world.lm for role in ("teacher", "student")}
        arguments = [x for flag, path in paths.items() for x in (f"--{flag}", str(path))]
        arguments += ["--task-path", str(folder / "data.txt"), "--out", str(folder / "runs"), "--track", "none"]
        code = run_module.main(["--env", "lm", *arguments])
        assert not (folder / "runs").exists()
        return code

    return act


def table(change: Callable[[dict[str, torch.Tensor]], Any]) -> Act:
    def act(_: World, folder: Path) -> None:
        markov(4).save_pretrained(folder)
        weights("table.safetensors", change)(folder)
        TabularModel.load(folder)

    return act


TOKENIZER, UNREADABLE = "tokenizer.json", ("tokenizer: ", "no folder with a tokenizer")
PAIRS: dict[str, tuple[Any, ...]] = {
    "a teacher of NaN": (damaged(MODELS["one NaN"][0], "teacher"), "bad'", "weights are not numbers"),
    "a student of NaN": (damaged(MODELS["one NaN"][0], "student"), "bad'", "weights are not numbers"),
    "a teacher cut": (damaged(cut(W), "teacher"), "bad'", "incomplete"),
    "a student cut": (damaged(cut(W), "student"), "bad'", "incomplete"),
    "a student without config": (damaged(lose(CONFIG), "student"), "bad'"),
    "a tokenizer cut": (damaged(cut(TOKENIZER), "teacher"), *UNREADABLE),
    "a tokenizer of null": (damaged(write(TOKENIZER, b"null"), "teacher"), *UNREADABLE),
    "no tokenizer": (damaged(lambda f: (lose(TOKENIZER)(f), lose("tokenizer_config.json")(f)), "teacher"), *UNREADABLE),
    "a student's tokenizer cut": (damaged(cut(TOKENIZER), "student"), *UNREADABLE, "bad'"),
    "a tokenizer without end": (
        damaged(lambda f: (edit("tokenizer_config.json", eos_token=None)(f), drop_end(f)), "teacher", "student"),
        "name an eos_token",
    ),
    "a table of NaN": (table(lambda t: t["logits"].fill_(math.nan)), "holds no readable table", "not numbers"),
    "a table without mass": (table(lambda t: t["logits"].fill_(-math.inf)), "holds no readable table", "not numbers"),
    "a table that leads nowhere": (table(lambda t: t["next_state"].fill_(9)), "a next state is not from 0 to 4"),
    "a table of two shapes": (table(lambda t: t.update(logits=torch.ones(2, 2))), "not of one table of 5 states"),
    "a table without end": (table(lambda t: t["eos_token_id"].fill_(9)), "not of one table of 5 states and 4 tokens"),
    "a table without logits": (table(lambda t: t.pop("logits")), "holds no readable table"),
    "an unknown device": (lambda w, _: build_model(w.lm, device="gpu"), "device: 'gpu' is not available", "'cuda'"),
    "an unknown dtype": (lambda w, _: build_model(w.lm, dtype="int8"), "dtype: 'int8' is unknown", "float32"),
    "more ids than rows": (lambda w, _: build_model(w.lm, vocab_size=300), "vocab_size: 300", "1 to 257"),
    "an end beyond the ids": (lambda w, _: build_model(w.lm, eos_token_id=999), "eos_token_id: 999", "0 to 256"),
    "a file for a tokenizer": (lambda w, _: load_tokenizer(w.lm / CONFIG), *UNREADABLE),
}


def drop_end(folder: Path) -> None:
    fields = json.loads((folder / TOKENIZER).read_text())
    (folder / TOKENIZER).write_text(json.dumps(fields | {"added_tokens": []}))


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_that_does_not_go(name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(PAIRS[name], world, tmp_path, capsys)


# ---------------------------------------------------------------------- the environment


def environment(world: World | None = None, **options: Any) -> DistillVectorEnv:
    if world is None:
        return DistillVectorEnv(**({"num_envs": 2, "autoreset_mode": "Disabled"} | options))
    kwargs = {"tokenizer": str(world.lm), "path": str(REPOSITORY / "distill_env/data/example_prompts.txt")}
    return DistillVectorEnv(2, "instruct", str(world.lm), task_kwargs=kwargs, max_new_tokens=4, **options)


def made(**options: Any) -> Act:
    return lambda *_: environment(**options) and None


def after_reset(call: Callable[[DistillVectorEnv], Any], **options: Any) -> Act:
    def act(*_: Any) -> None:
        env = environment(**options)
        env.reset(seed=0)
        before = env.completions.ids.copy()
        try:
            call(env)
        finally:
            assert (env.completions.ids == before).all()

    return act


def in_lm(call: Callable[[DistillVectorEnv], Any]) -> Act:
    def act(world: World, _: Path) -> None:
        env = environment(world)
        env.reset(seed=0)
        call(env)

    return act


def step(*actions: Any) -> Act:
    return after_reset(lambda env: env.step(np.array(actions)))


def look(*tokens: Any) -> Act:
    return after_reset(lambda env: env.lookahead(torch.tensor(tokens)))


def reset(**options: Any) -> Act:
    return after_reset(lambda env: env.reset(options=options))


ENVIRONMENT: dict[str, tuple[Any, ...]] = {
    "an action above REWRITE": (step(7, 0), "actions: outside [-1, 6]"),
    "an action below padding": (step(-2, 0), "actions: outside [-1, 6]"),
    "a huge action": (step(2**62, 0), "actions: outside [-1, 6]"),
    "floats for actions": (step(0.5, 1.0), "actions: float64; accepted: integers"),
    "nan for an action": (step(math.nan, 1.0), "actions: float64; accepted: integers"),
    "texts for actions": (step("a", "b"), "actions: ", "accepted: integers"),
    "an action too few": (step(1), "actions: shape (1, 1); accepted: (2, k)"),
    "two columns": (step([1, 2], [1, 2]), "actions: shape (2, 2)", "chunk = 1"),
    "no columns": (step([], []), "actions: shape (2, 0)"),
    "a draft beyond the ids": (look([6], [0]), "tokens: accepted: [2, K], ids below 6"),
    "a draft below padding": (look([-2], [0]), "tokens: accepted: [2, K], ids below 6"),
    "a draft with a hole": (look([-1, 3], [1, 2]), "tokens: accepted", "-1 on the right"),
    "a draft of floats": (look([0.0], [1.0]), "tokens: accepted"),
    "a draft too few": (look([1]), "tokens: accepted: [2, K]"),
    "a prompt beyond the ids": (reset(prompts=[(0,), (6,)]), "prompts: a token id outside [0, 5]"),
    "a prompt below the ids": (reset(prompts=[(0,), (-1,)]), "prompts: a token id outside [0, 5]"),
    "a prompt too long": (reset(prompts=[(0,), (0, 1)]), "prompts: a prompt of 2 tokens; at most 1"),
    "a prompt of words": (reset(prompts=["hello", "you"]), "prompts: 'hello'; accepted: a Prompt or a sequence"),
    "a prompt of floats": (reset(prompts=[(0,), (0.5,)]), "prompts: (0.5,); accepted"),
    "a number for a prompt": (reset(prompts=[3, 4]), "prompts: 3; accepted"),
    "a prompt too few": (reset(prompts=[(0,)]), "prompts: 1 for 2 rows"),
    "keys too few": (reset(episode_keys=np.zeros(1, np.uint64)), "episode_keys: 1 for 2 rows"),
    "a mask of numbers": (reset(reset_mask=np.ones(2)), "reset_mask: a bool array of shape (2,)"),
    "a mask of nobody": (reset(reset_mask=np.zeros(2, np.bool_)), "reset_mask", "with a true value"),
    "seeds too few": (after_reset(lambda env: env.reset(seed=[1])), "seed: 1 seeds for 2 rows"),
    "a negative seed": (after_reset(lambda env: env.reset(seed=[1, -1])), "seed: -1; accepted: 0 to"),
    "an empty prompt": (in_lm(lambda env: env.reset(options={"prompts": [(1,), ()]})), "prompt 1 is empty"),
    "a split that is none": (made(split="tests"), "split: 'tests'; accepted: train, validation"),
    "a draw that is none": (made(rewrite="beam"), "rewrite: 'beam'; accepted: sample, nucleus, argmax"),
    "a span that is none": (made(rewrite_span="line"), "rewrite_span: 'line'; accepted: token, step"),
    "a mode that is none": (made(autoreset_mode="never"), "autoreset_mode: 'never'; accepted"),
    "a rendering that is none": (made(render_mode="human"), "render_mode: 'human'; accepted: ansi"),
    "a task that is none": (made(task="sum"), "task: unknown task 'sum'; accepted: categorical, sums"),
    "a teacher of other ids": (made(teacher_kwargs={"vocab_size": 9}), "9 token ids, the task has 6"),
    "no rows": (made(num_envs=0), "num_envs", "at least 1"),
    "no horizon": (made(max_new_tokens=0), "max_new_tokens: 0"),
    "a price of nan": (made(rewrite_cost=math.nan), "rewrite_cost: nan"),
    "a price below 0": (made(rewrite_cost=-1.0), "rewrite_cost: -1.0", "at least 0 nats"),
    "a floor of 0": (made(log_prob_floor=0.0), "log_prob_floor: 0.0"),
    "no floor": (made(log_prob_floor=-math.inf), "log_prob_floor: -inf", "finite"),
    "a weight of nan": (made(task_reward=math.nan), "task_reward: nan is not finite"),
    "an empty nucleus": (made(rewrite_top_p=0.0), "rewrite_top_p: 0.0", "(0, 1]"),
    "a horizon beyond the context": (
        lambda w, _: (
            DistillVectorEnv(1, "instruct", str(w.lm), task_kwargs={"tokenizer": str(w.lm)}, max_new_tokens=60) and None
        ),
        "max_new_tokens",
        "context of 64",
    ),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_an_environment_used_wrongly(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is refused changes nothing."""
    check(ENVIRONMENT[name], world, tmp_path, capsys)


# ---------------------------------------------------------------------- a run on disk


def in_all(damage: Callable[[Path], Any]) -> Callable[[Path], None]:
    """The same damage in all checkpoints."""

    def damage_all(folder: Path) -> None:
        for path in checkpoints(folder / "checkpoints"):
            damage(path)

    return damage_all


def swap(first: str, second: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        a, b = folder / first, folder / second
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)

    return damage


def append(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text((folder / file).read_text() + text) and None


def resume(*flags: str) -> Callable[[Path], int]:
    return lambda run: run_module.main(
        ["--resume", "--out", str(run.parent), "--name", run.name, "--iterations", "6", *flags]
    )


def again(*flags: str) -> Callable[[Path], int]:
    return lambda run: evaluate.main([str(run), *flags])


def another_table(checkpoint: Path) -> None:
    markov(4).save_pretrained(checkpoint / "agent/student")


def unharmed(_: Path) -> None:
    """No damage."""


def begin_anew(run: Path) -> int:
    return run_module.main([*SMALL.split(), "--out", str(run.parent), "--name", run.name])


def into_itself(run: Path) -> int:
    return evaluate.main([str(run), "--eval-prompts", "1", "--out", str(run)])


def on_full_disk(work: Callable[[Path], int]) -> Callable[[Path], int]:
    """A limit on the size of files stands in for it: the configuration is written, a checkpoint is not."""

    def limited(run: Path) -> int:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            return work(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


OPTIMIZER, OPTIONS, TABLE = "agent/optimizer.safetensors", "agent/optimizer.json", "agent/student/table.safetensors"
LOST = ("checkpoint: ", "is damaged")
BROKEN = ("run: ", "is damaged")

DISK: dict[str, tuple[Any, ...]] = {
    **{
        f"{file}: {name}": (in_all(damage(file)), resume(), *LOST)
        for file in (OPTIMIZER, OPTIONS, TABLE, "random.safetensors", "random.json")
        for name, damage in {
            "cut": cut,
            "empty": lambda file: write(file, b""),
            "lost": lose,
            "of bytes": lambda file: write(file, b"\xff\xfe\0"),
        }.items()
    },
    "optimiser and student exchanged": (in_all(swap(OPTIMIZER, TABLE)), resume(), *LOST),
    "an optimiser of NaN": (
        in_all(weights(OPTIMIZER, lambda t: next(v for v in t.values() if v.dim()).fill_(math.nan))),
        resume(),
        *LOST,
        "non-finite",
    ),
    "an optimiser of another student": (
        in_all(weights(OPTIMIZER, lambda t: t.update({"0.exp_avg": torch.ones(2, 2)}))),
        resume(),
        *LOST,
        "0.exp_avg",
    ),
    "a student of NaN": (in_all(weights(TABLE, lambda t: t["logits"].fill_(math.nan))), resume(), *LOST, "not numbers"),
    "a student of other ids": (in_all(another_table), again(), *LOST, "4 ids"),
    "options of a list": (in_all(write(OPTIONS, b"[]")), resume(), *LOST),
    "options without iteration": (in_all(edit(OPTIONS, iteration=None)), resume(), *LOST, "iteration"),
    "a text for the iteration": (in_all(edit(OPTIONS, iteration="four")), resume(), *LOST, "four"),
    "a random state of a list": (in_all(write("random.json", b"[]")), resume(), *LOST),
    "a random state of other keys": (in_all(write("random.json", b'{"numpy": ["MT"]}')), resume(), *LOST),
    "a random state of other lengths": (
        in_all(weights("random.safetensors", lambda t: t.update(torch=torch.zeros(3, dtype=torch.uint8)))),
        resume(),
        *LOST,
    ),
    "no checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), again(), "checkpoint: ", "holds none"),
    "damaged checkpoints, evaluated": (in_all(cut(OPTIMIZER)), again(), *LOST),
    "config cut": (cut(CONFIG), resume(), *BROKEN, "config.json"),
    "config empty": (write(CONFIG, b""), resume(), *BROKEN, "config.json"),
    "config of bytes": (write(CONFIG, b"\xff\xfe\0"), resume(), *BROKEN, "config.json"),
    "config of a list": (write(CONFIG, b"[]"), resume(), *BROKEN, "config.json"),
    "config of null": (write(CONFIG, b"null"), again(), *BROKEN, "config.json"),
    "config lost": (lose(CONFIG), resume(), "run: ", "holds no run (no config.json)"),
    "config lost, evaluated": (lose(CONFIG), again(), "run: ", "holds no run (no config.json)"),
    "an agent that is none": (edit(CONFIG, agent="gatedd"), resume(), *BROKEN, "'gatedd'"),
    "no agent": (edit(CONFIG, agent=None), resume(), *BROKEN, "agent"),
    "a text for the iterations": (edit(CONFIG, training={"iterations": "six"}), again(), *BROKEN, "iterations: 'six'"),
    "iterations of nan": (edit(CONFIG, training={"iterations": math.nan}), again(), *BROKEN, "iterations: nan"),
    "an unknown field": (edit(CONFIG, colour="red"), resume(), *BROKEN, "colour"),
    "options that are none": (edit(CONFIG, agent_options=3), resume(), *BROKEN, "agent_options"),
    "a writer that is none": (
        lambda run: edit(CONFIG, agent_options={"method": {"writer": "hardd"}})(run),
        resume(),
        *BROKEN,
        "writer: 'hardd'; accepted: never",
    ),
    "a tau of nan": (
        lambda run: edit(CONFIG, agent_options={"method": {"tau": math.nan}})(run), again(), *BROKEN, "tau: nan"
    ),
    "evaluation cut": (cut("evaluation.json"), resume(), *BROKEN, "evaluation.json"),
    "evaluation empty": (write("evaluation.json", b""), resume(), *BROKEN, "evaluation.json"),
    "evaluation of a list": (write("evaluation.json", b"[]"), resume(), *BROKEN, "list, not an object"),
    "evaluation without before": (edit("evaluation.json", before=None), resume(), *BROKEN, "before is NoneType"),
    "a number for what was before": (edit("evaluation.json", before=3), resume(), *BROKEN, "before is int"),
    "evaluation lost": (lose("evaluation.json"), resume(), *BROKEN, "evaluation.json"),
    "metrics of bytes": (write("metrics.csv", b"\xff\xfe\0\n"), resume(), *BROKEN, "metrics.csv"),
    "metrics of other columns": (write("metrics.csv", b"a,b\n1,2\n"), resume(), *BROKEN, "metrics.csv", "iteration"),
    "metrics of words": (append("metrics.csv", "five,x\n"), resume(), *BROKEN, "metrics.csv", "five"),
    "metrics of too many cells": (append("metrics.csv", "5" + ",1" * 99 + "\n"), resume(), *BROKEN, "metrics.csv"),
    "another method": (unharmed, resume("--tau", "3"), "resume: tau"),
    "another environment": (unharmed, resume("--env", "sums"), "resume: env"),
    "the name of another run": (unharmed, begin_anew, "run' exists", "--resume goes on"),
    "a file for a run": (unharmed, lambda run: evaluate.main([str(run / CONFIG)]), "holds no run"),
    "no prompts": (unharmed, again("--eval-prompts", "0"), "eval_prompts: 0", "at least 1"),
    "samples below 0": (unharmed, again("--eval-samples", "-3"), "eval_samples: -3", "at least 1"),
    "a corpus for a table": (unharmed, again("--corpus", "x.txt"), "corpus: ", "accepted: --env lm"),
    "tokens below 0": (unharmed, again("--corpus", "x.txt", "--corpus-tokens", "-5"), "corpus_tokens: -5"),
    "evaluated into a folder": (unharmed, into_itself, "could not be written", "run'"),
    "an unknown flag": (unharmed, again("--samples", "3"), "--samples"),
    "a full disk": (unharmed, on_full_disk(resume()), "could not be written", "File too large"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that say when, not what."""
    skip = ("alarms.log", ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skip}


@pytest.mark.parametrize("name", DISK)
def test_a_run_that_is_damaged(name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was good stays as it was, where it was."""
    damage, work, *words = DISK[name]
    folder = tmp_path / "run"
    shutil.copytree(world.run, folder)
    damage(folder)
    before = contents(folder)
    check((lambda *_: work(folder), *words), world, tmp_path, capsys)
    after = contents(folder)
    # a run that is resumed writes down its new number of iterations first, and logs those that it makes
    changing = {CONFIG, "metrics.csv"} if name == "a full disk" or CONFIG not in " ".join(map(str, words)) else set()
    assert {k: v for k, v in after.items() if k in before and k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }
    assert set(before) <= set(after)


def file_in_place(folder: Path) -> Path:
    path = folder / "file"
    path.write_text("mine")
    return path


def unwritable(out: str) -> Act:
    return lambda *_: run_module.main([*SMALL.split(), "--out", out])


def occupied(command: Callable[[list[str]], int], *flags: str) -> Act:
    """A file where the folder should be; it stays."""

    def act(_: World, folder: Path) -> int:
        path = file_in_place(folder)
        code = command([*flags, "--out", str(path)])
        assert path.read_text() == "mine"
        return code

    return act


def comparison(*flags: str, damage: tuple[str, str] | None = None) -> Act:
    """compare.py over a folder, in which a file is damaged; nothing is run."""

    def act(world: World, folder: Path) -> int:
        if damage is not None:
            path = folder / "runs" / damage[0]
            path.parent.mkdir(parents=True)
            path.write_text(damage[1])
        return compare.main(["--envs", "categorical", "--warm", "none", "--out", str(folder / "runs"), *flags])

    return act


HEADER = "study,env,warm,label,seed,run,correct_chains,seconds\n"


def reported(results: str | None, *flags: str) -> Act:
    def act(_: World, folder: Path) -> int:
        if results is not None:
            (folder / "results.csv").write_bytes(results.encode("latin-1"))
        return report.main(["--runs", str(folder), "--out", str(folder / "out"), "--no-viewer", *flags])

    return act


GOOD = HEADER + "main,sums,weak,gated,0,a,0.5,3\nmain,sums,weak,rkl,0,b,0.6,3\n"
JOB = "categorical-none-gated-s0"
COMMANDS: dict[str, tuple[Any, ...]] = {
    "a device for a folder": (unwritable("/dev/null"), "out: '/dev/null/", "cannot be made"),
    "a folder of the system": (unwritable("/proc/runs"), "out: '/proc/runs/", "cannot be made", "written to"),
    "a file for the runs": (occupied(run_module.main, *SMALL.split()), "out: ", "cannot be made"),
    "a file for the comparison": (occupied(compare.main, "--envs", "categorical", "--warm", "none"), "file'"),
    "an agent to compare that is none": (comparison("--agents", "gated", "gatedd"), "gatedd: agent: 'gatedd'", "rkl"),
    "no name": (comparison("--agents", "=gated"), "agents: '=gated'; accepted: an agent, or LABEL=AGENT"),
    "no agent": (comparison("--agents", ""), "agents: ''; accepted: an agent, or LABEL=AGENT"),
    "a contender twice": (comparison("--agents", "gated", "gated"), "agents: 'gated' and 'gated' are the same run"),
    "a seed twice": (comparison("--agents", "gated", "--seeds", "1", "1"), "the same run of seed 1"),
    "a name twice": (comparison("--agents", "a=gated", "a=rkl"), "two contenders of the name 'a'"),
    "a contender's flag": (comparison("--agents", "loose=gated --tau x"), "loose: ", "--tau", "'x'"),
    "a warm start that is none": (comparison("--warm", "strongg"), "warm: 'strongg' is unknown; accepted: none, weak"),
    "an environment that is none": (comparison("--envs", "sum"), "env: 'sum'", "accepted: sums, coins"),
    "no jobs": (comparison("--jobs", "0"), "jobs: 0; accepted: at least 1"),
    "a seed below 0": (comparison("--seeds", "-1"), "seed: -1; accepted: at least 0"),
    "words for seeds": (comparison("--seeds", "one"), "--seeds", "'one'"),
    "a study with a slash": (comparison("--study", "a/b"), "study: 'a/b'; accepted: letters"),
    "a fan-out that is none": (comparison("--fan-out", "slurm"), "'slurm'", "--fan-out", "local"),
    "a flag for all": (comparison("--agents", "gated", "--", "--iterations", "0"), "gated: iterations: 0"),
    "a run's config cut": (comparison("--agents", "gated", damage=(f"{JOB}/config.json", "{")), *BROKEN, "config.json"),
    "a run's evaluation cut": (comparison("--agents", "gated", damage=(f"{JOB}/evaluation.json", "{")), *BROKEN),
    "results of words": (comparison("--agents", "gated", damage=("results.csv", GOOD + "a,b,c,d,e\n")), "results.csv"),
    "a study that is none": (
        lambda _, f: ablate.main(["--studies", "tauu", "--out", str(f / "x")]),
        "studies: 'tauu' is unknown; accepted: all, two_by_two",
    ),
    "a flag of all studies": (
        lambda _, f: ablate.main(["--studies", "tau", "--out", str(f / "x"), "--", "--gama", "1"]), "--gama"
    ),
    "no results": (reported(None), "runs: ", "no results.csv; accepted: a folder of experiments/compare.py"),
    "empty results": (reported(""), "runs: no run in", "has finished"),
    "results of a header": (reported(HEADER), "runs: no run in", "has finished"),
    "results of other columns": (reported("a,b\n1,2\n"), "cannot be read", "needed: env, warm, label, seed"),
    "results cut in quotes": (reported(GOOD + 'main,sums,weak,"ga'), "results.csv' is damaged", "delete it"),
    "a word for a number": (reported(GOOD + "main,sums,weak,x,1,c,much,3\n"), "results.csv' is damaged", "'much'"),
    "a word for a seed": (reported(GOOD + "main,sums,weak,x,one,c,1,3\n"), "results.csv' is damaged", "'one'"),
    "too many cells": (reported(GOOD + "main,sums,weak,x,1,c,1,3,4,5\n"), "results.csv' is damaged"),
    "results of bytes": (reported("\xff\xfe"), "results.csv' is damaged"),
    "answers below 0": (reported(GOOD, "--answers", "-1"), "answers: -1; accepted: at least 1"),
    "a report into a file": (
        lambda _, f: reported(GOOD, "--out", str(file_in_place(f)))(_, f), "file'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_cannot_be_done(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr("experiments.comparing.grid.for_each", refuse)
    check(COMMANDS[name], world, tmp_path, capsys)


# ---------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def impatient() -> Iterator[Verifier]:
    pytest.importorskip("math_verify", reason="needs math-verify, extra tasks")
    verifier = Verifier(seconds=0.5)
    yield verifier
    verifier.close()


def boxed(text: str) -> str:
    return rf"thus \boxed{{{text}}}"


ANSWERS = {
    "fractions in numerators": boxed(r"\frac{" * 2000 + "1" + "}{2}" * 2000),
    "fractions, shallow": boxed(r"\frac{" * 18 + "x" + "}{2}" * 18),
    "fractions in both": boxed(r"\frac{\frac{\frac{1}{x}}{\frac{x}{y}}}{\frac{\frac{y}{1}}{\frac{2}{z}}}"),
    "fractions not closed": boxed(r"\frac{1}{" * 50),
    "ten to the ten to the ten": boxed("10^{10^{10}}"),
    "ten to the ten, by caret": boxed("10^10^10"),
    "a huge exponent": boxed("2^{99999999999999}"),
    "a huge float": boxed("1e999999"),
    "a huge float of digits": boxed("1." + "0" * 450 + "e99"),
    "a huge factorial": boxed("99999999!"),
    "a factorial of factorials": boxed("9!!!!!!!"),
    "a huge binomial": boxed(r"\binom{999999999}{499999999}"),
    "a huge sum": boxed(r"\sum_{n=1}^{99999999} n^n"),
    "a huge product": boxed(r"\prod_{n=1}^{99999999} n"),
    "an integral of no form": boxed(r"\int_0^1 e^{x^x} \sin(x^x) dx"),
    "a matrix not closed": boxed(r"\begin{pmatrix} 1 & 2 \\"),
    "a power of a sum": boxed("(a+b+c+d+e+f)^{999}"),
    "a set of many": boxed(r"\{" + ",".join(map(str, range(100))) + r"\}"),
    "left without right": boxed(r"\left(" * 19 + "1"),
    "braces that do not match": r"\boxed{{{{1}}",
    "only closing braces": boxed("}}}}1"),
    "a million characters": boxed("1+" * 500_000),
    "a million backslashes": "\\" * 10**6,
    "a million boxes": r"\boxed{1}" * 111_112 + r"\boxed{",
    "a million digits, unmarked": "7" * 10**6,
    "a million hashes": "#### " * 200_000,
    "a million signs": boxed("-" * 10**6 + "1"),
    "import": boxed("__import__('os').system('touch X')"),
    "import, after hashes": "#### __import__('os').system('touch X')",
    "a lambda": boxed("(lambda: open('X', 'w'))()"),
    "an attribute": boxed(r"x.__class__.__mro__[1].__subclasses__()"),
    "a macro that calls itself": boxed(r"\def\a{\a\a}\a"),
    "a macro that writes": boxed(r"\write18{touch X}"),
    "a macro that reads": boxed(r"\input{/etc/passwd}"),
    "right to left": boxed("\u202e24\u202c"),
    "digits of another script": boxed("\u0664\u0662"),
    "full-width digits": boxed("\uff14\uff12"),
    "digits above the line": boxed("4\u00b2"),
    "a zero-width space": boxed("4\u200b3"),
    "a thousand accents": boxed("4" + "\u0301" * 1000),
    "NUL": boxed("43\0"),
    "half a surrogate pair": boxed("43\ud800"),
    "a line separator": boxed("4\u20283"),
    "infinity": boxed(r"\infty"),
    "not a number": boxed("nan"),
    "a division by zero": boxed(r"\frac{1}{0}"),
    "a zero to the zero": boxed("0^{0^{0}} / 0"),
    "nothing": "",
    "spaces": " \n\t" * 1000,
    "an empty box": boxed(""),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_hostile_answer_is_graded(
    name: str, impatient: Verifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wrong, maybe undecided, within the limit of the verifier; nothing that is written in it happens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grading, "verifier", lambda: impatient)
    for symbolic in (False, True):
        assert not grade("42", ANSWERS[name], symbolic).correct
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- real processes

PROCESSES = {
    "run.py --tau nan": ("tau: nan", "accepted: a number"),
    "run.py --env categorical --out /dev/null": ("out: '/dev/null/", "cannot be made"),
    "evaluate.py /nowhere": ("run: '/nowhere' holds no run",),
    "compare.py --agents gated --warm warm --out /nowhere/runs": ("warm: 'warm' is unknown", "accepted: none, weak"),
}


@pytest.mark.parametrize("line", PROCESSES)
def test_a_process_ends_with_one_line_and_a_code(line: str) -> None:
    script, *arguments = line.split()
    command = [sys.executable, str(REPOSITORY / "experiments" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert len(said) == 1, done.stderr
    for word in PROCESSES[line]:
        assert word in said[0]
