"""torch.export and AOTInductor: packed weights as constants, and the kernels' own operators."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _cases import FP32_BOUND, assert_agrees, convs, draw, drop_in, each_drop_in, small_network
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import snv2_kernels as snv2
from snv2_kernels.libraries import library
from snv2_kernels.testing import max_error

PACKAGE = Path(snv2.__file__).parent


def agree(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert max_error(actual.detach(), expected.detach()) < FP32_BOUND


def kernels_of(program: ExportedProgram) -> list[str]:
    """What a program calls, but for the checks of dtypes that export adds."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if "_assert" not in name]


@each_drop_in
def test_program_is_one_op_on_constants(kind: str) -> None:
    """Also where the module has never run."""
    plain, module, x = drop_in(kind)
    program = export(module, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    op = "split_dw_cat_shuffle" if kind == "split" else "network"
    assert kernels_of(program) == [f"snv2.{op}.default"]
    assert len(program.constants) == (3 if kind == "split" else 2)
    for n in (1, 2, 5):
        more = draw(n, *x.shape[1:])
        agree(program.module()(more), plain(more))
    agree(program.run_decompositions().module()(x), plain(x))
    assert_agrees(kind, module, plain, x)


@each_drop_in
def test_strict_export_is_plain(kind: str) -> None:
    plain, module, x = drop_in(kind)
    program = export(module, (x,), strict=True)
    assert not any(name.startswith("snv2") for name in kernels_of(program))
    agree(program.module()(x), plain(x))


def test_program_is_frozen() -> None:
    plain, module, x = drop_in("stage")
    before = plain(x)
    program = export(module, (x,))
    for m in (plain, module):
        with torch.no_grad():
            convs(m)[2].weight.mul_(2)
    agree(program.module()(x), before)
    agree(export(module, (x,)).module()(x), plain(x))


def test_model_around_fused_parts() -> None:
    trunk = small_network()
    plain = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)),
        trunk.stage2,
        nn.Conv2d(20, 4, 1),
    ).eval()
    size = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = export(snv2.fuse(plain), (draw(1, 3, 32, 48),), dynamic_shapes=(size,))
    names = kernels_of(program)
    assert names.count("snv2.network.default") == 1
    assert sum("conv" in name for name in names) == 2
    for shape in ((1, 3, 32, 48), (1, 3, 40, 24)):
        agree(program.module()(draw(*shape)), plain(draw(*shape)))


@pytest.mark.parametrize("what", ["train", "float64", "hook", "reference"])
def test_what_the_kernels_do_not_cover_is_exported_plain(what: str) -> None:
    plain, module, x = drop_in("unit-s1")
    for m in (plain, module):
        if what == "hook":
            m.branch2[2].register_forward_hook(lambda m, args, out: out * 3)
        elif what == "float64":
            m.double()
        elif what == "train":
            m.train()
    if what == "reference":
        module._backend = "reference"
    x = x.double() if what == "float64" else x
    program = export(copy.deepcopy(module), (x,))
    assert not any(name.startswith("snv2") for name in kernels_of(program))
    assert max_error(program.module()(x).detach(), plain(x).detach()) < FP32_BOUND


def test_bad_input_raises_as_in_eager_mode() -> None:
    _, module, _ = drop_in("unit-s1")
    with pytest.raises(ValueError, match="x: expected 34 channels"):
        export(module, (draw(2, 20, 9, 11),))
    with pytest.raises(TypeError, match="x: expected"):
        export(module, (draw(2, 34, 9, 11).half(),))


def test_autocast() -> None:
    plain, module, x = drop_in("unit-s2")
    with torch.autocast("cpu", torch.bfloat16):
        program = export(module, (x,))
        expected = plain(x)
    out = program.module()(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert max_error(out.detach(), expected.detach()) < 0.05


def test_gpu_kernels(gpu_backend: str) -> None:
    plain, module, x = drop_in("unit-s1")
    module._backend = gpu_backend
    program = export(module, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    assert kernels_of(program)[-1].endswith("gpu_network.default")
    agree(program.module()(draw(3, *x.shape[1:])), plain(draw(3, *x.shape[1:])))


# Where the library is loaded with and without this package.
LOADS = {
    "package": "import snv2_kernels",
    "library": f"import torch; torch.ops.load_library({str(library('torch'))!r})",
}
RUN = """
import sys, torch
assert ("snv2_kernels" in sys.modules) == (sys.argv[1] == "package")
x, expected = torch.load("example.pt")
programs = torch.export.load("program.pt2").module(), torch._inductor.aoti_load_package("aoti.pt2")
for program in programs:
    torch.testing.assert_close(program(x).detach(), expected, rtol=1e-4, atol=1e-4)
"""


# For a wrapper that is compiled once and runs for a moment.
COMPILED_ONCE = {
    "aot_inductor.precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


def test_saved_programs_run_in_another_process(tmp_path: Path) -> None:
    plain, module, x = drop_in("stage")
    program = export(module, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    torch.export.save(program, tmp_path / "program.pt2")
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "aoti.pt2"), inductor_configs=COMPILED_ONCE
    )
    more = draw(5, *x.shape[1:])
    torch.save((more, plain(more).detach()), tmp_path / "example.pt")
    for name, load in LOADS.items():
        subprocess.run(
            [sys.executable, "-c", load + RUN, name],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
            check=True,
        )
