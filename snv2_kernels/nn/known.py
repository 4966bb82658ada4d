"""Drop-ins for classes whose forward is known, which their submodules therefore tell."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor

from snv2_kernels.graph.recipe import RecipeBuilder
from snv2_kernels.nn.methods import why_class_replaced, why_replaced
from snv2_kernels.nn.recognized import Recognized
from snv2_kernels.packing import Builder
from snv2_kernels.packing.units import Unsupported

__all__ = ["KnownModule"]


class KnownModule(Recognized):
    """Drop-in whose class gives a short cut: :meth:`_tell_class` reads its submodules as those of
    that class. Where they are others, it is recognised by what it computes."""

    class_kind: ClassVar[str]

    def _tell_class(self, builder: Builder, taps: Collection[str] = ()) -> None:
        """Tell a module as its class made it; raises :class:`Unsupported` for any other."""
        assert not taps
        self._check_class(calls_base=True)
        builder.add_import(self._class_channels())
        self._add_class(builder)

    def _check_class(self, calls_base: bool = False) -> None:
        """Raise unless its code is that of its class; see :func:`why_class_replaced`."""
        if reason := why_class_replaced(type(self), calls_base):
            raise Unsupported(reason)

    def _class_channels(self) -> int:
        """Channels of the input of such a module."""
        raise NotImplementedError

    def _add_class(self, builder: Builder) -> None:
        """Tell its units to a builder that units were told before."""
        raise NotImplementedError

    def _class_splits(self) -> bool:
        """See :meth:`_splits_input`."""
        return False

    def fits_class(self) -> bool:
        """Whether it consists of what its class is made of."""
        return self._as_class() is not None

    def _as_class(self) -> Builder | None:
        """A builder that was told the module by its class, None if that does not fit."""
        builder = Builder()
        try:
            self._tell_class(builder)
        except Unsupported:
            return None
        return builder if why_replaced(self) is None else None

    # As a module that was recognised ---------------------------------------------------------

    def kind(self) -> str:
        return super().kind() if self._known() is not None else self.class_kind

    def _in_channels(self) -> int:
        builder = self._as_class()
        if builder is None:
            return super()._in_channels()
        self._remember(None)
        return builder.in_channels

    def _why_not_at(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> str | None:
        return None if self.fits_class() else super()._why_not_at(shape, dtype, device)

    def _splits_input(self) -> bool:
        # While a graph is traced, by what Dynamo can follow.
        known = self._recognition if torch.compiler.is_compiling() else self._known()
        return self._class_splits() if known is None else super()._splits_input()

    def _is_run(self) -> bool:
        if self._known() is not None:
            return super()._is_run()
        return self.class_kind != "network" and not why_class_replaced(type(self))

    def _takes_images(self) -> bool:
        return self.class_kind == "network" if self._known() is None else super()._takes_images()

    def _add_to(self, builder: Builder) -> None:
        if self.fits_class():
            self._check_class()
            self._add_class(builder)
        else:
            super()._add_to(builder)

    def _tell(self, builder: Builder, taps: Collection[str] = ()) -> None:
        if self.fits_class():
            self._tell_class(builder, taps)
        else:
            super()._tell(builder, taps)

    def _in_graph(self, x: Tensor) -> Any:
        if self._recognition is None:
            recipe = RecipeBuilder()
            try:
                self._tell_class(recipe)
            except Unsupported:
                pass
            else:
                return self._told_in_graph(recipe, x)
        return super()._in_graph(x)
