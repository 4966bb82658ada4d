"""What the PTX manual says of each instruction of csrc/cuda/isa.h, as models of its cases.

They are NumPy alone and know nothing of the emulator; they see the words that a kernel was given
and say which words it must write.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

__all__ = ["MODELS", "Words", "assert_same", "draw_words", "mma_fragments", "mma_matrices"]

Words = NDArray[np.uint32]
Halves = NDArray[np.uint16]
Floats = NDArray[np.float64]
Model = Callable[[Words], Words]

LANES = np.arange(32)

# Inputs ----------------------------------------------------------------------------------------

# Zeros, subnormals, ties, largest values, infinities and NaN, in float32 and in 16 bits.
EDGES_FLOAT: list[int] = [
    *(0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF),
    *(0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F800001),
    # ties of bfloat16, tf32 and float16, and their neighbours
    *(0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x3F801000, 0x3F803000, 0x3F801001),
    *(0x3F800FFF, 0xBF801000, 0x3F802000, 0x3F802001, 0x477FE000, 0x477FEFFF, 0x477FF000),
    *(0x7F7F8000, 0x7F7F7FFF, 0x7F7FF000, 0x7F7FEFFF),
    # around float16's subnormals
    *(0x38800000, 0x387FC000, 0x387FE000, 0x33800000, 0x33000000, 0x33000001, 0x33C00000),
]
EDGES_HALF: list[int] = [
    *(0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00),
    *(0xFFFF, 0x7C01, 0x007F, 0x0080, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x3C00),
]


def mma_words(name: str, random: np.random.Generator) -> Words:
    """Per lane a[4], b[2] and c[4]: normal values of magnitude 1/8 to 4."""

    def normal(count: int, exponent_bits: int, mantissa_bits: int) -> NDArray[np.uint32]:
        bias = (1 << (exponent_bits - 1)) - 1
        sign = random.integers(0, 2, count, np.uint32) << (exponent_bits + mantissa_bits)
        exponent = random.integers(bias - 3, bias + 2, count, np.uint32) << mantissa_bits
        return sign | exponent | random.integers(0, 1 << mantissa_bits, count, np.uint32)

    words = np.empty((32, 10), np.uint32)
    if name == "mma_tf32":  # all mantissa bits: the last thirteen must not count
        words[:, :6] = normal(192, 8, 23).reshape(32, 6)
    else:
        halves = normal(384, *((5, 10) if name == "mma_f16" else (8, 7)))
        words[:, :6] = pack(halves.astype(np.uint16)).reshape(32, 6)
    words[:, 6:] = normal(128, 8, 23).reshape(32, 4)
    return words.ravel()


def multiply_add_words(random: np.random.Generator) -> Words:
    """Three numbers for each thread; in half of them the third takes away all of the rounded
    product, so that what is left is what a product of its own would lose."""
    a, b, c = random.uniform(-4, 4, (3, 128)).astype(np.float32)
    c[::2] = -(a * b)[::2]
    return np.stack([a, b, c], -1).ravel().view(np.uint32)


def draw_words(name: str, count: int, seed: int) -> Words:
    random = np.random.default_rng(seed)
    if name.startswith("mma_"):
        return mma_words(name, random)
    words = random.integers(0, 1 << 32, count, np.uint32)
    if name == "multiply_add":
        return multiply_add_words(random)
    if name == "exponential":
        return random.uniform(-80, 80, count).astype(np.float32).view(np.uint32)
    if name == "reciprocal":
        return (words & np.uint32(0x807FFFFF)) | random.integers(1, 253, count, np.uint32) << 23
    if name in ("to_float_half", "to_float_bfloat16", "to_floats_half", "to_floats_bfloat16"):
        halves = unpack(words)
        halves[: len(EDGES_HALF)] = EDGES_HALF
        words = pack(halves)
    elif name in ("to_float_float", "to_tf32", "relu") or name.startswith(
        ("from_float_", "rounded", "clear_unless_above_zero_")
    ):
        if name in (
            "from_float_half",
            "rounded_pair_half",
        ):  # most random floats lie outside its range
            moderate = words & np.uint32(0x807FFFFF)
            words = moderate | random.integers(100, 146, count, np.uint32) << 23
        words[: len(EDGES_FLOAT)] = EDGES_FLOAT
    elif name == "max_nan_float":
        words[: 2 * len(EDGES_FLOAT)] = beside_next(EDGES_FLOAT).ravel()
    elif name.startswith("max_nan_"):
        halves = unpack(words).reshape(-1, 2, 2)  # [thread][operand][element]
        edges = beside_next(EDGES_HALF).T.reshape(2, -1, 2)
        halves[: edges.shape[1]] = edges.transpose(1, 0, 2)
        words = pack(halves.ravel())
    return words


def beside_next(edges: list[int]) -> Words:
    """Each with the one after it: zeros of both signs meet, and NaNs meet numbers."""
    return np.array([edges, edges[1:] + edges[:1]], np.uint32).T


# Models ----------------------------------------------------------------------------------------


def unpack(words: Words) -> Halves:
    """Two halves of each word, the low one first."""
    return np.stack([words & 0xFFFF, words >> 16], -1).astype(np.uint16).ravel()


def pack(halves: NDArray[np.uint16]) -> Words:
    pairs = halves.reshape(-1, 2).astype(np.uint32)
    return pairs[:, 0] | pairs[:, 1] << 16


def model_reversed(elements: int, *, wide: bool) -> Model:
    """32 vectors of so many halves in reverse order; ``wide`` gives a single half its own word."""

    def model(words: Words) -> Words:
        vectors = unpack(words).reshape(32, elements)[::-1]
        return vectors.ravel().astype(np.uint32) if wide else pack(vectors.ravel())

    return model


def model_misalignment(words: Words) -> Words:
    return np.concatenate([2 * LANES % 16, 2 * LANES % 4]).astype(np.uint32)


def model_cp_async(elements: int) -> Model:
    def model(words: Words) -> Words:
        return words.reshape(2, 32, elements)[:, ::-1].ravel()

    return model


def up(lanes: int) -> NDArray[np.int64]:
    """The lane that each lane reads: its own where there is none so far up."""
    source = LANES - lanes
    return np.where(source < 0, LANES, source)


def down(lanes: int) -> NDArray[np.int64]:
    source = LANES + lanes
    return np.where(source < 32, source, LANES)


DISTANCES = [1, 2, 4, 8, 16, 31]


def model_shuffle(words: Words) -> Words:
    values, lanes = words.reshape(2, 32)
    return np.concatenate([values[(lanes.astype(np.int64) + i) % 32] for i in range(6)])


def model_shuffle_xor(words: Words) -> Words:
    return np.concatenate([words[LANES ^ lanes] for lanes in DISTANCES])


def model_shuffle_up(words: Words) -> Words:
    return np.concatenate([words[up(lanes)] for lanes in DISTANCES])


def model_shuffle_down(words: Words) -> Words:
    return np.concatenate([words[down(lanes)] for lanes in DISTANCES])


def model_partial(mask: int, source: NDArray[np.int64]) -> Model:
    """Lanes of the mask read ``source``; the others keep their own."""

    def model(words: Words) -> Words:
        return words[np.where(mask >> LANES & 1, source, LANES)]

    return model


def model_sync_warp(words: Words) -> Words:
    return words[::-1]


def model_sync_threads(words: Words) -> Words:
    first = words[::-1]
    return np.concatenate([first, first[(np.arange(96) + 33) % 96]])


def exchanged(words: Words) -> Words:
    """What each of two CTAs gets from the other, in reverse order."""
    return words.reshape(2, 64)[::-1, ::-1].ravel()


def model_cluster_load(words: Words) -> Words:
    return np.concatenate([exchanged(words), np.repeat(np.array([0, 1], np.uint32), 64)])


def model_sync_grid(words: Words) -> Words:
    return np.concatenate([words, exchanged(words)])


def model_ldmatrix(matrices: int, *, transposed: bool) -> Model:
    """Row r of matrix m lies where lane 8 m + r points: at row 5 lane + 3 here.

    Of each matrix, lane 4 g + t gets elements 2 t and 2 t + 1 of row g, or of column g.
    """

    def model(words: Words) -> Words:
        stored = unpack(words).reshape(8 * matrices, 8)
        lanes = np.arange(8 * matrices)
        read = stored[(5 * lanes + 3) % (8 * matrices)].reshape(matrices, 8, 8)
        if transposed:
            read = read.transpose(0, 2, 1)
        fragments = pack(np.ascontiguousarray(read).ravel()).reshape(matrices, 32)
        return np.ascontiguousarray(fragments.T).ravel()

    return model


def half_to_float(halves: Halves) -> Floats:
    """The value of a float16, from its fields."""
    bits = halves.astype(np.int64)
    sign = np.where(bits >> 15, -1.0, 1.0)
    exponent, mantissa = bits >> 10 & 31, bits & 1023
    subnormal = np.ldexp(mantissa.astype(np.float64), -24)
    normal = np.ldexp(1024.0 + mantissa, exponent - 25)
    special = np.where(mantissa == 0, np.inf, np.nan)
    return sign * np.where(exponent == 0, subnormal, np.where(exponent == 31, special, normal))


def bfloat16_to_float(halves: Halves) -> Floats:
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def float_words(values: Floats) -> Words:
    return values.astype(np.float32).view(np.uint32)


def model_to_float_half(words: Words) -> Words:
    return float_words(half_to_float(unpack(words)))


def model_to_float_bfloat16(words: Words) -> Words:
    return unpack(words).astype(np.uint32) << 16


def model_from_float_half(words: Words) -> Words:
    with np.errstate(over="ignore", invalid="ignore"):
        return words.view(np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)


def model_from_float_bfloat16(words: Words) -> Words:
    """To nearest, ties to even: half of the last place less one, plus the last bit."""
    bits = words.astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(is_nan(words, 23), 0x7FC0, rounded).astype(np.uint32)


def model_to_tf32(words: Words) -> Words:
    """To nearest, ties away from zero: half of the last place more."""
    rounded = (words.astype(np.uint64) + 0x1000) & 0xFFFFE000
    return np.where(is_nan(words, 23), 0x7FC00000, rounded).astype(np.uint32)


def model_relu(words: Words) -> Words:
    """Zero for what is below zero: not for NaN, nor for -0."""
    return np.where(words.view(np.float32) < 0, np.uint32(0), words)


def larger(a: Words, b: Words, values: tuple[Floats, Floats], mantissa_bits: int) -> Words:
    """NaN if one is NaN; +0 is larger than -0."""
    with np.errstate(invalid="ignore"):
        number = np.where(values[0] == values[1], a & b, np.where(values[0] > values[1], a, b))
    nan = np.where(is_nan(a, mantissa_bits), a, b)
    either = is_nan(a, mantissa_bits) | is_nan(b, mantissa_bits)
    return np.where(either, nan, number).astype(np.uint32)


def model_max_nan_float(words: Words) -> Words:
    a, b = words.reshape(-1, 2).T
    with np.errstate(invalid="ignore"):
        values = tuple(x.copy().view(np.float32).astype(np.float64) for x in (a, b))
    return larger(a, b, (values[0], values[1]), 23)


def model_max_nan(to_float: Callable[[Halves], Floats], mantissa_bits: int) -> Model:
    def model(words: Words) -> Words:
        a, b = unpack(words).reshape(-1, 2, 2).transpose(1, 0, 2).reshape(2, -1)
        with np.errstate(invalid="ignore"):
            values = to_float(a), to_float(b)
        return larger(a.astype(np.uint32), b.astype(np.uint32), values, mantissa_bits)

    return model


def model_same(words: Words) -> Words:
    return words


def model_pairs(elements: int) -> Model:
    """16 pairs of vectors of so many halves, in reverse order."""

    def model(words: Words) -> Words:
        return pack(unpack(words).reshape(16, 2 * elements)[::-1].ravel())

    return model


def model_clear_unless_above_zero(bits: int) -> Model:
    """Zero beside what is at most zero, of both signs: not beside NaN."""

    def model(words: Words) -> Words:
        kept = words & np.uint32((1 << bits) - 1)
        cleared = np.where(words.view(np.float32) <= 0, np.uint32(0), kept)
        return np.stack([kept, cleared], 1).ravel().astype(np.uint32)

    return model


def model_store_if(bits: int) -> Model:
    def model(words: Words) -> Words:
        old, new, wanted = (words.reshape(3, 32) & np.uint32((1 << bits) - 1)).astype(np.uint32)
        return np.where(wanted[::-1] % 2 != 0, new[::-1], old)

    return model


def model_store_vectors_if(words: Words) -> Words:
    old, new, wanted = words.reshape(3, 32, 4)[:, ::-1]
    return np.where(wanted[:, :1] % 2 != 0, new, old[::-1]).ravel()


def model_earlier(words: Words) -> Words:
    places = words.reshape(2, 32) % 32
    return np.concatenate([np.tile(places.min(0), 2), places[0] < places[1]]).astype(np.uint32)


def model_halves(words: Words) -> Words:
    """A word of two low halves, twice, and one of the high ones."""
    a, b = words.reshape(2, 32)
    low = (a & np.uint32(0xFFFF)) | b << np.uint32(16)
    return np.concatenate([low, low, a >> np.uint32(16) | (b & np.uint32(0xFFFF0000))])


def model_cluster_store_vector(words: Words) -> Words:
    return words.reshape(2, 64, 4)[::-1, ::-1].ravel()


def model_copy_bulk(words: Words) -> Words:
    """Eight copies of 32 words, each of them reversed."""
    return words.reshape(8, 32)[:, ::-1].ravel()


def model_copy_bulk_lanes(words: Words) -> Words:
    """Each lane has what lane + 7 copied, from the other end."""
    return np.roll(words.reshape(32, 4)[::-1], -7, 0).ravel()


def model_store_async(ctas: int, elements: int) -> Model:
    """Five steps, each to the thread five places on in the other CTA."""

    def model(words: Words) -> Words:
        return np.roll(words.reshape(ctas, 64, elements)[::-1], 25, 1).ravel()

    return model


def model_to_floats(model: Model) -> Model:
    """Unpacks both numbers of a word, twice."""
    return lambda words: np.tile(model(words).reshape(-1, 2), 2).ravel()


def model_multiply_add(words: Words) -> Words:
    """The float32 that is nearest to the exact result."""

    def nearest(a: float, b: float, c: float) -> np.float32:
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        about = np.float32(float(exact))  # or a neighbour, since it was rounded before
        near = [np.nextafter(about, np.float32(to)) for to in (-np.inf, np.inf)]
        return min(about, *near, key=lambda value: abs(Fraction(float(value)) - exact))

    triples = words.view(np.float32).reshape(-1, 3).tolist()
    return np.array([nearest(*triple) for triple in triples], np.float32).view(np.uint32)


def model_exponential(words: Words) -> Words:
    return float_words(np.exp(words.view(np.float32).astype(np.float64)))


def model_reciprocal(words: Words) -> Words:
    return float_words(1 / words.view(np.float32).astype(np.float64))


MODELS: dict[str, Model] = {
    "misalignment": model_misalignment,
    "shuffle": model_shuffle,
    "shuffle_xor": model_shuffle_xor,
    "shuffle_up": model_shuffle_up,
    "shuffle_down": model_shuffle_down,
    "shuffle_partial": model_partial(0x0000FFF0, np.full(32, 9)),
    "shuffle_xor_partial": model_partial(0x33333333, LANES ^ 1),
    "shuffle_up_partial": model_partial(0x0000FFFF, up(3)),
    "shuffle_down_partial": model_partial(0xFFFF0000, down(3)),
    "sync_warp": model_sync_warp,
    "sync_warp_partial": model_partial(0xFFFF0000, 47 - LANES),
    "sync_threads": model_sync_threads,
    "cluster_load": model_cluster_load,
    "cluster_store": exchanged,
    "sync_grid": model_sync_grid,
    "grid_dependency": lambda words: words[::-1],
    "to_float_float": model_same,
    "to_float_half": model_to_float_half,
    "to_float_bfloat16": model_to_float_bfloat16,
    "from_float_half": model_from_float_half,
    "from_float_bfloat16": model_from_float_bfloat16,
    "to_tf32": model_to_tf32,
    "relu": model_relu,
    "max_nan_float": model_max_nan_float,
    "max_nan_half": model_max_nan(half_to_float, 10),
    "max_nan_bfloat16": model_max_nan(bfloat16_to_float, 7),
    "clear_unless_above_zero_2": model_clear_unless_above_zero(16),
    "clear_unless_above_zero_4": model_clear_unless_above_zero(32),
    "store_if_2": model_store_if(16),
    "store_if_4": model_store_if(32),
    "store_vector_if_4": model_store_if(32),
    "store_vector_if_16": model_store_vectors_if,
    "earlier": model_earlier,
    "halves": model_halves,
    "warp_uniform": lambda words: words[:3].repeat(32),
    "cluster_store_vector": model_cluster_store_vector,
    "copy_bulk": model_copy_bulk,
    "copy_bulk_16": model_copy_bulk_lanes,
    "barrier_arrivals": lambda words: np.roll(words, -99),
    "store_async_4": model_store_async(2, 1),
    "store_async_8": model_store_async(2, 2),
    "store_async_16": model_store_async(2, 4),
    "store_async_own": model_store_async(1, 1),
    "to_floats_half": model_to_floats(model_to_float_half),
    "to_floats_bfloat16": model_to_floats(model_to_float_bfloat16),
    "rounded_pair_half": model_from_float_half,
    "rounded_pair_bfloat16": model_from_float_bfloat16,
    "multiply_add": model_multiply_add,
    "exponential": model_exponential,
    "reciprocal": model_reciprocal,
    "ldmatrix_x4_offset": model_ldmatrix(4, transposed=False),
    "ldmatrix_x4_trans_offset": model_ldmatrix(4, transposed=True),
}
for _bytes in (2, 4, 8, 16):
    for _name in ("load_global", "store_global", "load_shared", "store_shared"):
        _wide = _bytes == 2 and _name != "store_global"
        MODELS[f"{_name}_{_bytes}"] = model_reversed(_bytes // 2, wide=_wide)
for _bytes in (4, 8, 16):
    MODELS[f"cp_async_{_bytes}"] = model_cp_async(_bytes // 4)
    for _name in ("store_global", "cp_async"):
        MODELS[f"{_name}_pair_{_bytes}"] = model_pairs(_bytes // 2)
for _name in ("load_address", "store_address"):
    for _suffix, _bytes in (
        ("4", 4),
        ("8", 8),
        ("16", 16),
        ("4_float", 4),
        ("8_float", 8),
        ("16_float", 16),
    ):
        MODELS[f"{_name}_pair_{_suffix}"] = model_pairs(_bytes // 2)
for _matrices in (1, 2, 4):
    MODELS[f"ldmatrix_x{_matrices}"] = model_ldmatrix(_matrices, transposed=False)
    MODELS[f"ldmatrix_x{_matrices}_trans"] = model_ldmatrix(_matrices, transposed=True)

# Fields of a float in the words that a case writes: bits of the mantissa.
FLOAT_RESULTS = {
    "to_float_half": 23,
    "to_float_bfloat16": 23,
    "to_floats_half": 23,
    "to_floats_bfloat16": 23,
    "rounded_pair_half": 10,
    "rounded_pair_bfloat16": 7,
    "multiply_add": 23,
    "exponential": 23,
    "reciprocal": 23,
    "from_float_half": 10,
    "from_float_bfloat16": 7,
    "to_tf32": 23,
    "max_nan_float": 23,
    "max_nan_half": 10,
    "max_nan_bfloat16": 7,
}


def is_nan(words: Words, mantissa_bits: int) -> NDArray[np.bool_]:
    exponent_bits = 5 if mantissa_bits == 10 else 8
    magnitude = words & np.uint32((1 << (exponent_bits + mantissa_bits)) - 1)
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    return magnitude > infinity


def mma_matrices(name: str, words: Words) -> tuple[Floats, Floats, Floats]:
    """A, B and C from the fragments of 32 lanes; lane 4 g + t."""
    fragments = words.reshape(32, 10)
    c = np.zeros((16, 8))
    for lane in range(32):
        g, t = divmod(lane, 4)
        values = fragments[lane, 6:].view(np.float32)
        c[g, 2 * t], c[g, 2 * t + 1] = values[0], values[1]
        c[g + 8, 2 * t], c[g + 8, 2 * t + 1] = values[2], values[3]
    if name == "mma_tf32":
        operands = (fragments[:, :6] & np.uint32(0xFFFFE000)).view(np.float32)
        a, b = np.zeros((16, 8)), np.zeros((8, 8))
        for lane in range(32):
            g, t = divmod(lane, 4)
            a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4] = operands[lane, :4]
            b[t, g], b[t + 4, g] = operands[lane, 4:]
        return a, b, c
    to_float = half_to_float if name == "mma_f16" else bfloat16_to_float
    halves = to_float(unpack(np.ascontiguousarray(fragments[:, :6]).ravel())).reshape(32, 6, 2)
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in range(32):
        g, t = divmod(lane, 4)
        for j in range(2):
            column = 2 * t + j
            a[g, column], a[g + 8, column] = halves[lane, 0, j], halves[lane, 1, j]
            a[g, column + 8], a[g + 8, column + 8] = halves[lane, 2, j], halves[lane, 3, j]
            b[column, g], b[column + 8, g] = halves[lane, 4, j], halves[lane, 5, j]
    return a, b, c


def mma_fragments(d: Floats) -> Floats:
    """D[16, 8] as the four values of each lane."""
    fragments = np.empty((32, 4))
    for lane in range(32):
        g, t = divmod(lane, 4)
        fragments[lane] = [*d[g, 2 * t : 2 * t + 2], *d[g + 8, 2 * t : 2 * t + 2]]
    return fragments.ravel()


def assert_same(name: str, actual: Words, expected: Words) -> None:
    """The same bits, but for which NaN it is: that is not documented."""
    if name == "to_tf32":  # no instruction looks at the last thirteen bits
        actual, expected = (words & np.uint32(0xFFFFE000) for words in (actual, expected))
    if name in FLOAT_RESULTS:
        nan = is_nan(expected, FLOAT_RESULTS[name])
        np.testing.assert_array_equal(is_nan(actual, FLOAT_RESULTS[name]), nan)
        actual, expected = actual[~nan], expected[~nan]
    if name in ("exponential", "reciprocal"):  # to two units in the last place
        distance = np.abs(actual.astype(np.int64) - expected.astype(np.int64))
        assert distance.max() <= 2
        return
    np.testing.assert_array_equal(actual, expected)
