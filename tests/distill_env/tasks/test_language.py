"""The tasks of language models: every form of data becomes the prompts that it says, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from agents.evaluation import completion_metrics
from agents.generation import generate
from distill_env.env import DistillVectorEnv
from distill_env.models.hub import TokenizerSource
from distill_env.models.toy import TEACHERS
from distill_env.tasks.base import SPLITS, Prompt
from distill_env.tasks.language import Example, complete_splits
from distill_env.tasks.registry import make_task
from distill_env.tasks.sources import read_rows
from tests.helpers.byte_tokenizer import save_byte_tokenizer

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<e>{% endif %}{% endfor %}<a>"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Folders of two tokenizers, one token a byte and `<e>` the end: with a chat template and without."""
    folders = {}
    for chat in (True, False):
        folders[chat] = str(tmp_path_factory.mktemp(f"chat-{chat}"))
        save_byte_tokenizer(folders[chat], CHAT if chat else None)
    return folders


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shown(task: Any, prompt: Prompt) -> tuple[str, str | None]:
    """Prompt and reference in words; the end token is `<e>`."""
    decode = task.tokenizer.decode
    return decode(prompt.ids), None if prompt.reference_completion is None else decode(prompt.reference_completion)


GSM = {"question": "Half of 8?", "answer": "8/2 = <<8/2=4>>4.\nSo it is 4.\n#### 4"}
MATH = {"problem": "Solve $2x=1$.", "solution": "It is $\\boxed{\\frac12}$.", "level": "Level 3", "type": "Algebra"}
MATH_500 = {"problem": "Solve it.", "solution": "No box.", "answer": "7", "level": 5, "subject": "Algebra"}
AIME = {"id": 60, "problem": "How many?", "answer": 204, "url": "", "year": "2024"}
SVAMP = {
    "ID": "1",
    "Body": "He has 7",
    "Question": "How many?",
    "Equation": "( 7.0 - 3.0 )",
    "Answer": 4.0,
    "Type": "-",
}


@pytest.mark.parametrize(
    ("name", "row", "question", "solution", "answer", "difficulty"),
    [
        ("gsm8k", GSM, "Half of 8?", "8/2 = 4.\nSo it is 4.\nThe answer is \\boxed{4}.", "4", 2),
        ("math", MATH, "Solve $2x=1$.", "It is $\\boxed{\\frac12}$.", "\\frac12", 3),
        ("math", MATH_500, "Solve it.", "No box.\nThe answer is \\boxed{7}.", "7", 5),
        ("aime", AIME, "How many?", "The answer is \\boxed{204}.", "204", 0),
        ("svamp", SVAMP, "He has 7. How many?", "7 - 3 = 4\nThe answer is \\boxed{4}.", "4", 1),
    ],
)
def test_a_problem_is_put_plainly_or_as_a_chat_and_its_own_solution_is_right(
    name: str,
    row: dict[str, Any],
    question: str,
    solution: str,
    answer: str,
    difficulty: int,
    words: dict[bool, str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify, extra tasks")
    path = write(tmp_path / "train.jsonl", row)
    plain, chat = (make_task(name, path=path, tokenizer=words[c]) for c in (False, True))
    (one,), (other,) = plain.prompts("train"), chat.prompts("train")
    assert shown(plain, one) == (f"Question: {question}\nAnswer:", f" {solution}<e>")
    asked, reference = shown(chat, other)
    assert asked.startswith(f"<user>{question}\n\n")
    assert asked.endswith("\\boxed{}.<a>")
    assert reference == f"{solution}<e>"
    for task, prompt in ((plain, one), (chat, other)):
        assert (prompt.text, prompt.final_answer, prompt.difficulty) == (question, answer, difficulty)
        assert prompt.reference_completion is not None
        right = task.grade(prompt, prompt.reference_completion)
        assert right.correct
        assert right.score == 1
        assert right.chain_correct is None
        wrong = task.tokenizer.encode("The answer is \\boxed{5}.<e>")
        assert not task.grade(prompt, wrong).correct


def test_what_a_model_asks_itself_afterwards_does_not_count(words: dict[bool, str], tmp_path: Path) -> None:
    task = make_task("gsm8k", path=write(tmp_path / "a.jsonl", GSM), tokenizer=words[False])
    (prompt,) = task.prompts("train")

    def correct(text: str) -> bool:
        return task.grade(prompt, task.tokenizer.encode(text)).correct  # type: ignore[attr-defined]

    assert correct(" It is 4.\n\nQuestion: And 3 times 3?\nAnswer: \\boxed{9}")
    assert correct(" It is 4<e>")
    assert not correct(" It is 4")  # cut off
    assert correct(" \\boxed{4} since")


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "<user>Add.\n\n1 2<a>", "3<e>"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "<user>Add.<a>", "3<e>"),
        ({"prompt": "Hi"}, "<user>Hi<a>", None),
        ({"question_id": 1, "category": "x", "turns": ["One", "Two"]}, "<user>One<a>", None),
        ({"instruction": "Add.", "instances": [{"input": "1", "output": "2"}]}, "<user>Add.\n\n1<a>", "2<e>"),
        (
            {"messages": [{"role": r, "content": c} for r, c in zip(("system", "user"), "SU", strict=True)]},
            "<system>S<user>U<a>",
            None,
        ),
        (
            {"messages": [{"role": r, "content": r[0]} for r in ("user", "assistant", "user", "assistant")]},
            "<user>u<assistant>a<e><user>u<a>",
            "a<e>",
        ),
    ],
)
def test_instructions_in_every_form(
    row: dict[str, Any], prompt: str, reference: str | None, words: dict[bool, str], tmp_path: Path
) -> None:
    task = make_task("instruct", path=write(tmp_path / "data.jsonl", row), tokenizer=words[True])
    assert [shown(task, p) for p in task.prompts("train")] == [(prompt, reference)]


def test_formats_of_files_hold_the_same(words: dict[bool, str], tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}, twice.", "output": f"{i} {i}"} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("instruction,output\n" + "".join(f'"Say {i}, twice.",{i} {i}\n' for i in range(3)))
    write(tmp_path / "a.jsonl", *rows)
    expected = [row for _, row in read_rows(tmp_path / "a.jsonl")["train"]]
    assert expected == rows
    assert [row for _, row in read_rows(tmp_path / "a.json")["train"]] == rows
    assert [row for _, row in read_rows(tmp_path / "a.csv")["train"]] == rows
    pytest.importorskip("pyarrow", reason="needs pyarrow, extra tasks")
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for _, row in read_rows(tmp_path / "a.parquet")["train"]] == rows


def test_splits_follow_the_names_of_files(tmp_path: Path) -> None:
    """And a test file by itself is never trained on."""
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev", "test", "ood", "notes"):
        write(tmp_path / f"{name}.jsonl", {"prompt": name})
    found = {s: [row["prompt"] for _, row in rows] for s, rows in read_rows(tmp_path).items()}
    assert found == {
        "train": ["train-00000-of-00002", "train-00001-of-00002"],
        "validation": ["dev"],
        "test": ["test"],
        "ood": ["ood"],
    }
    assert set(read_rows(tmp_path / "test.jsonl")) == {"test"}
    assert set(read_rows(tmp_path / "notes.jsonl")) == {"train"}


def test_missing_splits_are_taken_out_of_train() -> None:
    train = [Example(f"question {i}") for i in range(400)]
    whole = complete_splits({"train": train})
    assert sorted(e.question for part in whole.values() for e in part) == sorted(e.question for e in train)
    assert all(20 < len(whole[s]) < 70 for s in ("validation", "test"))
    given = complete_splits({"train": train, "test": [Example("other")]})
    assert given["test"] == [Example("other")]
    assert given["validation"] == whole["validation"]
    assert complete_splits({"test": train}) == {"test": train}
    few = complete_splits({"train": train[:3]})
    assert few == dict.fromkeys(("train", "validation", "test"), train[:3])


@pytest.mark.parametrize("chat", [True, False])
def test_solved_examples_are_the_same_for_all_but_never_the_question(
    chat: bool, words: dict[bool, str], tmp_path: Path
) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    path = write(tmp_path / "train.jsonl", *rows)
    task = make_task("gsm8k", path=path, tokenizer=words[chat], few_shot=3)
    prompts = [p for s in SPLITS for p in task.prompts(s)]
    assert len(prompts) == 40
    assert {shown(task, p)[0].count(" + 1?") for p in prompts} == {4}
    assert all(shown(task, p)[0].count(p.text) == 1 for p in prompts)
    trained = {p.text for p in task.prompts("train")}
    before = [shown(task, p)[0].replace("<user>", "Question: ").split("Question: ")[1:-1] for p in prompts]
    examples = {question.splitlines()[0].split("<")[0] for part in before for question in part}
    assert len(examples) == 4  # three, and one more for the questions that are among them
    assert examples <= trained
    again = make_task("gsm8k", path=path, tokenizer=words[chat], few_shot=3, seed=0)
    assert [p.ids for s in SPLITS for p in again.prompts(s)] == [p.ids for p in prompts]


def test_a_step_is_a_line_or_what_the_pattern_says(words: dict[bool, str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "x"})
    line = make_task("instruct", path=path, tokenizer=words[False])
    sentence = make_task("instruct", path=path, tokenizer=words[False], step_pattern=r"[.?]")
    assert {line.decode([i]) for i in line.step_end_ids} == {"\n"}
    assert {sentence.decode([i]) for i in sentence.step_end_ids} == {".", "?"}


def test_long_prompts_are_left_out_and_counted(words: dict[bool, str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": "x" * n} for n in range(1, 11)))
    task: Any = make_task("instruct", path=path, tokenizer=words[False], max_prompt_tokens=7)
    assert [place.number for place in task.report.long] == [8, 9, 10]
    assert task.report.usual_length == 9  # of ten prompts with 1 to 10 tokens
    assert [len(p.ids) for p in task.prompts("train")] == list(range(1, 8))


def test_a_text_is_cut_into_passages_of_which_none_overlap(words: dict[bool, str], tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1005))
    (tmp_path / "corpus.txt").write_text(text)
    task = make_task("text", path=str(tmp_path), tokenizer=words[False], prompt_tokens=4, max_new_tokens=6)
    passages = [p for s in SPLITS for p in task.prompts(s)]
    assert "".join(task.decode([*p.ids, *(p.reference_completion or ())]) for p in passages) == text[:1000]
    assert [len(task.prompts(s)) for s in SPLITS] == [80, 10, 10, 0]


TALK = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]


def test_every_message_of_the_assistant_may_be_a_target(words: dict[bool, str], tmp_path: Path) -> None:
    """Each with all that was said before; the prompts of a conversation are in one split."""
    path = write(tmp_path / "a.jsonl", {"messages": TALK})
    task = make_task("instruct", path=path, tokenizer=words[True], train_on="all")
    first, second = ("<user>a<a>", "b<e>"), ("<user>a<assistant>b<e><user>c<a>", "d<e>")
    assert [shown(task, p) for p in task.prompts("train")] == [first, second]
    assert [shown(make_task("instruct", path=path, tokenizer=words[True]), p) for p in task.prompts("train")][
        1
    ] == second
    many = [{"messages": [{**TALK[0], "content": f"talk {i}"}, *TALK[1:]]} for i in range(100)]
    task = make_task("instruct", path=write(tmp_path / "b.jsonl", *many), tokenizer=words[True], train_on="all")
    talks = [{p.place for p in task.prompts(s)} for s in SPLITS[:3]]
    assert sum(map(len, talks)) == len(set().union(*talks)) == 100
    assert all(talks)


def test_bad_rows_are_named_together_or_skipped(words: dict[bool, str], tmp_path: Path) -> None:
    """Rows that cannot be read, that have a hole, and that the template refuses; and long ones are left out."""
    good = [{"prompt": f"say {i}", "output": "x" if i else "", "id": i} for i in range(30)]
    path = Path(
        write(tmp_path / "a.jsonl", *good, {"prompt": ""}, {"prompt": "x", "system": "refuse"}, {"messages": "x"})
    )
    path.write_text(path.read_text() + "{")
    template = "{% if messages[0].content == 'refuse' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    save_byte_tokenizer(folder := str(tmp_path / "words"), template)
    options: dict[str, Any] = {"path": str(path), "tokenizer": folder, "max_prompt_tokens": 14}
    with pytest.raises(
        ValueError, match=r"^path: .*line 31: .*3 more.*line 32.*line 33.*line 34.*--skip-bad-rows"
    ) as error:
        make_task("instruct", **options)
    assert "\n" not in str(error.value)
    task: Any = make_task("instruct", **options, skip_bad_rows=True)
    assert {place.number for place, _ in task.report.bad} == {31, 32, 33, 34}
    assert task.report.rows == 34
    assert sum(task.report.prompts.values()) == 10  # those of one digit: `<user>say 0<a>` has 14 tokens
    assert task.report.long[0].number == 11
    assert task.report.unread == {"id": 30}
    assert task.report.references == 9


def test_rows_without_a_reference_are_bad_where_references_are_learned(words: dict[bool, str], tmp_path: Path) -> None:
    """In the train split alone."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", {"prompt": "a", "output": "x"}, {"prompt": "b", "output": " "}, {"prompt": "c"})
    write(folder / "test.jsonl", {"prompt": "d"})
    options: dict[str, Any] = {"path": str(folder), "tokenizer": words[True], "references": True}
    with pytest.raises(ValueError, match=r"line 2: no reference.*line 3"):
        make_task("instruct", **options)
    task = make_task("instruct", **options, skip_bad_rows=True)
    assert [[p.text for p in task.prompts(s)] for s in SPLITS] == [["a"], ["a", "b", "c"], ["d"], []]


def test_a_split_that_becomes_empty_is_named(words: dict[bool, str], tmp_path: Path) -> None:
    for split, length in (("train", 1), ("validation", 9), ("test", 1)):
        write(tmp_path / f"{split}.jsonl", {"prompt": "x" * length})
    with pytest.raises(ValueError, match=r"max_prompt_tokens: 5 .*validation.* 9"):
        make_task("instruct", path=str(tmp_path), tokenizer=words[False], max_prompt_tokens=5)
    write(tmp_path / "test.jsonl", {"prompt": ""})
    with pytest.raises(ValueError, match=r"path: no row of the test split"):
        make_task("instruct", path=str(tmp_path), tokenizer=words[False], skip_bad_rows=True)


def test_variables_of_the_chat_template(words: dict[bool, str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "x"})
    save_byte_tokenizer(folder := str(tmp_path / "words"), CHAT + "{% if not thinking %}!{% endif %}")

    def prompt(tokenizer: str, value: Any) -> str:
        task = make_task("instruct", path=path, tokenizer=tokenizer, chat_template_kwargs=value)
        return shown(task, task.prompts("train")[0])[0]

    assert prompt(folder, '{"thinking": true}') == "<user>x<a>"
    assert prompt(folder, '{"thinking": false}') == "<user>x<a>!"
    for tokenizer, value in ((folder, "[1]"), (folder, "{"), (folder, '{"thinkng": true}'), (words[False], '{"x": 1}')):
        with pytest.raises(ValueError, match="chat_template_kwargs: "):
            prompt(tokenizer, value)


def test_a_tokenizer_takes_a_template_and_an_end_token(words: dict[bool, str], tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT)
    path = write(tmp_path / "a.jsonl", {"prompt": "x", "output": "y"})

    def task(**options: str) -> Any:
        return make_task("instruct", path=path, tokenizer=TokenizerSource(words[False], **options))

    chat = task(chat_template=str(tmp_path / "chat.jinja"))
    assert shown(chat, chat.prompts("train")[0]) == ("<user>x<a>", "y<e>")
    ended = task(eos_token="!")
    assert shown(ended, ended.prompts("train")[0]) == ("x", "y!")
    assert task().eos_token_id != ended.eos_token_id  # the folder's own tokenizer is as it was
    for name, value in (("chat_template", str(tmp_path / "no.jinja")), ("eos_token", "<nothing>")):
        with pytest.raises(ValueError, match=f"{name}: "):
            task(**{name: value})


# damaged data: tests/experiments/test_malformed.py
MISTAKES = {
    "max_prompt_tokens: 3": ("instruct", "four\nfive!", {"max_prompt_tokens": 3}),
    "path: the train text": ("text", "too short", {}),
    "prompt_tokens: 0": ("text", "too short", {"prompt_tokens": 0}),
    "chat: ": ("instruct", "x", {"chat": True}),
    "few_shot: 2": ("instruct", "x", {"few_shot": 2}),
    "few_shot: -1": ("instruct", "x", {"few_shot": -1}),
    r"step_pattern: '\('": ("instruct", "x", {"step_pattern": "("}),
    "step_pattern: 'ab'": ("instruct", "x", {"step_pattern": "ab"}),  # no token's text matches it
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_in_one_line(message: str, words: dict[bool, str], tmp_path: Path) -> None:
    name, content, options = MISTAKES[message]
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        make_task(name, path=str(tmp_path / "a.txt"), tokenizer=words[False], **options)
    assert "\n" not in str(error.value)


def test_a_token_that_the_models_do_not_have_is_named(words: dict[bool, str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "x", "completion": "y<e>"})
    task: Any = make_task("instruct", path=path, tokenizer=words[False])
    end = task.tokenizer.eos_token_id
    with pytest.raises(ValueError, match=f"line 1: the token '<e>', id {end}") as error:
        make_task("instruct", path=path, tokenizer=words[False], vocab_size=end)
    assert "\n" not in str(error.value)


def test_unknown_paths_and_tasks(words: dict[bool, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: '.*nowhere.jsonl'"):
        make_task("gsm8k", path=str(tmp_path / "nowhere.jsonl"), tokenizer=words[False])
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", {"prompt": "x"})
    with pytest.raises(ValueError, match=r"path: .*a\.jsonl, b\.jsonl"):
        make_task("instruct", path=str(tmp_path), tokenizer=words[False])
    with pytest.raises(ValueError, match="task: 'gsm9k'"):
        make_task("gsm9k")


def test_the_registered_environment_needs_no_file() -> None:
    env = gym.make("distill_env:Distill/CausalLM-v0")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    env.close()


def test_an_environment_grades_problems_and_reports_them_by_difficulty(tmp_path: Path) -> None:
    """The teacher of sums is asked for the last total; it knows no box, so nothing that it writes is right."""
    rows = [{"problem": "7+2=", "answer": "9", "level": n} for n in (1, 2, 2)]
    task = {"path": write(tmp_path / "train.jsonl", *rows), "tokenizer": str(TEACHERS["sums"]), "chat": False}
    wording = {"max_prompt_tokens": 60}
    env = DistillVectorEnv(3, "math", "sums", task_kwargs=task | wording, max_new_tokens=4, autoreset_mode="Disabled")
    metrics = completion_metrics(generate(None, env, env.prompts, 0, teacher_writes=True))
    assert {k for k in metrics if "accuracy" in k} == {"accuracy", "accuracy/1", "accuracy/2"}
    assert "correct_chains" not in metrics


@pytest.mark.slow
def test_published_files_are_read_as_they_are(real_data: Path, words: dict[bool, str]) -> None:
    """Numbers of problems as published, all solved rightly by their own solutions but those without one."""
    sizes = {"gsm8k": (7473, 1319), "svamp": (1000, 0), "math500": (0, 500)}
    for folder, (train, test) in sizes.items():
        name = "math" if folder == "math500" else folder
        task = make_task(name, path=str(real_data / folder), tokenizer=words[False])
        prompts = {s: task.prompts(s) for s in SPLITS}
        assert sum(map(len, prompts.values())) == train + test
        assert len(prompts["test"]) == test or not test
        graded = [p for part in prompts.values() for p in part if p.reference_completion is not None]
        assert len(graded) == train + test
        assert all(task.grade(p, p.reference_completion).correct for p in graded if p.reference_completion is not None)
        if folder != "svamp":
            assert {p.difficulty for p in prompts["test"]} <= set(range(1, 13))
    forms = {
        "alpaca_demo": 999,
        "rasbt_instruct": 1100,
        "self_instruct/user_oriented_instructions.jsonl": 252,
        "self_instruct/seed_tasks.jsonl": 175,
        "mt_bench": 80,
        "vicuna": 80,
    }
    for path, count in forms.items():
        task = make_task("instruct", path=str(real_data / path), tokenizer=words[True])
        assert sum(len(task.prompts(s)) for s in SPLITS) == count
