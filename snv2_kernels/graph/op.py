"""``torch.ops.snv2.fused``: a recipe, run on packed weights; ``fused_results`` where it has several
results.

It is a function of its tensors and nothing else, so a compiler may move and copy it as it likes.
The packed weights are remembered beside the first tensor of the state, and made again when any of
them has changed, as :class:`snv2_kernels.nn.watch.Watch` would notice. Where a tensor is a new one
each time (a parameter that the graph itself computes), they are made in each call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snv2_kernels.backends import resolve
from snv2_kernels.graph.recipe import Recipe
from snv2_kernels.nn.fused import Weights
from snv2_kernels.nn.planned import RecipeModule
from snv2_kernels.nn.watch import beside, stamps
from snv2_kernels.ops import _results_fake
from snv2_kernels.packing.units import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__: list[str] = []  # it defines operators


class _Entry:
    """Packed weights of one recipe and one state of its tensors."""

    def __init__(self, text: str, state: Sequence[Tensor]) -> None:
        if any(t.is_inference() for t in state):
            raise Unsupported("inference tensors, whose changes are unseen")
        weights = {t.dtype for t in state if t.dim() > 1}
        if len(weights) != 1 or not {t.dtype for t in state} <= weights | {torch.float32}:
            raise Unsupported("dtypes that PyTorch refuses together")
        # The statistics of norms are among the vectors, told apart from their weights by nothing.
        self._stamps = stamps(state, [t for t in state if t.dim() == 1])
        self._devices = {t.device for t in state}
        # Aliases keep the memory from being handed out again, but not the parameters, beside one of
        # which this is remembered.
        self.module = RecipeModule(Recipe.read(text), [t.detach() for t in state])
        self._weights = Weights()

    def reads(self, addresses: set[int]) -> bool:
        """Whether any of the state lies at one of these addresses."""
        return not addresses.isdisjoint(t.data_ptr() for t in self.module.state)

    def holds(self, state: Sequence[Tensor]) -> bool:
        return self._stamps.hold(state)

    def weights(self, backend: str, x: Tensor) -> Any:
        if self._devices != {x.device}:
            raise Unsupported("tensors on several devices")
        return self._weights.get(self.module, backend, x.dtype, x.device)


def _entry(text: str, state: Sequence[Tensor]) -> _Entry:
    entries: dict[str, _Entry] = beside.setdefault(state[0], {})
    entry = entries.get(text)
    if entry is None or not entry.holds(state):
        entry = entries[text] = _Entry(text, state)
    return entry


def _run_packed(x: Tensor, state: Sequence[Tensor], text: str, backend: str) -> list[Tensor] | None:
    """The results of the kernels, None where they do not cover the input."""
    name = resolve(x.device, backend)
    if name not in RecipeModule.kernel_backends:
        return None
    try:
        entry = _entry(text, state)
        weights = entry.weights(name, x)
    except Unsupported:
        return None
    if not entry.module._covers(weights, x):
        return None
    return _listed(entry.module._run(weights, x, name))


def _listed(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


# The operators --------------------------------------------------------------------------------


def _fused_results(
    x: Tensor,
    state: list[Tensor],
    recipe: str,
    backend: str,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    results = _run_packed(x.to(dtype), state, recipe, backend)
    if results is not None:
        return results
    promised = _fused_results_fake(x, state, recipe, backend, dtype, autocast)
    with _autocast(x, autocast):
        results = _listed(Recipe.read(recipe).plain(x, state))
    return [out.copy_(result) for out, result in zip(promised, results, strict=True)]


def _fused(x: Tensor, *arguments: Any) -> Tensor:
    return _fused_results(x, *arguments)[0]


def _autocast(x: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    """The autocast that held where the graph was made; where it runs another one may hold."""
    return torch.autocast(x.device.type, dtype, enabled=dtype is not None)


def _fused_results_fake(
    x: Tensor,
    state: list[Tensor],
    recipe: str,
    backend: str,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    told = Recipe.read(recipe)
    channels, halvings = map(list, zip(*told.results, strict=True))
    return _results_fake(x.to(dtype), channels, halvings, told.classify)


def _fused_fake(x: Tensor, *arguments: Any) -> Tensor:
    return _fused_results_fake(x, *arguments)[0]


def _fused_backward(
    grads: list[Tensor],
    x: Tensor,
    state: list[Tensor],
    recipe: str,
    autocast: torch.dtype | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of the wanted ones among x and the state: those of the formula, run again."""
    leaves = [t.detach().requires_grad_(want) for t, want in zip((x, *state), wanted, strict=True)]
    # A dispatch mode calls an operator with autograd left out.
    keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
    guards = [torch._C._SetExcludeDispatchKeyGuard(key, False) for key in keys]
    with guards[0], guards[1], torch.enable_grad(), _autocast(x, autocast):
        out = Recipe.read(recipe).plain(leaves[0], leaves[1:])
    inputs = [t for t in leaves if t.requires_grad]
    return [g.clone() for g in torch.autograd.grad(_listed(out), inputs, grads)]


def _fused_backward_fake(
    grads: list[Tensor],
    x: Tensor,
    state: list[Tensor],
    recipe: str,
    autocast: torch.dtype | None,
    wanted: list[bool],
) -> list[Tensor]:
    return [torch.empty_like(t) for t, want in zip((x, *state), wanted, strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, state, ctx.recipe, _, _, ctx.autocast = inputs
    ctx.save_for_backward(x, *state)


def _gradient(ctx: Any, grads: Any) -> tuple[Any, ...]:
    x, *state = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    backward = torch.ops.snv2.fused_backward
    computed = iter(backward(_listed(grads), x, state, ctx.recipe, ctx.autocast, wanted))
    by_x, *by_state = (next(computed) if want else None for want in wanted)
    return by_x, by_state, None, None, None, None


_library = torch.library.Library("snv2", "FRAGMENT")


def _define(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any], **options: Any
) -> None:
    """An operator whose kernel is a Python function on every device."""
    name = schema.partition("(")[0]
    _library.define(schema, **options)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"snv2::{name}", fake, lib=_library)


# A CUDA graph would go on reading weights that were packed when it was captured.
_define(
    "fused(Tensor x, Tensor[] state, str recipe, str backend, ScalarType dtype,"
    " ScalarType? autocast) -> Tensor",
    _fused,
    _fused_fake,
    tags=(torch.Tag.cudagraph_unsafe,),
)
_define(
    "fused_results(Tensor x, Tensor[] state, str recipe, str backend, ScalarType dtype,"
    " ScalarType? autocast) -> Tensor[]",
    _fused_results,
    _fused_results_fake,
    tags=(torch.Tag.cudagraph_unsafe,),
)
_define(
    "fused_backward(Tensor[] grads, Tensor x, Tensor[] state, str recipe, ScalarType? autocast,"
    " bool[] wanted) -> Tensor[]",
    _fused_backward,
    _fused_backward_fake,
)
for _name in ("fused", "fused_results"):
    torch.library.register_autograd(
        f"snv2::{_name}", _gradient, setup_context=_setup_context, lib=_library
    )
