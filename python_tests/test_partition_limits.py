"""Limits of partitions: forwards that do more than a recording of them shows, and inputs that no
partition knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _cases import draw, ops_called
from _mixed_networks import SMALL, Network, Unit, layer
from _styles import shuffle
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.nn.recognized import Recognized
from snv2_kernels.testing import float64_reference, max_error, randomize_


class Free(nn.Module):
    """A unit that is written out, and anything around it."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.unit, self.fc, self.function = Unit(8, 8, 1), nn.Linear(8, 3), function

    def joined(self, x: Tensor) -> Tensor:
        return shuffle(self.unit.joined(x), 2)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def free(function: Callable[[Any, Any], Any]) -> Free:
    model: Free = randomize_(Free(function)).eval()
    return model


def assert_same(fused: nn.Module, model: nn.Module, x: Any) -> None:
    """The same results or the same error, and the same of what else the call does."""
    with torch.no_grad():
        try:
            expected = model(x.clone() if isinstance(x, Tensor) else x)
        except Exception as error:
            with pytest.raises(type(error)):
                fused(x.clone() if isinstance(x, Tensor) else x)
            return
        actual = fused(x.clone() if isinstance(x, Tensor) else x)
    pairs = (
        [(actual, expected)] if isinstance(expected, Tensor) else zip(actual, expected, strict=True)
    )
    for a, b in pairs:
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


def is_fused(fused: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return any(name.startswith("snv2::") for name in ops_called(fused, x))


def _fill(s: Free, x: Tensor) -> Tensor:
    y = s.joined(x)
    y[y.isnan()] = 0
    return y * 2


def _clear(s: Free, x: Tensor) -> Tensor:
    y = s.joined(x)
    y[:, :, 40:] = 0
    return y * 2


def _assemble(s: Free, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    out = x.new_zeros(n, 16, h, w)
    out[:, :8] = s.joined(x)
    out[:, 8:] = x * 2
    return out


def _late(s: Free, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x + 1
    p, q = x.chunk(2, 1)
    p = p.contiguous()
    z = shuffle(torch.cat((p, s.unit.main(q)), 1), 2)
    x[:, :].mul_(2)
    return z, p


def _through_a_view(s: Free, x: Tensor) -> Tensor:
    z = s.joined(x)
    z.reshape(z.shape[0], -1).mul_(2)
    return z * 1


def _in_another_order(s: Free, x: Tensor) -> tuple[Tensor, Tensor]:
    z = s.joined(x)
    w = z.to(memory_format=torch.channels_last)
    w.mul_(2)
    return z * 1, w


def _strided(s: Free, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    return torch.as_strided(s.joined(x), (n, 8), (8 * h * w, h * w)) * 1


def _part(s: Free, x: Tensor) -> Tensor:
    y = s.joined(x) * 2
    return y[16:] if y[16:].shape[0] else y * 3


def _rest(s: Free, x: Tensor) -> Tensor:
    y = s.joined(x)
    return y * 2 if y[:, :, 2500:].shape[2] else y * 1


WAYS: dict[str, Callable[[Free, Any], Any]] = {
    "filled": _fill,
    "cleared": _clear,
    "assembled": _assemble,
    "written after it is copied": _late,
    "written through a view": _through_a_view,
    "written in another order": _in_another_order,
    "strided": _strided,
    "viewed": lambda s, x: s.joined(x).view(x.shape[0], -1) * 2,
    "split batch": lambda s, x: torch.cat([c * 2 for c in s.joined(x).split(16)]),
    "split rows": lambda s, x: torch.cat([c * 2 for c in s.joined(x).split(2048, 2)], 2),
    "chunked columns": lambda s, x: torch.cat([c * 2 for c in s.joined(x).chunk(4, 3)], 3),
    "listed chunks": lambda s, x: list(s.joined(x).chunk(4, 3)),
    "part of a batch": _part,
    "rest of the rows": _rest,
    "made of a quotient": lambda s, x: s.joined(x) * torch.ones(x.shape[2] // 3000 + 1).shape[0],
    "one number": lambda s, x: s.joined(x) * s.joined(x)[0, 0, 0, 0],
    "mean of all": lambda s, x: s.joined(x) * x.mean().reshape(()),
    "video": lambda s, x: s.joined(x.flatten(0, 1) if x.dim() == 5 else x) * 2,
    "one image": lambda s, x: s.joined(x.unsqueeze(0) if x.dim() == 3 else x) * 2,
    "converted": lambda s, x: s.joined(x.type_as(s.fc.weight)) * 2,
}
SHAPES = [
    (2, 8, 9, 7),
    (20, 8, 12, 9),
    (1, 8, 64, 12),
    (1, 8, 2600, 7),
    (1, 8, 3100, 7),
    (3, 8, 11, 9),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_right_whatever_stands_around_a_unit(way: str, verify: bool) -> None:
    """Verification hides what is wrong at its own input alone."""
    model = free(WAYS[way])
    fused = snv2.fuse(model, verify=verify)
    for shape in SHAPES:
        for order in (torch.contiguous_format, torch.channels_last):
            assert_same(fused, model, draw(*shape, memory_format=order))
    x = draw(2, 8, 9, 7)
    x[0, 3, 2, 2] = torch.nan
    assert_same(fused, model, x)
    for strange in (x.double(), x.half(), x[0], x[None], draw(2, 6, 9, 7), None):
        assert_same(fused, model, strange)


def test_what_it_takes_besides_tensors() -> None:
    model = free(lambda s, x: s.joined(torch.cat(x) if isinstance(x, list) else x) * 2)
    fused, x = snv2.fuse(model), draw(2, 8, 9, 7)
    assert is_fused(fused, x)
    assert_same(fused, model, [x, x])


@pytest.mark.parametrize("how", ["__call__", "_call_impl"])
def test_a_call_that_is_more_than_the_forward(how: str) -> None:
    class Doubled(Network):
        pass

    def call(self: Any, x: Tensor) -> Any:
        return getattr(super(Doubled, self), how)(x * 2)

    setattr(Doubled, how, call)
    model = randomize_(Doubled(head="max")).eval()
    fused, x = snv2.fuse(model), draw(1, 3, 64, 64)
    assert_same(fused, model, x)
    assert is_fused(fused, x)


def _in_bfloat16(s: Free, x: Tensor) -> Tensor:
    y = s.joined(x).amax((2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        return s.fc(y)  # type: ignore[no-any-return]


def _with_gradients(s: Free, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return s.fc(s.joined(x).amax((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [_in_bfloat16, _with_gradients])
def test_modes_that_a_forward_sets(way: Any) -> None:
    model = free(way)
    assert_same(snv2.fuse(model), model, draw(2, 8, 9, 7))


class Summed(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return sum(each(x) for each in self.layers)  # type: ignore[return-value]


def _dilated(kernel: int, dilation: int) -> nn.Module:
    made = layer(8, 8, kernel, 1, 8, act=False)
    made[0].dilation = made[0].padding = (kernel // 2 * dilation,) * 2
    made[0].dilation = (dilation, dilation)
    return made


SUMS = {
    "5 + 3": [(5, 1), (3, 1)],
    "3 + 5 + 1": [(3, 1), (5, 1), (1, 1)],
    "7 + 5 + 3": [(7, 1), (5, 1), (3, 1)],
    "dilated + not": [(3, 2), (3, 1)],
    "dilated + 1": [(3, 2), (1, 1)],
    "twice dilated": [(3, 2), (3, 2)],
}


@pytest.mark.parametrize("windows", SUMS)
def test_sums_of_windows(windows: str) -> None:
    """Taps that lie on one grid fold; others are left."""
    unit = Unit(16, 16, 1)
    unit.main[1] = Summed(*(_dilated(*window) for window in SUMS[windows]))
    randomize_(unit).eval()
    fused, x = snv2.fuse(unit, verify=False), draw(2, 16, 13, 11)
    assert isinstance(fused, Recognized) == (windows != "dilated + not")
    with torch.no_grad():
        exact = float64_reference(unit)(x)
        assert max_error(fused(x), exact) < 1e-5
    if isinstance(fused, Recognized):
        assert fused.reason() is None


def test_scripted_submodules_are_left() -> None:
    class Scripted(Network):
        def __init__(self) -> None:
            super().__init__(size=SMALL)
            self.conv5 = torch.jit.script(nn.Sequential(nn.Conv2d(32, 24, 1), nn.ReLU()))

    model = randomize_(Scripted()).eval()
    assert_same(snv2.fuse(model), model, draw(1, 3, 64, 64))
