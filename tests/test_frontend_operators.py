"""Every operator torch has that the importer claims: Relax computes what torch computes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from frontend_tools import Lambda, run_models
from torch import nn

from pocktvm.errors import PockError
from pocktvm.frontend.torch import import_torch

torch.manual_seed(0)
IMAGE = torch.randn(2, 4, 8, 8)
ROWS = torch.randn(3, 6) * 4
WORDS = torch.randn(2, 5, 6)
IDS = torch.randint(0, 7, (2, 5))
MASK = torch.randn(5, 5)


def heads(x):
    return x.view(2, 4, 8, 8)


OPERATORS = {
    # activations
    "relu6": (F.relu6, ROWS),
    "hardtanh": (F.hardtanh, ROWS),
    "hardswish": (F.hardswish, ROWS),
    "hardsigmoid": (F.hardsigmoid, ROWS),
    "sigmoid": (torch.sigmoid, ROWS),
    "silu": (F.silu, ROWS),
    "gelu": (F.gelu, ROWS),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), ROWS),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), ROWS),
    "elu": (lambda x: F.elu(x * 30, 0.5), ROWS),
    "selu": (F.selu, ROWS),
    "celu": (F.celu, ROWS),
    "softplus": (lambda x: F.softplus(x, 2.0), ROWS),
    "mish": (F.mish, ROWS),
    "glu": (F.glu, ROWS),
    "prelu": (lambda x, m: m(x), ROWS, nn.PReLU()),
    # norms
    "batch_norm": (lambda x, m: m(x), IMAGE, nn.BatchNorm2d(4)),
    "batch_norm_plain": (lambda x, m: m(x), IMAGE, nn.BatchNorm2d(4, affine=False)),
    "layer_norm": (lambda x, m: m(x), WORDS, nn.LayerNorm((5, 6))),
    "layer_norm_plain": (lambda x, m: m(x), WORDS, nn.LayerNorm(6, elementwise_affine=False)),
    "group_norm": (lambda x, m: m(x), IMAGE, nn.GroupNorm(2, 4)),
    "group_norm_plain": (lambda x, m: m(x), IMAGE, nn.GroupNorm(2, 4, affine=False)),
    "instance_norm": (lambda x, m: m(x), IMAGE, nn.InstanceNorm2d(4, affine=True)),
    "rms_norm": (lambda x, m: m(x), WORDS, nn.RMSNorm(6)),
    "rms_norm_plain": (lambda x: F.rms_norm(x, (5, 6), eps=1e-3), WORDS),
    # arithmetic: torch's promotion, alpha, rounding
    "add_alpha": (lambda x: torch.add(x, x * x, alpha=2), ROWS),
    "sub_alpha": (lambda x: torch.sub(x, x * x, alpha=2), ROWS),
    "rsub_alpha": (lambda x: torch.rsub(x, 3, alpha=2), ROWS),
    "int_divide": (lambda x: x / 2, IDS),
    "int_times_float": (lambda x: x * 0.5 + torch.ones(5), IDS),
    "int_above_float": (lambda x: (x > 2.5).float(), IDS),
    "bool_times_float": (lambda x: (x > 0) * x, ROWS),
    "bool_algebra": (lambda x: ((~(x > 0) & (x > -2)) | (x > 3)).float(), ROWS),
    "bool_product": (lambda x: ((x > 0) * (x > 1) + (x < -1)).float(), ROWS),
    "bool_sum": (lambda x: (x > 0).sum(1) * 1.0, ROWS),
    "bool_cumsum": (lambda x: (x > 0).cumsum(1) / 2, ROWS),
    "floor_divide": (lambda x: x // 2, ROWS),
    "trunc_divide": (lambda x: torch.div(x, 2, rounding_mode="trunc"), ROWS),
    "remainder": (lambda x: x % 2, ROWS),
    "fmod": (lambda x: torch.fmod(x, 1.5), ROWS),
    "powers": (lambda x: (x.abs() + 1) ** -0.5 + 2.0**x + x**2, ROWS),
    "clamp_max": (lambda x: x.clamp(max=1.0), ROWS),
    "clamp_min": (lambda x: x.clamp(min=-1.0), ROWS),
    "clamp_tensor": (lambda x: torch.clamp(x, min=x * 0.5), ROWS),
    "clamp_int": (lambda x: x.clamp(min=1) * 1.0, IDS),
    "logs": (lambda x: x.abs().log1p() + (x / 5).expm1() + (x.abs() + 1).log2(), ROWS),
    "rounding": (lambda x: x.round() + x.floor() + x.ceil() + x.trunc(), ROWS),
    "where": (lambda x: torch.where(x > 0, x, 0.5), ROWS),
    "masked_fill": (lambda x: x.masked_fill(x > 0, -1.0), ROWS),
    "lerp": (lambda x: torch.lerp(x, x * 2, 0.3), ROWS),
    # reductions
    "amax": (lambda x: x.amax((2, 3)), IMAGE),
    "min_values": (lambda x: x.min(1)[0], ROWS),
    "max_keepdim": (lambda x: x.max(1, keepdim=True)[0], ROWS),
    "max_indices": (lambda x: x.max(1)[1] * 1.0, ROWS),
    "prod": (lambda x: x.prod(1), ROWS),
    "var": (lambda x: x.var(1), ROWS),
    "var_keepdim": (lambda x: x.var((1, 2), correction=0, keepdim=True), IMAGE),
    "std": (lambda x: x.std(), ROWS),
    "var_mean": (lambda x: torch.var_mean(x, 1)[0] + torch.var_mean(x, 1)[1], ROWS),
    "norm": (lambda x: x.norm(dim=1) + x.norm(p=1, dim=1), ROWS),
    "logsumexp": (lambda x: x.logsumexp(1), ROWS),
    # shapes
    "slices": (lambda x: x[:, 1:-1, ::2, -3:], IMAGE),
    "selects": (lambda x: x[-1, :, -2], IMAGE),
    "ellipsis": (lambda x: x[..., 0, None], IMAGE),
    "lists": (lambda x: x[:, [0, 2]], ROWS),
    "points": (lambda x: x[torch.tensor([0, 2]), torch.tensor([1, 3])], ROWS),
    "concat": (lambda x: torch.cat([x, x * 2], 1), IMAGE),
    "split": (lambda x: torch.split(x, [1, 3], 1)[1], IMAGE),
    "chunk_uneven": (lambda x: x.chunk(4, -1)[2], ROWS),
    "stack": (lambda x: torch.stack([x, x + 1], -1), ROWS),
    "unbind": (lambda x: x.unbind(1)[2], WORDS),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), IMAGE),
    "pad_crop": (lambda x: F.pad(x, (-1, 2, 0, 1)), IMAGE),
    "pad_reflect": (lambda x: F.pad(x, (1, 2, 1, 1), mode="reflect"), IMAGE),
    "pad_replicate": (lambda x: F.pad(x, (1, 2, 1, 1), mode="replicate"), IMAGE),
    "repeat": (lambda x: x.repeat(2, 1, 1, 3), IMAGE),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), ROWS),
    "expand": (lambda x: x[:, None].expand(-1, 4, -1), ROWS),
    "permute": (lambda x: x.permute(0, 2, 3, 1).contiguous().flatten(1), IMAGE),
    "roll_flip": (lambda x: x.roll(1, 1).flip(2), IMAGE),
    "tril": (lambda x: x.tril() + x.triu(1), WORDS),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), IMAGE),
    "gather": (lambda x: torch.gather(x, 1, torch.tensor([[0, 1], [2, 3], [5, 0]])), ROWS),
    "embedding": (lambda x, m: m(x), IDS, nn.Embedding(7, 3, padding_idx=1)),
    "one_hot": (lambda x: F.one_hot(x, 7).float(), IDS),
    "write": (lambda x: _write(x), ROWS),
    # pooling, convolution, interpolation
    "max_pool": (lambda x: F.max_pool2d(-x.abs(), 3, 2, 1), IMAGE),
    "max_pool_ceil": (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), IMAGE),
    "max_pool_dilated": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), IMAGE),
    "avg_pool": (lambda x: F.avg_pool2d(x, 3, 2, 1), IMAGE),
    "avg_pool_exclude": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGE),
    "adaptive_avg": (lambda x: F.adaptive_avg_pool2d(x, (4, 2)), IMAGE),
    "adaptive_avg_uneven": (lambda x: F.adaptive_avg_pool2d(x, 3), IMAGE),
    "adaptive_max": (lambda x: F.adaptive_max_pool2d(x, 2), IMAGE),
    "conv1d": (lambda x, m: m(x), WORDS, nn.Conv1d(5, 4, 3, 2, 1)),
    "conv2d": (lambda x, m: m(x), IMAGE, nn.Conv2d(4, 6, 3, 2, 1, dilation=2, groups=2)),
    "conv2d_padded": (lambda x, m: m(F.pad(x, (0, 1, 2, 1))), IMAGE, nn.Conv2d(4, 3, 3, 2)),
    "conv2d_padded_1": (lambda x, m: m(F.pad(x, (0, 1), value=1)), IMAGE, nn.Conv2d(4, 3, 3)),
    "conv_transpose": (lambda x, m: m(x), IMAGE, nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)),
    "nearest": (lambda x: F.interpolate(x, size=(12, 11)), IMAGE),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE),
    "bilinear_corners": (
        lambda x: F.interpolate(x, size=(11, 13), mode="bilinear", align_corners=True),
        IMAGE,
    ),
    # matrices and attention
    "linear": (lambda x, m: m(x), WORDS, nn.Linear(6, 4)),
    "einsum": (lambda x: torch.einsum("bti,bsi->bts", x, x), WORDS),
    "addmm": (lambda x: torch.addmm(torch.ones(3, 3), x, x.T, beta=0.5, alpha=2.0), ROWS),
    "softmax": (lambda x: x.softmax(0) + x.log_softmax(1), ROWS),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, MASK, scale=0.3), WORDS),
    "attention_causal": (
        lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True),
        IMAGE,
    ),
    "attention_bool": (
        lambda x: F.scaled_dot_product_attention(
            heads(x), heads(x), heads(x), attn_mask=(MASK[:1, :1] + x[:, :1] > -9)
        ),
        IMAGE,
    ),
    "attention_grouped": (
        lambda x: F.scaled_dot_product_attention(
            x[:, :, :3], x[:, :2], x[:, :2], is_causal=True, enable_gqa=True
        ),
        IMAGE,
    ),
    "multihead": (
        lambda x, m: m(x, x, x, need_weights=False)[0],
        WORDS,
        nn.MultiheadAttention(6, 2, batch_first=True),
    ),
    "encoder_layer": (
        lambda x, m: m(x),
        WORDS,
        nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, norm_first=True),
    ),
    # losses written in the module
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.tensor([1, 2, 0])), ROWS),
    "bce": (lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).float()), ROWS),
    "huber": (lambda x: F.smooth_l1_loss(x, x * 2), ROWS),
    "kl_div": (lambda x: F.kl_div(x.log_softmax(1), x.softmax(1), reduction="batchmean"), ROWS),
}


def _write(x):
    y = x.clone()
    y[:, 1:3] = 0
    return y


INPUTS = {"image": IMAGE, "rows": ROWS, "words": WORDS, "ids": IDS}


class Everything(nn.Module):
    """All operators in one program: exporting costs half a second, whatever is in it."""

    def __init__(self):
        super().__init__()
        self.m = nn.ModuleList(Lambda(row[0], *row[2:]) for row in OPERATORS.values())

    def pieces(self, image, rows, words, ids):
        given = {"image": image, "rows": rows, "words": words, "ids": ids}
        which = {id(tensor): name for name, tensor in INPUTS.items()}
        for layer, (_, x, *_) in zip(self.m, OPERATORS.values(), strict=True):
            yield layer(given[which[id(x)]])

    def forward(self, image, rows, words, ids):
        return torch.cat([p.flatten() for p in self.pieces(image, rows, words, ids)])


@pytest.fixture(scope="module")
def results():
    module, inputs = Everything().eval(), tuple(INPUTS.values())
    with torch.no_grad():
        expected = [piece.numpy() for piece in module.pieces(*inputs)]
    model = import_torch(module, inputs)
    output = run_models({"all": model}, {"all": inputs})["all"]
    pieces = np.split(output, np.cumsum([e.size for e in expected])[:-1])
    return {
        name: (piece.reshape(e.shape), e)
        for name, piece, e in zip(OPERATORS, pieces, expected, strict=True)
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(results, name):
    output, expected = results[name]
    assert expected.dtype == np.float32
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


def operators_of(model):
    bindings = [b for block in model.module["main"].body.blocks for b in block.bindings]
    return [getattr(getattr(b.value, "op", None), "name", "") for b in bindings]


def test_attention_repeats_no_keys():
    x = torch.randn(2, 8, 4, 6)
    small = torch.randn(2, 2, 4, 6)

    def grouped(q):
        return F.scaled_dot_product_attention(q, small, small, enable_gqa=True)

    model = import_torch(Lambda(grouped), (x,))
    names = operators_of(model)
    assert names.count("relax.matmul") == 2
    assert not {"relax.broadcast_to", "relax.tile", "relax.repeat"} & set(names)


def test_padding_goes_into_the_convolution():
    conv = nn.Conv2d(4, 3, 3, 2)
    model = import_torch(Lambda(lambda x, m: m(F.pad(x, (0, 1, 0, 1))), conv), (IMAGE,))
    assert "relax.nn.pad" not in operators_of(model)


def test_constants_are_computed_by_torch():
    def forward(x):
        steps = torch.ones(5, dtype=torch.bool).cumsum(0)
        return x + torch.cos(steps * 0.1)[None, :, None]

    assert operators_of(import_torch(Lambda(forward), (WORDS,))) == ["relax.add", ""]


def test_unsupported_operators_are_listed_together():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = Lambda(lambda x: torch.cdist(x, x + 1))
            self.tail = Lambda(lambda x: torch.hypot(x, x) + torch.i0(x))

        def forward(self, x):
            return self.tail(self.stem(x))

    with pytest.raises(PockError) as caught:
        import_torch(Net(), (ROWS,))
    text = str(caught.value)
    assert "3 operators" in text
    for part in ("_cdist_forward", "'stem'", "hypot", "i0", "'tail'", "converters"):
        assert part in text
    assert len(text.splitlines()) <= 25


def test_interpolation_that_misses_the_grid_is_refused():
    with pytest.raises(PockError, match="whole pixels"):
        import_torch(Lambda(lambda x: F.interpolate(x[:, :, :5], scale_factor=1.5)), (IMAGE,))
