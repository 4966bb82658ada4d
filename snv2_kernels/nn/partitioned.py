"""A partition with its weights: kernels run its regions, PyTorch what is between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snv2_kernels.graph.partition import OtherInput, Partition
from snv2_kernels.graph.recipe import Recipe
from snv2_kernels.nn.planned import RecipeModule
from snv2_kernels.nn.recognition import named_tensors
from snv2_kernels.packing import Builder
from snv2_kernels.packing.units import Unsupported

__all__ = ["BoundPartition", "check_regions"]


class _PackedRegion:
    """A region with packed weights. What the kernels do not cover is computed by the formula."""

    def __init__(
        self, region: RecipeModule, backend: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._region, self._backend, self._dtype = region, backend, dtype
        self.reason: str | None = None
        try:
            self._weights = region._pack(backend, dtype, device)
        except Unsupported as error:
            self.reason = str(error)

    def __call__(self, x: Tensor) -> Any:
        region = self._region
        if self.reason is None and x.dtype == self._dtype and region._covers(self._weights, x):
            return region._run(self._weights, x, self._backend)
        return region.recipe.plain(x, region.state)


def check_regions(module: nn.Module, partition: Partition) -> None:
    """Raise :class:`Unsupported` for a region that the kernels do not cover."""
    tensors = named_tensors(module)
    for region in partition.regions:
        Recipe.read(region.recipe).tell(Builder(), [tensors[name] for name in region.names])


class BoundPartition:
    """The forward of a module in ``eval()`` mode, with packed weights and the module's tensors.

    Raises:
        Unsupported: if the numbers of no region can be packed.
    """

    def __init__(
        self,
        module: nn.Module,
        partition: Partition,
        backend: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        regions = []
        tensors = named_tensors(module)
        for told in partition.regions:
            state = [tensors[name] for name in told.names]
            region = RecipeModule(Recipe.read(told.recipe), state)
            regions.append(_PackedRegion(region, backend, dtype, device))
        reasons = [region.reason for region in regions]
        if None not in reasons:
            raise Unsupported(str(reasons[0]))
        self._forward = partition.bind(regions, [tensors[name] for name in partition.names])

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the results; raises :class:`OtherInput` where the plain forward is to tell, also
        what is wrong with an input."""
        try:
            return self._forward(x)
        except Exception as error:
            raise OtherInput from error
