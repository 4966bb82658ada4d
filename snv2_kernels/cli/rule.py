"""How large an error may be: the one place that says so.

Errors are ``max |y - exact| / max |exact|`` against float64. A rounding of the result costs at
most half a unit in the last place (``torch.finfo(dtype).eps``); the bounds are multiples of it,
and leave room for sums in another order and for intermediate values kept in ``dtype``, which a
network has some fifty of.
"""

from __future__ import annotations

import torch

__all__ = ["NETWORK_BOUNDS", "allowed_error", "describe_rule"]

_EAGER_FACTOR = 1.5
_OP_UNITS = 4  # at most one sum of nine products
_UNIT_UNITS = 16  # two sums of up to 488 products and one of nine
NETWORK_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1.6e-1}


def _bound(kind: str, dtype: torch.dtype) -> float:
    if kind == "network":
        return NETWORK_BOUNDS[dtype]
    return (_OP_UNITS if kind == "op" else _UNIT_UNITS) * torch.finfo(dtype).eps


def allowed_error(kind: str, dtype: torch.dtype, eager_error: float) -> float:
    """The largest error that passes.

    Args:
        kind: "op", "unit" or "network".
        dtype: of the input and the result.
        eager_error: the error of plain PyTorch in ``dtype`` on the same input.
    """
    relative = _EAGER_FACTOR * eager_error + torch.finfo(dtype).eps
    return min(relative, _bound(kind, dtype))


def describe_rule() -> str:
    """The rule in words."""
    networks = ", ".join(
        f"{bound:g} in {str(dtype).removeprefix('torch.')}"
        for dtype, bound in NETWORK_BOUNDS.items()
    )
    return (
        "error: max |y - exact| / max |exact|, exact computed in float64\n"
        f"bound: {_EAGER_FACTOR} x the error of eager PyTorch in the same dtype + 1 ulp, and at "
        f"most {_OP_UNITS} ulp for an op,\n"
        f"       {_UNIT_UNITS} ulp for a unit; for a network {networks}"
    )
