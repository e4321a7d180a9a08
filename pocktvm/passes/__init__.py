"""Graph to graph: what is decided between differentiation and scheduling.

A pass is a function `Graph -> Graph` in the file of its name; its docstring opens with its picture.
PIPELINE is the order, and the only place that knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pocktvm.ir.graph import Graph
from pocktvm.ir.target import Target
from pocktvm.passes.assign_layout import assign_layout
from pocktvm.passes.compare import checking, compare
from pocktvm.passes.flatten_rows import flatten_rows
from pocktvm.passes.fold_constants import fold_constants
from pocktvm.passes.fold_scales import fold_scales
from pocktvm.passes.fuse import fuse
from pocktvm.passes.fuse_blocks import fuse_blocks
from pocktvm.passes.index_pools import index_pools
from pocktvm.passes.join_gradients import join_gradients
from pocktvm.passes.join_loss import join_loss
from pocktvm.passes.join_products import join_products
from pocktvm.passes.narrow_saved import narrow_saved
from pocktvm.passes.order import order
from pocktvm.passes.save_masks import save_masks
from pocktvm.passes.scale_grads import scale_grads
from pocktvm.passes.scatter_updates import scatter_updates
from pocktvm.passes.simplify import simplify
from pocktvm.passes.sink_slices import sink_slices
from pocktvm.passes.skip_masked import skip_masked

Pass = Callable[[Graph], Graph]

PIPELINE: tuple[Pass, ...] = (
    simplify,
    fold_constants,
    sink_slices,
    fold_scales,
    simplify,
    scale_grads,
    assign_layout,
    fold_constants,
    simplify,
    flatten_rows,
    simplify,
    skip_masked,
    join_loss,
    scatter_updates,
    index_pools,
    save_masks,
    fuse,
    fuse_blocks,
    join_gradients,
    order,
    join_products,
)


def pipeline(saved: str = "float32") -> tuple[Pass, ...]:
    """The passes in order; saved activations that are not float32 are narrowed before anything is
    fused."""
    at = PIPELINE.index(fuse)
    return PIPELINE if saved == "float32" else (*PIPELINE[:at], narrow_saved, *PIPELINE[at:])


def run_passes(
    graph: Graph,
    target: Target | None = None,
    observe: Callable[[int, str, Graph], None] | None = None,
    saved: str = "float32",
) -> Graph:
    """`graph` through the pipeline, its saved activations as `saved` says.

    `observe(index, pass name, graph)` is called after every pass, for dumps. With POCKTVM_CHECK=1
    in the environment every pass must keep the reference's numbers on random inputs (slow).
    `target` is what saving depends on: how many channels a kernel writes at a time.
    """
    bound = {
        save_masks: partial(save_masks, target=target, beside=saved == "int8"),
        narrow_saved: partial(narrow_saved, saved=saved, target=target),
    }
    for index, function in enumerate(pipeline(saved)):
        before, graph = graph, bound.get(function, function)(graph).check()
        if checking():
            rounds = saved if function is narrow_saved else ""
            compare(before, graph, function.__name__, rounds)
        if observe is not None:
            observe(index, function.__name__, graph)
    return graph

