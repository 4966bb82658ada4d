"""A recognition: what a module was found to compute, and where its numbers are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from snv2_kernels.graph.names import Names
from snv2_kernels.graph.partition import Partition
from snv2_kernels.graph.returned import Returned

__all__ = ["NotRecognized", "Recognition", "named_tensors", "path_of"]


@dataclass(frozen=True)
class Recognition:
    """What a module computes, and where its numbers are."""

    kind: str  # unit, stage, backbone (of several results), network or partition
    recipe: str  # empty where there is a partition instead
    names: tuple[str, ...]  # of the recipe's state among parameters and buffers
    weights: tuple[int, ...]  # places in it of the weights of convolutions and linear layers
    in_channels: int
    splits_input: bool
    plain_in_autocast: bool  # it leaves some results in float32
    returned: Returned
    checked_size: tuple[int, int, int]  # batch, height and width of the input that it is checked on
    last_map: tuple[int, int] | None  # the only size of the last map that it is true of
    asked: frozenset[str]  # words of snv2_kernels.graph.conditions
    alike: dict[tuple[Any, ...], bool]  # by conditions: whether the forward is the same in them
    outside: Names  # that the forward looks up
    structure: str  # of the module that this is true of
    tail: str = ""  # submodule that makes the forward's result of a network's
    partition: Partition | None = None

    def tail_of(self, module: nn.Module) -> nn.Module | None:
        if not self.tail:
            return None
        for part in path_of(module, self.tail):
            module = module._modules[part]  # type: ignore[assignment]
        return module

    def state(self, module: nn.Module) -> list[Tensor]:
        tensors = named_tensors(module)
        return [tensors[name] for name in self.names]


class NotRecognized(Exception):
    """The message is the reason in a few words."""

    def __init__(
        self,
        reason: str,
        channels: dict[str, int] | None = None,
        no_unit: bool = False,
        outside: Names | None = None,
    ) -> None:
        super().__init__(reason)
        self.channels = channels  # what is known of the inputs of submodules
        self.no_unit = no_unit  # nor in any of these submodules
        self.outside = outside  # names that the forward looks up, where it was recorded


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, a tied one by each of its names."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found.update(module.named_buffers(remove_duplicate=False))
    return found


def path_of(module: nn.Module, name: str) -> Iterator[str]:
    """The parts of a tensor's name: names of submodules may have dots in them."""
    own = (*module._parameters, *module._buffers, *module._modules)
    fitting = [key for key in own if f"{name}.".startswith(f"{key}.")]
    if fitting:
        key = max(fitting, key=len)
        yield key
        child = module._modules.get(key)
        if child is not None:
            yield from path_of(child, name[len(key) + 1 :])
