"""How each torch function appears in a graph: the table from functions to kinds of nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """How a torch function appears in the graph; with two plain arguments, as its `infix`."""

    op: str = "call_function"
    target: Any = None
    swapped: bool = False
    mutates: bool = False
    reads: bool = False
    infix: Any = None


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READS = _words(
    "size stride dim numel nelement ndimension element_size storage_offset is_contiguous data_ptr "
    "get_device is_floating_point is_complex is_signed is_set_to is_pinned is_shared is_same_size "
    "__len__ __hash__ __repr__ __format__ untyped_storage storage has_names is_inference is_conj "
    "is_neg requires_grad_ register_hook retain_grad"
)
_VALUES = _words("item tolist numpy __bool__ __int__ __float__ __index__ __complex__")
_TENSOR_PROPERTIES = _words("T H mT mH real imag data")
_OPERATORS = _words(
    "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift lt le gt ge eq ne neg "
    "pos invert abs getitem setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor "
    "imatmul ilshift irshift"
)
# What torch says it is asked for when it is asked for `x + y`.
_INFIX: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "remainder": operator.mod,
    "matmul": operator.matmul,
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor,
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "ne", "eq")},
}


def _dunders() -> dict[str, Call]:
    """Maps `__add__` and its like to the functions of the operator module."""
    rules = {}
    for name in _OPERATORS:
        function, stem = getattr(operator, name), name.rstrip("_")
        in_place = name.startswith("i") and name != "invert"
        rules[f"__{stem}__"] = Call(target=function, mutates=in_place or name == "setitem")
        rules[f"__r{stem}__"] = Call(target=function, swapped=True)
    rules["__div__"], rules["__rdiv__"] = rules["__truediv__"], rules["__rtruediv__"]
    return rules


def _method_rules() -> dict[Any, Call]:
    """One rule per attribute of torch.Tensor, keyed by the function object that torch hands over.

    Names of function objects cannot be trusted (`torch.Tensor.__pow__.__name__` is "pow"),
    identity can.
    """
    rules: dict[Any, Call] = {}
    dunders = _dunders()
    for name in dir(Tensor):
        attribute: Any = getattr(Tensor, name, None)
        if hasattr(attribute, "__get__") and hasattr(attribute, "__set__"):
            reads = name not in _TENSOR_PROPERTIES
            rules[attribute.__get__] = Call(target=(getattr, name), reads=reads)
            rules[attribute.__set__] = Call(target=(setattr, name), mutates=True)
        elif callable(attribute) and attribute.__hash__ is not None:
            rules.setdefault(attribute, dunders.get(name) or _method(name))
    return rules


def _method(name: str) -> Call:
    reads = name in _READS
    return Call("call_method", name, mutates=_mutates(name), reads=reads, infix=_INFIX.get(name))


def _mutates(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


_RULES = _method_rules()
VALUE_READS = {getattr(Tensor, name) for name in _VALUES if hasattr(Tensor, name)}


def call_of(func: Callable[..., Any]) -> Call:
    """Looks up, or makes, the rule for a torch function.

    Example:
        >>> call_of(Tensor.__radd__)
        Call(op='call_function', target=<built-in function add>, swapped=True, ...)
    """
    rule = _RULES.get(func)
    if rule is None:
        name = getattr(func, "__name__", "").partition(".")[0]  # of an overload, `add_.Tensor`
        rule = _RULES[func] = Call(target=func, mutates=_mutates(name))
    return rule
