"""The paper's set-ups: that they are what the paper says, and that their rows are right."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_bench.cli.rule import upper_bound
from snv2_bench.floor import multiply_adds
from snv2_bench.guidelines import units
from snv2_bench.guidelines.blocks import Bottleneck, Parallel, channels_of, guideline_network
from snv2_bench.guidelines.cases import (
    TABLES,
    Entry,
    Group,
    guideline_groups,
    table8_group,
)
from snv2_bench.guidelines.networks import MobileNetV1, make_network
from snv2_bench.guidelines.paper import GUIDELINES, SCALES, TABLE8, Speed
from snv2_bench.peers import GPU_PEERS, PEERS, Unavailable
from snv2_kernels.testing import float64_reference, max_error, randomize_

CPU = torch.device("cpu")
BOUND = upper_bound("network", torch.float32)

# Tables 1 to 4 --------------------------------------------------------------------------------

# What rounding to whole channels leaves of equal multiply-adds; the channels of G1 are the paper's.
_DEVIATION = {"G1": 0.06, "G2": 0.035, "G3": 0.015, "G4": 0.0}
_CONVOLUTIONS = {
    "G1": [2], "G2": [1], "G3": [1, 2, 4, 2, 4], "G4": [3],
}  # fmt: skip


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("table", GUIDELINES)
def test_multiply_adds_are_equal_in_a_table(table: str, device: str, scale: int) -> None:
    found = []
    for row in GUIDELINES[table][device]:
        channels = channels_of(table, row.setting, row.channels, scale)
        network = guideline_network(table, row.setting, channels)
        found.append(multiply_adds(network, torch.empty(1, channels[0], 56, 56, device="meta")))
    for count in found[1:]:
        assert count == pytest.approx(found[0], rel=_DEVIATION[table])


@pytest.mark.parametrize("table", GUIDELINES)
def test_ten_blocks(table: str) -> None:
    counts = itertools.cycle(_CONVOLUTIONS[table])
    for row, count in zip(GUIDELINES[table]["cpu"], counts, strict=False):
        channels = channels_of(table, row.setting, row.channels, 1)
        network = guideline_network(table, row.setting, channels)
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == 10 * count
        y = network(torch.empty(2, channels[0], 5, 4))
        assert y.shape == (2, channels[0], 5, 4)


def test_channels() -> None:
    """Scaled, but a multiple of the groups, and fewer in a series."""
    assert channels_of("G1", "1:6", (13, 78), 4) == (52, 312)
    assert [channels_of("G2", "g=8", (180,), scale) for scale in SCALES] == [(184,), (360,), (720,)]
    assert channels_of("G3", "2-series", (64,), 1) == (45,)
    assert channels_of("G3", "4-series", (64,), 2) == (64,)
    assert channels_of("G3", "4-parallel", (64,), 1) == (64,)
    network = guideline_network("G2", "g=4", (128,))
    assert isinstance(network[0], nn.Conv2d)
    assert network[0].groups == 4


def test_parallel_convolutions_are_one() -> None:
    block = randomize_(Parallel(8, 4))
    x = torch.randn(2, 8, 3, 5)
    weight = torch.cat([conv.weight for conv in block.convs])  # type: ignore[misc]
    bias = torch.cat([conv.bias for conv in block.convs])  # type: ignore[misc]
    torch.testing.assert_close(block(x), F.conv2d(x, weight, bias))


@pytest.mark.parametrize("setting", [row.setting for row in GUIDELINES["G4"]["cpu"]])
def test_bottleneck(setting: str) -> None:
    block = guideline_network("G4", setting, (8,))[0]
    assert isinstance(block, Bottleneck)
    randomize_(block)
    x = torch.randn(2, 8, 5, 4)
    first, second, third = (m for m in block.layers if isinstance(m, nn.Conv2d))
    act: Callable[[Tensor], Tensor] = F.relu if "ReLU" in setting else lambda t: t
    y = F.conv2d(act(first(x)), second.weight, second.bias, 1, 1)
    y = third(act(y))
    y = act(y + x) if "shortcut" in setting else act(y)
    assert torch.equal(block(x), y)
    assert second.kernel_size == (3, 3)


# Units ----------------------------------------------------------------------------------------


def _units(setting: str, channels: int, count: int) -> tuple[nn.Sequential, Tensor]:
    whole = setting in units.SETTINGS[:3]
    x = torch.randn(2, channels if whole else channels // 2, 7, 5)
    return randomize_(units.unit_network(setting, channels, count)).eval(), x


def test_the_whole_unit_is_the_unit() -> None:
    network, x = _units("unit", 20, 2)
    plain = nn.Sequential(*(snv2.models.InvertedResidual(20, 20, 1) for _ in range(2))).eval()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network(x), plain(x))


@pytest.mark.parametrize("stage", units.STAGES)
def test_units_multiply_alike(stage: str) -> None:
    channels, extent = units.STAGES[stage]
    counts = set()
    for setting in units.SETTINGS:
        network, x = _units(setting, channels, 1)
        counts.add(multiply_adds(network, torch.empty(1, x.shape[1], extent, extent)))
        relu = any(isinstance(m, nn.ReLU) for m in network.modules())
        assert relu == (setting not in ("no ReLU", "convolutions"))
    assert len(counts) == 1


@pytest.mark.parametrize("backend", ["cpu", "cuda-emulated"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("setting", [s for s in units.SETTINGS if s != "convolutions"])
def test_fused_units(
    monkeypatch: pytest.MonkeyPatch, setting: str, count: int, backend: str
) -> None:
    network, x = _units(setting, 20, count)
    fused = units.fuse_units(setting, network)
    monkeypatch.setattr(type(fused), "_plain", None)  # it is the kernels that run
    with torch.inference_mode(), snv2.use_backend(backend):
        assert max_error(fused(x), float64_reference(network)(x)) < BOUND
    assert not fused.training


def test_convolutions_alone_are_no_unit() -> None:
    network, _ = _units("convolutions", 20, 1)
    with pytest.raises(Unavailable, match=r"^no fused kernel: the result of conv2d"):
        units.fuse_units("convolutions", network)


def test_units_that_would_run_plain() -> None:
    network, _ = _units("unit", 20, 1)
    network[0].branch2[0].register_forward_hook(lambda *_: None)  # type: ignore[index, union-attr]
    with pytest.raises(Unavailable, match="has hooks"):
        units.fuse_units("unit", network)


# Table 8 --------------------------------------------------------------------------------------

# Millions of multiply-adds and of parameters, as the papers and the authors' code say.
_PUBLISHED = {
    ("ShuffleNet v2", "0.5x"): (41, 1.4), ("ShuffleNet v2", "1.0x"): (146, 2.3),
    ("ShuffleNet v2", "1.5x"): (299, 3.5), ("ShuffleNet v2", "2.0x"): (591, 7.4),
    ("MobileNet v1", "0.25"): (41, 0.5), ("MobileNet v1", "0.5"): (149, 1.3),
    ("MobileNet v1", "0.75"): (325, 2.6), ("MobileNet v1", "1.0"): (569, 4.2),
    ("MobileNet v2", "1.0"): (300, 3.5), ("MobileNet v2", "1.4"): (582, 6.1),
    ("ShuffleNet v1", "0.5x"): (38, 0.7), ("ShuffleNet v1", "1.0x"): (140, 1.9),
    ("ShuffleNet v1", "1.5x"): (292, 3.4), ("ShuffleNet v1", "2.0x"): (524, 5.4),
}  # fmt: skip


@pytest.mark.parametrize("speed", TABLE8, ids=lambda speed: f"{speed.model} {speed.size}")
def test_networks_are_of_the_published_size(torchvision: object, speed: Speed) -> None:
    model, size, extent = speed.model, speed.size, speed.extent
    with torch.device("meta"):
        network = make_network(model, size).eval()
    x = torch.empty(2, 3, extent, extent, device="meta")
    assert network(x).shape == (2, 1000)
    if (model, size) in _PUBLISHED:
        work, parameters = _PUBLISHED[model, size]
        assert multiply_adds(network, x) / 2e6 == pytest.approx(work, rel=0.02)
        count = sum(p.numel() for p in network.parameters()) / 1e6
        assert count == pytest.approx(parameters, abs=0.1)
    else:  # of MobileNet v2 at sizes that its paper does not list
        assert extent < 224


def test_networks_have_scores_of_each_image() -> None:
    model = randomize_(MobileNetV1(0.5, num_classes=7)).eval()
    x = torch.randn(2, 3, 64, 50)
    y = model(x).detach()
    assert y.shape == (2, 7)
    assert max_error(model(x[1:]).detach(), y[1:]) < BOUND
    assert not torch.allclose(y[0], y[1])


def test_networks_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unavailable, match="torchvision cannot be imported"):
        make_network("MobileNet v2", "1.0")
    group = table8_group(CPU, 1, ["eager"], extent=33)  # counts are kept for each extent
    works = {e.about["model"]: e.about["multiply_adds"] for e in group.entries}
    assert works["MobileNet v2"] is None
    turns = group.turns(CPU, BOUND)
    name = "MobileNet v2, 1.0, eager"
    turns.prepare(name)
    assert "torchvision cannot be imported" in (turns.rows[name].reason or "")


# Rows -----------------------------------------------------------------------------------------


def _entry(setting: str, peer: str, paper: float | None) -> Entry:
    about = {"setting": setting, "peer": peer, "paper_per_s": paper}
    return Entry(about, lambda: lambda: torch.zeros(1), lambda: torch.zeros(1))


def test_ratios() -> None:
    """Of each peer to its own base, of the paper to the paper's; none where the base is missing."""
    group = Group(
        "G", {"setting": "a"},
        [_entry("a", "eager", 50.0), _entry("b", "eager", 40.0), _entry("a", "jit", 50.0),
         _entry("b", "jit", 40.0), _entry("b", "compile", None)],
    )  # fmt: skip
    turns = group.turns(CPU, BOUND)
    times = {"a, eager": 2.0, "b, eager": 4.0, "a, jit": 1.0, "b, compile": 5.0}
    for name, milliseconds in times.items():
        turns.rows[name].samples = [milliseconds]
    turns.rows["b, jit"].reason = "no luck"
    a, b, jit, failed, lone = group.rows(turns.rows, {"batch": 3})
    assert (a["per_s"], a["ratio"], a["paper_ratio"], a["speedup"]) == (500.0, 1.0, 1.0, 1.0)
    assert (b["per_s"], b["ratio"], b["paper_ratio"], b["speedup"]) == (250.0, 0.5, 0.8, 1.0)
    assert (jit["ratio"], jit["speedup"]) == (1.0, 2.0)
    assert (failed["per_s"], failed["ratio"], failed["reason"]) == (None, None, "no luck")
    assert failed["paper_ratio"] == 0.8
    assert (lone["ratio"], lone["paper_ratio"]) == (None, None)
    assert lone["speedup"] == pytest.approx(0.8)
    assert all(row["batch"] == 3 for row in (a, b, jit, failed, lone))


def test_groups_cover_the_tables() -> None:
    """Each table's settings at each scale; the paper's speeds go with the scale."""
    groups = list(guideline_groups(TABLES, CPU, 2, ["eager", "fused", "engine"]))
    assert len(groups) == 4 * 3 + 2 * 3
    rows = [entry.about for group in groups for entry in group.entries]
    g1 = [row for row in rows if row["table"] == "G1"]
    assert [row["paper_per_s"] for row in g1 if row["setting"] == "1:2"] == [72.9, 20.5, 5.1]
    assert [row["channels"] for row in g1 if row["setting"] == "1:2"] == [
        [22, 44], [44, 88], [88, 176],
    ]  # fmt: skip
    assert {row["peer"] for row in g1} == {"eager"}
    unit = [row for row in rows if row["table"] == "unit" and row["column"] == "stage3"]
    assert [(row["setting"], row["peer"]) for row in unit] == [
        (setting, peer) for setting in units.SETTINGS for peer in ("eager", "fused")
    ]
    quick = list(guideline_groups(TABLES, CPU, 1, ["eager"], quick=True))
    assert len(quick) == len(TABLES)
    gpu = next(guideline_groups(["G1"], torch.device("cuda"), 1, ["eager"]))
    assert gpu.entries[0].about["channels"] == [128, 128]


def test_table8_is_fused_where_it_is_ours() -> None:
    group = table8_group(CPU, 1, ["eager", "fused"], extent=32)
    peers = {(e.about["model"], e.about["peer"]) for e in group.entries}
    assert ("ShuffleNet v2", "fused") in peers
    assert ("MobileNet v1", "fused") not in peers
    assert len(group.entries) == len(TABLE8) + 4
    quick = table8_group(CPU, 1, ["eager"], extent=32, quick=True)
    assert [(e.about["model"], e.about["size"]) for e in quick.entries][2:6] == [
        ("MobileNet v1", "0.25"), ("MobileNet v1", "0.5"),
        ("MobileNet v2", "0.4"), ("MobileNet v2", "0.75"),
    ]  # fmt: skip


# Peers of GPUs --------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", ["cuda_graph", "cuda_graph_channels_last"])
def test_no_cuda_graph_on_a_cpu(peer: str) -> None:
    with pytest.raises(Unavailable, match="CUDA graphs need a GPU"):
        GPU_PEERS[peer](nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 2, 2, device="cpu"))
    assert peer not in PEERS


def _peer_is_right(peer: str, device: str) -> None:
    model = randomize_(Bottleneck(8, relu=True, shortcut=True)).eval().to(device)
    x = torch.randn(2, 8, 6, 5, device=device)
    exact = float64_reference(model)(x)
    with torch.inference_mode():
        call = GPU_PEERS[peer](model, x)
        assert max_error(call(), exact) < BOUND
        x.mul_(-1)  # the input is read again in each call
        out = call()
    assert max_error(out, float64_reference(model)(x)) < BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("peer", ["cuda_graph", "max_autotune"])
def test_gpu_peers(gpu: None, peer: str) -> None:
    _peer_is_right(peer, "cuda")


@pytest.mark.slow
def test_max_autotune(fresh_compiler: None) -> None:
    _peer_is_right("max_autotune", "cpu")
