"""Dynamo's guards on a forward without the operations of it.

While Dynamo traces a forward it sets a guard on all that the forward depends on. If another
operator stands in the place of all that was traced, the guards are still right, and the operations
are dead: a backend may drop them, and here they are taken out at once.
"""

from __future__ import annotations

from typing import Any

from snv2_kernels.graph.constant import constant_to_dynamo

__all__ = ["erase_unread_after", "last_node"]


def _nodes() -> Any:
    """Of the graph that Dynamo is making, the last first; none where this version of PyTorch
    does not tell: what is dead is then left to the backend."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return reversed(InstructionTranslator.current_tx().output.graph.nodes)
    except (ImportError, AttributeError):
        return ()


@constant_to_dynamo
def last_node() -> str:
    """The name of the graph's last node; empty if there is none."""
    return next((str(node.name) for node in _nodes()), "")


@constant_to_dynamo
def erase_unread_after(name: str) -> bool:
    """Take out what was traced after a node and nothing reads."""
    for node in _nodes():
        if node.name == name:
            break
        if node.op in ("call_function", "call_method") and not node.users:
            node.graph.erase_node(node)
    return True
