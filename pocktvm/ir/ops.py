"""The vocabulary of `Node.op`: names, attributes, layouts. The contract between the rooms.

Elementwise operators broadcast; `layout` attributes start as torch's and end as ours after
passes/assign_layout.py; `perm`-like attributes are tuples of ints, axes are never negative.

name                 inputs -> outputs                    attributes
matmul               a, b -> c (numpy matmul rules)       transpose_a, transpose_b (last two axes; 2-D or
                                                          equal batch axes, or b 2-D)
                                                          causal: "a" a is zero above its diagonal | "result"
                                                          nobody reads c above its diagonal, it may be anything
conv2d               x, w -> y                            strides(2) padding(t,l,b,r) dilation(2) groups
                                                          layout: "NCHW" with w OIHW | "NHWC" with w HWIO
conv2d_input_grad    dy, w -> dx                          the same; dx's shape from the value.  Also
                                                          a transposed convolution's forward
conv2d_weight_grad   x, dy -> dw                          the same; dw's shape from the value
max_pool2d           x -> y                               pool(2) strides(2) padding(4) dilation(2) layout
max_pool2d_grad      dy, x -> dx                          the same (first maximum takes the gradient)
avg_pool2d           x -> y                               … and count_include_pad (bool)
avg_pool2d_grad      dy -> dx                             the same
resize2d             x -> y                               method nearest|linear, align_corners, layout
resize2d_grad        dy -> dx                             the same
softmax log_softmax  x -> y                               axis (softmax causal: the row up to the diagonal of
                                                          the last two axes, zeros behind it)
softmax_grad         dy, y -> dx                          axis (causal: likewise; dy is not read above it)
log_softmax_grad     dy, y -> dx                          axis
layer_norm           x, g, b -> y, mean, rstd             axes (last ones), eps; mean, rstd: rows
layer_norm_grad      dy, x, g, mean, rstd -> dx           axes (dg, db are sums of elementwise)
rms_norm             x, g -> y, rstd                      axes (last one), eps
rms_norm_grad        dy, x, g, rstd -> dx                 axes
cross_entropy        logits, y -> loss()                  axis(class) label_smoothing ignore_index
                     (+ weight[C] as third input)         mean reduction, torch's semantics; reduction="sum"
                                                          leaves the division out
cross_entropy_grad   logits, y, dloss() -> dlogits        the same (+ weight[C] as fourth input)
                     (, loss())                           the loss too, where it has a second output
take                 table, indices -> y                  axis, mode  (an embedding is axis 0)
put                  table, indices, rows -> y            axis: table with these rows; y is table's new value
take_grad            dy, indices -> dtable                axis, padding_idx (rows that get no gradient; -1)
take_update          table, dy, indices, lr() -> table    take_grad's; table[indices] -= lr * dy, always in place
gather_elements      x, indices -> y                      axis
scatter_add_elements dy, indices -> dx                    axis (the gradient of gather_elements)
sum mean max min prod argmax   x -> y                     axes, keepdims (argmax: axis)
cumsum               x -> y                               axis, exclusive, reverse
reshape              x -> y                               a view: never a kernel
permute_dims         x -> y                               axes
broadcast_to         x -> y                               (shape from the value)
concat               xs… -> y                             axis
strided_slice        x -> y                               begin end strides (one per axis of x)
strided_slice_grad   dy -> dx                             the same: dy placed into zeros
pad                  x -> y                               pad_width (2 per axis), mode constant|reflect|edge, value
                                                          negative widths crop
dropout              x, seed() -> y                       p, key, start: 0 where the mask of (seed, key, start + element) drops,
                                                          else x / (1 - p). Its own gradient; see DROPOUT below
pack_bf16            x -> y                               uint16: the upper half of x's bits, rounded to nearest even
unpack_bf16          x -> y                               float32 from such bits, exactly
pack_u8              x -> y                               uint8: x * 255 / top, x between 0 and top
unpack_u8            y -> x                               float32 from such a byte
pack_i8              x -> y, s                            int8 with an exponent, s (uint8), for each `group` elements of a
                                                          row; the rest of a row in pieces of 8, 4, 2, 1, each with its own
unpack_i8            y, s -> x                            group: float32 from both
pack_mask            y -> m                               uint8: bit i of byte k of a row is 1 where the gradient named
                                                          by test (relu, relu6, clip: min, max) passes at channel
                                                          k * group + i; the last axis is that divided by group, up
apply_mask           dout, m -> dx                        the same: dout where the bit is 1, else 0
max_pool2d_indexed   x -> y, i                            max_pool2d's; i is uint8: the first maximum's place in its
                                                          window, row by row
max_pool2d_scatter   dy, i -> dx                          max_pool2d's: dy to those places
relax                anything TVM can legalize            op: Relax's name, relax_attrs: TVM's JSON of its attributes
"""  # noqa: E501

from __future__ import annotations

UNARY = frozenset(
    "negative exp log sqrt rsqrt abs sign tanh sigmoid erf sin cos floor ceil round square relu "
    "relu6 gelu gelu_tanh silu softplus hardswish hardsigmoid logical_not clip leakyrelu elu "
    "astype copy reciprocal".split()
)  # clip: min, max; leakyrelu, elu: alpha; astype: dtype; softplus: beta, threshold

BINARY = frozenset(
    "add subtract multiply divide power maximum minimum equal not_equal less less_equal greater "
    "greater_equal logical_and logical_or floor_divide mod".split()
)

TERNARY = frozenset({"where"})

# Gradients that read one element each of their operands; each is one emitted expression.
# relu_grad, relu6_grad, sigmoid_grad, tanh_grad read the *output* y; the others the input x.
GRADIENTS = frozenset(
    "relu_grad relu6_grad sigmoid_grad tanh_grad clip_grad gelu_grad gelu_tanh_grad silu_grad "
    "softplus_grad hardswish_grad hardsigmoid_grad leakyrelu_grad elu_grad".split()
)  # (dout, y or x) -> dx, with the forward's attributes

ELEMENTWISE = UNARY | BINARY | TERNARY | GRADIENTS
# elementwise; only passes/narrow_saved.py
NARROWING = frozenset({"pack_bf16", "unpack_bf16", "pack_u8", "unpack_u8"})
REDUCTIONS = frozenset("sum mean max min prod".split())
SPATIAL = frozenset(
    "conv2d conv2d_input_grad conv2d_weight_grad max_pool2d max_pool2d_grad max_pool2d_indexed "
    "max_pool2d_scatter avg_pool2d avg_pool2d_grad resize2d resize2d_grad".split()
)
VIEWS = frozenset({"reshape"})

# Elementwise but for this: the result depends on *where* an element lies, counted row-major over
# the node's own shape. It fuses like an elementwise operator; no pass may permute or cut it.
POSITIONAL = frozenset({"dropout"})

# Elementwise over the shape of their first operand, but for masks and exponents, whose last axis is
# shorter (passes/save_masks.py, narrow_saved.py). They join loops whose vectors begin at multiples
# of `group`.
GROUPED = frozenset({"pack_mask", "apply_mask", "pack_i8", "unpack_i8"})


def is_elementwise(op: str) -> bool:
    """One output element depends on one (broadcast) element of each operand."""
    return op in ELEMENTWISE or op in NARROWING


def joins_loops(op: str) -> bool:
    """What a kernel can compute element by element as part of another's loops."""
    return is_elementwise(op) or op in POSITIONAL or op in GROUPED
