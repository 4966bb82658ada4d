"""How large an error may be: the one place that says so.

Errors are ``max |y - exact| / max |exact|`` against float64, bounds are multiples of one unit in
the last place, ``torch.finfo(dtype).eps``. Rounding the result costs half a unit. A sum of k
products in another order costs about sqrt(k) / 2 roundings: k is 9 for an op, up to 488 for a
unit, and a network is some fifty layers deep. A gradient passes a ReLU or it does not: where eager
PyTorch rounds the ReLU's input to the other side of zero, it errs by a whole one.
"""

from __future__ import annotations

import torch

__all__ = ["EAGER_FACTOR", "INT8_BOUND", "allowed_error", "describe_rule", "upper_bound"]

EAGER_FACTOR = 1.5
_OP_UNITS = 4
_UNIT_UNITS = 16  # of gradients, and of a network, but in float32
_FLOAT32_NETWORK = 1e-5
# Of networks in int8, rms of the error over rms of the scores. It tells wrong from right and no
# more, since how exact int8 is depends on the weights: scores that have nothing to do with the
# right ones err by 1.4, a random network by some hundredths.
INT8_BOUND = 0.5


def upper_bound(kind: str, dtype: torch.dtype) -> float:
    """The bound that holds however large the error of eager PyTorch is.

    Args:
        kind: "op", "gradient", "unit" or "network".
        dtype: of the input and the result.
    """
    if kind == "network" and dtype == torch.float32:
        return _FLOAT32_NETWORK
    return (_OP_UNITS if kind == "op" else _UNIT_UNITS) * torch.finfo(dtype).eps


def allowed_error(kind: str, dtype: torch.dtype, eager_error: float) -> float:
    """The largest error that passes.

    Args:
        kind: "op", "gradient", "unit" or "network".
        dtype: of the input and the result.
        eager_error: the error of plain PyTorch in ``dtype`` on the same input.
    """
    relative = EAGER_FACTOR * eager_error + torch.finfo(dtype).eps
    return min(relative, upper_bound(kind, dtype))


def describe_rule() -> str:
    """The rule in words."""
    return (
        "error: max |y - exact| / max |exact|, exact computed in float64\n"
        f"bound: {EAGER_FACTOR} x the error of eager PyTorch in the same dtype + 1 ulp,\n"
        f"       and at most {_OP_UNITS} ulp for an op, {_UNIT_UNITS} ulp for the rest,\n"
        f"       {_FLOAT32_NETWORK:g} for a network in fp32 (1 ulp is the dtype's eps)"
    )
