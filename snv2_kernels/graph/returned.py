"""What a forward makes of the maps that it returns: one of them, a tuple, a list or a dict."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["ONE_MAP", "Returned"]


@dataclass(frozen=True)
class Returned:
    """A container of maps, each one of the results of a plan."""

    container: type | None = None  # tuple, list, dict or OrderedDict; None: the map itself
    keys: tuple[Any, ...] = ()  # of a dict
    places: tuple[int, ...] = (0,)  # among the results, of each map

    @staticmethod
    def of(out: Any) -> tuple[Returned, list[Tensor]] | None:
        """What was returned, and its maps, each once; None for anything else."""
        if isinstance(out, Tensor):
            return ONE_MAP, [out]
        if type(out) not in (tuple, list, dict, OrderedDict):
            return None
        keys = tuple(out) if isinstance(out, dict) else ()
        values = list(out.values()) if isinstance(out, dict) else list(out)
        if not values or not all(isinstance(value, Tensor) for value in values):
            return None
        maps = list({id(value): value for value in values}.values())
        number = {id(value): i for i, value in enumerate(maps)}
        return Returned(type(out), keys, tuple(number[id(value)] for value in values)), maps

    def filled(self, results: Any) -> Any:
        """The same with a plan's results, a tensor or a tuple of several."""
        results = (results,) if isinstance(results, Tensor) else results
        maps = [results[place] for place in self.places]
        if self.container is None:
            return maps[0]
        container: Any = self.container
        return container(zip(self.keys, maps, strict=True) if self.keys else maps)

    def results(self, out: Any) -> Any:
        """The results that are in what a forward returned, as a plan gives them."""
        if self.container is None:
            return out
        maps = list(out.values()) if isinstance(out, dict) else list(out)
        found = dict(zip(self.places, maps, strict=True))
        results = tuple(found[place] for place in range(len(found)))
        return results if len(results) > 1 else results[0]


ONE_MAP = Returned()
