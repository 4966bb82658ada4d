"""Machine code of the CUDA kernels' loops, against the one table of bounds: counts of what ptxas
made, not timings and not of a run. They depend on nvcc, which is that of CUDA 13.0 here, and are of
the installed CUDA library (`make cuda`, which `make test` runs)."""

from __future__ import annotations

import functools
import json
import re
from types import ModuleType

import pytest
from _benchmarks import load

from snv2_kernels import cuda_kernels
from snv2_kernels.libraries import library

LIBRARY = library("cuda")
SOURCES = ("unit", "stem", "head", "split_dw_cat_shuffle", "cat_shuffle", "stages")
ARCHITECTURES = ("sm_80", "sm_90")
VERSION = "13.0."
# A bound that is further above than this says too little.
SLACK = 1.06

# Kernels in float16, as the report of a build names them.
S1, S2 = "unit_kernel<half_t, 1, {}, Relu, {}>", "unit_kernel<half_t, 2, {}, Relu, {}>"
RESIDENT, CLUSTERED = "Resident", "Clustered"
DIRECT1, DIRECT2 = "Direct<half_t, 1>", "Direct<half_t, 2>"
UNITS = [
    kind.format(mode, caller)
    for kind, direct in ((S1, DIRECT1), (S2, DIRECT2))
    for mode in (RESIDENT, CLUSTERED, direct)
    for caller in ("false", "true")
]
STEMS = [f"stem_kernel<half_t, Relu, (Taps){taps}>" for taps in range(3)]
FEATURES = [f"features_kernel<half_t, Relu, {tiles}>" for tiles in (1, 2)]
LINEAR = ["linear_kernel<half_t, FewImages>", "linear_kernel<half_t, ManyImages<half_t> >"]

PRODUCT_GOAL = 3.7
# Instructions for each HMMA in the slowest product loop, on sm_90.
PRODUCTS = {
    S1.format(RESIDENT, "false"): 2.7,
    S1.format(RESIDENT, "true"): 2.7,
    S1.format(CLUSTERED, "false"): 3.4,
    S1.format(CLUSTERED, "true"): 3.4,
    S1.format(DIRECT1, "false"): 3.3,
    S1.format(DIRECT1, "true"): 3.2,
    S2.format(RESIDENT, "false"): 2.7,
    S2.format(RESIDENT, "true"): 2.7,
    S2.format(CLUSTERED, "false"): 3.4,
    S2.format(CLUSTERED, "true"): 3.4,
    S2.format(DIRECT2, "false"): 3.7,
    S2.format(DIRECT2, "true"): 3.7,
    # With the maximum of 3x3 pixels in the same loop.
    STEMS[0]: 8.5,
    STEMS[1]: 9.7,
    STEMS[2]: 15.5,
    FEATURES[0]: 3.8,
    FEATURES[1]: 2.2,
}
# Cycles of a warp that is alone for each HMMA, by the stall model.
PRODUCT_CYCLES = {
    S1.format(RESIDENT, "false"): 9.7,
    S1.format(CLUSTERED, "false"): 14.2,
    S1.format(DIRECT1, "false"): 18.7,
    S2.format(RESIDENT, "false"): 9.7,
    S2.format(CLUSTERED, "false"): 14.2,
    S2.format(DIRECT2, "false"): 25.6,
    FEATURES[0]: 17.5,
    FEATURES[1]: 11.4,
}

CHAIN_GOAL = 3000
# Cycles of x1.0's launches on one image from where their input is there, each phase as long as its
# slowest warp takes alone or as its instructions take to issue. Launch 6 is a unit of stage 3 on
# seven SMs: of its cycles 450 are one latency of L2, and 2,400 what its instructions take.
CHAINS = {6: 3640}

# The same of all units in one launch, from the first one's first product to the last one's second,
# and of a unit of stride 1 of stage 3 in it, which has 1,900 as its goal.
STAGES = {"x0_5": 47_000, "x1_0": 82_000}
STAGES_UNIT, STAGES_UNIT_GOAL = 3400, 1900
STAGES_KERNEL = "stages_kernel<half_t>"

DEPTHWISE_GOAL = 15.0
# Instructions of a lane for each result of the depthwise loop of units: eight in a turn.
DEPTHWISE = {
    **{S1.format(mode, "false"): 13.7 for mode in (RESIDENT, CLUSTERED, DIRECT1)},
    **{S2.format(mode, "false"): 19.3 for mode in (RESIDENT, CLUSTERED, DIRECT2)},
}
# The op's: a kernel, multiply-adds and results of a turn, instructions for each result, and shared
# loads of 16 bits inside a row, of which the goal is none.
ROWS = [
    ("columns_kernel<half_t, true, Columns<14, true, false, false> >", 138, 14, 13.5, 0),
    ("columns_kernel<half_t, true, Columns<14, true, true, false> >", 140, 14, 14.0, 2),
    ("columns_kernel<half_t, true, Columns<7, false, false, false> >", 68, 7, 16.3, 7),
    ("columns_kernel<half_t, true, Columns<8, false, true, true> >", 80, 8, 22.7, 10),
    ("images_kernel<half_t, true, (Main)0, 2>", 272, 28, 20.7, 0),
    ("images_kernel<half_t, true, (Main)0, 1>", 136, 14, 30.5, 31),
]
# MEMBAR.*.GPU in loops: barriers of clusters that release. The goal is none.
MEMBARS = {
    **{S1.format(CLUSTERED, caller): 2 for caller in ("false", "true")},
    **{S2.format(CLUSTERED, caller): 3 for caller in ("false", "true")},
}
# Registers of a thread at most, by the start of a kernel's name. With 128 an SM has 16 warps, with
# 168 twelve, with 240 eight.
REGISTERS = {
    **{unit: 128 for unit in UNITS if unit.endswith("false>")},
    **{unit: 160 for unit in UNITS if unit.endswith("true>")},
    "stem_kernel<half_t, Relu": 96,
    STAGES_KERNEL: 128,
    FEATURES[0]: 168,
    FEATURES[1]: 240,
    LINEAR[0]: 112,
    LINEAR[1]: 168,
    "columns_kernel<half_t, true": 96,
    "images_kernel<half_t, true": 128,
    "pixels_kernel<half_t, true": 128,
}


@pytest.fixture(scope="module")
def sass() -> ModuleType:
    module = load("sass")
    if not LIBRARY.is_file():
        pytest.skip("the CUDA library was not built: make cuda")
    if module.cuobjdump() is None:
        pytest.skip("no cuobjdump: it is in CUDA toolkits and in Triton's wheel")
    build = cuda_kernels.read_build()
    if build is None or not build.nvcc.startswith(VERSION):
        pytest.skip(f"the bounds are for nvcc {VERSION}x")
    return module


@functools.cache
def kernels(sass: ModuleType, arch: str = "sm_90") -> dict:
    found: dict = {}
    for source in SOURCES:
        found.update(sass.kernels(LIBRARY, source, arch))
    if not found:
        pytest.skip(f"the CUDA library was not built for {arch}")
    return found


def check(counted: float, bound: float, goal: float | None = None) -> None:
    assert counted <= bound, f"{counted:.2f}, at most {bound} wanted; the goal is {goal}"
    assert counted * SLACK >= bound, f"only {counted:.2f}: lower the bound from {bound}"


@pytest.mark.parametrize(("kernel", "bound"), PRODUCTS.items())
def test_instructions_of_products(sass: ModuleType, kernel: str, bound: float) -> None:
    loops = sass.products_of(kernels(sass)[kernel])
    check(max(len(loop.body) / loop.count("HMMA") for loop in loops), bound, PRODUCT_GOAL)


@pytest.mark.parametrize(("kernel", "bound"), PRODUCT_CYCLES.items())
def test_stalls_of_products(sass: ModuleType, kernel: str, bound: float) -> None:
    loops = sass.products_of(kernels(sass)[kernel])
    check(max(loop.cycles() / loop.count("HMMA") for loop in loops), bound)


@pytest.mark.parametrize(("launch", "bound"), CHAINS.items())
def test_cycles_of_launches(sass: ModuleType, launch: int, bound: int) -> None:
    assert kernels(sass)
    phases = load("sass_path").phases_of_launch(1, launch)
    begin = next(i for i, phase in enumerate(phases) if phase.end == "ACQBULK") + 1
    check(sum(phase.cycles for phase in phases[begin:]), bound, CHAIN_GOAL)


def phases_of_units(width: str) -> list[int]:
    """Returns the cycles of three phases of each unit."""
    phases = load("sass_path").phases_of_stages(width)
    begin = next(i for i, phase in enumerate(phases) if phase.end == "ACQBULK") + 2
    return [phase.cycles for phase in phases[begin : begin + 3 * 16]]


@pytest.mark.parametrize(("width", "bound"), STAGES.items())
def test_cycles_of_units_in_one_launch(sass: ModuleType, width: str, bound: int) -> None:
    assert kernels(sass)
    check(sum(phases_of_units(width)), bound)


def test_cycles_of_a_unit_in_one_launch(sass: ModuleType) -> None:
    assert kernels(sass)
    sixth = phases_of_units("x1_0")[3 * 6 : 3 * 7]
    check(sum(sixth), STAGES_UNIT, STAGES_UNIT_GOAL)


def test_units_in_one_launch_wait_for_no_stores(sass: ModuleType) -> None:
    """Barriers of the cluster stand before the first unit and around the result only."""
    rows = kernels(sass)[STAGES_KERNEL]
    membars = [row for row in rows if re.fullmatch(r"MEMBAR\.\w+\.GPU", row.name)]
    assert len(membars) == 3


@pytest.mark.parametrize("kernel", [DIRECT1, DIRECT2, "features_kernel"])
def test_no_load_is_waited_for_in_its_own_step(sass: ModuleType, kernel: str) -> None:
    """At least the products of one step are issued before one waits for the next one's matrix."""
    found = [rows for name, rows in kernels(sass).items() if kernel in name and "half_t" in name]
    assert found
    for loop in (loop for rows in found for loop in sass.products_of(rows)):
        loads = [row for row in loop.body if row.opcode == "LDG"]
        assert loads
        step = loop.count("HMMA") // len(loads)
        assert all(loop.between(row, "HMMA") >= step for row in loads)


@pytest.mark.parametrize(("kernel", "bound"), DEPTHWISE.items())
def test_depthwise_rows_of_units(sass: ModuleType, kernel: str, bound: float) -> None:
    loops = sass.depthwise_of(kernels(sass)[kernel])
    assert loops
    check(max(len(loop.body) / sass.PIXELS for loop in loops), bound, DEPTHWISE_GOAL)
    assert not any(loop.count("LDS.U16", "LDS.S16") for loop in loops)


@pytest.mark.parametrize(("kernel", "products", "results", "bound", "narrow"), ROWS)
def test_rows_of_the_op(
    sass: ModuleType, kernel: str, products: int, results: int, bound: float, narrow: int
) -> None:
    (loop,) = (
        loop for loop in sass.loops_of(kernels(sass)[kernel]) if loop.count("FFMA") == products
    )
    check(len(loop.body) / results, bound, DEPTHWISE_GOAL)
    assert loop.count("LDS.U16", "LDS.S16") == narrow, "the goal is 0"
    # What no vector of 128 bits covers goes out element by element.
    stores = {row.name for row in kernels(sass)[kernel] if row.opcode == "STG"}
    assert stores == {"STG.E.128", "STG.E.U16"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_stores_of_planes_are_wide(sass: ModuleType, arch: str) -> None:
    """Between planes a unit stores 64 and 128 bits. The caller's tensors, of any strides, get
    pairs and single elements too."""
    for unit in UNITS:
        if arch == "sm_80" and CLUSTERED in unit:
            continue  # empty there
        widths = {row.name for row in kernels(sass, arch)[unit] if row.opcode == "STG"}
        narrow = {"STG.E.U16", "STG.E"} if unit.endswith("true>") else set()
        assert widths == {"STG.E.64", "STG.E.128"} | narrow, unit
    for stem in STEMS:
        widths = {row.name for row in kernels(sass, arch)[stem] if row.opcode == "STG"}
        assert widths == {"STG.E.128"}, stem


def test_barriers_that_wait_for_global_memory(sass: ModuleType) -> None:
    for name, rows in kernels(sass).items():
        if "<half_t" not in name or "AnyActivation" in name:
            continue
        if name == STAGES_KERNEL:  # whose waits lie at its end, and jump back over all else
            continue
        inside = {
            row.address
            for loop in sass.loops_of(rows, innermost=False)
            for row in loop.body
            if re.fullmatch(r"MEMBAR\.\w+\.GPU", row.name)
        }
        assert len(inside) == MEMBARS.get(name, 0), f"{name}; the goal is 0"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_local_memory(sass: ModuleType, arch: str) -> None:
    spills = [
        name
        for name, rows in kernels(sass, arch).items()
        if any(row.opcode in ("LDL", "STL") for row in rows)
    ]
    assert not spills


@pytest.mark.parametrize(("kernel", "bound"), REGISTERS.items())
def test_registers(sass: ModuleType, kernel: str, bound: int) -> None:
    build = cuda_kernels.read_build()
    assert build
    found = [
        k.registers for k in build.kernels if k.arch == "sm_90" and k.kernel.startswith(kernel)
    ]
    assert found
    assert max(found) <= bound


def test_the_committed_loops_are_these(sass: ModuleType) -> None:
    arithmetic = load("arithmetic")
    if arithmetic.data()["nvcc"] != cuda_kernels.read_build().nvcc:
        pytest.skip(f"the loops are of nvcc {arithmetic.data()['nvcc']}")
    rows = [vars(row) for row in sass.rows_of_library(LIBRARY)]
    assert json.loads(json.dumps(rows)) == arithmetic.data()["loops"], "run make arithmetic"


# The reader ---------------------------------------------------------------------------------------


def _listing(*rows: tuple[str, int, int, int]) -> str:
    """What cuobjdump prints of a function: text, stall, scoreboard that is set (7: none), waits."""
    lines = ["\t\tFunction : _Z4loopPf"]
    for i, (text, stall, sets, waits) in enumerate(rows):
        control = stall | sets << 5 | 7 << 8 | waits << 11
        lines.append(f"        /*{16 * i:04x}*/                   {text} ;   /* 0x{0:016x} */")
        lines.append(f"                                      /* 0x{control << 41:016x} */")
    return "\n".join(lines)


def test_stalls_and_scoreboards() -> None:
    """A turn waits for the load of the turn before it, which its products cover in part."""
    sass = load("sass")
    listing = _listing(
        ("MOV R0, R1", 2, 7, 0),
        ("LDG.E.128 R4, desc[UR4][R2.64]", 1, 0, 0),
        ("HMMA.16816.F32 R8, R4, R6, R8", 4, 7, 0b1),
        ("HMMA.16816.F32 R12, R4, R6, R12", 5, 7, 0),
        ("@P0 BRA 0x10", 6, 7, 0),
        ("EXIT", 5, 7, 0),
    )
    (rows,) = sass.parse(listing).values()
    assert [row.opcode for row in rows] == ["MOV", "LDG", "HMMA", "HMMA", "BRA", "EXIT"]
    (loop,) = sass.loops_of(rows)
    assert len(loop.body) == 4
    assert loop.count("HMMA") == loop.count("HMMA.16816") == 2
    assert loop.count("HM") == 0
    assert loop.cycles() == sass.LATENCIES["LDG"] + 4 + 5 + 6
    assert loop.between(loop.body[0], "HMMA") == 0


def test_what_a_branch_leaves_out() -> None:
    sass = load("sass")
    listing = _listing(
        ("IADD3 R0, R0, R1, RZ", 2, 7, 0),
        ("@P1 BRA 0x40", 5, 7, 0),
        ("FFMA R1, R1, R2, R3", 4, 7, 0),
        ("FFMA R1, R1, R2, R3", 4, 7, 0),
        ("FFMA R4, R1, R2, R3", 4, 7, 0),
        ("@P0 BRA 0x0", 5, 7, 0),
    )
    (rows,) = sass.parse(listing).values()
    (loop,) = sass.loops_of(rows)
    (shorter,) = loop.shortcuts()
    assert [turn.count("FFMA") for turn in (loop, shorter)] == [3, 1]
    assert shorter.cycles() == loop.cycles() - 8


def test_a_path_goes_where_parameters_say() -> None:
    listing = _listing(
        ("LDC R0, c[0x0][0x210]", 1, 0, 0),
        ("VIADD R1, R1, 0x1", 4, 7, 0b1),
        ("ISETP.LT.AND P0, PT, R1, R0, PT", 13, 7, 0),
        ("@P0 BRA 0x10", 5, 7, 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", 5, 7, 0),
        ("EXIT", 5, 7, 0),
    )
    sass, path = load("sass"), load("sass_path")
    (rows,) = sass.parse(listing).values()
    phases = path.phases_of(rows, (3).to_bytes(4, "little"), 64)
    turns = 3 * (4 + 13 + 5)
    assert phases == [
        path.Phase("BAR", sass.LATENCIES["LDC"] + turns + 5, 2 * (1 + 3 * 3 + 1)),
        path.Phase("EXIT", 5, 2),
    ]
    (rows,) = sass.parse(_listing(("FROB R0, R1", 1, 7, 0))).values()
    with pytest.raises(NotImplementedError, match="FROB"):
        path.phases_of(rows, b"", 32)
