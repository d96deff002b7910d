"""Judges that compare two completions: a model on a server with OpenAI's protocol, or a local language model.

Both read the same request and answer [[A]], [[B]] or [[C]] (a tie), as in MT-bench: Zheng et al. 2023, "Judging
LLM-as-a-judge with MT-bench and chatbot arena" (arXiv 2306.05685). They do not correct for the order in which they see
the completions; `judging` does.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

from distill_env.checks import check_range
from distill_env.models.hub import require

Verdict = Literal["first", "second", "tie"]
VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
MAX_RETRY_WAIT = 120.0  # seconds: the client honours a `retry-after` up to here
MAX_REPLY = 2000  # characters of a reply that are stored, from its end

REQUEST = Path(__file__).with_name("judge_request.txt").read_text().removesuffix("\n")


@dataclass(frozen=True)
class Question:
    """A prompt and two completions, in the order in which the judge reads them."""

    prompt: str
    first: str
    second: str

    @property
    def text(self) -> str:
        return REQUEST.format(prompt=self.prompt, first=self.first, second=self.second)

    @property
    def key(self) -> str:
        """A hash of everything that the judge reads."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


class Reply(NamedTuple):
    """A judge's verdict, None if its text holds none."""

    verdict: Verdict | None
    text: str


OnReply = Callable[[Question, Reply], None]
"""Called with every reply as it arrives. An exception in it ends the judging."""


class Judge(Protocol):
    name: str

    def ask(self, questions: Sequence[Question], on_reply: OnReply) -> None:
        """Ask all questions, in any order.

        Raises:
            ValueError: in one line, if no further question can be answered.
        """


def read_verdict(text: str) -> Verdict | None:
    """The last verdict in a reply, which may quote others before it."""
    letters = re.findall(r"\[\[ *([ABC]|tie) *\]\]", text, re.IGNORECASE)
    return VERDICTS.get(letters[-1].upper(), "tie") if letters else None


@dataclass(frozen=True)
class ServedJudgeConfig:
    """A model behind an endpoint that speaks OpenAI's protocol."""

    model: str
    """Name of the model at the endpoint."""
    base_url: str = ""
    """Address of the endpoint, with the /v1; by default $OPENAI_BASE_URL, or OpenAI's own."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key, which is never written anywhere; '' for a server without keys."""
    timeout: float = 120.0
    """Seconds without an answer after which a request has failed."""
    retries: int = 4
    """Retries of a failed request, with growing pauses."""
    concurrency: int = 4
    """Requests at a time."""
    temperature: float | None = 0.0
    """Sampling temperature; None leaves it to the server, for models that accept no other value."""
    max_tokens: int = 0
    """Maximum number of tokens of a reply; 0 leaves it to the server."""


class ServedJudge:
    """A model behind an OpenAI-compatible endpoint for chat completions.

    Raises:
        ValueError: for a number out of range, an invalid address, a missing API key, or without the package `openai`.
    """

    def __init__(self, config: ServedJudgeConfig) -> None:
        require("openai", f"model: {config.model!r}", "judge")
        check_range(config, "timeout", least=0.001, finite=True)
        check_range(config, "retries", "max_tokens", least=0)
        check_range(config, "concurrency", least=1)
        self.name, self._config = f"api:{config.model}", config
        self._base_url = config.base_url or os.environ.get("OPENAI_BASE_URL", "") or "https://api.openai.com/v1"
        self._server, self._key = _server(self._base_url), _read_key(config.key_variable)
        self._options: dict[str, Any] = {} if config.temperature is None else {"temperature": config.temperature}
        self._options |= {"max_tokens": config.max_tokens} if config.max_tokens else {}

    def ask(self, questions: Sequence[Question], on_reply: OnReply) -> None:
        """See `Judge.ask`."""
        import openai

        config, server = self._config, self._server
        try:
            asyncio.run(self._ask_all(questions, on_reply))
        except (openai.APITimeoutError, TimeoutError):
            problem = f"timeout: no answer from {server} within {config.timeout:g} s, {config.retries} retries"
        except openai.APIConnectionError as error:
            problem = f"base_url: {server} cannot be reached ({self._one_line(str(error.__cause__ or error))})"
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            problem = f"key_variable: {server} refuses the key of {config.key_variable!r}; expected a valid key"
        except openai.APIStatusError as error:
            reason = self._one_line(error.message)
            problem = f"model: {config.model!r} at {server} gives error {error.status_code} ({reason})"
        else:
            return
        raise ValueError(problem)

    async def _ask_all(self, questions: Sequence[Question], on_reply: OnReply) -> None:
        from openai import AsyncOpenAI

        remaining, config = iter(questions), self._config
        options: dict[str, Any] = {"timeout": config.timeout, "max_retries": config.retries}
        async with AsyncOpenAI(api_key=self._key or "none", base_url=self._base_url, **options) as client:

            async def work() -> None:
                for question in remaining:
                    on_reply(question, await self._reply(client, question))

            await asyncio.gather(*(work() for _ in range(config.concurrency)))

    async def _reply(self, client: Any, question: Question) -> Reply:
        """One completion. A request that the server rejects, or a malformed completion, is a reply without a verdict:
        another question may succeed."""
        import openai

        completion: Any = None
        try:
            # The client's timeout restarts with every byte: without this one a slow server could block for ever.
            async with asyncio.timeout((self._config.retries + 1) * (self._config.timeout + MAX_RETRY_WAIT)):
                completion = await client.chat.completions.create(
                    model=self._config.model, messages=[{"role": "user", "content": question.text}], **self._options
                )
            text = str(completion.choices[0].message.content or "")
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Reply(None, f"rejected: {self._one_line(error.message)}")
        except (AttributeError, TypeError, LookupError, ValueError, openai.APIResponseValidationError) as error:
            return Reply(None, f"malformed completion: {self._one_line(str(completion or error))}")
        return Reply(read_verdict(text), self._hide_key(text)[-MAX_REPLY:])

    def _hide_key(self, text: str) -> str:
        return text.replace(self._key, "[the key]") if self._key else text

    def _one_line(self, text: str) -> str:
        """A server's message, short and without the key, which it may repeat."""
        return " ".join(self._hide_key(text).split())[:200]


def _server(base_url: str) -> str:
    """Scheme, host and port of an address: the rest may hold a password."""
    try:
        parts = urlsplit(base_url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        parts, port = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("base_url: not an address; expected one such as http://localhost:8000/v1")
    return f"{parts.scheme}://{parts.hostname}{port}"


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if variable and not key:
        raise ValueError(f"key_variable: ${variable} is not set; expected a variable with the API key, or ''")
    if not (key.isascii() and key.isprintable()):  # the client's error would show the key
        raise ValueError(f"key_variable: ${variable} holds no valid key; expected printable ASCII")
    return key


@dataclass(frozen=True)
class LocalJudgeConfig:
    """A causal language model on this machine."""

    model: str
    """Folder or hub id of the model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of its weights."""
    device: str = "cpu"
    """Device that it runs on."""


class LocalJudge:
    """A causal language model whose verdict is the likeliest of the three; it writes no explanation first.

    After the request, in the tokenizer's chat template if it has one, the log-probabilities of `[[A]]`, `[[B]]` and
    `[[C]]` are compared. A model that has to reason before it decides is better served as a `ServedJudge`.

    Raises:
        ValueError, OSError: if the model cannot be loaded.
    """

    def __init__(self, config: LocalJudgeConfig) -> None:
        from distill_env.models.hub import load_tokenizer
        from distill_env.models.load import load_model

        self.name = f"local:{config.model}"
        self._tokenizer = load_tokenizer(config.model)
        self._model = load_model(config.model, dtype=config.dtype, device=config.device)
        self._verdicts = {verdict: self._encode(f"[[{letter}]]") for letter, verdict in VERDICTS.items()}

    def _encode(self, text: str, special: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def ask(self, questions: Sequence[Question], on_reply: OnReply) -> None:
        """See `Judge.ask`."""
        for question in questions:
            on_reply(question, self._reply(question))

    def _reply(self, question: Question) -> Reply:
        if self._tokenizer.chat_template:
            turn = [{"role": "user", "content": question.text}]
            ids = self._encode(self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        else:
            ids = self._encode(f"{question.text}\n\n[The verdict]\n", special=True)
        needed, limit = len(ids) + max(map(len, self._verdicts.values())), getattr(self._model, "max_length", None)
        if limit is not None and needed > limit:
            return Reply(None, f"too long: {needed} tokens; the judge reads {limit}")
        log_probs = self.log_probs(ids)
        text = ", ".join(f"{verdict} {value:.3f}" for verdict, value in log_probs.items())
        likeliest = max(log_probs, key=log_probs.__getitem__)
        return Reply(likeliest, f"log p: {text}")

    def log_probs(self, ids: Sequence[int]) -> dict[Verdict, float]:
        """log p of each verdict's tokens after these ids, nats; the ids are read once."""
        import torch

        first = self._model.start([ids])  # [1, V]
        result: dict[Verdict, float] = {}
        for verdict, tokens in self._verdicts.items():
            rows = torch.cat([first, self._model.extend(torch.tensor([tokens[:-1]], dtype=torch.long))[0]])  # [K, V]
            result[verdict] = float(rows[torch.arange(len(tokens)), torch.tensor(tokens)].double().sum())
            self._model.rewind([0])
        return result
