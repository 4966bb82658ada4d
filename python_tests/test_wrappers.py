"""What PyTorch wraps around modules and their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from _cases import FP32_BOUND, assert_agrees, convs, draw, drop_in, runs_fused, small_network
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import snv2_kernels as snv2
from snv2_kernels.testing import max_error

# Data parallel --------------------------------------------------------------------------------


def test_data_parallel() -> None:
    """Without GPUs the wrapper calls the module itself."""
    plain, module, x = drop_in("network")
    wrapped = nn.DataParallel(module)
    assert_agrees("network", wrapped, plain, x)
    assert list(wrapped.state_dict()) == [f"module.{key}" for key in plain.state_dict()]
    with torch.no_grad():
        convs(plain)[0].weight.mul_(2)
        convs(wrapped)[0].weight.mul_(2)
    assert_agrees("network", wrapped, plain, x)


def test_replicas_have_weights_of_their_own() -> None:
    """DataParallel's copies share modules' dicts, whose tensors then are others'."""
    plain, module, x = drop_in("stage")
    module(x)
    replica = module._replicate_for_data_parallel()
    assert_agrees("stage", replica, plain, x)


RANKS = 2


def halves(x: Tensor) -> list[Tensor]:
    return list(x.chunk(RANKS))


def one_step(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    x = halves(draw(4, 3, 37, 45))[rank]
    for mode in ("train", "eval"):
        fused = snv2.fuse(small_network()).train(mode == "train")
        wrapped = nn.parallel.DistributedDataParallel(fused)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
        wrapped(x).square().mean().backward()
        grads = [p.grad.clone() for p in fused.parameters()]
        optimizer.step()
        fused.eval()
        assert runs_fused(fused, x)
        with torch.no_grad():
            torch.save((grads, fused(x)), f"{folder}/{mode}-{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without torch.distributed")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_step, (str(tmp_path),), RANKS)
    inputs = halves(draw(4, 3, 37, 45))
    for mode in ("train", "eval"):
        results = [torch.load(tmp_path / f"{mode}-{rank}") for rank in range(RANKS)]
        plain = small_network().train(mode == "train")
        optimizer = torch.optim.SGD(plain.parameters(), 0.1)
        # In one process: the mean of the gradients, and the first rank's statistics.
        first = copy.deepcopy(plain)
        first(inputs[0])
        for x in inputs:
            (plain(x).square().mean() / RANKS).backward()
        for grads, _ in results:
            for actual, p in zip(grads, plain.parameters(), strict=True):
                assert max_error(actual, p.grad) < FP32_BOUND
        optimizer.step()
        for buffer, moved in zip(plain.buffers(), first.buffers(), strict=True):
            buffer.copy_(moved)
        with torch.no_grad():
            assert max_error(results[0][1], plain.eval()(inputs[0])) < FP32_BOUND


# Parametrized weights -------------------------------------------------------------------------


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


def _doubled(conv: nn.Module) -> None:
    parametrize.register_parametrization(conv, "weight", Doubled())


def _weight_norm(conv: nn.Module) -> None:
    parametrizations.weight_norm(conv)


def _spectral_norm(conv: nn.Module) -> None:
    torch.manual_seed(0)
    parametrizations.spectral_norm(conv)


WAYS = [_doubled, _weight_norm, _spectral_norm]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_parametrized_weight(way: Callable[[nn.Module], None], when: str) -> None:
    """Its module runs plain, and says why; the other units of the stage run fused."""
    plain, module, x = drop_in("stage")
    if when == "after":
        module(x)
    for m in (plain, module):
        way(m[1].branch2[0])
        m.eval()
    if when == "before":
        module = snv2.fuse(copy.deepcopy(plain))
    reasons = {part.name: part.reason for part in snv2.explain(module).parts}
    for name in ("", "1") if when == "after" else ("1",):
        assert "a weight that is no parameter: " in str(reasons[name])
        assert "branch2.0.parametrizations.weight" in str(reasons[name])
    assert reasons["0"] is reasons["2"] is None
    for _ in range(2):
        with torch.no_grad():
            assert max_error(module(x), plain(x)) < FP32_BOUND
            for m in (plain, module):
                for p in m[1].branch2[0].parametrizations.parameters():
                    p.mul_(1.5)
    if when == "after":  # copies of a parametrized module share a class, which this edits
        for m in (plain, module):
            parametrize.remove_parametrizations(m[1].branch2[0], "weight")
        assert_agrees("stage", module, plain, x)


def test_weight_norm_by_a_hook() -> None:
    plain, module, x = drop_in("unit-s1")
    for m in (plain, module):
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(m.branch2[0])
    assert "has hooks" in str(module.reason())
    for _ in range(2):
        with torch.no_grad():
            assert max_error(module(x), plain(x)) < FP32_BOUND
            for m in (plain, module):
                m.branch2[0].weight_g.mul_(2)


# Transforms and modes around a compiled module --------------------------------------------------


@pytest.mark.parametrize("kind", ["unit-s1", "split"])
def test_vmap_of_a_compiled_module(kind: str) -> None:
    plain, module, x = drop_in(kind)
    fast = torch.compile(module, backend="eager", fullgraph=True)
    stacked = torch.stack([x, x + 1])
    with torch.no_grad():
        fast(x)
        expected = torch.stack([plain(x), plain(x + 1)])
        assert max_error(torch.func.vmap(fast)(stacked), expected) < FP32_BOUND
        mapped = torch.compile(torch.func.vmap(module), backend="eager")
        assert max_error(mapped(stacked), expected) < FP32_BOUND
    torch.compiler.reset()


def test_inference_mode_of_a_compiled_module() -> None:
    plain, module, x = drop_in("stage")
    fast = torch.compile(module, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with torch.inference_mode():
            out = fast(x)
        assert out.is_inference()
        with torch.no_grad():
            assert max_error(out, plain(x)) < FP32_BOUND
            assert max_error(fast(x), plain(x)) < FP32_BOUND
            for m in (plain, module):
                convs(m)[0].weight.mul_(2)
    torch.compiler.reset()
