"""Rewards: what they are handed, what may come back, how each mistake is named."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import functools
import importlib
import itertools
import linecache
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch

from quark_fast.data.row import Rendered, Row
from quark_fast.errors import UsageError
from quark_fast.rewards import cache
from quark_fast.rewards.asynchronous import Calls
from quark_fast.rewards.cache import RewardCache
from quark_fast.rewards.identity import NO_SOURCE, held_by
from quark_fast.rewards.reward import Reward, describe
from quark_fast.rewards.weighted_sum import forget_unscored, weighted_sum

ROWS: list[Row] = [{"prompt": "a", "label": 1}, {"prompt": "b"}, {"prompt": "c", "label": 3, "id": "x"}]
TEXTS = ["one", "two", "three"]


def returning(values: Any) -> Reward:
    return describe(lambda prompts, completions, **columns: values, "mine")


def refusal(values: Any) -> str:
    with pytest.raises(UsageError) as caught:
        returning(values)(ROWS, TEXTS)
    message = str(caught.value)
    assert "\n" not in message and "reward mine" in message
    return message


def test_reward_is_handed_prompts_completions_and_the_other_columns_by_name() -> None:
    heard: dict[str, Any] = {}

    def reward(**given: Any) -> list[float]:
        heard.update(given)
        return [0.0] * 3

    describe(reward)(ROWS, tuple(TEXTS))
    # A column that a row lacks is None there: the lists keep in step.
    assert heard == {
        "prompts": ["a", "b", "c"],
        "completions": TEXTS,
        "label": [1, None, 3],
        "id": [None, None, "x"],
    }
    assert isinstance(heard["completions"], list)


def test_none_and_nan_leave_a_sample_out() -> None:
    for values in ([0.5, None, math.nan], np.ma.masked_array([0.5, 1.0, 2.0], [False, True, True])):
        assert np.isnan(returning(values)(ROWS, TEXTS)).tolist() == [False, True, True]


@pytest.mark.parametrize(
    "values",
    [
        [1, 0, -2],
        (1.0, 0.0, -2.0),
        np.array([1.0, 0.0, -2.0], dtype=np.float32),
        np.array([1, 0, -2]),
        [np.float64(1), np.int64(0), np.float16(-2)],
        torch.tensor([1.0, 0.0, -2.0]),
        torch.tensor([1.0, 0.0, -2.0], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0), torch.tensor(0), -2.0],
        [Decimal("1"), Fraction(0), Decimal("-2.0")],
    ],
)
def test_numbers_of_any_library_are_numbers(values: Any) -> None:
    rewards = returning(values)(ROWS, TEXTS)
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [1.0, 0.0, -2.0]


def test_decimal_that_signals_that_it_is_no_number_is_none() -> None:
    assert np.isnan(returning([Decimal("sNaN"), 0.0, 0.0])(ROWS, TEXTS)[0])


def test_large_rewards_that_tables_can_show_are_kept() -> None:
    assert returning([9e29, -9e29, 0.0])(ROWS, TEXTS).tolist() == [9e29, -9e29, 0.0]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_wrong_length_is_refused_with_both_lengths(count: int) -> None:
    assert f"returned {count} values for 3 completions" in refusal([0.0] * count)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("0.5", "'0.5'"),
        ([0.5], "[0.5]"),
        (1j, "1j"),
        (np.array([1.0, 2.0]), "array"),
        (torch.tensor([1.0]), "tensor"),
        (np.str_("good"), "good"),
        (math.inf, "inf; return finite"),
        (np.float32("-inf"), "inf); return finite"),
        ({"score": 1}, "{'score': 1}"),
        (10**400, "return finite"),
        # The sum of a few overflows, and from 1e30 on no table would show them.
        (1e308, "1e+308; return finite numbers below 1e+30 in size, or None: scale larger ones down"),
        (np.float64(-3.5e38), "-3.5e+38"),
        (-(10**30), "return finite"),
    ],
)
def test_value_that_is_no_number_is_refused_and_shown(value: Any, shown: str) -> None:
    assert shown in refusal([0.0, value, 1.0])


@pytest.mark.parametrize(
    "values",
    [
        None,
        0.5,
        "abc",  # three letters for three completions: no list all the same
        b"abc",
        {0: 1.0, 1: 1.0, 2: 1.0},
        np.array(0.5),
        torch.tensor(0.5),
        np.zeros((3, 1)),
        pyarrow.table({"0": [1.0, 2.0, 3.0]}).to_pandas().rename(columns=int),
        {0.1, 0.2, 0.3},
        (x for x in [0.0, 0.0, 0.0]),
    ],
)
def test_anything_but_a_list_of_numbers_is_refused(values: Any) -> None:
    assert "return a list of numbers" in refusal(values)


REWARD_OF_A_FILE = """
import json
from pathlib import Path

def deeper(text):
    return json.loads(text)

def score(prompts, completions, **_):
    return [deeper(text) for text in completions]

async def asked(prompts, completions, **_):
    return [Path(text).read_text() for text in completions]

def of_chats(prompts, completions, **_):
    return [len(completion[0]["content"]) for completion in completions]

def getting(prompt, completion, **_):
    return len(completion[0].get("content"))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Any]]:
    def load(folder: Path) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rw.py").write_text(REWARD_OF_A_FILE)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "rw", raising=False)
        return importlib.import_module("rw")

    monkeypatch.chdir(tmp_path)
    yield load
    sys.modules.pop("rw", None)


def test_error_of_a_reward_names_the_line_of_the_users_file(
    module: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Not the innermost frame, which is the standard library's."""
    here = module(tmp_path)
    with pytest.raises(UsageError, match=r"raised JSONDecodeError at rw\.py:6: Expecting value"):
        describe(here.score)(ROWS, TEXTS)
    with pytest.raises(UsageError, match=r"at last with FileNotFoundError at rw\.py:12: .*No such file"):
        describe(here.asked, calls=Calls(retries=0))(ROWS, TEXTS)
    installed = module(tmp_path / "site-packages")
    with pytest.raises(UsageError, match=r"raised JSONDecodeError at site-packages/rw\.py:6: "):
        describe(functools.partial(installed.score))(ROWS, TEXTS)


def test_reward_that_takes_completions_for_messages_is_told_that_they_are_texts(
    module: Callable[[Path], Any], tmp_path: Path
) -> None:
    mine, hint = module(tmp_path), "; completions are texts here, also those of chats"
    chats: list[Row] = [{"prompt": Rendered("[user] a"), "messages": [{"role": "user", "content": "a"}]}]
    for rows in (chats, ROWS[:1]):
        with pytest.raises(UsageError, match=r"TypeError at rw\.py:15: string indices") as caught:
            describe(mine.of_chats)(rows, TEXTS[:1])
        assert hint in str(caught.value)
    with pytest.raises(UsageError, match=r"AttributeError at rw\.py:18: 'str' object") as caught:
        describe(mine.getting)(chats, TEXTS[:1])
    assert hint in str(caught.value)
    with pytest.raises(UsageError, match="AttributeError") as caught:  # another mistake
        describe(lambda prompts, completions, **_: "x".none)(ROWS[:1], TEXTS[:1])  # type: ignore[attr-defined]
    assert hint not in str(caught.value)


def test_argument_that_is_not_passed_is_named_with_those_that_are() -> None:
    def plain(prompts: list[str], completions: list[str], wanted: list[str], **columns: Any) -> list[float]:
        raise AssertionError

    async def of_trl(
        prompt: str, completion: str, *, label: int, trainer_state: Any, **columns: Any
    ) -> float:
        raise AssertionError

    class Scorer:
        def __call__(self, completions: list[str], completion_ids: list[Any], wanted: str, **_: Any) -> Any:
            raise AssertionError

    columns = "the columns 'id', 'label'; leave it out of the signature, give it a default, or"
    for function, needed in (
        (plain, rf"needs wanted, which it is not passed; passed: prompts, completions and {columns}"),
        (
            of_trl,
            r"needs trainer_state, which .* \(TRL's trainer_state is not passed\); passed: prompt, comp",
        ),
        (Scorer(), r"needs completion_ids and wanted, which .* \(TRL's completion_ids is not passed\); "),
    ):
        with pytest.raises(UsageError, match=needed):
            describe(function)(ROWS, TEXTS)
    with pytest.raises(UsageError, match="passed: prompts and completions, no columns; "):
        describe(plain)([{"prompt": "a"}], ["x"])

    # What a wrapper adds is not missing, and neither is what has a default.
    def scores(prompts: list[str], completions: list[str], client: Any, wanted: Any = None) -> list[float]:
        return [client] * len(completions)

    @functools.wraps(scores)
    def wrapper(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return scores(prompts, completions, client=2.0)

    for each in (wrapper, functools.partial(wrapper)):
        assert describe(each)(ROWS, TEXTS).tolist() == [2.0] * 3


def test_exception_of_the_reward_is_named_in_one_line() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        raise KeyError("no such\nkey")

    with pytest.raises(UsageError, match=r"reward mine raised KeyError at .*\.py:\d+: .*no such") as caught:
        describe(reward, "mine")([{"prompt": "a"}], ["x"])
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    # A signature without **columns meets rows that have some.
    with pytest.raises(UsageError, match=r"TypeError.*label"):
        describe(lambda prompts, completions: [0.0] * 3, "mine")([{"prompt": "a", "label": 1}], ["x"])


def test_reward_that_exits_does_not_end_the_program_without_a_word() -> None:
    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        sys.exit(0)

    with pytest.raises(UsageError, match=r"reward mine raised SystemExit at .*test_reward\.py:\d+: 0"):
        describe(reward, "mine")(ROWS, TEXTS)


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True)])
def test_true_and_false_are_rewards(value: Any) -> None:
    assert returning([value, ~value if hasattr(value, "ndim") else not value, 0.5])(ROWS, TEXTS).tolist() == [
        *(1.0, 0.0, 0.5)
    ]
    assert returning(np.array([True, False, True]))(ROWS, TEXTS).tolist() == [1.0, 0.0, 1.0]


def test_reward_that_scores_nothing_at_all_is_refused_before_work() -> None:
    for values in ([None] * 3, [math.nan] * 3):
        with pytest.raises(UsageError, match=rf"scored none of 6 completions .*{TEXTS[0]!r}"):
            returning(values).check([(ROWS, TEXTS)] * 2)
    returning([None, 1.0, None]).check([(ROWS, TEXTS)])


def test_check_goes_on_until_a_completion_is_scored_and_no_further() -> None:
    seen: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        seen.append(completions)
        return [float(len(text)) if "scored" in text else None for text in completions]

    batches = [["left out"], ["scored", "left out"], ["scored"]]
    describe(reward).check(([{"prompt": "a"}] * len(texts), texts) for texts in batches)
    assert seen == batches[:2]


def test_callable_objects_and_partials_can_be_rewards() -> None:
    class Constant:
        def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return [1.0] * len(prompts)

    for function in (Constant(), functools.partial(Constant().__call__), Constant().__call__):
        assert describe(function)(ROWS, TEXTS).tolist() == [1.0] * 3
    assert len(describe(len).sha256) == 64, "a builtin has no source to hash"


class Judge:
    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(prompts)


def test_name_is_the_same_in_every_process() -> None:
    """No address: a resumed run, the cache and tables of two processes compare names."""
    names = {describe(one).name for one in (Judge(), Judge())}
    assert names == {f"{__name__}:Judge"}
    given = functools.partial(score_of, Judge(), scale=2)
    name = rf"{__name__}:score_of\(\.\.\., scale=\.\.\., [0-9a-f]{{8}}\)"
    assert re.fullmatch(name, describe(given).name) and describe(given).name == describe(given).name
    assert describe(functools.partial(score_of, scale=3)).name != describe(given).name
    assert describe(len).name == "builtins:len" and describe(Judge().__call__).name.endswith("Judge.__call__")


def test_name_shows_no_argument_of_a_partial() -> None:
    """It may be a key, or a list of 5,000 words; the name goes into the model card."""
    long = describe(functools.partial(score_of, api_key="sk-SECRET", words=["word"] * 5000)).name
    assert "SECRET" not in long and len(long) < 200


def test_name_does_not_follow_what_a_client_notes_in_itself() -> None:
    """It is another at every start, and a run that is resumed must find its reward."""

    class Client:
        def __init__(self, session: str) -> None:
            self.session = session

    first, second = (functools.partial(score_of, Client(session)) for session in ("a", "b"))
    assert describe(first).name == describe(second).name and held_by(first) != held_by(second)


def two(weight: float) -> list[Callable[..., Any]]:
    """Each pair differs in one thing that is neither the name nor the file of its functions."""

    class Slots:
        __slots__ = ("weight",)

        def __init__(self) -> None:
            self.weight = weight

        async def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
            return [self.weight]

    class Client:
        def __init__(self) -> None:
            self.url = f"http://{weight}"

    model, client, array = torch.nn.Linear(2, 2), Client(), np.full(10_000, weight)
    torch.nn.init.constant_(model.weight, weight)
    torch.nn.init.constant_(model.bias, 0.0)
    options = {"banned": {"a", "b", weight}}

    async def by_closure(prompts: Any, completions: Any) -> Any:
        return model, client, array, options

    async def by_default(prompts: Any, completions: Any, w: float = weight, *, c: Any = client) -> Any:
        return w

    lambdas = [lambda completion: 1.0, lambda completion: 2.0]
    return [Slots(), by_closure, by_default, lambdas[int(weight)], functools.partial(score_of, model)]


@pytest.mark.parametrize("kind", range(5))
def test_cache_tells_rewards_of_one_file_apart_by_what_they_hold(kind: int) -> None:
    one, again, other = (held_by(two(weight)[kind]) for weight in (0.0, 0.0, 1.0))
    assert one == again != other


PROGRAM = """
import collections, functools, typing
import quark_fast.rewards.identity as identity
RESUME = {resume}
WORDS = ["a", "{word}"]
Pair = collections.namedtuple("Pair", "n {field}")
Length = typing.NewType("Length", int)
asked = []
class Counts:
    def count(self, words): return sum(w in WORDS for w in words) + {more}
class Texts(Counts):
    pass
texts = Texts()
@functools.cache
def count(text): return texts.count(text.split())
def score(prompts, completions):
    asked.append(completions)
    return [Length(Pair(count(c), 0).n) for c in completions]
class Score:
    def __call__(self, prompts, completions): return score(prompts, completions)
before = identity.source_sha256(score)
score(["a"], ["b"])
assert identity.source_sha256(score) == before, "of what it notes there is nothing in it"
print(before, identity.source_sha256(Score()))
"""


def test_program_that_runs_may_be_edited_but_for_what_its_reward_names(tmp_path: Path) -> None:
    """To resume a run, its program gets resume=True."""

    def hashes(**changed: Any) -> list[str]:
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.format(**{"resume": False, "word": "b", "more": 0, "field": "m"} | changed))
        return subprocess.run(
            [sys.executable, path], capture_output=True, text=True, check=True
        ).stdout.split()

    first = hashes()
    assert hashes(resume=True) == first
    for changed in ({"word": "c"}, {"more": 1}, {"field": "k"}):
        assert all(now != before for now, before in zip(hashes(**changed), first, strict=True))


NOTEBOOK = """
import linecache
from quark_fast.rewards.identity import source_sha256
def run(cell):
    name = f"<cell {len(linecache.cache)}>"
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    exec(compile(cell, name, "exec"), globals())
for resume, weight, least in [(False, 1, 1), (True, 1, 1), (False, 2, 1), (False, 1, 2)]:
    run(f"class Least:\\n def least(self): return {least}")
    run(f"class Scorer(Least):\\n def count(self, text): return {weight}")
    run(f"resume = {resume}\\nscorer = Scorer()\\ndef score(prompts, texts): return scorer.count(texts)")
    run("class Score(Scorer):\\n def __call__(self, prompts, texts): return self.count(texts)")
    print(source_sha256(score), source_sha256(Score()))
"""


def test_reward_in_a_notebook_is_told_apart_by_the_classes_that_it_names() -> None:
    """They have no source in a notebook, but their methods have."""
    command = [sys.executable, "-c", NOTEBOOK]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, resumed, *changed = (line.split() for line in done.stdout.splitlines())
    assert resumed == first and len(changed) == 2
    for hashes in changed:
        assert hashes[0] != first[0] and hashes[1] != first[1]


def score_of(judge: Any, prompts: list[str], completions: list[str], scale: int = 1) -> list[float]:
    return [scale * one for one in judge(prompts, completions)]


def test_reward_that_writes_into_a_column_changes_its_own_copy_alone() -> None:
    heard: list[int] = []

    def reward(prompts: list[str], completions: list[str], messages: list[Any]) -> list[float]:
        for talk, text in zip(messages, completions, strict=True):
            talk.append({"role": "assistant", "content": text})
            heard.append(len(talk))
        return [1.0] * len(prompts)

    row = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    for _ in range(2):
        describe(reward)([row, row], ["one", "two"])
    assert heard == [2] * 4 and len(row["messages"]) == 1


def test_columns_that_would_clash_with_the_arguments_are_kept_back() -> None:
    heard: dict[str, Any] = {}

    def reward(**given: Any) -> list[float]:
        heard.update(given)
        return [0.0]

    row = {"prompt": "a", "prompts": "x", "completion": "y", "completions": "z", "label": 1}
    describe(reward)([row], ["one"])
    assert heard == {"prompts": ["a"], "completions": ["one"], "label": [1]}


def test_function_of_one_completion_is_called_for_each() -> None:
    heard: list[dict[str, Any]] = []

    def reward(prompt: str, completion: str, **columns: Any) -> float | None:
        heard.append({"prompt": prompt, "completion": completion, **columns})
        return float(len(completion)) if completion != "two" else None

    assert describe(reward)(ROWS, TEXTS).tolist() == pytest.approx([3, math.nan, 5], nan_ok=True)
    assert heard[2] == {"prompt": "c", "completion": "three", "label": 3, "id": "x"}
    assert heard[0]["id"] is None


def test_hash_is_of_the_source_wherever_the_function_stands() -> None:
    class Constant:
        def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
            return [1.0] * len(prompts)

    own = describe(Constant.__call__).sha256
    assert own != NO_SOURCE == describe(len).sha256
    for function in (Constant(), functools.partial(Constant()), Constant().__call__):
        assert describe(function).sha256 == own
    # A cell of a notebook has lines, but no file.
    hashes = set()
    for text in ("def f(prompts, completions): return [1]\n", "def f(prompts, completions): return [2]\n"):
        name = f"<cell {len(hashes)}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        space: dict[str, Any] = {}
        exec(compile(text, name, "exec"), space)
        hashes.add(describe(space["f"]).sha256)
    assert len(hashes) == 2 and NO_SOURCE not in hashes


TYPED = """
import sys
from quark_fast.rewards.identity import source_sha256
def f(prompts, completions): return [{value} if "a" in c else sum(x for x in [1]) for c in completions]

class F:
    def __call__(self, prompts, completions): return [c in {{"a", "b", "c", "d"}} for c in completions]

print(source_sha256(f), source_sha256(F()))
"""


def test_what_was_typed_at_a_prompt_is_told_apart_by_what_it_does() -> None:
    """Two interpreters, each with an order of sets of its own; in one of them, two functions of one name."""

    def typed(seed: int, *values: int) -> list[list[str]]:
        done = subprocess.run(
            [sys.executable, "-i", "-q"],
            input="".join(TYPED.format(value=value) for value in values),
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Error" not in done.stderr
        return [line.split() for line in done.stdout.splitlines()]

    (first, other), (again,) = typed(1, 1, 2), typed(2, 1)
    assert first == again and NO_SOURCE not in first
    assert other[0] != first[0] and other[1] == first[1]


# --- Asynchronous --------------------------------------------------------------------------------

MANY: list[Row] = [{"prompt": "p", "n": i} for i in range(50)]
WORDS = [f"text {i}" for i in range(50)]
AT_ONCE = Calls(backoff=0.001)


async def numbers(prompts: list[str], completions: list[str], n: list[int], **_: Any) -> list[float | None]:
    await asyncio.sleep(random.Random(n[0]).random() / 100)
    return [None if i == 7 else float(i) for i in n]


async def number(prompt: str, completion: str, n: int) -> float | None:
    await asyncio.sleep(0.001 * (50 - n) / 10)
    return None if n == 7 else float(n)


@pytest.mark.parametrize("function", [numbers, number])
@pytest.mark.parametrize("batch", [1, 7, 50, 1000])
def test_asynchronous_rewards_come_back_in_order(function: Any, batch: int) -> None:
    expected = [math.nan if i == 7 else float(i) for i in range(50)]
    reward = describe(function, calls=Calls(batch=batch))
    assert reward.asynchronous
    assert reward(MANY, WORDS).tolist() == pytest.approx(expected, nan_ok=True)


def test_asynchronous_calls_wait_side_by_side_but_no_more_than_allowed() -> None:
    under_way, most = 0, 0

    async def reward(prompt: str, completion: str, **columns: Any) -> float:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1
        return 0.0

    for limit in (1, 6):
        most = 0
        describe(reward, calls=Calls(concurrency=limit))(MANY, WORDS)
        assert most == limit


def test_calls_in_threads_wait_side_by_side_however_few_the_cores() -> None:
    """asyncio's own pool has a few more than there are cores, and the time-out would count the wait."""
    many = 8 + min(32, (os.cpu_count() or 1) + 4)
    meeting = threading.Barrier(many)

    async def reward(prompt: str, completion: str, **columns: Any) -> float:
        await asyncio.to_thread(meeting.wait, 30)
        return 1.0

    calls = Calls(concurrency=many, retries=0)
    assert describe(reward, calls=calls)([ROWS[0]] * many, ["x"] * many).tolist() == [1.0] * many


def test_loop_outlives_the_call_so_that_a_client_can_be_kept() -> None:
    loops = set()

    async def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        loops.add(asyncio.get_running_loop())
        return [0.0] * len(prompts)

    describe(reward)(ROWS, TEXTS)

    async def in_a_notebook() -> None:  # whose own loop runs already
        describe(reward)(ROWS, TEXTS)

    asyncio.run(in_a_notebook())
    assert len(loops) == 1


def test_failed_calls_are_tried_again_and_others_are_not() -> None:
    failures = {3: 2, 20: 1}
    calls: list[int] = []

    async def reward(prompt: str, completion: str, n: int) -> float:
        calls.append(n)
        if failures.get(n, 0):
            failures[n] -= 1
            raise ConnectionError("busy")
        return float(n)

    state = random.getstate()
    assert describe(reward, calls=AT_ONCE)(MANY, WORDS).tolist() == list(map(float, range(50)))
    assert sorted(calls) == sorted([*range(50), 3, 3, 20])
    assert random.getstate() == state, "the global generator is the user's"


def test_each_attempt_is_handed_what_the_one_before_had_been() -> None:
    """A judge that appends to a chat, or takes completions off their list, may be called again."""
    heard: list[Any] = []

    async def of_one(prompt: str, completion: str, messages: list[str]) -> float:
        messages.append(completion)
        heard.append([*messages])
        raise ConnectionError("busy")

    async def of_many(prompts: list[str], completions: list[str], messages: list[list[str]]) -> list[float]:
        messages[0].append(completions.pop(0))
        heard.append([*messages[0]])
        raise ConnectionError("busy")

    row = {"prompt": "a", "messages": ["hello"]}
    for reward in (of_one, of_many):
        heard.clear()
        failed = "failed at 3 attempts, .* the first completion of the call: 'one'"
        with pytest.raises(UsageError, match=failed):
            describe(reward, calls=Calls(retries=2, backoff=0.001))([row], ["one"])
        assert heard == [["hello", "one"]] * 3 and row["messages"] == ["hello"]


def test_reward_that_keeps_failing_is_named_with_attempts_and_completion() -> None:
    attempts = 0

    async def reward(prompts: list[str], completions: list[str], n: list[int]) -> list[float]:
        nonlocal attempts
        if 20 in n:
            attempts += 1
            raise ConnectionError("server\nis down")
        await asyncio.sleep(0.05)
        return [0.0] * len(n)

    calls = Calls(batch=5, retries=2, backoff=0.001)
    with pytest.raises(UsageError) as caught:
        describe(reward, "mine", calls)(MANY, WORDS)
    place = rf"test_reward\.py:{reward.__code__.co_firstlineno + 4}"
    assert re.fullmatch(
        rf"reward mine failed at 3 attempts, at last with ConnectionError at \S*{place}: server is down; the"
        " first completion of the call: 'text 20'",
        str(caught.value),
    )
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert attempts == 3


def test_waits_between_attempts_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def short(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    async def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        raise OSError

    monkeypatch.setattr("quark_fast.rewards.asynchronous.asyncio.sleep", short)
    with pytest.raises(UsageError, match="9 attempts"):
        describe(reward, calls=Calls(retries=8, backoff=2.0))(ROWS, TEXTS)
    for wait, longest in zip(waits, [2, 4, 8, 16, 32, 60, 60, 60], strict=True):
        assert longest / 2 <= wait <= longest


def test_call_without_an_answer_times_out_and_is_tried_again() -> None:
    calls: list[str] = []

    async def reward(prompt: str, completion: str, **columns: Any) -> float:
        calls.append(completion)
        if completion == "two" and calls.count("two") <= 1:
            await asyncio.sleep(600)
        return 1.0

    limits = Calls(timeout=0.1, backoff=0.001)
    assert describe(reward, calls=limits)(ROWS, TEXTS).tolist() == [1.0] * 3
    assert calls.count("two") == 2

    async def never(prompt: str, completion: str, **columns: Any) -> float:
        await asyncio.sleep(600)
        return 1.0

    with pytest.raises(UsageError, match=r"2 attempts, at last with TimeoutError: no answer in 0.05 s"):
        describe(never, calls=Calls(timeout=0.05, retries=1, backoff=0.001))(ROWS, TEXTS)


@pytest.mark.parametrize("error", [TypeError("x"), NameError("x"), SystemExit(1), KeyboardInterrupt()])
def test_mistake_in_the_code_is_not_tried_again(error: BaseException) -> None:
    calls: list[int] = []

    async def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        raise error

    with pytest.raises(UsageError, match=f"raised {type(error).__name__}"):
        describe(reward)(ROWS, TEXTS)
    assert len(calls) == 1
    assert describe(numbers)(MANY[:2], WORDS[:2]).tolist() == [0.0, 1.0], "the loop goes on"


def test_function_that_cancels_itself_has_failed() -> None:
    async def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        raise asyncio.CancelledError

    with pytest.raises(UsageError, match="failed at 5 attempts, at last with CancelledError"):
        describe(reward, calls=AT_ONCE)(ROWS, TEXTS)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([1.0], "returned 1 values for 3"),
        ("abc", "return a list"),
        ([0.0, "x", 1.0], "returned 'x'"),
        ([math.inf] * 3, "finite"),
    ],
)
def test_bad_value_of_an_asynchronous_reward_is_refused_at_once(value: Any, named: str) -> None:
    calls: list[int] = []

    async def reward(prompts: list[str], completions: list[str], **columns: Any) -> Any:
        calls.append(1)
        return value

    with pytest.raises(UsageError, match=named):
        describe(reward)(ROWS, TEXTS)
    assert len(calls) == 1


def test_coroutine_of_a_plain_function_is_refused_with_the_mend() -> None:
    async def inner() -> list[float]:
        return [0.0] * 3

    with pytest.raises(UsageError, match="define it by async def"):
        describe(lambda prompts, completions, **columns: inner())(ROWS, TEXTS)


def test_interrupt_ends_the_waiting_at_once_and_cancels_the_calls() -> None:
    cancelled = threading.Event()

    async def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [0.0] * len(prompts)

    # A shell's background job inherits a SIGINT that is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.1, lambda: signal.raise_signal(signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            describe(reward)(ROWS, TEXTS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert cancelled.wait(10), "and not waited for"


# --- With a cache --------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path: Path) -> Any:
    """(reward with a cache, the texts that it was called for)."""
    heard: list[str] = []

    def function(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        heard.extend(completions)
        return [len(t) / 3 if t != "two" else None for t in completions]

    reward = describe(function, "mine")
    return Reward(function, "mine", "1", reward.sha256, cache=RewardCache(tmp_path / "r.sqlite")), heard


def test_known_text_is_not_scored_again_also_one_that_was_left_out(counted: Any) -> None:
    reward, heard = counted
    first = reward(ROWS, TEXTS)
    again = reward([*ROWS, ROWS[0]], [*TEXTS, "four"])
    assert np.array_equal(again[:3], first, equal_nan=True) and np.isnan(first[1])
    assert heard == [*TEXTS, "four"]


def test_text_that_stands_in_a_batch_again_is_scored_once(tmp_path: Path) -> None:
    count = itertools.count()

    async def function(prompt: str, completion: str) -> float:
        return float(next(count))  # each call is another

    reward = dataclasses.replace(describe(function, "mine"), cache=RewardCache(tmp_path / "r.sqlite"))
    texts = ["yes", "no", "yes", "yes", "no", "yes"]
    found = reward([{"prompt": "a"}] * 6, texts)
    assert next(count) == 2 and sorted(set(found)) == [0, 1]
    assert found.tolist() == [found[texts.index(text)] for text in texts]
    assert reward([{"prompt": "a"}] * 6, texts).tolist() == found.tolist() and next(count) == 3
    plain = dataclasses.replace(reward, cache=None)
    assert len(set(plain([{"prompt": "a"}] * 6, texts))) == 6, "without a cache each is asked"


def test_what_was_left_out_is_asked_again_when_forgotten(counted: Any) -> None:
    reward, heard = counted
    reward(ROWS, TEXTS)
    forget_unscored([weighted_sum([(0.5, reward)], 0.0)])
    reward(ROWS, TEXTS)
    assert heard == [*TEXTS, "two"]


@pytest.mark.parametrize(
    ("code", "status", "advice"),
    [
        ("SQLITE_FULL", 4, "then go on with --resume"),
        ("SQLITE_IOERR_WRITE", 4, "then go on with --resume"),
        ("SQLITE_BUSY", 2, "another process is at work on it"),
        ("SQLITE_CORRUPT", 2, "delete it, and what it held is asked for again"),
    ],
)
def test_cache_that_fails_says_what_to_do_and_only_a_broken_one_is_to_be_deleted(
    tmp_path: Path, code: str, status: int, advice: str
) -> None:
    error = sqlite3.OperationalError("no")
    error.sqlite_errorcode = getattr(sqlite3, code)
    found = RewardCache(tmp_path / "r.sqlite")._broken(error)
    assert found.exit_status == status and advice in str(found)
    assert ("delete it" in str(found)) == (code == "SQLITE_CORRUPT")


def test_cache_waits_for_a_process_that_makes_the_file_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cache.time, "sleep", lambda _: asked.append("waits"))

    class Busy:
        def execute(self, query: str) -> None:
            asked.append(query)
            if len(asked) < 4:
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise error

    cache._write_ahead(Busy())  # type: ignore[arg-type]
    assert asked == ["PRAGMA journal_mode = WAL", "waits"] * 2 + ["PRAGMA journal_mode = WAL"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"version": "2"},
        {"sha256": "0" * 64},
        {"rows": [{"prompt": "b", "label": 1}]},
        {"rows": [{"prompt": "a", "label": 2}]},
        {"rows": [{"prompt": "a", "label": "1"}]},
        {"rows": [{"prompt": "a", "name": 1}]},
        {"texts": ["One"]},
    ],
)
def test_other_scorer_prompt_column_or_text_is_another_key(counted: Any, change: dict[str, Any]) -> None:
    reward, heard = counted
    reward(ROWS[:1], TEXTS[:1])
    rows, texts = change.pop("rows", ROWS[:1]), change.pop("texts", TEXTS[:1])
    dataclasses.replace(reward, **change)(rows, texts)
    assert len(heard) == 2


def test_order_of_the_columns_is_no_other_key(counted: Any) -> None:
    reward, heard = counted
    reward([{"prompt": "a", "x": {"p": 1, "q": 2}, "y": 3}], ["one"])
    reward([{"y": 3, "x": {"q": 2, "p": 1}, "prompt": "a"}], ["one"])
    assert heard == ["one"]


def test_row_of_what_json_has_no_form_for_has_a_key(counted: Any) -> None:
    reward, heard = counted
    for day in (1, 2, 1):
        reward([{"prompt": "a", "at": datetime.date(2020, 1, day), "n": np.int64(7), "x": b"x"}], ["one"])
    assert heard == ["one", "one"]


def test_row_that_no_key_can_spell_is_always_scored(counted: Any) -> None:
    reward, heard = counted
    rows = [{"prompt": "a", "image": object()}]
    for _ in range(2):
        assert reward(rows, ["one"]).tolist() == [1.0]
    assert heard == ["one", "one"]


def test_what_was_scored_before_a_failure_is_kept(tmp_path: Path) -> None:
    heard: list[int] = []
    down = True

    async def function(prompts: list[str], completions: list[str], n: list[int]) -> list[float]:
        if down and 30 in n:
            await asyncio.sleep(0.2)  # the others have answered by then
            raise ConnectionError
        heard.extend(n)
        return [i / 7 for i in n]

    calls = Calls(batch=5, retries=0)
    reward = dataclasses.replace(describe(function, "mine", calls), cache=RewardCache(tmp_path / "r.sqlite"))
    with pytest.raises(UsageError, match="1 attempts"):
        reward(MANY, WORDS)
    assert sorted(heard) == [i for i in range(50) if not 30 <= i < 35]
    down = False
    assert reward(MANY, WORDS).tolist() == [i / 7 for i in range(50)]
    assert sorted(heard) == list(range(50)), "nothing was scored twice"


def test_asynchronous_reward_answers_in_a_forked_process_too() -> None:
    """Whose parent had used one: the thread of its event loop is not there."""

    async def score(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    reward = describe(score, cache="off")
    rows: list[Row] = [{"prompt": "a"}]
    assert reward(rows, ["bb"]).tolist() == [2.0]
    if (child := os.fork()) == 0:
        os._exit(0 if reward(rows, ["bbb"]).tolist() == [3.0] else 1)
    until = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
