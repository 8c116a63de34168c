"""Settings: which source wins, what is refused and how it is named."""

from __future__ import annotations

import dataclasses
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import yaml

from quark_fast.arguments import load_config, parse
from quark_fast.config import EVERY_TASK, PRESETS, TASK_DEFAULTS, Config
from quark_fast.errors import UsageError


def given(*flags: str) -> Config:
    return parse(flags, "train")


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\nlearning_rate: 1e-3\nties: random\nshow_offensive: true\n")
    config = given("--config", str(file), "--steps", "9")
    assert (config.steps, config.learning_rate, config.ties) == (9, 1e-3, "random")
    assert config.show_offensive is True
    assert config.rounds == Config().rounds


def test_flag_equal_to_the_default_still_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"steps: {Config().steps + 1}\nresume: true\n")
    config = given("--config", str(file), "--steps", str(Config().steps), "--resume", "false")
    assert config.steps == Config().steps
    assert config.resume is False


def test_resumed_folder_consents_neither_to_its_own_code_nor_to_another_reward(tmp_path: Path) -> None:
    saved = Config(output=str(tmp_path), trust_remote_code=True, accept_changed_reward=True, steps=7)
    saved.save(tmp_path / "config.yaml")
    resumed = given("--resume", "--output", str(tmp_path))
    assert (resumed.steps, resumed.trust_remote_code, resumed.accept_changed_reward) == (7, False, False)
    assert not given("--from", str(tmp_path)).accept_changed_reward
    trusted = given("--resume", "--output", str(tmp_path), "--trust-remote-code")
    assert trusted.trust_remote_code
    for config in (resumed, trusted):
        config.check_resumes(saved)


def test_value_of_a_flag_may_begin_with_a_minus() -> None:
    found = given("--reward", "-.5*m:f", "--eval-guidance", "-1,2", "--guidance", "-1e3")
    assert (found.reward, found.eval_guidance, found.guidance) == ("-.5*m:f", "-1,2", -1000)


def test_dashes_and_underscores_in_flags_mean_the_same() -> None:
    assert given("--max-new-tokens", "5") == given("--max_new_tokens", "5")


def test_settings_survive_save_and_load(tmp_path: Path) -> None:
    # Every field away from its default, so that one which save or load forgets is seen.
    other: dict[str, Any] = {
        "quantile_weights": "1,0,0,0,0,2",
        "eval_guidance": "2,-1.5",
        "top_p": 0.123456789012345,
        "eval_top_p": 0.5,
        "seed": 2**63 - 1,
        "explore_temperature": 0.5,
        "learning_rate": 1e-5,  # YAML reads 1e-05 as a text
        "vllm_server": "http://host:8000",
        "vllm_memory": 0.5,
        "max_prompt_tokens": 99,
        "keep_best": "judge:min, perplexity<=1.10",
    }
    kinds = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind = kinds[field.name]
        if field.name in other:
            continue
        if get_origin(kind) is Literal:
            other[field.name] = next(v for v in get_args(kind) if v != field.default)
        elif kind is bool:
            other[field.name] = not field.default
        elif kind in (int, float):
            other[field.name] = field.default + 1
        else:
            other[field.name] = "some: text # 1"
    assert all(other[f.name] != f.default for f in dataclasses.fields(Config))
    # vLLM does not guide, and what is scored brings its prompts: one of the two is at its default.
    by_vllm, by_us = {"guidance": 1.0}, {"rollout": "transformers", "vllm_server": None}
    for one in (by_vllm | {"scored": None}, by_us | {"prompts": None, "prefix_tokens": 0}):
        config = Config(**other | one)
        config.check()
        config.save(tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config
        assert given("--config", str(tmp_path / "config.yaml")) == config


def test_defaults_are_possible_settings_and_survive_too(tmp_path: Path) -> None:
    Config().check()
    Config().save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == Config()


def refusal(file: Path, text: str) -> str:
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        given("--config", str(file))
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


def test_value_in_a_file_is_what_is_written_there(tmp_path: Path) -> None:
    """Not what YAML makes of it: ``off`` False, ``010`` eight, ``1:30`` ninety, 1.10 another number."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "reward_cache: off\nscorer_label: no\nprefix: yes\noutput: 1.10\nheld_out: 0100\n"
        "prompts: 2020-01-02\nreward: 'null'\nmodel: ~\nsteps: 010\nrounds: 3.0\nkl_coef: 1e-3\neval: FALSE\n"
    )
    found = given("--config", str(file))
    texts = (
        found.reward_cache,
        found.scorer_label,
        found.prefix,
        found.output,
        found.held_out,
        found.prompts,
    )
    assert texts == ("off", "no", "yes", "1.10", "0100", "2020-01-02")
    assert (found.reward, found.model, found.steps, found.rounds) == ("null", None, 10, 3)
    assert (found.kl_coef, found.eval) == (1e-3, False)
    assert "steps = '1:30'; give a whole number" in refusal(file, "steps: 1:30")


def test_unknown_setting_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    message = refusal(tmp_path / "run.yaml", "lerning_rate: 1\n")
    assert "'lerning_rate'" in message and "did you mean 'learning_rate'" in message
    assert "did you mean" not in refusal(tmp_path / "run.yaml", "zzz: 1\n")
    theirs = {
        "scorer": "reward",
        "output_dir": "output",
        "beta": "kl_coef",
        "max-steps": "steps",
        "use_vllm": "rollout",
    }
    for name, ours in theirs.items():
        assert f"did you mean {ours!r}?" in refusal(tmp_path / "run.yaml", f"{name}: 1\n")
    assert "5" in refusal(tmp_path / "run.yaml", "5: 1\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_temperature": 1e-39}, "eval_temperature = 1e-39; give at least 1e-06, or 0, which is greedy"),
        ({"explore_temperature": 1e-7}, "explore_temperature = 1e-07; give at least"),
        ({"eval_guidance": "2,1e39"}, "eval_guidance = 1e+39; give at most 1e+06 in size"),
        ({"guidance": -1e7}, "guidance = -1e+07; give at most"),
    ],
)
def test_sampling_beyond_float32_is_refused_before_any_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Config(**settings).check()


def test_warm_up_that_the_run_does_not_reach_is_remarked_on() -> None:
    assert Config().remarks() == Config(warmup_steps=48).remarks() == []
    (remark,) = Config(warmup_steps=100, rounds=1, steps=20).remarks()
    assert remark.endswith("which reaches 20% of its step size; give --warmup-steps 2")


def test_unknown_setting_from_python_is_refused_with_the_nearest_known_one() -> None:
    for name, ours in {"kl_coeff": "kl_coef", "lr": "learning_rate", "max_steps": "steps"}.items():
        with pytest.raises(UsageError, match=f"unknown setting '{name}'; did you mean '{ours}'"):
            Config(**{name: 1})


def test_values_from_python_are_as_a_file_would_have_them(tmp_path: Path) -> None:
    numbers = {"steps": np.int64(7), "rounds": 3.0, "learning_rate": np.float32(0.5), "kl_coef": 1}
    config = Config(model=tmp_path, held_out=64, eval_guidance=1.5, **numbers)
    assert (config.model, config.held_out, config.eval_guidance) == (str(tmp_path), "64", "1.5")
    assert (type(config.steps), config.steps, config.rounds) == (int, 7, 3)
    config.check()
    config.save(tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": object()},
            "model is of type object; save it, and its tokenizer, by save_pretrained(FO",
        ),
        (
            {"reward": len},
            "reward is of type builtin_function_or_method; give a text, or Trainer(config, rew",
        ),
        ({"prompts": ["a"]}, "prompts is of type list; give a text, or Trainer(config, prompts=...)"),
        ({"scored": {}}, "scored is of type dict; give a file's name; data.to_json(FILE) of a Dataset"),
        ({"lora_targets": ["q_proj", "v_proj"]}, "lora_targets is of type list; give 'q_proj,v_proj'"),
        ({"preset": ["look"]}, "preset = ['look']; choose from 'default', 'long', 'paper', 'look'"),
        ({"task": ["toxicity"]}, "task is of type list; give 'toxicity'"),
        ({"steps": "8"}, "steps = '8'; give a whole number"),
        ({"steps": 1.5}, "steps = 1.5; give a whole number"),
        ({"steps": True}, "steps = True; give a whole number"),
        ({"steps": None}, "steps = None; give a whole number"),
        ({"kl_coef": "1"}, "kl_coef = '1'; give a number"),
        ({"resume": "no"}, "resume = 'no'; give True or False"),
    ],
)
def test_value_of_another_type_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Config(**settings).check()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("steps: many", "steps = 'many'; give a whole number"),
        ("steps: 1.5", "steps = '1.5'; give a whole number"),
        ("steps: true", "steps = 'true'; give a whole number"),
        ("steps: [1]", "steps = a list or a mapping; give a single value"),
        ("steps:", "steps = None; give a whole number"),
        ("steps: .inf", "steps = '.inf'; give a whole number"),
        ("steps: .nan", "steps = '.nan'; give a whole number"),
        ("learning_rate: fast", "learning_rate = 'fast'; give a number"),
        ("learning_rate: true", "learning_rate = 'true'; give a number"),
        ("learning_rate: {a: 1}", "learning_rate = a list or a mapping; give a single value"),
        ("resume: 1", "resume = '1'; give true or false"),
        ("resume: maybe", "resume = 'maybe'; give true or false"),
        ("lora_targets:", "lora_targets is null; give a text"),
        ("kl: both", "kl = 'both'; choose from 'policy_ref', 'ref_policy', 'sampled'"),
        ("ties: 1", "ties = '1'; choose from"),
    ],
)
def test_file_with_a_wrong_type_is_refused_by_name_and_value(tmp_path: Path, line: str, named: str) -> None:
    assert named in refusal(tmp_path / "run.yaml", line)


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n", "a: [1\n", "a: 1\na b: : 2\n\t"])
def test_file_that_holds_no_settings_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    refusal(tmp_path / "run.yaml", text)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (BOMB, "single value"),
        (f"prompts: {'[' * 100_000}", "single value"),
        ("a: &a 5\nsteps: *a\n", "aliases"),
        ("a: {steps: 5}\n<<: *a", "single value"),
        ("steps: !!python/object/apply:os.system ['touch pwned']", "tags (tag:yaml.org,2002:python/object"),
        ("steps: !!int ''", "tags"),
        (f"steps: {'9' * 5000}", "give a whole number"),
        ("steps: 0b_", "give a whole number"),
        ("steps: 1\nsteps: 2", "steps stands there twice"),
        ("steps: 1\n---\nrounds: 2", "'setting: value' lines"),
        ("model: a\0b", "special characters"),
        (f"{'steps: 1 # ' + 'x' * 2**20}", "more than 1,048,576 bytes"),
    ],
)
def test_hostile_settings_are_refused_at_once(tmp_path: Path, text: str, named: str) -> None:
    message = refusal(tmp_path / "run.yaml", text)
    assert named in message
    assert len(message) <= 2000 and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("name", "value", "most"),
    [
        ("steps", 10**400, 2**31 - 1),
        pytest.param("steps", 10**5000, 2**31 - 1, id="steps-without-a-text"),
        ("held_out", "9" * 5000, 2**31 - 1),
        ("quantiles", 1001, 1000),
        ("seed", 2**63, 2**63 - 1),
    ],
)
def test_number_beyond_all_counting_is_refused(name: str, value: Any, most: int) -> None:
    with pytest.raises(UsageError, match=f"^{name} = .*at most {most}"):
        Config(**{name: value}).check()


def test_error_that_quotes_a_hostile_value_is_one_short_line_that_steers_no_terminal() -> None:
    with pytest.raises(UsageError) as caught:
        given("--config", "\x1b]0;title\x07\x1b[2J\r\n\u202e\x9b1mnone.yaml")
    assert str(caught.value).startswith("--config  none.yaml: ")
    assert "\x1b" not in str(caught.value)
    assert len(str(UsageError("x" * 10**6))) < 2000
    with pytest.raises(UsageError, match="give at most 2147483647"):
        given("--steps", "9" * 400)


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"steps: \xff\xfe")
    for name in ("none.yaml", ".", "bytes.yaml"):
        with pytest.raises(UsageError, match="--config"):
            given("--config", str(tmp_path / name))


def test_file_is_said_to_be_given_by_a_flag_only_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("gone_setting: 3\n")
    for read in (
        lambda: load_config(file),
        lambda: given("--resume", "--output", str(tmp_path)),
        lambda: given("--from", str(tmp_path)),
    ):
        with pytest.raises(UsageError) as caught:
            read()
        assert str(caught.value).startswith(f"{file}: unknown setting 'gone_setting'")
    with pytest.raises(UsageError, match=f"^--config {re.escape(str(file))}: unknown"):
        given("--config", str(file))


@pytest.mark.parametrize(
    "flags",
    [
        ("--steps", "many"),
        ("--steps", "1.5"),
        ("--learning-rate", "fast"),
        ("--kl", "both"),
        ("--resume", "maybe"),
        ("--stepz", "1"),
        ("--learning-rat", "1e-5"),
        ("--steps",),
        ("--scorer", "x", "--reward", "toxicity"),
        ("--reward", "toxicity", "--scorer", "x"),
        ("stray",),
    ],
)
def test_bad_flag_is_one_line_not_a_page_of_usage(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        given(*flags)
    assert "\n" not in str(caught.value)
    assert flags[0].lstrip("-").replace("-", "_") in str(caught.value).replace("-", "_")
    assert capsys.readouterr().err == ""


IMPOSSIBLE: list[tuple[str, Any]] = [
    # Every number below its own bound.
    *((name, 0) for name in ("initial_samples", "explore_samples", "max_new_tokens")),
    *((name, 0) for name in ("sample_batch", "rounds", "steps", "batch_size")),
    *((name, 0) for name in ("eval_samples", "checkpoint_every", "quantiles", "unlikelihood_ngram")),
    *((name, 0) for name in ("min_prompt_characters", "reward_batch", "reward_concurrency", "kl_horizon")),
    *((name, -1) for name in ("min_new_tokens", "warmup_steps", "threads", "seed", "split_seed")),
    *((name, -1) for name in ("prefix_tokens", "max_prompt_characters", "prompt_limit", "lora_rank")),
    ("micro_batch", -1),
    *((name, -1) for name in ("max_bad_steps", "max_prompt_tokens", "reward_retries", "vllm_retries")),
    *((name, -1) for name in ("reward_per_minute", "reward_tokens_per_minute")),
    *((name, -1) for name in ("sample_at_once", "read_batch", "score_batch")),
    *((name, -0.1) for name in ("learning_rate", "reward_token_lr", "kl_coef", "contrast_coef")),
    ("prompt_kl_coef", -0.1),
    *((name, -0.1) for name in ("entropy_coef", "unlikelihood_coef", "temperature", "explore_temperature")),
    *((name, -0.1) for name in ("eval_temperature", "reward_timeout", "reward_backoff", "lora_alpha")),
    *((name, -0.1) for name in ("kl_stop", "kl_target")),
    *((name, 0.0) for name in ("max_grad_norm", "vllm_memory", "top_p", "eval_top_p", "contrast_margin")),
    ("vllm_timeout", 0.9),
    *(("stop_after", value) for value in (-1, 2)),  # without --keep-best nothing is a gain
    # What each kind of bound has to refuse, once: at least, above, a share, any number, a whole one.
    *(("learning_rate", value) for value in (float("nan"), float("inf"))),
    *(("max_grad_norm", value) for value in (-1.0, float("nan"), float("inf"))),
    *(("top_p", value) for value in (1.01, float("nan"))),
    *(("guidance", value) for value in (float("nan"), float("inf"))),
    ("seed", 2**63),
    # Texts.
    ("lora_targets", " , "),
    *(("held_out", count) for count in ("0", "0.1", "10%", "-5")),
    *(("quantile_weights", weights) for weights in ("1,2", "0,0,0,0,0", "1,1,1,1,-1", "1,1,1,1,x")),
    *(("quantile_weights", weights) for weights in ("1,1,1,1,nan", "")),
    *(("eval_guidance", guidances) for guidances in ("3;6", "3,inf")),
    *(("keep_best", goal) for goal in ("judge", "judge:lowest", "perplexity<=1.1", ":min", "judge:min,")),
    *(("keep_best", f"judge:min, {bound}") for bound in ("perplexity<1.1", "perplexity<=x", "dist3>=0")),
    *(("keep_best", f"judge:min, {bound}") for bound in ("dist3>=inf", "dist3>=nan", "<=1.1", "dist3:max")),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_number_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        dataclasses.replace(Config(quantiles=5), **{name: value}).check()
    assert name in str(caught.value) and repr(value).strip("'") in str(caught.value)


def test_every_number_among_the_settings_has_an_impossible_value_here() -> None:
    numbers = {name for name, kind in get_type_hints(Config).items() if kind in (int, float, float | None)}
    assert numbers <= {name for name, _ in IMPOSSIBLE}


def test_greedy_decoding_of_several_completions_a_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match=r"eval_temperature = 0 is greedy: all eval_samples = 5"):
        given("--eval-temperature", "0")
    with pytest.raises(UsageError, match=r"temperature = 0 is greedy: all explore_samples = 2"):
        given("--temperature", "0", "--initial-samples", "1")
    given("--temperature", "0", "--initial-samples", "1", "--explore-samples", "1")
    with pytest.raises(UsageError, match=r"^explore_temperature = 0 is greedy: all explore_samples = 2"):
        given("--explore-temperature", "0")
    given("--temperature", "0", "--initial-samples", "1", "--explore-temperature", "0.5")


def test_later_rounds_sample_at_their_own_temperature_or_at_the_first_ones(tmp_path: Path) -> None:
    assert [given("--temperature", "0.7").temperature_of(n) for n in range(3)] == [0.7, 0.7, 0.7]
    config = given("--temperature", "0.7", "--explore-temperature", "0.3")
    assert [config.temperature_of(n) for n in range(3)] == [0.7, 0.3, 0.3]
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").explore_temperature == 0.3
    (tmp_path / "text.yaml").write_text("explore_temperature: warm\n")
    with pytest.raises(UsageError, match=r"explore_temperature = 'warm'; give a number"):
        load_config(tmp_path / "text.yaml")


def test_one_quantile_has_nothing_to_contrast() -> None:
    with pytest.raises(UsageError, match=r"contrast_coef = 1.0 needs at least 2 quantiles"):
        given("--quantiles", "1")
    assert given("--quantiles", "1", "--contrast-coef", "0").quantile_shares() == [1.0]


def test_what_trains_one_token_alone_has_no_other_rows_and_says_so() -> None:
    alone = {"quantile_weights": "best", "contrast_coef": 0.0}
    assert Config(**alone).one_token and Config(**alone).guidances() == []
    (said,) = Config(**alone).remarks()
    assert said.startswith("one reward token alone is trained")
    assert Config(**alone, eval_rows="best").remarks() == []
    for several in ({}, {"quantile_weights": "best"}, {"contrast_coef": 0.0}):
        assert not Config(**several).one_token and Config(**several).guidances() == [1.5]
    assert Config(quantiles=3, quantile_weights="0,1,0").one_token, "it is its own mirror token"
    with pytest.raises(UsageError, match=r"eval_guidance = '2' .* but one alone is trained; leave it out"):
        given("--quantile-weights", "best", "--contrast-coef", "0", "--eval-guidance", "2")


@pytest.mark.parametrize("task", TASK_DEFAULTS)
def test_task_brings_its_defaults_and_what_is_given_wins_over_them(tmp_path: Path, task: str) -> None:
    own = TASK_DEFAULTS[task]
    config = given("--task", task)
    assert config == Config(task=task)
    assert {name: getattr(config, name) for name in own} == own
    others = {f.name for f in dataclasses.fields(Config)} - own.keys() - {"task"}
    assert {name: getattr(config, name) for name in others} == {n: getattr(Config(), n) for n in others}
    # A value that equals the field's own default is given all the same (but None, which is no flag's value).
    explicit = {name: value for name in own if (value := getattr(Config(), name)) is not None}
    assert {name: getattr(Config(task=task, **explicit), name) for name in explicit} == explicit
    flags = [part for name, value in explicit.items() for part in (f"--{name}", str(value))]
    assert given("--task", task, *flags) == Config(task=task, **explicit)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"task": task, **explicit}))
    assert given("--config", str(file)) == load_config(file) == Config(task=task, **explicit)
    file.write_text(f"task: {task}\nseed: 3\n")
    assert given("--config", str(file)) == load_config(file) == Config(task=task, seed=3)
    config.save(file)
    assert load_config(file) == dataclasses.replace(config) == config


def test_flag_for_another_task_wins_over_the_task_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: repetition\neval_samples: 1\n")
    config = given("--config", str(file), "--task", "sentiment", "--seed", "4")
    assert config == Config(task="sentiment", eval_samples=1, seed=4)


@pytest.mark.parametrize("task", TASK_DEFAULTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_of_every_task_is_possible_and_between_the_tasks_defaults_and_what_is_given(
    tmp_path: Path, task: str, preset: str
) -> None:
    own = PRESETS[preset].get(EVERY_TASK, {}) | PRESETS[preset].get(task, {})
    config, plain = given("--task", task, "--preset", preset), Config(task=task)
    assert config == Config(task=task, preset=preset)
    assert config == dataclasses.replace(plain, preset=preset, **own)
    # What is given wins, also where it equals what the task would have without a preset.
    explicit = {name: getattr(plain, name) for name in own}
    expected = dataclasses.replace(plain, preset=preset)
    assert Config(task=task, preset=preset, **explicit) == expected
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"task": task, "preset": preset, **explicit}))
    assert given("--config", str(file)) == load_config(file) == expected
    file.write_text(f"seed: 3\npreset: {preset}\n")
    assert given("--config", str(file), "--task", task) == dataclasses.replace(config, seed=3)
    config.save(file)
    assert load_config(file) == config


def test_settings_win_in_the_order_default_program_task_preset_file_flag(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rounds: 5\nbatch_size: 7\n")
    flags = ["--task", "repetition", "--preset", "look", "--config", str(file), "--batch-size", "9"]
    config = parse(flags, "ablate", {"learning_rate": 7e-7, "quantiles": 4, "seed": 1})
    assert (config.seed, config.top_p) == (1, Config().top_p), "the program's, and a field's own"
    assert (config.quantiles, config.learning_rate) == (2, 2.5e-4), "the task's"
    assert config.steps == Config(preset="look").steps != Config(task="repetition").steps
    assert (config.rounds, config.batch_size) == (5, 9)


def test_unknown_choice_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--preset: invalid choice: 'short' .*long"):
        given("--preset", "short")
    named = "preset = 'short'; choose from 'default', 'long', 'paper', 'look'"
    assert named in refusal(tmp_path / "run.yaml", "preset: short")
    for name in ("preset", "eval_rows", "kl"):
        with pytest.raises(UsageError, match=rf"^{name} = short; choose from '"):
            Config(**{name: "short"}).check()


def test_resumed_run_keeps_its_values_whatever_its_preset_says_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = given("--preset", "look", "--output", str(tmp_path), "--seed", "3")
    saved.save(tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["preset"] == "look"
    monkeypatch.setitem(PRESETS, "look", {EVERY_TASK: {"steps": 99, "batch_size": 99}})
    for flags in ([], ["--preset", "look"]):
        resumed = given("--resume", "--output", str(tmp_path), *flags)
        assert resumed == dataclasses.replace(saved, resume=True)
    other = given("--resume", "--output", str(tmp_path), "--preset", "long")
    assert other.steps == saved.steps
    with pytest.raises(UsageError, match=r"preset = 'long', but the run to resume has 'look'"):
        other.check_resumes(saved)


def test_help_after_a_preset_shows_its_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("preset: look\n")
    for flags in (
        ["--preset", "look", "--help", "all"],
        ["-h", "all", "--config", str(tmp_path / "run.yaml")],
    ):
        with pytest.raises(SystemExit):
            given(*flags)
        words = " ".join(capsys.readouterr().out.split())
        assert "optimizer steps a round (default: 4)" in words and "so many of the prompts" in words


def test_help_after_a_task_shows_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--task", "repetition", "--help"], ["-h", "--task=repetition"]):
        with pytest.raises(SystemExit):
            given(*flags)
        words = " ".join(capsys.readouterr().out.split())
        assert "length of a completion, tokens (default: 128)" in words


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("task", TASK_DEFAULTS)
def test_help_does_not_name_two_defaults_of_a_setting(
    task: str, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        given("--task", task, "--preset", preset, "--help", "all")
    for entry in re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE):
        words = " ".join(entry.split())
        assert words.count("default:") < 2 or "default: the task's or preset's, else" in words


def test_more_required_than_allowed_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match=r"min_new_tokens = 9 .* max_new_tokens = 8"):
        given("--min-new-tokens", "9", "--max-new-tokens", "8")


def test_weights_are_shares_and_guidances_are_numbers() -> None:
    assert Config(quantiles=4, quantile_weights="equal").quantile_shares() == [0.25] * 4
    assert Config(quantiles=4, quantile_weights="extremes").quantile_shares() == [0.5, 0, 0, 0.5]
    assert Config(quantiles=2, quantile_weights="extremes").quantile_shares() == [0.5, 0.5]
    assert Config(quantiles=3, quantile_weights="1, 0, 3").quantile_shares() == [0.25, 0, 0.75]
    assert Config(eval_guidance="3, -2").guidances() == [3.0, -2.0]
    assert Config(eval_guidance="").guidances() == []
    assert Config(eval_guidance="2, 3,2.0, 2e0").guidances() == [2.0, 3.0], "each value is one row"
    default = {rows: Config(eval_rows=rows).guidances() for rows in ("ends", "all", "best")}
    assert default == {"ends": [1.5], "all": [1.5, 2.0], "best": []}


def test_weights_whose_sum_is_infinite_are_refused() -> None:
    """Each would be 0 of it."""
    assert Config(quantiles=3, quantile_weights="8e307,8e307,0").quantile_shares() == [0.5, 0.5, 0]
    with pytest.raises(UsageError, match=r"^quantile_weights = '1e308,1e308,1'; .*a finite sum$"):
        Config(quantiles=3, quantile_weights="1e308,1e308,1").check()


def test_held_out_number_may_be_written_as_any_other_is() -> None:
    assert Config(held_out="1_000").held_out_count() == 1000
    assert Config(held_out="1_000.txt").held_out_count() is None
    for text in ("1__0", "_10", "10_", "1_0.5", "0_0", "1_000_000_000_000"):
        with pytest.raises(UsageError, match=f"^held_out = {text}; give at least 1"):
            Config(held_out=text).check()


@pytest.mark.parametrize(
    ("output", "what"), [("  ", "is blank"), ("\t\n", "is blank"), ("a\0b", "holds a NUL")]
)
def test_folder_that_cannot_be_or_cannot_be_typed_is_refused_in_one_line(output: str, what: str) -> None:
    for refused in (lambda: Config(output=output).check(), lambda: given("--output", output)):
        with pytest.raises(UsageError, match=f"^output = .* {what}") as caught:
            refused()
        assert str(caught.value).isprintable()


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = Config(rounds=2, steps=10, warmup_steps=4)
    factors = [config.decay(step) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] <= 1 / 16 and config.decay(20) == 0


def test_help_shows_the_settings_that_people_use_first(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--help"], ["--resume", "-h"], ["-h", "--steps", "3"]):
        with pytest.raises(SystemExit) as stop:
            given(*flags)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        named = re.findall(r"^  (?:-h, )?(--[\w-]+)", shown, re.MULTILINE)
        own = {"--help", "--version", "--quiet", "--config", "--scorer"}
        assert 16 <= len(set(named) - own) <= 24
        assert {"--task", "--model", "--reward", "--output"} <= set(named)
        assert "--help [all]" in shown and "exit status: 0 done" in shown
        assert "\nloss:" in shown and "\npool:" not in shown, "no heading without a setting below it"
    for unclear in (["--help", "some"], ["--resume", "all"]):
        with pytest.raises(UsageError, match=r"some|all but expected.*; --help all shows every option"):
            given(*unclear)


def test_help_has_each_setting_once_under_the_heading_of_its_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        given("--resume", "--help", "all")
    shown = capsys.readouterr().out
    sections = {part.split(":\n")[0]: part for part in shown.split("\n\n") if ":\n" in part}
    headings = {"prompts": "--prefix-tokens N", "reward": "--scorer NAME", "loss": "--kl-coef X"}
    for heading, flag in (headings | {"help, settings from a file": "--config FILE"}).items():
        assert f"\n  {flag} " in sections[heading]
        assert shown.count(f"\n  {flag} ") == 1
    assert "_" not in shown.split("--prompts PROMPTS")[0].replace("quark_fast.", ""), (
        "one spelling of each flag, and a short usage"
    )


def test_help_names_every_option_with_its_meaning_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        given("--help=all")
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in words.replace("- ", "-")
        # argparse breaks lines at hyphens, too.
        meaning = " ".join(field.metadata["help"].split()).replace("- ", "-")
        assert meaning in words.replace("- ", "-"), field.name
        if field.default in (None, ""):
            assert "default: " in field.metadata["help"], f"{field.name}: what does leaving it out mean?"
        else:
            assert f"(default: {field.default})" in words.replace("- ", "-"), field.name
    assert "--config FILE" in words


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({}, "runs/toxicity"),
        ({"task": "sentiment"}, "runs/sentiment"),
        ({"reward": "toxicity"}, "runs/toxicity"),
        ({"reward": "my_pkg.my_module:score"}, "runs/score"),
        ({"reward": "hf:org/some-name"}, "runs/some-name"),
        ({"reward": "hf:/home/me/scorer"}, "runs/scorer"),
        ({"reward": "1 - hf:org/rude"}, "runs/1-rude"),
        ({"reward": "0.7*toxicity + 0.3*a.b:score"}, "runs/0.7-toxicity-0.3-score"),
        ({"reward": "m:score", "output": "elsewhere"}, "elsewhere"),
        ({"output": "~/elsewhere"}, Path.home() / "elsewhere"),
        ({"output": "~nobody-here/elsewhere"}, "~nobody-here/elsewhere"),
    ],
)
def test_run_is_named_after_the_reward_that_it_has(settings: dict[str, Any], folder: str | Path) -> None:
    assert Config(**settings).output_folder == Path(folder)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert parse(flags, "train").output_folder == Path(folder)


def test_a_pass_on_a_cpu_holds_half_the_samples_in_float32() -> None:
    by_precision = {name: Config(precision=name).samples_a_pass(on_cpu=True) for name in ("bf16", "fp32")}
    assert by_precision == {"bf16": 8, "fp32": 4}
    assert Config(precision="fp32").samples_a_pass(on_cpu=False) == 16
    assert Config(precision="fp32", micro_batch=3).samples_a_pass(on_cpu=True) == 3


@pytest.mark.parametrize("name", ["model", "prompts", "held_out", "reward", "scored", "from_run", "output"])
def test_empty_text_is_no_setting(name: str) -> None:
    """What an unset variable of the shell gives: --model "$MODEL"."""
    with pytest.raises(UsageError, match=rf"^{name} is '', no|^{name} = ''"):
        Config(**{name: ""}).check()
    assert Config(eval_guidance="").guidances() == []


def test_home_folder_is_found_wherever_a_path_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = Config(model="~/model", prompts="~/p.txt", output="~/runs/x", reward="mine:score")
    assert (given.model, given.prompts, given.output) == (
        "/home/me/model",
        "/home/me/p.txt",
        "/home/me/runs/x",
    )
    assert Config(output=Path("~/runs/x")).output == "/home/me/runs/x"
    assert Config(prompts="~root/p.txt").prompts == os.path.expanduser("~root/p.txt") != "~root/p.txt"
