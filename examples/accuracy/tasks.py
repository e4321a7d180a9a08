"""Published weights with real data: what `run.py` trains.

Each task names a model for `pocktvm build`, its weights and optimizer, and reads its samples from
the folder given (see README.md for what lies there).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Samples = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """`load(folder, limit)` gives (train, test); `limit` bounds the training samples. `score` is
    accuracy, or perplexity (the exponential of the test loss)."""

    model: str
    weights: str
    batch: int
    optimizer: str
    load: Callable[[Path, int | None], tuple[Samples, Samples]]
    score: str = "accuracy"


def cifar(enlarge: int) -> Callable[[Path, int | None], tuple[Samples, Samples]]:
    """CIFAR-10's images, each pixel repeated `enlarge` times along both axes."""

    def load(folder: Path, limit: int | None) -> tuple[Samples, Samples]:
        data = np.load(folder / "cifar10-5k" / "cifar10_5k_1k_uint8.npz")

        def split(name: str, count: int | None) -> Samples:
            order = np.random.default_rng(0).permutation(len(data[f"y_{name}"]))[:count]
            images = data[f"x_{name}"][order].repeat(enlarge, 1).repeat(enlarge, 2)
            return {"x": images, "y": data[f"y_{name}"][order].astype(np.int64)}

        return split("train", limit), split("test", None)

    return load


def sst2(tokens: int) -> Callable[[Path, int | None], tuple[Samples, Samples]]:
    """Sentences as WordPiece ids, padded with 0 or cut to `tokens`; their sentiment."""

    def load(folder: Path, limit: int | None) -> tuple[Samples, Samples]:
        pieces = (folder / "minilm-l6-pruned" / "vocab.txt").read_text().splitlines()
        vocabulary = {piece: i for i, piece in enumerate(pieces)}

        def split(name: str, count: int | None) -> Samples:
            with (folder / "sst2" / f"{name}.tsv").open() as file:
                rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            order = np.random.default_rng(0).permutation(len(rows))[:count]
            x = np.zeros((len(order), tokens), np.int32)
            for line, index in enumerate(order):
                ids = word_pieces(rows[index]["sentence"], vocabulary)[: tokens - 2]
                ids = [vocabulary["[CLS]"], *ids, vocabulary["[SEP]"]]
                x[line, : len(ids)] = ids
            labels = np.array([int(rows[i]["label"]) for i in order])
            return {"ids": x, "y": labels}

        return split("train", limit), split("test", None)

    return load


def word_pieces(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Greedy longest match within each word."""
    ids = []
    for word in text.lower().split():
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in vocabulary), None)
            if end is None:
                ids.append(vocabulary["[UNK]"])
                break
            ids.append(vocabulary[prefix + word[start:end]])
            start = end
    return ids


def shakespeare(tokens: int) -> Callable[[Path, int | None], tuple[Samples, Samples]]:
    """The text in blocks; each token's label is the next. The last tenth of it is the test."""

    def load(folder: Path, limit: int | None) -> tuple[Samples, Samples]:
        pieces = json.loads((folder / "stories260K" / "tok512.json").read_text())
        table = {piece: i for i, (piece, _) in enumerate(pieces)}
        text = (folder / "tinyshakespeare" / "input.txt").read_text()
        longest, ids, at = max(map(len, table)), [], 0
        while at < len(text):
            sizes = range(min(longest, len(text) - at), 0, -1)
            size = next((s for s in sizes if text[at : at + s] in table), None)
            if size is not None:
                ids.append(table[text[at : at + size]])
            at += size or 1
        rows = len(ids) // (tokens + 1)
        blocks = np.array(ids[: rows * (tokens + 1)], np.int32).reshape(rows, tokens + 1)
        cut = int(0.9 * rows)

        def samples(part: np.ndarray) -> Samples:
            return {"ids": part[:, :-1].copy(), "y": part[:, 1:].copy()}

        order = np.random.default_rng(0).permutation(cut)[:limit]
        return samples(blocks[order]), samples(blocks[cut:])

    return load


MOBILENET = "mobilenetv2:padding=same,bn=folded,classes=10,head=new"
TASKS = {
    "mobilenetv2-0.35": Task(
        f"{MOBILENET},width=0.35,image=96",
        "mobilenetv2-0.35/mobilenetv2_0.35_features_folded_fp32.safetensors",
        8, "adam", cifar(3),
    ),
    "mobilenetv2-1.0": Task(
        f"{MOBILENET},pixels=128,image=128",
        "mobilenetv2-1.0/mobilenetv2_1.0_imagenet_folded_fp32.safetensors",
        8, "adam", cifar(4),
    ),
    "mcunet": Task(
        "mcunet:bn=folded,classes=10,head=new,image=128",
        "mcunet-5fps/mcunet-5fps_imagenet_folded_fp32.safetensors",
        8, "adam", cifar(4),
    ),
    "minilm": Task(
        "minilm:vocab=19481,positions=256,tokens=24,classes=2,head=new",
        "minilm-l6-pruned/minilm_l6_vocabpruned_fp16.safetensors",
        8, "adamw", sst2(24),
    ),
    "stories": Task(
        "stories260k:tokens=64", "stories260K/stories260K_fp32.safetensors",
        4, "adamw", shakespeare(64), "perplexity",
    ),
}  # fmt: skip
