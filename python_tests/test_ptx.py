"""The PTX interpreter: faults put into PTX are found, and what GPUs leave open changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from _cases import DTYPES, FP32_BOUND, draw, small_network
from _conformance import draw_words
from _ptx import NAME, SEED, instructions, needs_ptx, operators
from conftest import needs_emulator
from torch import Tensor

import snv2_kernels as snv2
from snv2_kernels import emulator
from snv2_kernels.gpu import DEVICE_FIELDS
from snv2_kernels.ops import OPERATORS
from snv2_kernels.testing import max_error

pytestmark = needs_ptx

CASES = emulator.conformance_cases()
# For set_device_size().
H200 = 132, 228 << 10, 227 << 10, True
SMALL = 4, 100 << 10, 99 << 10, False
CLUSTERED = 3  # of gpu_tune: units in clusters of CTAs
# The lanes of half a warp come to a barrier.
HALF_BARRIER = (
    "{ .reg .pred %some; .reg .b32 %t; mov.u32 %t, %tid.x; and.b32 %t, %t, 16;"
    " setp.eq.s32 %some, %t, 0; @%some bar.sync 0; }"
)
ARRIVALS = [(f"barrier.cluster.arrive{kind}.aligned;", "") for kind in ("", ".relaxed")]
WAITS = [("barrier.cluster.wait.aligned;", "")]
# Part of a kernel's name, texts that are replaced in its PTX, and what is said of it.
FAULTS: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    "no barrier": ("stem_kernel", [("bar.sync 0;", "")], "that nobody wrote, or that a copy"),
    "barrier of some lanes": (
        "stem_kernel", [("bar.sync 0;", HALF_BARRIER)], "lanes wait for each other",
    ),
    "copies not waited for": (
        "unit_kernel", [("cp.async.wait_group 0;", "")], "a copy under way will write",
    ),
    "copies left behind": (
        "unit_kernel", [("%ctaid.x", "%nctaid.x")], "a thread ends with copies under way",
    ),
    "launch before not waited for": (
        "unit_kernel", [("griddepcontrol.wait;", "")], "before griddepcontrol.wait",
    ),
    "wrong place": ("stem_kernel", [("%ctaid.x", "%nctaid.x")], "a load .* outside all buffers"),
    "not aligned": ("unit_kernel", [(" + 0], 16;", " + 2], 16;")], "not aligned to its size"),
    "no cluster barriers": (
        "Clustered", ARRIVALS + WAITS, "that nobody wrote, or that a copy",
    ),
    "no cluster arrival": ("Clustered", ARRIVALS, "barrier.cluster.wait without an arrive"),
    "no cluster wait": ("Clustered", WAITS, "barrier.cluster.arrive twice"),
    "unknown instruction": ("stem_kernel", [("add.s32", "addc.s32")], "cannot read: addc.s32"),
}  # fmt: skip

# The same of conformance cases: without a wait, the lanes go on as if the phase were complete.
NO_WAIT = [("mbarrier.try_wait", "setp.eq.u32 p, 0, 0; @!p mbarrier.try_wait")]
UNDER_WAY = "that nobody wrote, or that a copy under way will write"
ASYNC_FAULTS: dict[str, tuple[str, str, list[tuple[str, str]], str]] = {
    "no wait for a copy": ("copy_bulk_16", "copy_bulk_lanes", NO_WAIT, UNDER_WAY),
    "no wait in a ring": ("copy_bulk", "copy_bulk_ring", NO_WAIT, UNDER_WAY),
    "no wait for a store": ("store_async_4", "store_async_steps", NO_WAIT, UNDER_WAY),
    "wait for the wrong parity": (
        "copy_bulk_16", "copy_bulk_lanes", [("%ctaid.x", "%nctaid.x")], UNDER_WAY,
    ),
    "no such parity": (
        "copy_bulk_16", "copy_bulk_lanes", [("%ctaid.x", "%ntid.x")], "a parity that is not 0 or 1",
    ),
    "too few bytes": (
        "store_async_4", "store_async_steps", [(", 256;", ", 260;")],
        "warps wait for each other.*try_",
    ),
    "too many bytes": (
        "store_async_4", "store_async_steps", [(", 256;", ", 252;")], "more bytes than a phase",
    ),
    "not of 16 bytes": (
        "copy_bulk", "copy_bulk_ring", [(", 128;", ", 120;")], "no multiple of 16",
    ),
    "too many arrivals": (
        "barrier_arrivals", "barrier_of_threads", [(", 96;", ", 95;")],
        "more arrivals than a phase",
    ),
    "too few arrivals": (
        "copy_bulk_16", "copy_bulk_lanes", [(", 32;", ", 33;")], "warps wait for each other.*try_",
    ),
    "no such barrier": (
        "copy_bulk_16", "copy_bulk_lanes", [("mbarrier.init", "@%p1 mbarrier.init")],
        "a barrier that nobody initialised",
    ),
    "barrier made twice": (
        "copy_bulk_16", "copy_bulk_lanes", [(", 8;", ", 0;")], "initialised that is in use",
    ),
    "barrier just made": (
        "barrier_arrivals", "barrier_of_threads", [("bar.sync 0;", "")], "a race: it reads",
    ),
    "no fence": (
        "copy_bulk", "copy_bulk_ring", [("fence.mbarrier_init.release.cluster;", "")],
        "fence.mbarrier_init is missing",
    ),
    "store before the CTA begins": (
        "store_async_4", "store_async_steps", ARRIVALS[:1] + WAITS, "that may not have begun",
    ),
    "copy left behind": (
        "copy_bulk_16", "copy_bulk_lanes",
        [*NO_WAIT, ("ld.shared", "setp.ne.u32 %p1, 0, 0; @%p1 ld.shared")],
        "a CTA ends with copies or stores to it under way",
    ),
}  # fmt: skip
ASYNC_CASES = [
    name for name, *_ in CASES if name.startswith(("copy_bulk", "barrier_", "store_async"))
]


@pytest.fixture
def network() -> Callable[[], Tensor]:
    fused = snv2.fuse(small_network(), backend=NAME).half()
    x = draw(2, 3, 64, 64, dtype=torch.float16)

    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = fused(x)
        return out

    return run


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    operators().replace_text("", "", "")
    operators().gpu_tune()
    operators().set_seed(SEED)


def test_all_kernels_can_be_read() -> None:
    """Also those that no test launches."""
    assert operators().read_kernels() > 200


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(network: Callable[[], Tensor], fault: str) -> None:
    kernel, texts, said = FAULTS[fault]
    operators().set_seed(0)
    operators().gpu_tune(weights=CLUSTERED if kernel == "Clustered" else 0)
    for old, new in texts:
        assert operators().replace_text(kernel, old, new) > 0
    with pytest.raises(RuntimeError, match=said):
        network()


def run_case(name: str) -> Tensor:
    index = [case for case, *_ in CASES].index(name)
    words = torch.from_numpy(draw_words(name, CASES[index][1], 0).view("int32").copy())
    out: Tensor = operators().conformance(words, index)
    return out


@pytest.mark.parametrize("fault", ASYNC_FAULTS)
def test_a_fault_of_what_is_under_way_is_found(fault: str) -> None:
    case, kernel, texts, said = ASYNC_FAULTS[fault]
    operators().set_seed(0)
    for old, new in texts:
        assert operators().replace_text(kernel, old, new) > 0
    with pytest.raises(RuntimeError, match=said):
        run_case(case)


@pytest.mark.parametrize("name", ASYNC_CASES)
def test_when_what_is_under_way_arrives_changes_nothing(name: str) -> None:
    """As late as it may with an even seed, at once with an odd one."""
    operators().set_seed(0)
    expected = run_case(name)
    for seed in range(1, 9):
        operators().set_seed(seed)
        assert torch.equal(run_case(name), expected), seed


@pytest.mark.parametrize(
    ("kernel", "seed", "said"), [("stem_kernel", 2, "reads"), ("linear_kernel", 2, "overwrites")]
)
def test_a_race_is_found(network: Callable[[], Tensor], kernel: str, seed: int, said: str) -> None:
    """In another order of warps a missing barrier is a race."""
    operators().set_seed(seed)
    operators().replace_text(kernel, "bar.sync 0;", "")
    with pytest.raises(RuntimeError, match=f"a race: it {said} shared memory that another warp"):
        network()


@pytest.mark.parametrize("weights", [0, CLUSTERED])
def test_what_gpus_leave_open_changes_nothing(network: Callable[[], Tensor], weights: int) -> None:
    operators().gpu_tune(weights=weights)
    operators().set_seed(0)
    expected = network()
    for seed in range(1, 5):
        operators().set_seed(seed)
        assert torch.equal(network(), expected), seed


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [0, CLUSTERED])
def test_the_emulator_agrees(dtype: torch.dtype, weights: int) -> None:
    """Products are summed in another order, and rounded to the dtype."""
    outs = []
    for backend in (NAME, "cuda-emulated"):
        OPERATORS[backend].gpu_tune(weights=weights)
        with torch.no_grad():
            fused = snv2.fuse(small_network(), backend=backend).to(dtype)
            outs.append(fused(draw(2, 3, 64, 64, dtype=dtype)))
        OPERATORS[backend].gpu_tune()
    assert max_error(*outs) <= max(FP32_BOUND, torch.finfo(dtype).eps)


def test_a_sample_of_ctas_counts_as_all(network: Callable[[], Tensor]) -> None:
    executed = instructions(network)
    operators().sample(3)
    try:
        assert instructions(network) == pytest.approx(executed, rel=0.2)
    finally:
        operators().sample(1)
    assert instructions(network) == executed
    with pytest.raises(RuntimeError, match="apart: expected a positive number, got 0"):
        operators().sample(0)


def test_launches_are_cut_to_the_size_of_the_device(network: Callable[[], Tensor]) -> None:
    """And give the same, whatever it is."""
    expected, executed = network(), instructions(network)
    operators().set_device_size(*SMALL)
    try:
        assert torch.equal(network(), expected)
        assert instructions(network) < executed
    finally:
        operators().set_device_size(*H200)


def test_each_device_is_asked_once(network: Callable[[], Tensor]) -> None:
    """And each kernel on it, whichever device comes between, here one that no other test has."""
    network()
    asked = operators().questions()
    network()
    assert operators().questions() == asked
    operators().set_device_size(5, *SMALL[1:])
    try:
        network()
        of_both = operators().questions()
        assert of_both > asked
        network()
    finally:
        operators().set_device_size(*H200)
    network()
    assert operators().questions() == of_both


def test_units_are_cut_for_the_clusters_that_run_at_once() -> None:
    """Cuts follow the clusters that the driver says: more are guessed of an H200 than are here."""
    operators().gpu_tune(weights=CLUSTERED)
    fused = snv2.fuse(small_network(), backend=NAME).half()
    x = draw(16, 3, 64, 64, dtype=torch.float16)
    with torch.no_grad():
        expected, executed = fused(x), instructions(lambda: fused(x))
        operators().set_device_size(*H200, 16)
        try:
            device = dict(zip(DEVICE_FIELDS, operators().gpu_device(), strict=True))
            assert [device[name] for name in DEVICE_FIELDS[6:10]] == [4, 8, 2, 4]
            assert torch.equal(fused(x), expected)
            assert instructions(lambda: fused(x)) != executed
        finally:
            operators().set_device_size(*H200)


def test_counts_of_lines_add_up(network: Callable[[], Tensor]) -> None:
    executed = instructions(network)
    assert instructions(network) == executed
    places, counts = operators().line_counts()
    assert sum(counts) == executed
    lines = [place.split(" ", 1)[1] for place in places.splitlines()]
    assert len(lines) == len(counts)
    assert any(line.startswith("isa_nvidia") and " in stem.h:" in line for line in lines)
