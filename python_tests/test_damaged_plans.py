"""Plans with drawn faults raise an ordinary exception or run without harm."""

from __future__ import annotations

import pytest
from _mutations import ran_through

# Mutations, and seconds that they may take.
FEW = {"cpu": (400, 120), "cuda-emulated": (200, 120)}
MANY = {"cpu": (100_000, 3000), "cuda-emulated": (10_000, 3000)}


@pytest.mark.parametrize("backend", FEW)
def test_mutated_plans(backend: str) -> None:
    count, seconds = FEW[backend]
    assert ran_through(backend, 0, count, seconds) > 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("backend", MANY)
def test_many_mutated_plans(backend: str) -> None:
    count, seconds = MANY[backend]
    assert ran_through(backend, 1000, 1000 + count, seconds) > count / 50
