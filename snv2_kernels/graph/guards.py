"""Dynamo's guards on a forward without the operations of it.

While Dynamo traces a forward it sets a guard on all that the forward depends on. If another
operator stands in the place of all that was traced, the guards are still right, and the operations
are dead: a backend may drop them, and here they are taken out at once.
"""

from __future__ import annotations

from typing import Any

from snv2_kernels.graph.constant import constant_to_dynamo

__all__ = ["erase_unread_after", "last_node"]


def _graph() -> Any:
    """That Dynamo is making."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output.graph


@constant_to_dynamo
def last_node() -> str:
    """The name of the graph's last node; empty if there is none."""
    return next((str(node.name) for node in reversed(_graph().nodes)), "")


@constant_to_dynamo
def erase_unread_after(name: str) -> bool:
    """Take out what was traced after a node and nothing reads."""
    graph = _graph()
    for node in reversed(graph.nodes):
        if node.name == name:
            break
        if node.op in ("call_function", "call_method") and not node.users:
            graph.erase_node(node)
    return True
