"""Rows of chat data in their usual formats, as conversations of system, user and assistant.

A row consists of parts, and each part has one of several names: see `COLUMNS`. A message has a role under `role` or
`from`, and content under `content` or `value`: see `ROLES` and `CONTENT`.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from distill_env.tasks.sources import columns_of, in_brief, is_filled

Role = Literal["system", "user", "assistant"]
TrainOn = Literal["last", "all"]

# names of the columns of each part, compared in lower case; the first that is filled is read
COLUMNS: dict[str, tuple[str, ...]] = {
    "conversation": ("messages", "conversations", "conversation", "contents"),
    "questions": ("turns",),
    "prompt": ("prompt", "instruction", "question", "query", "text"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt", "system_instruction", "systeminstruction"),
    "history": ("history",),
    "completion": ("completion", "output", "answer", "response", "generation", "chosen", "preferred_output"),
}
EXPECTED = (
    f"one of {', '.join(COLUMNS['conversation'] + COLUMNS['questions'] + COLUMNS['prompt'])}, with a completion in one "
    f"of {', '.join(COLUMNS['completion'])} if there is one"
)
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}
ROLE, CONTENT = ("role", "from"), ("content", "value", "parts", "text")
# two fields of an item that is a question and its answer
PAIRS: tuple[tuple[str, str], ...] = (
    *(("input", "output"), ("instruction", "output"), ("human", "assistant"), ("user", "assistant")),
    *(("query", "response"), ("question", "answer")),
)
TOOL_ROLES = {
    **dict.fromkeys(("function_call", "tool_call"), "a tool call"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "the result of a tool"),
}
# columns, and fields of messages, that are refused if they are filled
REFUSED = {
    **dict.fromkeys(("tools", "functions"), "tools"),
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id"), "a tool call"),
    **dict.fromkeys(("image", "images", "image_url"), "an image"),
    **dict.fromkeys(("video", "videos", "video_url"), "a video"),
    **dict.fromkeys(("audio", "audios", "input_audio"), "audio"),
}
NO_TOOLS = ("[]", "{}")  # in a column of JSON text
TEXT_PARTS = ("text", "input_text", "output_text")
HELD_OUT = ("weight", "train", "loss")  # fields of a message that is not trained on if one of them is 0
DESIRED = ("label", "kto_tag")  # columns that are false if the completion is a bad example


class Message(NamedTuple):
    """One message of a conversation."""

    role: Role
    content: str
    label: str  # its column and number there, for errors
    trained: bool = True  # whether it may be a target


@dataclass(frozen=True)
class Conversation:
    """The messages of a row: perhaps one of the system, then user and assistant in turn; the first is the user's.

    A last message of the assistant without text is left out, so a conversation that ends with the user is a prompt
    without a reference completion.
    """

    messages: tuple[Message, ...]
    columns: frozenset[str]  # the columns, and fields of messages, that were read

    def targets(self, train_on: TrainOn) -> list[int]:
        """The positions that a completion is written for: a message of the assistant, or the end.

        Args:
            train_on: `last` is the end if the user has the last word, else the assistant's last message; `all` are all
                messages of the assistant, and the end if the user has the last word.

        Raises:
            ValueError: if no message is to be trained on.
        """
        end = len(self.messages)
        found = [i for i, message in enumerate(self.messages) if message.role == "assistant" and message.trained]
        found += [end] if self.messages[-1].role == "user" else []
        if not found:
            raise ValueError(f"{', '.join(HELD_OUT)}: no message of the assistant is to be trained on; expected one")
        return found if train_on == "all" else found[-1:]


def read_conversation(row: Mapping[str, Any]) -> Conversation:
    """The conversation of a row.

    Raises:
        ValueError: in one line without the row's place, for columns of another format, or messages that are empty, not
            text, or out of turn; and for tools, images, video and audio.
    """
    return _Reader(row).read()


class _Reader:
    def __init__(self, row: Mapping[str, Any]) -> None:
        self.original = row
        flat = _flat(row)
        self.row = {str(name).lower(): value for name, value in flat.items()}
        self.names = {str(name).lower(): str(name) for name in row}
        self.read_columns = set() if flat is row else {"input", "instances"}

    def read(self) -> Conversation:
        for column, value in self.row.items():
            if column in REFUSED and is_filled(value) and value not in NO_TOOLS:
                raise ValueError(f"the column {column} has {REFUSED[column]}; expected text only")
        messages = [*self._system(), *self._history(), *self._body()]
        roles = [message.role for message in messages]
        if roles[:2] == ["system", "system"] and messages[0].content == messages[1].content:
            del messages[0]
        check_turns(messages)
        if messages[-1].role == "assistant" and (not messages[-1].content.strip() or self._is_bad_example()):
            messages.pop()
        columns = frozenset(self.names.get(column, column) for column in self.read_columns)
        return Conversation(tuple(messages), columns)

    def _is_bad_example(self) -> bool:
        found = {column for column in DESIRED if isinstance(self.row.get(column), bool)}
        self.read_columns |= found
        return any(self.row[column] is False for column in found)

    def _part(self, part: str) -> tuple[str, Any] | None:
        """Name and value of the part's column, None if none is filled."""
        for column in COLUMNS[part]:
            if is_filled(self.row.get(column)):
                self.read_columns.add(column)
                return column, self.row[column]
        return None

    def _system(self) -> list[Message]:
        if (found := self._part("system")) is None:
            return []
        column, value = found
        text = _content(column, value if not isinstance(value, Mapping) else [value])
        return [Message("system", text, column)] if text.strip() else []

    def _history(self) -> list[Message]:
        found = self._part("history")
        return [] if found is None else self._messages(*found)

    def _body(self) -> list[Message]:
        """The conversation from its column, or from a prompt and a completion."""
        if conversation := self._part("conversation"):
            messages = self._messages(*conversation)
            return messages + (self._completion() if messages and messages[-1].role == "user" else [])
        completion = self._completion()
        if completion and completion[0].role != "assistant":  # it is the whole conversation
            return completion
        return [*self._prompt(), *completion]

    def _prompt(self) -> list[Message]:
        if questions := self._part("questions"):
            column, value = questions
            if isinstance(value, list) and not isinstance(value[0], Mapping):
                return [Message("user", _text(f"{column} 1", value[0]), column)]
            return self._messages(column, value)
        present = [c for c in COLUMNS["prompt"] if self.row.get(c) is not None]
        found = self._part("prompt") or (None if present else self._part("input"))
        if found is None:
            empty = [c for part in ("conversation", "questions", "prompt") for c in COLUMNS[part] if c in self.row]
            if empty:
                raise ValueError(f"{self.names.get(empty[0], empty[0])} is empty; expected text or messages")
            raise ValueError(f"the columns are {columns_of(self.original)}; expected {EXPECTED}")
        column, value = found[0], _messages_in(found[1])
        if isinstance(value, list):
            return self._messages(column, value)
        text = _text(column, value)
        more = None if column in COLUMNS["input"] else self._part("input")
        return [Message("user", f"{text}\n\n{_text(*more)}" if more else text, column)]

    def _completion(self) -> list[Message]:
        if (found := self._part("completion")) is None:
            return []
        column, value = found[0], _messages_in(found[1])
        if isinstance(value, str):
            return [Message("assistant", value, column)]
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list):
            raise ValueError(f"{column} ({type(value).__name__}); expected text or messages")
        return self._messages(column, value)

    def _messages(self, column: str, value: Any) -> list[Message]:
        value = _list_in(value)
        if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
            value = [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]
        if not isinstance(value, list):
            kind = "text" if isinstance(value, str) else type(value).__name__
            raise ValueError(f"{column} is {kind}; expected a list of messages, in a CSV file as JSON")
        if not value:
            raise ValueError(f"{column} is empty; expected a list of messages")
        messages = [m for i, item in enumerate(value, 1) for m in self._items(column, f"{column} {i}", item)]
        # a system message without text is none
        return [m for m in messages if m.role != "system" or m.content.strip()]

    def _items(self, column: str, label: str, item: Any) -> Iterator[Message]:
        """The messages of an item of a list: one, or a question and its answer."""
        pair = item if isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2 else None
        if isinstance(item, Mapping):
            fields = next((p for p in PAIRS if all(isinstance(item.get(f), str) for f in p)), None)
            pair = None if fields is None or any(f in item for f in ROLE) else [item[f] for f in fields]
            self.read_columns |= {f"{column}.{f}" for f in (fields or ()) if pair}
        if pair is not None:
            yield Message("user", _text(f"{label}, question", pair[0]), label)
            yield Message("assistant", _text(f"{label}, answer", pair[1]), label)
        elif isinstance(item, Mapping):
            yield self._message(column, label, item)
        else:
            kind = "text" if isinstance(item, str) else type(item).__name__
            raise ValueError(f"{label} is {kind}; expected a role and content")

    def _message(self, column: str, label: str, item: Mapping[str, Any]) -> Message:
        role_field = next((f for f in ROLE if item.get(f) is not None), None)
        name = None if role_field is None else item[role_field]
        if not isinstance(name, str):
            raise ValueError(f"{label} has no role; expected {' or '.join(ROLE)}: {', '.join(ROLES)}")
        label = f"{label} ({in_brief(name)})"
        for field, value in item.items():
            if field in REFUSED and is_filled(value):
                raise ValueError(f"{label} has {REFUSED[field]} ({field}); expected text only")
        role = ROLES.get(name.lower())
        if role is None:
            what = TOOL_ROLES.get(name.lower(), "of an unknown role")
            raise ValueError(f"{label} is {what}; expected one of the roles {', '.join(ROLES)}")
        content_field = next((f for f in CONTENT if item.get(f) is not None), None)
        if content_field is None:
            if role == "user":
                raise ValueError(f"{label} has no content; expected a role and content")
            content = ""
        else:
            content = _content(label, item[content_field])
        self.read_columns |= {f"{column}.{f}" for f in (role_field, content_field, *HELD_OUT) if f is not None}
        trained = all(item.get(f) is None or bool(item[f]) for f in HELD_OUT)
        return Message(role, content, label, trained)


def check_turns(messages: Sequence[Message]) -> None:
    """Raise ValueError unless the user begins, the turns alternate, and all but the assistant's last one have text."""
    spoken = [m for m in messages if m.role != "system"]
    if not any(m.role == "user" for m in spoken):
        raise ValueError(f"no message of the user{f' ({messages[0].label} only)' if messages else ''}; expected one")
    for message in messages[1:]:
        if message.role == "system":
            raise ValueError(f"{message.label} is of the system; expected one system message, at the beginning")
    if spoken[0].role != "user":
        raise ValueError(f"{spoken[0].label} is of the assistant; expected the user first")
    for before, message in itertools.pairwise(spoken):
        if before.role == message.role:
            raise ValueError(
                f"{message.label} is the second message of the {message.role} in a row; expected user and assistant "
                "in turn"
            )
    for message in spoken:
        last_of_assistant = message is spoken[-1] and message.role == "assistant"
        if not message.content.strip() and not last_of_assistant:
            raise ValueError(f"{message.label} is empty; expected text")


def unread_columns(row: Mapping[str, Any], read: frozenset[str]) -> list[str]:
    """The filled columns of a row, and the fields of its messages as `column.field`, that were not read."""
    unread = []
    for name, value in row.items():
        if name not in read and is_filled(value) and value not in NO_TOOLS:
            unread.append(str(name))
        elif known := {f.partition(".")[2] for f in read if f.startswith(f"{name}.")}:
            items = [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
            fields = {str(field) for item in items for field, content in item.items() if is_filled(content)}
            unread += sorted(f"{name}.{field}" for field in fields - known)
    return unread


def _flat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the columns of a nested row: OpenAI's preference format, and self-instruct's `instances`."""
    inner, instances = row.get("input"), row.get("instances")
    if isinstance(inner, Mapping) and "messages" in inner:
        return {**{name: value for name, value in row.items() if name != "input"}, **inner}
    if isinstance(instances, list) and instances and isinstance(instances[0], Mapping):
        return {**row, **{name: value for name, value in instances[0].items() if name in ("input", "output")}}
    return row


def _list_in(value: Any) -> Any:
    """A list of messages or pairs that is written as JSON or as Python, as in a CSV file; any other value as it is."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*[\[{]", value):
        return value
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(value)
            if isinstance(found, list) and all(isinstance(item, list | tuple | dict) for item in found):
                return found
    return value


def _messages_in(value: Any) -> Any:
    """The same where text is expected, too: only a list whose items all have a role."""
    found = _list_in(value)
    are_messages = isinstance(found, list) and all(isinstance(m, Mapping) and {*ROLE} & m.keys() for m in found)
    return found if are_messages else value


def _text(label: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{label} ({type(value).__name__}); expected text")
    if not value.strip():
        raise ValueError(f"{label} is empty; expected text")
    return value


def _content(label: str, value: Any) -> str:
    """The text of a content: itself, or that of its parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{label} has content ({type(value).__name__}); expected text or a list of parts")
    return "".join(_part_text(label, part) for part in value)


def _part_text(label: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{label} has a part ({type(part).__name__}); expected text")
    for field, value in part.items():
        if field in REFUSED and is_filled(value):
            raise ValueError(f"{label} has {REFUSED[field]} ({field}); expected text only")
    kind = part.get("type") or "text"
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part.get("parts"), list):  # a content that is a message itself
        return _content(label, part["parts"])
    what = REFUSED.get(str(kind), "a tool call" if "tool" in str(kind) else "a part")
    raise ValueError(f"{label} has {what} (type {in_brief(kind)}); expected text only")
