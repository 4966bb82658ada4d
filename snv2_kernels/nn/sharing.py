"""Parameters that fused modules share with the model they were made from, and with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

__all__ = ["convert_own", "note_sharing"]

_Conversion = Callable[[Tensor], Tensor]

# For each module that has parameters of its own, the modules that have the same ones, itself too.
_sharers: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
# Names of parameters that plain modules of the same tree have too: a conversion of those converts
# them in place, so whoever ties to them must keep them.
_tied: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
# What took the place of parameters in a conversion, which reaches the parts of a tree one by one.
_replaced: WeakKeyDictionary[_Conversion, dict[nn.Parameter, nn.Parameter]] = WeakKeyDictionary()


def note_sharing(pairs: Iterable[tuple[nn.Module, nn.Module]], plain: Iterable[nn.Module]) -> None:
    """Remembers that modules and their copies have the same parameters.

    Args:
        pairs: each module of a tree and its copy.
        plain: copies outside of all fused modules.
    """
    alone = set(plain)
    outside = {p for module in alone for p in module._parameters.values()}
    for module, copy in pairs:
        if module._parameters:
            sharers = _sharers.setdefault(module, WeakSet((module,)))
            sharers.add(copy)
            _sharers[copy] = sharers
            tied = [name for name, p in copy._parameters.items() if p in outside]
            if tied and copy not in alone:  # which may be put inside a fused module later
                _tied[copy] = frozenset(tied)


def convert_own(root: nn.Module, fn: _Conversion) -> None:
    """Gives a tree parameters of its own if ``fn`` is to change shared ones.

    A conversion swaps the memory inside each Parameter, and would convert the other sharers as
    well. Where none is alive any more nothing needs to be done, and optimizers keep what they had.
    """
    modules = list(root.modules())
    shared = [m for m in modules if any(other is not m for other in _sharers.get(m, ()))]
    if not shared:
        return
    with torch.no_grad():
        if all(fn(p) is p for p in root.parameters()):
            return
    own = _replaced.setdefault(fn, {})
    for module in modules:
        tied = _tied.get(module, ())
        for name, p in module._parameters.items():
            if p is not None and name not in tied:
                if p not in own:
                    own[p] = _copy_of(p)
                module._parameters[name] = own[p]
        if sharers := _sharers.pop(module, None):
            sharers.discard(module)


def _copy_of(p: nn.Parameter) -> nn.Parameter:
    copy = nn.Parameter(p.detach(), p.requires_grad)
    copy.grad = None if p.grad is None else p.grad.detach()
    return copy
