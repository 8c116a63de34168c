"""The Quark loss: one public function, `quark_loss`, over three implementations.

Read downward: the result, the public function, its checks, then the operators that torch sees
(`torch.library`), each with its fake implementation and its gradient.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from quark_fast.ops import eager
from quark_fast.ops.eager import Kl
from quark_fast.ops.rows import KERNEL_DTYPES, TRITON, rows_of

Implementation = Literal["auto", "eager", "cpp", "triton"]
NLL_ALONE: dict[str, Any] = {"kl_coef": 0.0, "entropy_coef": 0.0}
"""Options of a loss without its other terms."""
Chosen = Literal["eager", "cpp", "triton"]


class QuarkLoss(NamedTuple):
    """The loss, and what it is made of at every token: in nats, detached, 0 where masked.

    float32, or float64 for float64 logits.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor
    entropy: Tensor


def quark_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: float = 0.05,
    entropy_coef: float = 0.06,
    kl: Kl = "policy_ref",
    impl: Implementation = "auto",
    inplace: bool = False,
    normalizer: float | None = None,
    vocab_size: int | None = None,
) -> QuarkLoss:
    """Negative log-likelihood + KL to a frozen reference - entropy, over the base vocabulary.

    loss = sum_n w_n (nll_n + kl_coef KL_n - entropy_coef H_n),   w = mask / sum(mask)

    with p = softmax(logits[..., :V]) and p_ref = softmax(ref_logits[..., :V]) at token n:

        nll_n = -log p[label_n]
        H_n   = -sum_v p_v log p_v
        KL_n  = sum_v p_v log(p_v / p_ref_v)          kl="policy_ref"
              = sum_v p_ref_v log(p_ref_v / p_v)      kl="ref_policy"
              = (log p[label_n] - log p_ref[label_n])^2 / 2     kl="sampled"

    Masked means masked everywhere: logit columns from V on (reward tokens, padding) are in none of
    the three terms and get a gradient of exactly 0. The authors' code cuts reward tokens from the
    KL alone. Their KL is `policy_ref`; the paper prints the other. A token of mask 0 is never read:
    neither a NaN nor a label of -100 there matters.

    `sampled` is for ablations: what one token tells about the KL. For labels drawn from the policy its
    gradient is an unbiased estimate of the exact one of `policy_ref`, with the variance of sampling
    (k2 of Schulman, "Approximating KL divergence", 2020; its value is biased).

    -inf logits have probability 0. A KL is +inf where its first distribution has mass and its
    second has none; the kernels' gradient of such a token is NaN, so that no step on it goes unnoticed.

    Args:
        logits: (..., >= V) policy logits; float32, bfloat16 or float16, computed in float32.
            float64 runs in "eager" only. Strided views cost no copy while rows are contiguous.
        ref_logits: (..., >= V) logits of the reference, which gets no gradient; any of the same
            dtypes. None for no KL: kl_coef must be 0, vocab_size be given, and kl comes back as 0.
        labels: (...) integers in [0, V) wherever the mask is not 0. Looking at them would make a GPU
            wait, so that "triton" gives a token with any other label a loss and a gradient of NaN.
        mask: (...) bool or finite weights, with no gradient; None counts every token. Weights that may be
            below 0, such as advantages, need `normalizer`. (Like the labels, they are looked at on the CPU
            alone; elsewhere a NaN shows in the loss.)
        kl_coef: beta of the paper, per nat.
        entropy_coef: gamma, the entropy bonus of the authors' code, per nat.
        kl: direction of the KL, or its sampled form.
        impl: "eager" (plain PyTorch), "cpp" (CPU tensors), "triton" (CUDA tensors), or "auto": C++ for
            CPU tensors, Triton for CUDA tensors, eager for all others and for float64.
        inplace: allow the gradient to be written over `logits`, whose values are then lost. No
            second tensor of that size is made. Autograd reports any other use of the old values.
            Without effect where no gradient is wanted, in "eager", and under torch.compile, which
            plans its own buffers.
        normalizer: divide by this instead of sum(mask), e.g. by the number of tokens of all
            micro-batches and ranks.
        vocab_size: V; by default the last dimension of ref_logits.

    Returns:
        loss (scalar, differentiable in logits), and nll, kl, entropy (shaped like labels), all in
        float32. With nothing but masked tokens, loss and gradient are 0.

    Raises:
        ValueError: shapes, dtypes, layouts, devices, labels or options that do not fit; the message
            names the value and the fix.
        TypeError: an argument of another type altogether.
        RuntimeError: a second derivative, or one by torch.func or forward-mode AD, is asked of a kernel; only
            "eager" has them.

    Source: Lu et al., "Quark: Controllable Text Generation with Reinforced Unlearning",
    NeurIPS 2022, arXiv 2205.13636.
    """
    problem, chosen = checked(
        logits, ref_logits, labels, mask, (vocab_size, kl_coef, entropy_coef, kl), impl, normalizer
    )
    if chosen != "eager":
        check_no_transform({"logits": logits}, "quark_loss")
    if chosen == "eager":
        check_labels(*problem[2:5])
        loss, *terms = eager.quark_loss(*problem)
    elif not (logits.requires_grad and torch.is_grad_enabled()):
        loss, *terms, _ = _two_pass(*problem, chosen)
    elif inplace and not torch.compiler.is_compiling():
        _check_overwritable(*problem[:2])
        coefs = map(float, problem[5:7])  # operators convert numpy's numbers themselves, Triton none
        loss, *terms = _InPlace.apply(*problem[:5], *coefs, kl, chosen)  # type: ignore[no-untyped-call]
    elif logits.dtype == torch.float16 or (logits.dtype == torch.bfloat16 and torch.compiler.is_compiling()):
        # The incoming scale must enter before the gradient is rounded: nearly all of a float16 gradient
        # underflows without it.
        loss, *terms, _ = _two_pass(*problem, chosen)
    else:
        loss, *terms, _, _ = _one_pass(*problem, chosen)
    nll, divergence, entropy = (term.detach() for term in terms)
    return QuarkLoss(loss, nll, divergence, entropy)


Options = tuple[int | None, float, float, Kl]  # vocab_size, kl_coef, entropy_coef, kl
Problem = tuple[Tensor, Tensor | None, Tensor, Tensor, int, float, float, Kl]  # what `eager` takes


def checked(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    options: Options,
    impl: str,
    normalizer: float | None,
) -> tuple[Problem, Chosen]:
    """What an implementation computes, and which; after every check that needs no look at the labels."""
    check_kinds({"logits": logits, "labels": labels}, {"ref_logits": ref_logits, "mask": mask})
    for name, tensor in (("logits", logits), ("ref_logits", ref_logits)):
        if tensor is not None and (not tensor.is_floating_point() or tensor.dim() == 0):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                "pass floating-point logits of shape (..., vocabulary)"
            )
    _check_options(options, ref_logits)
    vocab_size, kl_coef, entropy_coef, kl = options
    if vocab_size is None:
        assert ref_logits is not None
        vocab_size = ref_logits.shape[-1]
    for name, tensor in (("logits", logits), ("ref_logits", ref_logits)):
        if tensor is not None:
            _check_logits(name, tensor, labels, vocab_size)
    _check_tokens(labels, mask)
    for name, tensor in (("ref_logits", ref_logits), ("labels", labels), ("mask", mask)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device}, logits on {logits.device}; move one")
    chosen = _choose(impl, logits, ref_logits)
    weights = _weights(logits, mask, labels, normalizer)
    # The kernels read memory, in which the values of a negated view are not negated yet.
    ref_logits = None if ref_logits is None else ref_logits.detach().resolve_neg()
    labels = labels.long().resolve_neg()
    return (logits, ref_logits, labels, weights, vocab_size, kl_coef, entropy_coef, kl), chosen


def check_kinds(needed: dict[str, Tensor | None], optional: dict[str, Tensor | None]) -> None:
    """That all of these are dense tensors; of the optional ones, those that are not None."""
    for name, value in {**needed, **optional}.items():
        if value is None and name in optional:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; pass a tensor")
        if value.layout != torch.strided or value.is_nested:
            raise ValueError(f"{name} is nested or of layout {value.layout}; pass a dense tensor")


def _check_options(options: Options, ref_logits: Tensor | None) -> None:
    vocab_size, kl_coef, entropy_coef, kl = options
    for name, coef in (("kl_coef", kl_coef), ("entropy_coef", entropy_coef)):
        # Not isfinite, which torch.compile does not trace for a float that changes.
        if not abs(coef) < math.inf:
            raise ValueError(f"{name} = {coef}; give a finite number")
    if vocab_size is not None and not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size is a {type(vocab_size).__name__}; pass a whole number")
    if kl not in get_args(Kl):
        raise ValueError(f"kl = {kl!r}; choose from {', '.join(map(repr, get_args(Kl)))}")
    if ref_logits is None:
        if kl_coef != 0:
            raise ValueError(f"kl_coef = {kl_coef} needs ref_logits; pass them, or kl_coef=0")
        if vocab_size is None:
            raise ValueError("without ref_logits the vocabulary is unknown; pass vocab_size=")
    else:
        check_frozen("ref_logits", ref_logits)


def check_frozen(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, but the reference is frozen; "
            f"compute it under torch.no_grad() or pass {name}.detach()"
        )


def _check_logits(name: str, logits: Tensor, labels: Tensor, vocab_size: int) -> None:
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name} of shape {tuple(logits.shape)} does not fit labels of shape "
            f"{tuple(labels.shape)}; all dimensions but the last must be the same"
        )
    if not 0 < vocab_size <= logits.shape[-1]:
        raise ValueError(
            f"{name} has {logits.shape[-1]} columns for a base vocabulary of {vocab_size}; "
            "it needs at least that many, and the vocabulary at least one"
        )


def _check_tokens(labels: Tensor, mask: Tensor | None) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}; pass integers")
    if mask is not None and mask.is_complex():
        raise ValueError(f"mask is {mask.dtype}; pass bool or real weights")
    if mask is not None and mask.shape != labels.shape:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit labels of shape {tuple(labels.shape)}"
        )


def _choose(impl: str, logits: Tensor, ref_logits: Tensor | None) -> Chosen:
    """The implementation to run; one asked for by name runs or is refused with the reason."""
    device = logits.device.type
    foreign = [t.dtype for t in (logits, ref_logits) if t is not None and t.dtype not in KERNEL_DTYPES]
    if impl == "auto":
        if device == "cpu" and not foreign:
            return "cpp"
        # Triton's wheels are for Linux.
        if device == "cuda" and not foreign and TRITON:
            return "triton"
        return "eager"
    if impl == "eager":
        return "eager"
    if impl not in ("cpp", "triton"):
        raise ValueError(f"impl = {impl!r}; choose 'auto', 'eager', 'cpp' or 'triton'")
    if foreign:
        raise ValueError(
            f"impl='{impl}' takes float32, bfloat16 and float16, not {foreign[0]}; "
            "use impl='eager' or convert"
        )
    if impl == "cpp":
        if device != "cpu":
            raise ValueError(f"impl='cpp' takes CPU tensors, not {device}; use impl='auto'")
        return "cpp"
    if not TRITON:
        raise ValueError("impl='triton' needs the package triton, which is not installed; use impl='auto'")
    if device != "cuda" and not (device == "cpu" and _backend("triton").INTERPRETED):
        raise ValueError(
            f"impl='triton' takes CUDA tensors, not {device}; use impl='auto' (to debug the kernels on CPU "
            "tensors, have TRITON_INTERPRET=1 in the environment before triton is imported)"
        )
    return "triton"


def _backend(name: str) -> Any:
    """The module of an implementation, imported when it is needed: neither needs what the other does."""
    if name == "triton":
        from quark_fast.ops import triton_kernels

        return triton_kernels
    from quark_fast.ops import cpp

    return cpp


def _weights(logits: Tensor, mask: Tensor | None, labels: Tensor, normalizer: float | None) -> Tensor:
    """w = mask / normalizer, in the precision of the sums; 0 if all tokens are masked."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if mask is None:
        weights = torch.ones(labels.shape, dtype=dtype, device=logits.device)
    else:  # of float64, what is divided may not be in the range of float32
        weights = mask.detach().to(torch.float64 if mask.dtype == torch.float64 else dtype)
    if normalizer is not None:
        # Not isinf, which torch.compile does not trace for a float that changes.
        if not 0 < normalizer < math.inf:
            raise ValueError(f"normalizer = {normalizer}; it must be positive and finite")
        return (weights / normalizer).to(dtype)
    total = weights.sum()
    if _can_be_read(weights):
        if not math.isfinite(total.item()):
            raise ValueError(f"the mask adds up to {total.item()}; its weights must be finite, and their sum")
        if (weights < 0).any():
            # Centred advantages add up to what rounding leaves of them, of either sign.
            raise ValueError(
                f"the mask has weights below 0, down to {weights.min().item():g}, so that its sum,"
                f" {total.item():g}, counts no tokens; give normalizer, e.g. their number"
            )
    return (weights / torch.where(total == 0, 1, total)).to(dtype)


def check_labels(labels: Tensor, weights: Tensor, vocab_size: int) -> None:
    """What the C++ checks by itself. On a GPU the gather's own assertion does: no sync here."""
    if not (_can_be_read(labels) and _can_be_read(weights)):
        return
    if not weights.isfinite().all():
        row = int((~weights.isfinite()).flatten().nonzero()[0])
        raise ValueError(
            f"the weight of token {row} (flattened) is not finite: the mask, or normalizer, is at fault"
        )
    bad = (weights != 0) & ((labels < 0) | (labels >= vocab_size))
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"labels[{row}] = {int(labels.flatten()[row])} (flattened) is outside the base "
            f"vocabulary [0, {vocab_size}) but not masked; mask it, e.g. mask = labels != -100"
        )


def _can_be_read(tensor: Tensor) -> bool:
    """Whether Python can look at its values without a wait: torch.vmap, torch.compile and fakes have none."""
    hidden = (
        torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or isinstance(tensor, torch._subclasses.FakeTensor)
    )
    return tensor.device.type == "cpu" and not hidden


def check_no_transform(named: dict[str, Tensor | None], function: str) -> None:
    """Refuse tensors that torch.func or forward-mode AD differentiates.

    Of an operator, torch knows the backward alone: a forward-mode derivative would silently be 0.
    """
    for name, tensor in named.items():
        if tensor is not None and _is_transformed(tensor):
            raise RuntimeError(
                f"{name} is differentiated by torch.func or by forward-mode AD, for which the kernels of"
                f" {function} have no derivative; use quark_loss(..., impl='eager'), or Tensor.backward"
            )


def _is_transformed(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        return True
    if torch.compiler.is_compiling():  # which knows the transforms, but not the wrappers of a tensor
        if functorch.get_dynamic_layer_stack_depth() == 0:
            return False
        innermost = functorch.peek_interpreter_stack()
        key = torch._functorch.pyfunctorch.coerce_cinterpreter(innermost).key()
        return key != functorch.TransformType.Vmap
    while functorch.is_functorch_wrapped_tensor(tensor):  # by vmap, too, which an operator may be in
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _check_overwritable(logits: Tensor, ref_logits: Tensor | None) -> None:
    # As torch's own operators in place have it: a view of a leaf shares its memory.
    of_leaf = logits._is_view() and logits._base is not None and logits._base.is_leaf
    if logits.is_leaf or of_leaf:
        raise ValueError(
            f"inplace=True would overwrite logits that are {'a view of ' if of_leaf else ''}a leaf of the"
            " graph, such as a parameter; pass inplace=False, or the output of a model"
        )
    overlapping = any(
        stride == 0 and size > 1 for size, stride in zip(logits.shape, logits.stride(), strict=True)
    )
    if overlapping or rows_of(logits) is None:
        if overlapping:
            why = "some of them share their memory"
        elif logits.shape[-1] > 1 and logits.stride(-1) != 1:
            why = "the columns of a row do not lie side by side"
        else:
            why = "three or more of their leading dimensions do not follow one another in memory"
        raise ValueError(
            f"inplace=True cannot write to logits of shape {tuple(logits.shape)} and strides"
            f" {logits.stride()}: {why}; pass inplace=False or logits.contiguous()"
        )
    if logits.is_neg():  # what lies in memory are the logits negated, until they are needed
        raise ValueError("inplace=True cannot write to a negated view; pass logits.resolve_neg()")
    if ref_logits is not None and _overlap(logits, ref_logits):
        raise ValueError(
            "inplace=True would write over ref_logits, which share memory with logits; pass inplace=False"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from the first to the last element of one has any of the other's within."""
    spans = []
    for tensor in (a, b):
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize))
    (begin, end), (other_begin, other_end) = spans
    return a.numel() > 0 and b.numel() > 0 and begin < other_end and other_begin < end


def terms_and_gradient(
    problem: Problem, impl: str, *, want_grad: bool, inplace: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, KL, H and the gradient of the loss, at once and without autograd.

    For `quark_fast.ops.linear`, whose operator is the one that autograd sees. The gradient is in the dtype
    of the logits and, if `inplace`, may be in their memory; without `want_grad` it is empty.
    """
    logits = problem[0]
    if impl == "eager":
        if not want_grad:
            return (*eager.quark_loss(*problem), logits.new_empty(0))

        def values(z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            out = eager.quark_loss(z, *problem[1:])
            return out[0], out

        # Not Tensor.backward: autograd does not record below an operator.
        grad, out = torch.func.grad(values, has_aux=True)(logits)
        return (*out, grad)
    backend = _backend(impl)
    grad = None
    if want_grad:
        grad = logits if inplace else backend.new_gradient(logits)
    *out, _ = backend.forward(*problem, grad=grad)
    return (*out, logits.new_empty(0) if grad is None else grad)


# --- The operators, as torch sees them ---------------------------------------------------------


_PROBLEM = (
    "Tensor logits, Tensor? ref_logits, Tensor labels, Tensor weights, "
    "SymInt vocab_size, float kl_coef, float entropy_coef, str kl, str backend"
)
_FIVE = "Tensor, Tensor, Tensor, Tensor, Tensor"


@torch.library.custom_op("quark_fast::two_pass", mutates_args=(), schema=f"({_PROBLEM}) -> ({_FIVE})")
def _two_pass(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, KL, H, and the statistics of every row from which backward makes the gradient."""
    *options, backend = rest
    values: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _backend(backend).forward(logits, *options)
    return values


@torch.library.custom_op(
    "quark_fast::two_pass_backward",
    mutates_args=(),
    schema=f"(Tensor scale, Tensor stats, {_PROBLEM}) -> Tensor",
)
def _two_pass_backward(scale: Tensor, stats: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    """The gradient of scale * loss; the scale enters before anything is rounded."""
    *options, backend = rest
    grad: Tensor = _backend(backend).new_gradient(logits)
    _backend(backend).backward(scale, stats, logits, *options, grad=grad)
    return grad


@torch.library.custom_op("quark_fast::one_pass", mutates_args=(), schema=f"({_PROBLEM}) -> ({_FIVE}, Tensor)")
def _one_pass(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, KL, H, statistics, and the gradient of the loss, written while each row is in the cache."""
    *options, backend = rest
    grad = _backend(backend).new_gradient(logits)
    loss, nll, divergence, entropy, stats = _backend(backend).forward(logits, *options, grad=grad)
    return loss, nll, divergence, entropy, stats, grad


def _fake_terms(labels: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    nll, divergence, entropy = (labels.new_empty(labels.shape, dtype=torch.float32) for _ in range(3))
    stats = labels.new_empty((labels.numel(), _backend(backend).STATS_PER_ROW), dtype=torch.float32)
    return labels.new_empty((), dtype=torch.float32), nll, divergence, entropy, stats


@_two_pass.register_fake
def _(logits: Tensor, ref_logits: Tensor | None, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_terms(labels, rest[-1])


def _fake_gradient(logits: Tensor, backend: str) -> Tensor:
    # Of the C++ it is contiguous, in memory that a fake tensor does not have.
    return _backend(backend).new_gradient(logits) if backend == "triton" else logits.new_empty(logits.shape)


@_two_pass_backward.register_fake
def _(scale: Tensor, stats: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return _fake_gradient(logits, rest[-1])


@_one_pass.register_fake
def _(logits: Tensor, ref_logits: Tensor | None, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (*_fake_terms(labels, rest[-1]), _fake_gradient(logits, rest[-1]))


# --- Gradients ---------------------------------------------------------------------------------

# Of the nine arguments, where the loss takes no part in what is differentiated.
NO_GRADIENT = (None,) * 9


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """ctx.save_for_backward, but also for what was made under torch.inference_mode, as a reference may be.

    Autograd keeps no version of such a tensor, so a write to it before the backward is not noticed.
    """
    ctx.of_inference = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.of_inference else t for i, t in enumerate(tensors)))


def _saved(ctx: Any) -> list[Any]:
    tensors = list(ctx.saved_tensors)
    for i, tensor in ctx.of_inference.items():
        tensors[i] = tensor
    if not _graph_is_kept():
        ctx.of_inference = {}
    return tensors


def _save_two_pass(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ref_logits, labels, weights, *ctx.options = inputs
    _save(ctx, output[-1], logits, ref_logits, labels, weights)
    _only_the_loss_is_differentiable(ctx, output)


def _two_pass_gradient(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return NO_GRADIENT
    grad = _two_pass_backward(grad_loss, *_saved(ctx), *ctx.options)
    return grad, *NO_GRADIENT[1:]


def _save_one_pass(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ref_logits, labels, weights, *ctx.options = inputs
    *_, stats, grad = output
    again = () if grad.dtype == torch.float32 else (stats, logits, ref_logits, labels, weights)
    _save(ctx, grad, *again)
    _only_the_loss_is_differentiable(ctx, output)


def _one_pass_gradient(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return NO_GRADIENT
    (grad, *again), (*options, backend) = _saved(ctx), ctx.options
    if not again:
        grad = _scaled(grad, grad_loss, backend)
    elif _is_traced_or_kept(grad):
        grad = _two_pass_backward(grad_loss, *again, *options, backend)
    else:
        # A scale of 1, the usual one, leaves the gradient as it is. Any other has to enter before the
        # rounding to half precision, so the gradient is made again.
        _backend(backend).backward(grad_loss, *again, *options, grad=grad, unless_one=True)
    return grad, *NO_GRADIENT[1:]


_two_pass.register_autograd(_two_pass_gradient, setup_context=_save_two_pass)
_one_pass.register_autograd(_one_pass_gradient, setup_context=_save_one_pass)


class _InPlace(torch.autograd.Function):
    """Both forms with the gradient written over the logits: in the forward pass for float32, in the backward
    pass for half precision.

    Not `mark_dirty`: the logits do not become an output of this function, they are used up. Their
    version is raised instead, so that autograd refuses any other backward that needs the values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        *options_and_backend: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *options, ctx.backend = options_and_backend
        ctx.options = options
        one_pass = logits.dtype == torch.float32
        loss, nll, divergence, entropy, stats = _backend(ctx.backend).forward(
            logits, ref_logits, labels, weights, *options, grad=logits if one_pass else None
        )
        if one_pass:
            torch.autograd.graph.increment_version(logits)
            _save(ctx, logits)
        else:
            _save(ctx, logits, stats, ref_logits, labels, weights)
        _only_the_loss_is_differentiable(ctx, (loss, nll, divergence, entropy))
        return loss, nll, divergence, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return NO_GRADIENT
        logits, *rest = _saved(ctx)
        logits = logits.detach()
        if not rest:
            grad = _scaled(logits, grad_loss, ctx.backend)
        else:
            stats, ref_logits, labels, weights = rest
            backend = _backend(ctx.backend)
            grad = backend.new_gradient(logits) if _graph_is_kept() else logits
            problem = (logits, ref_logits, labels, weights, *ctx.options)
            backend.backward(grad_loss, stats, *problem, grad=grad)
            torch.autograd.graph.increment_version(grad)
        return grad, *NO_GRADIENT[1:]


def _only_the_loss_is_differentiable(ctx: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    # Or else autograd makes a tensor of zeros, as large as the logits, for the gradient's gradient.
    ctx.set_materialize_grads(False)


def rescale(grad: Tensor, scale: Tensor, backend: str) -> None:
    """grad *= scale, in place; of a scale of 1 nothing is touched, and a GPU is not waited for."""
    _backend(backend).rescale(grad, scale)


def _scaled(grad: Tensor, scale: Tensor, backend: str) -> Tensor:
    """scale * grad, in grad's own memory unless grad is needed again."""
    if _is_traced_or_kept(grad):
        return grad * scale
    rescale(grad, scale, backend)
    return grad


def _is_traced_or_kept(grad: Tensor) -> bool:
    """Whether a gradient made in the forward must not be changed by the backward now running."""
    being_traced = type(grad) is not Tensor
    if torch.is_grad_enabled() and not being_traced:
        raise RuntimeError(
            "create_graph=True asks for a second derivative, which the kernels do not have; use impl='eager'"
        )
    return being_traced or _graph_is_kept()


def _graph_is_kept() -> bool:
    """Whether the backward now running was asked to retain_graph, so that it may run again."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())
