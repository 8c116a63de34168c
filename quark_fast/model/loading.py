"""Models and tokenizers from a folder or the hub, or one line about what is wrong with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from quark_fast.data.tokenizer import check_tokenizer, missing_tokenizer
from quark_fast.errors import UsageError, nor_folder
from quark_fast.model.attention import FAST_ATTENTION
from quark_fast.runtime.machine import without_bars


def load_reference(
    source: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> Any:
    """The reference, a frozen base model: it samples first, and the KL holds the policy close to it."""
    model, _ = load_pretrained(source, dtype, trust_remote_code=trust_remote_code)
    return frozen(model, device)


def frozen(model: Any, device: torch.device) -> Any:
    model.to(device).eval().requires_grad_(False)
    decode_fast(model)
    return model


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """The model with the attention by which it is sampled."""
    before = model.config._attn_implementation
    decode_fast(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def decode_fast(model: Any) -> None:
    # Attention that sdpa cannot do, such as Gemma 2's with its cap, is beyond ours, too.
    model.set_attn_implementation(FAST_ATTENTION if model._supports_sdpa else "eager")


def stored_dtype(source: str | Path, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype of the weights at ``source`` by its config; float32 where that names none, as GPT-2's."""
    check_source(source)
    config = _load_config(source, trust_remote_code)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if stored not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UsageError(
            f"the weights at {str(source)!r} are in {stored}, which cannot be trained; give them in bfloat16,"
            " float16 or float32"
        )
    return stored


def _load_config(source: str | Path, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file fails in as many ways as transformers reads it
        raise refused(source, "causal language model", error) from error


def check_not_quantised(source: str | Path, model: Any) -> None:
    """Raise UsageError for codes in place of weights; what transformers decodes as it loads it is none."""
    how = getattr(model.config, "quantization_config", None)
    if how is not None:
        method = getattr(how.quant_method, "value", how.quant_method)
        raise UsageError(
            f"the weights at {str(source)!r} are quantised ({method}), which cannot be trained or exported"
            " here; give the model that they were made of"
        )


def refused(source: str | Path, kind: str, error: Exception) -> UsageError:
    """What transformers said about a source, in one line."""
    if "trust_remote_code" in str(error):
        return UsageError(
            f"{str(source)!r} brings along Python code, which is not run unasked; read it, and give"
            " --trust-remote-code if you trust it"
        )
    return UsageError(f"no {kind} at {str(source)!r}: {first_line(error)}{nor_folder(source)}")


@without_bars()
def load_pretrained(
    source: str | Path,
    dtype: torch.dtype,
    auto_class: Any = AutoModelForCausalLM,
    kind: str = "causal language model",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) by transformers, or one clear line about what is wrong with ``source``."""
    tokenizer = load_tokenizer(source, trust_remote_code)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UsageError(
            f"the tokenizer at {str(source)!r} has no fast form (tokenizer.json); save one with"
            " PreTrainedTokenizerFast"
        )
    # Of some transformers would load the decoder, which without its encoder is another model.
    if auto_class is AutoModelForCausalLM and _load_config(source, trust_remote_code).is_encoder_decoder:
        raise UsageError(f"{str(source)!r} is an encoder-decoder; give a causal language model")
    try:
        with no_pickle(source):
            loaded: Any = auto_class.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
    except UsageError:
        raise
    except Exception as error:
        raise refused(source, kind, error) from error
    model, info = loaded
    if info["missing_keys"]:  # transformers fills these with random numbers
        missing = sorted(info["missing_keys"])
        raise UsageError(
            f"the weights at {str(source)!r} lack {missing[0]!r} and {len(missing) - 1} more;"
            f" give a complete {kind}"
        )
    if getattr(model, "peft_config", None):
        raise _adapters(source)
    _no_extra_outputs(model)
    if not hasattr(model, "generation_config"):  # of code of its own, without transformers' generate()
        model.generation_config = GenerationConfig.from_model_config(model.config)
    rows, special = len(model.get_input_embeddings().weight), tokenizer.added_tokens_decoder
    # Special tokens may stand after the table: Gemma 3's for images, which its text models do not have.
    beyond = {i for i in tokenizer.get_vocab().values() if i >= rows}
    if any(i not in special or not special[i].special for i in beyond):
        raise UsageError(
            f"the tokenizer at {str(source)!r} has ids up to {max(beyond)}, but the model embeds {rows};"
            " the two do not belong together"
        )
    return model, tokenizer


def processor_files(source: str | Path) -> dict[str, str]:
    """Name and text of what AutoProcessor reads, at the source of a model of images or sound, too."""
    found = {}
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        with contextlib.suppress(OSError):  # transformers' word for a file that is not there
            if file := cached_file(source, name):
                found[name] = Path(file).read_text(encoding="utf-8")
    return found


def _no_extra_outputs(model: Any) -> None:
    """Switch off what a config may have a model return beside its logits, and return it by name."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name, value in list(getattr(config, "__dict__", {}).items()):
            if name.lstrip("_").startswith("output_") and value is True:
                setattr(config, name, False)
            elif name == "return_dict":
                setattr(config, name, True)


def _adapters(source: str | Path) -> UsageError:
    return UsageError(
        f"{str(source)!r} holds the adapters of a model (adapter_config.json), not a model; merge them into"
        " it: peft.AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER),"
        " save the tokenizer there, too, and give that folder"
    )


_LOADING = threading.RLock()


@contextlib.contextmanager
def no_pickle(source: str | Path) -> Iterator[None]:
    """Whatever transformers or peft would load by unpickling it is refused.

    Not by asking for safetensors alone: the config and the index of a model name files, too.
    """

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UsageError(_pickled(source))

    _LOADING.acquire()  # or two threads would put back each other's
    load = torch.load
    torch.load = refuse
    try:
        yield
    except OSError as error:  # no safetensors, which were asked for, in a folder or at the hub
        if any(Path(source).glob("*.bin")) or "cannot be loaded with `safetensors`" in str(error):
            raise UsageError(_pickled(source)) from error
        raise
    finally:
        torch.load = load
        _LOADING.release()


def _pickled(source: str | Path) -> str:
    return (
        f"{str(source)!r} has no weights in safetensors, and others (pytorch_model.bin) are not loaded: they"
        " are pickles, which can run code; where you trust it, load it and save_pretrained() it anew"
    )


def check_source(source: str | Path) -> None:
    """Refuse what reads as a folder, not as a hub name, and is not there."""
    looks_like_path = Path(source).is_absolute() or str(source).count("/") > 1 or str(source).startswith(".")
    if looks_like_path and not Path(source).is_dir():
        raise UsageError(f"no folder {str(source)!r}; give a transformers folder or a hub name")
    if (Path(source) / "adapter_config.json").is_file() and not (Path(source) / "config.json").is_file():
        raise _adapters(source)


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer by transformers, or one clear line about what is wrong with ``source``."""
    check_source(source)
    try:
        # False, not None: transformers would ask on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_tokenizer(source, tokenizer)
    except UsageError:
        raise
    except Exception as error:  # in Rust even a plain Exception
        if "trust_remote_code" in str(error):
            raise refused(source, "tokenizer", error) from error
        raise UsageError(
            missing_tokenizer(source)
            or f"no usable tokenizer at {str(source)!r}: {first_line(error)}{nor_folder(source)}; give a"
            " folder with tokenizer.json, or a hub name"
        ) from error
    return tokenizer


def first_line(error: BaseException) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    text = " ".join(lines[:2]) if lines[0].rstrip().endswith(":") else lines[0]
    return text[:200]
