"""Rewards: what they are handed, what may come back, how each mistake is named."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quark_fast.config import UsageError
from quark_fast.prompts import Row
from quark_fast.reward import Reward, describe, load_reward

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
    assert np.isnan(returning([0.5, None, math.nan])(ROWS, TEXTS)).tolist() == [False, True, True]


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
    ],
)
def test_numbers_of_numpy_and_torch_are_numbers(values: Any) -> None:
    rewards = returning(values)(ROWS, TEXTS)
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [1.0, 0.0, -2.0]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_wrong_length_is_refused_with_both_lengths(count: int) -> None:
    assert f"returned {count} values for 3 completions" in refusal([0.0] * count)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("0.5", "'0.5'"),
        (True, "True"),
        (np.bool_(False), "False"),
        (torch.tensor(True), "True"),
        ([0.5], "[0.5]"),
        (1j, "1j"),
        (np.array([1.0, 2.0]), "array"),
        (torch.tensor([1.0]), "tensor"),
        (np.str_("good"), "good"),
        (math.inf, "inf; return finite"),
        (np.float32("-inf"), "inf); return finite"),
        ({"score": 1}, "{'score': 1}"),
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
        (x for x in [0.0, 0.0, 0.0]),
    ],
)
def test_anything_but_a_list_of_numbers_is_refused(values: Any) -> None:
    assert "return a list of numbers" in refusal(values)


def test_exception_of_the_reward_is_named_in_one_line() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        raise KeyError("no such\nkey")

    with pytest.raises(UsageError, match=r"reward mine raised KeyError: .*no such") as caught:
        describe(reward, "mine")([{"prompt": "a"}], ["x"])
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    # A signature without **columns meets rows that have some.
    with pytest.raises(UsageError, match=r"TypeError.*label"):
        describe(lambda prompts, completions: [0.0] * 3, "mine")([{"prompt": "a", "label": 1}], ["x"])


def test_reward_that_scores_no_text_at_all_is_refused_before_work() -> None:
    for values in ([None] * 3, [math.nan] * 3):
        with pytest.raises(UsageError, match=r"scored none of 3 texts .*'a'"):
            returning(values).check(ROWS)
    returning([None, 1.0, None]).check(ROWS)


def test_check_shows_the_reward_a_few_texts_only() -> None:
    seen: list[int] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append(len(completions))
        return [0.0] * len(completions)

    describe(reward).check([{"prompt": str(i)} for i in range(1000)])
    assert seen == [3]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes a module "my_rewards" that can be imported for this test alone."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)

    def write(source: str) -> None:
        (tmp_path / "my_rewards.py").write_text(source)

    yield write
    sys.modules.pop("my_rewards", None)


def test_reward_is_found_by_module_and_function(module: Callable[[str], None]) -> None:
    module("def score(prompts, completions, **columns):\n    return [len(c) for c in completions]\n")
    reward = load_reward("my_rewards:score")
    assert reward(ROWS, TEXTS).tolist() == [3, 3, 5]
    assert reward.name == "my_rewards:score"
    assert reward.property is None


def test_reward_is_identified_by_the_hash_of_its_source(module: Callable[[str], None]) -> None:
    hashes = set()
    for factor in (1, 2):
        sys.modules.pop("my_rewards", None)
        # Other lengths, so that no stale bytecode of the same second and size is taken for it.
        module(f"def score(prompts, completions, **columns):\n    return [{factor}.{'0' * factor}]\n")
        hashes.add(load_reward("my_rewards:score").sha256)
    assert len(hashes) == 2 and all(len(h) == 64 for h in hashes)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("my_rewards", "package.module:function"),
        ("my_rewards:", "package.module:function"),
        (":score", "package.module:function"),
        ("", "package.module:function"),
        ("no_such_module_anywhere:score", "ModuleNotFoundError"),
        ("my_rewards:scoer", "no function 'scoer'"),
        ("my_rewards:number", "no function 'number'"),
        ("my_rewards.score:x", "not a package"),
        (".my_rewards:score", "TypeError"),
    ],
)
def test_bad_reward_name_is_refused_with_the_reason(
    module: Callable[[str], None], spec: str, named: str
) -> None:
    module("number = 1\ndef score(prompts, completions, **columns):\n    return []\n")
    with pytest.raises(UsageError) as caught:
        load_reward(spec)
    assert repr(spec) in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("raise RuntimeError('two\\nlines')\n", "RuntimeError: two lines"),
        ("import sys\nsys.exit(0)\n", "SystemExit"),
        ("import not_installed_here\n", "not_installed_here"),
    ],
)
def test_module_that_fails_to_import_is_named_with_its_error(
    module: Callable[[str], None], source: str, named: str
) -> None:
    module(source)
    with pytest.raises(UsageError) as caught:
        load_reward("my_rewards:score")
    assert "importing my_rewards failed" in str(caught.value) and named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_callable_objects_and_partials_can_be_rewards() -> None:
    class Constant:
        def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return [1.0] * len(prompts)

    for function in (Constant(), functools.partial(Constant().__call__), Constant().__call__):
        assert describe(function)(ROWS, TEXTS).tolist() == [1.0] * 3
    assert len(describe(len).sha256) == 64, "a builtin has no source to hash"
