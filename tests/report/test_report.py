import codecs
import dataclasses
import io
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser

import huggingface_hub
import matplotlib
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

from quark_fast.config import Config
from quark_fast.evaluation.summary import MeasuredRow, summarise
from quark_fast.metrics import Change, Sample, as_json, compare, evaluate_samples, judge_measure, unscored_by
from quark_fast.report import columns
from quark_fast.report.columns import columns_of, find_column, format_bounds, format_change, format_value
from quark_fast.report.drawing import Palette
from quark_fast.report.files import read_run
from quark_fast.report.model_card import Base, find_base, model_card
from quark_fast.report.page import comparison_page, render_html, write_report
from quark_fast.report.result_plots import plot_dial
from quark_fast.report.results import cell_of, headline, main_row, name_of, other_names, way_of
from quark_fast.report.tables import before_after, markdown_page, markdown_table, results_table
from quark_fast.report.texts import mask_profanity, pick_examples
from quark_fast.report.training_plots import smooth
from quark_fast.tasks.by_name import find_task

# How much each way of sampling tones the synthetic scores, and its guidance.
SAMPLINGS = {
    "base model": (1.0, None),
    "no token": (0.97, None),
    "worst token": (1.18, 0.0),
    "quantile 1": (1.05, None),
    "quantile 2": (0.95, None),
    "quantile 3": (0.85, None),
    "best token": (0.76, 1.0),
    "guided w=2": (0.64, 2.0),
    "guided w=3": (0.56, 3.0),
    "guided w=6": (0.42, 6.0),
}
QUANTILES = {"worst token": 0, "quantile 1": 1, "quantile 2": 2, "quantile 3": 3, "best token": 4}
TEXT = """the man said that it was a long day and nobody in the house wanted to hear about it again
because she had been right all along which made him feel like a complete idiot so they left early
took the train home read old letters argued laughed and went to bed without dinner"""


def write_run(folder, prompts=120, samples=4, steps=128, rounds=5, quantiles=5, seed=0):
    """A run folder as the trainer leaves it, with numbers of the size that real runs have."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        "task: toxicity\nmodel: smollm2-135m\nquantiles: 5\nbatch: 16\nsteps: 128\n"
        "learning_rate: 0.0003\nreward_token_learning_rate: 0.01\nkl_coef: 0.05\n"
        "entropy_coef: 0.06\nguidance: 3.0\nseed: 0\n"
    )
    versions = {
        "command": ["python", "-m", "quark_fast.train", "--task", "toxicity", "--out", "my run"],
        "python": "3.11.9",
        "torch": "2.13.0+cpu",
        "transformers": "5.23.0",
        "machine": "2 cores, x86_64, no GPU",
        "minutes": 17.4,
    }
    (folder / "versions.json").write_text(json.dumps(versions))
    write_lines(folder / "metrics.jsonl", metric_rows(generator, steps, rounds, quantiles))
    write_lines(folder / "completions.jsonl", completion_rows(generator, rounds, quantiles))

    answers = {
        name: write_samples(generator, prompts, samples, tone) for name, (tone, _) in SAMPLINGS.items()
    }
    rows = []
    for name, (_, guidance) in SAMPLINGS.items():
        change = None
        if name != "base model":
            changes = compare(answers["base model"], answers[name], resamples=300)
            change = {key: as_json(one) for key, one in changes.items()}
        metrics = evaluate_samples(answers[name], resamples=300)
        rows.append(
            {
                "name": name,
                "guidance": guidance,
                "quantile": QUANTILES.get(name),
                "metrics": {key: as_json(one) for key, one in metrics.items()},
                "change": change,
            }
        )
    evaluation = {
        "task": "toxicity",
        "property": "toxicity",
        "scorer": {
            "name": "toxic-comment-classifier",
            "version": "0.3.0",
            "sha256": "e5af0f05" * 8,
        },
        "prompts": prompts,
        "samples_per_prompt": samples,
        "sampling": {"top_p": 0.9, "max_new_tokens": 20, "guidance": 3.0, "seed": 7},
        "rows": rows,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    write_lines(
        folder / "evaluation.jsonl",
        ({"row": name, **vars(one)} for name, found in answers.items() for one in found),
    )
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(generator, count):
    return " " + " ".join(generator.choice(TEXT.split(), count))


def write_samples(generator, prompts, samples, tone):
    # The same heavy-tailed toxicity level for each prompt in every sampling.
    level = np.random.default_rng(99).beta(0.7, 3.2, prompts)
    found = []
    for prompt in range(prompts):
        for _ in range(samples):
            logit = 4 * (level[prompt] - 0.55) + 1.4 * generator.normal() + 2.2 * math.log(tone)
            tokens = int(generator.integers(8, 21))
            nll = tokens * (2.9 + 0.15 * (1 - tone) + 0.35 * generator.normal())
            score = None if generator.random() < 0.004 else 1 / (1 + math.exp(-logit))
            text = words(generator, tokens)
            found.append(Sample(prompt, f"Prompt {prompt}: the man", text, score, nll, tokens))
    return found


def metric_rows(generator, steps, rounds, quantiles):
    places = (np.arange(quantiles) + 0.5) / quantiles
    for index in range(rounds):
        curve = 1 - (1 - places) ** 2.2 * 0.62 * 0.88**index
        yield {
            "kind": "round",
            "round": index,
            "step": index * steps // rounds,
            "samples": 512,
            "unscored": 2,
            "pool": 512 * (index + 1),
            "reward_mean": float(curve.mean() + 0.012 * index),
            "reward_by_quantile": curve.tolist(),
            "thresholds": ((curve[1:] + curve[:-1]) / 2).tolist(),
            "guidance": 3.0,
            "seconds": 61.0,
        }
    for step in range(1, steps + 1):
        nll = 2.55 + 0.5 * math.exp(-step / 30) + 0.12 * generator.normal()
        kl = 0.09 * (1 - math.exp(-step / 40)) + 0.006 * abs(generator.normal())
        entropy = 2.8 - 0.15 * (1 - math.exp(-step / 50)) + 0.05 * generator.normal()
        yield {
            "kind": "step",
            "step": step,
            "round": step * rounds // (steps + 1),
            "loss": nll + 0.05 * kl - 0.06 * entropy,
            "nll": nll,
            "kl": kl,
            "entropy": entropy,
            "grad_norm": 1.4 + 0.3 * abs(generator.normal()),
            "lr": 3e-4,
            "tokens_per_s": 175 + 9 * generator.normal(),
            "seconds": 3.4,
        }
        if step % 16 == 0:
            rho = 0.2 * (1 - math.exp(-step / 50)) + 0.03 * generator.normal()
            yield {
                "kind": "probe",
                "step": step,
                "rank_correlation": rho,
                "standard_error": 0.07,
            }


def completion_rows(generator, rounds, quantiles):
    for index in range(rounds):
        for sample in range(30):
            yield {
                "round": index,
                "step": index * 25,
                "prompt": f"Training prompt {sample}: she told him",
                "completion": words(generator, 16),
                "reward": float(generator.beta(4, 1)),
                "quantile": sample % quantiles,
            }


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "toxicity-0")


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("few") / "small", prompts=12, samples=2, steps=20, rounds=2)


@pytest.fixture
def small_run(few_rows, tmp_path):
    """A copy that a test may damage, with few rows so that it renders fast."""
    return shutil.copytree(few_rows, tmp_path / "small")


@pytest.fixture(scope="session")
def few_page(few_rows, tmp_path_factory):
    """The bytes of the report of such a copy."""
    return write_report(shutil.copytree(few_rows, tmp_path_factory.mktemp("page") / "small")).read_bytes()


def evaluation_of(run_dir):
    return json.loads((run_dir / "evaluation.json").read_text())


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "evaluation.jsonl").read_text().splitlines()]


def rendered(renderable, width=80):
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(renderable)
    return file.getvalue()


def rot13(text):
    return codecs.decode(text, "rot13")


# --- text that a model wrote ----------------------------------------------------------------------


def test_masking_keeps_the_first_letter_and_the_length_in_any_case_and_ending():
    for stem in ("shpx", "ohyyfuvg", "ovgpu"):
        word = rot13(stem)
        for written in (word, word.upper(), word.capitalize() + "ing"):
            masked = mask_profanity(f"you {written}!")
            assert masked == f"you {written[0]}{'*' * (len(written) - 1)}!"


def test_masking_leaves_innocent_words_that_contain_a_bad_one():
    for text in ("Scunthorpe cocktail", "Dickens likes spices", "a raccoon in a classic shuttle"):
        assert mask_profanity(text) == text


def test_an_invisible_character_does_not_hide_a_word_from_the_mask():
    word = rot13("shpx")
    assert "*" in mask_profanity(word[:2] + "\u200b" + word[2:])


# --- reading --------------------------------------------------------------------------------------


def test_a_cut_off_last_line_is_named_and_the_rest_read(small_run):
    with (small_run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    run = read_run(small_run)
    assert len(run.steps) == 20 and len(run.rounds) == 2
    assert run.missing == [
        "metrics.jsonl has 1 unreadable line, first line 24 (a killed run can leave its last line cut off)"
    ]


def test_a_step_repeated_by_a_resumed_run_counts_as_last_written(small_run):
    with (small_run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 20, "loss": 123.0}\n')
    steps = read_run(small_run).steps
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert steps[-1]["loss"] == 123.0


def test_a_folder_that_is_not_there_is_an_error_and_not_an_empty_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")


# --- headline, table, Markdown --------------------------------------------------------------------


def small_evaluation(difference, half_width=0.02, relative=-0.4):
    bounds = {
        "difference": difference,
        "low": difference - half_width,
        "high": difference + half_width,
        "relative": relative,
        "relative_low": relative - 0.1,
        "relative_high": relative + 0.1,
    }
    value = {"value": 0.158, "low": 0.141, "high": 0.175}
    after = {"value": 0.158 + difference, "low": 0.08, "high": 0.11}
    return {
        "property": "toxicity",
        "rows": [
            {"name": "base model", "guidance": None, "metrics": {"mean": value}, "change": None},
            {
                "name": "best token",
                "guidance": 1.0,
                "metrics": {"mean": after},
                "change": {"mean": bounds},
            },
        ],
    }


def test_headline_says_what_the_interval_allows():
    assert headline(small_evaluation(-0.063)) == (
        "Mean toxicity fell by 40% with the best reward token in front: from .158 to .095 "
        "(95% interval −50 to −30%)."
    )
    assert "rose by 12%" in headline(small_evaluation(0.063, relative=0.12))
    unclear = headline(small_evaluation(-0.01, relative=-0.06))
    assert "did not change measurably" in unclear and "fell" not in unclear
    assert headline({}) == ""


def test_a_plain_reward_changes_by_a_difference_since_its_mean_may_be_below_zero():
    evaluation = small_evaluation(-2.5, half_width=0.5, relative=0.16) | {"property": "reward"}
    before, after = evaluation["rows"]
    before["metrics"] = {
        "mean": {"value": -15.0, "low": -16.0, "high": -14.0},
        "share": {"value": 0.0, "low": 0.0, "high": 0.0},
    }
    after["metrics"] = before["metrics"] | {"mean": {"value": -17.5, "low": -18.5, "high": -16.5}}
    assert headline(evaluation) == (
        "Mean reward fell by 2.500 with the best reward token in front: from -15.000 to -17.500 "
        "(95% interval −3.000 to −2.000)."
    )
    for shown in (rendered(results_table(evaluation)), markdown_table(evaluation)):
        assert "−2.500" in shown and "−3.000 to −2.000" in shown and "16%" not in shown
        assert "≥" not in shown and "max" not in shown  # what such a reward has not


def judged_evaluation(judge, base, after):
    """Tables of a plain reward with a judge whose mean goes from ``base`` to ``after``; property as given."""
    name = judge_measure("my:quality")
    spread = np.linspace(-0.1, 0.1, 20)

    def row(row_name, mean):
        scores = [mean + x for x in spread]
        samples = [Sample(i, f"p{i}", "a b c", x, 9.0, 5, {name: x}) for i, x in enumerate(scores)]
        return MeasuredRow(row_name, {}, samples)

    about = {
        "task": "toxicity",
        "property": "reward",
        "headline": "mean",
        "columns": ["mean", "perplexity"],
        "more_columns": [],
        "judges": [{"name": "my:quality", "version": "source", "sha256": "1" * 64, **judge}],
    }
    return summarise([row("base model", base), row("best token", after)], about)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(("base", "after"), [(-2.0, -1.0), (-0.5, 0.5), (0.5, 1.5)])
@pytest.mark.parametrize("judge", [{"property": None}, {}], ids=["plain", "not said"])
def test_a_judge_of_plain_scores_changes_by_a_difference_everywhere(small_run, judge, base, after):
    evaluation = judged_evaluation(judge, base, after)
    run = dataclasses.replace(read_run(small_run), evaluation=evaluation)
    said = "score with the best reward token in front is"
    page = render_html(run)
    shown = {
        "headline": headline(evaluation),
        "page": Page(page).text,
        "card": model_card(run, Config(), Base("b", None, None)).replace("\\", ""),
    }
    for where, text in shown.items():
        assert re.search(rf"{said} \S+ \(\+1\.000, 95% interval \+1\.000 to \+1\.000\)", text), where
    cells = re.findall(r'<i class="\w+">(.*?)</i>', page)
    assert cells == ["+1.000", "+1.000", "0%"], "of reward, judge and perplexity"
    for one in (markdown_page(evaluation), rendered(results_table(evaluation))):
        assert "+1.000" in one and "%" not in one.replace("95%", "")


def test_a_judge_of_a_property_changes_in_percent():
    found = headline(judged_evaluation({"property": "harm"}, 0.5, 0.25))
    assert "harm with the best reward token in front is .250 (−50%, 95% interval −" in found


def task_run(folder, task, score_of):
    """A run of one of the other tasks, its base model's row and its best token's."""
    write_run(folder, prompts=30, samples=2)
    before, after = ([score_of(prompt, after) for prompt in range(30)] for after in (False, True))
    rows = []
    for name, samples in (("base model", before), ("best token", after)):
        metrics = evaluate_samples(samples, resamples=200)
        change = None if samples is before else compare(before, samples, resamples=200)
        rows.append(
            {
                "name": name,
                "guidance": 1.0 if change else None,
                "metrics": {key: as_json(one) for key, one in metrics.items()},
                "change": change and {key: as_json(one) for key, one in change.items()},
            }
        )
    evaluation = evaluation_of(folder) | {
        "task": task.name,
        "target": "negative",
        "headline": task.headline,
        "columns": list(task.columns),
        "more_columns": list(task.more_columns),
        "property": "positivity" if task.name == "sentiment" else task.name,
        "rows": rows,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


def sentiment_sample(prompt, after):
    has_it = float((prompt * 7) % 10 < (8 if after else 4))
    of_class = ("negative", "neutral", "positive")[prompt % 3]
    measures = {"target": has_it, f"target_{of_class}": has_it}
    return Sample(prompt, f"p{prompt}", "a b c d", 0.5, 60.0, 20, measures)


def repetition_sample(prompt, after):
    rep = (0.2 if after else 0.7) + 0.002 * prompt
    measures = {"rep2": rep, "rep3": rep, "rep4": rep, "diversity": (1 - rep) ** 3, "distinct": 31.0}
    return Sample(prompt, f"p{prompt}", "a b c d", 0.5, 60.0, 20, measures, 88.0 + 5 * after + prompt, 12, 20)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("name", ["sentiment", "repetition"])
def test_another_task_has_its_own_headline_columns_and_meanings(tmp_path, name):
    task = find_task(name, "negative")
    evaluation = task_run(tmp_path, task, sentiment_sample if name == "sentiment" else repetition_sample)
    sentence = headline(evaluation)
    text = rendered(results_table(evaluation), 80)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    table = markdown_table(evaluation)
    page = write_report(tmp_path).read_text()
    if name == "sentiment":
        assert sentence.startswith("Share negative rose by 100% ") and "from 40.0% to 80.0%" in sentence
        assert "negative on positive prompts" in table and "negative on positive prompts" in page
        assert "on pos." in text and "on neg." not in text, "the prompts that ask for a change"
        assert "change of share negative" in table
    else:
        assert sentence.startswith("Repeated 4-grams fell by ") and "from 72.9% to 22.9%" in sentence
        assert "accuracy on text" in table and "right.</dd>" in page
        assert "text ppl" in text and "different tokens" in page
    for foreign in ("expected max", "probability"):
        assert foreign not in table and foreign not in page
    assert "nan" not in page.lower().replace("nano", "")
    assert "<strong>" in page, "the tiles are there"


def test_terminal_has_dist_3_where_no_ordinary_text_was_read():
    columns = list(find_task("toxicity", "").columns)
    known, lacking = ({"columns": found} for found in (columns, [c for c in columns if "text" not in c]))
    shown, without = ([c.key for c in columns_of(table, more=False)] for table in (known, lacking))
    assert shown == ["mean", "expected_max", "perplexity", "prompt_fit", "text_perplexity"]
    assert without == ["mean", "expected_max", "perplexity", "prompt_fit", "dist3"]
    assert {"dist3", "text_perplexity"} <= {c.key for c in columns_of(known)}


def test_headline_without_an_interval_claims_no_fall():
    evaluation = small_evaluation(-0.063)
    evaluation["rows"][1]["change"] = None
    assert headline(evaluation).endswith("mean toxicity went from .158 to .095.")


def test_bounds_below_0_have_one_minus_sign_each_and_no_dash_between() -> None:
    assert format_bounds(0.12, 0.34, "2 digits") == ".12–.34"
    assert format_bounds(-16.79, -15.02, "2 digits") == "-16.79 to -15.02"
    assert format_bounds(-0.02, 0.01, "2 digits") == "-.02 to .01"


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("prompts", "note"),
    [
        (5, "5 prompts are too few for an interval, which takes 8: no change is told from chance."),
        (20, "20 prompts: a 95% interval of so few holds the true value in some 90 of 100 cases."),
        (50, ""),
    ],
)
def test_intervals_of_few_prompts_are_not_there_or_told_of_everywhere(tmp_path, prompts, note):
    run = read_run(write_run(tmp_path, prompts=prompts, samples=2, steps=4, rounds=1))
    evaluation = run.evaluation
    shown = {
        "terminal": " ".join(rendered(results_table(evaluation)).split()),
        "markdown": markdown_table(evaluation),
        "page": Page(render_html(run)).text,
        "card": model_card(run, Config(), Base("b", None, None)).replace("\\", ""),
    }
    for where, text in shown.items():
        assert (" ".join(note.split()) in text) if note else ("prompts: a 95%" not in text), where
        if where in ("terminal", "page"):
            assert ("95% bootstrap interval over" in text) == (prompts > 5), where
    sentence, cells = headline(evaluation), results_table(evaluation).columns[2].cells
    assert "Perplexity with it is " in sentence, "the price is named either way"
    if prompts == 5:
        assert sentence.startswith("5 prompts tell no change from chance. ")
        assert "interval" not in sentence and "mean toxicity went from ." in sentence
        assert not any("bold" in str(span.style) for cell in cells for span in cell.spans)
    else:
        assert "95% interval" in sentence


def unscored_evaluation(*unscored):
    """The rows base model and best token; those named have no score."""
    rows = []
    for name in ("base model", "best token"):
        score = None if name in unscored else 0.5
        samples = [Sample(i, f"p{i}", "a b c", score, 9.0, 5) for i in range(8)]
        rows.append(MeasuredRow(name, {}, samples))
    scorer = {"name": "my:score", "version": "source", "sha256": "0" * 64}
    return summarise(rows, {"task": "toxicity", "property": "reward", "headline": "mean", "scorer": scorer})


@pytest.mark.usefixtures("no_plots")
def test_result_without_any_score_is_said_to_have_none(small_run):
    evaluation = unscored_evaluation("base model", "best token")
    said = (
        "Nothing was scored: my:score source gave none of the completions a score (None or NaN for each), so"
        " nothing here says how good they are."
    )
    assert headline(evaluation) == (
        f"{said} Perplexity with the best reward token in front is 6.0 (0%, 95% interval 0 to 0)."
    )
    run = dataclasses.replace(read_run(small_run), evaluation=evaluation)
    assert f"<h1>{said}</h1>" in render_html(run)
    assert said in model_card(run, Config(), Base("b", None, None)).replace("\\", "")
    judged = headline(evaluation | {"judges": [{"name": "my:judge"}]})
    assert "so judges alone say how good they are" in judged
    for name in ("base model", "best token"):
        partly = headline(unscored_evaluation(name))
        assert partly.startswith(f"Not everything was scored: in “{name}” my:score source gave none of the")
        assert "mean reward" not in partly.lower() and "–" not in partly


def test_headline_says_what_the_fall_costs():
    evaluation = small_evaluation(-0.063)
    before, after = evaluation["rows"]
    before["metrics"] = before["metrics"] | {"perplexity": {"value": 19.1, "low": 18.0, "high": 20.0}}
    after["metrics"] = after["metrics"] | {"perplexity": {"value": 33.8, "low": 31.0, "high": 36.0}}
    dear = {"difference": 14.7, "low": 12.0, "high": 18.0}
    after["change"]["perplexity"] = dear | {"relative": 0.77, "relative_low": 0.65, "relative_high": 0.9}
    said = "Perplexity with it is 33.8 (+77%, 95% interval +65 to +90)."
    assert headline(evaluation).endswith(f"(95% interval −50 to −30%). {said}")
    del after["change"]["perplexity"]
    assert "erplexity" not in headline(evaluation), "not known against the base model"


def test_the_headline_row_is_the_runs_own_guidance_and_not_the_best_result(finished_run):
    evaluation = evaluation_of(finished_run)
    assert main_row(evaluation)["name"] == "guided w=3"  # w = 6 has less toxicity
    best = next(row for row in evaluation["rows"] if row["name"] == "best token")["metrics"]["mean"]["value"]
    alone = f"without it, by the best token alone, it is {best:.3f} (".replace("0.", ".")
    assert "That takes guidance (--guidance 3 of quark_fast.generate, guidance=3 of" in headline(evaluation)
    assert alone in headline(evaluation), "both, with what each needs"
    evaluation["sampling"] = {"guidance": 1.0}  # of --eval-guidance 1,2,3
    assert main_row(evaluation)["name"] == "best token"
    evaluation["sampling"] = {}
    assert main_row(evaluation)["name"] == "guided w=2"  # the first one
    evaluation["rows"] = [row for row in evaluation["rows"] if "guided" not in row["name"]]
    assert main_row(evaluation)["name"] == "best token"


def test_the_table_fits_80_columns_whole(finished_run):
    table = results_table(evaluation_of(finished_run))
    text = rendered(table, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for name in SAMPLINGS:
        assert name in text
    mean = evaluation_of(finished_run)["rows"][0]["metrics"]["mean"]
    assert f"{mean['value']:.3f}"[1:] in text
    assert f"{mean['low']:.3f}–{mean['high']:.3f}".replace("0.", ".") in text


def judged_by(evaluation, count):
    """The evaluation with so many judges, whose means differ."""
    names = [f"j{n}" for n in range(1, count + 1)]
    judges = [{"name": name, "property": "harm", "version": "1", "sha256": "0" * 64} for name in names]
    rows = []
    for row in evaluation["rows"]:
        means = {
            judge_measure(name): {"value": n / 8, "low": n / 9, "high": n / 7}
            for n, name in enumerate(names, 1)
        }
        rows.append({**row, "metrics": row["metrics"] | means})
    return evaluation | {"rows": rows, "judges": judges}


@pytest.mark.parametrize("width", [200, 80, 60, 40])
@pytest.mark.parametrize("judges", [0, 1, 2, 3])
@pytest.mark.parametrize("factor", [1, 1e6])
def test_no_width_cuts_a_number_or_the_name_of_a_row(finished_run, width, judges, factor):
    evaluation = judged_by(evaluation_of(finished_run), judges)
    if factor > 1:  # a plain reward of any size
        evaluation = json.loads(json.dumps(evaluation | {"property": "reward"}))
        for row in evaluation["rows"]:
            for of in (row["metrics"]["mean"], (row["change"] or {}).get("mean", {})):
                of.update({key: factor * value for key, value in of.items()})
    text = rendered(results_table(evaluation), width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    words = text.split()
    for row in evaluation["rows"]:
        cells = [cell_of(evaluation, row, column) for column in columns_of(evaluation, more=False)]
        for number in [cell.value for cell in cells] + [cell.bounds for cell in cells] + [cells[0].change]:
            assert not number or number in words, (row["name"], number)
        parts = sum(line.strip("─ ") == "" and "─" in line for line in text.splitlines())
        name = row["name"] if width == 200 else row["name"].split()[0]
        assert text.count(name) >= parts, "each part of the table names its rows"


def test_several_judges_are_told_apart_by_numbers(finished_run):
    text = rendered(results_table(judged_by(evaluation_of(finished_run), 2)), 80)
    assert re.search(r"\bjudge 1 +judge 2\b", text), "their headings"
    assert "Judge 1: harm by j1 1, sha256 0" in text and "Judge 2: harm by j2 1, sha256 0" in text
    alone = rendered(results_table(judged_by(evaluation_of(finished_run), 1)), 80)
    assert "Judge: harm by j1 1" in alone and "judge 1" not in alone


@pytest.mark.usefixtures("no_plots")
def test_completions_that_a_judge_gave_no_number_are_told_of_under_every_form(finished_run):
    evaluation = judged_by(evaluation_of(finished_run), 2)
    for row, share in zip(evaluation["rows"], (0.384, 0.1), strict=False):
        row["metrics"] |= {unscored_by(judge_measure("j2")): {"value": share}}
    most = max(row["metrics"]["unscored"]["value"] for row in evaluation["rows"])
    for text in (
        Page(comparison_page(evaluation, [], {})).text,
        markdown_page(evaluation),
        " ".join(rendered(results_table(evaluation)).split()),
    ):
        assert f"Unscored and left out: at most {100 * most:.1f}% of a row." in text
        assert "Unscored by judge 2 and left out: at most 38.4% of a row." in text
        assert "Unscored by judge 1" not in text


def test_long_names_of_runs_keep_their_way_and_stay_apart(finished_run):
    long = "toxicity-HuggingFaceTB-SmolLM2-135M-Instruct-lr0.0005-r16-q5-contrast1.0-kl1.0-s"
    runs = [f"{long}0", f"{long}1", "x" + long[1:] + "1", long[:9] + "x" + long[10:] + "1"]
    ways = ["best token", "guided w=2", "worst token"]
    table, _ = several(finished_run, ["base model", *(f"{run}: {way}" for run in runs for way in ways)])
    shown = [name_of(row) for row in table["rows"]]
    assert len(set(shown)) == len(shown) and max(map(len, shown)) < 80
    assert [way_of(name) for name in shown] == ["base", *["best", "guided", "worst"] * 4]
    assert {name.rpartition(": ")[0][-13:] for name in shown[1:]} == {"t1.0-kl1.0-s0", "t1.0-kl1.0-s1"}
    assert other_names(table) == [f"{run}: best token" for run in runs], "as the samples have them"
    judged = table | {"judges": [{"name": "j"}], "trained_by": {run: ["j"] for run in runs[:2]}}
    (meaning,) = (column.meaning for column in columns_of(judged) if "judge" in column.key)
    assert "kl1.0-s0 and " in meaning and "kl1.0-s1." in meaning


def test_braces_in_the_name_of_a_run_or_of_a_judge_are_shown_as_they_are(finished_run):
    evaluation = judged_by(evaluation_of(finished_run), 1) | {"trained_by": {"lr={1e-4}": ["j1"]}}
    assert "was in the reward that trained lr={1e-4}." in Page(comparison_page(evaluation, [], {})).text
    evaluation["judges"][0]["name"] = "{x}"
    assert "harm by {x}" in markdown_page(evaluation)


@pytest.mark.parametrize("value", [2e-5, 4.25e-4, -6e-7])
def test_small_rewards_are_shown_in_three_digits(value):
    shown = format_value(value, "3 digits")
    assert float(shown) == pytest.approx(value, rel=5e-3) and len(shown) <= 9
    change = Change(value, value / 2, value * 2, math.nan, math.nan, math.nan)
    number, bounds = format_change(change, find_column("mean"), {"property": "reward"})
    found = [float(part.replace("−", "-")) for part in (number, *bounds.split(" to "))]
    assert found == pytest.approx([value, value / 2, value * 2], rel=5e-3)
    assert format_value(1e-17, "3 digits") == format_value(0.0, "3 digits") == ".000", "rounding"
    assert format_value(0.0004, "2 digits") == ".00", "of a property, from 0 to 1"


def test_kl_from_0_is_a_difference_and_no_percentage():
    change = Change(0.68, 0.37, 1.01, 7e6, 3e6, 1e7)
    assert format_change(change, find_column("base_kl"), {}) == ("+.680", "+.370 to +1.010")


def test_only_a_change_that_excludes_zero_is_bold():
    def bold(evaluation):
        cells = results_table(evaluation).columns[2].cells
        return ["bold" in str(span.style) for cell in cells for span in cell.spans]

    assert any(bold(small_evaluation(-0.063)))
    assert not any(bold(small_evaluation(-0.01)))


def test_markdown_has_equal_columns_and_intervals(finished_run):
    evaluation = evaluation_of(finished_run)
    evaluation["rows"][1]["name"] = "no | token"
    table, under = markdown_table(evaluation).split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 2 + len(SAMPLINGS)
    assert "Scorer: toxic-comment-classifier 0.3.0, sha256 e5af0f05" in under
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    assert re.match(r"\| base model \| \.\d{3} \[\.\d{3}–\.\d{3}\] \|  \|", lines[2])


# --- several models -------------------------------------------------------------------------------


def several(finished_run, names):
    """The table and samples of ``evaluate`` with rows of these names, made from the first rows of a run's."""
    evaluation = evaluation_of(finished_run)
    ways = {row["name"]: row for row in evaluation["rows"]}
    of = {name: name.rpartition(": ")[2] for name in names}
    of = {name: way if way in ways else "best token" for name, way in of.items()} | {names[0]: "base model"}
    rows = [{**ways[way], "name": name, "prefix": "<|endoftext|>"} for name, way in of.items()]
    if of[names[-1]] == "best token":  # a plain model is on no dial
        rows[-1] |= {"guidance": None, "quantile": None}
    rows[-1]["prefix"] = ""
    table = {
        **evaluation,
        "perplexity": {"model": "gpt2-xl", "tokens": "re-tokenised"},
        "source": "rtp.jsonl",
        "trained_on": {"a": 1, "b": 7},
        "rows": rows,
    }
    table["out_of_domain"] = {**table, "source": "stories.jsonl"}
    old = rows_of(finished_run)
    samples = [{**row, "row": name} for name, way in of.items() for row in old if row["row"] == way]
    return table, samples


RUNS = ["base model", "a: no token", "a: worst token", "a: best token", "a: guided w=2", "b: guided w=2"]


@pytest.mark.usefixtures("no_plots")
def test_scorer_with_its_hash_prefixes_and_perplexity_model_stand_under_every_form(finished_run):
    table, samples = several(finished_run, RUNS)
    repetition = rendered(results_table(table | {"columns": ["mean", "text_perplexity"]}))
    assert "Perplexity:" not in repetition, "of a column that is not there"
    page = Page(comparison_page(table, samples, {})).text
    markdown = markdown_page(table).replace("\\", "")
    terminal = " ".join(rendered(results_table(table)).split())
    for text in (page, markdown, terminal):
        assert f"Scorer: toxic-comment-classifier 0.3.0, sha256 {'e5af0f05' * 8}." in text
        assert "Perplexity: by gpt2-xl, of the re-tokenised tokens." in text
        assert "<|endoftext|> (base model, a); nothing (b)." in text
        assert "1 of these prompts was trained on by a." in text
        assert "7 of these prompts were trained on by b." in text
    for text in (page, markdown):
        assert "Out of domain: Mean toxicity on 120 prompts of stories.jsonl" in text
        assert text.count("Scorer: ") == 2


def test_rows_with_the_names_of_runs_fit_80_columns_whole(finished_run):
    long = "toxicity-with-a-name-that-is-too-long-for-a-table"
    table, _ = several(finished_run, [*RUNS[:-1], f"{long}: guided w=2"])
    text = rendered(results_table(table), 80)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "\na: " in text and "a: no token" not in text, "the run's name stands above the way"
    mean = table["rows"][-1]["metrics"]["mean"]
    assert f"{mean['low']:.3f}–{mean['high']:.3f}".replace("0.", ".") in text


def test_dials_of_two_runs_are_not_one_curve(finished_run):
    one, samples = several(finished_run, [name for name in RUNS if "b:" not in name])
    two, more = several(finished_run, RUNS)
    assert "The guidance dial" in comparison_page(one, samples, {})
    page = comparison_page(two, more, {})
    assert "The guidance dial" not in page and "Each way of sampling" in page


@pytest.mark.usefixtures("no_plots")
def test_plain_models_have_a_headline_and_texts_without_a_reward_token(finished_run):
    # Names that hold the words of a run's rows are not taken for those.
    table, samples = several(finished_run, ["gpt2", "best-of-worst"])
    assert main_row(table)["name"] == "best-of-worst"
    assert headline(table).startswith("Mean toxicity ") and "“best-of-worst”" in headline(table)
    page = Page(comparison_page(table, samples, {"command": "python -m quark_fast.evaluate gpt2"}))
    assert "against gpt2 on the same prompts" in page.text
    assert "the quarter where gpt2 scored worst" in page.text
    alone, _ = several(finished_run, ["gpt2"])
    mean = alone["rows"][0]["metrics"]["mean"]
    low, high = (f"{mean[side]:.3f}"[1:] for side in ("low", "high"))
    assert headline(alone) == (
        f"Mean toxicity of gpt2 is {mean['value']:.3f} (95% interval {low}–{high}).".replace("0.", ".", 1)
    )


def test_names_from_anywhere_are_no_markup_in_markdown(finished_run):
    table, _ = several(finished_run, ["gpt2", "x"])
    table |= {"source": "<img src=x>|[a](b).txt"}
    for text in (markdown_page(table), markdown_table(table)):
        assert "<img" not in text.replace("\\<", "") and "](" not in text.replace("\\](", "").replace(
            "]\\(", ""
        )


def test_a_count_of_trained_prompts_that_is_none_is_left_out(finished_run):
    table, _ = several(finished_run, RUNS)
    shown = markdown_table(table | {"trained_on": {"a": "many", "b": 7}})
    assert "7 of these prompts were trained on by b." in shown and "many" not in shown


# --- before and after -----------------------------------------------------------------------------


def test_examples_come_from_the_worst_quarter_and_pair_sample_numbers(finished_run):
    rows = rows_of(finished_run)
    peaks = {}
    for row in rows:
        if row["row"] == "base model" and row["score"] is not None:
            peaks[row["prompt"]] = max(row["score"], peaks.get(row["prompt"], 0.0))
    quarter = sorted(peaks.values(), reverse=True)[:30]
    examples = pick_examples(rows, 4, after=["guided w=6"])
    assert len({example.prompt for example in examples}) == 4
    for example in examples:
        (_, before, score), (control, again, _), (name, after, _) = example.texts
        assert score == peaks[example.prompt] and score in quarter and name == "guided w=6"
        of_prompt = [row for row in rows if row["prompt"] == example.prompt]
        texts = {
            name: [row["completion"] for row in of_prompt if row["row"] == name]
            for name in ("base model", "guided w=6")
        }
        number = texts["base model"].index(before)
        assert texts["guided w=6"][number] == after
        assert control == "base model, again"
        assert again == texts["base model"][(number + 1) % len(texts["base model"])]


def test_the_worst_texts_of_a_plain_reward_are_those_of_the_lowest(finished_run):
    rows = [row for row in rows_of(finished_run) if row["score"] is not None]
    lowest = {}
    for row in rows:
        if row["row"] == "base model":
            lowest[row["prompt"]] = min(row["score"], lowest.get(row["prompt"], math.inf))
    examples = pick_examples(rows, 4, lowest=True)
    assert len(examples) == 4
    quarter = sorted(lowest.values())[: -(-len(lowest) // 4)]
    assert all(example.texts[0][2] == lowest[example.prompt] for example in examples)
    assert all(example.texts[0][2] in quarter for example in examples)


def hostile_rows(completion):
    rows = [("base model", 0.9), ("best token", 0.2), ("guided w=3", 0.1)]
    return [
        {"row": n, "prompt_id": 1, "prompt": "The man", "completion": completion, "score": s} for n, s in rows
    ]


def test_terminal_texts_are_masked_unless_asked_and_never_steer_the_terminal():
    word = rot13("shpx")
    rows = hostile_rows(f" said\n\x1b[2J{word} [red]you[/red]")
    shown = rendered(before_after(rows))
    assert word not in shown and f"said {word[0]}*** [red]you[/red]" in shown
    unmasked = rendered(before_after(rows, mask=False))
    assert word in unmasked and "\x1b" not in shown + unmasked


def test_terminal_texts_fold_to_the_width_and_say_when_there_are_none():
    assert max(map(len, rendered(before_after(hostile_rows("a" * 300))).splitlines())) <= 80
    assert "No before and after texts" in rendered(before_after([]))
    one, *others = hostile_rows("x")
    assert "(again)" not in rendered(before_after([one, *others])), "each row has one completion"
    assert "(again) is the control" in rendered(before_after([one, one, *others]))
    unscored = [{**row, "score": None} for row in hostile_rows("x")]
    shown = rendered(before_after(unscored))
    assert "nan" not in shown and "spread over all" in shown


@pytest.mark.usefixtures("no_plots")
def test_page_says_of_its_texts_what_is_there(small_run):
    run = read_run(small_run)

    def note(rows):
        text = " ".join(Page(render_html(dataclasses.replace(run, evaluation_rows=rows))).text.split())
        return text[text.index("Prompts spread over") : text.index("these texts are an illustration")]

    one, *others = hostile_rows("x")
    assert "(again)" in note([one, one, *others]) and "(again)" not in note([one, *others])
    assert "where the base model scored worst" in note([one, *others])
    unscored = [{**row, "score": None} for row in (one, one, *others)]
    assert "worst" not in note(unscored)
    assert note(unscored).startswith("Prompts spread over all, as no completion has a score.")
    assert "(again) is the control. The table" in note(unscored)


# --- the page -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what the tests ask about and checks that tags close in order."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = set(), [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="session")
def report(finished_run):
    return write_report(finished_run).read_text()


def test_the_page_is_whole_and_shows_every_section(report, finished_run):
    page = Page(report)
    rounds = len(read_run(finished_run).rounds)
    assert f"From round {rounds}:" in page.text, "counted from 1, as in the terminal"
    for heading in ("Before and after", "What it writes", "How it learned", "How to reproduce"):
        assert heading in page.text
    assert "python -m quark_fast.train --task toxicity --out 'my run'" in page.text
    assert "quantile 4 (best)" in page.text and "not complete" not in page.text
    labels = [value for key, value in page.attributes if key == "aria-label"]
    assert len(labels) == 11
    for dial in ("quantile", "guidance"):
        assert f"mean toxicity over the {dial}" in labels and f"perplexity over the {dial}" in labels


@pytest.mark.parametrize(
    ("dial", "at"), [("quantile", [0, 1, 2, 3, 4]), ("guidance", [0.0, 1.0, 2.0, 3.0, 6.0])]
)
def test_a_dials_curve_goes_through_the_tables_numbers_in_order(finished_run, monkeypatch, dial, at):
    drawn = []
    original = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot",
        lambda axes, *given, **more: drawn.append(given) or original(axes, *given, **more),
    )
    run = read_run(finished_run)
    rows = {row[dial]: row["metrics"] for row in run.evaluation["rows"] if row.get(dial) is not None}
    assert sorted(rows) == at
    for metric in ("mean", "perplexity"):
        drawn.clear()
        assert plot_dial(run, Palette(5), dial, metric)
        assert drawn[0] == (at, [rows[place][metric]["value"] for place in at])
        bars = [given for given in drawn[1:] if isinstance(given[0], list)]
        assert bars == [([p, p], [rows[p][metric]["low"], rows[p][metric]["high"]]) for p in at]


def test_the_ends_alone_are_points_of_the_guidance_dial_and_no_curve_over_quantiles(finished_run):
    run = read_run(finished_run)
    ends = [row for row in run.evaluation["rows"] if not row["name"].startswith("quantile")]
    run = dataclasses.replace(run, evaluation=run.evaluation | {"rows": ends})
    assert plot_dial(run, Palette(5), "guidance", "mean")
    assert not plot_dial(run, Palette(5), "quantile", "mean")


def test_the_page_loads_nothing_from_anywhere(report):
    page = Page(report)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image"}
    links = [value for key, value in page.attributes if key in ("src", "href", "xlink:href")]
    assert links and all(link.startswith("#") for link in links)
    assert "http:" not in report and "https:" not in report and "@import" not in report


def test_ids_are_unique_and_every_reference_finds_its_own(report):
    ids = re.findall(r'\sid="([^"]+)"', report)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', report)) <= set(ids)


def test_plots_follow_the_theme_by_variables_that_both_themes_define(report):
    assert "#0a0b" not in report
    used = set(re.findall(r"var\((--[\w-]+)\)", report))
    light, dark = report.split("prefers-color-scheme: dark", 1)
    for name in used - {"--accent"}:
        assert f"{name}:" in light and f"{name}:" in dark


def test_offensive_texts_stay_folded_behind_a_warning(report, finished_run):
    (example, *_) = pick_examples(rows_of(finished_run), 10)
    before = example.texts[0][1].strip()
    shown = re.sub(r"<details>.*?</details>", "", report, flags=re.DOTALL)
    assert before in report and before not in shown
    assert "may contain offensive language" in report


def test_planted_markup_is_shown_as_text_wherever_it_comes_from(small_run, tmp_path):
    planted = "<script>alert(1)</script>\"'><img src=x onerror=y>$\\frac{$ {{ 7 * 7 }}"
    evaluation = evaluation_of(small_run)
    evaluation["property"] = evaluation["task"] = planted
    evaluation["scorer"] = {"name": planted, "version": planted}
    evaluation["sampling"] = {planted: planted}
    for row in evaluation["rows"]:
        row["name"] += planted
    (small_run / "evaluation.json").write_text(json.dumps(evaluation))
    rows = [
        {**r, "row": r["row"] + planted, "prompt": planted, "completion": planted + "\x1b[2J\ud800"}
        for r in rows_of(small_run)
    ]
    write_lines(small_run / "evaluation.jsonl", rows)
    samples = [{"round": 0, "prompt": planted, "completion": planted, "reward": 1, "quantile": 0}]
    write_lines(small_run / "completions.jsonl", samples)
    (small_run / "config.yaml").write_text(planted)
    (small_run / "versions.json").write_text(json.dumps({planted: planted, "command": planted}))
    with (small_run / "metrics.jsonl").open("a") as file:
        file.write(planted)
    folder = small_run.rename(tmp_path / "<script>run")

    text = write_report(folder).read_text()
    page = Page(text)
    assert not page.tags & {"script", "img"}
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7 * 7 }}" in page.text, "what a file holds is no template"
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("absent", "stays"),
    [
        (["evaluation.json", "evaluation.jsonl"], "How it learned"),
        (["metrics.jsonl", "completions.jsonl", "config.yaml"], "Before and after"),
    ],
)
def test_a_run_that_stopped_early_shows_what_there_is(small_run, absent, stays):
    for name in absent:
        (small_run / name).unlink()
    page = Page(write_report(small_run).read_text())
    assert stays in page.text and "This run is not complete." in page.text
    for name in absent:
        assert f"{name} is not there" in page.text


def test_an_empty_folder_and_broken_json_still_give_a_page(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"rows": [')
    (tmp_path / "versions.json").write_text("[1]")
    page = Page(write_report(tmp_path).read_text())
    assert "This run has no result yet: 0 steps recorded." in page.text
    assert "evaluation.json is not JSON" in page.text
    assert "versions.json holds no JSON object" in page.text


def test_missing_numbers_are_dashes_and_not_crashes(tmp_path):
    run_dir = write_run(tmp_path / "one", prompts=1, samples=1, steps=1, rounds=1, quantiles=1)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 2, "loss": NaN, "nll": null}\n')
        file.write('{"kind": "round", "round": 1, "step": 2, "reward_mean": Infinity}\n')
        file.write('{"kind": "probe", "step": 2, "rank_correlation": 0.1}\n')
    evaluation = evaluation_of(run_dir)
    evaluation["rows"].append({"name": "guided w=9"})
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    page = Page(write_report(run_dir).read_text())
    assert "–" in page.text and "nan" not in page.text.lower()
    assert "nan" not in rendered(results_table(evaluation)).lower()
    assert "nan" not in markdown_table(evaluation).lower()


def test_the_page_is_replaced_whole_or_not_at_all(small_run, few_page, monkeypatch):
    path = small_run / "report.html"
    path.write_bytes(few_page)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("quark_fast.report.page.render_html", lambda _: "another page")
    monkeypatch.setattr("quark_fast.files.atomic.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(small_run)
    assert path.read_bytes() == few_page
    assert not list(small_run.glob(".report*"))


def test_plotting_neither_changes_nor_hangs_on_matplotlibs_global_state(small_run, few_page, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now raises
    # Reading "backend" would choose one, by importing pyplot.
    names = [name for name in matplotlib.rcParams if name != "backend"]
    settings = [matplotlib.rcParams[name] for name in names]
    assert write_report(small_run).read_bytes() == few_page, "the same run gives the same bytes"
    assert [matplotlib.rcParams[name] for name in names] == settings


# --- smoothing ------------------------------------------------------------------------------------


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert smooth(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))
    ramp = smooth(np.arange(400.0))
    assert ramp[0] == 0.0
    # An average over 20 steps lags a ramp by decay / (1 - decay) = 19 steps.
    assert ramp[-1] == pytest.approx(399 - 19, abs=1e-3)


def test_smoothing_steps_over_a_missing_value():
    values = np.array([math.nan, 1.0, math.nan, 1.0])
    assert smooth(values)[1:] == pytest.approx([1.0, 1.0, 1.0])
    assert math.isnan(smooth(values)[0])


@pytest.mark.usefixtures("no_plots")
def test_page_tells_how_a_resumed_run_began_and_where_it_was_resumed(small_run):
    first = {
        "command": "python -m quark_fast.train --task toxicity",
        "machine": "here",
        "time": "2026-01-01",
        "step": 0,
    }
    later = {
        "command": "python -m quark_fast.train --resume",
        "machine": "there",
        "time": "2026-01-02",
        "step": 7,
    }
    (small_run / "versions.json").write_text(json.dumps(first | {"starts": [first, later]}))
    page = Page(write_report(small_run).read_text())
    assert "python -m quark_fast.train --task toxicity" in page.text
    assert "from step 7: python -m quark_fast.train --resume (there)" in page.text


# --- The model card -------------------------------------------------------------------------------


def card_of(run_dir, base=None, **settings):
    return model_card(read_run(run_dir), Config(**settings), base or find_base(None))


def test_card_names_base_model_and_licence_for_the_hub_and_shows_the_tables(finished_run):
    card = ModelCard(card_of(finished_run))
    assert card.data.to_dict() == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quark", "unlearning", "quark_fast"],
    }
    evaluation = evaluation_of(finished_run)
    assert markdown_table(evaluation) in card.text
    assert "to write less toxicity" in card.text and "apache-2.0" in card.text
    assert f"guidance={evaluation['sampling']['guidance']:g})" in card.text


def test_card_of_a_run_without_guided_rows_speaks_of_no_guidance(small_run):
    evaluation = evaluation_of(small_run)
    evaluation["rows"] = [row for row in evaluation["rows"] if "guided" not in row["name"]]
    (small_run / "evaluation.json").write_text(json.dumps(evaluation))
    text = card_of(small_run)
    assert "pipeline(" in text and "custom_generate" not in text


def test_card_shows_settings_that_are_no_defaults_and_no_folder_of_this_machine(small_run, tmp_path):
    prompts = tmp_path / "secret-folder" / "prompts.jsonl"
    prompts.parent.mkdir()
    prompts.touch()
    text = card_of(small_run, prompts=str(prompts), contrast_margin=7.5, output=str(tmp_path), seed=3)
    settings = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `"))
    assert settings == {"`prompts`": "prompts.jsonl", "`contrast_margin`": "7.5", "`seed`": "3"}
    assert "secret-folder" not in text
    other = card_of(small_run, task="sentiment", preset="look")
    assert [line for line in other.splitlines() if line.startswith("| `")] == [
        "| `task` | sentiment |",
        "| `preset` | look |",
    ]
    none = card_of(small_run)
    assert "Its settings are the defaults of" in none and "| setting |" not in none


def test_no_line_of_a_card_has_a_folder_of_this_machine(small_run, tmp_path):
    run = read_run(small_run)
    evaluation = judged_by(run.evaluation, 1)
    judge = {"name": "hf:/home/ann/judges/clf", "property": "harm", "version": "source", "sha256": "0" * 64}
    for row in evaluation["rows"]:
        row["metrics"][judge_measure(judge["name"])] = row["metrics"].pop(judge_measure("j1"))
    evaluation |= {
        "judges": [judge],
        "scorer": {"name": "mine:good + 0.1*hf:/home/ann/clf", "version": "source", "sha256": "1" * 64},
        "perplexity": {"model": "/home/ann/models/base", "tokens": "sampled"},
        "source": "/home/ann/p.txt",
        "trained_on": {"~/runs/one": 3},
        "cut": {"by": [{"model": "/home/ann/models/base", "prompts": 2, "tokens": 9}]},
        "rows": [{**row, "prefix": "</s>[/INST]"} for row in evaluation["rows"]],
    }
    kept = {"why": "Round 2 of 4 was kept: lowest hf:/home/ann/judges/clf on 8 prompts."}
    evaluation |= {"out_of_domain": dict(evaluation), "kept_round": kept}
    run = dataclasses.replace(run, evaluation=evaluation)
    text = model_card(run, Config(reward="hf:/home/ann/clf,hf:/clf"), Base("b", None, None)).replace("\\", "")
    assert "ann" not in re.findall(r"\w+", text) and "home" not in text and "~/" not in text
    for shown in (
        "harm by hf:clf",
        "By hf:clf, which took no part",
        "Judge: harm by hf:clf source",
        "Scorer: mine:good + 0.1*hf:clf source",
        "Perplexity: by base, of the sampled tokens",
        "of p.txt",
        "trained on by one.",
        "9 tokens for base.",
        "lowest hf:clf on 8 prompts",
        "| hf:clf,hf:clf |",
        "</s>[/INST]",
        "https://arxiv.org/abs/2205.13636",
    ):
        assert shown in text, shown


def test_card_counts_completions_without_a_score_apart(small_run):
    rounds = [{"samples": 1000, "unscored": 30}, {"samples": 200, "unscored": 0}, {"samples": 50}]
    run = dataclasses.replace(read_run(small_run), rounds=rounds)
    assert "1,220 scored completions, 30 more without a score," in model_card(run, Config(), find_base(None))
    run = dataclasses.replace(run, rounds=rounds[1:])
    assert "250 scored completions, 20" in model_card(run, Config(), find_base(None))


def test_card_of_a_reward_of_ones_own_is_not_tagged_as_unlearning(small_run):
    assert "- unlearning\n" in card_of(small_run)
    evaluation = evaluation_of(small_run)
    evaluation["property"] = "reward"
    (small_run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "- unlearning\n" not in card_of(small_run)


def test_card_keeps_mark_up_of_names_as_text(small_run):
    evaluation = evaluation_of(small_run)
    evaluation["property"] = "<b>x</b>|y"
    (small_run / "evaluation.json").write_text(json.dumps(evaluation))
    text = card_of(small_run, Base("a_b*c", None, None, "it has <none>"))
    assert "a\\_b\\*c" in text and "\\<b\\>x\\</b\\>\\|y" in text
    assert "not known here: it has \\<none\\>." in text
    assert "license" not in text.split("---")[1] and "base_model" not in text.split("---")[1]


@pytest.mark.parametrize(
    ("given", "words", "fields"),
    [
        ("license: [mit, apache-2.0]", "mit, apache-2.0", {"license": ["mit", "apache-2.0"]}),
        (
            "license: Proprietary (c) ACME",
            "Proprietary (c) ACME",
            {"license": "other", "license_name": "proprietary-c-acme"},
        ),
        (
            "license: other\nlicense_name: qwen-research\nlicense_link: LICENSE",
            "qwen-research",
            {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"},
        ),
        ("base_model: [a/b]\ntags: [quark_fast]", None, {}),
    ],
)
def test_licence_of_the_base_model_is_one_that_the_hub_takes(tmp_path, small_run, given, words, fields):
    (tmp_path / "README.md").write_text(f"---\n{given}\n---\n# Mine\n")
    base = find_base(str(tmp_path))
    assert (base.licence, base.licence_fields) == (words, fields)
    assert base.hub_name == (None if words else "a/b")
    header = yaml.safe_load(card_of(small_run, base).split("---")[1])
    assert {key: value for key, value in header.items() if key.startswith("license")} == fields


def test_base_model_and_licence_come_from_its_own_card(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    assert find_base(str(folder)) == Base("mine", None, None, "it has no card here")
    gone = find_base(str(tmp_path / "gone"))
    assert (gone.shown, gone.hub_name) == ("gone", None), "removed since"
    (folder / "README.md").write_text(
        "---\nlicense: mit\nbase_model: org/first\ntags: [quark_fast]\n---\n# Mine\n"
    )
    monkeypatch.chdir(folder)
    fields = {"license": "mit"}
    assert find_base(".") == Base("mine", "org/first", "mit", "its card names none", fields), (
        "as the card has it"
    )
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert find_base(str(folder)).licence is None and "could be read" in find_base(str(folder)).why
    (folder / "README.md").write_text("# no header\n")
    assert find_base(str(folder)) == Base("mine", None, None, "its card names none")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = find_base("some-org/not-in-the-cache")
    assert (found.hub_name, found.licence) == ("some-org/not-in-the-cache", None)
    assert found.why in ("it has no card here", "it has no card that could be read"), "no exception's name"


@pytest.mark.parametrize(
    ("fraction", "shown"), [(-0.997, "−99.7%"), (-0.9999, "−99.9%"), (-1.0, "−100%"), (0.997, "+100%")]
)
def test_a_fall_that_is_not_whole_is_not_shown_as_one(fraction, shown):
    assert columns._format_percent(fraction) == shown
