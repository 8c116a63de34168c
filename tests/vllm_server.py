"""A stand-in for ``vllm serve``: its HTTP API over loopback, a real tiny model behind it.

Written after the schemas and the sampler of vLLM 0.33 (``CompletionRequest``, ``SamplingParams``). It samples
in the plainest way - no cache, one row at a time, the nucleus by sorting - and so is an oracle for the local
loop, too. What vLLM would only log and ignore, an unknown field, is an error here, unless ``ignores`` has it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Json = dict[str, Any]


def number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high


def whole(low: int, high: int = 2**63 - 1) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def ids(value: Any) -> bool:
    return isinstance(value, list) and all(whole(0)(i) for i in value)


def text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def flag(value: Any) -> bool:
    return isinstance(value, bool)


# The sampling parameters, which the HTTP API and SamplingParams share, and what vLLM takes for them.
SAMPLING: dict[str, Callable[[Any], bool]] = {
    "n": whole(1, 16384),
    "seed": whole(-(2**63)),
    "temperature": number(0, 2),
    "top_p": lambda v: number(0, 1)(v) and v > 0,
    "top_k": whole(-1),
    "min_p": number(0, 1),
    "repetition_penalty": lambda v: number(0, 1e9)(v) and v > 0,
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "min_tokens": whole(0),
    "max_tokens": whole(1),
    "stop_token_ids": ids,
    "ignore_eos": flag,
    "bad_words": lambda v: isinstance(v, list) and all(map(text, v)) and len(v) <= 128,
}
COMPLETION = SAMPLING | {
    "model": text,
    "prompt": lambda v: ids(v) and bool(v),
    "return_token_ids": flag,
    "cache_salt": lambda v: text(v) and len(v) <= 128 and not set(v) & set("@/\\\0"),
    "logit_bias": lambda v: all(k.isdecimal() for k in v) and all(map(number(-100, 100), v.values())),
}
TOKENIZE = {"model": text, "prompt": text, "add_special_tokens": flag}


class Refused(Exception):
    """An HTTP error with vLLM's body."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def check(body: Json, schema: dict[str, Callable[[Any], bool]]) -> None:
    for name, value in body.items():
        if name not in schema:
            raise Refused(400, f"unknown field {name}")
        if not schema[name](value):
            raise Refused(400, f"{name} = {str(value)[:60]}")


class Vllm:
    """The engine: a model from a folder, and vLLM's way of sampling."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prefix_cache: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.lock = threading.Lock()
        self.load(folder)

    def load(self, weights: Path) -> None:
        """As vLLM's worker does: the prefix cache stays as it is."""
        with self.lock:
            self.model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, prompt: list[int], salt: str, drawn: list[int]) -> torch.Tensor:
        key = (salt, tuple(prompt))
        if drawn or key not in self.prefix_cache:
            found = self.model(torch.tensor([prompt + drawn]), use_cache=False).logits[0, -1].float()
            if drawn:
                return found
            self.prefix_cache[key] = found
        return self.prefix_cache[key].clone()

    def complete(self, prompt: list[int], wanted: Json, index: int, salt: str = "") -> Json:
        size = self.model.config.vocab_size
        if max(prompt) >= size or max(wanted["stop_token_ids"], default=0) >= size:
            raise Refused(400, f"a token id is out of vocabulary, {size}")
        if wanted["temperature"] == 0 and wanted["n"] > 1:
            raise Refused(400, "n must be 1 when using greedy sampling")
        if wanted["min_tokens"] > wanted["max_tokens"]:
            raise Refused(400, "min_tokens must be at most max_tokens")
        assert wanted["ignore_eos"] and wanted["top_k"] in (0, -1) and wanted["min_p"] == 0.0
        bad = [self.tokenizer.encode(word, add_special_tokens=False) for word in wanted.get("bad_words", ())]
        generator = torch.Generator().manual_seed(wanted["seed"] + index)
        drawn: list[int] = []
        reason, stop = "length", None
        while len(drawn) < wanted["max_tokens"]:
            scores = self.logits(prompt, salt, drawn)
            for i, bias in wanted.get("logit_bias", {}).items():
                scores[int(i)] += bias
            if len(drawn) < wanted["min_tokens"]:
                scores[wanted["stop_token_ids"]] = -torch.inf
            for word in bad:
                if word[:-1] == drawn[len(drawn) - len(word) + 1 :][: len(word) - 1]:
                    scores[word[-1]] = -torch.inf
            if wanted["temperature"] == 0:
                token = int(scores.argmax())
            else:
                probs, order = (scores / wanted["temperature"]).softmax(-1).sort()
                probs[probs.cumsum(-1) <= 1 - wanted["top_p"]] = 0
                token = int(order[torch.multinomial(probs, 1, generator=generator)])
            drawn.append(token)
            if token in wanted["stop_token_ids"]:
                reason, stop = "stop", token
                break
        return {"token_ids": drawn, "finish_reason": reason, "stop_reason": stop}


class VllmServer:
    """``vllm serve FOLDER`` on a port of its own, until ``close``.

    Attributes:
        faults: what befalls the next requests for completions, one each: an HTTP status, "reset", "hang",
            "cut", "abort", "text", "no ids", "no places", "restart" (the process is replaced by a new one).
        retry_after: seconds that a client is asked to wait after an HTTP error.
        asked: the bodies of all requests for completions.
        reloads: how often it was given weights.
        sees: whether it finds the folder of the weights.
        ignores: the fields of requests that it does not know, as older servers do not know bad_words.
    """

    def __init__(self, folder: Path, *, dev_mode: bool = True, port: int = 0) -> None:
        self.engine, self.dev_mode = Vllm(folder), dev_mode
        self.faults: list[Any] = []
        self.retry_after: int | None = None
        self.asked: list[Json] = []
        self.reloads, self.sees = 0, True
        self.ignores: set[str] = set()
        self.name = str(folder)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.answer(self, None)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                outer.answer(self, json.loads(self.rfile.read(length)))

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @staticmethod
    @contextlib.contextmanager
    def free_port() -> Iterator[int]:
        """A port that nobody else gets meanwhile."""
        with socket.socket() as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
            yield held.getsockname()[1]

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def restart(self) -> None:
        self.engine.load(self.engine.folder)
        self.engine.prefix_cache.clear()

    def answer(self, handler: BaseHTTPRequestHandler, body: Json | None) -> None:
        try:
            fault = self.faults.pop(0) if handler.path == "/v1/completions" and self.faults else None
            if isinstance(fault, int):
                raise Refused(fault, "as the test has it")
            if fault == "restart":
                self.restart()
            if fault in ("reset", "restart"):
                handler.connection.close()
                return
            if fault == "hang":
                time.sleep(2.5)
            found = self.reply(handler.path, body)
            if fault == "abort":
                found["choices"][-1]["finish_reason"] = "abort"
            if fault == "no places":
                del found["choices"][0]["index"]
            if fault == "no ids":
                del found["choices"][0]["token_ids"]
            if fault == "text":
                found = "<html>"  # type: ignore[assignment]
            code, data = 200, json.dumps(found).encode() if found is not None else b""
        except Refused as refused:
            error = {"message": str(refused), "type": "BadRequestError", "code": refused.code}
            fault, code, data = None, refused.code, json.dumps({"error": error}).encode()
        if fault == "text":
            data = b"<html>"
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(data)))
        if code != 200 and self.retry_after is not None:
            handler.send_header("Retry-After", str(self.retry_after))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    def reply(self, path: str, body: Json | None) -> Any:
        if path == "/health":
            return None
        if path == "/v1/models":
            card = {"id": self.name, "object": "model", "root": str(self.engine.folder), "parent": None}
            return {"object": "list", "data": [card]}
        if path == "/tokenize" and body is not None:
            check(body, TOKENIZE)
            tokens = self.engine.tokenizer.encode(
                body["prompt"], add_special_tokens=body["add_special_tokens"]
            )
            return {"count": len(tokens), "max_model_len": 128, "tokens": tokens, "token_strs": None}
        if path == "/collective_rpc" and body is not None and self.dev_mode:
            if body["method"] != "reload_weights" or set(body) - {"method", "args", "kwargs", "timeout"}:
                raise Refused(500, "no such method")
            if not self.sees:
                raise Refused(500, "no such folder")
            self.engine.load(Path(body["kwargs"]["weights_path"]))
            self.reloads += 1
            return {"results": [None]}
        if path == "/v1/completions" and body is not None:
            self.asked.append(body)
            check(body, COMPLETION)
            body = {name: value for name, value in body.items() if name not in self.ignores}
            if body["model"] != self.name:
                raise Refused(404, f"The model `{body['model']}` does not exist.")
            return self.completions(body)
        raise Refused(404, "Not Found")

    def completions(self, body: Json) -> Json:
        choices = []
        with self.engine.lock:
            for index in range(body["n"]):
                found = self.engine.complete(body["prompt"], body, index, body["cache_salt"])
                shown = {"index": index, "text": "", "logprobs": None, "prompt_logprobs": None, **found}
                if body["return_token_ids"]:
                    shown["prompt_token_ids"] = body["prompt"]
                choices.append(shown)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 0, "total_tokens": 0}
        return {"id": "cmpl-0", "object": "text_completion", "choices": choices[::-1], "usage": usage}
