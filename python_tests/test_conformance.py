"""Each instruction of csrc/cuda/isa.h against its model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _conformance import MODELS, Words, assert_same, draw_words, mma_fragments, mma_matrices
from _ptx import NAME as CUDA_PTX
from _ptx import needs_ptx

from snv2_kernels import emulator
from snv2_kernels.ops import OPERATORS

CASES: list[tuple[str, int, int]] = emulator.conformance_cases()
SEEDS = range(3)


def run(index: int, words: Words, backend: str = "cuda-emulated") -> Words:
    given = torch.from_numpy(words.view(np.int32).copy())
    return OPERATORS[backend].conformance(given, index).numpy().view(np.uint32)


@pytest.mark.parametrize("backend", ["cuda-emulated", pytest.param(CUDA_PTX, marks=needs_ptx)])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[name for name, _, _ in CASES])
def test_instruction_does_as_documented(index: int, seed: int, backend: str) -> None:
    name, in_words, out_words = CASES[index]
    words = draw_words(name, in_words, seed)
    assert words.shape == (in_words,)
    actual = run(index, words, backend)
    assert actual.shape == (out_words,)
    if name.startswith("mma_"):
        a, b, c = mma_matrices(name, words)
        expected_values = mma_fragments(a @ b + c)
        magnitudes = mma_fragments(np.abs(a) @ np.abs(b) + np.abs(c))
        errors = np.abs(actual.view(np.float32) - expected_values) / magnitudes
        assert errors.max() < 1e-5
        return
    assert_same(name, actual, MODELS[name](words))


def test_every_case_has_a_model() -> None:
    names = [name for name, _, _ in CASES]
    assert len(set(names)) == len(names)
    assert set(names) == {*MODELS, "mma_f16", "mma_bf16", "mma_tf32"}


@pytest.mark.parametrize("index", [-1, len(CASES)])
def test_no_such_case(index: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        run(index, np.zeros(4, np.uint32))
