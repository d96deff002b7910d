"""What is loaded: adapters that train alone and come back exactly, layers computed twice, heads cut to shared ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from agents.checkpoint import checkpoints
from distill_env.models.adapters import BASE_DIGEST, digest_of
from distill_env.models.causal_lm import CausalLM
from distill_env.models.hub import load_tokenizer
from distill_env.models.load import build_model
from distill_env.models.names import base_and_adapter
from distill_env.models.pretrained import recompute_layers
from experiments import run as run_module
from experiments.running.build import make_env, make_student
from experiments.running.flags import parse
from tests.distill_env.models.test_causal_lm import build
from tests.helpers.byte_tokenizer import save_byte_tokenizer
from tests.helpers.random_walks import alone
from tests.helpers.tiny_models import EOS, IDS, flags, move_ids, write_model, write_prompts

KINDS = ["Llama", "GPT2"]  # GPT-2's layers hold their matrices transposed


def adapted(kind: str, folder: Path, **options: Any) -> CausalLM:
    """A model of float64 with an adapter of rank 2."""
    build(kind).save_pretrained(folder / "base")
    return CausalLM.load(folder / "base", dtype="float64", lora_rank=2, **options)


def move(student: CausalLM) -> None:
    """What is trainable takes a step."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_nothing_at_first_and_then_alone(kind: str, tmp_path: Path) -> None:
    student, base = adapted(kind, tmp_path), CausalLM.load(tmp_path / "base", dtype="float64")
    assert torch.equal(student.start([[5, 6, 7]]), base.start([[5, 6, 7]]))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    tokens = torch.tensor([[8, 9]])
    student.head(student.features([[5, 6]], tokens, tokens >= 0))[:, 3].sum().backward()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    optimizer.step()
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(".lora_B." in name for name in moved)  # the gradient of A is 0 while B is


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_exactly_and_merged_it_is_the_same_model(kind: str, tmp_path: Path) -> None:
    student = adapted(kind, tmp_path)
    move(student)
    student.save_pretrained(tmp_path / "adapter")
    back = CausalLM.load(tmp_path / "adapter", dtype="float64")
    assert student.state_dict().keys() == back.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in student.state_dict().items())
    assert len(list(back.parameters())) == len(list(student.parameters()))
    student.export(tmp_path / "student")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float64)
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in build(kind).named_parameters()}
    expected = alone(student.model, [5, 6, 7, 8])
    torch.testing.assert_close(alone(plain, [5, 6, 7, 8]), expected, rtol=0, atol=1e-9)
    assert float((expected - alone(build(kind), [5, 6, 7, 8])).abs().max()) > 1e-3
    beside = load_file(tmp_path / "student/adapter/adapter_model.safetensors")
    assert all(torch.equal(t, beside[n]) for n, t in load_file(tmp_path / "adapter/adapter_model.safetensors").items())


def test_base_plus_adapter_is_a_plain_model(tmp_path: Path) -> None:
    student = adapted("Llama", tmp_path)
    move(student)
    student.save_pretrained(tmp_path / "adapter")
    name = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    merged = CausalLM.load(name, dtype="float64")
    assert {n for n, _ in merged.model.named_parameters()} == {n for n, _ in build("Llama").named_parameters()}
    expected = alone(student.model, [5, 6, 7, 8])
    torch.testing.assert_close(alone(merged.model, [5, 6, 7, 8]), expected, rtol=0, atol=1e-9)
    merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged/adapter_config.json").exists()
    (folder := tmp_path / "a+b").mkdir()
    assert base_and_adapter(folder) is None  # a folder of that name comes first
    save_byte_tokenizer(tmp_path / "base")
    assert load_tokenizer(name).get_vocab() == load_tokenizer(tmp_path / "base").get_vocab()
    for wrong in (f"{tmp_path / 'base'}+nothing", "word_problems"):
        with pytest.raises(ValueError, match=r"^(adapter|teacher):"):
            base_and_adapter(wrong)


def test_an_adapter_knows_its_base_by_digest(tmp_path: Path) -> None:
    """Number format and folder of the base do not matter, its weights do."""
    adapted("Llama", tmp_path).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    base = build("Llama")
    save_file(load_file(weights), weights, metadata={BASE_DIGEST: digest_of(base)})
    base.to(torch.bfloat16).save_pretrained(tmp_path / "moved")
    for dtype in ("float32", "bfloat16"):
        CausalLM.load(f"{tmp_path / 'moved'}+{tmp_path / 'adapter'}", dtype=dtype)
    with torch.no_grad():
        base.model.norm.weight[0] += 0.1
    base.save_pretrained(tmp_path / "other")
    with pytest.raises(OSError, match="digest") as error:
        CausalLM.load(f"{tmp_path / 'other'}+{tmp_path / 'adapter'}")
    assert "\n" not in str(error.value)


def test_the_seed_of_an_adapter_decides_and_nothing_else(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first = adapted("Llama", tmp_path, lora_seed=1)
    torch.manual_seed(5)
    again, other = (CausalLM.load(tmp_path / "base", dtype="float64", lora_rank=2, lora_seed=s) for s in (1, 2))
    weights = [next(m.parameters()) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.set_rng_state(state)


def test_only_the_targets_are_adapted(tmp_path: Path) -> None:
    student = adapted("Llama", tmp_path, lora_targets="q_proj, v_proj")
    names = {n.split(".lora_")[0].rpartition(".")[2] for n, p in student.model.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "v_proj"}


def test_mistakes_are_named_in_one_line(tmp_path: Path) -> None:
    student = adapted("Llama", tmp_path)
    student.save_pretrained(tmp_path / "adapter")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("base", {"lora_rank": 2, "lora_targets": "nothing"}, "lora_targets: 'nothing' .* all-linear, .*q_proj"),
        ("base", {"lora_rank": -1}, "lora_rank, lora_alpha: -1"),
        ("adapter", {"lora_rank": 2}, "lora_rank: 2"),
    ]
    if find_spec("bitsandbytes") is None:
        cases.append(("base", {"quantize": "4bit"}, r"quantize: '4bit' .*distill-env\[quantize\]"))
    if find_spec("gguf") is None:
        cases.append(("base", {"gguf_file": "x.gguf"}, r"gguf_file: 'x.gguf' .*distill-env\[gguf\]"))
    for name, options, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            CausalLM.load(tmp_path / name, **options)
        assert "\n" not in str(error.value)
    build("GPT2").save_pretrained(tmp_path / "base")
    with pytest.raises(OSError, match="name_or_path: "):  # the adapter is a Llama's
        CausalLM.load(tmp_path / "adapter")
    write_model(tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="name_or_path: ") as cut:
        CausalLM.load(tmp_path / "cut")
    assert "\n" not in str(cut.value)


def test_a_device_map_changes_no_answer(tmp_path: Path) -> None:
    """Where all of it is the cpu, at least."""
    pytest.importorskip("accelerate")
    folder = write_model(tmp_path / "model")
    plain, mapped = CausalLM.load(folder), CausalLM.load(folder, device_map="cpu")
    assert torch.equal(plain.start([[3, 4]]), mapped.start([[3, 4]]))
    assert torch.equal(plain.extend(torch.tensor([[5, 6]])), mapped.extend(torch.tensor([[5, 6]])))


@contextmanager
def kept(model: Any) -> Iterator[list[int]]:
    """Collects the elements of what the backward pass will need, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, Tensor] = {}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    sizes.append(sum(t.untyped_storage().nbytes() // t.element_size() for t in seen.values()))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_recomputed_layers_give_the_same_gradients_from_less(kind: str) -> None:
    """Also under an adapter's frozen embeddings and with dropout in the configuration; without gradient no layer runs
    twice."""
    dropout = (
        {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5} if kind == "GPT2" else {"attention_dropout": 0.5}
    )
    results = []
    for recompute in (False, True):
        model = build(kind, **dropout)
        model.get_input_embeddings().requires_grad_(False)
        lm = CausalLM(model)
        if recompute:
            recompute_layers(model)
        calls = []
        inner = next(m for n, m in model.named_modules() if n.endswith("mlp"))
        # before it runs, since the second time ends with the last thing that is needed
        inner.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        tokens = torch.tensor([[6, 7, 8, 9], [9, 8, 7, -1]])
        with kept(model) as sizes:
            features = lm.features([[3, 4, 5], [5]], tokens, tokens >= 0)
        loss = lm.head(features).gather(1, tokens[tokens >= 0][:, None]).sum()
        gradients = torch.autograd.grad(loss, list(lm.parameters()))
        trained = len(calls)
        lm.start([[3, 4]])
        results.append((sizes[0], trained, len(calls) - trained, gradients))
    (much, once, alone_once, expected), (little, twice, alone_too, actual) = results
    assert (once, twice, alone_once, alone_too) == (1, 2, 1, 1)
    assert little < much / 4
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_heads_of_different_rows_are_cut_to_the_shared_ids(tmp_path: Path) -> None:
    """As in families whose sizes pad their vocabularies differently: through the run's own functions."""
    teacher, student = write_model(tmp_path / "teacher", 1, rows=24), write_model(tmp_path / "student", 2, rows=17)
    config = parse([*flags(teacher, student, write_prompts(tmp_path)), "--out", str(tmp_path)])
    env = make_env(config, "train", 2, purpose="train")
    lm = make_student(config, env)
    assert env.vocab_size == env.teacher.vocab_size == lm.vocab_size == IDS
    assert env.teacher.eos_token_id == lm.eos_token_id == EOS
    for name, model in ((teacher, env.teacher), (student, lm)):
        expected = alone(AutoModelForCausalLM.from_pretrained(name), [3, 4, 5], vocab_size=IDS)[-1]
        torch.testing.assert_close(model.fork().start([[3, 4, 5]])[0], expected, rtol=0, atol=1e-5)  # type: ignore[attr-defined]


def holes_and_more(tmp_path: Path) -> tuple[str, str, str]:
    """Teacher, student and prompts: the ids 3 and 5 are no token, 17 and 15 are, and 18 is in no head but one."""
    pair = write_model(tmp_path / "teacher", 1, rows=24), write_model(tmp_path / "student", 2, rows=18)
    for folder in pair:
        move_ids(folder, _3=17, _5=15, unused=18)
    return *pair, write_prompts(tmp_path)


def test_ids_of_no_token_have_no_probability_and_ids_beyond_a_head_are_cut(tmp_path: Path) -> None:
    *pair, prompts = holes_and_more(tmp_path)
    config = parse([*flags(*pair, prompts), "--out", str(tmp_path)])
    env = make_env(config, "train", 2, purpose="train")
    assert env.vocab_size == 18
    assert max(t for p in env.prompts for t in p.ids) == 17
    exist = torch.tensor([i not in (3, 5, 14, 16) for i in range(18)])
    for name, model in zip(pair, (env.teacher, make_student(config, env)), strict=True):
        plain = alone(AutoModelForCausalLM.from_pretrained(name), [2, 4, 17], vocab_size=18)[-1]
        actual = model.fork().start([[2, 4, 17]])[0]  # type: ignore[attr-defined]
        assert torch.equal(actual.isfinite(), exist)
        torch.testing.assert_close(actual[exist], plain[exist].log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("agent", ["gated", "ppo"])
def test_a_run_of_a_tokenizer_with_holes_draws_tokens_only(agent: str, tmp_path: Path) -> None:
    *pair, prompts = holes_and_more(tmp_path)
    arguments = [*flags(*pair, prompts), "--out", str(tmp_path / "runs"), "--name", "r", "--agent", agent]
    if agent == "ppo":  # which drafts nothing
        del arguments[(at := arguments.index("--draft-length")) : at + 2]
    assert run_module.main([*arguments, "--iterations", "1"]) == 0
    assert run_module.main(["--resume", "--name", "r", "--out", str(tmp_path / "runs"), "--iterations", "2"]) == 0
    weights = load_file(checkpoints(tmp_path / "runs/r/checkpoints")[0] / "agent/student/model.safetensors")
    assert all(bool(w.isfinite().all()) for w in weights.values())


@pytest.mark.parametrize("more", [(), ("--lora-rank", 2, "--gradient-checkpointing")], ids=["full", "adapter"])
def test_a_run_resumes_to_the_same_weights_and_its_student_loads_plainly(tmp_path: Path, more: tuple[Any, ...]) -> None:
    """Teacher and student with heads of different rows; of an adapter the checkpoint holds nothing else."""
    teacher, student = write_model(tmp_path / "teacher", 1, rows=24), write_model(tmp_path / "student", 2, rows=17)
    arguments = flags(teacher, student, write_prompts(tmp_path), "--out", tmp_path / "runs", *more)
    for iterations, name in ((4, "whole"), (2, "parts")):
        assert run_module.main([*arguments, "--iterations", str(iterations), "--name", name]) == 0
    resumed = ["--resume", "--name", "parts", "--out", str(tmp_path / "runs"), "--iterations", "4"]
    assert run_module.main(resumed) == 0
    whole, parts = (checkpoints(tmp_path / "runs" / n / "checkpoints")[0] / "agent" for n in ("whole", "parts"))
    weights = "adapter_model.safetensors" if more else "model.safetensors"
    for name in (f"student/{weights}", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert (whole / "student/model.safetensors").exists() != bool(more)
    agent = build_model(whole / "student", vocab_size=IDS, eos_token_id=EOS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/whole/student")
    torch.testing.assert_close(alone(plain, [3, 4], IDS)[-1], agent.start([[3, 4]])[0], rtol=0, atol=1e-5)
    before = alone(AutoModelForCausalLM.from_pretrained(student), [3, 4], IDS)[-1]
    assert float((before - agent.start([[3, 4]])[0]).abs().max()) > 1e-5  # it has learned something
