"""What should be float32: aten operators, and which of their tensors decide.

result       floating-point outputs; what an operator takes in 16 bits and puts out in float32 it computes in float32
statistics   outputs behind the first (mean, reciprocal deviation): a normalisation may take and give 16 bits
large        outputs that sum up COUNTABLE elements or more each

Convolutions, products, activations, sums of two and interpolation may be in 16 bits, and so may fused attention, whose
kernels keep scores in float32 themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from lightning_diffusion.analysis.findings import Severity

LOW = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
}
"""Formats of too few digits for what is in the table, by name."""

COUNTABLE = 256
"""Where ones that are added up one by one stop counting in bfloat16."""


class Judged(StrEnum):
    """Which tensors have to be float32."""

    RESULT = "result"
    STATISTICS = "statistics"
    LARGE = "large"


@dataclass(frozen=True)
class Rule:
    """What must not be in 16 bits, and why.

    Args:
        check: its name in findings.
        severity: of breaking it.
        title: what was found, "in bfloat16" is added.
        why: what it does to the training.
        judged: which tensors of the operator.
    """

    check: str
    severity: Severity
    title: str
    why: str
    judged: Judged = Judged.RESULT


_W, _E, _N = Severity.WARNING, Severity.ERROR, Severity.NOTE

NORMALISATION = Rule(
    "normalisation", _W, "Statistics of a normalisation", "mean and deviation keep 2 or 3 digits", Judged.STATISTICS
)  # fmt: skip
DEVIATION = Rule(
    "normalisation", _W, "Statistics of a normalisation", "mean and deviation keep 2 or 3 digits"
)
SOFTMAX = Rule("softmax", _W, "Softmax", "small probabilities are lost and the others do not sum to 1")
FUNCTION = Rule("function", _W, "Exponential, logarithm, power or root", "its error grows with the argument")
GATE = Rule("gate", _N, "Sigmoid or tanh", "values close to 1 become 1, and their gradient 0")
ANGLE = Rule("embedding", _W, "Sine and cosine of an embedding", "neighbouring noise levels become the same")
REDUCTION = Rule(
    "reduction",
    _W,
    "A large sum or mean",
    f"{COUNTABLE} equal numbers and more no longer count",
    Judged.LARGE,
)
LOSS = Rule("loss", _E, "The loss", "improvements below 1 in 256 are not seen")
SCORES = Rule(
    "attention-scores", _W, "Attention scores", "the largest scores err by more than one another's distance"
)
GRADIENT_NORM = Rule(
    "gradient-norm", _W, "The gradient norm", "clipping scales by a factor with 2 or 3 digits"
)
RUNNING = Rule(
    "running-statistics", _E, "Running statistics", "small updates round to nothing: they stand still"
)
GUIDANCE = Rule(
    "guidance", _W, "The difference of two outputs of one network, as in guidance,", "what they share cancels"
)
DECODER = Rule(
    "decoder", _W, "What a decoder puts out", "images have 256 grey levels, and [-1, 1] fewer numbers"
)
OVERFLOW = Rule("overflow", _E, "Values beyond the largest number", "infinity becomes NaN in the next layers")
NEAR_LIMIT = Rule(
    "near-limit", _W, "Values close to the largest number", "they will overflow as weights grow"
)
UNDERFLOW = Rule("underflow", _W, "Values flushed to zero", "what is zero teaches nothing")
MASTER = Rule(
    "master-weights", _E, "Weights that the optimizer steps", "updates below 1/512 of a weight are lost"
)
STATE = Rule("optimizer-state", _W, "The optimizer's state", "its averages of gradients stand still")
UNKNOWN = Rule(
    "unknown-kernel", _N, "A kernel that this table does not know", "what it computes in cannot be seen"
)

_NAMES: dict[Rule, str] = {
    NORMALISATION: "native_group_norm native_layer_norm native_batch_norm cudnn_batch_norm miopen_batch_norm "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update _fused_rms_norm "
    "batch_norm_stats",
    DEVIATION: "var std var_mean std_mean linalg_vector_norm norm renorm dist _cdist_forward _weight_norm_interface "
    "batch_norm_gather_stats batch_norm_gather_stats_with_counts linalg_norm",
    SOFTMAX: "_softmax _safe_softmax _log_softmax _sparse_softmax _masked_softmax",
    FUNCTION: "exp exp2 expm1 log log2 log10 log1p pow sqrt rsqrt logsumexp _logcumsumexp logaddexp logaddexp2 erfinv "
    "float_power tan sinh cosh asin acos xlogy logit special_entr log_sigmoid_forward",
    GATE: "sigmoid tanh",
    ANGLE: "sin cos polar",
    REDUCTION: "sum nansum mean nanmean prod cumsum cumprod trace",
    LOSS: "mse_loss smooth_l1_loss huber_loss binary_cross_entropy nll_loss_forward nll_loss2d_forward "
    "soft_margin_loss multi_margin_loss _ctc_loss",
}  # fmt: skip
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
"""Operator, without the underscore of in-place forms, to the rule that it is held against."""

NORMS = {
    "linalg_vector_norm",
    "norm",
    "_foreach_norm",
    "linalg_norm",
    *_NAMES[REDUCTION].split(),
    "pow",
    "sqrt",
}
"""What makes a gradient norm of gradients."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEWS = _names(
    "view _unsafe_view reshape _reshape_alias t transpose permute expand slice select split split_with_sizes chunk "
    "unbind squeeze unsqueeze detach alias as_strided unfold narrow diagonal lift_fresh numpy_T view_as_real "
    "view_as_complex empty empty_like empty_strided new_empty new_empty_strided resize_ set_"
)
"""Operators that compute nothing."""

COPIES = _names(
    "_to_copy clone copy contiguous cat stack index gather index_select flip roll constant_pad_nd repeat masked_fill "
    "where tril triu pin_memory"
)
CASTS = {"_to_copy", "copy"}
PRODUCTS = {"bmm", "baddbmm", "mm", "addmm"}
CONSTANTS = _names(
    "fill full full_like zero zeros ones zeros_like ones_like masked_fill where scalar_tensor new_zeros new_full "
    "new_ones log"
)
"""Operators that put infinity where it is asked for."""

COMMUNICATION = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "fsdp", "_dtensor"}
"""Namespaces of what passes between processes, into buffers that hold anything before."""

KNOWN = {"aten", "prims", "prim", "profiler", *COMMUNICATION}
"""Namespaces of torch's own operators."""


def rule_of(operator: str) -> Rule | None:
    """The rule that an operator is held against, None where 16 bits are safe."""
    return RULES.get(operator)


def breaks(rule: Rule, outputs: tuple[str, ...], reduced: float) -> bool:
    """Whether an operator with outputs of these types, each of `reduced` elements, breaks a rule."""
    judged = outputs[1:] if rule.judged is Judged.STATISTICS else outputs
    return any(name in LOW for name in judged) and (rule.judged is not Judged.LARGE or reduced >= COUNTABLE)
