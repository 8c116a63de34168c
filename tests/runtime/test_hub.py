"""Uploading a finished model to a hub that stands on this machine, or refuses, or is not there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub, serving
from huggingface_hub import constants
from tiny_runs import PROMPTS, SHORT, even_words, small

from quark_fast.errors import NotUploaded, UsageError
from quark_fast.runtime.hub import check_repository, upload
from quark_fast.runtime.run_folder import RunFolder
from quark_fast.training.trainer import Trainer

Make = Callable[..., Path]
# The client's own, of httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has Git LFS alone
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trainer(folder: Path, model: Path, **settings: Any) -> Trainer:
    config = small(folder, model, **(SHORT | {"eval": False} | settings))
    return Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4])


def test_run_ends_with_its_whole_model_folder_in_the_repository(
    hub: Hub, tmp_path: Path, tiny_model: Make
) -> None:
    one = trainer(tmp_path / "run", tiny_model(), push_to_hub="me/kind", hub_private_repo=True)
    assert hub.repositories == {"me/kind": {}}, "it is made before the long work"
    folder = one.train().folder
    assert hub.repositories["me/kind"] == files_of(folder / "model")
    assert {"README.md", "model.safetensors", "custom_generate/generate.py"} <= hub.repositories[
        "me/kind"
    ].keys()
    assert hub.private == {"me/kind": True}


def test_adapter_of_a_repository_names_no_folder_of_this_machine(
    hub: Hub, tmp_path: Path, tiny_model: Make
) -> None:
    model = tiny_model()
    named = {"lora_rank": 4, "export_adapter": True}
    for given, base in (({"push_to_hub": "me/kind"}, model.name), ({}, str(model))):
        folder = trainer(tmp_path / f"run{len(given)}", model, **named, **given).train().folder
        about = json.loads((folder / "model" / "adapter" / "adapter_config.json").read_text())
        assert about["base_model_name_or_path"] == base
    assert not any(str(model).encode() in content for content in hub.repositories["me/kind"].values())


def test_repository_that_is_there_is_written_to_and_public_is_what_the_hub_decides(
    hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("first")
    for text in ("first", "second"):
        (tmp_path / "README.md").write_text(text)
        check_repository("kind", private=False)
        assert upload(tmp_path, "kind", private=False) == f"{hub.endpoint}/me/kind"
        assert hub.repositories == {"me/kind": {"README.md": text.encode()}}
    assert hub.private == {"me/kind": False}


def test_what_refuses_is_found_before_the_work_in_one_line(
    hub: Hub, tmp_path: Path, tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UsageError, match=r"push_to_hub = 'you/kind': the token may not write there \(You don't"
    ):
        trainer(tmp_path / "run", tiny_model(), push_to_hub="you/kind")
    assert not (tmp_path / "run").exists()
    hub.repositories["you/kind"] = {}
    with pytest.raises(UsageError, match=r"may not write there \(You have no right to write here\); give"):
        check_repository("you/kind", private=False)
    for wrong in ("a/b/c", "no spaces"):
        with pytest.raises(UsageError, match=f"push_to_hub = '{wrong}': .*"):
            check_repository(wrong, private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UsageError, match=r"the hub knows no such token; log in by `hf auth login`") as error:
        check_repository("me/kind", private=False)
    assert "\n" not in str(error.value)


def test_hub_that_is_down_is_found_before_the_work(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:9 says Connect\w+: ") as error:
        check_repository("me/kind", private=False)
    assert "\n" not in str(error.value)


def test_run_goes_on_where_there_is_no_hub_and_says_so(
    hub: Hub,
    tmp_path: Path,
    tiny_model: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model()
    trainer(tmp_path / "run", model, push_to_hub="me/kind")  # and its process is gone
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    one = trainer(tmp_path / "run", model, push_to_hub="me/kind", resume=True)
    assert "http://127.0.0.1:9 says Connect" in caplog.text and "tries the upload at its end" in caplog.text
    with pytest.raises(NotUploaded, match="the run is finished, but its model is not uploaded"):
        one.train()


def test_failed_upload_leaves_a_finished_run_and_the_command_that_uploads_it_later(
    hub: Hub, tmp_path: Path, tiny_model: Make
) -> None:
    hub.broken = 413
    one = trainer(tmp_path / "a run", tiny_model(), push_to_hub="me/kind")
    with pytest.raises(
        NotUploaded, match=r"the run is finished, but its model is not uploaded \(.*413"
    ) as error:
        one.train()
    model = tmp_path / "a run" / "model"
    assert RunFolder(model.parent).finished and (model / "README.md").exists()
    assert hub.repositories == {"me/kind": {}}
    (later,) = re.findall(r"`(.*?)` uploads it", str(error.value))
    hub.broken = 0
    tool = Path(sys.executable).with_name("hf")
    subprocess.run(
        [str(tool), *shlex.split(later)[1:]],
        env={
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path),
            "PATH": "/usr/bin:/bin",
        },
        check=True,
        capture_output=True,
    )
    assert hub.repositories["me/kind"] == files_of(model)
