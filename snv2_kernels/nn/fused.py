"""The base of all drop-in modules: when to run packed weights, and when the plain modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from snv2_kernels._native import Ready
from snv2_kernels.backends import DEVICES, resolve, use_backend
from snv2_kernels.graph.constant import constant_to_dynamo
from snv2_kernels.graph.names import Names
from snv2_kernels.graph.returned import ONE_MAP, Returned
from snv2_kernels.nn.clone import CACHES, clone_tree
from snv2_kernels.nn.sharing import convert_own
from snv2_kernels.nn.watch import Watch, note_mode, why_plain
from snv2_kernels.ops import KERNEL_DTYPES, check_feature_map, inside_transform
from snv2_kernels.packing import Plan
from snv2_kernels.packing.units import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FusedModule", "Packed", "Unsupported"]


class Weights:
    """Packed weights of one state of a module; those of each backend and dtype are made on first
    use."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._made)

    def get(
        self, module: FusedModule, backend: str, dtype: torch.dtype, device: torch.device
    ) -> Any:
        """What ``module._run`` takes on a backend for an input of ``dtype``.

        Raises:
            Unsupported: if these numbers cannot be packed.
        """
        if dtype not in KERNEL_DTYPES:
            raise Unsupported(f"{dtype} runs the reference")
        kind = module._weights_kind(backend, dtype)
        if kind not in self._made:
            try:
                self._made[kind] = module._pack(backend, dtype, device)
            except Unsupported as error:
                self._made[kind] = error
        weights = self._made[kind]
        if isinstance(weights, Unsupported):
            raise Unsupported(str(weights))
        return weights


class Packed:
    """Packed weights of one state of a module, or the reason why there are none."""

    def __init__(self, module: FusedModule) -> None:
        self._owner = id(module)
        self.watch: Watch | None = None
        self.ready: Ready | None = None  # for inputs like the last
        self.finishes = True  # what that gives
        self.reason: str | None = None
        self.device: torch.device | None = None
        self.dtype: torch.dtype | None = None
        self.in_channels = 0
        self._weights = Weights()
        self._eval_twin: FusedModule | None = None
        try:
            tensors = (*module.parameters(), *module.buffers())
            if any(t.is_inference() for t in tensors):
                raise Unsupported("its parameters are inference tensors, whose changes are unseen")
            if any(map(_is_emptied, tensors)):
                raise Unsupported("the memory of a parameter or buffer has been given back")
            self.watch = Watch(module)
            self.device = _one_device(module)
            if self.device.type not in [DEVICES[name] for name in module.kernel_backends]:
                raise Unsupported(f"there are no kernels for device {self.device}")
            self.dtype = _one_dtype(module)
            self.in_channels = module._in_channels()
            module._check_supported()
        except Unsupported as error:
            self.reason = str(error)
        self._outside = module._outside()

    def holds(self, module: FusedModule) -> bool:
        """True if packed from this very object in its current state."""
        if self._owner != id(module) or self.watch is None or not self.watch.holds(module):
            return False
        return all(names.hold() for names in self._outside)

    def runs_plain(self, module: FusedModule) -> bool:
        """Whether only the plain forward will do: it is not covered, or watched from inside."""
        return self.reason is not None or self.watch is None or self.watch.runs_plain(module)

    def weights(self, module: FusedModule, backend: str, dtype: torch.dtype) -> Any:
        """What ``module._run`` takes on a backend for an input of ``dtype``.

        Raises:
            Unsupported: if this module or these numbers cannot be packed.
        """
        if self.reason is not None or self.device is None:
            raise Unsupported(str(self.reason))
        return self._weights.get(module, backend, dtype, self.device)

    def prepare(self, module: FusedModule, plan: Plan, x: Tensor) -> None:
        """Make ready for inputs like one that ``plan`` runs, without gradients and autocast."""
        assert self.watch is not None
        several = len(plan.results) > 1
        op = torch.ops.snv2.network_results if several else torch.ops.snv2.network
        self.finishes = several or not module._returns_result()
        self.ready = Ready(
            module=module, x=x, snapshot=self.watch.snapshot, outside=self._outside, op=op._op,
            arguments=plan.result_arguments if several else plan.arguments,
        )  # fmt: skip

    def eval_twin(self, module: FusedModule) -> FusedModule:
        """The plain module as it was packed, on the same parameters, for the backward pass."""
        if self._eval_twin is None:
            self._eval_twin = module._twin()
            for child in self._eval_twin.modules():
                child.training = False
        return self._eval_twin


def _is_emptied(t: Tensor) -> bool:
    """Whether a tensor's storage was resized to nothing, as sharded training does between steps."""
    strided = t.layout is torch.strided
    return strided and t.numel() > 0 and t.untyped_storage().nbytes() == 0


def _one_device(module: nn.Module) -> torch.device:
    devices = {t.device for t in (*module.parameters(), *module.buffers())}
    if len(devices) != 1:
        raise Unsupported(f"its parameters lie on {len(devices)} devices")
    return devices.pop()


def _one_dtype(module: nn.Module) -> torch.dtype:
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    dtypes = {p.dtype for m in layers for p in (m.weight, m.bias) if p is not None}
    if len(dtypes) != 1:
        raise Unsupported(f"its convolutions have {len(dtypes)} dtypes")
    dtype = dtypes.pop()
    if dtype not in KERNEL_DTYPES:
        raise Unsupported(f"{dtype} runs the reference")
    for name, m in module.named_modules():
        if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm):
            tensors = (m.weight, m.bias, m.running_mean, m.running_var)
            of_norm = {t.dtype for t in tensors if t is not None}
            if of_norm not in ({dtype}, {torch.float32}, set()):  # PyTorch's refuses the input
                raise Unsupported(f"{name} has another dtype than the convolutions")
    return dtype


def _outside_kernels(x: Any) -> bool:
    """Tracing, function transforms, subclasses: code that must see plain PyTorch."""
    if type(x) not in (Tensor, nn.Parameter):
        if not isinstance(x, Tensor | torch.fx.Proxy):
            check_feature_map(x)
        return True
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined]
        or inside_transform()
        or x.layout is not torch.strided
    )


@constant_to_dynamo  # Dynamo of torch 2.11 answers true whenever it traces
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def _run_eager(module: FusedModule, x: Tensor) -> Any:
    return module._eager(x)


# What Dynamo reads of a fused forward, that of torch 2.11 refuses: modules and enumerations as
# constants. There the call stays out of its graph. (To disable it imports the whole compiler.)
_beside_graph = (
    torch.compiler.disable(_run_eager, reason="fused modules are traced from torch 2.13 on")
    if torch.__version__ < "2.13"
    else None
)


class FusedModule(nn.Module):
    """Base class; a subclass also derives from the plain module whose place it takes.

    It gives :meth:`_plain`, the plain forward, :meth:`_check_supported`, which raises
    :class:`Unsupported` for what the kernels do not cover, :meth:`_pack`, which makes packed
    weights, and :meth:`_run`, which runs them on one of the :attr:`kernel_backends`.
    """

    _packed_state: Packed | None = None
    # Those that have the kernels of _run; the others run plain.
    kernel_backends: ClassVar[tuple[str, ...]] = ()
    _backend: str = "auto"
    _mode_set: object = None  # another one after each train() and eval(), which those around it see

    def _plain(self, x: Tensor) -> Any:
        raise NotImplementedError

    @property
    def _returned(self) -> Returned:
        """What :meth:`_plain` makes of the results of :meth:`_run`."""
        return ONE_MAP

    def _finish(self, results: Any) -> Any:
        """Turns the results of :meth:`_run` into what the forward returns."""
        return self._returned.filled(results)

    def _plain_results(self, x: Tensor) -> Any:
        """The results of :meth:`_run`, by the plain forward."""
        return self._returned.results(self._plain(x))

    def _read_by_run(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Returns the parameters that :meth:`_run` may depend on."""
        return parameters

    def _twin(self) -> FusedModule:
        """A copy on the same parameters, whose :meth:`_plain_results` the backward pass calls."""
        twin = clone_tree(self)
        assert isinstance(twin, FusedModule)
        return twin

    def _in_channels(self) -> int:
        """Channels of the input; raises :class:`Unsupported` if they cannot be told."""
        raise NotImplementedError

    def _check_supported(self) -> None:
        raise NotImplementedError

    def _weights_kind(self, backend: str, dtype: torch.dtype) -> Any:
        """A key that is the same where :meth:`_pack` would give the same."""
        return None

    def _pack(self, backend: str, dtype: torch.dtype, device: torch.device) -> Any:
        """Weights for a backend and an input of ``dtype``, on ``device``; may raise
        :class:`Unsupported`."""
        raise NotImplementedError

    def _covers(self, weights: Any, x: Tensor) -> bool:
        """Whether the kernels can run an input of this shape."""
        return True

    def _run(self, weights: Any, x: Tensor, backend: str) -> Any:
        """The result, or a tuple of several."""
        raise NotImplementedError

    def _differs(self, x: Tensor) -> bool:
        """Whether only the plain forward will do for this input, or under what holds now."""
        return False

    def _is_settled(self) -> bool:
        """Whether :meth:`_differs` says the same of all inputs of a shape and dtype."""
        return True

    def _returns_result(self) -> bool:
        """Whether :meth:`_finish` gives a single result as it is."""
        return self._returned == ONE_MAP

    def _outside(self) -> list[Names]:
        """Names outside the module that its packed weights depend on."""
        return []

    def _autocast_dtype(self, x: torch.dtype, autocast: torch.dtype) -> torch.dtype:
        """Dtype that the plain forward's output has under autocast."""
        raise NotImplementedError

    def _in_graph(self, x: Tensor) -> Tensor:
        """The fused forward that Dynamo can trace; may raise :class:`Unsupported`."""
        raise NotImplementedError

    # Forward ----------------------------------------------------------------------------------

    def packed(self) -> Packed:
        """The packed weights of the module as it is now."""
        packed = self._packed_state
        if packed is None or not packed.holds(self):
            packed = Packed(self)
            self._packed_state = packed
        return packed

    def reason(self) -> str | None:
        """Why the fused path does not run, None if it does."""
        packed = self.packed()
        if packed.watch is None or packed.device is None or packed.dtype is None:
            return packed.reason
        try:
            backend = resolve(packed.device, self._backend)
            if packed.reason is None and backend not in self.kernel_backends:
                return f"backend {backend!r} runs it plain"
            packed.weights(self, backend, packed.dtype)
        except Unsupported as error:
            return str(error)
        return why_plain(self) if self.training or packed.watch.runs_plain(self) else None

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return self._plain(x)
        if torch.compiler.is_dynamo_compiling():
            return self._compiled(x)
        packed = self._packed_state
        if packed is not None and packed.ready is not None:
            results = packed.ready(self, x)
            if results is not None:
                return self._finish(results) if packed.finishes else results
        return self._compiled(x) if torch.compiler.is_compiling() else self._eager(x)

    def _eager(self, x: Tensor) -> Any:
        if _outside_kernels(x):
            return self._plain(x)
        backend = resolve(x.device, self._backend)
        if backend not in self.kernel_backends:
            return self._plain(x)
        packed = self.packed()
        if packed.device is not None and x.device != packed.device:
            raise ValueError(
                f"x: expected device {packed.device}, as the parameters, got {x.device}"
            )
        if packed.runs_plain(self) or self._differs(x):
            return self._plain(x)
        dtype = self._check(packed, x)
        try:
            weights = packed.weights(self, backend, dtype)
        except Unsupported:
            weights = None
        if weights is None or not self._covers(weights, x):
            return self._plain(x)
        assert packed.watch is not None
        if torch.is_grad_enabled() and (x.requires_grad or packed.watch.requires_grad()):
            read = self._read_by_run(packed.watch.parameters)
            if x.requires_grad or any(p.requires_grad for p in read):
                run = _Run(self, packed, weights, dtype, backend)
                return self._finish(_Recompute.apply(run, x, *read))
        if x.dtype == dtype == packed.dtype and isinstance(weights, Plan) and self._is_settled():
            packed.prepare(self, weights, x)
        results = self._run(weights, x if x.dtype == dtype else x.to(dtype), backend)
        return self._finish(results)

    def _compiled(self, x: Tensor) -> Any:
        """The forward under Dynamo, which sets guards on all that is looked at here, and under
        torch.export. What does not fit is left to torch to complain of."""
        dynamo = torch.compiler.is_dynamo_compiling()
        if dynamo == _is_exporting() or inside_transform() or why_plain(self):
            return self._plain(x)
        if dynamo and _beside_graph is not None:
            return _beside_graph(self, x)
        if resolve(x.device, self._backend) in self.kernel_backends:
            try:
                return self._in_graph(x) if dynamo else self._exported(x)
            except Unsupported:
                pass
        return self._plain(x)

    def _exported(self, x: Tensor) -> Any:
        from snv2_kernels.graph.export import run_exported

        return run_exported(self, x)

    def __prepare_scriptable__(self) -> nn.Module:
        # A plain module returned here would replace this one in the model that is being scripted.
        raise TypeError(
            f"torch.jit.script: expected plain modules, got a fused {type(self).__name__};"
            " script the model that was fused, or use torch.jit.trace"
        )

    def _check(self, packed: Packed, x: Tensor) -> torch.dtype:
        """Raise unless x fits; the dtype that the kernels are to run in."""
        check_feature_map(x)
        dtype, autocast = self._dtypes(x)
        if x.dtype != packed.dtype and autocast is None:
            raise TypeError(f"x: expected {packed.dtype}, as the parameters, got {x.dtype}")
        if x.shape[1] != packed.in_channels:
            raise ValueError(
                f"x: expected {packed.in_channels} channels, got shape {tuple(x.shape)}"
            )
        return dtype

    def _dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype | None]:
        """Of the result, and of autocast where that is on."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return x.dtype, None
        autocast = torch.get_autocast_dtype(device)
        return self._autocast_dtype(x.dtype, autocast), autocast

    # State ------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> FusedModule:
        self._packed_state = None
        note_mode(self)
        super().train(mode)
        return self

    def __getstate__(self) -> Any:
        state = super().__getstate__()  # a module's class may have one of its own
        if not isinstance(state, dict):
            return state
        return {name: value for name, value in state.items() if name not in CACHES}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedModule:
        convert_own(self, fn)
        super()._apply(fn, recurse)
        return self


@dataclass(frozen=True)
class _Run:
    """One fused forward but for its input."""

    module: FusedModule
    packed: Packed
    weights: Any
    dtype: torch.dtype
    backend: str


class _Recompute(torch.autograd.Function):
    """The fused forward; the backward runs the plain forward again and differentiates that."""

    OTHERS = 1  # arguments before x, without gradients

    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, *parameters: Tensor) -> Any:
        ctx.twin = run.packed.eval_twin(run.module)
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        ctx.save_for_backward(x, *parameters)
        return run.module._run(run.weights, x.to(run.dtype), run.backend)

    @staticmethod
    def backward(ctx: Any, *grads_of_results: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        wanted = [i for i in range(len(inputs)) if ctx.needs_input_grad[_Recompute.OTHERS + i]]
        create_graph = torch.is_grad_enabled()  # the caller wants a second derivative
        x, *parameters = inputs
        if not create_graph:  # else a parameter that x depends on would be reached through x again
            x = x.detach().requires_grad_(x.requires_grad)
        inputs = x, *parameters
        with torch.enable_grad(), use_backend("reference"), torch.autocast(**ctx.autocast):
            results = ctx.twin._plain_results(x)  # the root's hooks have run in the forward
        computed = torch.autograd.grad(
            results, [inputs[i] for i in wanted], grads_of_results, create_graph=create_graph,
            allow_unused=True,
        )  # fmt: skip
        grads: list[Tensor | None] = [None] * (_Recompute.OTHERS + len(inputs))
        for i, g in zip(wanted, computed, strict=True):
            grads[_Recompute.OTHERS + i] = g
        return tuple(grads)
