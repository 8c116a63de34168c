"""Which reward a run has: names, weighted sums, classifiers' labels, and the cache between runs."""

from __future__ import annotations

import dataclasses
import math
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny_classifier
from transformers import GPT2Config, GPT2ForSequenceClassification

from quark_fast.config import Config
from quark_fast.data.row import Row
from quark_fast.errors import UsageError
from quark_fast.rewards.cache import RewardCache
from quark_fast.rewards.identity import NO_SOURCE, held_by
from quark_fast.rewards.reward import Reward, describe
from quark_fast.rewards.weighted_sum import cached, terms
from quark_fast.tasks import by_name
from quark_fast.tasks.by_name import choose_judges, choose_reward, load_reward
from quark_fast.tasks.task import Task

ROWS: list[Row] = [{"prompt": "a", "label": 1}, {"prompt": "b"}, {"prompt": "c", "label": 3, "id": "x"}]
TEXTS = ["one", "two", "three"]

TWO = """
def length(prompts, completions, **columns):
    return [len(c) if c != "two" else None for c in completions]

def threes(prompts, completions, label, **columns):
    return [10 * (n == 3) for n in label]

async def slow(prompts, completions, **columns):
    return [len(c) for c in completions]

def reward(prompts, completions, **columns):
    return [len(c) for c in completions]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes a module "my_rewards" that can be imported for this test alone."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)

    def write(source: str) -> None:
        (tmp_path / "my_rewards.py").write_text(source)

    yield write
    sys.modules.pop("my_rewards", None)


def test_what_is_no_function_is_refused_with_what_to_give(module: Callable[[str], None]) -> None:
    for odd in ({"a": len}, [len, {"a": len}], [[len]]):
        with pytest.raises(UsageError, match=r"which cannot be called; .* a list of them.*0\.7\*package"):
            choose_reward(Config(), by_name.find_task("toxicity"), "cpu", odd)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="reward is an empty list; give one function or more"):
        choose_reward(Config(), by_name.find_task("toxicity"), "cpu", [])
    with pytest.raises(UsageError, match="reward is of type int, which cannot be called"):
        describe(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"GPT2ForSequenceClassification; save that, .* 'hf:FOLDER:LABEL'"):
        describe(GPT2ForSequenceClassification(GPT2Config(n_embd=2, n_layer=1, n_head=1, vocab_size=2)))
    module("class R:\n    def __call__(self, prompts, completions, **_):\n        return [1.0]\n")
    with pytest.raises(UsageError, match=r"reward my_rewards:R is a class, .*give an instance of it \(R\("):
        load_reward("my_rewards:R")


def test_rewards_in_a_list_are_added_up(module: Callable[[str], None]) -> None:
    module("def score(prompts, completions, **columns):\n    return [len(c) for c in completions]\n")

    def only_short(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [10.0 if len(text) < 5 else None for text in completions]

    def chosen(given: Any) -> Reward:
        return choose_reward(Config(), by_name.find_task("toxicity"), "cpu", given)

    both = chosen(["my_rewards:score", only_short])
    np.testing.assert_array_equal(both(ROWS, TEXTS), [13, 13, np.nan])
    assert both.name.startswith("my_rewards:score + ") and both.name.endswith("only_short")
    assert chosen((only_short, both))(ROWS, TEXTS)[0] == 23
    assert chosen([only_short]).name == chosen(only_short).name


def test_reward_is_found_by_module_and_function(module: Callable[[str], None]) -> None:
    module("def score(prompts, completions, **columns):\n    return [len(c) for c in completions]\n")
    reward = load_reward("my_rewards:score")
    assert reward(ROWS, TEXTS).tolist() == [3, 3, 5]
    assert reward.name == "my_rewards:score"
    assert reward.property is None


def test_module_of_a_reward_does_not_change_the_threads_of_the_run(module: Callable[[str], None]) -> None:
    module("import torch\ntorch.set_num_threads(2)\ndef score(prompts, completions): return [1.0]\n")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        load_reward("my_rewards:score")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_reward_is_identified_by_the_hash_of_its_source(module: Callable[[str], None]) -> None:
    hashes = set()
    for factor in (1, 2):
        sys.modules.pop("my_rewards", None)
        # Other lengths, so that no stale bytecode of the same second and size is taken for it.
        module(f"def score(prompts, completions, **columns):\n    return [{factor}.{'0' * factor}]\n")
        hashes.add(load_reward("my_rewards:score").sha256)
    assert len(hashes) == 2 and all(len(h) == 64 for h in hashes)


@pytest.mark.parametrize("made", ["Scorer(threshold={})", "functools.partial(Scorer.count, weight={})"])
def test_reward_of_a_library_is_identified_by_its_arguments_too(
    module: Callable[[str], None], tmp_path: Path, made: str
) -> None:
    """They stand in the module that --reward names, its code in another."""
    (tmp_path / "library.py").write_text(
        "class Scorer:\n"
        "    def __init__(self, threshold): self.threshold = threshold\n"
        "    def __call__(self, prompts, completions, **columns): return [self.threshold for _ in prompts]\n"
        "    def count(prompts, completions, weight, **columns): return [weight for _ in prompts]\n"
    )
    found = []
    for value in (3, 30):
        sys.modules.pop("my_rewards", None)
        module(f"import functools\nfrom library import Scorer\nscore = {made.format(value)}\n")
        reward = load_reward("my_rewards:score")
        found.append((reward.sha256, reward(ROWS[:1], TEXTS[:1])[0]))
    sys.modules.pop("library")
    assert [value for _, value in found] == [3, 30] and found[0][0] != found[1][0]
    assert found[0][0] != NO_SOURCE


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("my_rewards", "package.module:function"),
        ("my_rewards:", "package.module:function"),
        (":score", "package.module:function"),
        ("", "package.module:function"),
        ("toxicty", "choose from: toxicity"),
        ("no_such_module_anywhere:score", "ModuleNotFoundError"),
        ("my_rewards:scoer", "no function 'scoer'"),
        ("my_rewards:number", "no function 'number'"),
        ("my_rewards.score:x", "not a package"),
        (".my_rewards:score", "TypeError"),
        ("my_rewards.py:score", "names a file; give its module: mine:score for mine.py"),
        ("./my_rewards.py:score", "names a file"),
        ("my_rewards:score+my_rewards:score", "a sum has blanks around each +"),
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
        ("raise RuntimeError('two\\nlines')\n", "my_rewards.py:1: two lines"),
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


# --- Sums ----------------------------------------------------------------------------------------


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    """The task "toxicity" with a scorer that needs no file: toxicity 0.1, 0.2, 0.3, ..."""

    def reward() -> Reward:
        def function(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return [1 - (i + 1) / 10 for i in range(len(completions))]

        return Reward(function, "tiny-scorer", "1.0", "ab" * 32, property="toxicity")

    made = Task("toxicity", prompts=lambda: ([], []), reward=reward, words=("bad", "good"))

    def find(name: str, target: str) -> Task:
        if name != "toxicity":
            raise UsageError(f"unknown task {name!r}; choose from: toxicity")
        return made

    monkeypatch.setattr(by_name, "find_task", find)
    return made


def test_name_of_a_task_is_its_reward_whole(task: Task) -> None:
    reward = load_reward("toxicity")
    assert (reward.name, reward.version, reward.property) == ("tiny-scorer", "1.0", "toxicity")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("my_rewards:length + my_rewards:threes", [3, math.nan, 15]),
        ("0.5*my_rewards:length + 0.1*my_rewards:threes", [1.5, math.nan, 3.5]),
        (" 0.5 * my_rewards:length  +  .1 * my_rewards:threes ", [1.5, math.nan, 3.5]),
        ("-1*my_rewards:length + 1e-1*my_rewards:threes + 2*toxicity", [-1.2, math.nan, -2.6]),
        ("2*toxicity", [1.8, 1.6, 1.4]),
        ("1 - my_rewards:length", [-2, math.nan, -4]),
        ("1- my_rewards:length", [-2, math.nan, -4]),
    ],
)
def test_sum_is_of_weighted_values_and_leaves_out_what_any_part_does(
    module: Callable[[str], None], task: Task, spec: str, expected: list[float]
) -> None:
    module(TWO)
    reward = load_reward(spec)
    assert reward(ROWS, TEXTS).tolist() == pytest.approx(expected, nan_ok=True)


def test_sum_names_its_parts_and_only_a_complement_measures_a_property(
    module: Callable[[str], None], task: Task
) -> None:
    module(TWO)
    reward = load_reward("0.7*toxicity + my_rewards:length")
    assert reward.name == "0.7*tiny-scorer + my_rewards:length"
    assert reward.version == "1.0; source"
    assert reward.property is None
    assert load_reward("1 - my_rewards:length").property == "length"
    assert load_reward("1 - my_rewards:length").name == "1 - my_rewards:length"
    # Tables take "reward" for a value of which more is better.
    assert load_reward("1 - my_rewards:reward").property == "my_rewards:reward"
    specs = ("2*toxicity", "-1*toxicity", "toxicity", "-1*my_rewards:length", "1 - my_rewards:length")
    assert len({load_reward(spec).sha256 for spec in specs}) == len(specs)


def test_complement_of_what_lowers_its_property_already_is_refused(task: Task) -> None:
    with pytest.raises(UsageError, match=r"'1 - toxicity' would raise toxicity, .* or -1\*toxicity"):
        load_reward("1 - toxicity")


@pytest.mark.parametrize(
    "spec",
    [
        "toxicity*0.7",
        "x*toxicity",
        "nan*toxicity",
        "inf*toxicity",
        "0.5*",
        "0.5* + toxicity",
        "toxicity +  + toxicity",
        "toxicity + ",
        "toxicity - 0.3*my_rewards:length",
        "2 - toxicity",
        "1 - toxicity + toxicity",
        "toxicity+toxicity",
    ],
)
def test_malformed_sum_is_refused_with_every_form(task: Task, spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_reward(spec)
    assert repr(spec) in str(caught.value) and "0.7*toxicity" in str(caught.value)


def test_error_of_a_part_names_the_part_alone(module: Callable[[str], None], task: Task) -> None:
    module("def down(prompts, completions, **columns):\n    raise ConnectionError('x')\n")
    with pytest.raises(UsageError) as caught:
        load_reward("toxicity + my_rewards:down")(ROWS, TEXTS)
    assert re.fullmatch(
        r"reward my_rewards:down raised ConnectionError at \S*my_rewards\.py:2: x", str(caught.value)
    )


def test_settings_of_a_run_reach_its_asynchronous_rewards(module: Callable[[str], None], task: Task) -> None:
    module(TWO)
    config = Config(
        reward="2*my_rewards:slow",
        reward_batch=2,
        reward_concurrency=3,
        reward_timeout=4.0,
        reward_retries=5,
        reward_backoff=6.0,
        reward_per_minute=7,
        reward_tokens_per_minute=8,
    )
    ((_, part),) = choose_reward(config, task, "cpu").function.parts
    assert dataclasses.astuple(part.calls) == (2, 3, 4.0, 5, 6.0, 7, 8)
    given = choose_reward(config, task, "cpu", part.function)
    assert given.calls == part.calls


@pytest.mark.parametrize(
    ("spec", "label", "named"),
    [
        (None, "toxic", "names no classifier"),
        ("toxicity", "toxic", "has 0 classifiers"),
        ("hf:a + hf:b", "x,y,z", "names 3 labels"),
    ],
)
def test_label_without_its_classifier_is_refused(task: Task, spec: str, label: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        choose_reward(Config(reward=spec, scorer_label=label), task, "cpu")


# --- Judges --------------------------------------------------------------------------------------


def judges_of(task: Task, config: Config, rewarded_by_task: bool = True) -> list[str]:
    reward = choose_reward(config, task, "cpu")
    trained_by = [one.identity for one in terms(reward)]
    return [one.name for one in choose_judges(config, task, "cpu", trained_by, rewarded_by_task)]


def test_task_brings_its_judge_where_its_own_reward_trains(module: Callable[[str], None], task: Task) -> None:
    own = Reward(task.reward().function, "tiny-judge", "2", "cd" * 32, property="toxicity")
    judged = dataclasses.replace(task, judge=lambda batch_size: own)
    module("def score(prompts, completions, **columns):\n    return [0.5 for _ in completions]\n")
    Path(sys.path[0], "my_judges.py").write_text("def length(prompts, completions):\n    return [1.0]\n")
    assert judges_of(judged, Config()) == ["tiny-judge"]
    assert (
        judges_of(judged, Config(), rewarded_by_task=False) == [] == judges_of(judged, Config(judge="none"))
    )
    assert judges_of(task, Config()) == [], "a task without a judge"
    named = Config(reward="my_rewards:score", judge="toxicity, 1 - my_judges:length")
    assert judges_of(judged, named, rewarded_by_task=False) == ["tiny-scorer", "1 - my_judges:length"]


@pytest.mark.parametrize(
    ("judge", "named"),
    [
        ("toxicity", "toxicity is the reward itself"),
        ("2*toxicity", r"2\*toxicity is the reward itself, or a term of it"),
        (" , ", "auto or none"),
        ("auto, toxicity", "unknown task 'auto'"),
        ("my_rewards:score, my_rewards:score", "name each scorer once"),
        ("my_rewards:nothing", "my_rewards"),
        ("toxicity-judge", "the task toxicity has no judge"),
    ],
)
def test_judge_that_cannot_judge_is_refused(
    module: Callable[[str], None], task: Task, judge: str, named: str
) -> None:
    module("def score(prompts, completions, **columns):\n    return [0.5 for _ in completions]\n")
    with pytest.raises(UsageError, match=named):
        judges_of(task, Config(judge=judge))


# --- The cache -----------------------------------------------------------------------------------


def caches(reward: Reward) -> list[bool]:
    parts = getattr(reward.function, "parts", [(1, reward)])
    return [part.cache is not None for _, part in parts]


def test_asynchronous_rewards_are_cached_unless_told_otherwise(
    module: Callable[[str], None], task: Task, tmp_path: Path
) -> None:
    module(TWO)
    path = tmp_path / "r.sqlite"
    reward = load_reward("toxicity + my_rewards:slow")
    assert caches(cached(reward, "auto", path)) == [False, True]
    assert caches(cached(reward, "on", path)) == [True, True]
    assert caches(cached(reward, "off", path)) == [False, False]
    assert caches(cached(load_reward("my_rewards:slow"), "auto", path)) == [True]
    both = cached(reward, "on", path)
    assert both(ROWS, TEXTS).tolist() == both(ROWS, TEXTS).tolist() == reward(ROWS, TEXTS).tolist()
    assert not caches(cached(describe(len), "auto", path))[0]
    with pytest.raises(UsageError, match="no source to tell its versions apart"):
        cached(describe(len), "on", path)


class Times:
    """Async rewards of one code, by what each holds."""

    def __init__(self, factor: float) -> None:
        self.factor, self.client = factor, object()

    async def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [self.factor * len(text) for text in completions]

    __call__ = score

    def closure(self) -> Any:
        factor = self.factor

        async def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return [factor * len(text) for text in completions] or later

        if not factor:
            later: list[float] = []  # else the closure has an empty cell

        return score


@pytest.mark.parametrize("made", [Times, lambda f: Times(f).score, lambda f: Times(f).closure()])
def test_rewards_of_one_code_do_not_share_answers(made: Callable[[float], Any], tmp_path: Path) -> None:
    task = by_name.find_task("toxicity")
    reward = cached(choose_reward(Config(), task, "cpu", [made(1.0), made(10.0)]), "auto", tmp_path / "r.db")
    assert reward(ROWS, TEXTS).tolist() == reward(ROWS, TEXTS).tolist() == [33.0, 33.0, 55.0]
    once = made(1.0), made(1.0)  # as a further start makes them
    assert held_by(once[0]) == held_by(once[1]) != held_by(made(2.0))


def test_what_a_function_holds_is_read_only_where_its_values_may_be_cached() -> None:
    class Unspeakable:
        def __repr__(self) -> str:
            raise RuntimeError("no text")

    held = Unspeakable()

    def plain(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(held is not None)] * len(completions)

    assert describe(plain)(ROWS, TEXTS).tolist() == [1.0] * 3
    with pytest.raises(UsageError, match=r"holds a value that has no text \(RuntimeError: no text\).*off"):
        describe(plain, cache="on")


def key(i: int) -> bytes:
    return i.to_bytes(32, "big")


def test_cache_keeps_every_bit_over_a_restart(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, -0.0, 5e-324, 1.7e308, 3.0, math.nan, np.nextafter(1, 2)]
    # More keys than one query takes.
    every = {key(i): float(values[i % len(values)]) for i in range(1300)}
    RewardCache(tmp_path / "r.sqlite").add(every)
    found = RewardCache(tmp_path / "r.sqlite").find([*every, key(5000)])
    assert found.keys() == every.keys()
    ours, theirs = (np.array([d[k] for k in every]) for d in (found, every))
    assert np.array_equal(ours.view(np.int64)[~np.isnan(ours)], theirs.view(np.int64)[~np.isnan(theirs)])
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))


def test_first_value_of_a_key_stays(tmp_path: Path) -> None:
    cache = RewardCache(tmp_path / "r.sqlite")
    cache.add({key(1): 0.25})
    cache.add({key(1): 0.75, key(2): 0.5})
    assert cache.find([key(1), key(2)]) == {key(1): 0.25, key(2): 0.5}


def test_killed_process_leaves_what_it_had_added(tmp_path: Path) -> None:
    source = (
        "import sys\nfrom pathlib import Path\nfrom quark_fast.rewards.cache import RewardCache\n"
        "cache = RewardCache(Path(sys.argv[1]))\n"
        "for i in range(10**9):\n"
        "    cache.add({i.to_bytes(32, 'big'): i / 7})\n"
        "    print(i, flush=True)\n"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "r.sqlite")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 20:
            break
    process.kill()
    last = max(map(int, process.communicate()[0].split()), default=20)
    found = RewardCache(tmp_path / "r.sqlite").find([key(i) for i in range(last + 1)])
    assert found == {key(i): i / 7 for i in range(last + 1)}


def test_two_writers_wait_for_each_other(tmp_path: Path) -> None:
    first, second = (RewardCache(tmp_path / "r.sqlite") for _ in range(2))
    for i in range(40):
        (first if i % 2 else second).add({key(i): float(i)})
    assert len(first.find([key(i) for i in range(40)])) == 40


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"\xff" * 2000])
def test_file_that_is_no_cache_is_refused_with_the_mend(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.sqlite").write_bytes(content)
    for path in (tmp_path / "r.sqlite", tmp_path / "nowhere" / "r.sqlite"):
        for use in (lambda cache: cache.find([key(1)]), lambda cache: cache.add({key(1): 1.0})):
            with pytest.raises(UsageError, match=r"r\.sqlite cannot be used .*delete it, and what it held"):
                use(RewardCache(path))


def test_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "r.sqlite") as database:
        database.execute("CREATE TABLE rewards (id, points)")
    database.close()
    with pytest.raises(UsageError, match="no such column"):
        RewardCache(tmp_path / "r.sqlite").find([key(1)])


@pytest.mark.parametrize(
    ("reward", "judge"),
    [("rude", "hf:{}:rude"), ("rude", "hf:./{}:rude"), ("rude", "hf:{}:2"), ("rude", "1 - hf:{}:RUDE")],
)
def test_classifier_that_trains_is_no_judge_however_it_is_spelled(
    reward: str, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    save_tiny_classifier(tmp_path / "clf")
    monkeypatch.chdir(tmp_path)
    named = Config(reward="hf:clf", scorer_label=reward, judge=judge.format("clf"))
    with pytest.raises(UsageError, match="is the reward itself, or a term of it"):
        judges_of(task, named, rewarded_by_task=False)
    another = Config(reward="hf:clf", scorer_label=reward, judge="hf:clf:kind")
    assert len(judges_of(task, another, rewarded_by_task=False)) == 1


def test_classifier_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_classifier(tmp_path / "clf")
    monkeypatch.setenv("HOME", str(tmp_path))
    both = load_reward("0.5*hf:~/clf:rude + hf:~/clf", Config(scorer_label="kind"))
    assert [part.function.label for _, part in both.function.parts] == ["rude", "kind"]


def test_two_objects_that_nothing_tells_apart_share_no_answers(tmp_path: Path) -> None:
    class Client:
        __slots__ = ("_answers",)  # of no text, no attributes

        def __init__(self, answer: float) -> None:
            self._answers = iter([answer] * 99)

    def by(client: Client) -> Any:
        async def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return [next(client._answers) for _ in completions]

        return score

    given = [by(Client(1.0)), by(Client(10.0))]
    assert held_by(given[0]) == held_by(given[1])
    task = by_name.find_task("toxicity")
    reward = cached(choose_reward(Config(), task, "cpu", given), "auto", tmp_path / "rewards.db")
    assert reward(ROWS, TEXTS).tolist() == [11.0] * len(TEXTS)
