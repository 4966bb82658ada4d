"""What the CUDA kernels move, counted by the emulator: one launch, and little beyond each input and
output once. Counts, not timings: they are the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from _cases import DTYPES, FORMATS, case_id, draw, in_turn

import snv2_kernels as snv2
from snv2_kernels import emulator

BATCH = 8
SECTOR = 32  # bytes that a GPU moves at least


@dataclass(frozen=True)
class Case:
    op: str
    channels: int  # of one input
    size: int
    stride: int = 1

    def __str__(self) -> str:
        stride = "-s2" if self.stride == 2 else ""
        return f"{self.op}{stride}-{self.channels}x{self.size}x{self.size}"

    def run(self, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        shape = (BATCH, self.channels, self.size, self.size)
        maps = [draw(*shape, dtype=dtype, memory_format=memory_format, seed=i) for i in range(2)]
        c = self.channels // (2 if self.op == "split_dw_cat_shuffle" else 1)
        parameters = [draw(c, 1, 3, 3), draw(c), draw(c)]
        with snv2.use_backend("cuda-emulated"):
            if self.op == "cat_shuffle":
                snv2.ops.cat_shuffle(*maps)
            elif self.op == "dw_conv3x3":
                snv2.ops.dw_conv3x3(maps[0], *parameters, stride=self.stride)
            else:
                snv2.ops.split_dw_cat_shuffle(maps[0], *parameters)


# Of the network x1.0, stages 2 and 3: all planes are aligned to sectors or long.
LARGE = [
    Case("split_dw_cat_shuffle", 116, 28),
    Case("split_dw_cat_shuffle", 232, 14),
    Case("cat_shuffle", 58, 28),
    Case("cat_shuffle", 116, 14),
    Case("dw_conv3x3", 58, 28),
    Case("dw_conv3x3", 116, 14),
    Case("dw_conv3x3", 24, 56, stride=2),
    Case("dw_conv3x3", 58, 56, stride=2),
    Case("dw_conv3x3", 116, 28, stride=2),
]
# Of stage 4 and like it: planes of 49 elements, of which few begin at a sector, and which are
# small beside a channel's 44 bytes of parameters, read again for each image.
SMALL = [
    Case("split_dw_cat_shuffle", 464, 7),
    Case("split_dw_cat_shuffle", 58, 7),
    Case("cat_shuffle", 232, 7),
    Case("cat_shuffle", 29, 7),
    Case("dw_conv3x3", 232, 7),
    Case("dw_conv3x3", 29, 7),
    Case("dw_conv3x3", 232, 14, stride=2),
    Case("dw_conv3x3", 29, 13, stride=2),
]


@pytest.mark.parametrize(
    ("case", "memory_format", "dtype"),
    in_turn([*LARGE, *SMALL], FORMATS, DTYPES),
    ids=case_id,
)
def test_traffic(case: Case, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    allowed = 1.05 if case in LARGE else 1.3
    emulator.reset_counters()
    case.run(dtype, memory_format)
    counted = emulator.counters()
    assert counted["launches"] == 1
    assert counted["bank_conflicts"] <= 0.01 * counted["shared_wavefronts"]
    moved = SECTOR * (counted["global_load_sectors"] + counted["global_store_sectors"])
    least = counted["minimum_load_bytes"] + counted["minimum_store_bytes"]
    assert least > 0
    assert moved <= allowed * least, f"{moved / least:.3f} of the least"


def test_counters_count_from_a_reset_on() -> None:
    case = Case("cat_shuffle", 4, 8)
    emulator.reset_counters()
    assert not any(emulator.counters().values())
    case.run(torch.float32, torch.contiguous_format)
    once = emulator.counters()
    case.run(torch.float32, torch.contiguous_format)
    twice = emulator.counters()
    size = BATCH * 4 * 8 * 8 * 4
    assert once["minimum_load_bytes"] == once["minimum_store_bytes"] == 2 * size
    assert twice["launches"] == 2
    assert twice["global_load_sectors"] == 2 * once["global_load_sectors"]


def test_parameters_of_launches() -> None:
    x = draw(1, 8, 4, 4)
    emulator.reset_counters()
    with snv2.use_backend("cuda-emulated"):
        y = snv2.ops.cat_shuffle(x, x)
    assert emulator.counters()["launches"] == 1
    threads, parameters = emulator.latest_parameters()[-1]
    assert threads % 32 == 0
    for tensor in (x, y):
        assert tensor.data_ptr().to_bytes(8, "little") in parameters
