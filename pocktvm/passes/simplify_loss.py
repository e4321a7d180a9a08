"""Rules of simplify for losses: the class axis is wherever the classes lie.

    cross_entropy(permute_dims(z, (0, 2, 1)), y, axis=1)   →   cross_entropy(z, y, axis=2)

torch wants the classes on axis 1, a decoder's head leaves them last. Reading them where they are
saves two copies of the largest tensor of a language model (32 MB each at 256 tokens and 32000
words), and lets the gradient be written over the logits.
"""

from __future__ import annotations

from pocktvm.ir.graph import Node
from pocktvm.passes.simplify import Simplifier, rule
from pocktvm.passes.simplify_views import permutation


@rule("cross_entropy")
def loss_of_permuted(ed: Simplifier, node: Node) -> str | None:
    """The loss of permuted logits is the loss along another axis."""
    if (found := _unpermuted(ed, node)) is None:
        return None
    logits, _, axis = found
    attrs = {**node.attrs, "axis": axis}
    out = ed.values[node.outputs[0]]
    return ed.make(node.op, (logits, *node.inputs[1:]), out, node.layer, **attrs)


@rule("cross_entropy_grad")
def loss_grad_of_permuted(ed: Simplifier, node: Node) -> str | None:
    """The gradient is made where the logits are, then permuted (which its reader undoes)."""
    if (found := _unpermuted(ed, node)) is None:
        return None
    logits, axes, axis = found
    out = ed.values[node.outputs[0]]
    plain = ed.values[ed.declare(out.name, ed.shape(logits), out)]
    attrs = {**node.attrs, "axis": axis}
    made = ed.make(node.op, (logits, *node.inputs[1:]), plain, node.layer, **attrs)
    return ed.make("permute_dims", (made,), out, node.layer, axes=axes)


def _unpermuted(ed: Simplifier, node: Node) -> tuple[str, tuple[int, ...], int] | None:
    """Logits before their permutation, its axes, and where the classes were; None where the
    permutation also reorders what the labels are laid out by."""
    permute = ed.made_by(node.inputs[0], "permute_dims")
    if permute is None:
        return None
    axes = permutation(ed, permute)
    class_axis = node.attrs.get("axis", 1) % len(axes)
    others = [a for i, a in enumerate(axes) if i != class_axis]
    if others != sorted(others):
        return None
    return permute.inputs[0], axes, axes[class_axis]
