"""--teacher: one, the student itself, or several by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distill_env.models.causal_lm import CausalLM
from distill_env.models.toy import toy_tokenizer
from experiments import run as run_module
from experiments.running.config_file import read_config
from experiments.running.flags import parse
from experiments.running.run_folder import read_metrics
from tests.helpers.servers import CompletionsServer
from tests.helpers.tiny_models import flags, write_model

LM = ["--env", "lm", "--student", "s", "--name", "run"]
OWN = [*LM, "--teacher", "self", "--refresh-teacher", "3"]


def test_the_student_may_be_its_own_teacher() -> None:
    assert parse([*LM, "--teacher", "self"]).teacher.model == "s"
    assert parse([*LM, "--teacher", "math=self", "code=c"]).teacher.by_name == {"math": "s", "code": "c"}
    for refreshed in (["self"], ["s"]):
        config = parse([*LM, "--teacher", *refreshed, "--refresh-teacher", "3"])
        assert config.agent_options.refresh_teacher == 3  # type: ignore[union-attr]


def test_several_teachers_have_names() -> None:
    config = parse([*LM, "--teacher", "math=m", "code=http://h/v1?a=b"])
    assert config.teacher.by_name == {"math": "m", "code": "http://h/v1?a=b"}
    assert config.teacher.local == {"math": "m"}
    assert config.teacher.is_served
    assert parse([*LM, "--teacher", "http://h/v1?a=b"]).teacher.by_name == {"": "http://h/v1?a=b"}
    assert parse([*LM, "--teacher", "runs/a=b"]).teacher.by_name == {"": "runs/a=b"}


@pytest.mark.parametrize(
    ("flag", "args"),
    [
        ("teacher", [*LM, "--teacher", "m", "c"]),
        ("teacher", [*LM, "--teacher", "math=m", "c"]),
        ("teacher", [*LM, "--teacher", "math=m", "math=c"]),
        ("teacher", ["--env", "lm", "--teacher", "self"]),
        ("refresh_teacher", [*LM, "--teacher", "m", "--refresh-teacher", "3"]),
        ("refresh_teacher", [*LM, "--teacher", "a=self", "b=m", "--refresh-teacher", "3"]),
        (
            "refresh_teacher",
            [*LM, "--teacher", "self", "--refresh-teacher", "3", "--agent", "fkl", "--teacher-cache", "c"],
        ),
        ("refresh_teacher", ["--env", "sums", "--refresh-teacher", "3"]),
    ],
)
def test_what_is_no_teacher_is_refused_in_one_line(flag: str, args: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^{flag}: ") as error:
        parse(args)
    assert "\n" not in str(error.value)


def test_a_file_names_one_teacher_or_several(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("env: lm\nteacher: {models: m}\n")
    assert read_config(path).teacher.models == ("m",)
    path.write_text("env: lm\nteacher: {models: [math=m, code=c]}\n")
    assert read_config(path).teacher.by_name == {"math": "m", "code": "c"}


def test_a_run_with_two_local_teachers_and_a_served_one(tmp_path: Path) -> None:
    """The costs of each are in the metrics and the summary; together they are those of all. A row that names nobody
    ends the run before it begins."""
    names = ["a", "b", "c"]
    paths = {name: write_model(tmp_path / name, seed) for seed, name in enumerate(names)}
    rows = [{"prompt": f"{i}+{i + 1}=", "teacher": names[i % 3]} for i in range(9)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with CompletionsServer(CausalLM.load(paths["c"]), tokenizer=toy_tokenizer("sums"), context=64) as server:
        teachers = [f"a={paths['a']}", f"b={paths['b']}", f"c={server.url}"]
        more = ["--teacher-top-k", "5", "--agent", "rkl", "--iterations", "3", "--out", str(tmp_path), "--name", "run"]
        command = flags(paths["a"], write_model(tmp_path / "student", 7), str(data), *more)
        place = command.index("--teacher")
        command[place + 1 : place + 2] = teachers
        assert run_module.main(command) == 0
        nameless = tmp_path / "nameless.jsonl"
        nameless.write_text(data.read_text() + '{"prompt": "1+1="}\n')
        command[command.index("run")], command[command.index(str(data))] = "nameless", str(nameless)
        assert run_module.main(command) == 1
    assert not (tmp_path / "nameless" / "metrics.csv").exists()
    training = json.loads((tmp_path / "run" / "evaluation.json").read_text())["training"]
    for what in ("positions", "tokens"):
        metrics = read_metrics(tmp_path / "run")
        for row in metrics:
            assert sum(row[f"cost/teacher_{what}/{name}"] for name in names) == row[f"cost/teacher_{what}"]
        for name in names:
            assert training[f"teacher_{what}/{name}"] == sum(row[f"cost/teacher_{what}/{name}"] for row in metrics)
    assert min(training[f"teacher_positions/{name}"] for name in names) > 0


def test_a_run_whose_teacher_is_the_student_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    """With another prompt for the teacher, refreshed every second iteration, and stopped between two refreshes."""
    model = write_model(tmp_path / "model")
    prompts = tmp_path / "data.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+2=", "completion": f"{i}"}) + "\n" for i in range(8)))
    more = ["--agent", "fkl", "--refresh-teacher", "2", "--teacher-prompt", "{prompt}{solution}+", "--device", "cpu"]
    more += ["--checkpoint-every", "3", "--out", str(tmp_path)]
    command = flags("self", model, str(prompts), *more)
    assert run_module.main([*command, "--iterations", "4", "--name", "whole"]) == 0
    assert run_module.main([*command, "--iterations", "3", "--name", "stopped"]) == 0
    assert run_module.main(["--resume", "--name", "stopped", "--out", str(tmp_path), "--iterations", "4"]) == 0
    whole, stopped = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(whole[key].equal(stopped[key]) for key in whole)
