"""Compares what was recognised in a module with the module's own forward."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from snv2_kernels.graph.nodes import holds_numbers
from snv2_kernels.graph.plain import plain_copy
from snv2_kernels.graph.recipe import Recipe
from snv2_kernels.graph.record import without_modes
from snv2_kernels.graph.returned import Returned
from snv2_kernels.memory import empty_floats
from snv2_kernels.nn.recognition import named_tensors
from snv2_kernels.testing import max_error

if TYPE_CHECKING:
    from snv2_kernels.nn.recognition import Recognition

__all__ = ["why_wrong"]

_BLOCK = 65537  # a prime, so rows of any length begin at different numbers
_MANY = 1 << 12  # numbers of a weight that is a part of a shared memory
_STEP = 25013  # between the beginnings of tensors in the block: multiples fall far apart
_LARGEST_ERROR = 1e-9  # between two orders of the same sums in float64
_LARGER = 3  # height and width of a second input, where the first one gives NaN


def why_wrong(module: nn.Module, recognition: Recognition) -> str | None:
    """Why the recipe does not compute what the module does, None if it does. On copies with random
    numbers: the module's own may be zeros, which hide an error."""
    numbers = _Numbers(module)
    copied = plain_copy(module, numbers.of)
    n, height, width = recognition.checked_size
    plain = torch.autocast("cpu", enabled=False)
    with without_modes(), torch.no_grad(), plain, _Products():
        for scale in (1, _LARGER):
            x = numbers.normal(n, recognition.in_channels, scale * height, scale * width)
            try:
                expected = copied(x.clone())
                actual = _computed(recognition, copied, x)
                filled = recognition.returned.filled(actual)
                tail = recognition.tail_of(copied)
                off = _largest_error(filled if tail is None else tail(filled), expected)
            except Exception as error:  # whatever a module's code may raise
                return f"its recognition cannot be verified: {error}"
            if recognition.partition is None or not math.isnan(off):
                break  # else a map of one pixel may have been divided by nothing
    if not off <= _LARGEST_ERROR:
        if "dtype" in recognition.asked:
            return "its forward depends on the dtype, and does something else in float64"
        return f"its recognition failed verification: off by {off:.1e}"
    return None


class _Numbers:
    """Random numbers in the place of a module's own.

    Many are few again and again, of which no rows are the same. Weights that are scaled alike are
    parts of one memory, each from another number of the block on: to draw or fill as many as a
    large network has would take longer than to compute with them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._block = self._drawn(_BLOCK)
        self._begun = 0  # tensors that are parts of a memory
        self._most: dict[float, int] = {}  # numbers in a tensor, by the scale of its numbers
        for t in (*module.parameters(), *module.buffers()):
            if t.dim() > 1 and t.is_floating_point():
                scale = _scale_of(t)
                self._most[scale] = max(t.numel(), self._most.get(scale, 0))
        self._memory: dict[float, Tensor] = {}

    def _drawn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def normal(self, *shape: int) -> Tensor:
        """Returns normal numbers in memory of their own."""
        count = math.prod(shape)
        if count < _BLOCK:
            return self._drawn(*shape)
        start = self._start()
        return self._block.repeat(-(-(start + count) // _BLOCK))[start : start + count].view(shape)

    def of(self, t: Tensor) -> Tensor:
        """Returns what takes the place of a parameter or buffer."""
        if holds_numbers(t):
            return t.detach().cpu().clone()
        if not t.is_floating_point():
            return torch.zeros(t.shape, dtype=t.dtype, device="cpu")
        if t.dim() < 2:
            return 0.5 + self.normal(*t.shape).abs()  # a variance is positive
        scale = _scale_of(t)
        if t.numel() < _MANY:
            return self._drawn(*t.shape) * scale
        if scale not in self._memory:
            blocks = -(-self._most[scale] // _BLOCK) + 1
            memory = empty_floats(2 * blocks * _BLOCK).view(torch.float64)
            memory.view(blocks, _BLOCK)[:] = self._block * scale
            self._memory[scale] = memory
        start = self._start()
        part: Tensor = self._memory[scale][start : start + t.numel()]
        return part.view(t.shape)

    def _start(self) -> int:
        """Returns a place in the block, another one for each tensor."""
        self._begun += 1
        return self._begun * _STEP % _BLOCK


class _Products(TorchFunctionMode):
    """Convolutions with many weights or groups, computed once for both forwards.

    Where these agree, the second asks for the same product of the same numbers, and to read a large
    network's weights is most of the work. Where a map is another one, by a bit, it is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, list[tuple[Tensor, Tensor]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.conv2d or kwargs or len(args) != _ARGUMENTS:
            return func(*args, **(kwargs or {}))
        x, weight, *others = args
        if weight.numel() < _BLOCK and others[-1] == 1:
            return func(*args)
        if weight.is_inference():  # which does not tell when it is written to
            return _convolved(*args)
        orders = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
        key = x.shape, orders, *map(_identity, (weight, *others))
        known = self._known.setdefault(key, [])
        for given, made in known:
            if torch.equal(given, x):
                return made.clone()  # which a forward may write to
        given, made = x.clone(), _convolved(*args)
        known.append((given, made.clone()))
        return made


_ARGUMENTS = 7  # of F.conv2d


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    groups: int,
) -> Tensor:  # fmt: skip
    """Returns F.conv2d's result, of a depthwise convolution by its definition: in float64 torch
    computes that group by group."""
    outputs, depth, height, width = weight.shape
    plain = x.dim() == 4 and x.is_contiguous() and not isinstance(padding, str)
    if not plain or depth != 1 or not x.shape[1] == groups == outputs:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    taps: Tensor = F.unfold(x, (height, width), dilation, padding, stride)  # [N, C * taps, pixels]
    sums = torch.einsum("nctp,ct->ncp", taps.unflatten(1, (groups, -1)), weight.flatten(1))
    steps = (v if isinstance(v, tuple | list) else (v, v) for v in (stride, padding, dilation))
    sizes = zip(x.shape[2:], (height, width), *steps, strict=True)
    made: Tensor = sums.unflatten(
        2, [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    )
    return made if bias is None else made + bias[:, None, None]


def _identity(value: Any) -> Any:
    """Returns what tells a tensor in a state of its memory from others, and other arguments."""
    if not isinstance(value, Tensor):
        return tuple(value) if isinstance(value, list) else value
    return value.data_ptr(), value._version, value.dtype, value.shape, value.stride()


def _scale_of(t: Tensor) -> float:
    """Returns what a weight's normal numbers are multiplied by, so that maps stay as large."""
    return math.sqrt(2 * len(t) / max(t.numel(), 1))


def _computed(recognition: Recognition, module: nn.Module, x: Tensor) -> Any:
    """The results by the formula."""
    partition = recognition.partition
    if partition is None:
        return Recipe.read(recognition.recipe).plain(x, recognition.state(module))
    tensors = named_tensors(module)
    regions = [
        functools.partial(Recipe.read(told.recipe).plain, tensors=[tensors[n] for n in told.names])
        for told in partition.regions
    ]
    return partition.bind(regions, [tensors[name] for name in partition.names])(x)


def _largest_error(actual: Any, expected: Any) -> float:
    """Of any map, NaN if one has that; infinite for other containers of maps."""
    a, b = Returned.of(actual), Returned.of(expected)
    if a is None or b is None or a[0] != b[0]:
        return math.inf
    errors = list(map(max_error, a[1], b[1]))
    return math.nan if any(map(math.isnan, errors)) else max(errors)
