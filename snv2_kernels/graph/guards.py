"""Dynamo's guards on a forward without the operations of it.

While Dynamo traces a forward it sets a guard on all that the forward depends on. If another
operator stands in the place of all that was traced, the guards are still right, and the operations
are dead: a backend may drop them, and here they are taken out at once.
"""

from __future__ import annotations

from typing import Any

from snv2_kernels.graph.constant import constant_to_dynamo

__all__ = ["calls_so_far", "erase_unread_after"]


def _calls() -> list[Any]:
    """The calls in the graph that Dynamo is making, in order; none where this version of PyTorch
    does not tell: what is dead is then left to the backend."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        nodes = InstructionTranslator.current_tx().output.graph.nodes
    except (ImportError, AttributeError):
        return []
    return [node for node in nodes if node.op in ("call_function", "call_method")]


@constant_to_dynamo
def calls_so_far() -> str:
    """Returns how many calls were traced. (A node's name may change when its value gets one.)"""
    return str(len(_calls()))


@constant_to_dynamo
def erase_unread_after(count: str) -> bool:
    """Take out what was traced after so many calls and nothing reads."""
    for node in reversed(_calls()[int(count) :]):
        if not node.users:
            node.graph.erase_node(node)
    return True
