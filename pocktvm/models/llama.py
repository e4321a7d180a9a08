"""Decoders in Llama's shape (Touvron et al., arXiv 2302.13971): grouped queries, rotary positions.

The default is the shape of stories15M (karpathy's tinyllamas), `stories260k` its small sister's.
Meta's names are understood; `rope=half` rotates halves, as Hugging Face's conversions do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocktvm.errors import PockError
from pocktvm.models.common import ZooModel, build_seeded, read_options, tokens

OPTIONS = {
    "depth": 6,
    "dim": 288,
    "heads": 6,
    "kv": 0,  # 0: as many as heads
    "hidden": 768,
    "vocab": 32000,
    "tokens": 256,
    "theta": 10000.0,
    "rope": ("interleaved", "half"),
    "tied": ("yes", "no"),
    "seed": 0,
}
EPS = 1e-5

META = {
    "attention.wq": "q",
    "attention.wk": "k",
    "attention.wv": "v",
    "attention.wo": "o",
    "feed_forward.w1": "w1",
    "feed_forward.w2": "w2",
    "feed_forward.w3": "w3",
    "attention_norm": "n1",
    "ffn_norm": "n2",
    "tok_embeddings": "tok",
    "norm": "n",
    "output": "fc",
}


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight over the last axis."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPS)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (x0, x1), (x2, x3), … by position; x (N, H, T, D), cos and sin (T, D/2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (x0, x[D/2]), (x1, x[D/2+1]), … by position."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    """Causal attention and gated feed-forward, each behind its norm."""

    def __init__(self, dim: int, heads: int, kv: int, hidden: int, rope: str) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.rotate = rotate_pairs if rope == "interleaved" else rotate_halves
        self.n1, self.n2 = RMSNorm(dim), RMSNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, kv * self.head_dim, bias=False)
        self.v = nn.Linear(dim, kv * self.head_dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (N, T, D) to the same; cos and sin (T, head_dim / 2)."""
        batch, length, dim = x.shape
        heads = (batch, length, -1, self.head_dim)
        y = self.n1(x)
        q, k, v = (f(y).view(heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).reshape(batch, length, dim))
        y = self.n2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Llama(nn.Module):
    """Token ids (N, T) to logits (N, vocab, T): the class axis is 1, as torch's losses have it."""

    def __init__(
        self,
        depth: int = 6,
        dim: int = 288,
        heads: int = 6,
        kv: int = 0,
        hidden: int = 768,
        vocab: int = 32000,
        tokens: int = 256,
        theta: float = 10000.0,
        rope: str = "interleaved",
        tied: str = "yes",
    ) -> None:
        super().__init__()
        self.tok = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(
            Layer(dim, heads, kv or heads, hidden, rope) for _ in range(depth)
        )
        self.n = RMSNorm(dim)
        self.fc = nn.Linear(dim, vocab, bias=False)
        if tied == "yes":
            self.fc.weight = self.tok.weight
        half = torch.arange(0, dim // heads, 2).float() / (dim // heads)
        angles = torch.outer(torch.arange(tokens).float(), theta**-half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (N, T) to logits (N, vocabulary, T), the class axis where torch wants it."""
        x, length = self.tok(ids), ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.fc(self.n(x)).transpose(1, 2)


def published_scheme(depth: int, tied: bool) -> dict[str, int]:
    """PockEngine's: attention and first feed-forward matrix of the last 5 blocks.

    A head tied to the embedding stays frozen: it is half of a small model, and learning it would
    carry the backward down to the first layer.
    """
    scheme = {
        f"blocks.{block}.{name}.weight": 1
        for block in range(max(0, depth - 5), depth)
        for name in ("q", "k", "v", "o", "w1")
    }
    return scheme if tied else scheme | {"fc.*": 1}


def zoo_name(name: str) -> str | None:
    """Meta's names: layers.0.attention.wq.weight -> blocks.0.q.weight."""
    if name.startswith(("freqs_", "rope.")):
        return None
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    prefix, rest = (f"blocks.{match[1]}.", match[2]) if match else ("", name)
    owner, _, leaf = rest.rpartition(".")
    return f"{prefix}{META.get(owner, owner)}.{leaf}"


def build(options: Mapping[str, str], batch: int) -> ZooModel:
    """The zoo's entry."""
    o = read_options("llama", OPTIONS, options)
    kv = o["kv"] or o["heads"]
    if o["dim"] % (2 * o["heads"]) or o["heads"] % kv:
        raise PockError("llama: dim has to be a multiple of 2·heads, and heads of kv.")
    shape = {key: value for key, value in o.items() if key != "seed"}
    return ZooModel(
        module=build_seeded(o["seed"], lambda: Llama(**shape)),
        example_inputs=(tokens(batch, o["tokens"], o["vocab"]),),
        scheme=published_scheme(o["depth"], o["tied"] == "yes"),
        rename=zoo_name,
    )
