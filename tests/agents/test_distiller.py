"""Distillation from Python: it is what the parts do by hand, and what it saves is a plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.distiller import Distiller, Sample
from agents.methods import METHODS, variant
from distill_env import ENVIRONMENTS
from distill_env.env import DistillVectorEnv
from distill_env.gate import divergence
from distill_env.models.causal_lm import CausalLM
from distill_env.models.hub import load_tokenizer
from distill_env.models.load import build_model, load_model
from distill_env.models.tabular import uniform
from distill_env.models.toy import toy_student
from distill_env.tasks.instruct import InstructTask
from tests.helpers.servers import CompletionsServer
from tests.helpers.tiny_models import EOS, IDS, write_model

ROWS = [{"instruction": f"{a}+{b}=", "output": f"{a};{b}"} for a in range(6) for b in range(5)]
SMALL: dict[str, Any] = {"batch_size": 4, "max_new_tokens": 6, "draft_length": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a student and its teacher, which do not agree."""
    folder = tmp_path_factory.mktemp("models")
    student, teacher = write_model(folder / "student", seed=1), write_model(folder / "teacher", seed=0)
    for name, scale in ((student, 2.0), (teacher, 3.0)):
        model = AutoModelForCausalLM.from_pretrained(name)
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        model.save_pretrained(name)
    return student, teacher


def losses(distiller: Distiller) -> list[float]:
    return [metrics["train/loss"] for metrics in distiller.history]


def live(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_it_is_the_agent_in_the_environment(models: tuple[str, str]) -> None:
    student, teacher = models
    made = Distiller(student, teacher, ROWS, "soft", tau=0.3, learning_rate=1e-3, seed=3, **SMALL).train(3)

    ids = {"vocab_size": IDS, "eos_token_id": EOS}
    task = InstructTask(ROWS, teacher, max_prompt_tokens=256, vocab_size=IDS)
    env = DistillVectorEnv(4, task, load_model(teacher, **ids), chunk=16, max_new_tokens=6, autoreset_mode="Disabled")
    config = DistillConfig(
        variant(METHODS["soft"], tau=0.3), OptimizerConfig(1e-3), batch_size=4, draft_length=3, seed=3
    )
    by_hand: list[float] = []
    DistillAgent(build_model(student, **ids), config).learn(env, 3, lambda i, m: by_hand.append(m["train/loss"]))
    assert losses(made) == by_hand
    assert len(set(by_hand)) == 3


def test_data_in_memory_and_on_disk_are_the_same(models: tuple[str, str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, extra tasks")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    runs = [Distiller(*models, data, **SMALL).train(2) for data in (ROWS, path, datasets.Dataset.from_list(ROWS))]
    assert len({p.text for p in runs[0].task.prompts("train")}) > 10
    for run in runs[1:]:
        assert all(run.task.prompts(s) == runs[0].task.prompts(s) for s in ("train", "validation", "test"))
        assert losses(run) == losses(runs[0])


def test_rows_by_split_stay_in_their_splits(models: tuple[str, str]) -> None:
    data = {"train": ROWS[:5], "dev": ROWS[5:7], "test": ROWS[7:10]}
    task = Distiller(*models, data, **SMALL).task
    assert [len(task.prompts(s)) for s in ("train", "validation", "test")] == [5, 2, 3]
    assert task.prompts("test")[0].text == ROWS[7]["instruction"]


def test_a_live_model_is_trained_in_place_and_a_live_teacher_stays(models: tuple[str, str]) -> None:
    student, teacher = map(live, models)
    before = [{name: p.clone() for name, p in model.state_dict().items()} for model in (student, teacher)]
    in_place = Distiller(student, teacher, ROWS, **SMALL).train(2)
    assert in_place.agent.student.model is student
    assert losses(in_place) == losses(Distiller(*models, ROWS, **SMALL).train(2))
    assert any(not torch.equal(p, before[0][name]) for name, p in student.state_dict().items())
    assert all(torch.equal(p, before[1][name]) for name, p in teacher.state_dict().items())


def test_the_student_may_be_its_own_teacher(models: tuple[str, str]) -> None:
    """A folder and a live model alike: D_t is 0 at first, and with another prompt for the teacher it is not; the
    teacher stays."""
    student, _ = models
    for given in (student, live(student)):
        rows = [row | {"teacher_prompt": f"1+{row['instruction']}"} for row in ROWS]
        assert Distiller(given, "self", ROWS, "fkl", **SMALL).train(1).history[0]["rollout/divergence"] < 1e-6
        own = Distiller(given, "self", rows, "fkl", learning_rate=1e-2, **SMALL)
        before = own.env.teacher.start([[1, 2]])
        assert own.train(2).history[0]["rollout/divergence"] > 1e-3
        assert own.env.teacher.start([[1, 2]]).equal(before)


def test_what_is_saved_is_a_plain_model(models: tuple[str, str], tmp_path: Path) -> None:
    distiller = Distiller(*models, ROWS, **SMALL).train(1)
    distiller.save(tmp_path / "student")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(plain(ids).logits, distiller.agent.student.model(ids).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == distiller.task.tokenizer.get_vocab()
    assert "`gated`" in (tmp_path / "student/README.md").read_text()


def test_evaluating_and_writing_leave_the_training_as_it_was(models: tuple[str, str]) -> None:
    straight, interrupted = (Distiller(*models, ROWS, **SMALL) for _ in range(2))
    interrupted.train(1)
    first = interrupted.evaluate(prompts=3)
    assert first == interrupted.evaluate(prompts=3)
    interrupted.generate("1+2=", "budget", budget=0.5)
    assert losses(interrupted.train(1)) == losses(straight.train(2))


def test_the_teacher_on_call_writes_its_share(models: tuple[str, str]) -> None:
    distiller = Distiller(*models, ROWS, **SMALL)
    prompts = [f"{a}+{b}=" for a in range(8) for b in range(8)]
    alone = distiller.generate(prompts)
    assert distiller.generate(prompts, "budget", budget=0) == alone
    assert not any("⟦" in text for text in distiller.generate(prompts, mark=True))
    assert all(text.startswith("⟦") for text in distiller.generate(prompts, "budget", budget=1, mark=True))
    shares = []
    for budget in (0.1, 0.4):
        marked = distiller.generate(prompts, "budget", budget=budget, mark=True)
        pieces = [piece.partition("⟧") for text in marked for piece in ("⟧" + text).split("⟦")]  # a token is a letter
        by_teacher, rest = (sum(len(piece[i].replace(" ", "")) for piece in pieces) for i in (0, 2))
        shares.append(by_teacher / (by_teacher + rest))
    assert shares == pytest.approx([0.1, 0.4], abs=0.07)  # measured on other prompts


def test_a_prompt_is_a_text_a_conversation_or_a_row(models: tuple[str, str]) -> None:
    distiller = Distiller(*models, ROWS, **SMALL)
    assert distiller.generate([]) == []
    text, conversation, row = distiller.generate(
        ["1+2=", [{"role": "user", "content": "1+2="}], {"instruction": "1+2="}], seed=1
    )
    assert distiller.generate("1+2=", seed=1) == [text]
    assert len({conversation, row, text}) > 1  # completions of their own
    longer = distiller.generate(["1+2="], max_new_tokens=12, seed=1)[0]
    assert longer.startswith(text)


def test_callbacks_see_metrics_and_completions(models: tuple[str, str]) -> None:
    seen: list[tuple[int, float, list[Sample]]] = []

    def note(iteration: int, metrics: dict[str, float], samples: list[Sample]) -> None:
        seen.append((iteration, metrics["train/loss"], samples))

    distiller = Distiller(*models, ROWS, "sft", callbacks=[note], **SMALL).train(2)
    assert [iteration for iteration, *_ in seen] == [1, 2]
    assert [loss for _, loss, _ in seen] == losses(distiller)
    texts = {row["instruction"] for row in ROWS}
    for *_, samples in seen:
        assert samples
        assert all(s.prompt in texts and s.marked.startswith("⟦") for s in samples)  # the teacher wrote all


def test_a_function_is_a_score(models: tuple[str, str]) -> None:
    def own(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return divergence(student, teacher)

    with_tokens = []

    def drafted(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        with_tokens.append(tokens)
        return -teacher.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]

    usual, same = (Distiller(*models, ROWS, score=score, tau=0.2, **SMALL).train(2) for score in ("divergence", own))
    assert losses(usual) == losses(same)
    Distiller(*models, ROWS, score=drafted, tau=1.0, **SMALL).train(1)
    assert with_tokens


def test_an_adapter_by_a_configuration_of_peft(models: tuple[str, str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, extra peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    from_folder = Distiller(*models, ROWS, peft_config=config, learning_rate=1e-2, **SMALL).train(2)
    student = live(models[0])
    in_place = Distiller(
        peft.get_peft_model(student, config), models[1], ROWS, learning_rate=1e-2, tokenizer=models[0], **SMALL
    )
    assert sum(p.numel() for p in in_place.agent.student.parameters()) == sum(
        p.numel() for p in from_folder.agent.student.parameters()
    )
    from_folder.save(tmp_path / "student")
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "student"), torch.tensor([[1, 2, 3]])
    trained = from_folder.agent.student.model(ids).logits
    torch.testing.assert_close(merged(ids).logits, trained, rtol=0, atol=1e-5)
    assert not torch.allclose(live(models[0])(ids).logits, trained, atol=1e-4)
    for options in ({"lora_dropout": 0.1}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError, match=f"^peft_config: {next(iter(options))}"):
            Distiller(*models, ROWS, peft_config=peft.LoraConfig(target_modules=["q_proj"], **options), **SMALL)


def test_a_teacher_behind_a_server_is_the_truncated_one(models: tuple[str, str]) -> None:
    pytest.importorskip("openai", reason="needs openai, extra served")
    student, teacher = models
    # no gate, which would read all that a local teacher returns
    local = Distiller(student, teacher, ROWS, "rkl", top_k=5, **SMALL).train(2)
    behind = load_model(teacher, vocab_size=IDS, eos_token_id=EOS)
    with CompletionsServer(behind, tokenizer=load_tokenizer(teacher)) as server:
        served = Distiller(student, server.url, ROWS, "rkl", teacher_top_k=5, **SMALL).train(2)
        served.env.teacher.close()
    assert losses(served) == pytest.approx(losses(local), rel=1e-3)
    assert served.agent.method.top_k == 5


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "gatd"}, "method"),
        ({"task": "instrukt"}, "task"),
        ({"tau": -1.0}, "tau"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1000}, "max_new_tokens"),
        ({"dtype": "float17"}, "dtype"),
        ({"peft_config": {"r": 2}}, "peft_config"),
        ({"data": []}, "data"),
        ({"data": [1]}, "data"),
        ({"data": 5}, "data"),
        ({"data": {"others": ROWS}}, "data"),
        ({"data": [{"instruction": ""}]}, "data"),
        ({"data": "missing.jsonl"}, "data"),
        ({"student": 5, "tokenizer": ""}, "student"),
        ({"rewrite": "never"}, "rewrite"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_mistake_is_named(models: tuple[str, str], options: dict[str, Any], name: str) -> None:
    given = {"student": models[0], "teacher": models[1], "data": ROWS, **SMALL, **options}
    if given.get("tokenizer") == "":
        given["tokenizer"] = models[1]
    with pytest.raises((ValueError, OSError), match=rf"^{name}: [^\n]*$"):
        Distiller(**given)


def test_more_mistakes(models: tuple[str, str]) -> None:
    with pytest.raises(TypeError, match=r"^lerning_rate: .*learning_rate"):
        Distiller(*models, ROWS, lerning_rate=1e-3)
    with pytest.raises(OSError, match=r"^student: "):
        Distiller("no/folder/here", models[1], ROWS, tokenizer=models[1])
    model = live(models[0])
    with pytest.raises(ValueError, match=r"^teacher: "):
        Distiller(model, model, ROWS)
    with pytest.raises(ValueError, match=r"^lora_rank: "):
        Distiller(model, models[1], ROWS, lora_rank=2)
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(ValueError, match=r"^tokenizer: "):
        Distiller(model, models[1], ROWS)
    distiller = Distiller(*models, ROWS, **SMALL)
    for arguments, name in (
        ({"ask": "tau"}, "ask"),  # which the training has not chosen yet
        ({"budget": 2.0}, "budget"),
        ({"ask": "always"}, "ask"),
        ({"prompts": [5]}, "prompts"),
        ({"prompts": [{"instruction": ""}]}, "prompts"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            distiller.generate(**{"prompts": ["1+2="], **arguments})


@pytest.mark.parametrize("env_id", ["Distill/Categorical-v0", "Distill/Sums-v0", "Distill/CausalLM-v0"])
def test_an_environment_from_make_vec_trains_the_agent(env_id: str) -> None:
    """As Gymnasium makes it, with its autoreset and its observations, and as the agent alone would have it."""
    losses = []
    for env in (
        gym.make_vec(env_id, num_envs=3),
        DistillVectorEnv(3, **(ENVIRONMENTS[env_id] | {"observation": "ids"}), autoreset_mode="Disabled"),
    ):
        core: Any = env.unwrapped
        torch.manual_seed(0)
        student = uniform(core.vocab_size) if "Cat" in env_id else CausalLM(toy_student("sums", 16, 1, 16))
        seen: list[float] = []
        agent = DistillAgent(student, DistillConfig(batch_size=5, draft_length=1))
        agent.learn(env, 2, lambda i, m, seen=seen: seen.append(m["train/loss"]))
        losses.append(seen)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
