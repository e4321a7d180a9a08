"""Every gradient rule against torch's autograd and against central differences: one row each.

A table is exported as one module, the sum of its rows' losses.

Tolerance 1e-5: float32 sums of at most a few thousand terms, in another order than torch's.
"""

import pytest
import torch
from gradients import Probe, check, check_rows
from torch import nn
from torch.nn import functional as F

X = (2, 3, 6, 8)  # an image batch with unequal sides
POSITIVE = {"low": 0.5}

UNARY = {
    "relu": F.relu,
    "relu6": lambda x: F.relu6(4 * x),
    "clamp": lambda x: torch.clamp(x, -0.5, 0.7),
    "clamp_min": lambda x: torch.clamp_min(x, 0.1),
    "clamp_max": lambda x: torch.clamp_max(x, 0.1),
    "hardtanh": F.hardtanh,
    "hardswish": lambda x: F.hardswish(3 * x),
    "hardsigmoid": lambda x: F.hardsigmoid(3 * x),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": lambda x: F.elu(x, 0.7),
    "elu_large": lambda x: F.elu(100 * x),
    "selu": F.selu,
    "softplus": F.softplus,
    "softplus_beta": lambda x: F.softplus(x, beta=2, threshold=3),
    "softplus_large": lambda x: F.softplus(100 * x),
    "tanh": torch.tanh,
    "mish": F.mish,
    "log_sigmoid": F.logsigmoid,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": torch.abs,
    "negative": torch.neg,
    "square": torch.square,
    "pow3": lambda x: x**3,
    "pow4": lambda x: x**4,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "floor": lambda x: x * torch.floor(x),
    "where": lambda x: torch.where(x > 0.2, 2 * x, x * x),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.0),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "minimum": lambda x: torch.minimum(x, 0.3 * x + 0.1),
    "remainder": lambda x: torch.remainder(x, 0.7),
    "dropout": lambda x: F.dropout(x, 0.5, training=False) * 2,
}
LEGALIZED = {"tan": lambda x: torch.tan(0.3 * x), "atan": torch.atan}
POSITIVE_UNARY = {
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "divide": lambda x: 1.5 / x,
    "pow": lambda x: x**1.7,
    "pow_negative": lambda x: x**-2,
    "pow_base": lambda x: torch.pow(2.0, x),
    "prod": lambda x: x.prod(1),
    "norm": lambda x: F.normalize(x, dim=1),
}
SHAPE = {
    "squeeze": lambda x: x.unsqueeze(2).squeeze(2) * x,
    "flatten": lambda x: torch.flatten(x, 1) * 2,
    "reshape": lambda x: x.reshape(6, -1) * 2,
    "permute": lambda x: x.permute(0, 2, 3, 1) * torch.arange(3.0),
    "transpose": lambda x: x.transpose(1, 3) * torch.arange(3.0),
    "slice": lambda x: x[:, 1:, ::2, -3:] * 2,
    "select": lambda x: x[:, 1] * x[:, 0],
    "flip": lambda x: x.flip(3) * torch.arange(8.0),
    "concat": lambda x: torch.cat([x, x * 2, x[:, :1]], 1),
    "split": lambda x: torch.cat([p * (i + 1) for i, p in enumerate(x.split([1, 5], 2))], 2),
    "chunk": lambda x: x.chunk(2, 3)[0] * x.chunk(2, 3)[1],
    "unbind": lambda x: x.unbind(1)[2] * x.unbind(1)[0],
    "stack": lambda x: torch.stack([x, x * x], 2),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.3) * 2,
    "pad_crop": lambda x: F.pad(x, (-1, 2, 0, -1)) * 2,
    "pad_reflect": lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect") ** 2,
    "pad_replicate": lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate") ** 2,
    "pad_circular": lambda x: F.pad(x, (1, 2, 2, 1), mode="circular") ** 2,
    "tile": lambda x: x.tile(2, 1, 1, 3) * torch.arange(24.0),
    "repeat": lambda x: x.repeat(1, 2, 1, 1) * 2,
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1) * torch.arange(8.0),
    "expand": lambda x: x[:, :1].expand(2, 5, 6, 8) * torch.arange(8.0),
    "roll": lambda x: x.roll(2, 3) * torch.arange(8.0),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.reshape(1, 12, 6, 4), 2) ** 2,
    "gather": lambda x: x.gather(3, torch.tensor([[[[0, 7, 7, 3]]]]).expand(2, 3, 6, 4)),
    "index_select": lambda x: x.index_select(2, torch.tensor([5, 0, 5])) * 2,
    "index": lambda x: x[:, [2, 0, 2]] * 2,
    "tril": lambda x: torch.tril(x) * 2,
    "cumsum": lambda x: x.cumsum(2) * 0.1,
    "ones_like": lambda x: x * torch.ones_like(x) + torch.full_like(x, 0.5),
}
REDUCE = {
    "sum": lambda x: x.sum((1, 3)),
    "sum_all": lambda x: x.sum() * 0.1,
    "mean": lambda x: x.mean((2, 3), keepdim=True) * x,
    "max": lambda x: x.amax(2),
    "max_dim": lambda x: x.max(1).values,
    "min": lambda x: x.amin((1, 2)),
    "var": lambda x: x.var(1),
    "var_biased": lambda x: x.var((2, 3), unbiased=False),
    "std": lambda x: x.std(3),
    "softmax": lambda x: F.softmax(x, 1),
    "softmax_last": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "logsumexp": lambda x: torch.logsumexp(x, 3),
}
POOL = {
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "max_pool_overlap": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool_dilated": lambda x: F.max_pool2d(x, 2, 1, dilation=2),
    "max_pool_ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "avg_pool_padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool_excluded": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg_pool_ceil": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "adaptive_one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_even": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive_uneven": lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, (3, 2)),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3),
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 3, 2, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest_size": lambda x: F.interpolate(x, (9, 11)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear_corners": lambda x: F.interpolate(x, (9, 11), mode="bilinear", align_corners=True),
}
PRODUCT = {
    "matmul": lambda x: x @ torch.ones(8, 5),
    "matmul_batched": lambda x: x @ x.transpose(2, 3),
    "matmul_batch_of_one": lambda x: x[:, :1] @ x.transpose(2, 3),
    "matmul_left": lambda x: torch.ones(4, 6) @ x,
    "matmul_vector": lambda x: x @ torch.arange(8.0),
    "einsum_attention": lambda x: torch.einsum("bhid,bhjd->bhij", x, 2 * x),
    "einsum_trace": lambda x: torch.einsum("bchw,bkhw->ck", x, x[:, :2]),
    "einsum_outer": lambda x: torch.einsum("bi,bj->bij", x[:, 0, 0], x[:, 1, 1]),
    "einsum_three": lambda x: torch.einsum("bchw,bch,cw->bw", x, x[..., 0], x[0, :, 0]),
    "sdpa": lambda x: F.scaled_dot_product_attention(x, 2 * x, x * x),
    "sdpa_causal": lambda x: F.scaled_dot_product_attention(x, 2 * x, x, is_causal=True),
    "sdpa_mask": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.arange(6)[None, :] < torch.tensor([[4]])
    ),
    "sdpa_gqa": lambda x: F.scaled_dot_product_attention(
        torch.cat([x, -x], 1), x, x * x, enable_gqa=True
    ),
}
FAMILIES = {"unary": UNARY, "shape": SHAPE, "reduce": REDUCE, "pool": POOL, "product": PRODUCT}


@pytest.mark.parametrize("family", FAMILIES)
def test_functions(family):
    torch.manual_seed(0)
    check_rows({name: Probe(function, *X) for name, function in FAMILIES[family].items()})


def test_functions_of_positive_numbers():
    torch.manual_seed(0)
    check_rows({name: Probe(f, *X, **POSITIVE) for name, f in POSITIVE_UNARY.items()})


def test_functions_that_stay_relax_operators():
    """TVM's own kernels compute in float32 whatever is asked: too coarse for differences."""
    torch.manual_seed(0)
    check_rows({n: Probe(f, *X) for n, f in LEGALIZED.items()}, difference=False)


MODULES = {
    "linear": (lambda: nn.Linear(8, 5), X),
    "linear_2d": (lambda: nn.Linear(8, 5), (4, 8)),
    "linear_1d": (lambda: nn.Linear(8, 5, bias=False), (8,)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), X),
    "conv_stride": (lambda: nn.Conv2d(3, 4, 3, stride=2), X),
    "conv_stride4": (lambda: nn.Conv2d(3, 4, (3, 5), stride=(4, 3), padding=(0, 2)), X),
    "conv_dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2), X),
    "conv_dilated_stride": (lambda: nn.Conv2d(3, 4, 3, stride=3, dilation=(2, 1), padding=1), X),
    "conv_groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 7)),
    "conv_depthwise": (lambda: nn.Conv2d(3, 6, 3, stride=2, groups=3, padding=1), X),
    "conv_same": (lambda: nn.Conv2d(3, 4, 4, padding="same"), X),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (2, 3, 11)),
    "conv_transpose": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), X),
    "conv_transpose_groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, dilation=2),
        (2, 4, 4, 5),
    ),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 7)),
    "layer_norm": (lambda: nn.LayerNorm(8), X),
    "layer_norm_axes": (lambda: nn.LayerNorm((6, 8)), X),
    "layer_norm_plain": (lambda: nn.LayerNorm(8, elementwise_affine=False), X),
    "rms_norm": (lambda: nn.RMSNorm(8, eps=1e-5), X),
    "group_norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 5, 4)),
    "instance_norm": (lambda: nn.InstanceNorm2d(3, affine=True), X),
    "instance_norm_plain": (lambda: nn.InstanceNorm2d(3), X),
    "batch_norm": (lambda: nn.BatchNorm2d(3), X),
    "batch_norm_plain": (lambda: nn.BatchNorm2d(3, affine=False), X),
    "batch_norm1d": (lambda: nn.BatchNorm1d(8), (4, 8)),
    "prelu": (lambda: nn.PReLU(3), X),
    "bilinear_upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), X),
    "attention": (lambda: Attention(8, 2), (2, 5, 8)),
    "llama_norm": (lambda: HandWrittenRMSNorm(8), X),
}


class Attention(nn.Module):
    """nn.MultiheadAttention as a function of one tensor."""

    def __init__(self, width, heads):
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


class HandWrittenRMSNorm(nn.Module):
    """As Llama's code spells it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def perturb(module):
    """Random gains, shifts and statistics: the defaults hide half of a norm's gradient."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer) * (0.5 if "var" in name else 1.0))
    return module


def test_modules():
    torch.manual_seed(0)
    probes = {name: Probe(perturb(make()), *shape) for name, (make, shape) in MODULES.items()}
    ops = check_rows(probes)
    assert "layer_norm_grad" in ops["layer_norm"]
    assert "rms_norm_grad" in ops["rms_norm"] & ops["llama_norm"]


def test_activations_that_exporters_spell_out_are_single_operators():
    torch.manual_seed(0)
    names = ("relu6", "hardswish", "hardsigmoid", "silu", "elu", "softplus", "gelu")
    for name, ops in check_rows({n: Probe(UNARY[n], 2, 8) for n in names}).items():
        assert {name, f"{name}_grad"} <= ops, (name, ops)


class Embedded(nn.Module):
    """A table with a padding row, read twice, under a head."""

    def __init__(self, padding_idx):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=padding_idx)
        self.position = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        x = self.table(ids) + self.position(torch.arange(ids.shape[1]))
        return self.head(x).mean(1)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(padding_idx):
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 2, 6, 1], [0, 2, 3, 3, 3]], dtype=torch.int32)
    # the padding row does matter to the loss: its gradient is zero by torch's decree
    check(Embedded(padding_idx), ids, difference=padding_idx is None)


class Tied(nn.Module):
    """A head tied to the embedding: one tensor, one summed gradient."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids))).transpose(1, 2)


def test_tied_weights_get_one_summed_gradient():
    torch.manual_seed(0)
    ids, y = torch.randint(0, 7, (2, 5)), torch.randint(0, 7, (2, 5))
    step = check(Tied(), ids, "cross_entropy", F.cross_entropy, y)
    assert [*step.updates] == ["embed.weight"]
    assert step.params["embed.weight"].aliases == ("head.weight",)


def test_linear_layers_have_no_transposes_and_one_product_a_weight():
    torch.manual_seed(0)
    step = check(Probe(nn.Linear(8, 5), 2, 3, 8), torch.randn(2, 3, 8))
    assert not any(node.op == "permute_dims" for node in step.nodes)
    weights = [n for n in step.nodes if step.values[n.outputs[0]].shape == (5, 8)]
    assert [n.op for n in weights if n.op in ("matmul", "sum")] == ["matmul"]
