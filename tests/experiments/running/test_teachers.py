"""--teacher: one, the student itself, or several by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.running.config_file import read_config
from experiments.running.flags import parse

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
