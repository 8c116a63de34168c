"""The example rewards do what they say, from the command line, with a server that stumbles."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from warm import Process

from quark_fast import train
from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.tasks.by_name import load_reward

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_length_reward_counts_words() -> None:
    reward = load_reward("examples.length_reward:score")
    values = reward([{"prompt": ""}] * 3, ["a b  c", " ", "d"])
    assert values[[0, 2]].tolist() == [3, 1] and values[1] != values[1]


def test_yes_or_no_reward_passes_what_is_clearly_positive() -> None:
    reward = load_reward("examples.yes_or_no_reward:clearly_positive")
    texts = ["a wonderful, happy day full of love", "a table", "a terrible day"]
    assert reward([{"prompt": ""}] * 3, texts).tolist() == [1.0, 0.0, 0.0]


def test_keyword_reward_reads_the_column_of_the_prompts() -> None:
    reward = load_reward("examples.keyword_reward:score")
    keywords: list[Any] = [["soup", "Bread"], ["soup"], None]
    rows = [{"prompt": "we had", "keywords": words} for words in keywords]
    values = reward(rows, ["Bread, and wine.", "soupy", "soup"])
    assert values[:2].tolist() == [0.5, 0.0] and values[2] != values[2]
    words = ["ice cream", "C++", "cream and", "Ice"]
    assert reward([rows[0] | {"keywords": words}], ["C++ and ice cream."]).tolist() == [0.75]


class Server(ThreadingHTTPServer):
    """Scores a text by its share of the letter w; the first times that it sees some, it stumbles."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.lock = threading.Lock()
        self.stumbles = False
        self.delay = 0.0
        self.meeting = threading.Barrier(1)  # requests that are answered when so many are there

    def first_time(self, text: str) -> bool:
        with self.lock:
            self.asked.append(text)
            return self.asked.count(text) == 1


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        time.sleep(self.server.delay)
        self.server.meeting.wait(30)
        status, answer = 200, json.dumps({"score": text.count("w") / len(text)})
        if self.server.first_time(text) and self.server.stumbles:
            kind = zlib.crc32(text.encode()) % 4  # one of three mishaps, or none
            status = 503 if kind == 0 else status
            answer = "<html>busy" if kind == 1 else answer
            time.sleep(1.0 if kind == 2 else 0.0)  # beyond the time-out below
        try:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # nobody waited

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{made.server_address[1]}/score"
    monkeypatch.setenv("SCORER_URL", url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delitem(sys.modules, "examples.http_reward", raising=False)
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


TEXTS = [f"w{i} x" for i in range(24)]
ROWS = [{"prompt": "p"}] * 24
EXPECTED = [text.count("w") / len(text) for text in TEXTS]


def test_http_reward_gets_every_score_from_a_server_that_stumbles(server: Server) -> None:
    server.stumbles = True
    patient = Config(reward_timeout=0.4, reward_retries=3, reward_backoff=0.01)
    reward = load_reward("examples.http_reward:score", patient)
    assert reward(ROWS, TEXTS).tolist() == EXPECTED
    repeated = [text for text in TEXTS if server.asked.count(text) > 1]
    assert repeated, "no text met a mishap: the test tests nothing"
    blank = reward(ROWS[:2], ["  ", "w"])
    assert blank[0] != blank[0] and blank[1] == 1.0


def test_http_reward_waits_side_by_side(server: Server) -> None:
    server.meeting = threading.Barrier(3)  # one after the other nobody would be answered
    reward = load_reward("examples.http_reward:score", Config(reward_retries=0))
    assert reward(ROWS[:6], TEXTS[:6]).tolist() == EXPECTED[:6]


def test_http_reward_leaves_no_thread_that_ctrl_c_would_wait_for(server: Server) -> None:
    server.delay = 20.0
    before, handler = threading.enumerate(), signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1.0, lambda: signal.raise_signal(signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            load_reward("examples.http_reward:score")(ROWS, TEXTS)
    finally:
        signal.signal(signal.SIGINT, handler)
    # Python waits at its end for the threads of a pool, daemons or not.
    new = [thread for thread in threading.enumerate() if thread not in before]
    assert not [thread for thread in new if thread.name.startswith("quark_fast reward_")]


def test_http_reward_without_a_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_URL", "http://127.0.0.1:9/score")
    monkeypatch.delitem(sys.modules, "examples.http_reward", raising=False)
    config = Config(reward_retries=1, reward_backoff=0.01)
    with pytest.raises(UsageError, match=r"http_reward:score failed at 2 attempts.*ConnectError.*'w0 x'"):
        load_reward("examples.http_reward:score", config)(ROWS[:1], TEXTS[:1])


def test_run_with_a_server_resumes_without_asking_again(
    server: Server,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that is killed while it waits for scores goes on to what an undisturbed one gives."""
    (tmp_path / "prompts.csv").write_text("id,text\n" + "".join(f"{i},w{i} w{i + 1}\n" for i in range(20)))
    settings = {
        "model": tiny_model(),
        "prompts": tmp_path / "prompts.csv",
        "prompt-column": "text",
        "reward": "examples.http_reward:score",
        "reward-concurrency": 2,
        "quantiles": 3,
        "initial-samples": 2,
        "explore-samples": 2,
        "rounds": 1,
        "steps": 2,
        "max-new-tokens": 8,
        "sample-batch": 12,
        "eval-samples": 1,
        "eval-guidance": "",
        "precision": "fp32",
        "threads": 1,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    def start(name: str, *more: str) -> Process:
        arguments = [*flags, "--output", str(tmp_path / name), *more]
        return Process("quark_fast.train", *arguments, folder=tmp_path, environment={"PYTHONPATH": str(ROOT)})

    def wait_for(count: int, process: Process) -> None:
        while len(server.asked) < count and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, process.errors

    assert train.main([*flags, "--output", str(tmp_path / "whole")]) == 0
    assert "prompts.csv: 20 read" in " ".join(capsys.readouterr().err.split())
    asked_whole, server.asked = list(server.asked), []

    server.delay = 0.1
    killed = start("run")
    wait_for(12, killed)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    before = len(server.asked)
    stopped = start("run", "--resume")
    wait_for(before + 10, stopped)
    stopped.kill(signal.SIGINT)
    assert stopped.wait() == 130 and "--resume" in stopped.errors, stopped.errors
    server.delay = 0.0
    assert train.main(["--resume", "--output", str(tmp_path / "run")]) == 0
    for name in ("completions.jsonl", "evaluation.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()
    # Each start shows the reward three prompts; beyond those, only what was under way was asked twice.
    assert len(server.asked) - len(asked_whole) <= 2 * 3 + 2 * 2
