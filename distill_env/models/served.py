"""A teacher behind a completions server with OpenAI's protocol that gives prompt log-probabilities, as vLLM does."""

from __future__ import annotations

import copy
import json
import os
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from distill_env.divergence import from_top_k
from distill_env.models.base import ServerLostError
from distill_env.models.hub import load_tokenizer, require

KEY_VARIABLE = "DISTILL_TEACHER_KEY"
REQUEST_SECONDS = 120.0  # timeout of one request, which is then sent again
LONGEST_WAIT = 30.0  # seconds between two attempts
CACHE_BLOCK = 16  # tokens: vLLM's prefix cache holds whole blocks of a row
RETRIED = (408, 425, 429, 500, 502, 503, 504)  # status codes after which a request is sent again
PROBE = "The 3 cats cost €7.50,\n\tdef f(x): return x**2  # naïve 東京"


class ServedModel:
    """A `TokenModel` behind a server. A block of tokens is one request per row; rows are requested in parallel.

    A request holds the ids of a row and asks for the `logprobs` of one more token. For a short block of several tokens
    it is a list of such prompts, one for each prefix in the block, which vLLM reads from its prefix cache. Where this
    is dearer than reading the row anew (see `cheaper_from_cache`), the request asks for the `prompt_logprobs` of the
    row: vLLM computes these without its cache, and returns them for every position.

    ## What the truncated support changes
    The server returns the log-probabilities of its `top_k` likeliest ids, S. The other ids, T, share the remaining mass
    equally: `start` and `extend` return distributions p^ over all ids that are exact on S and in the mass of T. With p
    the teacher's distribution, q the student's, p_T and q_T their masses of T:

    | | |
    | --- | --- |
    | divergences, gates on D_t, forward KL or entropy, with a `top_k` from 1 to the server's | exact values of the
      truncated quantity, in which T is one bucket; a lower bound of the full one. D_t is larger by at most
      `divergence.truncation_gap`, q_T (log p_T - log of the least p in T), which the server does not return |
    | a gate on the Jensen-Shannon divergence | the upper bound in which the models share no id of T; larger by at most
      (p_T + q_T) / 2 log 2, at most 0.693 in all |
    | the same without `top_k` | refused by the rollout |
    | a rank, losses that weigh each id (todi, akl), importance weights | refused, as with any `top_k` |
    | `D_t` of `info["teacher_log_probs"]`, as in evaluations | KL(q || p^): off by at most
      q_T max(log |T|, log p_T - log of the least p in T) |
    | reward of a student's token in T | log p^ = log(p_T / |T|); so the sampled estimator and what follows (`gamma`)
      are of KL(q || p^) |
    | rewrite `argmax` | exact |
    | rewrite `nucleus` | exact where S holds the nucleus, else all of S |
    | rewrite `sample` | from p on S, renormalised, with the environment's keyed uniform: p_T from the teacher's draw in
      total variation |
    | the certificate | each rewrite by `sample` adds -log(1 - p_T), and D_t is the truncated one: no longer a bound |

    The mass of T is one minus that of S, so it holds the server's rounding error: vLLM's, in float32 with V = 49,152,
    was up to 3e-5, and less than 1e-6 where T had under 1e-5. It moves D_t by q_T times the change of log p_T. A mass
    under `divergence.LEAST_TAIL` counts as that, which makes D_t smaller.

    The server adds the token at a position to the likeliest ones if it is not among them. It is left out here, since
    D_t has to be a function of the state alone. With top_k=0 the server returns all ids, and nothing is truncated.

    Args:
        url: of the server, ending in /v1. Its key, if it needs one, is read from $DISTILL_TEACHER_KEY.
        vocab_size: V; higher ids of the server (padding of its head) count as T.
        eos_token_id: the end token.
        absent_ids: ids below `vocab_size` that do not exist, as of a tokenizer with holes; their probability is 0.
        model: its name on the server; may be empty if the server has one model only.
        top_k: number of likeliest ids that are requested, at most vLLM's `--max-logprobs`, 20 by default. 0: all.
        tokenizer: folder or hub id; the server has to map a text to the same ids.
        patience: seconds without a response after which `ServerLostError` is raised.
        first_wait: seconds before the second attempt; each further wait is twice as long, up to `LONGEST_WAIT`.
        concurrency: the most requests at a time.
        warn: called with a line when the server stops responding, once for all forks.

    Raises:
        ValueError: in one line, for a server with another model, tokenizer, context or protocol.
    """

    def __init__(
        self,
        url: str,
        *,
        vocab_size: int,
        eos_token_id: int,
        absent_ids: Sequence[int] = (),
        model: str = "",
        top_k: int = 20,
        tokenizer: str = "",
        patience: float = 600.0,
        first_wait: float = 0.5,
        concurrency: int = 64,
        warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        if top_k < 0 or not patience > 0:
            raise ValueError(f"top_k, patience: {top_k}, {patience}; expected at least 0, and above 0")
        self.url, self.vocab_size, self.eos_token_id = url.rstrip("/"), vocab_size, eos_token_id
        self.absent_ids = tuple(absent_ids)
        self._absent = frozenset(absent_ids)
        self.top_k = top_k if top_k < vocab_size else 0  # 0: complete
        self._patience, self._first_wait, self._warn = patience, first_wait, warn
        self._client = _client(self.url)
        self._warned = threading.Lock()  # held from a warning to the next response; shared by forks
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="teacher")
        self._clear(0)
        try:
            self._choose_model(model)
            if tokenizer:
                self._check_tokenizer(tokenizer)
        except (ValueError, OSError):
            self.close()
            raise

    def _choose_model(self, name: str) -> None:
        served = {m["id"]: m for m in self._send(lambda: self._client.get("/models", cast_to=str), "data")}
        if name not in served and (name or len(served) != 1):
            raise ValueError(f"model: {name!r}; expected at {self.url}: {', '.join(served)}")
        self.model = name or next(iter(served))
        context = served[self.model].get("max_model_len")
        self.max_length = context - 1 if context else None  # a request asks for one more token

    def _check_tokenizer(self, name: str) -> None:
        expected = load_tokenizer(name)(PROBE, add_special_tokens=False)["input_ids"]
        (choice,) = self._complete({"prompt": PROBE, "add_special_tokens": False, "echo": True, "logprobs": 1})
        ids = [_token_id(token) for token in choice["logprobs"]["tokens"]]
        if ids[:-1] != list(expected):  # the last one is new
            raise ValueError(
                f"tokenizer: {name!r} and the server at {self.url} map a text to different ids; expected the tokenizer "
                "of the server's model"
            )

    def close(self) -> None:
        """Close the connections and end the threads of all forks."""
        self._pool.shutdown()
        self._client.close()

    def fork(self) -> ServedModel:
        """The same server with a batch of its own, still empty."""
        twin = copy.copy(self)
        twin._clear(0)
        return twin

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """None: the weights are on the server."""
        return iter(())

    def _clear(self, n: int) -> None:
        self._tokens: list[list[int] | None] = [None] * n  # of each row, prompt included; None: given up
        self._prompts = [0] * n

    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        """See `TokenModel.start`."""
        started = [list(map(int, p)) for p in prompts]
        log_probs = self._in_parallel(started, [1] * len(started))
        if rows is None:
            self._clear(len(started))
        for row, tokens in zip(range(len(started)) if rows is None else rows, started, strict=True):
            self._tokens[row], self._prompts[row] = tokens, len(tokens)
        return torch.cat(log_probs) if log_probs else torch.zeros(0, self.vocab_size)

    def extend(self, tokens: Tensor) -> Tensor:
        """See `TokenModel.extend`."""
        blocks = {i: block for i, row in enumerate(tokens.tolist()) if (block := [t for t in row if t >= 0])}
        longer = {}
        for i, block in blocks.items():
            before = self._tokens[i]
            if before is None:
                raise ValueError(f"tokens: row {i} is not started; expected -1 only")
            longer[i] = before + block
        log_probs = self._in_parallel(list(longer.values()), list(map(len, blocks.values())))
        out = torch.zeros(*tokens.shape, self.vocab_size)
        for (i, row), values in zip(longer.items(), log_probs, strict=True):
            out[i, : len(values)] = values
            self._tokens[i] = row
        return out

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        """See `TokenModel.rewind`."""
        for i, length in enumerate(torch.as_tensor(lengths).tolist()):
            row = self._tokens[i]
            self._tokens[i] = None if length < 0 or row is None else row[: self._prompts[i] + length]

    def _in_parallel(self, rows: Sequence[list[int]], counts: Sequence[int]) -> list[Tensor]:
        """`_log_probs` of many rows. When one fails, or a signal arrives, the others stop waiting."""
        halt = threading.Event()
        try:
            return list(self._pool.map(lambda row, count: self._log_probs(row, count, halt), rows, counts))
        except BaseException:
            halt.set()
            raise

    def _log_probs(self, tokens: list[int], count: int, halt: threading.Event) -> Tensor:
        """log p after each of the last `count` of these tokens, [count, V]."""
        k = self.top_k or -1
        from_cache = cheaper_from_cache(len(tokens), count)
        request: dict[str, Any] = {"prompt": tokens, "logprobs": k}
        if from_cache:
            request["prompt"] = [tokens[: len(tokens) - i] for i in reversed(range(count))]
        elif count > 1:
            request["prompt_logprobs"] = k
        choices = self._complete(request, halt)
        try:
            states = []
            if count > 1 and not from_cache:
                for i in range(len(tokens) - count + 1, len(tokens)):
                    entries = {int(j): float(e["logprob"]) for j, e in choices[0]["prompt_logprobs"][i].items()}
                    states.append(self._distribution(entries, tokens[i]))
            for choice in sorted(choices, key=lambda it: it["index"]):
                entries, new = choice["logprobs"]["top_logprobs"][0], choice["logprobs"]["tokens"][0]
                states.append(self._distribution({_token_id(j): x for j, x in entries.items()}, _token_id(new)))
            if len(states) != count:
                raise ValueError
        except (KeyError, TypeError, IndexError, ValueError, AttributeError):
            raise ValueError(
                f"teacher: {self.url} gives no log-probabilities of prompts by token id; expected a completions server "
                "such as vLLM's, with prompt_logprobs and return_tokens_as_token_ids"
            ) from None
        return torch.stack(states)

    def _distribution(self, entries: dict[int, float], token: int) -> Tensor:
        """From the likeliest ids, without the token at this position if the server has added it to them."""
        if self.top_k and len(entries) > self.top_k:
            del entries[token]
        known = {i: x for i, x in entries.items() if i < self.vocab_size and i not in self._absent}
        values = torch.tensor(list(known.values()), dtype=torch.float64)
        return from_top_k(torch.tensor(list(known)), values, self.vocab_size, self.absent_ids).float()

    def _complete(self, request: dict[str, Any], halt: threading.Event | None = None) -> Any:
        """The choices of one request."""
        fixed = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "return_tokens_as_token_ids": True}
        body = {"model": self.model, **fixed, **request}
        return self._send(lambda: self._client.post("/completions", body=body, cast_to=str), "choices", halt)

    def _send(self, request: Callable[[], str], field: str, halt: threading.Event | None = None) -> Any:
        """Send a request until the server responds or patience ends, and return this field of the response.

        Raises:
            ServerLostError: if the server does not respond.
            ValueError: if it refuses the request.
        """
        import openai

        halt = halt or threading.Event()
        begin, wait = time.monotonic(), self._first_wait
        while True:
            try:
                response = json.loads(request())[field]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f"teacher: no {field!r} from {self.url}; expected a completions server with /v1"
                ) from None
            except openai.APIStatusError as error:
                reason = f"{error.status_code}: {_message(error)}"
                if error.status_code not in RETRIED:
                    raise ValueError(f"teacher: {self.url} refuses a request ({reason})") from None
            except openai.APIConnectionError as error:
                cause = _first_cause(error)
                reason = f"{type(cause).__name__}: {cause}".rstrip(": ")
                if isinstance(cause, ssl.SSLCertVerificationError):
                    raise ValueError(f"teacher: {self.url} has no valid certificate ({cause.verify_message})") from None
            else:
                with suppress(RuntimeError):  # it was not held
                    self._warned.release()
                return response
            left = self._patience - (time.monotonic() - begin)
            if left <= 0 or halt.is_set():
                raise ServerLostError(f"teacher: no response from {self.url} for {self._patience:g} s ({reason})")
            if self._warned.acquire(blocking=False):  # one of all waiting requests
                self._warn(f"teacher: no response from {self.url} ({reason}); waiting for at most {left:.0f} s")
            halt.wait(min(wait, left))
            wait = min(2 * wait, LONGEST_WAIT)


def _client(url: str) -> Any:
    """OpenAI's client for this server. It follows no redirect, so that the key goes nowhere else."""
    require("openai", f"url: {url!r}", "served")
    import openai

    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"url: {url!r} is not an address; expected http://host:port/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError(f"url: it holds a key; expected http://host:port/v1, and the key in ${KEY_VARIABLE}")
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):  # the client's error would show it
        raise ValueError(f"${KEY_VARIABLE}: not a key; expected printable ASCII")
    http_client = openai.DefaultHttpxClient(follow_redirects=False)
    return openai.OpenAI(
        base_url=url, api_key=key or "EMPTY", timeout=REQUEST_SECONDS, max_retries=0, http_client=http_client
    )


def cheaper_from_cache(length: int, count: int) -> bool:
    """Whether a server computes less for `count` prefixes of a row from its prefix cache than for the row anew.

    It computes each prefix from its last full cache block on, half a block and half of `count` tokens on average.
    """
    return count > 1 and count * (CACHE_BLOCK + count) / 2 < length


def _token_id(token: str) -> int:
    """`token_id:17` -> 17. Raises ValueError for anything else."""
    kind, _, number = token.partition(":")
    if kind != "token_id":
        raise ValueError(token)
    return int(number)


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error


def _message(error: Any) -> str:
    """A server's reason in one line of at most 200 characters."""
    text = error.body["message"] if isinstance(error.body, dict) and "message" in error.body else error.message
    return " ".join(str(text).split())[:200]
