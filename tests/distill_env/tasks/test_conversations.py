"""Rows of every format that chat data have become the same conversation, and a row with a hole says what is wrong."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from distill_env.tasks.conversations import TrainOn, read_conversation, unread_columns


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def said(who: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": who, "value": value, **more}


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **more}


HI, YO = turn("user", "hi"), turn("assistant", "yo")
# formats of one question and one answer, with the columns and fields that nothing reads
SINGLE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sharegpt": ({"id": 1, "conversations": [said("human", "hi"), said("gpt", "yo")]}, ["id"]),
    "sharegpt with roles": ({"conversations": [HI, YO]}, []),
    "sharegpt, no tools": ({"conversations": [said("human", "hi"), said("gpt", "yo")], "tools": "[]"}, []),
    "slimorca": ({"conversations": [said("human", "hi", weight=0.0), said("gpt", "yo", weight=1.0)]}, []),
    "openai": ({"messages": [HI, YO]}, []),
    "openai as arrow": ({"messages": [HI | {"tool_calls": None}, YO | {"name": None}], "tools": None}, []),
    "openai parts": ({"messages": [turn("user", [text("h"), text("i", image_url=None)]), YO]}, []),
    "openai preferences": (
        {"input": {"messages": [HI], "tools": []}, "preferred_output": [YO], "non_preferred_output": [HI]},
        ["non_preferred_output"],
    ),
    "openai, empty system": ({"messages": [turn("system", ""), HI, YO]}, []),
    "reasoning": ({"messages": [HI, YO | {"reasoning_content": "hm"}]}, ["messages.reasoning_content"]),
    "lists of fields": ({"conversations": {"from": ["human", "gpt"], "value": ["hi", "yo"]}}, []),
    "questions": ({"turns": ["hi", "more"], "completion": "yo"}, []),
    "messages in csv": ({"messages": json.dumps([HI, YO])}, []),
    "messages in csv by pandas": ({"conversations": str([said("human", "hi"), said("gpt", "yo")])}, []),
    "prompts in csv": ({"prompt": json.dumps([HI]), "completion": str([YO])}, []),
    "desired": ({"prompt": "hi", "completion": "yo", "label": True}, []),
    "trl text": ({"prompt": "hi", "completion": "yo"}, []),
    "trl": ({"prompt": [HI], "completion": [YO]}, []),
    "trl preferences": ({"prompt": [HI], "chosen": [YO], "rejected": [HI]}, ["rejected"]),
    "trl implicit prompt": ({"chosen": [HI, YO], "rejected": [HI]}, ["rejected"]),
    "ultrafeedback": ({"prompt": "hi", "chosen": [HI, YO], "messages": [HI, YO]}, ["prompt", "chosen"]),
    "alpaca": ({"instruction": "hi", "input": "", "output": "yo", "text": "Below is"}, ["text"]),
    "llama-factory": ({"instruction": "hi", "output": "yo", "system": "", "history": []}, []),
    "llama-factory preferences": ({"conversations": [said("human", "hi")], "chosen": said("gpt", "yo")}, []),
    "swift": ({"query": "hi", "response": "yo"}, []),
    "question": ({"Question": "hi", "ANSWER": "yo"}, []),
    "lmflow": ({"input": "hi", "output": "yo"}, []),
    "lmsys": ({"conversation": [HI, YO], "model": "m"}, ["model"]),
    "capybara": ({"conversation": [{"input": "hi", "output": "yo"}]}, []),
    "gemini": ({"contents": [{"role": "user", "parts": [{"text": "hi"}]}, {"role": "model", "parts": ["yo"]}]}, []),
    "self-instruct": ({"instruction": "hi", "instances": [{"input": "", "output": "yo"}]}, []),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_question_and_its_answer(name: str) -> None:
    row, unread = SINGLE[name]
    conversation = read_conversation(row)
    assert [message[:2] for message in conversation.messages] == [("user", "hi"), ("assistant", "yo")]
    assert unread_columns(row, conversation.columns) == unread


LONG: dict[str, dict[str, Any]] = {
    "sharegpt": {"conversations": [said("system", "S"), *[said("human", "a"), said("gpt", "b")], HI, YO]},
    "sharegpt, system apart": {"system": "S", "conversations": [turn("user", "a"), turn("assistant", "b"), HI, YO]},
    "openai": {"messages": [turn("developer", "S"), turn("user", "a"), turn("assistant", "b"), HI, YO]},
    "bedrock": {"system": [{"text": "S"}], "messages": [turn("user", [{"text": "a"}]), turn("assistant", "b"), HI, YO]},
    "twice the system": {"system": "S", "messages": [said("system", "S"), said("user", "a"), said("gpt", "b"), HI, YO]},
    "llama-factory": {"instruction": "hi", "output": "yo", "system": "S", "history": [["a", "b"]]},
    "swift": {"query": "hi", "response": "yo", "system": "S", "history": [turn("user", "a"), turn("assistant", "b")]},
    "trl": {"prompt": [turn("system", "S"), turn("user", "a"), turn("assistant", "b"), HI], "completion": [YO]},
    "openorca": {"system_prompt": "S", "question": "hi", "response": "yo", "history": [["a", "b"]]},
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_a_system_and_what_was_said_before(name: str) -> None:
    found = read_conversation(LONG[name]).messages
    assert [m.content for m in found] == ["S", "a", "b", "hi", "yo"]
    assert [m.role for m in found] == ["system", "user", "assistant", "user", "assistant"]


def test_an_input_or_a_context_follows_the_prompt() -> None:
    for row in ({"instruction": "Add.", "input": "1 2"}, {"instruction": "Add.", "context": "1 2", "response": " "}):
        assert [message[:2] for message in read_conversation(row).messages] == [("user", "Add.\n\n1 2")]


def test_targets() -> None:
    """The last or all; after a last word of the user the end; never what is not to be trained on."""

    def targets(*messages: dict[str, Any]) -> tuple[list[int], ...]:
        conversation = read_conversation({"messages": list(messages)})
        return tuple(conversation.targets(train_on) for train_on in get_args(TrainOn))

    assert targets(HI) == ([1], [1])
    assert targets(HI, turn("assistant", " ")) == ([1], [1])
    assert targets(turn("system", "S"), HI, YO, HI, YO) == ([4], [2, 4])
    assert targets(HI, YO, HI) == ([3], [1, 3])
    assert targets(HI, YO | {"weight": 0}, HI, YO) == ([3], [3])
    assert targets(HI, YO, HI, YO | {"train": False}) == ([1], [1])
    with pytest.raises(ValueError, match="weight"):
        targets(HI, YO | {"weight": 0})


def test_a_bad_example_is_no_reference() -> None:
    for column in ("label", "kto_tag"):
        row = {"prompt": "hi", "completion": "yo", column: False}
        assert [message[:2] for message in read_conversation(row).messages] == [("user", "hi")]


def test_a_prompt_may_look_like_a_list() -> None:
    for prompt in ("[1] and [2]", "[{x}]", '[["a"', '[["a", "b"]]', '[{"x": 1}]'):
        assert read_conversation({"prompt": prompt}).messages[0].content == prompt


CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "a.png"}}
# by what the message names: rows
BAD: dict[str, list[dict[str, Any]]] = {
    "columns are none": [{}],
    "columns are a b": [{"a\nb": "x"}],
    "foo, bar (int)": [{"foo": "x", "bar": 3}],
    "chosen, rejected": [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}],
    "prompt is empty": [{"prompt": None}, {"prompt": " \u2003"}, {"prompt": []}, {"prompt": float("nan")}],
    "prompt (int)": [{"prompt": 3}],
    "prompt 1 is text": [{"prompt": ["a"]}],
    "instruction is empty": [{"instruction": "", "input": "x", "output": "y"}],
    "output (int)": [{"prompt": "x", "output": 3}],
    "output 1 has no role": [{"prompt": "x", "output": {"a": 1}}],
    "input (dict)": [{"instruction": "x", "input": {"a": 1}}],
    "messages is empty": [{"messages": []}, {"messages": None}, {"messages": " "}],
    "messages is text": [{"messages": "hi"}, {"messages": "[{'role': 'user'"}, {"messages": "[1]"}],
    "turns is text": [{"turns": "hi"}],
    "messages is dict": [{"messages": HI}],
    "messages 2 is NoneType": [{"messages": [HI, None]}],
    "messages 1 has no role": [{"messages": [{"content": "x"}]}, {"messages": [turn(3, "x")]}],  # type: ignore[arg-type]
    "(bot) is of an unknown role": [{"messages": [turn("bot", "x")]}],
    "(b o t) is of an unknown role": [{"messages": [turn("b\no\nt", "x")]}],
    "messages 1 (user) has no content": [{"messages": [{"role": "user"}]}, {"messages": [turn("user", None), YO]}],
    "has content (int)": [{"messages": [turn("user", 3)]}],
    "messages 1 (user) is empty": [{"messages": [turn("user", "\n "), YO]}, {"messages": [turn("user", [])]}],
    "messages 2 (assistant) is empty": [{"messages": [HI, turn("assistant", None), HI, YO]}],
    "messages 2 (user) is the second message": [{"messages": [HI, HI, YO]}],
    "(assistant) is the second message": [{"messages": [HI, YO, YO]}],
    "conversations 1 (gpt)": [{"conversations": [said("gpt", "a"), HI, YO]}],
    "no message of the user": [{"messages": [turn("system", "S")]}, {"messages": [turn("system", "")]}],
    "(system) is of the system": [{"messages": [HI, YO, turn("system", "S"), HI, YO]}],
    "history is text": [{"instruction": "x", "history": "a"}],
    "history 1, answer (NoneType)": [{"instruction": "x", "history": [["a", None]]}],
    "history 1 is list": [{"instruction": "x", "history": [["a", "b", "c"]]}],
    "has a tool call": [
        {"messages": [HI, turn("assistant", None, tool_calls=[CALL])]},
        {"messages": [HI, turn("assistant", [{"type": "tool_use", "name": "f"}])]},
    ],
    "conversations 2 (function_call) is a tool call": [{"conversations": [HI, said("function_call", "{}")]}],
    "messages 2 (tool) is the result of a tool": [{"messages": [HI, turn("tool", "3"), YO]}],
    "tools has tools": [{"messages": [HI, YO], "tools": [CALL]}, {"messages": [HI, YO], "tools": json.dumps([CALL])}],
    "has an image": [
        {"messages": [turn("user", [text("x"), IMAGE]), YO]},
        {"messages": [turn("user", [{"type": "image"}]), YO]},
        {"messages": [HI, YO], "images": ["a.png"]},
    ],
    "has audio": [{"messages": [turn("user", [{"type": "input_audio", "input_audio": {"data": "x"}}])]}],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in BAD.items() for row in rows])
def test_a_row_with_a_hole(name: str, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_conversation(row)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
