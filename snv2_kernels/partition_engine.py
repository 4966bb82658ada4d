"""An engine's plans where a forward is cut: regions on memory of their own, PyTorch between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from types import FunctionType, GetSetDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snv2_kernels.graph.partition import OtherInput, Partition
from snv2_kernels.graph.recipe import Recipe
from snv2_kernels.nn.partitioned import check_regions
from snv2_kernels.nn.planned import RecipeModule
from snv2_kernels.nn.recognition import named_tensors
from snv2_kernels.nn.recognized import Recognized
from snv2_kernels.ops import run_plan
from snv2_kernels.packing import Plan
from snv2_kernels.packing.units import Unsupported
from snv2_kernels.runners import CpuRunner, Shape

__all__ = ["FrozenPartition", "PartitionRunner", "partition_of"]

# Functions that pickle does not find by their own names, such as max_pool2d, which chooses another.
_UNNAMED = {
    value: f"nn.functional.{name}" for name, value in vars(F).items()
    if isinstance(value, FunctionType) and "<locals>" in value.__qualname__
}  # fmt: skip


def partition_of(module: nn.Module) -> Partition | None:
    """Returns the partition of a fused module, None for one that is one plan or no fused one."""
    return module._partition() if isinstance(module, Recognized) else None


@dataclass(frozen=True)
class _Function:
    """The path to a function of torch, which is pickled in its place."""

    path: str

    @staticmethod
    def of(value: Any) -> Any:
        """Returns a function's path, and any other value."""
        if isinstance(value, FunctionType) and value in _UNNAMED:
            return _Function(_UNNAMED[value])
        owner = getattr(value, "__self__", None)
        if isinstance(owner, GetSetDescriptorType):  # Tensor.shape.__get__
            return _Function(f"Tensor.{owner.__name__}.{value.__name__}")
        return value

    def __call__(self) -> Any:
        return attrgetter(self.path)(torch)


class FrozenPartition:
    """A partition with packed weights and copies of the module's tensors.

    Raises:
        Unsupported: if the numbers of no region can be packed.
    """

    def __init__(self, module: nn.Module, partition: Partition, dtype: torch.dtype) -> None:
        check_regions(module, partition)
        tensors = named_tensors(module)
        self.partition, self.dtype = partition, dtype
        self.tensors = [_frozen(tensors[name]) for name in partition.names]
        self.regions: list[Plan | RecipeModule] = []  # by the formula what cannot be packed
        reasons: list[str] = []
        for told in partition.regions:
            region = RecipeModule(Recipe.read(told.recipe), [tensors[name] for name in told.names])
            try:
                self.regions.append(region._cpu_plan(dtype))
            except Unsupported as error:
                reasons.append(str(error))
                region.state = list(map(_frozen, region.state))
                self.regions.append(region)
        if len(reasons) == len(self.regions):
            raise Unsupported(reasons[0])

    def __getstate__(self) -> dict[str, Any]:
        constants = tuple(map(_Function.of, self.partition.constants))
        return {**vars(self), "partition": replace(self.partition, constants=constants)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        constants = tuple(c() if isinstance(c, _Function) else c for c in self.partition.constants)
        self.partition = replace(self.partition, constants=constants)

    @property
    def plans(self) -> list[Plan]:
        return [region for region in self.regions if isinstance(region, Plan)]

    @property
    def element(self) -> torch.dtype:
        return self.plans[0].element


def _frozen(t: Tensor) -> Tensor:
    return t.detach().clone()


class _Region:
    """A region that runs on memory planned for its first input. Another one, such as a map whose
    channels lie beside each other, runs as in the fused module."""

    def __init__(self, packed: Plan | RecipeModule, dtype: torch.dtype) -> None:
        self._packed, self._dtype = packed, dtype
        self._shape: Shape | None = None
        self.runner: CpuRunner | None = None

    def __call__(self, x: Tensor) -> Any:
        packed = self._packed
        if not isinstance(packed, Plan):
            return packed.recipe.plain(x, packed.state)
        if x.dtype != self._dtype:
            raise TypeError(f"a map of {x.dtype} on the way")
        if self._shape is None and x.is_contiguous():
            n, c, h, w = x.shape
            self._shape = n, c, h, w
            self.runner = CpuRunner(packed, self._shape, self._dtype, None)
        if self.runner is None or not self._fits(x):
            return run_plan(x, packed, "cpu")
        results = self.runner(x)
        return results[0] if len(results) == 1 else tuple(results)

    def _fits(self, x: Tensor) -> bool:
        assert self._shape is not None
        alike = tuple(x.shape[1:]) == self._shape[1:] and x.shape[0] <= self._shape[0]
        return alike and x.is_contiguous()


@dataclass(frozen=True)
class _Told:
    """What a report says of several plans."""

    units: int
    total: int  # multiply-adds of an image in the plans

    def multiply_adds(self, *_: int) -> int:
        return self.total


class PartitionRunner(CpuRunner):
    """The code of a partition, which is called once to plan the memory of its regions.

    Raises:
        OtherInput: if the partition is not right for the shape.
    """

    def __init__(self, frozen: FrozenPartition, shape: Shape) -> None:
        self.threads = torch.get_num_threads()
        with torch.inference_mode(False):
            self.input = torch.zeros(shape, dtype=frozen.dtype, device="cpu")
        self._regions = [_Region(packed, frozen.dtype) for packed in frozen.regions]
        self._forward = frozen.partition.bind(self._regions, frozen.tensors)
        self.op_calls = len(frozen.plans)
        self._weights = tuple(plan.weights for plan in frozen.plans)
        with torch.inference_mode(False), torch.no_grad():
            self.results = self(self.input)
        planned = [region.runner for region in self._regions if region.runner is not None]
        self.workspace = [memory for runner in planned for memory in runner.workspace]
        counts = (r.plan.multiply_adds(*r.input.shape[2:]) for r in planned)
        self.plan: Any = _Told(sum(plan.units for plan in frozen.plans), sum(counts))

    def __call__(self, x: Tensor) -> list[Tensor]:
        if not x.is_contiguous():
            x = self.input[: x.shape[0]].copy_(x)
        try:
            with torch.autocast("cpu", enabled=False):
                return list(self._forward(x))
        except Exception as error:  # as in the fused module, which then runs plain
            raise OtherInput(str(error)) from error

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        return self._weights
