"""A teacher behind an OpenAI-compatible completions server that gives prompt log-probabilities, as vLLM's does."""

from __future__ import annotations

import copy
import http.client
import json
import os
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from distill_env.divergence import from_top_k
from distill_env.models.base import ServerLostError
from distill_env.models.hub import load_tokenizer

KEY_VARIABLE = "DISTILL_TEACHER_KEY"
REQUEST_SECONDS = 120.0  # of one request, after which it is sent again
LONGEST_WAIT = 30.0  # seconds between two attempts
CACHE_BLOCK = 16  # tokens by which vLLM's prefix cache keeps a row; what is over is read anew
AGAIN = (408, 425, 429, 500, 502, 503, 504)
PROBE = "The 3 cats cost €7.50,\n\tdef f(x): return x**2  # naïve 東京"


class ServedModel:
    """A `TokenModel` that asks a server. A block of tokens is one request a row, all rows at a time.

    A request carries a row's ids and asks for the `logprobs` of one token more. For a short block of several tokens it
    is a list of such prompts, one for each beginning of the block, which vLLM reads from its prefix cache. Where this
    is dearer than to read the row anew (`cheaper_from_cache`), it asks for the `prompt_logprobs` of the row: vLLM uses
    no cache for these, and tells them of every position.

    ## What a truncated support changes
    The server tells the log-probabilities of its `top_k` likeliest ids S. The others, T, share what is left equally:
    the answers are distributions p^ over all ids, exact on S and in the mass of T. With p the teacher's distribution,
    q the student's, q_T and p_T their masses of T:

    | | |
    | --- | --- |
    | divergences, gates on D_t, forward KL or entropy, taken with `top_k` in 1 to the server's | exact values of the
      truncated quantity, T one bucket; a lower bound of the full one. D_t is more by at most
      `divergence.truncation_gap`, q_T (log p_T - log of the least p in T), which the server does not tell |
    | the same without `top_k` | refused by the rollout |
    | a rank, losses that weigh each id (todi, akl), importance weights | refused, as with any `top_k` |
    | `D_t` of `info["teacher_log_probs"]`, as evaluations take it | KL(q || p^): off by at most
      q_T max(log |T|, log p_T - log of the least p in T) |
    | reward of an own token in T | log p^ = log(p_T / |T|); so the sampled estimator and what follows (`gamma`) are of
      KL(q || p^) |
    | rewrite `argmax` | exact |
    | rewrite `nucleus` | exact where S holds the nucleus, else all of S |
    | rewrite `sample` | from p on S, renormalised, with the environment's keyed uniform: at a distance of p_T from the
      teacher's draw (total variation) |
    | the certificate | each rewrite by `sample` adds -log(1 - p_T), and D_t is the truncated one: a bound no more |

    The mass of T is one less that of S, so what the server rounds is all in it: vLLM's, in float32 with V = 49,152, was
    off by up to 3e-5, and by less than 1e-6 where T had under 1e-5. That moves D_t by q_T times the change of log p_T.
    Under `divergence.LEAST_TAIL` it counts as that, and D_t as less than it is.

    A token outside of S that stands in the row or follows it comes with its log-probability, too; it is left out, since
    D_t has to be a function of the state alone. With top_k=0 the server is asked for all ids, and nothing is truncated.

    Args:
        url: of the server, ending in /v1. The key, if it wants one, is $DISTILL_TEACHER_KEY.
        vocab_size: V; what the server says of higher ids (padding of its head) counts as T.
        eos_token_id: the end token.
        model: its name on the server; may be empty if the server has one model only.
        top_k: likeliest ids that are asked for; the server's limit is vLLM's `--max-logprobs`, 20 by default. 0: all.
        tokenizer: folder or hub id; the server has to map a text to the same ids.
        patience: seconds that a server may be away before `ServerLostError` is raised.
        first_wait: seconds before the second attempt; every further one waits twice as long, at most `LONGEST_WAIT`.
        concurrency: requests at a time.
        tell: is told once when the server is away, in a line.

    Raises:
        ValueError: in one line, for a server with another model, tokenizer, context or protocol.
    """

    def __init__(
        self,
        url: str,
        *,
        vocab_size: int,
        eos_token_id: int,
        model: str = "",
        top_k: int = 20,
        tokenizer: str = "",
        patience: float = 600.0,
        first_wait: float = 0.5,
        concurrency: int = 64,
        tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError(f"teacher: a URL with a key in it; accepted: http://host:port/v1 and ${KEY_VARIABLE}")
        try:
            host, port = parts.hostname or "", parts.port
        except ValueError:
            host = ""
        if not host:
            raise ValueError(f"teacher: {url!r} is no URL; accepted: http://host:port/v1")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect = partial(kind, host, port, timeout=REQUEST_SECONDS)
        self._folder = parts.path.rstrip("/")
        if top_k < 0 or not patience > 0:
            raise ValueError(f"teacher_top_k, teacher_timeout: {top_k}, {patience}; accepted: 0 or more, and above 0")
        self.url, self.vocab_size, self.eos_token_id = url.rstrip("/"), vocab_size, eos_token_id
        self.top_k = top_k if top_k < vocab_size else 0  # 0: complete
        self._patience, self._first_wait, self._tell = patience, first_wait, tell
        key = os.environ.get(KEY_VARIABLE)
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._news = _News()
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
        served = {m["id"]: m for m in self._ask("GET", "/models")["data"]}
        if name not in served and (name or len(served) != 1):
            raise ValueError(f"teacher_model: {name!r}; accepted at {self.url}: {', '.join(served)}")
        self.model = name or next(iter(served))
        context = served[self.model].get("max_model_len")
        self.max_length = context - 1 if context else None  # a request asks for a token more

    def _check_tokenizer(self, name: str) -> None:
        expected = load_tokenizer(name)(PROBE, add_special_tokens=False)["input_ids"]
        request = {"prompt": PROBE, "add_special_tokens": False, "echo": True, "logprobs": 1}
        answer = self._complete(request)[0]
        found = [_token_id(token) for token in answer["logprobs"]["tokens"]]
        if found[:-1] != list(expected):  # the last one is new
            raise ValueError(
                f"teacher_tokenizer: {name!r} maps a text to other ids than the server at {self.url} does; accepted: "
                "the tokenizer of the model that it serves"
            )

    def close(self) -> None:
        """End the threads, of all forks."""
        self._pool.shutdown()

    def fork(self) -> ServedModel:
        """The same server with a batch of its own, still empty."""
        twin = copy.copy(self)
        twin._clear(0)
        return twin

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return iter(())

    # ------------------------------------------------------------------ the three verbs

    def _clear(self, n: int) -> None:
        self._tokens: list[list[int] | None] = [None] * n  # of each row, prompt included; None: given up
        self._prompts = [0] * n

    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        """See `TokenModel.start`."""
        begun = [list(map(int, p)) for p in prompts]
        answers = self._at_once(begun, [1] * len(begun))
        if rows is None:
            self._clear(len(begun))
        for row, tokens in zip(range(len(begun)) if rows is None else rows, begun, strict=True):
            self._tokens[row], self._prompts[row] = tokens, len(tokens)
        return torch.cat(answers) if answers else torch.zeros(0, self.vocab_size)

    def extend(self, tokens: Tensor) -> Tensor:
        """See `TokenModel.extend`."""
        blocks = [[t for t in row if t >= 0] for row in tokens.tolist()]
        busy = [i for i, block in enumerate(blocks) if block]
        longer = []
        for i in busy:
            before = self._tokens[i]
            if before is None:
                raise ValueError(f"tokens: row {i} is not started; start it before extending it")
            longer.append(before + blocks[i])
        answers = self._at_once(longer, [len(blocks[i]) for i in busy])
        out = torch.zeros(*tokens.shape, self.vocab_size)
        for i, row, answer in zip(busy, longer, answers, strict=True):
            out[i, : len(answer)] = answer
            self._tokens[i] = row
        return out

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        """See `TokenModel.rewind`."""
        for i, length in enumerate(torch.as_tensor(lengths).tolist()):
            row = self._tokens[i]
            self._tokens[i] = None if length < 0 or row is None else row[: self._prompts[i] + length]

    def _at_once(self, rows: Sequence[list[int]], counts: Sequence[int]) -> list[Tensor]:
        """`_after` of many rows. Where one fails, or a signal comes, the others wait no longer."""
        halt = threading.Event()
        try:
            return list(self._pool.map(lambda row, count: self._after(row, count, halt), rows, counts))
        except BaseException:
            halt.set()
            raise

    def _after(self, tokens: list[int], count: int, halt: threading.Event) -> Tensor:
        """log p after each of the last `count` of these tokens, [count, V]."""
        k = self.top_k or -1
        listed = cheaper_from_cache(len(tokens), count)
        request: dict[str, Any] = {"prompt": tokens, "logprobs": k}
        if listed:
            request["prompt"] = [tokens[: len(tokens) - i] for i in reversed(range(count))]
        elif count > 1:
            request["prompt_logprobs"] = k
        choices = self._complete(request, halt)
        try:
            found = []
            for choice in sorted(choices, key=lambda it: it["index"]):
                told, new = choice["logprobs"]["top_logprobs"][0], choice["logprobs"]["tokens"][0]
                found.append(self._likeliest({_token_id(j): x for j, x in told.items()}, _token_id(new)))
            if count > 1 and not listed:
                at = range(len(tokens) - count + 1, len(tokens))
                entries = [
                    {int(j): float(e["logprob"]) for j, e in choices[0]["prompt_logprobs"][i].items()} for i in at
                ]
                found = [self._likeliest(e, tokens[i]) for e, i in zip(entries, at, strict=True)] + found
            if len(found) != count:
                raise ValueError
        except (KeyError, TypeError, IndexError, ValueError, AttributeError):
            raise ValueError(
                f"teacher: {self.url} gives no log-probabilities of prompts by token id; accepted: a completions "
                "server as vLLM's, with prompt_logprobs and return_tokens_as_token_ids"
            ) from None
        return torch.stack([self._distribution(f) for f in found])

    def _likeliest(self, found: dict[int, float], token: int) -> dict[int, float]:
        """Without the token that stands there, which a server adds to the likeliest if it is not among them."""
        if self.top_k and len(found) > self.top_k:
            del found[token]
        return found

    def _distribution(self, found: Mapping[int, float]) -> Tensor:
        known = {i: x for i, x in found.items() if i < self.vocab_size}
        ids = torch.tensor(list(known))
        return from_top_k(ids, torch.tensor(list(known.values()), dtype=torch.float64), self.vocab_size).float()

    # ------------------------------------------------------------------ asking

    def _complete(self, request: dict[str, Any], halt: threading.Event | None = None) -> Any:
        fixed = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "return_tokens_as_token_ids": True}
        answer = self._ask("POST", "/completions", {"model": self.model, **fixed, **request}, halt)
        return answer["choices"]

    def _ask(self, verb: str, path: str, body: Any = None, halt: threading.Event | None = None) -> Any:
        """Ask until there is an answer or patience ends.

        Raises:
            ServerLostError: if there is none.
            ValueError: if the server refuses.
        """
        halt = halt or threading.Event()
        began, wait = time.monotonic(), self._first_wait
        while True:
            try:
                status, content = self._exchange(verb, path, body)
                if status == 200:
                    self._news.told = False
                    return json.loads(content)
                reason = f"{status}: {_message(content)}"
                if status not in AGAIN:
                    raise ValueError(f"teacher: {self.url} refuses ({reason})")
            except json.JSONDecodeError:
                raise ValueError(f"teacher: {self.url} does not answer in JSON; accepted: its URL with /v1") from None
            except ssl.SSLCertVerificationError as error:
                raise ValueError(f"teacher: {self.url} cannot be trusted ({error.verify_message})") from None
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            left = self._patience - (time.monotonic() - began)
            if left <= 0 or halt.is_set():
                raise ServerLostError(
                    f"teacher: no answer from {self.url} for {self._patience:g} s ({reason}); start it again, then the "
                    "run with --resume"
                )
            with self._news.lock:  # of all requests that wait, one tells
                if not self._news.told:
                    self._news.told = True
                    self._tell(f"teacher: no answer from {self.url} ({reason}); waiting for at most {left:.0f} s")
            halt.wait(min(wait, left))
            wait = min(2 * wait, LONGEST_WAIT)

    def _exchange(self, verb: str, path: str, body: Any) -> tuple[int, bytes]:
        """Status and content. No redirection is followed, so that the key goes nowhere else."""
        connection = self._connect()
        try:
            content = None if body is None else json.dumps(body)
            connection.request(verb, self._folder + path, content, self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


class _News:
    """Whether it was told that the server is away; shared by forks."""

    def __init__(self) -> None:
        self.lock, self.told = threading.Lock(), False


def cheaper_from_cache(length: int, count: int) -> bool:
    """Whether a server computes less for `count` beginnings of a row from its prefix cache than for the row anew.

    Beyond the last full cache block it computes each of them, which is half a block and half of `count` on average.
    """
    return count > 1 and count * (CACHE_BLOCK + count) / 2 < length


def _token_id(token: str) -> int:
    """`token_id:17` -> 17. Raises ValueError for anything else."""
    kind, _, number = token.partition(":")
    if kind != "token_id":
        raise ValueError(token)
    return int(number)


def _message(content: bytes) -> str:
    """What a server says is wrong, in a line of at most 200 characters."""
    try:
        said = json.loads(content)
        said = said.get("error", said)
        text = str(said["message"] if isinstance(said, dict) and "message" in said else said)
    except (ValueError, AttributeError):
        text = content.decode("utf-8", "replace")
    return " ".join(text.split())[:200]
