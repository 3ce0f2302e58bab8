"""An oracle for every rule under every spelling; one that has no case fails here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsvd.axes import Block, TensorType
from fxsvd.relations import Relations
from fxsvd.rules import RULES, Call
from tests.helpers.oracle import Case, check

Key = Callable[..., Any] | str
FIXED = "ties it to an axis of fixed width"


def name_of(key: Key) -> str:
    """One name for all spellings of an op.

    >>> name_of("relu_"), name_of(torch.special.expm1)
    ('relu', 'expm1')
    """
    name = key if isinstance(key, str) else key.__name__
    return name.strip("_").removeprefix("special_").removeprefix("linalg_")


# ---------------------------------------------------------------- elementwise

DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "unit": lambda x: 0.9 * x.tanh(),
    "inside": lambda x: 0.1 + 0.8 * x.sigmoid(),
    "above": lambda x: 1.1 + x.sigmoid(),
    "positive": lambda x: x.relu(),
}
UNARY = {
    "plain": """
        relu relu6 leaky_relu rrelu elu celu selu gelu silu mish hardswish tanh tanhshrink softsign
        softshrink hardshrink abs absolute neg negative sin tan atan sinh asinh square erf floor
        ceil round trunc sign sgn expm1 nan_to_num clone contiguous detach alias positive conj real
        resolve_conj double cpu deg2rad rad2deg sigmoid hardsigmoid exp exp2 cos cosh softplus
        logsigmoid log_sigmoid erfc isnan isinf isfinite logical_not pos arctan arcsinh fix
        dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout
        zeros_like ones_like
    """,
    "unit": "asin acos arcsin arccos atanh arctanh log1p erfinv",
    "inside": "log log2 log10 rsqrt reciprocal logit lgamma digamma",
    "above": "acosh arccosh",
    "positive": "sqrt",
}
CASES: dict[str, Case] = {
    name: Case(lambda op, x, y, m, domain=DOMAINS[domain]: op(domain(x)))
    for domain, names in UNARY.items()
    for name in names.split()
}
for _name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
    CASES[_name] = Case(lambda op, x, y, m: op(x, 0.5, False))
CASES["rrelu"] = Case(lambda op, x, y, m: op(x, 0.1, 0.3, False))
for _name in ("dropout1d", "dropout2d", "dropout3d"):
    CASES[_name] = Case(lambda op, x, y, m: op(x[:, :, None], 0.5, False))
CASES["dropout2d"] = Case(lambda op, x, y, m: op(x, 0.5, False), image=True)
CASES["dropout3d"] = Case(lambda op, x, y, m: op(x[:, :, None], 0.5, False), image=True)

BINARY = """
    add sub subtract maximum minimum fmax fmin logaddexp mul multiply
    eq ne lt le gt ge less greater less_equal greater_equal not_equal isclose rsub
    logical_and logical_or logical_xor iadd isub imul
"""
CASES |= {name: Case(lambda op, x, y, m: op(x, y)) for name in BINARY.split()}
DIVISIONS = (
    "div divide true_divide floor_divide fmod remainder atan2 arctan2 truediv itruediv floordiv mod"
)
CASES |= {name: Case(lambda op, x, y, m: op(x, 1.5 + y.sigmoid())) for name in DIVISIONS.split()}
POWERS = "pow ipow"
CASES |= {name: Case(lambda op, x, y, m: op(1.5 + x.sigmoid(), y)) for name in POWERS.split()}
CASES["float_power"] = Case(lambda op, x, y, m: op((1.5 + x.sigmoid()).double(), y))
BITS = "bitwise_and bitwise_or bitwise_xor and or xor iand ior"
CASES |= {name: Case(lambda op, x, y, m: op(x > 0, y > 0)) for name in BITS.split()}


def each(use: Callable[..., Any], **options: Any) -> Case:
    return Case(use, **options)


def mixing(use: Callable[..., Any], **options: Any) -> Case:
    """An op that contracts or takes statistics: outputs move with several inputs."""
    return Case(use, nudge=False, **options)


def frozen(use: Callable[..., Any], why: str, **options: Any) -> Case:
    return Case(use, narrowed=False, why=why, nudge=False, **options)


WEIGHT = {"w": lambda: nn.Parameter(torch.zeros(8, 6))}
VECTOR = {"w": lambda: nn.Parameter(torch.zeros(8))}
CASES |= {
    "float": each(lambda op, x, y, m: op(x).to(x.dtype), masked=False),  # rounds
    "half": each(lambda op, x, y, m: op(x).to(x.dtype), masked=False),
    "bfloat16": each(lambda op, x, y, m: op(x).to(x.dtype), masked=False),
    "to": each(lambda op, x, y, m: op(x, torch.float64).to(x.dtype)),
    "type": each(lambda op, x, y, m: op(x, torch.float64).to(x.dtype)),
    "type_as": each(lambda op, x, y, m: op(x, y)),
    "bool": each(lambda op, x, y, m: op(x)),
    "int": each(lambda op, x, y, m: op(4 * x)),
    "long": each(lambda op, x, y, m: op(4 * x)),
    "bitwise_not": each(lambda op, x, y, m: op(x > 0)),
    "invert": each(lambda op, x, y, m: op(x > 0)),
    "threshold": each(lambda op, x, y, m: op(x, 0.1, 0.5)),
    "clamp": each(lambda op, x, y, m: op(x, -0.5, 0.5)),
    "clip": each(lambda op, x, y, m: op(x, 0.1, 0.5)),
    "hardtanh": each(lambda op, x, y, m: op(x)),
    "where": each(lambda op, x, y, m: torch.where(x > 0, x, y) if callable(op) else x),
    "masked_fill": each(lambda op, x, y, m: op(x, y > 0, 0.5)),
    "addcmul": each(lambda op, x, y, m: op(x, x, y)),
    "addcdiv": each(lambda op, x, y, m: op(x, y, 1.5 + x.sigmoid())),
    "lerp": each(lambda op, x, y, m: op(x, y, 0.3)),
    "prelu": each(lambda op, x, y, m: op(x, m.w), members=VECTOR),
    "glu": each(lambda op, x, y, m: op(x)),
    "complex": frozen(lambda op, x, y, m: torch.view_as_real(op(x, y)), "makes complex numbers"),
    "polar": frozen(lambda op, x, y, m: torch.view_as_real(op(x, y)), "makes complex numbers"),
}

# ---------------------------------------------------------------- contraction

CASES |= {
    "linear": mixing(lambda op, x, y, m: op(x, m.w.t()), members=WEIGHT),
    "matmul": mixing(lambda op, x, y, m: op(x, m.w), members=WEIGHT),
    "imatmul": mixing(lambda op, x, y, m: op(x, m.w), members=WEIGHT),
    "mm": mixing(lambda op, x, y, m: op(x, m.w), members=WEIGHT),
    "mv": mixing(lambda op, x, y, m: op(x, m.w)[:, None], members=VECTOR),
    "bmm": mixing(lambda op, x, y, m: op(x[:, None], y[:, :, None])),
    "inner": mixing(lambda op, x, y, m: op(x, m.w.t()), members=WEIGHT),
    "dot": mixing(lambda op, x, y, m: x + op(m.v, m.w), members={**VECTOR, "v": VECTOR["w"]}),
    "outer": mixing(lambda op, x, y, m: x @ op(m.w, m.w), members=VECTOR),
    "ger": mixing(lambda op, x, y, m: x @ op(m.w, m.w), members=VECTOR),
    "einsum": mixing(lambda op, x, y, m: op("bi,bi,ij->bj", x, y, m.w), members=WEIGHT),
    "addmm": mixing(lambda op, x, y, m: op(y[:, :6], x, m.w), members=WEIGHT),
    "addmv": mixing(lambda op, x, y, m: op(y[:, 0], x, m.w)[:, None], members=VECTOR),
    "addbmm": mixing(
        lambda op, x, y, m: x @ op(1.0 * m.w, m.v, m.u),
        members={
            **WEIGHT,
            "v": lambda: nn.Parameter(torch.zeros(2, 8, 3)),
            "u": lambda: nn.Parameter(torch.zeros(2, 3, 6)),
        },
    ),
    "baddbmm": mixing(lambda op, x, y, m: op(y[:, :1, None], x[:, None], y[:, :, None])),
    "embedding": mixing(
        lambda op, x, y, m: x + op(*in_order(op, torch.ones_like(y[:, 0]).long(), m.w)),
        members={"w": lambda: nn.Parameter(torch.zeros(4, 8))},
    ),
}


def in_order(op: Any, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (weight, index) if op is torch.embedding else (index, weight)


def convolved(dims: int, transposed: bool) -> Case:
    """With groups too: two for the plain ones."""

    def use(op: Any, x: Tensor, y: Tensor, m: Any) -> Tensor:
        lifted = {1: x.flatten(2), 2: x, 3: x[:, :, None]}[dims]
        return op(op(lifted, m.w, m.v), m.u, groups=2)

    kernel = {1: (1,), 2: (2, 2), 3: (1, 2, 2)}[dims]
    shapes = ((8, 6), (6, 2)) if transposed else ((6, 8), (4, 3))
    w, u = (partial(lambda s: nn.Parameter(torch.zeros(*s, *kernel)), s) for s in shapes)
    return mixing(
        use, image=True, members={"w": w, "v": lambda: nn.Parameter(torch.zeros(6)), "u": u}
    )


CASES |= {f"conv{k}d": convolved(k, False) for k in (1, 2, 3)}
CASES |= {f"conv_transpose{k}d": convolved(k, True) for k in (1, 2, 3)}
CASES["scaled_dot_product_attention"] = mixing(
    lambda op, x, y, m: op(x.view(-1, 2, 1, 4), y.view(-1, 2, 1, 4), y.view(-1, 2, 1, 4))
)

# ---------------------------------------------------------------- movement

CASES |= {
    "view": each(lambda op, x, y, m: op(x, (-1, 2, 4))),
    "reshape": each(lambda op, x, y, m: op(x, (-1, 4, 2))),
    "unflatten": each(lambda op, x, y, m: op(x, 1, (2, 4))),
    "view_as": each(lambda op, x, y, m: op(x.unsqueeze(2), y)),
    "reshape_as": each(lambda op, x, y, m: op(x.unsqueeze(2), y)),
    "flatten": each(lambda op, x, y, m: op(x, 1), image=True),
    "ravel": each(lambda op, x, y, m: op(x).view(-1, 8)),
    "squeeze": each(lambda op, x, y, m: op(x[:, None], 1)),
    "unsqueeze": each(lambda op, x, y, m: op(x, 1)),
    "permute": each(lambda op, x, y, m: op(x, (0, 2, 3, 1)), image=True),
    "transpose": each(lambda op, x, y, m: op(x, 1, 3), image=True),
    "swapaxes": each(lambda op, x, y, m: op(x, 1, 3), image=True),
    "swapdims": each(lambda op, x, y, m: op(x, 1, -1), image=True),
    "t": each(lambda op, x, y, m: op(op(x) * 2)),
    "adjoint": each(lambda op, x, y, m: op(x.flatten(2)), image=True),
    "movedim": each(lambda op, x, y, m: op(x, 1, 3), image=True),
    "moveaxis": each(lambda op, x, y, m: op(x, (1, 2), (3, 1)), image=True),
    "getattr": each(lambda op, x, y, m: x.flatten(2).mT, image=True),
    "expand": each(lambda op, x, y, m: op(x[:, None], (-1, 3, 8))),
    "broadcast_to": each(lambda op, x, y, m: op(x[:, :, None], (x.shape[0], 8, 3))),
    "expand_as": each(lambda op, x, y, m: op(x[:, None], y[:, None].repeat(1, 3, 1))),
    "repeat": each(lambda op, x, y, m: op(x, (1, 2))),
    "tile": each(lambda op, x, y, m: op(x, (1, 2))),
    "repeat_interleave": each(lambda op, x, y, m: op(x, 2, dim=1)),
    "flip": each(lambda op, x, y, m: op(x, (1,))),
    "roll": each(lambda op, x, y, m: op(x, 3, 1)),
    "cat": each(lambda op, x, y, m: op([x, y], 1)),
    "concat": each(lambda op, x, y, m: op([x, y], -1)),
    "concatenate": each(lambda op, x, y, m: op([x, y], 1)),
    "stack": each(lambda op, x, y, m: op([x, y], 1)),
    "pad": each(lambda op, x, y, m: op(x, (2, 3))),
    "split": each(lambda op, x, y, m: op(x, 3, 1)),
    "unsafe_split": each(lambda op, x, y, m: op(x, 3, 1)),
    "split_with_sizes": each(lambda op, x, y, m: op(x, [2, 6], 1)),
    "unsafe_split_with_sizes": each(lambda op, x, y, m: op(x, [2, 6], 1)),
    "chunk": each(lambda op, x, y, m: op(x, 2, 1)),
    "unsafe_chunk": each(lambda op, x, y, m: op(x, 3, 1)),
    "tensor_split": each(lambda op, x, y, m: op(x, 3, 1)),
    "channel_shuffle": each(lambda op, x, y, m: op(x, 2), image=True),
    "pixel_shuffle": each(lambda op, x, y, m: op(x, 2), image=True),
    "pixel_unshuffle": each(lambda op, x, y, m: op(x, 2), image=True),
}

# ---------------------------------------------------------------- subscripts

INDEX = {"w": lambda: torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])}


def write(op: Any, x: Tensor, y: Tensor, m: Any) -> Tensor:
    out = y.clone()
    out[:, 2:6] = x[:, 2:6]
    return out


CASES |= {
    "getitem": each(lambda op, x, y, m: (x[:, 2:7], x[:, m.w], x[:, None, ..., 1:]), members=INDEX),
    "setitem": mixing(write),
    "select": each(lambda op, x, y, m: op(x.view(-1, 2, 4), 1, 1)),
    "narrow": each(lambda op, x, y, m: op(x, 1, 2, 5)),
    "unbind": each(lambda op, x, y, m: op(x.view(-1, 2, 4), 1)),
    "index_select": each(lambda op, x, y, m: op(x, 1, m.w), members=INDEX),
}

# ---------------------------------------------------------------- making tensors

CASES |= {
    name: each(lambda op, x, y, m: x + op((8,), dtype=x.dtype).mul(0).nan_to_num(0))
    for name in ("zeros", "empty", "ones")
}
CASES |= {
    "full": each(lambda op, x, y, m: x + op((8,), 0.5, dtype=x.dtype)),
    "new_zeros": each(lambda op, x, y, m: x * op(x, (8,))),
    "new_ones": each(lambda op, x, y, m: x * op(x, (8,))),
    "new_empty": mixing(lambda op, x, y, m: x + op(x, (8,)).mul(0).nan_to_num(0)),
    "new_full": each(lambda op, x, y, m: x + op(x, (8,), 0.5)),
    "empty_like": mixing(lambda op, x, y, m: y + op(x).mul(0).nan_to_num(0)),
    "full_like": each(lambda op, x, y, m: y * op(x, 0.5)),
    "tril": frozen(lambda op, x, y, m: op(x), "takes a triangle of it"),
    "triu": frozen(lambda op, x, y, m: op(x), "takes a triangle of it"),
    "arange": frozen(lambda op, x, y, m: x + op(8), FIXED),
    "linspace": frozen(lambda op, x, y, m: x + op(0, 1, 8), FIXED),
    "logspace": frozen(lambda op, x, y, m: x + op(0, 1, 8), FIXED),
    "eye": frozen(lambda op, x, y, m: x[:, None] * op(8), FIXED),
    "meshgrid": frozen(
        lambda op, x, y, m: x[:, None] + op([torch.arange(8)] * 2, indexing="ij")[0], FIXED
    ),
    "randperm": frozen(lambda op, x, y, m: x + 0 * op(8), FIXED),
    "rand": frozen(lambda op, x, y, m: x + 0 * op(8), FIXED),
    "randn": frozen(lambda op, x, y, m: x + 0 * op(8), FIXED),
    "randint": frozen(lambda op, x, y, m: x + 0 * op(4, (8,)), FIXED),
}
RANDOM = ("rand_like", "randn_like", "bernoulli", "uniform")
CASES |= {name: mixing(lambda op, x, y, m: y + 0 * op(x.sigmoid())) for name in RANDOM}

# ---------------------------------------------------------------- norms, statistics

STATISTICS = {"masked": False}
CASES |= {
    "batch_norm": each(
        lambda op, x, y, m: (
            op(x, m.w, m.w, m.mean, m.running_var, False, 0.1, 1e-5, False)
            if op is torch.batch_norm
            else op(x, m.mean, m.running_var, m.w, m.w)
        ),
        members={**VECTOR, "mean": lambda: torch.zeros(8), "running_var": lambda: torch.ones(8)},
    ),
    "instance_norm": mixing(
        lambda op, x, y, m: (
            op(x, None, None, m.w, m.w, True, 0.1, 1e-5, False)
            if op is torch.instance_norm
            else op(x, weight=m.w)
        ),
        members=VECTOR,
        image=True,
    ),
    "layer_norm": mixing(lambda op, x, y, m: op(x, (8,), m.w, m.w), members=VECTOR, **STATISTICS),
    "rms_norm": mixing(lambda op, x, y, m: op(x, (8,), m.w), members=VECTOR, **STATISTICS),
    "group_norm": mixing(lambda op, x, y, m: op(x, 2, m.w, m.w), members=VECTOR, **STATISTICS),
    "local_response_norm": frozen(
        lambda op, x, y, m: op(x, 3), "mixes neighbouring channels", image=True
    ),
    "normalize": mixing(lambda op, x, y, m: op(x, dim=1)),
    "cosine_similarity": mixing(lambda op, x, y, m: op(x, y)[:, None]),
    "weight_norm": mixing(
        lambda op, x, y, m: x @ op(m.w, m.g, 0).t(),
        members={
            "w": lambda: nn.Parameter(torch.zeros(6, 8)),
            "g": lambda: nn.Parameter(torch.zeros(6, 1)),
        },
    ),
}
for _name in ("sum", "norm", "vector_norm", "count_nonzero", "nansum"):
    CASES[_name] = mixing(lambda op, x, y, m: op(x, dim=1)[:, None], **STATISTICS)
for _name in ("mean", "var", "std", "amax", "amin", "max", "min", "var_mean", "std_mean"):
    CASES[_name] = mixing(
        lambda op, x, y, m: [t[:, None] for t in tupled(op(x, dim=1)) if t.is_floating_point()],
        **STATISTICS,
    )
for _name in ("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp", "diff"):
    CASES[_name] = frozen(lambda op, x, y, m: op(x, dim=1), "mixes along it")
for _name in ("sort", "argsort"):
    CASES[_name] = frozen(lambda op, x, y, m: op(x, dim=1), "mixes along it")
CASES |= {
    "msort": frozen(lambda op, x, y, m: op(x.t()).t(), "mixes along it"),
    "gumbel_softmax": frozen(lambda op, x, y, m: x + 0 * op(x, dim=1), "mixes along it"),
    "topk": frozen(lambda op, x, y, m: op(x, 3, dim=1), ""),
    "kthvalue": frozen(lambda op, x, y, m: [t[:, None] for t in op(x, 3, dim=1)], ""),
}
for _name in ("argmax", "argmin", "logsumexp", "prod", "all", "any", "median", "mode"):
    CASES[_name] = frozen(
        lambda op, x, y, m: [t[:, None] for t in tupled(op(x, dim=1))], "reduces it"
    )
CASES["quantile"] = frozen(lambda op, x, y, m: op(x, 0.3, dim=1)[:, None], "")


def tupled(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


# ---------------------------------------------------------------- positions


def pooled(dims: int, *options: Any) -> Case:
    def use(op: Any, x: Tensor, y: Tensor, m: Any) -> Any:
        lifted = {1: x.flatten(2), 2: x, 3: x[:, :, None].repeat(1, 1, 4, 1, 1)}[dims]
        return [t for t in tupled(op(lifted, *options)) if t.is_floating_point()]

    return each(use, image=True)


for _k in (1, 2, 3):
    for _name in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool"):
        CASES[f"{_name}{_k}d"] = pooled(_k, 2)
        CASES[f"{_name}{_k}d_with_indices"] = pooled(_k, 2)
    CASES[f"lp_pool{_k}d"] = pooled(_k, 2.0, 2)
for _name in ("fractional_max_pool2d", "fractional_max_pool2d_with_indices"):
    CASES[_name] = Case(
        lambda op, x, y, m: x + 0 * tupled(op(x.repeat(1, 1, 2, 2), 2, 4))[0], image=True
    )
CASES |= {
    "interpolate": each(lambda op, x, y, m: op(x, scale_factor=2.0), image=True),
    "upsample": each(lambda op, x, y, m: op(x, scale_factor=2.0), image=True),
    "upsample_nearest": each(lambda op, x, y, m: op(x, scale_factor=2), image=True),
    "upsample_bilinear": each(lambda op, x, y, m: op(x, scale_factor=2), image=True),
    "grid_sample": each(
        lambda op, x, y, m: op(x, m.w.expand(x.shape[0], 4, 4, 2), align_corners=False),
        image=True,
        members={"w": lambda: torch.zeros(1, 1, 1, 2)},
    ),
    "unfold": each(lambda op, x, y, m: op(x, 2) if op is F.unfold else op(x, 2, 2, 1), image=True),
    "fold": each(lambda op, x, y, m: op(F.unfold(x, 2), (4, 4), 2), image=True),
}


# ---------------------------------------------------------------- running them

RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}  # layers: see test_layers.py
UNREACHED = {
    # Values are constants of the graph by then, or the op does not occur in one.
    "tensor": lambda rule, call, t: rule(call),
    "as_tensor": lambda rule, call, t: rule(call),
    "cuda": lambda rule, call, t: rule(call, t),
    "requires_grad": lambda rule, call, t: rule(call, t),
    # They fix the batch size, so that capture refuses them.
    "fractional_max_pool3d": lambda rule, call, t: rule(call, t),
    "fractional_max_pool3d_with_indices": lambda rule, call, t: rule(call, t),
}


def test_every_rule_has_a_case() -> None:
    covered = CASES.keys() | RECURRENT | UNREACHED.keys()
    missing = {name_of(key) for key in RULES} - covered
    assert not missing, f"rules without a case in tests/test_rules.py: {sorted(missing)}"


def spelled(key: Key) -> Callable[..., Any]:
    if not isinstance(key, str):
        return key

    def method(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, key)(*args, **kwargs)

    return method


def identity(key: Key) -> str:
    return key if isinstance(key, str) else f"{key.__module__}.{key.__name__}"


def is_property(key: Key) -> bool:
    return isinstance(key, str) and not callable(getattr(torch.Tensor, key))


KEYS = {
    f"{identity(key)}-{i}": key
    for i, key in enumerate(RULES)
    if name_of(key) in CASES and not is_property(key)
}


# The shape of what they are given changes under them: nothing about it can be said.
RESHAPED_IN_PLACE = {"squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_"}


@pytest.mark.filterwarnings("ignore:`nn.functional.upsample:UserWarning")
@pytest.mark.filterwarnings("ignore:nn.functional.(tanh|sigmoid) is deprecated")
@pytest.mark.parametrize("name", KEYS)
def test_rule(name: str) -> None:
    key = KEYS[name]
    case = CASES[name_of(key)]
    if key in RESHAPED_IN_PLACE:
        case = replace(case, narrowed=False, nudge=False, why="without a rule")
    check(case, spelled(key), key)


@pytest.mark.parametrize("name", UNREACHED)
def test_rules_that_no_graph_reaches(name: str) -> None:
    """Called by hand: constants are fixed, all else passes its channels."""
    relations = Relations()
    shape = (13, 8, 4, 4, 4)
    t = TensorType(shape, (Block((1,), relations.fresh(8)),))
    for key, rule in RULES.items():
        if name_of(key) == name:
            out = UNREACHED[name](rule, Call(relations, name, torch.Size(shape)), t)
            assert out.shape == shape
            assert out.blocks == (() if name in ("tensor", "as_tensor") else t.blocks)
