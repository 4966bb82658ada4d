"""A network as one file, which C++ programs and Python run without the model
(``docs/program.md``)."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import snv2_kernels
from snv2_kernels import _native, gpu
from snv2_kernels.backends import resolve
from snv2_kernels.engine import checked_model, checked_pixels, checked_shape
from snv2_kernels.onnx.model import OnnxModel
from snv2_kernels.ops import KERNEL_DTYPES, check_feature_map, operators
from snv2_kernels.packing import Builder, PlanBuilder
from snv2_kernels.packing.common import map_shape
from snv2_kernels.packing.planes import DTYPES, ELEMENTS
from snv2_kernels.packing.units import Layer, Unit, Unsupported
from snv2_kernels.program_file import (
    ABOUT,
    CLASSES,
    CPU_PLAN,
    CPU_WEIGHTS,
    GPU_PARAMETERS,
    GPU_PLAN,
    GPU_WEIGHTS,
    INPUT,
    NORMALIZATION,
    Section,
    read_program,
    write_program,
)
from snv2_kernels.runners import WORKSPACE_SLACK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snv2_kernels.nn.planned import PlannedModule
    from snv2_kernels.packing import Plan

__all__ = ["Program", "save_program"]

TARGETS = ("cpu", "cuda")

_OTHER_SIZE = 1 << 20  # pixels that no last map of a fixed size has

# Writing --------------------------------------------------------------------------------------


class _Counter(Builder):
    """Counts what a plan folds."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.linear = 0

    def add_stem(self, layer: Layer) -> None:
        super().add_stem(layer)
        self.convolutions += 1

    def add_unit(self, unit: Unit[Layer]) -> None:
        super().add_unit(unit)
        self.convolutions += sum(1 for _ in unit.layers())

    def add_head(self, layer: Layer | None, fc: nn.Linear | None) -> None:
        super().add_head(layer, fc)
        self.convolutions += layer is not None
        self.linear += fc is not None

    def __str__(self) -> str:
        text = f"{self.convolutions} convolutions with their batch norms and activations"
        return f"{text}, {self.linear} linear layer" if self.linear else text


def save_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: Sequence[int] = (1, 3, 224, 224),
    *,
    targets: Sequence[str] = ("cpu",),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    classes: Sequence[str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a network, its weights packed, as one file that :class:`Program` and C++ run.

    The file is whole or not there: it is written beside ``path``, read back, and then renamed.

    Args:
        model: in ``eval()`` mode; a model whose whole forward :func:`snv2_kernels.fuse` recognises.
        path: the file, by custom ``*.snv2``.
        input_shape: [N, C, H, W] by default. Batch and size are free in each run, unless the
            model's pooling is of one size.
        targets: ``"cpu"``, ``"cuda"``: what it has plans for. The CPU's is always there.
        dtypes: of maps that plans multiply. The CPU has a plan for float32 always, and one for
            bfloat16 where that is among them; ``"cuda"`` has one for each. A model of
            :func:`snv2_kernels.quantize` has one plan, of integers, for whatever dtype comes.
        normalize: ``(mean, std)``, one number for each channel. The program then takes images as
            bytes too, and computes ``(x / 255 - mean) / std``. For whole networks, of at most four
            channels.
        classes: a name for each class.
        about: more to say in the file's JSON, for people and tools.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        OSError: if the file cannot be written.
    """
    if isinstance(model, OnnxModel):
        beside = " and ".join(name for name in model._modules if name != "network")
        raise ValueError(
            f"model: it has {beside} beside its network; save model.network, and give normalize"
            " what the first computes"
        )
    fused = checked_model(model)
    packed = fused.packed()
    _check_order(fused)
    shape = checked_shape(input_shape, packed.in_channels, torch.float32)
    for dtype in KERNEL_DTYPES:  # a program takes any of them
        if (reason := fused._why_not_at(shape, dtype, torch.device("cpu"))) is not None:
            raise ValueError(f"model: cannot run fused: {reason}")
    cuda, dtypes = "cuda" in _checked_targets(targets), _checked_dtypes(dtypes)
    checked_pixels(normalize, fused, packed.in_channels)
    try:
        if fused._ranges is not None:
            if cuda:
                raise Unsupported("it is quantized, and integers run on a CPU only")
            plan = fused._cpu_plan(torch.float32)
            cpu = [plan]
        else:
            plan = _cpu_plan(fused, torch.float32)
            cpu = [plan, *(_cpu_plan(fused, d) for d in dtypes if d == torch.bfloat16)]
        gpu = [fused._gpu_plan(d, torch.device("cpu")) for d in dtypes] if cuda else []
        counter = _Counter()
        fused._tell(counter)
    except Unsupported as error:
        raise ValueError(f"model: cannot run fused: {error}") from None
    last_map = _last_map(fused, shape, plan.halvings)

    told = {
        "model": type(model).__name__,
        "library": f"snv2_kernels {snv2_kernels.__version__}, torch {torch.__version__}",
        "units": plan.units,
        "multiply_adds": plan.multiply_adds(*shape[2:]),
        "folded": str(counter),
        "input_shape": shape,
        "in_channels": plan.in_channels,
        "out_channels": plan.out_channels,
        **_checked_about(about),
    }
    text = json.dumps(told, ensure_ascii=False, allow_nan=False).encode()
    sections = [
        Section(ABOUT, 0, text),
        Section(INPUT, 0, struct.pack("<6q", *shape, *last_map)),
    ]
    if normalize is not None:
        numbers = [float(v) for values in normalize for v in values]
        sections.append(Section(NORMALIZATION, 0, struct.pack(f"<{len(numbers)}d", *numbers)))
    if classes is not None:
        sections.append(Section(CLASSES, 0, _checked_classes(classes, plan)))
    for narrow in cpu:
        sections += [Section.of(CPU_PLAN, narrow.words, narrow.element),
                     Section.of(CPU_WEIGHTS, narrow.weights, narrow.element)]  # fmt: skip
    for part in gpu:
        sections += [Section.of(GPU_PLAN, part.words, part.dtype),
                     Section.of(GPU_WEIGHTS, part.weights, part.dtype),
                     Section.of(GPU_PARAMETERS, part.parameters, part.dtype)]  # fmt: skip
    write_program(Path(path), sections, snv2_kernels.__version__)


def _check_order(fused: PlannedModule) -> None:
    """Raise for a model that returns its maps in another order than a program does."""
    recognition = getattr(fused, "_recognition", None)
    if recognition is None or recognition.returned.container is None:
        return
    places = recognition.returned.places
    if recognition.returned.is_nested:
        raise ValueError("model: it returns containers inside each other, a program maps in a row")
    if list(places) != list(range(len(places))):
        raise ValueError(
            "model: it returns a map twice, or in another order than its network makes them, which"
            " a program returns"
        )


def _cpu_plan(fused: PlannedModule, element: torch.dtype) -> Plan:
    """Whatever this machine multiplies."""
    builder = PlanBuilder()
    fused._tell(builder)
    return builder.build(element)


def _last_map(
    fused: PlannedModule, shape: tuple[int, int, int, int], halvings: int
) -> tuple[int, int]:
    """Extents of the only last map that the model is right for; zeros where any is."""
    height, width = shape[2:]
    if not fused._fits(height, width):
        raise ValueError(
            f"input_shape: {shape} does not run fused: the model pools a part of its map"
        )
    if fused._fits(height + _OTHER_SIZE, width + _OTHER_SIZE):
        return 0, 0
    _, _, last_height, last_width = map_shape(1, 1, halvings, height, width)
    return last_height, last_width


def _checked_targets(targets: Any) -> set[str]:
    if not isinstance(targets, Iterable):
        raise TypeError(f"targets: expected names among {', '.join(TARGETS)}, got {targets!r}")
    names = {targets} if isinstance(targets, str) else set(targets)
    if not names <= set(TARGETS):
        raise ValueError(f"targets: expected names among {', '.join(TARGETS)}, got {targets!r}")
    return names


def _checked_dtypes(dtypes: Any) -> list[torch.dtype]:
    given = list(dtypes) if isinstance(dtypes, Iterable) else [dtypes]
    for dtype in given:
        if dtype not in KERNEL_DTYPES:
            raise TypeError(f"dtypes: expected float32, float16 or bfloat16, got {dtype!r}")
    return [dtype for dtype in DTYPES if dtype in given]


def _checked_classes(classes: Any, plan: Plan) -> bytes:
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise TypeError(f"classes: expected a list of names, got {classes!r}")
    names = list(classes)
    scores = plan.out_channels if plan.classify else 0
    if len(names) != scores:
        raise ValueError(f"classes: expected a name for each of {scores}, got {len(names)}")
    for name in names:
        if not isinstance(name, str) or "\n" in name or "\0" in name:
            raise ValueError(f"classes: expected names of one line, got {name!r}")
    return "\n".join(names).encode()


def _checked_about(about: Any) -> dict[str, Any]:
    try:
        told = dict(about or {})
        json.dumps(told, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"about: expected a mapping that JSON can hold: {error}") from None
    return told


# Running --------------------------------------------------------------------------------------


class Program:
    """A network from a file of :func:`save_program`, without its model.

    ``program(x)`` is ``Engine(model, x.shape)(x)``, bit for bit, in new memory: the output, or a
    tuple of all maps that the model returns. Any batch and size. A copy or a pickle of it has the
    path of its file.

    Args:
        path: the file.
        dtype: of results of images that are given as bytes.

    Raises:
        ValueError: if the file is damaged, or of another version; the message says which.
        OSError: if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in KERNEL_DTYPES:
            raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype!r}")
        path = os.fspath(path)
        self._dtype = dtype
        self._path = os.path.abspath(path)
        self._file = read_program(path)
        try:
            self.about: dict[str, Any] = dict(json.loads(self._file.about or "{}"))
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"path: {path}: its section about itself is not JSON") from None
        self._arrays: dict[tuple[str, int, torch.device], tuple[Tensor, ...]] = {}
        mean, std = self._file.mean, self._file.std
        self._scale = [1 / (255 * s) for s in std]
        self._shift = [-m / s for m, s in zip(mean, std, strict=True)]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what a pickle makes, reads the file again."""
        return _program, (self._path, self._dtype)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W] by default."""
        n, c, h, w = self._file.input_shape
        return n, c, h, w

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty if the file has none."""
        return tuple(self._file.classes)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """``(mean, std)``, if bytes are taken."""
        return (tuple(self._file.mean), tuple(self._file.std)) if self._file.mean else None

    @property
    def results(self) -> tuple[tuple[int, int], ...]:
        """Channels of each result, and how often its height and width are halved."""
        return tuple(self._file.results)

    @property
    def classifies(self) -> bool:
        """Whether the last result is scores, [N, classes]."""
        return self._file.classifies

    @property
    def plans(self) -> tuple[tuple[str, torch.dtype], ...]:
        """Targets and dtypes of maps that there are plans for."""
        return tuple(
            (target, ELEMENTS[dtype])
            for target, parts in (("cpu", self._file.cpu), ("cuda", self._file.gpu))
            for dtype in parts
        )

    def __str__(self) -> str:
        about = self.about
        arithmetic = about.get("multiply_adds")
        plans = [f"{target} {str(dtype).removeprefix('torch.')}" for target, dtype in self.plans]
        lines = [
            f"network     {about.get('model', 'unknown')}, {about.get('units', '?')} units",
            f"written by  snv2_kernels {self._file.library}",
            f"input       {' x '.join(map(str, self.input_shape))}, any batch"
            + (" and size" if not any(self._file.last_map) else ""),
            f"results     {', '.join(f'{c} channels' for c, _ in self._file.results)}",
            f"plans       {', '.join(plans)}",
            f"bytes       {'taken' if self.normalization else 'not taken'}",
        ]
        if isinstance(arithmetic, int):
            lines.insert(4, f"arithmetic  {arithmetic / 1e6:,.1f} M multiply-adds")
        if self.classes:
            lines.append(f"classes     {len(self.classes)}, named")
        return "\n".join(lines)

    def __call__(self, x: Tensor) -> Any:
        """The output for ``x``.

        Args:
            x: float32, float16 or bfloat16 [N, C, H, W] of any strides, which are made contiguous,
                or, of a program with a normalization, uint8 [N, H, W, C].

        Returns:
            [N, classes] for a classifier, else a map; a tuple of all results where there are
            several. In ``x``'s dtype; for bytes in the program's.

        Raises:
            TypeError, ValueError: if ``x`` does not fit, or needs a gradient.
            RuntimeError: if the file has no plan for where ``x`` lies.
        """
        self._check_input(x)
        backend = resolve(x.device, "auto")
        if backend not in ("cpu", "cuda", "cuda-emulated"):
            raise RuntimeError(f"x: a program runs on cpu and cuda, not on backend {backend!r}")
        is_bytes = x.dtype == torch.uint8
        arrays = self._arrays_for(backend, self._dtype if is_bytes else x.dtype, x.device)
        with torch.no_grad():
            x = x.contiguous()
            if backend != "cpu" and is_bytes:
                results = self._on_gpu_bytes(x, backend, arrays)
            else:
                name = "network_results" if backend == "cpu" else "gpu_network_results"
                channels, halvings = zip(*self._file.results, strict=True)
                results = getattr(operators(backend), name)(
                    self._normalized(x) if is_bytes else x,
                    *arrays, list(channels), list(halvings), self._file.classifies,
                )  # fmt: skip
        return results[0] if len(results) == 1 else tuple(results)

    def _check_input(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        channels = self._file.input_shape[1]
        if x.dtype == torch.uint8:
            if self.normalization is None:
                raise TypeError("x: this program has no normalization, so it takes no bytes")
            if x.dim() != 4 or x.shape[3] != channels:
                raise ValueError(f"x: expected bytes [N, H, W, {channels}], got {tuple(x.shape)}")
            if 0 in x.shape[1:]:
                raise ValueError(f"x: expected at least one pixel, got {tuple(x.shape)}")
            size = x.shape[1:3]
        else:
            check_feature_map(x)
            if x.dtype not in KERNEL_DTYPES or x.layout != torch.strided:
                kind = f"{x.dtype}, {x.layout}"
                raise TypeError(f"x: expected dense float32, float16 or bfloat16, got {kind}")
            if x.shape[1] != channels:
                raise ValueError(f"x: expected {channels} channels, got {tuple(x.shape)}")
            size = x.shape[2:]
        last = tuple(self._file.last_map)
        if any(last) and map_shape(1, 1, self._file.results[-1][1], *size)[2:] != last:
            raise ValueError(
                f"x: {tuple(size)} pixels; this network is right only where its last map is {last}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x: requires a gradient, which a program does not have")

    def _arrays_for(
        self, backend: str, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        """The arguments of the op that are the plan."""
        number = DTYPES.index(dtype)
        if backend == "cpu":
            narrow = dtype == torch.bfloat16 and _native.cpu_has_bfloat16()
            number = number if narrow and number in self._file.cpu else min(self._file.cpu)
        elif number not in self._file.gpu:
            kind = str(dtype).removeprefix("torch.")
            raise RuntimeError(f"x: this program has no plan for {kind} on a GPU; export it again")
        key = backend, number, device
        if key not in self._arrays:
            self._arrays[key] = (
                self._cpu_arrays(number) if backend == "cpu" else self._gpu_arrays(number, device)
            )
        return self._arrays[key]

    def _cpu_arrays(self, number: int) -> tuple[Tensor, ...]:
        words, weights = map(torch.from_numpy, self._file.cpu[number])
        return weights, words

    def _gpu_arrays(self, number: int, device: torch.device) -> tuple[Tensor, ...]:
        words, weights, parameters = map(torch.from_numpy, self._file.gpu[number])
        steps = _native.GPU_HEADER_WORDS + _native.GPU_STEP_WORDS * int(words[1])
        moved = weights.view(DTYPES[number]), parameters, words[steps:].to(torch.int32)
        return *(t.to(device) for t in moved), words

    def _normalized(self, x: Tensor) -> Tensor:
        """[N, C, H, W] from bytes [N, H, W, C]."""
        scale, shift = (torch.tensor(v)[:, None, None] for v in (self._scale, self._shift))
        exact = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return exact.mul_(scale).add_(shift).to(self._dtype)

    def _on_gpu_bytes(self, x: Tensor, backend: str, arrays: tuple[Tensor, ...]) -> list[Tensor]:
        n, h, w, _ = x.shape
        shapes: list[tuple[int, ...]] = [
            map_shape(n, c, halvings, h, w) for c, halvings in self._file.results
        ]
        if self._file.classifies:
            shapes[-1] = shapes[-1][:2]
        results = [torch.empty(shape, dtype=self._dtype, device=x.device) for shape in shapes]
        size = gpu.workspace_bytes(arrays[-1], n, h, w, gpu.current_device(x.device))
        workspace = torch.empty(size + WORKSPACE_SLACK, dtype=torch.uint8, device=x.device)
        operators(backend).gpu_network_out(x, *arrays, workspace, results, self._scale, self._shift)
        return results


def _program(path: str, dtype: torch.dtype) -> Program:
    return Program(path, dtype=dtype)
