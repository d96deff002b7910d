"""A completions server on this machine that responds, as vLLM's does, from a token model."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class CompletionsServer:
    """Serves until it is closed.

    Args:
        model: the token model behind it.
        names: the names of the model.
        limit: the most log-probabilities that a request may ask for, vLLM's `--max-logprobs`; -1: all.
        tokenizer: for prompts that are text.
        port: 0 takes a free one.
        context: the most tokens of a request.
    """

    def __init__(
        self, model: Any, names: tuple[str, ...] = ("it",), limit: int = -1, tokenizer: Any = None, port: int = 0,
        context: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.names, self.limit, self.tokenizer, self.context = model, names, limit, tokenizer, context
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []  # statuses of the next responses; 0: the connection is closed
        self.left = -1  # responses until it closes every connection; -1: no limit
        self.legacy = False  # whether to leave out log-probabilities of prompts
        self.favourite: int | None = None  # the next token; the likeliest one if not given
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = [{"id": name, "max_model_len": outer.context} for name in outer.names]
                self.answer(200, {"data": models})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.keys.append(self.headers["Authorization"])
                if outer.failures:
                    status = outer.failures.pop()
                    if status:
                        self.answer(status, {"error": {"message": "not\nnow"}})
                    return
                if outer.left == 0:
                    return
                outer.left -= 1
                self.answer(*outer.complete(request))

            def answer(self, status: int, body: Any) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                if 300 <= status < 400:
                    self.send_header("Location", "/v1/elsewhere")
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def __enter__(self) -> CompletionsServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def complete(self, request: dict[str, Any]) -> tuple[int, Any]:
        if request["model"] not in self.names:
            valid = ", ".join(self.names)
            return refusal(f"The model `{request['model']}` does not exist. Valid aliases: {valid}.", 404)
        for key in ("logprobs", "prompt_logprobs"):
            if self.limit >= 0 and not 0 <= (k := request.get(key, 0)) <= self.limit:
                count = self.model.vocab_size if k < 0 else k
                kind = "sample" if key == "logprobs" else "prompt"
                return refusal(
                    f"Requested {kind} logprobs of {count}, which is greater than max allowed: {self.limit} "
                    f"(parameter={key}, value={count})"
                )
        prompts = request["prompt"]
        if isinstance(prompts, str):
            prompts = self.tokenizer(prompts, add_special_tokens=request["add_special_tokens"])["input_ids"]
        prompts = prompts if prompts and isinstance(prompts[0], list) else [prompts]
        if self.context and max(map(len, prompts)) >= self.context:
            return refusal(f"This model's maximum context length is {self.context} tokens.")
        choices = [{"index": i, **self.choice(request, ids)} for i, ids in enumerate(prompts)]
        return 200, {"choices": choices[::-1]}  # in the order of their indices

    def choice(self, request: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        before = ids[:1] if ids else []
        scores = "prompt_logprobs" in request or request.get("echo")
        prefixes = [ids[:i] for i in range(len(before) if scores else len(ids), len(ids) + 1)]
        log_probs = self.model.fork().start(prefixes).double()  # the last is of the token that follows
        new = int(log_probs[-1].argmax()) if self.favourite is None else self.favourite
        following = {new: float(log_probs[-1, new])} | self.top(log_probs[-1], request["logprobs"])
        tokens = [f"token_id:{i}" for i in [*(ids if request.get("echo") else []), new]]
        likeliest = {f"token_id:{i}": max(x, -9999.0) for i, x in following.items()}
        choice: dict[str, Any] = {"logprobs": {"tokens": tokens, "top_logprobs": [likeliest]}, "prompt_logprobs": None}
        if "prompt_logprobs" in request and not self.legacy:
            k, entries = request["prompt_logprobs"], []
            for token, row in zip(ids[len(before) :], log_probs[:-1], strict=True):
                values = {token: float(row[token])} | self.top(row, k)  # the token at this position comes first
                ranks = {i: int((row > x).sum()) + 1 for i, x in values.items()}
                entries.append({str(i): {"logprob": max(x, -9999.0), "rank": ranks[i]} for i, x in values.items()})
            choice["prompt_logprobs"] = [None] * len(before) + entries
        return choice

    @staticmethod
    def top(row: torch.Tensor, k: int) -> dict[int, float]:
        values, ids = row.topk(len(row) if k < 0 else k)
        return dict(zip(ids.tolist(), values.clamp(min=-9999.0).tolist(), strict=True))


def refusal(message: str, code: int = 400) -> tuple[int, Any]:
    return code, {"error": {"message": message, "code": code}}
