"""Encoders in BERT's shape (Devlin et al., arXiv 1810.04805): bert, distilbert, minilm, any depth.

`mask=pad` leaves out tokens with id 0 and gives their embedding no gradient; `pool=mean` averages
the tokens left, `pool=first` reads token 0 through one more layer. Hugging Face's names of BERT and
DistilBERT are understood.
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
    "depth": 12,
    "dim": 768,
    "heads": 12,
    "hidden": 3072,
    "vocab": 30522,
    "positions": 512,
    "types": 2,
    "tokens": 128,
    "classes": 2,
    "pool": ("first", "mean"),
    "act": ("tanh", "relu"),
    "mask": ("none", "pad"),
    "head": ("file", "new"),
    "seed": 0,
}
PAD = 0
EPS = 1e-12  # LayerNorm's, in every published encoder of this shape

HUGGING_FACE = {
    "embeddings.word_embeddings": "tok",
    "embeddings.position_embeddings": "pos",
    "embeddings.token_type_embeddings": "typ",
    "embeddings.LayerNorm": "ln",
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "o",
    "attention.output.LayerNorm": "ln1",
    "intermediate.dense": "f1",
    "output.dense": "f2",
    "output.LayerNorm": "ln2",
    "attention.q_lin": "q",
    "attention.k_lin": "k",
    "attention.v_lin": "v",
    "attention.out_lin": "o",
    "sa_layer_norm": "ln1",
    "ffn.lin1": "f1",
    "ffn.lin2": "f2",
    "output_layer_norm": "ln2",
    "pooler.dense": "pre",
    "pre_classifier": "pre",
    "classifier": "fc",
}


class Layer(nn.Module):
    """Attention and feed-forward, each with the norm behind it."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.ln1 = nn.LayerNorm(dim, eps=EPS)
        self.f1, self.f2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.ln2 = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (N, T, D) to the same; `mask` (N, 1, 1, T), true where a token is."""
        batch, length, dim = x.shape
        heads = (batch, length, self.heads, dim // self.heads)
        q, k, v = (f(x).view(heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.ln1(x + self.o(attended.transpose(1, 2).reshape(batch, length, dim)))
        return self.ln2(x + self.f2(F.gelu(self.f1(x))))


class Encoder(nn.Module):
    """Token ids (N, T) to logits (N, classes)."""

    def __init__(
        self,
        depth: int = 12,
        dim: int = 768,
        heads: int = 12,
        hidden: int = 3072,
        vocab: int = 30522,
        positions: int = 512,
        types: int = 2,
        classes: int = 2,
        pool: str = "first",
        act: str = "tanh",
        mask: str = "none",
    ) -> None:
        super().__init__()
        self.masked, self.act = mask == "pad", getattr(torch, act)
        self.tok = nn.Embedding(vocab, dim, padding_idx=PAD if self.masked else None)
        self.pos = nn.Embedding(positions, dim)
        self.typ = nn.Embedding(types, dim) if types else None
        self.ln = nn.LayerNorm(dim, eps=EPS)
        self.blocks = nn.ModuleList(Layer(dim, heads, hidden) for _ in range(depth))
        self.pre = nn.Linear(dim, dim) if pool == "first" else None
        self.fc = nn.Linear(dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (N, T) to logits (N, classes)."""
        x = self.tok(ids) + self.pos.weight[: ids.shape[1]]
        if self.typ is not None:
            x = x + self.typ.weight[0]
        x = self.ln(x)
        present = ids.ne(PAD) if self.masked else None
        mask = None if present is None else present[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return self.fc(self._pooled(x, present))

    def _pooled(self, x: Tensor, present: Tensor | None) -> Tensor:
        if self.pre is not None:
            return self.act(self.pre(x[:, 0]))
        if present is None:
            return x.mean(1)
        weight = present.to(x.dtype)
        return (x * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1.0)


def published_scheme(depth: int) -> dict[str, int]:
    """PockEngine's: biases of the later half, attention and first feed-forward of the last third.

    For 6 layers 3 and 2, for 12 layers 6 and 4, as published for DistilBERT and BERT.
    """
    scheme = {f"blocks.{block}.*bias": 1 for block in range(depth - depth // 2, depth)}
    for block in range(depth - max(1, depth // 3), depth):
        scheme |= {f"blocks.{block}.{name}.weight": 1 for name in ("q", "k", "v", "o", "f1")}
    return scheme


def zoo_name(name: str) -> str | None:
    """Hugging Face's names: encoder.layer.0.attention.self.query.bias -> blocks.0.q.bias."""
    name = name.removeprefix("bert.").removeprefix("distilbert.")
    if name.endswith("position_ids"):
        return None
    match = re.fullmatch(r"(?:encoder|transformer)\.layer\.(\d+)\.(.*)", name)
    prefix, rest = (f"blocks.{match[1]}.", match[2]) if match else ("", name)
    owner, _, leaf = rest.rpartition(".")
    return f"{prefix}{HUGGING_FACE.get(owner, owner)}.{leaf}"


def build(options: Mapping[str, str], batch: int) -> ZooModel:
    """The zoo's entry."""
    o = read_options("bert", OPTIONS, options)
    if o["dim"] % o["heads"]:
        raise PockError("bert: dim has to be a multiple of heads.")
    if o["tokens"] > o["positions"]:
        raise PockError(f"bert: tokens={o['tokens']} is more than positions={o['positions']}.")
    outside = ("tokens", "head", "seed")
    shape = {key: value for key, value in o.items() if key not in outside}
    head = {"pre.*": 1, "fc.*": 1} if o["pool"] == "first" else {"fc.*": 1}
    return ZooModel(
        module=build_seeded(o["seed"], lambda: Encoder(**shape)),
        example_inputs=(tokens(batch, o["tokens"], o["vocab"]),),
        scheme=published_scheme(o["depth"]) | head,
        rename=zoo_name,
        fresh=("pre.", "fc.") if o["head"] == "new" else (),
    )
