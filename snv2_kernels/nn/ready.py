"""The short way from a call to the kernels, for inputs like one that took the long way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from snv2_kernels.backends import choice
from snv2_kernels.nn.watch import optimizer_steps
from snv2_kernels.packing import Plan

if TYPE_CHECKING:
    from snv2_kernels.graph.names import Names
    from snv2_kernels.nn.fused import FusedModule
    from snv2_kernels.nn.watch import Watch

__all__ = ["Ready"]

_is_tracing = torch._C._is_tracing
_are_transforms_active = torch._C._are_functorch_transforms_active
_below_autograd = torch._C._AutoDispatchBelowAutograd


class Ready:
    """A forward by a plan of the CPU's kernels, with all done that is the same for inputs of one
    shape and dtype without gradients. What may have changed since is looked at in each call."""

    __slots__ = (
        "_arguments", "_choice", "_dtype", "_op", "_outside", "_owner", "_shape", "_watch", "finishes"
    )  # fmt: skip

    def __init__(
        self, module: FusedModule, watch: Watch, outside: list[Names], plan: Plan, x: Tensor
    ) -> None:
        self._owner, self._watch, self._outside = id(module), watch, outside
        self._shape, self._dtype, self._choice = x.shape, x.dtype, choice()
        single = len(plan.results) == 1
        operators = torch.ops.snv2
        self._op = operators.network if single else operators.network_results
        self._arguments = plan.arguments if single else plan.result_arguments
        self.finishes = not (single and module._returns_result())

    def takes(self, module: FusedModule, x: Any) -> bool:
        """Whether the forward of ``module``, as it is now, with ``x`` is this one."""
        if id(module) != self._owner or type(x) is not Tensor or x.shape != self._shape:
            return False
        self._watch.prefetch()  # while the rest is looked at
        return (
            x.dtype is self._dtype
            and x.is_cpu
            and x.layout is torch.strided
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not _is_tracing()
            and not _are_transforms_active()
            and forward_ad._current_level < 0
            and choice() == self._choice
            and self._watch.rests(module)
            and all(names.hold() for names in self._outside)
        )

    def run(self, x: Tensor) -> Any:
        """The results, which the module is to finish where :attr:`finishes` says so."""
        with _below_autograd():
            return self._op(x, *self._arguments)
