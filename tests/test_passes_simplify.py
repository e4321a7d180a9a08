"""simplify and fold_constants: before, after, one case each where they decline."""

import numpy as np
from graphs import Build, ops, same_numbers

from pocktvm.passes.fold_constants import fold_constants
from pocktvm.passes.simplify import simplify
from pocktvm.passes.simplify_views import refinement


def check(b, expected, **outputs):
    """Simplify; compare the operators left and the numbers."""
    graph = b.graph(**outputs)
    after = simplify(graph)
    assert ops(after) == expected
    same_numbers(graph, after, 1e-5)
    return after


def test_chains_of_views_become_one():
    b = Build()
    x = b.input(2, 3, 4)
    v = b.op("reshape", b.op("reshape", x, shape=(6, 4)), shape=(24,))
    p = b.op("permute_dims", x, shape=(4, 2, 3), axes=(2, 0, 1))
    p = b.op("permute_dims", p, shape=(3, 4, 2), axes=(2, 0, 1))
    check(b, ["reshape", "permute_dims"], v=v, p=p)


def test_inverse_permutes_cancel():
    b = Build()
    x = b.input(2, 3, 4)
    p = b.op("permute_dims", x, shape=(2, 4, 3), axes=(0, 2, 1))
    y = b.op("relu", b.op("permute_dims", p, shape=(2, 3, 4), axes=(0, 2, 1)))
    check(b, ["relu"], y=y)


def test_permute_of_ones_is_a_view():
    b = Build()
    x = b.input(2, 3, 1, 1)
    check(b, ["reshape"], y=b.op("permute_dims", x, shape=(2, 1, 1, 3), axes=(0, 2, 3, 1)))


def test_tokens_of_a_patch_embedding_are_a_view():
    """NHWC -> NCHW -> [N, C, H*W] -> [N, H*W, C] moves nothing."""
    b = Build()
    x = b.input(2, 3, 5, 4)
    p = b.op("permute_dims", x, shape=(2, 4, 3, 5), axes=(0, 3, 1, 2))
    t = b.op("reshape", p, shape=(2, 4, 15))
    check(b, ["reshape"], y=b.op("permute_dims", t, shape=(2, 15, 4), axes=(0, 2, 1)))


def test_permute_through_a_view_that_mixes_axes_stays():
    b = Build()
    x = b.input(2, 6)
    p = b.op("permute_dims", x, shape=(6, 2), axes=(1, 0))
    t = b.op("reshape", p, shape=(4, 3))
    y = b.op("permute_dims", t, shape=(3, 4), axes=(1, 0))
    check(b, ["permute_dims", "reshape", "permute_dims"], y=y)
    assert refinement((6, 2), (4, 3)) is None


def test_transposes_become_flags_of_matmul():
    b = Build()
    x, w = b.input(5, 3), b.param(4, 3)
    wt = b.op("permute_dims", w, shape=(3, 4), axes=(1, 0))
    y = b.op("matmul", x, wt, shape=(5, 4))
    xt = b.op("permute_dims", x, shape=(3, 5), axes=(1, 0))
    dwt = b.op("matmul", xt, y, shape=(3, 4))
    dw = b.op("permute_dims", dwt, shape=(4, 3), axes=(1, 0))
    after = check(b, ["matmul", "matmul"], y=y, dw=dw)
    assert [dict(n.attrs) for n in after.nodes] == [
        {"transpose_b": True},
        {"transpose_a": True, "transpose_b": False},
    ]


def test_head_split_is_not_a_flag():
    b = Build()
    x, y = b.input(2, 5, 3, 4), b.input(2, 3, 4, 5)
    p = b.op("permute_dims", x, shape=(2, 3, 5, 4), axes=(0, 2, 1, 3))
    check(b, ["permute_dims", "matmul"], y=b.op("matmul", p, y, shape=(2, 3, 5, 5)))


def test_broadcasts_move_behind_arithmetic():
    b = Build()
    x, s = b.input(4, 3), b.input(3)
    wide = b.op("broadcast_to", s, shape=(4, 3))
    y = b.op("add", x, wide)
    check(b, ["add"], y=y)
    z = b.op("negative", wide)
    check(b, ["add", "negative", "broadcast_to"], y=y, z=z)


def test_neutral_elements_and_signs():
    b = Build()
    x = b.input(4)
    y = b.op("multiply", b.op("add", b.const(np.float32(0)), x), b.const(np.ones(4)))
    y = b.op("negative", b.op("negative", b.op("copy", b.op("astype", y, dtype="float32"))))
    y = b.op("subtract", y, b.op("negative", x))
    check(b, ["add"], y=y)


def test_zero_that_broadcasts_is_not_neutral():
    b = Build()
    x = b.input(4)
    check(b, ["add"], y=b.op("add", x, b.const(np.zeros((2, 1)))))


def test_shifts_and_scales_combine():
    b = Build()
    x = b.input(2, 3, 4, 4)
    y = b.op("add", b.op("add", x, b.const(b.randn(1, 3, 1, 1))), b.const(b.randn(3, 1, 1)))
    y = b.op("divide", b.op("multiply", y, b.const(b.randn(1, 3, 1, 1))), b.const(np.float32(2)))
    check(b, ["add", "multiply"], y=y)


def test_equal_expressions_are_computed_once():
    b = Build()
    x = b.input(4)
    one, other = b.const(np.float32(2)), b.const(np.float32(2))
    y = b.op("add", b.op("multiply", x, one), b.op("multiply", x, other))
    check(b, ["multiply", "add"], y=y)


def test_dead_code_goes():
    b = Build()
    x = b.input(4)
    b.op("exp", x)
    check(b, ["relu"], y=b.op("relu", x))


def test_whole_image_pool_is_a_mean():
    b = Build()
    x = b.input(2, 3, 4, 5)
    window = dict(pool=(4, 5), strides=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1))
    y = b.op("avg_pool2d", x, shape=(2, 3, 1, 1), **window)
    d = b.op("avg_pool2d_grad", y, shape=(2, 3, 4, 5), **window)
    check(b, ["mean", "multiply", "multiply"], y=y, z=b.op("multiply", d, x))


def test_reduction_drops_its_ones():
    b = Build()
    x = b.input(2, 3, 4, 5)
    s = b.op("sum", x, shape=(1, 3, 1, 1), axes=(0, 2, 3), keepdims=True)
    after = check(b, ["sum"], y=b.op("reshape", s, shape=(3,)))
    assert after.nodes[0].attrs["keepdims"] is False


def test_a_result_stays_computed():
    """An output that equals an input still needs a node of its own."""
    b = Build()
    x = b.input(4)
    check(b, ["copy"], y=b.op("copy", x))


def test_constants_fold():
    b = Build()
    x = b.input(2, 4)
    row = b.const(np.arange(4, dtype=np.int32))
    mask = b.op("less", row, b.const(np.int32(2)), dtype="bool")
    bias = b.op("where", mask, b.const(np.float32(0)), b.const(np.float32(-9)))
    graph = b.graph(y=b.op("add", x, bias))
    after = fold_constants(graph)
    assert ops(after) == ["add"] and len(after.consts) == 1
    same_numbers(graph, after)


def test_growing_constants_stay_small():
    b = Build()
    wide = b.op("broadcast_to", b.const(np.float32(1)), shape=(64, 64))
    huge = b.op("add", b.const(b.randn(1024, 1)), b.const(b.randn(1024)))
    graph = b.graph(y=b.op("sum", wide, shape=(), axes=(0, 1)), z=huge)
    assert ops(fold_constants(graph)) == ["broadcast_to", "add", "sum"]


def test_equal_constants_of_two_programs_share_a_name():
    def program():
        b = Build()
        return b.graph(y=b.op("add", b.input(3), b.op("exp", b.const(np.ones(3)))))

    one, other = fold_constants(program()), fold_constants(program())
    assert list(one.consts) == list(other.consts)
