"""Hooks on a fused module, inside it, and on all modules."""

from __future__ import annotations

import pytest
import torch
from _cases import FP32_BOUND, assert_agrees, drop_in
from torch import Tensor, nn

from snv2_kernels.testing import max_error


def test_hooks_of_the_root_run_around_the_fused_forward() -> None:
    plain, fused, x = drop_in("network")
    calls: list[str] = []
    fused.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    fused.register_forward_hook(lambda m, args, out: calls.append("post"))
    assert_agrees("network", fused, plain, x)
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("path", ["conv1.0", "stage2", "stage3.1", "stage3.1.branch2.3", "fc"])
def test_hook_of_a_submodule(path: str) -> None:
    plain, fused, x = drop_in("network")
    fused(x)
    seen: list[Tensor] = []
    handles = [
        m.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(out * 1))
        for m in (plain, fused)
    ]
    with torch.no_grad():
        expected, actual = plain(x), fused(x)
    assert max_error(actual, expected) < FP32_BOUND
    assert len(seen) == 2
    assert max_error(seen[1], seen[0]) < FP32_BOUND
    assert path in str(fused.reason())
    for handle in handles:
        handle.remove()
    assert_agrees("network", fused, plain, x)


def test_hook_that_changes_what_passes() -> None:
    plain, fused, x = drop_in("network")
    fused(x)
    for m in (plain, fused):
        m.stage3.register_forward_hook(lambda m, args, out: out * 3)
        m.stage2[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    with torch.no_grad():
        assert max_error(fused(x), plain(x)) < FP32_BOUND


def test_global_hooks_see_all_modules() -> None:
    """Profilers and counters register these."""
    plain, fused, x = drop_in("network")
    fused(x)
    calls: list[list[str]] = [[], []]
    for i, model in enumerate((plain, fused)):
        names = {module: name for name, module in model.named_modules()}
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, out, i=i, names=names: calls[i].append(names[m])
        )
        try:
            model(x)
        finally:
            handle.remove()
    assert calls[1] == calls[0]
