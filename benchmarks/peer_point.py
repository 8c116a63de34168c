"""One point of ``peers.py``: a model trained by one method within a budget, and measured as every other.

A method's function is given a ``Point`` and leaves a model in its folder. What counts as its minutes is the
CPU time of sampling, scoring and learning: not loading, and not the evaluation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.evaluation.held_out import evaluate
from quark_fast.evaluation.saved_tables import read_table
from quark_fast.evaluation.table_rows import TableRow
from quark_fast.metrics import Sample
from quark_fast.model.loading import load_reference
from quark_fast.model.policy import Policy
from quark_fast.model.rounding import stochastic_rounding
from quark_fast.report.results import BASE
from quark_fast.rollout.sampling import Conditioning, DrawnBatch, SampleRequest
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.distributed import Processes
from quark_fast.runtime.machine import quiet_libraries, set_threads, settled_precision, versions
from quark_fast.runtime.memory import keep_freed_memory
from quark_fast.runtime.run_folder import COMPLETIONS, RunFolder
from quark_fast.training.progress import Progress
from quark_fast.training.run_prompts import Given
from quark_fast.training.setup import Setup
from quark_fast.training.start import set_up
from quark_fast.training.trainer import Trainer


@dataclass(frozen=True)
class Point:
    """What is trained, and how it is measured.

    Attributes:
        minutes: CPU time to train for, of the methods of others; ours takes what its steps take.
        settings: the method's own, which are tuned.
        split: whose prompts it is measured on, "development" or "test".
    """

    task: str
    method: str
    minutes: float
    settings: dict[str, Any]
    seed: int
    split: str
    folder: Path
    threads: int

    def config(self, **settings: Any) -> Config:
        return Config(
            task=self.task,
            evaluate_on=self.split,
            seed=self.seed,
            threads=self.threads,
            output=str(self.folder / "run"),
            **settings,
        )


def completions_of(config: Config) -> int:
    """Completions that ours samples of a training prompt; methods that learn from a pool get as many."""
    return config.initial_samples + (config.rounds - 1) * config.explore_samples


class Clock:
    """CPU time of this process since it was started, in minutes."""

    def __init__(self) -> None:
        self.begun = time.process_time()

    @property
    def minutes(self) -> float:
        return (time.process_time() - self.begun) / 60


@dataclass
class Trained:
    """What a method left.

    Attributes:
        minutes: CPU time that it took. scored: completions that the reward scored.
        rows: its rows' samples by name, where it has measured itself; else ``model`` is to be measured.
    """

    minutes: float
    scored: int
    model: Path | None = None
    rows: dict[str, list[Sample]] = dataclasses.field(default_factory=dict)


# --------------------------------------------------------------------- ours


def quark(point: Point, **settings: Any) -> Trained:
    """Our trainer with its own number of steps, whatever the minutes; its own evaluation measures it."""
    config = point.config(eval_rows="ends", **settings)
    spent: list[float] = []

    def listen(progress: Progress) -> None:
        if progress.stage.startswith(("classifying", "evaluating")) and not spent:
            spent.append(clock.minutes)

    trainer = Trainer(config, listen=listen)
    clock = Clock()
    folder = trainer.train().folder
    scored = len((folder / COMPLETIONS).read_text().splitlines())
    rows = read_table(folder / "evaluation.json").samples[""]
    return Trained(spent[0], scored, rows={name: rows[name] for name in rows if name != BASE})


# What the paper's method has in place of ours, at our sizes: equal quantiles, a small KL, no contrast. A step
# has one stream in place of two, so there are more of them in about the same time.
PAPER = {
    "quantile_weights": "equal",
    "contrast_coef": 0.0,
    "kl_coef": 0.05,
    "entropy_coef": 0.06,
    "steps": 44,
}


# --------------------------------------------------------------------- TRL's


class UntilSpent(TrainerCallback):
    """Ends a training when its budget is spent; the step size rises over its first tenth, and falls linearly.

    Args:
        spent: the share of the budget that is, from 0 to 1.
    """

    def __init__(self, spent: Callable[[], float], rate: float) -> None:
        self.spent, self.rate = spent, rate

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        spent = self.spent()
        left, warm = max(0.0, 1.0 - spent), min(1.0, 0.1 + 9 * spent)
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = self.rate * left * warm

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = self.spent() >= 1.0
        return control


def common(point: Point, setup: Setup) -> dict[str, Any]:
    """Arguments that all of TRL's trainers are given."""
    return {
        "output_dir": str(point.folder / "trl"),
        "use_cpu": setup.device.type == "cpu",
        "bf16": setup.sampling_dtype == torch.bfloat16,
        "learning_rate": point.settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_steps": 100_000,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "seed": point.seed,
        "report_to": [],
        "logging_steps": 5,
        "save_strategy": "no",
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }


def base_and_tokenizer() -> tuple[Any, Any]:
    """The base model, all of whose weights are trained in float32.

    With adapters TRL is no faster here: its decoding runs through them and takes twice the time.
    """
    source = assets.default_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), tokenizer


def finish(point: Point, trainer: Any, tokenizer: Any) -> Path:
    """The trained model as a transformers folder, in float32."""
    records = [json.dumps(row) + "\n" for row in trainer.state.log_history]
    (point.folder / "log.jsonl").write_text("".join(records))
    trainer.accelerator.unwrap_model(trainer.model).float().save_pretrained(point.folder / "model")
    tokenizer.save_pretrained(point.folder / "model")
    return point.folder / "model"


def front(setup: Setup) -> str:
    """What stands before every prompt, as a text."""
    text: str = setup.policy.tokenizer.decode(setup.policy.prefix)
    return text


def online(point: Point, setup: Setup, kind: str, equal_samples: bool = False) -> Trained:
    """GRPO or RLOO, 32 completions a step in groups of 8, for the point's minutes.

    Args:
        equal_samples: for as many completions as ours samples instead, whatever time that takes. The setting
            ``samples`` gives another number: as many as a try of a faster machine had.
    """
    import trl
    from datasets import Dataset

    config, before = setup.config, front(setup)
    model, tokenizer = base_and_tokenizer()
    scored, enough = 0, point.settings.get("samples", 0)
    if equal_samples:
        enough = len(setup.prompts.train) * completions_of(config)

    def spent() -> float:
        return scored / enough if enough else clock.minutes / point.minutes

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        nonlocal scored
        scored += len(completions)
        rows = [{"prompt": prompt.removeprefix(before)} for prompt in prompts]
        # A completion that the scorer leaves out is worth nothing.
        return np.nan_to_num(setup.reward(rows, completions), nan=0.0).tolist()

    arguments = common(point, setup) | {
        "beta": point.settings["beta"],
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": 0,
        "generation_kwargs": {"min_new_tokens": config.min_new_tokens},
    }
    made = trl.GRPOConfig(**arguments) if kind == "GRPO" else trl.RLOOConfig(**arguments)
    trainer_type = trl.GRPOTrainer if kind == "GRPO" else trl.RLOOTrainer
    clock = Clock()
    trainer = trainer_type(
        model=model,
        reward_funcs=reward,
        args=made,
        train_dataset=Dataset.from_list([{"prompt": before + row["prompt"]} for row in setup.prompts.train]),
        processing_class=tokenizer,
        callbacks=[UntilSpent(spent, point.settings["learning_rate"])],
    )
    trainer.train()
    return Trained(clock.minutes, scored, finish(point, trainer, tokenizer))


def pool(point: Point, setup: Setup) -> list[list[tuple[str, float]]]:
    """The base model's completions of each training prompt with their rewards, those that have one."""
    prompts, config = setup.prompts, setup.config
    count = completions_of(config)
    request = SampleRequest(prompts.train_ids, Conditioning(), setup.round_sampling(0), count, config.seed)
    found: list[list[tuple[str, float]]] = [[] for _ in prompts.train]
    for indices, drawn, *_ in sample(setup.policy, setup.reference, request):
        for i, group in zip(indices, drawn, strict=True):
            texts = [setup.policy.decode(ids, prompts.train_ids[i]) for ids in group]
            values = setup.reward([prompts.train[i]] * len(texts), texts)
            found[i] += [(t, float(v)) for t, v in zip(texts, values, strict=True) if not np.isnan(v)]
    return found


def offline(point: Point, setup: Setup, kind: str) -> Trained:
    """DPO on each prompt's best and worst sample; KTO on the best and worst fifth; RAFT on the best fifth."""
    import trl
    from datasets import Dataset

    before, clock = front(setup), Clock()
    found = pool(point, setup)
    scored = len(setup.prompts.train) * completions_of(setup.config)
    rows: list[dict[str, Any]] = []
    every = [
        (value, before + row["prompt"], text)
        for row, group in zip(setup.prompts.train, found, strict=True)
        for text, value in group
    ]
    low, high = np.quantile([value for value, *_ in every], [0.2, 0.8])
    if kind == "DPO":
        for row, group in zip(setup.prompts.train, found, strict=True):
            by_reward = sorted(group, key=lambda one: one[1])
            if len(group) > 1 and by_reward[0][1] < by_reward[-1][1]:
                worst, best = by_reward[0][0], by_reward[-1][0]
                rows.append({"prompt": before + row["prompt"], "chosen": best, "rejected": worst})
    elif kind == "KTO":
        ends = [one for one in every if one[0] <= low or one[0] >= high]
        rows = [{"prompt": p, "completion": t, "label": bool(v >= high)} for v, p, t in ends]
        # KTO's trainer reads rows in order, and its KL is of neighbours, which must not share their prompt.
        np.random.default_rng(point.seed).shuffle(rows)  # type: ignore[arg-type]
    else:
        rows = [{"prompt": p, "completion": t} for v, p, t in every if v >= high]
    model, tokenizer = base_and_tokenizer()
    arguments = common(point, setup) | {"per_device_train_batch_size": 16}
    if "beta" in point.settings:
        arguments["beta"] = point.settings["beta"]
    types: dict[str, tuple[Any, Any]] = {
        "DPO": (trl.DPOTrainer, trl.DPOConfig),
        "KTO": (trl.KTOTrainer, trl.KTOConfig),
        "RAFT": (trl.SFTTrainer, trl.SFTConfig),
    }
    trainer_type, config_type = types[kind]
    trainer = trainer_type(
        model=model,
        args=config_type(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[UntilSpent(lambda: clock.minutes / point.minutes, point.settings["learning_rate"])],
    )
    trainer.train_dataset = without_ends(trainer.train_dataset, tokenizer.eos_token_id)
    trainer.train()
    return Trained(clock.minutes, scored, finish(point, trainer, tokenizer))


def without_ends(rows: Any, end: int) -> Any:
    """Tokenized rows of TRL's without the end of text that it puts after every completion.

    Nearly all completions were cut at their last token, and the model would learn to stop there.
    """

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        lists = {name: ids for name, ids in row.items() if isinstance(ids, list) and name != "prompt_ids"}
        assert all(ids[-1] == end for name, ids in lists.items() if name.endswith("_ids")), lists.keys()
        return {name: ids[:-1] for name, ids in lists.items()}

    return rows.map(cut)


def as_it_is(point: Point, setup: Setup) -> Trained:
    """The base model as it is."""
    return Trained(0.0, 0, assets.default_model())


def best_of(point: Point, setup: Setup, count: int) -> Trained:
    """The base model, of whose completions the scorer chooses the best of so many: nothing is trained, but
    each text that is shown costs so many that are sampled and scored."""
    reward, rows = setup.reward, setup.prompts.held_out.rows

    def sample_best(
        policy: Policy, model: Any, request: SampleRequest, done: Container[int] = ()
    ) -> Iterator[DrawnBatch]:
        samples = request.samples
        rows_of_one = request.sampling.rows  # as many prompts a batch as otherwise, and as many side by side
        sampling = dataclasses.replace(request.sampling, rows=rows_of_one * count, at_once=rows_of_one)
        # No own_nll: what is chosen from q's draws is not drawn from q.
        not_told = {"own_nll": False, "model_nll": False}
        more = dataclasses.replace(request, samples=samples * count, sampling=sampling, **not_told)
        for indices, drawn, *_ in sample(policy, model, more, done):
            found = []
            for i, group in zip(indices, drawn, strict=True):
                texts = [policy.decode(ids, request.prompts[i]) for ids in group]
                values = np.nan_to_num(reward([rows[i]] * len(texts), texts), nan=-np.inf)
                found.append([group[s + int(values[s::samples].argmax()) * samples] for s in range(samples)])
            yield DrawnBatch(indices, found)

    row = TableRow(f"best of {count}", base=True)
    measured = evaluate(
        setup.measured_on(setup.prompts.held_out, setup.held_out_sampling(), sample_best),
        None,
        [row],
        setup.task.measures,
    )
    return Trained(0.0, 0, rows={row.name: [one for _, part in measured for one in part]})


@dataclass(frozen=True)
class Method:
    """A method, and the settings that are tried for it on development prompts.

    Attributes:
        train: given a set-up beside the point, unless it is ours, which makes its own.
    """

    train: Callable[..., Trained]
    tries: Sequence[dict[str, Any]] = ({},)
    ours: bool = False


def _tries(beta: float, *rates: float) -> list[dict[str, Any]]:
    return [{"learning_rate": rate, "beta": beta} for rate in rates]


# The methods with a beta have four tries each, around what earlier tables chose, whose warm-up of ten steps
# left the online ones two thirds of the step size that they have now.
METHODS = {
    "base": Method(as_it_is),
    "best of 4": Method(functools.partial(best_of, count=4)),
    "ours": Method(quark, ours=True),
    "Quark as published": Method(
        functools.partial(quark, **PAPER),
        [{"learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3)],
        ours=True,
    ),
    "GRPO": Method(functools.partial(online, kind="GRPO"), _tries(0.05, 7e-5, 1e-4, 1.5e-4, 2e-4)),
    "GRPO with equal samples": Method(
        functools.partial(online, kind="GRPO", equal_samples=True),
        # Smaller ones: what is right for 18 steps is too much for 80.
        _tries(0.05, 3e-5, 4e-5, 7e-5, 1e-4),
    ),
    "RLOO": Method(functools.partial(online, kind="RLOO"), _tries(0.05, 1e-4, 1.5e-4, 2e-4, 3e-4)),
    "DPO": Method(
        functools.partial(offline, kind="DPO"), [*_tries(0.1, 4e-5, 8e-5), *_tries(0.3, 4e-5, 8e-5)]
    ),
    "KTO": Method(functools.partial(offline, kind="KTO"), _tries(0.3, 8e-5, 1.2e-4, 1.6e-4, 2.4e-4)),
    "RAFT": Method(
        functools.partial(offline, kind="RAFT"), [{"learning_rate": rate} for rate in (1e-5, 4e-5, 1e-4)]
    ),
}


def measure(setup: Setup, name: str, folder: Path) -> list[Sample]:
    """The completions of a model as it is, with what our run's evaluation has before every prompt."""
    model = load_reference(folder, torch.float32, setup.device)
    if setup.sampling_dtype != torch.float32:
        # As our export: rounded to the nearest, a short training is half undone.
        rounded = stochastic_rounding(setup.sampling_dtype)
        for weights in model.parameters():
            weights.data = rounded(weights.data)
    batches = evaluate(
        setup.measured_on(setup.prompts.held_out, setup.held_out_sampling()),
        model,
        [TableRow(name)],
        setup.task.measures,
    )
    return [one for _, part in batches for one in part]


def run(point: Point) -> None:
    """Train, measure and write ``result.json`` with the samples behind it, ``samples.jsonl``."""
    quiet_libraries()
    keep_freed_memory()
    set_threads(point.threads)
    method = METHODS[point.method]
    begun = time.monotonic()
    if method.ours:
        trained = method.train(point, **point.settings)
    else:
        config = point.config()
        config.precision = settled_precision(config.precision)
        setup = set_up(config, RunFolder(point.folder / "run"), Processes.join(), config, None, Given())
        trained = method.train(point, setup)
        if trained.model is not None:
            trained.rows[point.method] = measure(setup, point.method, trained.model)
    with (point.folder / "samples.jsonl").open("w") as file:
        for row, samples in trained.rows.items():
            file.writelines(json.dumps({"row": row, **vars(one)}) + "\n" for one in samples)
    record = {
        "method": point.method,
        "settings": point.settings,
        "seed": point.seed,
        "split": point.split,
        "budget": point.minutes,
        "minutes": round(trained.minutes, 2),
        "wall_minutes": round((time.monotonic() - begun) / 60, 2),
        "scored": trained.scored,
        "threads": point.threads,
        "versions": versions(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    scratch = point.folder / "result.tmp"
    scratch.write_text(json.dumps(record, indent=1))
    scratch.rename(point.folder / "result.json")
