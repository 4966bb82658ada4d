"""``torch.compile(model, backend="snv2")``: fuses the units of a model as it is.

Found by its name where this package is installed, without importing it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.backends.registry import lookup_backend

import snv2_kernels  # noqa: F401  # defines operators
from snv2_kernels.backends import check_backend
from snv2_kernels.graph.nodes import example, writes
from snv2_kernels.graph.recipe import RecipeBuilder
from snv2_kernels.graph.recognize import Run, recognize

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.fx import GraphModule, Node

__all__ = ["replace_units", "snv2"]


def snv2(
    graph_module: GraphModule,
    example_inputs: list[Tensor],
    *,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """A backend of torch.compile: units, stages and networks become one operator each, which packs
    their weights again when they change, and the rest goes to another backend.

    Args:
        graph_module: what Dynamo captured.
        example_inputs: its inputs.
        options: ``"inner"``, the backend of the rest, by name or as a function, ``"inductor"`` by
            default; ``"backend"``, as in :func:`snv2_kernels.fuse`, ``"auto"`` by default.

    Raises:
        ValueError: if there is no such option or backend.
        RuntimeError: if this installation lacks the backend.
    """
    given = {"inner": "inductor", "backend": "auto", **(options or {})}
    unknown = set(given) - {"inner", "backend"}
    if unknown:
        raise ValueError(f"options: expected 'inner' or 'backend', got {sorted(unknown)[0]!r}")
    replace_units(graph_module, check_backend(given["backend"]))
    compiled: Callable[..., Any] = lookup_backend(given["inner"])(graph_module, example_inputs)
    return compiled


def replace_units(graph_module: GraphModule, backend: str) -> int:
    """Replace runs of units in a graph by operators, in place.

    Returns:
        The number of operators.
    """
    runs = recognize(graph_module.graph)
    for run in reversed(runs):  # one's source may be another's result
        _replace(run, backend)
    if runs:
        graph_module.graph.lint()
        graph_module.recompile()
    return len(runs)


def _replace(run: Run, backend: str) -> None:
    recipe: Any = RecipeBuilder()  # of nodes in the place of tensors
    run.tell(recipe)
    out = run.out
    product = example(next(run.layers).nodes[0]).dtype
    autocast = None if product == example(recipe.weights[0]).dtype else product
    arguments = (run.source, recipe.state, recipe.text, backend, example(out).dtype, autocast)
    with out.graph.inserting_after(out):
        fused = out.graph.call_function(torch.ops.snv2.fused, arguments)
    fused.meta = out.meta.copy()
    out.replace_all_uses_with(fused)
    _erase(run.nodes)


def _erase(nodes: set[Node]) -> None:
    """Those that nothing reads any more, and what was there for them alone, such as shapes."""
    waiting = sorted(nodes)
    while waiting:
        node = waiting.pop()
        if node.users or node.op == "placeholder" or (node not in nodes and not _is_pure(node)):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        waiting = sorted({*waiting, *inputs} - {node})


def _is_pure(node: Node) -> bool:
    return not node.is_impure() and not writes(node)
