"""Vision transformer, tiny (Touvron et al., arXiv 2012.12877). timm's names are understood."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocktvm.errors import PockError
from pocktvm.models.common import ZooModel, build_seeded, images, read_options

OPTIONS = {
    "image": 128,
    "patch": 16,
    "dim": 192,
    "depth": 12,
    "heads": 3,
    "hidden": 768,
    "classes": 10,
    "head": ("file", "new"),
    "seed": 0,
}
PIXELS = (127.5,) * 3


class Layer(nn.Module):
    """Attention and feed-forward, each behind its norm."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, D) to the same."""
        batch, length, dim = x.shape
        heads = (batch, length, self.heads, dim // self.heads)
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.reshape(heads).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Images (N, 3, H, W) to logits (N, classes), read from a class token."""

    def __init__(
        self, image: int, patch: int, dim: int, depth: int, heads: int, hidden: int, classes: int
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, dim))
        self.blocks = nn.ModuleList(Layer(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc = nn.Linear(dim, classes)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes), read from the class token."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.fc(self.norm(x)[:, 0])


def published_scheme(depth: int) -> dict[str, int]:
    """As PockEngine's for BERT: biases of the later half, the matrices of the last third."""
    scheme = {f"blocks.{block}.*.bias": 1 for block in range(depth - depth // 2, depth)}
    for block in range(depth - depth // 3, depth):
        scheme |= {f"blocks.{block}.{name}.weight": 1 for name in ("qkv", "proj", "fc1")}
    return scheme | {"fc.*": 1}


def zoo_name(name: str) -> str:
    """timm's names: blocks.0.attn.qkv.weight -> blocks.0.qkv.weight."""
    name = name.replace("patch_embed.proj.", "patch.").replace(".attn.", ".").replace(".mlp.", ".")
    return "fc." + name.removeprefix("head.") if name.startswith("head.") else name


def build(options: Mapping[str, str], batch: int) -> ZooModel:
    """The zoo's entry."""
    o = read_options("vit-tiny", OPTIONS, options)
    if o["image"] % o["patch"] or o["dim"] % o["heads"]:
        raise PockError("vit-tiny: image has to be a multiple of patch, and dim of heads.")
    shape = {k: o[k] for k in ("image", "patch", "dim", "depth", "heads", "hidden", "classes")}
    return ZooModel(
        module=build_seeded(o["seed"], lambda: ViT(**shape)),
        example_inputs=(images(batch, o["image"]),),
        scheme=published_scheme(o["depth"]),
        mean=PIXELS,
        scale=(1 / 127.5,) * 3,
        rename=zoo_name,
        fresh=("fc.",) if o["head"] == "new" else (),
    )
