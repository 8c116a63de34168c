"""A grid's table for the terminal and for Markdown."""

from __future__ import annotations

from typing import Any

from quark_fast.report.columns import fill, find_column, intervals_note, is_plain
from quark_fast.report.results import BASE, scorer_line


def headline_title(results: dict[str, Any]) -> str:
    """What the headline metric is called."""
    return fill(find_column(results["headline"]).title, results)


def perplexity_title(results: dict[str, Any]) -> str:
    return "perplexity of text" if results["perplexity_of"] == "text_perplexity" else "perplexity"


def table(results: dict[str, Any]) -> list[list[str]]:
    """The results as texts, a heading first; mean over the seeds, and with several +- their deviation.

    What is not known is empty.
    """
    before = results[BASE]
    named = {point["run"]: point["value"] for point in reversed(results["points"])} | {"base": "base"}
    change = _difference if is_plain(find_column(results["headline"]), results) else _percent
    return [
        [
            "axis",
            "point",
            headline_title(results),
            "change against the base model",
            "difference from",
            "difference",
            perplexity_title(results),
            "dist-3",
            "KL",
            "probe",
        ],
        [
            "",
            BASE,
            _number(before["headline"], 3),
            *[""] * 3,
            _number(before["perplexity"], 1),
            _number(before["dist3"], 2),
            *[""] * 2,
        ],
        *(_line(point, change(point["change"]), named) for point in results["points"]),
    ]


def short_table(results: dict[str, Any]) -> list[list[str]]:
    """The same for a terminal of 80 columns: six of its columns, each bracket on a line of its own."""
    head, *lines = table(results)
    made = [["axis", "point", head[2], "change", "difference", head[6]]]
    for axis, point, headline, change, against, difference, perplexity, *_ in lines:
        of_other = f"\nfrom {against}" if against not in ("", "base") else ""
        made.append([axis, point, headline, change, difference + of_other, perplexity])
    return [[cell.replace(" [", "\n[").replace(" (", "\n(") for cell in line] for line in made]


def _line(point: dict[str, Any], change: str, named: dict[str, str]) -> list[str]:
    def shown(key: str, digits: int) -> str:
        return _number(point["mean"][key], digits, point["deviation"][key])

    dearer = _percent(point["perplexity_change"]).partition(" ")[0]
    return [
        point["axis"],
        point["value"] + (" (base)" if point["run"] == "base" else ""),
        shown("headline", 3),
        change,
        "" if point["difference"] is None else named[point["against"]],
        "" if point["difference"] is None else _difference(point["difference"]),
        f"{shown('perplexity', 1)}{f' ({dearer})' if dearer else ''}",
        shown("dist3", 2),
        shown("kl", 3),
        shown("rank_correlation", 2),
    ]


def _number(value: float | None, digits: int, deviation: float | None = None) -> str:
    if value is None:
        return ""
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{value:.{digits}f}{spread}"


def _percent(change: dict[str, Any]) -> str:
    values = (change["relative"], change["relative_low"], change["relative_high"])
    middle, low, high = ("" if value is None else f"{100 * value:+.0f}" for value in values)
    return f"{middle}%{_bounds(low, high)}" if middle else ""


def _difference(change: dict[str, Any]) -> str:
    values = (change["difference"], change["low"], change["high"])
    middle, low, high = ("" if value is None else f"{value:+.3f}" for value in values)
    return f"{middle}{_bounds(low, high)}" if middle else ""


def _bounds(low: str, high: str) -> str:
    """Empty where an interval is not known: few prompts, or none with a score in some resample."""
    return f" [{low}, {high}]" if low and high else ""


def markdown(results: dict[str, Any]) -> str:
    """``ablations.md``: the table and what its columns are."""
    head, *lines = table(results)
    seeds = ", ".join(map(str, results["seeds"]))
    perplexity = (
        "Perplexity of text: the model's own on the held-out texts, its token in front."
        if results["perplexity_of"] == "text_perplexity"
        else "Perplexity: of the completions under the base model."
    )
    several = " (mean ± standard deviation over the seeds)" if len(results["seeds"]) > 1 else ""
    few = f" {note}" if (note := intervals_note(results["prompts"])) else ""
    versions = results["versions"]
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            f"Under the best token alone (w = 1); seeds {seeds}{several}; {results['prompts']} held-out"
            f" prompts, {results['samples_per_prompt']} completions each. In brackets 95% bootstrap intervals"
            f" over prompts, paired by prompt.{few} {perplexity}"
            " KL: of the policy under the best token from the base model, exact, nats a token, on the"
            " base model's completions. Probe: rank correlation of reward and"
            " log p(best) - log p(worst) there.",
            "",
            scorer_line(results),
            "",
            f"`{versions['command']}`, {versions['machine']}, {versions['minutes']:.0f} minutes.",
            "",
        ]
    )
