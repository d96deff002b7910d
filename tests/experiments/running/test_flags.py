"""The command line of a run: what --help shows, files of settings, and flags without an effect."""

from __future__ import annotations

import json
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from distill_env.gate_settings import Gate
from experiments.running.config import DataConfig, EnvName, RunConfig, StudentConfig, TeacherConfig
from experiments.running.config_file import default_config, flag_values, from_dict, read_config, to_dict
from experiments.running.flags import parse
from experiments.running.help import FIRST, choices, docstrings, help_text
from experiments.running.section import flag_names, flags_of

CHOICES = [
    (agent, env)
    for agent in ("gated", "minillm", "ppo", "tests.helpers.plugin_agents:Silent")
    for env in get_args(EnvName)
]


@pytest.mark.parametrize(("agent", "env"), CHOICES)
def test_a_configuration_survives_strict_json(agent: str, env: str) -> None:
    config = default_config(agent, env)
    text = json.dumps(to_dict(config), allow_nan=False)
    assert from_dict(default_config("rkl" if agent == "gated" else agent, env), json.loads(text)) == config


def test_every_flag_has_one_name_and_an_explanation() -> None:
    for agent in ("gated", "ppo", "tests.helpers.plugin_agents:Silent"):
        flags = list(flags_of(default_config(agent, "sums")))
        assert len({flag.name for flag in flags}) == len(flags)
        assert [f.name for f in flags if not docstrings(type(f.section)).get(f.path[-1])] == []


def test_help_is_short_and_shows_what_has_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = help_text(default_config("gated", "sums"), "")
    assert len(text.splitlines()) < 120
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert shown[:3] == [f"--{name}" for name in FIRST[:3]]
    assert {"--tau", "--student-width"} <= {*shown}
    assert not {"--teacher", "--few-shot", "--lora-rank", "--n-epochs", "--skew"} & {*shown}
    assert "--teacher " in help_text(default_config("gated", "lm"), "")
    assert "--n-epochs" in help_text(default_config("ppo", "sums"), "")
    assert "--skew" in help_text(default_config("skew_fkl", "sums"), "")


def test_help_all_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help-all"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in flag_values(default_config("gated", "sums")))


@pytest.mark.parametrize("section", [TeacherConfig, StudentConfig, DataConfig, Gate])
def test_help_all_wraps_at_the_terminals_width_only(
    section: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Docstrings of several lines are one line on a wide terminal, at least as far as two lines of the source."""
    monkeypatch.setenv("COLUMNS", "3000")
    with pytest.raises(SystemExit):
        parse(["--help-all"])
    text = capsys.readouterr().out
    assert [name for name, line in docstrings(section).items() if line[:200] not in text] == []


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--few-shot", "3"], "few_shot"),
        (["--env", "lm", "--student-width", "32"], "student_width"),
        (["--env", "categorical", "--warm-start", "0.5"], "warm_start"),
        (["--agent", "ppo", "--teacher-cache", "cache"], "teacher_cache"),
        (["--agent", "ppo", "--student-dtype", "bfloat16"], "student_dtype"),
        (["--env", "categorical", "--student-dtype", "bfloat16"], "student_dtype"),
    ],
)
def test_a_flag_without_an_effect_is_refused(flags: list[str], name: str) -> None:
    with pytest.raises(ValueError, match=name) as error:
        parse(flags)
    assert "\n" not in str(error.value)


def test_two_models_make_it_a_run_of_language_models() -> None:
    pair = ["--teacher", "a", "--student", "b"]
    assert parse(pair).env == parse([*pair, "--env", "lm"]).env == "lm"
    assert parse(["--student", "b"]).env == "sums"
    assert parse([*pair, "--name", "x"]).method.gate.tau == "auto"
    assert parse([*pair, "--tau", "0.5"]).method.gate.tau == 0.5
    assert parse([*pair, "--agent", "skd"]).method.gate.tau == 4.0
    assert parse(["--tau", "auto"]).method.gate.tau == "auto"


def test_lengths_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(*flags: str) -> tuple[int | None, int | None]:
        config = parse(["--teacher", "a", "--student", "b", *flags])
        return config.data.max_prompt_tokens, config.environment.max_new_tokens

    assert lengths("--device", "cpu") == (128, 64)
    assert lengths("--device", "cuda") == (512, 256)
    assert lengths("--device", "cpu", "--max-new-tokens", "9", "--max-prompt-tokens", "8") == (8, 9)
    assert lengths("--device", "cpu", "--task", "word_problems") == (128, None)


@pytest.mark.parametrize("flags", [["--schedule", "linear"], ["--schedule", "cosine"], ["--decay-iterations", "30"]])
def test_a_schedule_without_a_length_covers_the_run(flags: list[str]) -> None:
    config = parse(["--iterations", "30", *flags])
    assert config.agent_options.optimizer.decay_iterations == 30
    assert parse([]).agent_options.optimizer.decay_iterations == 0


@pytest.mark.parametrize("value", ["sft:0", "sft:", "sgd:3", "1.5", "-1", "nan"])
@pytest.mark.parametrize("env", ["sums", "lm"])
def test_bad_warm_starts(value: str, env: str) -> None:
    with pytest.raises(ValueError, match=r"^warm_start: "):
        parse(["--env", env, f"--warm-start={value}"])


def test_a_share_of_accuracy_is_no_warm_start_of_language_models() -> None:
    with pytest.raises(ValueError, match=r"^warm_start: "):
        parse(["--env", "lm", "--warm-start", "0.5"])
    assert parse(["--env", "lm", "--warm-start", "sft:7"]).training.warm_updates == 7


def test_a_file_gives_the_settings_and_flags_override_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    settings = {"agent": "soft", "env": "coins", "training": {"iterations": 7}}
    settings["agent_options"] = {
        "method": {"gate": {"tau": 0.3, "score_clip": "inf"}},
        "optimizer": {"learning_rate": "1e-2"},
    }
    path.write_text(yaml.safe_dump(settings))
    config = parse(["--config", str(path), "--out", str(tmp_path), "--alpha", "3"])
    assert (config.agent, config.env, config.training.iterations, config.student.width) == ("soft", "coins", 7, 24)
    values = flag_values(config)
    assert (values["tau"], values["score_clip"], values["learning_rate"], values["alpha"]) == (0.3, "inf", 0.01, 3.0)
    assert config.name == "soft-coins-s0"


def test_the_config_of_a_run_is_such_a_file(tmp_path: Path) -> None:
    config = parse(["--agent", "budget", "--env", "categorical", "--seed", "4", "--tau", "inf", "--budget", "0"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config), allow_nan=False))
    assert read_config(path) == config
    assert parse(["--config", str(path)]) == config
    assert parse(["--config", str(path), "--name", "x", "--seed", "5"]).agent_options.seed == 5


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("tau: 0.2", "tau"),
        ("training: {iterations: many}", "iterations"),
        ("training: {iteration: 3}", "training.iteration"),
        ("student: {width: 18}", "student_width"),
        ("training: 3", "training"),
        ("agent: gatedd", "agent"),
        ("[1, 2]", "list"),
        ("training: [", "line"),
        ("chat: {", "line"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_key(text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="config: ") as error:
        parse(["--config", str(path)])
    assert "run.yaml" in str(error.value)
    assert key in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_of_a_section_name_the_flag() -> None:
    for section, names in ((s, flag_names(type(s))) for s in vars(RunConfig()).values() if is_dataclass(s)):
        numbers = [
            f for f in names if isinstance(getattr(section, f), int) and not isinstance(getattr(section, f), bool)
        ]
        for field in numbers:
            with pytest.raises(ValueError, match=f"^{names[field]}: "):
                replace(section, **{field: -1})  # type: ignore[type-var]


def test_every_score_that_is_offered_is_accepted() -> None:
    (score,) = (flag for flag in flags_of(default_config("gated", "sums")) if flag.name == "score")
    assert len(choices(score)) > 1
    *names, own = choices(score)
    for name in (*names, own.replace("package.module:function", "distill_env.divergence:reverse_kl")):
        assert parse(["--score", name]).method.gate.score == name  # type: ignore[union-attr]
