"""``quark_fast.report RUN RUN``: runs on one page."""

from __future__ import annotations

import dataclasses
import html
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import PROMPTS, SHORT, even_words, small

from quark_fast.report.__main__ import main
from quark_fast.training.trainer import Trainer

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two runs that compare, and one that was not evaluated."""
    from conftest import save_tiny_model

    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny_model(folder / "tiny", "llama")
    config = small(folder / "weak", model, **SHORT | {"rounds": 2}, kl_coef=3.0)
    others = [
        dataclasses.replace(config, output=str(folder / "strong"), kl_coef=0.1),
        dataclasses.replace(config, output=str(folder / "unseen"), eval=False),
    ]
    made = [
        Trainer(one, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4]).train().folder
        for one in (config, *others)
    ]
    return made[0], made[1], made[2]


def shown(page: Path) -> str:
    return html.unescape(page.read_text())


def test_runs_stand_in_one_table_with_curves_settings_and_texts(
    runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, strong, _ = map(str, runs)
    page = tmp_path / "both.html"
    assert main([weak, strong, "--output", str(page)]) == 0, capsys.readouterr().err
    text = shown(page)
    assert re.search(r"<tr><th>kl_coef</th><td>3.0</td><td>0.1</td></tr>", text)
    assert not re.search(r"<tr><th>(output|rounds|reward)</th>", text)
    rows = re.findall(r'<tr><th><span class="dot".*?</span>(.*?)</th>', text)
    assert {"weak: best token", "strong: best token"} <= set(rows) and len(rows) == len(set(rows))
    assert sum("base model" in row for row in rows) == 1, "both have the same base model"
    for figure in ("rewards", "probe", "steps"):
        (svg,) = re.findall(rf'<svg(?:(?!</svg>).)*id="{figure}-(?:(?!</svg>).)*</svg>', text, re.S)
        assert ">weak<" in svg and ">strong<" in svg
    articles = re.findall(r"<article>.*?</article>", text, re.S)
    assert articles
    for article in articles:
        assert "weak: best token" in article and "strong: best token" in article
    assert "<h1>2 runs side by side</h1>" in text, "no row of one of them is the headline"
    assert "No common table" not in text and "not complete" not in text


def test_runs_without_a_common_table_are_shown_apart_and_why(
    runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, _, unseen = map(str, runs)
    page = tmp_path / "apart.html"
    assert main([weak, unseen, "--output", str(page)]) == 0
    assert "no common table: unseen: not evaluated" in capsys.readouterr().err
    text = shown(page)
    assert "No common table: " in text and "2 runs side by side" in text
    assert re.search(r"<tr><th>eval</th><td>True</td><td>False</td></tr>", text)
    assert "<h2>weak</h2>" in text and "<h2>unseen</h2>" not in text
    assert 'id="steps-' in text


def test_settings_of_another_version_are_shown_as_they_stand_in_its_file(
    runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, strong, _ = runs
    older, page = Path(shutil.copytree(strong, tmp_path / "older")), tmp_path / "both.html"
    lines = (older / "config.yaml").read_text().splitlines()
    lines = [line for line in lines if not line.startswith(("kl_horizon:", "hub_private_repo:"))]
    lines = ["kl: forward" if line.startswith("kl:") else line for line in lines]
    (older / "config.yaml").write_text("\n".join([*lines, "gone_setting: 3"]))
    assert main([str(weak), str(older), "--output", str(page)]) == 0, capsys.readouterr().err
    text = shown(page)
    kept = re.search(r"^kl_horizon: (.*)$", (weak / "config.yaml").read_text(), re.M)
    assert kept is not None
    assert f"<tr><th>kl_horizon</th><td>{kept[1]}</td><td>not there</td></tr>" in text
    assert "<tr><th>gone_setting</th><td>not there</td><td>3</td></tr>" in text
    assert "<tr><th>kl</th><td>policy_ref</td><td>forward</td></tr>" in text
    assert "<tr><th>kl_coef</th><td>3.0</td><td>0.1</td></tr>" in text
    assert "<th>hub_private_repo</th>" not in text and "<th>rounds</th>" not in text
    (older / "config.yaml").write_text("")
    assert main([str(weak), str(older), "--output", str(page)]) == 2
    assert f"{older}/config.yaml: needs 'setting: value' lines" in capsys.readouterr().err


def test_what_cannot_be_compared_or_written_is_refused_in_one_line(
    runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, strong, _ = map(str, runs)
    own = Path(weak) / "report.html"
    before = own.read_bytes()

    def refused(*arguments: str) -> str:
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "name it by --output FILE.html" in refused(weak, strong)
    assert "named twice" in refused(weak, weak, "--output", str(tmp_path / "x.html"))
    assert "no run folder" in refused(weak, str(tmp_path), "--output", str(tmp_path / "x.html"))
    assert "the run's own report.html" in refused(weak, strong, "--output", str(own))
    assert "give a name in .html" in refused(weak, strong, "--output", str(tmp_path / "x.txt"))
    assert "no such folder" in refused(weak, strong, "--output", str(tmp_path / "none" / "x.html"))
    assert "is for several runs" in refused(weak, "--output", str(tmp_path / "x.html"))
    assert own.read_bytes() == before and not list(tmp_path.glob("x.*"))
