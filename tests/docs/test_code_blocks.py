"""Every Python and bash block of README.md and docs/ runs.

The blocks of a page run in order: the Python blocks in one namespace, all of them in one folder that is empty at first.
A comment above a block changes that:

    <!-- test: --iterations 2 -->    each command of experiments/ in the block gets these flags, too
    <!-- test: parse, REASON -->     the flags of its commands are parsed and nothing is run
    <!-- test: skip, REASON -->      nothing is looked at

A block with a title, as in `python title="my_agent.py"`, is written into the folder under that name instead of being
run. The names of models and files that a page asks for are replaced by tiny ones, and `.train(100)` trains twice.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import tyro

from agents.methods import METHODS
from experiments.running.config_file import default_config
from experiments.running.section import flag_names
from tests.helpers.paths import REPOSITORY
from tests.helpers.tiny_models import write_model, write_prompts

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "report" not in page.parent.name]  # written by experiments/report.py
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)(?P<rest>[^\n]*)\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)
DIRECTIVE = re.compile(r"<!-- test: (.*?) -->\s*\Z")
TEACHERS = ("Qwen/Qwen2.5-1.5B-Instruct", "smollm2/teacher", "models/teacher")
STUDENTS = ("Qwen/Qwen2.5-0.5B-Instruct", "smollm2/student", "runs/warm/student", "models/student")
TRAIN = re.compile(r"\.train\(\d+\)")
RECORDER = """
log() { printf '%s\\0' "$#" "$@" >> "$RECORD"; }
for name in python pip pytest mkdocs accelerate vllm uv git tensorboard; do
    eval "$name() { log $name \\"\\$@\\"; }"
done
cd() { :; }
"""

pytestmark = pytest.mark.docs


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    title: str
    directive: str
    code: str


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in BLOCK.finditer(text):
        before = DIRECTIVE.search(text[: match.start()])
        title = re.search(r'title="([^"]+)"', match["rest"])
        indent = len(match["indent"])
        yield Block(
            page,
            text[: match.start()].count("\n") + 1,
            match["language"],
            title[1] if title else "",
            before[1] if before else "",
            "".join(line[indent:] or "\n" for line in match["code"].splitlines(keepends=True)),
        )


class Parsed(BaseException):
    """The flags of a command are right; raised instead of running it."""


def commands(block: Block, record: Path) -> list[list[str]]:
    """The words of every command of a bash block, as bash itself expands them."""
    record.write_text("")
    environment = {"RECORD": str(record), "HOME": str(Path.home()), "PATH": "/nonexistent"}
    script = f"set -euo pipefail\n{RECORDER}\n{block.code}"
    done = subprocess.run(["/bin/bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.page}:{block.line}: {done.stderr}"
    words = record.read_text().split("\0")[:-1]
    found = []
    while words:
        count, words = int(words[0]), words[1:]
        found.append(words[:count])
        words = words[count:]
    return found


@dataclass
class Session:
    """Runs the blocks of a page."""

    folder: Path
    stand_ins: dict[str, str]
    monkeypatch: pytest.MonkeyPatch
    namespace: dict[str, Any]

    def run(self, block: Block) -> None:
        if block.directive.startswith("skip,"):
            return
        if block.title:
            (self.folder / block.title).write_text(block.code)
        elif block.language == "python":
            source = "\n" * block.line + self.replaced(block.code)
            exec(compile(source, str(block.page), "exec", dont_inherit=True), self.namespace)
        elif block.language == "bash":
            for words in commands(block, self.folder / ".record"):
                self.command(words, block.directive)

    def replaced(self, text: str) -> str:
        for name, path in self.stand_ins.items():
            text = text.replace(name, path)
        return TRAIN.sub(".train(2)", text)

    def command(self, words: list[str], directive: str) -> None:
        tool, *rest = words
        parse = directive.startswith("parse,")
        script = next((i for i, word in enumerate(rest) if word.startswith("experiments/")), None)
        if script is not None and tool in ("python", "accelerate"):
            more = [] if parse or not directive else directive.split()
            self.script(rest[script], [self.replaced(word) for word in rest[script + 1 :]] + more, parse)
        elif tool == "pip":
            check_requirement(rest)
        elif tool == "pytest":
            assert all((REPOSITORY / word).exists() for word in rest if word.startswith("tests"))
        else:
            assert parse or tool == "git", f"{words} is not run by any test; mark its block `parse` or `skip`"

    def script(self, path: str, arguments: list[str], parse: bool) -> None:
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [path, *arguments])
            patch.setattr(sys, "path", list(sys.path))
            if parse:
                patch.setattr(tyro, "cli", parsed_only(tyro.cli))
            with pytest.raises((Parsed, SystemExit)) as stop:
                runpy.run_path(str(REPOSITORY / path), run_name="__main__")
        assert isinstance(stop.value, Parsed) == parse, f"{path}: {stop.value}"
        assert parse or not stop.value.code, f"{path} {' '.join(arguments)}"


def parsed_only(cli: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = cli(*args, **kwargs)
        if kwargs.get("return_unknown_args"):  # a first look at some of the flags
            return result
        raise Parsed

    return wrapper


def check_requirement(words: list[str]) -> None:
    """`pip install` of the checkout, with extras that there are, or of other packages."""
    assert words[0] == "install", words
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        match = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        if match:
            assert set((match[1] or "").split(",")) - {""} <= set(extras), word


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    names = ("teacher", "student")
    teacher, student = (write_model(folder / n, seed, max_position_embeddings=512) for seed, n in enumerate(names))
    prompts = write_prompts(folder)
    rows = [{"instruction": f"{a}+{9 - a}=", "output": f"{a};{9 - a}"} for a in range(8)]
    (folder / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [[{"from": "human", "value": r["instruction"]}, {"from": "gpt", "value": r["output"]}] for r in rows]
    (folder / "sharegpt.json").write_text(json.dumps([{"conversations": chat} for chat in chats]))
    names = ("instructions.jsonl", "sharegpt.json")
    files = {"prompts.txt": prompts, **{name: str(folder / name) for name in names}}
    return {**dict.fromkeys(TEACHERS, teacher), **dict.fromkeys(STUDENTS, student), **files}


@pytest.mark.parametrize("page", [p for p in PAGES if list(blocks_of(p))], ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_the_blocks_of_a_page(
    page: Path, stand_ins: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as for a script in the folder
    known, environments = dict(METHODS), dict(gymnasium.registry)
    try:
        session = Session(tmp_path, stand_ins, monkeypatch, {"__name__": "docs"})
        for block in blocks_of(page):
            session.run(block)
    finally:
        for table, before in ((METHODS, known), (gymnasium.registry, environments)):
            table.clear()
            table.update(before)


INLINE = re.compile(r"`([^`\n]+)`")
ROOM = re.compile(r"(?:distill_env|agents|experiments|tests|docs)/[\w./-]*")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_files_and_links_of_a_page_exist(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    named = {match[0] for code in INLINE.findall(text) for match in [ROOM.fullmatch(code)] if match}
    assert sorted(path for path in named if not (REPOSITORY / path).exists()) == []
    links = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    assert sorted(link for link in links if link and not (page.parent / link).exists()) == []


FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]+[a-z])(?![\w-])")
OTHER_PROGRAMS = {"capture-video", "epsilon", "help", "help-all", "config", "max-logprobs", "tensor-parallel-size"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_flags_of_a_page_exist(page: Path) -> None:
    """A flag is a field of a run's configuration or of another command's; those of code blocks are parsed."""
    text = BLOCK.sub("", page.read_text())
    named = {flag for code in INLINE.findall(text) for flag in FLAG.findall(code)} - OTHER_PROGRAMS
    assert sorted(flag for flag in named if flag.replace("-", "_") not in known_flags()) == []


@lru_cache
def known_flags() -> set[str]:
    text = "".join(path.read_text() for path in (REPOSITORY / "experiments").rglob("*.py"))
    known = set(re.findall(r"^    (\w+): ", text, re.M))
    sections: list[Any] = [
        default_config(agent, "lm") for agent in ("gated", "ppo", "tests.helpers.plugin_agent:Frequencies")
    ]
    while sections:
        section = sections.pop()
        for field, flag in flag_names(type(section)).items():
            known.add(flag)
            sections += [value] if is_dataclass(value := getattr(section, field)) else []
    return known
