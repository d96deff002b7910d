"""The preflight: each thing that does not fit is seen, ends the run in one line, or is accepted by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from distill_env.models.causal_lm import CausalLM
from distill_env.models.hub import load_tokenizer
from distill_env.models.toy import toy_tokenizer
from distill_env.tasks.base import Prompt
from experiments import preflight as preflight_command
from experiments import run as run_module
from experiments.running import memory_estimate as memory
from experiments.running import preflight
from experiments.running.flags import parse
from tests.distill_env.models.test_causal_lm import build
from tests.distill_env.models.test_pretrained import kept
from tests.helpers.tiny_models import EOS, IDS, flags, write_model, write_prompts

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
SAME_TEXT = "{% set unused = 1 %}" + TEMPLATE
PLUS = TEMPLATE.replace("<eos>", "+")


def tokenizer(template: str | None = None, **special: str) -> Any:
    made = toy_tokenizer("sums")
    made.chat_template = template
    for name, token in special.items():
        setattr(made, name, token)
    return made


def change(folder: str, file: str, **fields: Any) -> None:
    path = Path(folder) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str, str]:
    """Teacher, student, prompts."""
    return write_model(tmp_path / "t", 1, rows=24), write_model(tmp_path / "s", 2, rows=17), write_prompts(tmp_path)


def rows_of(pair: tuple[str, str, str], *more: object) -> dict[str, preflight.Row]:
    """What the check finds, its table drawn for nobody."""
    config = parse(flags(*pair, *more))
    env, student = preflight.checked_pair(config, Console(quiet=True), config.agent_options.batch_size)
    rows = preflight.mark_accepted(
        [*preflight.file_rows(config), *preflight.model_rows(config, env, student)], config.loading.accept
    )
    return {row.name: row for row in rows}


def test_a_pair_that_fits_is_ok_and_the_table_shows_every_row(
    pair: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert preflight_command.main(flags(*pair, "--tau", 50)[2:]) == 0  # --env lm goes without saying
    shown = capsys.readouterr().out
    rows = rows_of(pair, "--tau", 50)
    assert {row.name: row.status for row in rows.values()} == dict.fromkeys(rows, "ok") | {"context": "warning"}
    assert all(name in shown for name in rows)
    assert len(rows) == 9
    assert "0% of" in rows["divergence"].result


def test_special_tokens() -> None:
    same = tokenizer(bos_token="0")
    assert preflight.special_tokens_row(same, tokenizer(bos_token="0")).status == "ok"
    differing = preflight.special_tokens_row(same, tokenizer(bos_token="1"))
    assert differing.status == "error"
    assert "bos 0 of teacher, 1 of student" in differing.result
    assert "bos" in differing.change
    assert preflight.special_tokens_row(same, tokenizer(bos_token="0", pad_token="1")).status == "warning"
    assert preflight.special_tokens_row(tokenizer(eos_token=None), tokenizer(eos_token=None)).status == "error"


def test_end_of_turn() -> None:
    def row(teacher: set[int], student: set[int], turn_end: int | None = None) -> preflight.Row:
        ends = {"teacher": frozenset(teacher), "student": frozenset(student)}
        return preflight.end_of_turn_row(tokenizer(), ends, turn_end)

    assert row({EOS}, {EOS}).status == row({EOS}, {EOS}, EOS).status == row({EOS, 1}, {EOS, 1}).status == "ok"
    assert row({EOS, 1}, {EOS}).status == "warning"
    elsewhere = row({EOS}, {1})
    assert elsewhere.status == "error"
    assert "<eos> (13), but by itself the student ends them with 1 (1)" in elsewhere.result
    assert "generation_config.json of the student" in elsewhere.change
    assert row(set(), set()).status == "error"
    by_template = row({EOS}, {EOS}, 11)
    assert by_template.status == "error"
    assert "--eos-token" in by_template.change


def test_the_end_of_a_turn_is_found_in_the_template() -> None:
    assert preflight.turn_end_token(tokenizer(TEMPLATE)) == EOS
    assert preflight.turn_end_token(tokenizer(PLUS)) is None  # an ordinary token
    plus = tokenizer().convert_tokens_to_ids("+")
    assert preflight.turn_end_token(tokenizer(PLUS, sep_token="+")) == plus
    assert preflight.turn_end_token(tokenizer("{{ raise_exception('never') }}")) is None
    assert preflight.turn_end_token(tokenizer()) is None


def test_chat_templates_are_compared_by_what_they_write() -> None:
    def row(student: str | None, used: bool = True) -> str:
        return preflight.chat_template_row(tokenizer(TEMPLATE), tokenizer(student), used).status

    assert row(TEMPLATE) == row(SAME_TEXT) == row(PLUS, used=False) == "ok"
    assert row(PLUS) == row(None) == "error"


def test_contexts() -> None:
    def row(student: int | None) -> preflight.Row:
        return preflight.context_row(50, 60, {"teacher": None, "student": student})

    assert row(None).status == row(60).status == "ok"
    assert row(50).status == "warning"
    assert row(49).status == "error"
    assert "by 1" in row(49).change


def test_memory_is_compared_with_what_is_free() -> None:
    needs = {"teacher": 50, "student": 30, "AdamW": 60, "drafts or backward pass": 100}
    rows = [preflight.memory_row(needs, 80, free) for free in (200, 199, 160, 159)]
    assert [row.status for row in rows] == ["ok", "warning", "warning", "error"]
    assert "--gradient-checkpointing" in rows[3].change


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_memory_estimates_are_what_is_held(kind: str) -> None:
    model = build(kind, torch.float32)
    config, lm = model.config, CausalLM(model)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.full((3, 12), 5)
    with kept(model) as elements:
        model.base_model(input_ids=tokens, use_cache=False)[0].sum()
    assert memory.activation_bytes(config, 3, 12, 4, False) == pytest.approx(4 * elements[0], rel=0.1)
    lm.reserve(12)
    lm.start(tokens.tolist())
    held = sum(b.numel() * 4 for buffers in lm._cache.buffers.values() for b in buffers)
    assert held == memory.cache_bytes(config, 3, 12, 4)
    model(input_ids=tokens).logits.sum().backward()
    optimizer.step()
    moments = sum(t.numel() * 4 for s in optimizer.state.values() for t in s.values() if t.dim())
    gradients = sum(p.grad.numel() * 4 for p in model.parameters())
    assert memory.training_bytes(model) == {"gradients": gradients, "AdamW": moments}


def test_an_adapter_needs_no_states_for_what_is_frozen(pair: tuple[str, str, str]) -> None:
    full, adapter = CausalLM.load(pair[1]), CausalLM.load(pair[1], lora_rank=1)
    trained = sum(p.numel() for p in adapter.parameters())
    assert memory.training_bytes(adapter.model)["AdamW"] == 8 * trained < memory.training_bytes(full.model)["AdamW"]


def test_the_probe_reads_both_models_at_the_same_states(pair: tuple[str, str, str]) -> None:
    """With one model as both, they agree at every state; answers that have ended have no more states; it repeats
    itself and leaves the global generators alone."""
    model = CausalLM.load(pair[1], vocab_size=IDS)
    prompts = [Prompt((3, 4, 5), ""), Prompt((6,), "")] * 8
    before = torch.get_rng_state()
    own, theirs, exists = preflight.probe(model.fork(), model.fork(), prompts, 12, 0)
    torch.testing.assert_close(own[exists], theirs[exists], rtol=0, atol=1e-4)
    assert bool(exists[:, 0].all())
    assert int((~exists).sum()) > 0
    assert torch.equal(preflight.probe(model.fork(), model.fork(), prompts, 12, 0)[0][exists], own[exists])
    assert torch.equal(torch.get_rng_state(), before)
    far = preflight.divergence_row(own[exists], own[exists].flip(-1), 1e-3)
    assert far.status == "warning"
    assert preflight.divergence_row(own[exists], theirs[exists], 1e-3).status == "ok"
    assert preflight.divergence_row(own[exists], own[exists].flip(-1), 1e-3, own_text=False).status == "ok"
    assert preflight.teacher_row(torch.full((3, IDS), torch.nan)).status == "error"


def test_a_gate_that_misses_what_is_cut_off_is_a_warning() -> None:
    """All of the student's mass is in the tail, on a token that the teacher never takes: D_t is large, and small once
    the tail is one bucket. It matters to a gate that reads the truncated one at a given tau."""
    teacher = torch.tensor([[0.5, 0.3, 0.1999, 0.0001]]).log().expand(5, 4)
    student = torch.tensor([[1e-4, 1e-4, 1e-4, 0.9997]]).log().expand(5, 4)
    statuses = {
        (reads, fixed): preflight.truncation_row(student, teacher, torch.tensor([[0, 1]] * 5), 3.0, reads, fixed).status
        for reads in ("whole", "truncated")
        for fixed in (True, False)
    }
    assert statuses.pop(("truncated", True)) == "warning"
    assert {*statuses.values()} == {"ok"}
    near = preflight.truncation_row(teacher, teacher, torch.tensor([[0, 1]] * 5), 3.0, "truncated", True)
    assert near.status == "ok"


def spoil(folder: str) -> None:
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def reorder(folder: str) -> None:
    path = Path(folder) / "tokenizer.json"
    path.write_text(path.read_text().replace('"0": 0', '"0": 1', 1).replace('"1": 1', '"1": 0', 1))


BAD = {
    "tokenizer": (lambda t, s: reorder(s), "4 entries differ"),
    "special_tokens": (
        lambda t, s: change(s, "tokenizer_config.json", bos_token="1"),
        "bos none of teacher, 1 of student",
    ),
    "end_of_turn": (lambda t, s: change(t, "generation_config.json", eos_token_id=1), "teacher ends them with 1"),
    "chat_template": (lambda t, s: (Path(t) / "chat_template.jinja").write_text(TEMPLATE), "the student has none"),
    "context": (lambda t, s: change(s, "config.json", max_position_embeddings=8), "student 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_ends_the_run_in_one_line_or_is_accepted(
    case: str, pair: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left behind; the named flag accepts it, and only what a run can live with."""
    spoilt, said = BAD[case]
    spoilt(*pair[:2])
    name, out = case.split()[0], tmp_path / "runs"
    arguments = [*flags(*pair), "--out", str(out), "--iterations", "1"]
    assert run_module.main(arguments) == 1
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert f"preflight: {name}: " in captured.err
    assert said in captured.err
    assert "error" in captured.out  # in the table
    assert not out.exists()
    if name in preflight.ACCEPTABLE:
        assert f"--accept {name}" in captured.err
        assert rows_of(pair, "--accept", name)[name].status == "accepted"
    else:
        assert "--accept" not in captured.err


def test_data_that_cannot_be_used_end_the_run_before_the_models_are_loaded(
    pair: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a test split; a row without a reference where references are learned; a validation split of long prompts."""
    for name in pair[:2]:
        spoil(name)  # which the error would name
    only, hole, long = (tmp_path / name for name in ("test.txt", "hole.jsonl", "long"))
    only.write_text("1+2=\n")
    hole.write_text('{"prompt": "1+2=", "output": "3"}\n' * 30 + '{"prompt": "1+2=", "output": ""}\n')
    long.mkdir()
    for split, prompt in (("train", "1+2="), ("validation", "1+2+3=")):
        (long / f"{split}.txt").write_text(prompt)
    for path, named, more in (
        (only, "preflight: data: ", ()),
        (hole, "line 31", ("--agent", "sft", "--teacher-writes", "reference")),
        (long, "max_prompt_tokens: 4", ("--max-prompt-tokens", 4)),
    ):
        assert run_module.main([*flags(*pair[:2], str(path), *more), "--out", str(tmp_path / "runs")]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert named in line
        assert not (tmp_path / "runs").exists()


def test_the_table_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Says what was read, used and left out, where, and which columns mean nothing."""
    teacher, student = write_model(tmp_path / "t", 1), write_model(tmp_path / "s", 2)
    rows = [{"prompt": f"{a}+{a}=", "output": "1", "level": 1} for a in range(10) for _ in range(3)]
    rows[3]["prompt"], rows[4]["prompt"], rows[7]["prompt"] = "1+2+3+4+5=", "", " "
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--skip-bad-rows", "--max-prompt-tokens", 4, "--tau", 50)
    assert preflight_command.main(flags(teacher, student, str(path), *more)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for expected in ("rows read │ 30", "train 27", "line 5, line 8", "line 4", "level (28)"):
        assert expected in shown
    assert preflight_command.main(flags(teacher, student, str(path), *more[1:])) == 1
    assert "--skip-bad-rows" in capsys.readouterr().err


def test_a_student_ends_with_the_chosen_token(
    pair: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the run and, by its folder, outside of it."""
    change(pair[0], "generation_config.json", eos_token_id=[EOS, 11])
    plus = toy_tokenizer("sums").convert_ids_to_tokens(11)
    arguments = ["--iterations", 1, "--eos-token", plus, "--name", "r", "--out", tmp_path / "runs"]
    assert run_module.main(flags(*pair, *arguments)) == 0
    assert run_module.main(["--resume", "--name", "r", "--out", str(tmp_path / "runs"), "--iterations", "2"]) == 0
    student = tmp_path / "runs/r/student"
    assert json.loads((student / "generation_config.json").read_text())["eos_token_id"] == 11
    assert load_tokenizer(str(student)).eos_token_id == 11


@pytest.mark.parametrize("which", [0, 1])
def test_weights_that_are_not_numbers_end_the_run_in_one_line(
    which: int, pair: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(pair[which])
    assert run_module.main([*flags(*pair), "--out", str(tmp_path / "runs")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert pair[which] in line
    assert "model.layers.1.mlp.up_proj.weight" in line
    assert not (tmp_path / "runs").exists()


def test_accepted_by_name_a_run_goes_through_and_its_folder_remembers(
    pair: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(pair[0], "generation_config.json", eos_token_id=1)
    arguments = [*flags(*pair), "--out", str(tmp_path / "runs"), "--name", "r", "--iterations", "1"]
    assert run_module.main([*arguments, "--accept", "end_of_turn", "memory"]) == 0
    assert "accepted" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs/r/config.json").read_text())["loading"]["accept"] == ["end_of_turn", "memory"]
    assert "--accept end_of_turn memory" in (tmp_path / "runs/r/student/README.md").read_text()
    resumed = ["--resume", "--name", "r", "--out", str(tmp_path / "runs"), "--iterations", "2"]
    assert run_module.main(resumed) == 0
