"""A network frozen at one input shape, with all memory planned."""

from __future__ import annotations

import copy
import operator
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snv2_kernels.backends import DEVICES, backends, check_backend, resolve
from snv2_kernels.engine_report import EngineReport
from snv2_kernels.fuse import fuse
from snv2_kernels.graph.partition import OtherInput
from snv2_kernels.nn.planned import PlannedModule, plan_element
from snv2_kernels.nn.watch import why_plain
from snv2_kernels.onnx.model import OnnxModel, OnnxNetwork
from snv2_kernels.ops import KERNEL_DTYPES, check_feature_map
from snv2_kernels.packing import GpuPlan, Plan, TritonPlan
from snv2_kernels.packing.units import Unsupported
from snv2_kernels.partition_engine import FrozenPartition, PartitionRunner, partition_of
from snv2_kernels.runners import (
    CpuRunner,
    GpuRunner,
    Pixels,
    TritonRunner,
    checked_normalize,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Engine", "EngineReport", "checked_model", "checked_pixels", "checked_shape"]

_MOST_PIXEL_CHANNELS = 4  # of bytes; snv2::Image


class Engine:
    """A network, stage or unit frozen for fast inference at a fixed input shape.

    Weights are packed and all memory is planned when the engine is made; a call allocates
    nothing. Later changes of ``model`` do not show. Numerically it is ``fuse(model)``.

    An engine serves one thread. :meth:`clone` makes one for each other thread, which shares the
    weights. An engine can also be copied and pickled, weights and all; it is made again where it
    is read, on a machine like this one.

    On a GPU a call replays one CUDA graph on the current stream, which reads :attr:`input`: write
    images there and pass it, and nothing is copied. Calls on several streams must wait for each
    other, as they share memory.

    Args:
        model: in ``eval()`` mode; a model whose whole forward :func:`snv2_kernels.fuse`
            recognises. On a CPU also one of units among other layers: these PyTorch runs, between
            the plans, and results may be new memory. Of one that :func:`snv2_kernels.load_onnx` has
            made, ``normalization`` and ``tail`` run as they are, before and after.
        input_shape: [N, C, H, W]. N is the most images that a call takes.
        device: defaults to the parameters' device.
        dtype: of input and output, float32, float16 or bfloat16; defaults to the parameters'.
            Weights are packed from the parameters as they are, without rounding them first.
        taps: names of stages (``"stage2"``, ``"stage3"``, ``"stage4"`` of a network) whose maps a
            call returns too, in the same call.
        normalize: ``(mean, std)``, one number for each channel. The engine then takes images as
            bytes, uint8 [N, H, W, C], and computes ``(x / 255 - mean) / std`` on the way in. For
            whole networks, of at most four channels. A ``normalization`` of the model's own is
            applied to that result, in the same step.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        RuntimeError: if no kernel backend is there for ``device``, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int, int] = (1, 3, 224, 224),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        taps: Sequence[str] = (),
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        before, network, after = _ends(model)
        fused = checked_model(network, may_cut=True)
        packed = fused.packed()
        assert packed.device is not None
        assert packed.dtype is not None
        self._dtype = packed.dtype if dtype is None else dtype
        self._device = packed.device if device is None else _checked_device(device)
        if self._dtype not in KERNEL_DTYPES:
            raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype!r}")
        _check_gpu(self._device)
        self._backend = resolve(self._device, "auto")
        if self._backend not in fused.kernel_backends:
            raise RuntimeError(f"device: {_why_no_kernels(self._device, self._backend)}")
        if self._device == torch.device("cuda"):
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._shape = checked_shape(input_shape, packed.in_channels, self._dtype)
        if not fused._fits(*self._shape[2:]):
            raise ValueError(
                f"input_shape: {self._shape} does not run fused: the model pools a part of its map"
            )
        if (reason := fused._why_not_at(self._shape, self._dtype, self._device)) is not None:
            raise ValueError(f"model: cannot run fused: {reason}")
        self._taps = _checked_taps(taps, fused)
        self._pixels = checked_pixels(normalize, fused, packed.in_channels)
        if self._pixels is not None and before is not None:
            self._pixels, before = _normalized_pixels(self._pixels, before), None
        self._before, self._after = (_frozen(module, self._device) for module in (before, after))
        # Results come in the order of the network.
        self._tap_names = [name for name in fused._tap_names() if name in self._taps]
        self._returned = fused._returned
        try:
            self._plan = self._packed_plan(fused)
        except Unsupported as error:
            raise ValueError(f"model: cannot run fused: {error}") from None
        self._start()

    def _packed_plan(self, fused: PlannedModule) -> Plan | GpuPlan | TritonPlan | FrozenPartition:
        if (partition := partition_of(fused)) is not None:
            if self._backend != "cpu":
                raise Unsupported(f"{partition.why_not_whole()}, which an engine has on a CPU only")
            return FrozenPartition(fused, partition, self._dtype)
        if self._backend == "cpu":
            return fused._cpu_plan(self._dtype, self._taps, self._pixels)
        if fused._ranges is not None:
            raise Unsupported("it is quantized, and integers run on a CPU only")
        pack = fused._triton_plan if self._backend == "triton" else fused._gpu_plan
        return pack(self._dtype, self._device, self._taps)

    def _start(self) -> None:
        """Plan and allocate all memory."""
        self._lock = threading.Lock()
        try:
            self._runner = self._make_runner()
        except OtherInput as error:
            raise ValueError(f"input_shape: {self._shape} does not run fused: {error}") from None
        except (OSError, RuntimeError) as error:
            if "memory" not in str(error):
                raise
            kind = type(error) if isinstance(error, RuntimeError) else MemoryError  # as torch's
            raise kind(f"input_shape: {self._shape} takes too much memory: {error}") from None
        read = self._runner.input
        self._input = read if self._before is None else torch.zeros_like(read)

    def _make_runner(self) -> CpuRunner | GpuRunner | TritonRunner:
        plan, shape, device = self._plan, self._shape, self._device
        if isinstance(plan, Plan):
            return CpuRunner(plan, shape, self._dtype, self._pixels)
        if isinstance(plan, FrozenPartition):
            return PartitionRunner(plan, shape)
        if isinstance(plan, TritonPlan):
            return TritonRunner(plan, shape, device, self._pixels)
        try:
            return GpuRunner(plan, shape, device, self._backend, self._pixels)
        except ValueError as error:
            raise ValueError(f"input_shape: {shape} does not run fused: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        made = ("_lock", "_runner", "_input")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        check_backend(self._backend)
        plan: Any = self._plan
        on_cpu = isinstance(plan, Plan | FrozenPartition)
        element = plan.element if on_cpu else torch.uint8
        if element not in (torch.uint8, plan_element(self._dtype)):
            raise RuntimeError(
                f"this engine's maps are {element}, which this processor does not"
                " multiply or has better kernels for; make an engine of the model here"
            )
        self._start()

    def clone(self) -> Engine:
        """Make an engine for another thread, which shares the weights and has memory of its own.

        Both give the same to the bit, and may run at once. This engine may be in use meanwhile. On
        a CPU the clone's memory is planned for as many threads as PyTorch uses in the thread that
        makes it.
        """
        made = type(self).__new__(type(self))
        vars(made).update(self.__getstate__())
        made._start()
        return made

    def __call__(self, x: Tensor) -> Any:
        """Compute the output for ``x``, in a buffer that the next call overwrites.

        Args:
            x: of the engine's shape and dtype, or fewer images; any strides (a copy is made unless
                contiguous). With ``normalize`` uint8 [N, H, W, C]. Of n images less than N the
                results are views of the buffers' first n. On a CPU just these are computed; on a
                GPU the graph always computes N.

        Returns:
            What the model returns, with ``taps`` that and ``{name: map}``; maps in logical order.

        Raises:
            TypeError, ValueError: if ``x`` does not fit, or needs a gradient.
            RuntimeError: if another thread is inside this engine.
        """
        self._check_input(x)
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "this engine is in use in another thread; make one for each with engine.clone()"
            )
        try:
            with torch.no_grad():
                results = self._runner(
                    x if self._before is None else self._before(x).to(self._dtype)
                )
                output = self._returned.filled(tuple(results[len(self._tap_names) :]))
                output = output if self._after is None else self._after(output)
        finally:
            self._lock.release()
        if not self._taps:
            return output
        tapped = dict(zip(self._tap_names, results, strict=False))
        return output, {name: tapped[name] for name in self._taps}

    def _check_input(self, x: Any) -> None:
        buffer = self._input
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if self._pixels is None:
            check_feature_map(x)
        if x.shape != buffer.shape:
            _check_fewer_images(x, buffer)
        if x.dtype != buffer.dtype:
            raise TypeError(f"x: expected {buffer.dtype}, got {x.dtype}")
        if x.device != self._device:
            raise ValueError(f"x: expected device {self._device}, got {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x: requires a gradient, which an engine does not have")

    @property
    def input(self) -> Tensor:
        """A buffer of the engine's that fits as ``x``, and so do its first images. On a GPU any
        other ``x`` is copied to it."""
        return self._input

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def report(self) -> EngineReport:
        """What a call does, and the memory it uses."""

        def size(*tensors: Tensor) -> int:
            return sum(t.numel() * t.element_size() for t in tensors)

        runner = self._runner
        plan = runner.plan
        return EngineReport(
            backend=self._backend,
            input_shape=tuple(runner.input.shape),
            output_shape=tuple(runner.results[-1].shape),
            dtype=self._dtype,
            op_calls=runner.op_calls,
            units=plan.units,
            multiply_adds=self._shape[0] * plan.multiply_adds(*self._shape[2:]),
            weight_bytes=size(*runner.arrays),
            workspace_bytes=size(*runner.workspace),
            input_bytes=size(runner.input),
            output_bytes=size(*runner.results),
            threads=runner.threads if isinstance(runner, CpuRunner) else 1,
            element=plan.element if isinstance(plan, Plan) else self._dtype,
            graph=not isinstance(runner, CpuRunner) and runner.graph is not None,
            kernels=runner.launches(),
        )


def _ends(model: Any) -> tuple[nn.Module | None, Any, nn.Module | None]:
    """What runs before the network, the network, and what runs after it."""
    if not isinstance(model, OnnxModel):
        return None, model, None
    _check_mode_and_hooks(model)
    return model.ends()


def checked_model(model: Any, may_cut: bool = False) -> PlannedModule:
    """The model fused, if it runs so as a whole, or may be cut into regions and other functions.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    fused = fuse(model)
    partition = partition_of(fused)
    if partition is not None and not may_cut:
        first = partition.first_outside()
        raise ValueError(f"model: {first} is in no plan; snv2_kernels.explain(model) says more")
    not_whole = None if partition else ""
    if isinstance(fused, PlannedModule) and partition is None:
        not_whole = fused._why_not_whole()
    if not isinstance(fused, PlannedModule) or not_whole is not None:
        raise TypeError(
            f"model: {type(model).__name__} is not a network, stage or unit as a whole"
            f"{not_whole and f', since {not_whole}'}; see snv2_kernels.explain(model)"
        )
    _check_mode_and_hooks(model)
    packed = fused.packed()
    if packed.runs_plain(fused):
        raise ValueError(f"model: cannot run fused: {packed.reason or why_plain(fused)}")
    return fused


def _check_mode_and_hooks(model: nn.Module) -> None:
    if model.training:
        raise ValueError("model: expected eval() mode; call model.eval() first")
    for kind, hooks in (
        ("forward pre-hooks", model._forward_pre_hooks),
        ("forward hooks", model._forward_hooks),
    ):
        if hooks:
            raise ValueError(f"model: it has {kind}, which an engine does not run; remove them")


def _check_gpu(device: torch.device) -> None:
    """Refuse a GPU that is not there, which torch would complain of in many ways."""
    if device.type != "cuda" or (device.index or 0) < (count := torch.cuda.device_count()):
        return
    found = (
        f"there is no {device}; CUDA devices here: {count}" if count else _why_no_kernels(device)
    )
    raise RuntimeError(f"device: {found}")


def _why_no_kernels(device: torch.device, chosen: str = "reference") -> str:
    states = backends()
    fitting = [name for name in ("cpu", "cuda", "triton") if DEVICES[name] == device.type]
    if any(states[name].startswith("ok") for name in fitting):
        return f"the backend {chosen!r}, which is set for {device}, does not run this model"
    reasons = [f"{name}: {states[name]}" for name in fitting] or ["kernels run on cpu and cuda"]
    return f"no kernel backend is available for {device} ({'; '.join(reasons)})"


def _check_fewer_images(x: Tensor, buffer: Tensor) -> None:
    most, expected = buffer.shape[0], tuple(buffer.shape)
    if x.shape[1:] != buffer.shape[1:]:
        fewer = " or fewer images" if most > 1 else ""
        raise ValueError(f"x: expected shape {expected}{fewer}, got {tuple(x.shape)}")
    if x.shape[0] > most:
        raise ValueError(
            f"x: expected shape {expected} or fewer images, got {tuple(x.shape)};"
            f" pass x.split({most}) one by one, or make an engine for {x.shape[0]} images"
        )


def _frozen(module: nn.Module | None, device: torch.device) -> nn.Module | None:
    """A copy that later changes do not reach."""
    return None if module is None else copy.deepcopy(module).to(device).requires_grad_(False)


def _checked_device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device: expected a torch.device or its name, got {device!r}") from None


def checked_shape(input_shape: Any, channels: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    if not isinstance(input_shape, Iterable):
        raise TypeError(f"input_shape: expected [N, C, H, W], got {input_shape!r}")
    try:
        n, c, h, w = map(operator.index, input_shape)
    except (TypeError, ValueError):
        raise ValueError(f"input_shape: expected [N, C, H, W], got {input_shape!r}") from None
    shape = n, c, h, w
    if c != channels or min(n, h - 1, w - 1) < 0:
        raise ValueError(f"input_shape: expected [N >= 0, {channels}, H >= 1, W >= 1], got {shape}")
    if (size := n * c * h * w * dtype.itemsize) > sys.maxsize:
        raise ValueError(f"input_shape: {shape} takes {size / 1e18:,.0f} EB for the input alone")
    return shape


def _checked_taps(taps: Any, fused: PlannedModule) -> tuple[str, ...]:
    known = fused._tap_names()
    if not isinstance(taps, Iterable):
        raise TypeError(f"taps: expected names of stages, got {taps!r}")
    names = [taps] if isinstance(taps, str) else list(taps)
    for name in names:
        if name not in known:
            expected = f"names among {', '.join(known)}" if known else "none for a stage or unit"
            raise ValueError(f"taps: expected {expected}, got {name!r}")
    return tuple(dict.fromkeys(names))


def checked_pixels(normalize: Any, fused: PlannedModule, channels: int) -> Pixels | None:
    if normalize is None:
        return None
    mean, std = checked_normalize(normalize, channels)
    if not fused._takes_images():
        raise ValueError("normalize: only a whole network takes images, not a stage or unit")
    if channels > _MOST_PIXEL_CHANNELS:
        raise ValueError(f"normalize: expected at most {_MOST_PIXEL_CHANNELS} channels")
    return Pixels(
        tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
    )


def _normalized_pixels(pixels: Pixels, before: nn.Module) -> Pixels:
    """What a module makes of pixels, if it scales and shifts each channel."""
    channels = len(pixels.scale)
    affine = before.scale_and_shift(channels) if isinstance(before, OnnxNetwork) else None
    if affine is None:
        raise ValueError("normalize: the model's normalization does more than scale and shift")
    scale, shift = affine
    pairs = zip(pixels.scale, scale, strict=True), zip(pixels.shift, scale, shift, strict=True)
    return Pixels(tuple(a * b for a, b in pairs[0]), tuple(a * b + c for a, b, c in pairs[1]))
