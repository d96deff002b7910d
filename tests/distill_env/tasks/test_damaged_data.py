"""Data and settings of tasks that cannot be: one line names the argument and the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill_env.tasks.registry import make_task
from tests.helpers.damage import each, is_refused, row, tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("words"))
    tokenizer().save_pretrained(folder)
    return folder


def messages(*turns: Any) -> str:
    return row(messages=[dict(zip(("role", "content"), turn, strict=False)) for turn in turns])


# by the place that the line names, the line, the row, the column or the file: file and content
DATA: dict[str, list[tuple[str, str | bytes]]] = {
    "line 1": [
        ("a.jsonl", '{"prompt": "x"} {"prompt": "y"}'),
        ("a.jsonl", "null\n"),
        ("a.jsonl", '{"a":' * 10**5),
        ("a.jsonl", r'{"prompt": "\ud800"}'),  # half of a surrogate pair
        ("a.jsonl", "{}\n"),
        ("a.jsonl", row(messages="hi")),
        ("a.jsonl", row(turns=[])),
        ("a.jsonl", messages(("user", "x"), *[("assistant", "y")] * 2)),
    ],
    "line 2": [("a.jsonl", '{"prompt": "x"}\n{"pro')],
    "line 3": [("a.jsonl", row(prompt="x") * 2 + row(prompt=" \u2003"))],
    "row 1": [
        ("a.json", "[1, 2]"),
        ("a.csv", "prompt\nHello, you\n"),  # a comma that is not quoted
        ("a.csv", "output,prompt\nx\n"),  # a short row
    ],
    "a.json": [("a.json", '[{"prompt": "x"}'), ("a.json", "[]"), ("a.json", '{"train": []}'), ("a.jsonl", "")],
    "byte": [("a.jsonl", '{"prompt": "x"}'.encode("utf-16")), ("a.txt", b"caf\xe9")],
    "character 13": [("a.jsonl", b'{"prompt": "x\0y"}')],
    "a.txt": [("a.txt", " \n\t\n\n")],
    "a.xml": [("a.xml", "<a/>")],
    "a.csv": [("a.csv", "prompt\n"), ("a.csv", 'prompt\n"x\ny\n'), ("a.csv", f"prompt\n{'x' * 200_000}\n")],
    "a.parquet": [("a.parquet", b""), ("a.parquet", b"PAR1" + bytes(100) + b"PAR1")],
    "nowhere": [("", "")],
    "folder": [("folder/", "")],
    "a.txt, b.txt": [("folder/b.txt", "x")],  # a folder in which no file is named after a split
    "level": [("a.jsonl", row(problem="x", level=3))],
    "prompt (int)": [("a.jsonl", row(prompt=3))],
    "output (int)": [("a.jsonl", row(prompt="x", output=3))],
    "input (dict)": [("a.jsonl", row(instruction="x", input={}))],
    "role": [("a.jsonl", row(messages=["hi"])), ("a.jsonl", messages(("bot", "x"))), ("a.jsonl", messages(("user",)))],
    "user": [("a.jsonl", messages(("system", "x"))), ("a.jsonl", messages(("user", " ")))],
}
# by the task and the place: content
PROBLEMS: dict[str, list[str]] = {
    "gsm8k answer": [
        row(question="x"),
        row(question="x", answer="y\n####"),
        row(question="x", answer={"a": 1}),
        '{"question": "x", "answer": NaN}',
    ],
    "gsm8k question": [row(question=["x"], answer="3")],
    "gsm8k line 1": [row(question=" ", answer="#### 3")],
    "gsm8k 500": [row(question="x", answer="9" * 5000)],
    "math line 1": [row(problem="x", solution=r"\boxed{4")],
    "svamp line 1": [row(Body="", Question="", Answer=3)],
    "text text (int)": [row(text=3)],
    "text 80": [row(text="short")],
}


@each(DATA)
def test_data_that_are_damaged(case: tuple[str, str | bytes], name: str, words: str, tmp_path: Path) -> None:
    """The line names the argument and the place."""
    file, content = case
    if file.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="needs pyarrow, extra tasks")
    path = tmp_path / (file or "nowhere.jsonl")
    if "/" in file:
        path = tmp_path / "folder"
        path.mkdir()
        for part in ("a.txt", "b.txt")[: 2 * len(content)]:
            (path / part).write_text(str(content))
    elif file:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    is_refused(lambda: make_task("instruct", path=str(path), tokenizer=words), "path: ", name)


@each(PROBLEMS)
def test_problems_that_are_damaged(case: str, name: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(case)
    task, _, place = name.partition(" ")
    is_refused(lambda: make_task(task, path=str(path), tokenizer=words), "path: ", place)


TASKS: dict[str, list[dict[str, Any]]] = {
    "few_shot": [{"few_shot": -1}, {"few_shot": 3}],
    "max_prompt_tokens": [{"max_prompt_tokens": 4}],
    "step_pattern": [{"step_pattern": "(?P<"}, {"step_pattern": "two words"}],
    "task": [{"name": "instructt"}],
    "tokenizer": [{"tokenizer": "/nowhere"}],
    "prompt_tokens": [{"name": "text", "prompt_tokens": 0}],
}


@each(TASKS)
def test_a_task_that_cannot_be(case: dict[str, Any], name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(row(prompt=f"say {i}", output="x") for i in range(3)))
    options = {"name": "instruct", "path": str(tmp_path / "a.jsonl"), "tokenizer": words} | case
    is_refused(lambda: make_task(**options), name)


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role != 'user' %}{{ raise_exception('must alternate') }}{% endif %}<a>",
        "{% for m in messages %}",
    ],
)
def test_a_chat_template_that_cannot_be(template: str, tmp_path: Path) -> None:
    tokenizer(chat_template=template).save_pretrained(str(tmp_path / "words"))
    (tmp_path / "a.jsonl").write_text(messages(("system", "x"), ("user", "y")))
    options = {"path": str(tmp_path / "a.jsonl"), "tokenizer": str(tmp_path / "words")}
    is_refused(lambda: make_task("instruct", **options), "chat")
