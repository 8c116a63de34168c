"""One prompt's whole way through tiny random models of every architecture, against plain transformers.

Between them the cases have what real models differ in: tied and own heads, tables wider than the tokenizer,
learned positions, scaled embeddings, capped logits, sliding windows, heads with a bias; byte-level tokenizers
and sentencepiece's, with or without BOS in front and a padding token.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from conftest import export, heard_policy, sharpen
from families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from tried_models import DOCS, try_out

from quark_fast.config import Config
from quark_fast.data.chat import chat_template
from quark_fast.data.tokenizer import opening, own_reward_tokens
from quark_fast.errors import UsageError
from quark_fast.evaluation.held_out import generation_settings
from quark_fast.evaluation.open_run import open_run
from quark_fast.evaluation.perplexity import text_nll
from quark_fast.files.atomic import replacing, replacing_folder
from quark_fast.model.batch import Counts, completion_logits, make_batch, shared_logits
from quark_fast.model.check_export import check_export
from quark_fast.model.check_reading import check_reading
from quark_fast.model.copies import frozen_copy, whole_copy
from quark_fast.model.encode import encode_rows
from quark_fast.model.export import write_export
from quark_fast.model.loading import load_reference, stored_dtype
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading
from quark_fast.rollout.sampling import Conditioning, SampleRequest, Sampling
from quark_fast.rollout.transformers import sample
from quark_fast.training.objective import Objective, read_terms

CPU = torch.device("cpu")

# --- One prompt's way ------------------------------------------------------------------------------

TEXTS = ["The man said that it was good, and the woman", "a", "Once upon é time", "1 2"]
NEW = 9


@dataclass(frozen=True)
class Case:
    policy: Policy
    prompts: list[list[int]]
    source: Path
    export: Path


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("case")
    source = FAMILIES[request.param].save(folder / "source")
    policy = heard_policy(source)
    export(policy, folder / "export", torch.float32)
    yield Case(policy, [policy.encode(text, 99) for text in TEXTS], source, folder / "export")
    shutil.rmtree(folder)


def greedy(
    policy: Policy, model: Any, prompts: list[list[int]], how: int | Conditioning | None
) -> list[list[int]]:
    return drawn_by_us(policy, model, prompts, how, Sampling(NEW, NEW, temperature=0.0))


def drawn_by_us(
    policy: Policy, model: Any, prompts: list[list[int]], how: int | Conditioning | None, sampling: Sampling
) -> list[list[int]]:
    """By our sampling, all prompts side by side."""
    drawn: dict[int, list[int]] = {}
    conditioning = how if isinstance(how, Conditioning) else Conditioning(how)
    request = SampleRequest(prompts, conditioning, sampling, 1, 0)
    for indices, groups, *_ in sample(policy, model, request):
        drawn.update((i, group[0]) for i, group in zip(indices, groups, strict=True))
    return [drawn[i] for i in range(len(prompts))]


def generated(model: Any, ids: list[int], policy: Policy, **settings: Any) -> list[int]:
    """By transformers, one prompt alone: no padding."""
    given = torch.tensor([ids])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=policy.stop_ids,
        pad_token_id=0,
        **settings,
    )
    return list(out[0, len(ids) :].tolist())


def test_prompts_side_by_side_are_continued_as_transformers_continues_each_alone(case: Case) -> None:
    policy = case.policy
    assert len({len(prompt) for prompt in case.prompts}) > 2, "or else nothing would be padded"
    beyond = list(range(policy.vocabulary, len(policy.model.get_output_embeddings().weight)))
    copied = frozen_copy(policy, torch.float32)
    texts = {quantile: greedy(policy, copied, case.prompts, quantile) for quantile in (2, None)}
    for quantile, ours in texts.items():
        for prompt, found in zip(case.prompts, ours, strict=True):
            ids = policy.conditioned(prompt, quantile)
            assert found == generated(policy.model, ids, policy, suppress_tokens=beyond or None)
    assert texts[2] != texts[None], "the reward token is heard"


def test_untrained_policy_without_its_token_samples_what_the_reference_samples(case: Case) -> None:
    reference = load_reference(case.source, torch.bfloat16, CPU)
    ours, theirs = (
        greedy(case.policy, model, case.prompts, None)
        for model in (frozen_copy(case.policy, torch.bfloat16), reference)
    )
    assert ours == theirs


def test_completions_are_as_likely_where_their_prompt_is_read_once(case: Case) -> None:
    policy, model = case.policy, frozen_copy(case.policy, torch.float32)
    check_reading(policy, policy.model, [2, 0, None])
    assert policy.reading == Reading(), "each kind is read with a cache, many tokens at a time"
    prompts = [prompt for prompt in case.prompts for _ in range(3)]
    completions = [[5 + i, 9, 6 + i, 7, 8][: 1 + i % 5] for i in range(len(prompts))]
    batch = make_batch(policy, prompts, completions, [2] * len(prompts), CPU)
    columns: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, given, out: columns.append(out.shape[:2].numel())
    )
    with torch.inference_mode():
        every, once = completion_logits(model, batch), shared_logits(model, batch)
    assert len(columns) == 3 and sum(columns[1:]) < 0.7 * columns[0]
    # float32, logits up to 10, another order of summation.
    torch.testing.assert_close(once[batch.mask], every[batch.mask], rtol=0, atol=1e-4)


def objective(case: Case, **settings: Any) -> Objective:
    terms = {"kl_coef": 0.5, "prompt_kl_coef": 0.3, "entropy_coef": 0.1, "unlikelihood_coef": 0.2}
    config = Config(**(terms | settings))
    reference = load_reference(case.source, torch.float32, CPU)
    return Objective(config, case.policy, reference, CPU, contextlib.nullcontext)


def test_padding_changes_no_loss_and_every_reward_row_that_is_read_learns(case: Case) -> None:
    of = objective(case)
    completions = [[5, 6, 7, 5, 6, 7, 5, 6], [9], [11, 12, 13], [8, 8]]
    quantiles = [2, 2, 0, 2]
    counts = Counts.of(case.prompts, completions)
    model = case.policy.model

    def gradients() -> dict[str, torch.Tensor]:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    loss, shares = of(case.prompts, completions, quantiles, counts)
    terms = read_terms([shares])
    loss.backward()
    together = gradients()
    alone = 0.0
    for prompt, completion, quantile in zip(case.prompts, completions, quantiles, strict=True):
        part, _ = of([prompt], [completion], [quantile], counts)
        part.backward()
        alone += part.item()
    assert all(torch.isfinite(torch.tensor(value)) for value in terms.values())
    assert min(terms["kl"], terms["prompt_kl"]) > 1e-3 and terms["unlikelihood"] > 0
    assert loss.item() == pytest.approx(alone, rel=1e-4)  # float32, other shapes of the same sums
    separate = gradients()
    # Some are 0 but for rounding, such as of biases of keys, which move all scores alike.
    scale = max(grad.abs().max().item() for grad in separate.values())
    for name, grad in separate.items():
        torch.testing.assert_close(together[name], grad, rtol=1e-3, atol=1e-5 * scale)
    rows = next(grad for name, grad in together.items() if name.endswith("rows"))
    # The contrast reads each sample's mirror token, too; the middle one is nobody's.
    assert (rows.norm(dim=1) > 0).tolist() == [True, False, True]


def test_exported_folder_gives_plain_transformers_the_same_greedy_texts(case: Case) -> None:
    policy = case.policy
    model, tokenizer = (c.from_pretrained(case.export) for c in (AutoModelForCausalLM, AutoTokenizer))
    ours = greedy(policy, frozen_copy(policy, torch.float32), case.prompts, 2)
    for text, prompt in zip(TEXTS, case.prompts, strict=True):
        assert tokenizer(text).input_ids == policy.conditioned(prompt, 2)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    theirs = model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    theirs = theirs[:, batch["input_ids"].shape[1] :].tolist()
    assert theirs == ours
    assert max(i for row in theirs for i in row) < policy.vocabulary
    for text, prompt, row, whole in zip(TEXTS, case.prompts, ours, theirs, strict=True):
        both = policy.tokenizer.decode([*prompt, *row], skip_special_tokens=True)
        assert text + policy.decode(row, prompt) == both, "what the model wrote, behind its prompt"
        assert tokenizer.decode(whole, skip_special_tokens=True).strip() == policy.decode(row, prompt).strip()


def test_guided_text_of_plain_transformers_is_ours(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    policy, settings = case.policy, {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    copied = frozen_copy(policy, torch.float32)
    model, tokenizer = (c.from_pretrained(case.export) for c in (AutoModelForCausalLM, AutoTokenizer))
    # Loaded with its code, the model takes the argument by itself.
    own = AutoModelForCausalLM.from_pretrained(case.export, trust_remote_code=True)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all(), "padded"
    start = batch["input_ids"].shape[1]
    plain = model.generate(**batch, **settings)[:, start:].tolist()
    code = {"custom_generate": str(case.export), "trust_remote_code": True}
    for weight in (2.0, 0.0, -0.5):
        ours = greedy(policy, copied, case.prompts, Conditioning(2, 0, weight))
        theirs = model.generate(**batch, **code, guidance=weight, **settings)[:, start:].tolist()
        assert theirs == ours
        assert weight > 1 or theirs != plain, (
            "the tiny model's best token alone may be as sure as a guided one"
        )
    # The code that is called is the same: one weight shows that it is.
    assert own.generate(**batch, guidance=weight, **settings)[:, start:].tolist() == ours
    unguided = model.generate(**batch, **code, guidance=1.0, **settings)
    assert unguided[:, start:].tolist() == plain
    assert own.generate(**batch, guidance=None, **settings)[:, start:].tolist() == plain
    # One text alone, without a mask; drawn at a low temperature twice over.
    alone = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    drawn = {"temperature": 1e-4, "num_return_sequences": 2, "do_sample": True}
    twice = model.generate(alone, **code, guidance=weight, **settings | drawn)[:, alone.shape[1] :].tolist()
    assert twice == [ours[0]] * 2
    # A nucleus of one token is that of the best, or the worst, token alone, whatever the weight.
    for weight, stream in ((2.0, 2), (-0.5, 0)):
        drawn = settings | {"do_sample": True, "top_p": 1e-6}
        theirs = model.generate(**batch, **code, guidance=weight, **drawn)[:, start:].tolist()
        how = Conditioning(2, 0, weight)
        assert theirs == greedy(policy, copied, case.prompts, stream)
        assert theirs == drawn_by_us(policy, copied, case.prompts, how, Sampling(NEW, NEW, 1.0, top_p=1e-6))
    pipe = pipeline("text-generation", model=own, tokenizer=tokenizer)
    text = pipe(TEXTS[0], guidance=weight, **settings)[0]["generated_text"]
    assert text == TEXTS[0] + policy.decode(ours[0], case.prompts[0])
    with pytest.raises(ValueError, match="beams are not supported"):
        own.generate(**batch, guidance=weight, num_beams=2, **settings)
    if tokenizer.pad_token_id not in policy.stop_ids:  # then transformers finds the padding by itself
        for how in (settings, {"generation_config": GenerationConfig(**settings)}):
            blind = own.generate(batch["input_ids"], guidance=weight, **how)
            assert blind[:, start:].tolist() == ours
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit"):
        with pytest.raises(ValueError, match=f"assisted decoding is not supported; leave out {name}"):
            own.generate(**batch, guidance=weight, **settings, **{name: 3})
    with pytest.raises(ValueError, match="encoder_repetition_penalty would count"):
        own.generate(**batch, guidance=weight, encoder_repetition_penalty=2.0, **settings)
    with pytest.raises(ValueError, match="must stand before every text"):
        own.generate(torch.tensor([case.prompts[0]]), guidance=weight, **settings)


def test_exported_policy_is_the_policy(case: Case) -> None:
    again = Policy.from_export(case.export, torch.float32)
    assert (again.prefix, again.reward_ids, again.stop_ids) == (
        case.policy.prefix, case.policy.reward_ids, case.policy.stop_ids,
    )  # fmt: skip
    ids = torch.tensor([case.policy.conditioned(case.prompts[0], 0)])
    with torch.no_grad():
        new, old = (p.model(ids).logits[..., : case.policy.vocabulary] for p in (again, case.policy))
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_export_is_trained_on_with_fewer_quantiles(case: Case, tmp_path: Path) -> None:
    """The id in the export's front is then no token of the new policy."""
    again = Policy.create(case.export, quantiles=2)
    assert (again.prefix, again.vocabulary) == (case.policy.prefix, case.policy.vocabulary)
    again.model.eval()
    assert check_export(again, tmp_path, {}, untie=True) == (True, [])


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "recurrent_gemma"])
def test_guided_text_of_models_of_states_is_ours_or_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    _, policy = try_out(ARCHITECTURES[kind], tmp_path / "model")
    assert policy is not None
    write_export(policy, tmp_path / "export", whole_copy(policy, torch.float32), {}, untie=True)
    model, tokenizer = (c.from_pretrained(tmp_path / "export") for c in (AutoModelForCausalLM, AutoTokenizer))
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    given = {"custom_generate": str(tmp_path / "export"), "trust_remote_code": True, "do_sample": False}
    given |= {"max_new_tokens": NEW, "min_new_tokens": NEW}
    if kind == "recurrent_gemma":
        with pytest.raises(ValueError, match="recurrent_gemma keeps a text's state in the model"):
            model.generate(**batch, guidance=2.0, **given)
        return
    prompts = [policy.encode(text) for text in TEXTS]
    ours = greedy(policy, frozen_copy(policy, torch.float32), prompts, Conditioning(2, 0, 2.0))
    theirs = model.generate(**batch, guidance=2.0, **given)[:, batch["input_ids"].shape[1] :].tolist()
    assert theirs == ours


# --- Every architecture ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_is_read_right_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    if name.split(",")[0] not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    tried, policy = try_out(ARCHITECTURES[name], tmp_path / "model")
    table = DOCS.read_text()
    if f"of transformers {transformers.__version__}:" in table:  # other versions may do more, or less
        assert str(tried) in table.splitlines(), "python tests/tried_models.py writes the table anew"
    assert not any(tmp_path.glob(".quark*")), "the scratch export is gone"
    if policy is None:
        assert tried.outcome.startswith("refused: ") and "\n" not in tried.outcome
        return
    # Not by the check's own means: greedy tokens of a sample are those of bare forward passes.
    prompts = [policy.encode(text) for text in ("The man said that", "a", "Once upon a time there was")]
    sampling = Sampling(4, 4, temperature=0.0)
    request = SampleRequest(prompts, Conditioning(2), sampling, 2, 0)
    for indices, groups, *_ in sample(policy, frozen_copy(policy, torch.float32), request):
        for i, (one, other) in zip(indices, groups, strict=True):
            assert one == other and len(one) == 4
            _check_greedy(policy, prompts[i], one)


@torch.no_grad()
def _check_greedy(policy: Policy, prompt: list[int], drawn: list[int]) -> None:
    ids = [*policy.conditioned(prompt, 2), *drawn[:-1]]
    every = policy.model(torch.tensor([ids])).logits[0, -len(drawn) :, : policy.vocabulary]
    for logits, token in zip(every, drawn, strict=True):
        spread = logits.max() - logits.min()
        logits[policy.stop_ids] = -torch.inf
        assert logits[token] >= logits.max() - 0.01 * spread, "the most probable token, but for rounding"
    before, whole = (
        policy.tokenizer.decode(x, skip_special_tokens=True) for x in (prompt, [*prompt, *drawn])
    )
    assert before + policy.decode(drawn, prompt) == whole


# --- Chats -----------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "be good"}, {"role": "user", "content": "what was said?"}]


def test_exported_pipeline_conditions_a_chat_as_training_did(case: Case) -> None:
    policy = case.policy
    text = chat_template("tiny", lambda: policy.tokenizer)(CHAT)
    assert text.startswith("[system]"), "BOS, which the template writes, is the prefix"
    (trained,) = encode_rows(policy, [{"prompt": text, "messages": CHAT}], 99, 0).ids
    beside = {"prompt": "was said", "messages": CHAT}
    assert encode_rows(policy, [beside], 99, 0).ids == [policy.encode("was said", 99)], (
        "a text with a chat beside it"
    )
    pipe = pipeline("text-generation", str(case.export))
    seen: list[list[int]] = []
    pipe.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    answer = pipe(CHAT, max_new_tokens=3, do_sample=False)[0]["generated_text"][-1]
    assert seen[0] == policy.conditioned(trained, 2)
    assert answer["role"] == "assistant"
    # The same text renders from the export, for evaluation and for training on.
    tokenizer = AutoTokenizer.from_pretrained(case.export)
    assert chat_template("tiny", lambda: tokenizer)(CHAT) == text
    worst = tokenizer.apply_chat_template(
        CHAT,
        add_generation_prompt=True,
        return_dict=False,
        reward_front=policy.prefix_text + own_reward_tokens(tokenizer)[0],
    )
    assert worst == policy.conditioned(trained, 0)


SAID = "it was said"


@pytest.mark.parametrize("of_export", [False, True], ids=["plain", "export"])
@torch.no_grad()
def test_plain_model_reads_a_chat_as_its_own_template_writes_it(case: Case, of_export: bool) -> None:
    folder = case.export if of_export else case.source
    plain = Policy.plain(folder, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = chat_template("tiny", lambda: tokenizer)(CHAT)
    written = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    if not plain.prefix:  # what opens a chat is left to the prefix, and a tokenizer may put nothing there
        written = written.removeprefix(opening(tokenizer))
    own, together = (tokenizer(one, add_special_tokens=False).input_ids for one in (written, written + SAID))
    assert plain.conditioned(plain.encode(text, chat=True), None) == own
    # The perplexity of a text reads it likewise, prompt and completion together.
    ((nll, tokens),) = text_nll(plain, plain.model, [text], 99)([0], [], [SAID])
    logp = plain.model(torch.tensor([together])).logits[0, :, : plain.vocabulary].double().log_softmax(-1)
    places = range(len(together) - tokens, len(together))
    expected = -sum(float(logp[at - 1, together[at]]) for at in places)
    assert "".join(SAID.split()) in "".join(tokenizer.decode(together[-tokens:]).split())
    assert nll == pytest.approx(expected, rel=1e-4)


# --- Files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_checkpoint_trains_in_float32_and_is_exported_in_the_dtype_it_came_in(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    source = FAMILIES["qwen2"].save(tmp_path / "source", dtype)
    policy = Policy.create(source, quantiles=3)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert policy.stored_dtype == dtype
    export(policy, tmp_path / "out", policy.stored_dtype)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    for name, tensor in before.items():  # untrained: to the bit, but for the table's reward rows
        rows = policy.vocabulary if "embed_tokens" in name else len(tensor)
        assert torch.equal(after[name][:rows], tensor[:rows]), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype


def test_config_without_a_dtype_counts_as_float32(tmp_path: Path) -> None:
    source = FAMILIES["gpt2"].save(tmp_path / "source", torch.float16)
    settings = json.loads((source / "config.json").read_text())
    assert settings.pop("dtype") == "float16"
    (source / "config.json").write_text(json.dumps(settings))
    assert stored_dtype(source) == torch.float32


def test_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    source = FAMILIES["llama"].save(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    shutil.copytree(source, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = (Policy.create(folder, quantiles=3).model for folder in (source, tmp_path / "shards"))
    for (name, one), (_, other) in zip(whole.named_parameters(), shards.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    (lost := sorted((tmp_path / "shards").glob("*.safetensors"))[1]).unlink()
    with pytest.raises(UsageError, match=lost.name):
        Policy.create(tmp_path / "shards", quantiles=3)


OWN_CODE = """
import builtins
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

builtins.quark_test_ran_foreign_code = True

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class NoGenerate(LlamaPreTrainedModel):
    config_class, forward = OwnConfig, LlamaForCausalLM.forward

    def __init__(self, config):
        super().__init__(config)
        self.model, self.vocab_size = LlamaModel(config), config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model whose folder brings along the code that defines it."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    folder = FAMILIES["llama"].save(tmp_path / "own")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "architectures": ["OwnModel"]}
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(OWN_CODE)
    yield folder
    vars(builtins).pop("quark_test_ran_foreign_code", None)


def test_model_with_code_of_its_own_is_refused_unrun_and_the_error_names_the_flag(own_code: Path) -> None:
    with pytest.raises(UsageError, match=r"Python code, .* --trust-remote-code") as caught:
        Policy.create(own_code, quantiles=3)
    assert str(own_code) in str(caught.value)
    with pytest.raises(UsageError, match="--trust-remote-code"):
        load_reference(own_code, torch.float32, CPU)
    assert not hasattr(builtins, "quark_test_ran_foreign_code")


def test_trusted_code_is_run_exported_and_asked_about_again_by_the_commands(
    own_code: Path, tmp_path: Path
) -> None:
    policy = Policy.create(own_code, quantiles=3, trust_remote_code=True)
    assert type(policy.model).__name__ == "OwnModel" and hasattr(builtins, "quark_test_ran_foreign_code")
    prompts = [policy.encode(text, 99) for text in TEXTS]
    ours = greedy(policy, frozen_copy(policy, torch.float32), prompts, 2)
    run = tmp_path / "run"
    export(policy, run / "model", torch.float32)
    # Whoever made the folder wrote its settings, too: they are no consent.
    Config(model=str(own_code), trust_remote_code=True, precision="fp32").save(run / "config.yaml")
    with pytest.raises(UsageError, match="--trust-remote-code"):
        open_run(run)
    finished = open_run(run, trust_remote_code=True)
    assert greedy(finished.policy, finished.policy.model, prompts, 2) == ours


def test_code_without_transformers_generate_is_sampled_and_exported(own_code: Path, tmp_path: Path) -> None:
    config = own_code / "config.json"
    config.write_text(config.read_text().replace("own.OwnModel", "own.NoGenerate"))
    policy = Policy.create(own_code, quantiles=3, trust_remote_code=True)
    assert not hasattr(policy.model, "generate") and policy.stop_ids == [policy.tokenizer.eos_token_id]
    prompts = [policy.encode(text, 99) for text in TEXTS]
    export(policy, tmp_path / "out", torch.float32)
    again = Policy.from_export(tmp_path / "out", torch.float32, trust_remote_code=True)
    ours, theirs = (greedy(one, frozen_copy(one, torch.float32), prompts, 2) for one in (policy, again))
    assert ours == theirs


SPELLED = "w3 <|reward_0|> w4 <|reward_2|> said"


def test_reward_tokens_spelled_in_a_text_are_characters_for_policy_and_export(case: Case) -> None:
    policy = case.policy
    bare = list(policy.text_tokenizer(SPELLED, add_special_tokens=False).input_ids)
    assert max(bare) < policy.vocabulary, "no id beyond the base vocabulary"
    assert policy.encode(SPELLED, 99) == bare
    tokenizer = AutoTokenizer.from_pretrained(case.export)
    own = list(tokenizer(SPELLED).input_ids)
    assert own == policy.conditioned(bare, policy.quantiles - 1), "prefix and best token in front, by id"
    chat = [{"role": "user", "content": SPELLED}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    front = policy.conditioned([], policy.quantiles - 1)
    assert ids[: len(front)] == front
    assert max(ids[len(front) :]) < policy.vocabulary
    text = chat_template("tiny", lambda: policy.tokenizer)(chat)
    (trained,) = encode_rows(policy, [{"prompt": text, "messages": chat}], 99, 0).ids
    assert ids == [*front, *trained]


def test_export_is_the_same_twice_and_its_reward_tokens_never_win(case: Case, tmp_path: Path) -> None:
    policy = case.policy
    for name in ("one", "two"):
        export(policy, tmp_path / name, torch.float32)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    ids = torch.randint(policy.vocabulary, (4, 20), generator=torch.Generator().manual_seed(5))
    logp = model(ids).logits.log_softmax(-1)
    beyond = logp[..., policy.vocabulary :].amax(-1)
    # With so few tokens in all none is as improbable as in a real vocabulary, but these are the least.
    assert (beyond < logp[..., : policy.vocabulary].amax(-1)).all()
    assert beyond.exp().mean() <= logp[..., : policy.vocabulary].exp().mean()
    suppressed = model.generation_config.suppress_tokens
    assert suppressed == list(range(policy.vocabulary, logp.shape[-1]))


def test_pipeline_draws_what_the_table_was_made_of(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    source = tiny_model()
    model = AutoModelForCausalLM.from_pretrained(source)
    sharpen(model)
    # Tastes of its own, by which nothing was trained or evaluated.
    model.generation_config.suppress_tokens = [7, 9]
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(source)
    policy = Policy.create(source, quantiles=3)
    sampling = Sampling(6, 2, 0.8, 0.7, rows=600)
    export(policy, tmp_path / "out", torch.float32, generation_settings(sampling))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert config.suppress_tokens == list(range(policy.vocabulary, policy.vocabulary + 3))
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.8, 0.7, 0)
    assert (config.min_new_tokens, config.repetition_penalty) == (2, None)
    assert config.eos_token_id == policy.stop_ids

    def even(texts: list[str]) -> list[float]:
        numbers = [[int(n) for n in text.split("w") if n.strip().isdecimal()] for text in texts]
        return [sum(n % 2 == 0 for n in found) / max(1, len(found)) for found in numbers]

    request = SampleRequest([policy.encode("w3 w4", 9)], Conditioning(2), sampling, 600, 0)
    ((_, (drawn,), *_),) = sample(policy, frozen_copy(policy, torch.float32), request)
    ours = torch.tensor(even([policy.decode(one) for one in drawn]))
    torch.manual_seed(0)
    pipe = pipeline("text-generation", str(tmp_path / "out"))
    # All 600 in one batch.
    answers = pipe(["w3 w4"] * 600, max_new_tokens=6, return_full_text=False, batch_size=600)
    theirs = torch.tensor(even([answer[0]["generated_text"] for answer in answers]))
    error = (ours.var() / 600 + theirs.var() / 600).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert 0.005 < error < 0.05


def test_greedy_evaluation_is_exported_as_greedy(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    policy = Policy.create(tiny_model(), quantiles=2)
    export(policy, tmp_path / "out", torch.float32, generation_settings(Sampling(6, 0, 0.0)))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert config.do_sample is False and config.top_p is None


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_files_have_the_rights_that_the_umask_gives(
    tmp_path: Path, tiny_model: Callable[..., Path], umask: int, mode: int
) -> None:
    policy = Policy.create(tiny_model(), quantiles=2)
    before = os.umask(umask)
    try:
        with replacing_folder(tmp_path / "model") as scratch:
            export(policy, scratch, torch.float32)
        with replacing(tmp_path / "one.safetensors") as scratch:
            save_file({"a": torch.zeros(2)}, scratch)
    finally:
        os.umask(before)
    written = [*filter(Path.is_file, (tmp_path / "model").rglob("*")), tmp_path / "one.safetensors"]
    assert len(written) > 4
    assert {oct(path.stat().st_mode & 0o777) for path in written} == {oct(mode)}


def test_tied_head_stays_tied_where_that_is_asked_for(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    policy = Policy.create(tiny_model("qwen2"), quantiles=2)
    for untie in (True, False):
        write_export(policy, tmp_path / str(untie), whole_copy(policy, torch.float32), untie=untie)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(untie))
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied is not untie
