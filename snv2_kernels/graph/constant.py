"""Functions that Dynamo calls while it traces, and whose result it takes for a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["constant_to_dynamo"]

F = TypeVar("F", bound=Callable[..., Any])


def constant_to_dynamo(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which would import the whole compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
