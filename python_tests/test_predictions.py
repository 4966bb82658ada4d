"""docs/arithmetic.md is what benchmarks/predict.py makes of the launches of today, and its data is
what benchmarks/count.py counts of them."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from _benchmarks import load
from _ptx import needs_ptx

AGAIN = "run make arithmetic"


@pytest.fixture(scope="module")
def predict() -> ModuleType:
    return load("predict")


@pytest.fixture(scope="module")
def arithmetic() -> ModuleType:
    return load("arithmetic")


@pytest.fixture(scope="module")
def count(arithmetic: ModuleType) -> ModuleType:
    """What counts, with the nvcc that the committed counts are of."""
    module = load("count")
    if module.nvcc_version() != arithmetic.data()["nvcc"]:
        pytest.skip(f"the counts are of nvcc {arithmetic.data()['nvcc']}")
    return module


def test_page_is_up_to_date(predict: ModuleType) -> None:
    assert predict.PAGE.read_text() == predict.page(), "run python benchmarks/predict.py"


def test_counts_are_of_the_cuts_of_today(arithmetic: ModuleType) -> None:
    """Without nvcc: kernels that are cut in another way execute something else."""
    for gpu in arithmetic.GPUS:
        for width in arithmetic.WIDTHS:
            for batch in arithmetic.BATCHES:
                words = arithmetic.plan_of(width).words
                size = arithmetic.SIZE, arithmetic.SIZE
                launches = arithmetic.launches_of(words, batch, *size, gpu.device)
                row = arithmetic.counted(width, arithmetic.chunk_of(launches, batch), gpu)
                assert len(row["instructions"]) == len(launches)
                for key in arithmetic.CUT:
                    assert row[key] == [launch[key] for launch in launches], AGAIN


@needs_ptx
@pytest.mark.parametrize("gpu", [0, 1], ids=["H200", "A100"])
def test_executed_instructions_are_those_counted(
    arithmetic: ModuleType, count: ModuleType, gpu: int
) -> None:
    row = count.count_network("x0_5", 1, arithmetic.GPUS[gpu])
    committed = arithmetic.counted("x0_5", 1, arithmetic.GPUS[gpu])
    assert row == {key: committed[key] for key in row}, AGAIN


@needs_ptx
@pytest.mark.parametrize("stage", [2, 4])
def test_executed_instructions_of_the_op_are_those_counted(
    arithmetic: ModuleType, count: ModuleType, stage: int
) -> None:
    """Within a hundredth: where a map begins in its line of 128 bytes is up to the allocator."""
    for memory_format in ("contiguous_format", "channels_last"):
        case = arithmetic.Case("split_dw_cat_shuffle", stage, "float16", memory_format)
        row, committed = count.count_case(case), arithmetic.counted_case(case)
        assert row["kernels"] == committed["kernels"], AGAIN
        assert row["instructions"] == pytest.approx(committed["instructions"], rel=0.01), AGAIN


@needs_ptx
def test_executed_by_some_ctas_stands_for_all(arithmetic: ModuleType, count: ModuleType) -> None:
    committed = arithmetic.counted("x0_5", 8, arithmetic.GPUS[0])
    row = count.count_network("x0_5", 8, arithmetic.GPUS[0], count.APART)
    assert sum(row["instructions"]) == pytest.approx(sum(committed["instructions"]), rel=0.01)


def test_a_prediction_is_not_below_any_of_its_terms(arithmetic: ModuleType) -> None:
    plan = arithmetic.plan_of("x0_5")
    for gpu in arithmetic.GPUS:
        for batch in arithmetic.BATCHES:
            p = arithmetic.predict("x0_5", batch, gpu)
            assert p.total > p.terms.longest + p.launches * arithmetic.LAUNCH * 0.99
            size = arithmetic.SIZE, arithmetic.SIZE
            assert p.multiply_adds >= batch * plan.multiply_adds(*size)


def test_what_eager_pytorch_launches(arithmetic: ModuleType) -> None:
    """The op: a convolution, batch norm, ReLU, cat and shuffle, of halves but for the last two."""
    case = arithmetic.Case("split_dw_cat_shuffle", 3, "float32", "channels_last")
    eager = case.eager()
    assert eager.count == 5
    map_bytes = case.input().nbytes
    assert 7 * map_bytes < eager.bytes < 7.01 * map_bytes
    assert arithmetic.Case("unit", 3, "float16", "contiguous_format").eager().count == 10


def test_the_emulator_counts_what_is_described(predict: ModuleType) -> None:
    rows = predict.moved("x0_5", torch.float16)
    assert [row["shape"] for row in rows] == [
        "x0.5, stage 2: 48 x 28 x 28", "x0.5, stage 3: 96 x 14 x 14", "x0.5, stage 4: 192 x 7 x 7"
    ]  # fmt: skip
    for row in rows:
        # Beside maps and weights each CTA reads the tables.
        assert row["least_bytes"] < row["described_bytes"] < row["counted_bytes"]
        assert row["counted_bytes"] < 1.1 * row["described_bytes"]
