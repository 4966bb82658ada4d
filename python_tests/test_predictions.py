"""docs/arithmetic.md is what benchmarks/predict.py makes of the launches of today."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from _benchmarks import load


@pytest.fixture(scope="module")
def predict() -> ModuleType:
    return load("predict")


def test_page_is_up_to_date(predict: ModuleType) -> None:
    assert predict.PAGE.read_text() == predict.page(), "run python benchmarks/predict.py"


def test_a_prediction_is_not_below_any_of_its_terms(predict: ModuleType) -> None:
    plan = predict.plan_of("x0_5")
    for gpu in predict.GPUS:
        for batch in predict.BATCHES:
            p = predict.predict(plan, batch, gpu)
            assert p.total > max(p.memory, p.l2, p.tensor) + p.launches * predict.LAUNCH * 0.99
            assert p.multiply_adds >= batch * plan.multiply_adds(predict.SIZE, predict.SIZE)


def test_the_emulator_counts_what_is_described(predict: ModuleType) -> None:
    rows = predict.counted("x0_5", torch.float16)
    assert [row["shape"] for row in rows] == [
        "x0.5, stage 2: 48 x 28 x 28", "x0.5, stage 3: 96 x 14 x 14", "x0.5, stage 4: 192 x 7 x 7"
    ]  # fmt: skip
    for row in rows:
        # Beside maps and weights each CTA reads the tables.
        assert row["least_bytes"] < row["described_bytes"] < row["counted_bytes"]
        assert row["counted_bytes"] < 1.1 * row["described_bytes"]
