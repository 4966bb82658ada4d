"""What is timed beside what, and the rows that come of it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snv2_bench.benchmarking import Turns
from snv2_bench.floor import multiply_adds
from snv2_bench.guidelines.blocks import EXTENT, channels_of, guideline_network
from snv2_bench.guidelines.networks import make_network
from snv2_bench.guidelines.paper import GUIDELINES, SCALES, TABLE8
from snv2_bench.guidelines.units import SETTINGS, STAGES, fuse_units, unit_network
from snv2_bench.peers import OURS, Unavailable, peers_of
from snv2_kernels.testing import float64_reference, randomize_

if TYPE_CHECKING:
    from snv2_bench.benchmarking import Measurement

__all__ = ["TABLES", "UNIT_TABLES", "Entry", "Group", "guideline_groups", "table8_group"]

UNIT_TABLES = {"unit": 1, "stage": 10}  # units in a row
TABLES = (*GUIDELINES, *UNIT_TABLES)


@dataclass(frozen=True)
class Entry:
    """A network that one peer runs.

    Attributes:
        about: what its row says of it, the peer and ``paper_per_s`` included.
        build: makes it ready, and returns what is timed.
        exact: its output in float64.
    """

    about: dict[str, Any]
    build: Callable[[], Callable[[], Tensor]]
    exact: Callable[[], Tensor]


@dataclass(frozen=True)
class Group:
    """Networks that take turns.

    Attributes:
        title: what they have in common.
        base: what is said of the network whose speed is 1 in the ratios of each peer.
        entries: one for each network and peer.
    """

    title: str
    base: dict[str, Any]
    entries: list[Entry]

    def turns(self, device: torch.device, bound: float) -> Turns:
        """For timing, under names of the entries in their order."""
        turns = Turns(device)
        for entry in self.entries:
            about = entry.about
            words = [about[key] for key in ("setting", "model", "size", "peer") if key in about]
            turns.add(", ".join(words), entry.build, entry.exact, bound)
        return turns

    def rows(
        self, measured: dict[str, Measurement], common: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The rows so far.

        ``ratio`` is the speed over that of :attr:`base` run by the same peer, ``paper_ratio`` the
        same of the paper's speeds; ``speedup`` is eager's median over the row's.

        Args:
            measured: the rows of what :meth:`turns` returned.
            common: said in all rows.
        """
        rows = [
            entry.about
            | common
            | {
                "error": m.error,
                "samples": len(m.samples),
                "median_ms": m.median,
                "percentiles_ms": m.percentiles(),
                "per_s": 1e3 / m.median if m.median else None,
                "reason": None if m.samples else m.reason or "interrupted before it was timed",
            }
            for entry, m in zip(self.entries, measured.values(), strict=True)
        ]
        for row in rows:
            base = _find(rows, self.base | {"peer": row["peer"]})
            eager = _find(rows, {key: row[key] for key in self.base} | {"peer": "eager"})
            row["ratio"] = _over(row["per_s"], base.get("per_s"))
            row["paper_ratio"] = _over(row["paper_per_s"], base.get("paper_per_s"))
            row["speedup"] = _over(row["per_s"], eager.get("per_s"))
        return rows


def _find(rows: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    return next((row for row in rows if about.items() <= row.items()), {})


def _over(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None


@functools.cache
def _count(
    maker: Callable[..., nn.Module], arguments: tuple[Any, ...], shape: tuple[int, ...]
) -> int:
    with torch.device("meta"):
        return multiply_adds(maker(*arguments).eval(), torch.empty(1, *shape))


class _Network:
    """A network and its input, made when the first peer asks.

    That is in inference mode, but parameters made there do not tell when they change, so nobody
    could keep them packed.
    """

    def __init__(
        self,
        maker: Callable[..., nn.Module],
        arguments: tuple[Any, ...],
        shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self._maker, self._arguments = maker, arguments
        self._shape, self._device = shape, device

    @functools.cached_property
    def model(self) -> nn.Module:
        with torch.inference_mode(False):
            return randomize_(self._maker(*self._arguments)).eval().to(self._device)

    @functools.cached_property
    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self._shape, generator=generator).to(self._device)

    @functools.cached_property
    def _exact(self) -> Tensor:
        return float64_reference(self.model)(self.x)

    def exact(self) -> Tensor:
        return self._exact

    def multiply_adds(self) -> int:
        """Of one image."""
        return _count(self._maker, self._arguments, self._shape[1:])

    def run_by(self, peer: str) -> Callable[[], Callable[[], Tensor]]:
        return lambda: peers_of(self._device)[peer](self.model, self.x)


def guideline_groups(
    tables: Sequence[str],
    device: torch.device,
    batch: int,
    peers: Sequence[str],
    extent: int | None = None,
    quick: bool = False,
) -> Iterator[Group]:
    """The groups of Tables 1 to 4 and of the units, scale by scale.

    Args:
        tables: of :data:`TABLES`.
        device: on a CPU the paper's channels for ARM, on a GPU those for its GPU.
        batch: images.
        peers: that run the networks; of :data:`~snv2_bench.peers.OURS` only "fused", and that
            only units.
        extent: of the maps, in place of 56 and of the stages' own.
        quick: only the smallest scale, and stage 2.
    """
    for table in tables:
        if table in UNIT_TABLES:
            yield from _unit_groups(table, device, batch, peers, extent, quick)
            continue
        side = extent or EXTENT
        paper = GUIDELINES[table]["cuda" if device.type == "cuda" else "cpu"]
        for at, scale in enumerate(SCALES[:1] if quick else SCALES):
            entries = []
            for row in paper:
                channels = channels_of(table, row.setting, row.channels, scale)
                arguments = (table, row.setting, channels)
                shape = (batch, channels[0], side, side)
                network = _Network(guideline_network, arguments, shape, device)
                about = {
                    "table": table, "setting": row.setting, "column": f"x{scale}",
                    "channels": list(channels), "extent": side,
                    "multiply_adds": network.multiply_adds(), "paper_per_s": row.per_s[at],
                }  # fmt: skip
                entries += [
                    Entry(about | {"peer": peer}, network.run_by(peer), network.exact)
                    for peer in peers
                    if peer not in OURS
                ]
            base = {"setting": paper[0].setting}
            yield Group(f"{table}, channels x{scale}", base, entries)


def _unit_groups(
    table: str,
    device: torch.device,
    batch: int,
    peers: Sequence[str],
    extent: int | None,
    quick: bool,
) -> Iterator[Group]:
    for stage in list(STAGES)[: 1 if quick else None]:
        channels, side = STAGES[stage]
        side = extent or side
        entries = []
        for setting in SETTINGS:
            arguments = (setting, channels, UNIT_TABLES[table])
            entering = channels // 2 if setting in ("main branch", "convolutions") else channels
            network = _Network(unit_network, arguments, (batch, entering, side, side), device)
            about = {
                "table": table, "setting": setting, "column": stage, "channels": [entering],
                "extent": side, "multiply_adds": network.multiply_adds(), "paper_per_s": None,
            }  # fmt: skip
            for peer in peers:
                build = network.run_by(peer)
                if peer == "fused":
                    build = functools.partial(_fused_units, setting, network)
                elif peer in OURS:
                    continue
                entries.append(Entry(about | {"peer": peer}, build, network.exact))
        yield Group(f"{table}, {stage} of x1.0", {"setting": SETTINGS[0]}, entries)


def _fused_units(setting: str, network: _Network) -> Callable[[], Tensor]:
    assert isinstance(network.model, nn.Sequential)
    module, x = fuse_units(setting, network.model), network.x
    return lambda: module(x)


def table8_group(
    device: torch.device,
    batch: int,
    peers: Sequence[str],
    extent: int | None = None,
    quick: bool = False,
) -> Group:
    """The networks of Table 8, ShuffleNet v2 by this package too.

    Args:
        device: where they run; the paper's speeds are those of its GPU in any case.
        batch: images.
        peers: that run the networks, :data:`~snv2_bench.peers.OURS` only ShuffleNet v2.
        extent: of the images, in place of the paper's.
        quick: only the two smaller sizes of each.
    """
    entries = []
    seen: Counter[str] = Counter()
    for speed in TABLE8:
        seen[speed.model] += 1
        if quick and seen[speed.model] > 2:
            continue
        side = extent or speed.extent
        arguments = (speed.model, speed.size)
        network = _Network(make_network, arguments, (batch, 3, side, side), device)
        try:
            work = network.multiply_adds()
        except Unavailable:  # which each peer's row will say
            work = None
        about = {
            "model": speed.model, "size": speed.size, "input": side, "multiply_adds": work,
            "paper_per_s": speed.per_s,
        }  # fmt: skip
        entries += [
            Entry(about | {"peer": peer}, network.run_by(peer), network.exact)
            for peer in peers
            if peer not in OURS or speed.model == "ShuffleNet v2"
        ]
    return Group("Table 8", {"model": "ShuffleNet v2", "size": "1.0x"}, entries)
