"""PyTorch on the same module, weights, batch and trained tensors.

Variants: `eager`; `fold_cl` folds BN into the frozen convolutions' outputs where nothing of the BN
but its shift learns, and runs channels_last; `compile` is torch.compile of the eager form.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.peers import load_weights
from benchmarks.workers.protocol import serve
from pocktvm.frontend.resolve import resolve_model


def main() -> None:
    """Train one recorded batch again and again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("batch", help="npz with x and y")
    parser.add_argument("trained", help="JSON list of the names that learn")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--weights", help="npz of a peers' folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--variant", choices=("eager", "fold_cl", "compile"), default="eager")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = resolve_model(options.model, batch=options.size).module.eval()
    if options.weights:
        load_weights(module, Path(options.weights))
    trained = set(json.loads(Path(options.trained).read_text()))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    data = np.load(options.batch)
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"]).long()
    if options.variant == "fold_cl":
        fold_batch_norms(module)
        if x.ndim == 4:
            module = module.to(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
    forward = torch.compile(module) if options.variant == "compile" else module
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=options.lr)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    serve(step)


def fold_batch_norms(module: nn.Module) -> None:
    """Replace conv + BN by one conv with a bias, the form a careful user would train.

    The fold is exact for the forward. A trained weight then learns in folded coordinates, which is
    the same work; where the BN's scale itself learns, nothing is folded.
    """
    for child in module.children():
        fold_batch_norms(child)
    names = list(module._modules)
    for first, second in itertools.pairwise(names):
        conv, norm = module._modules[first], module._modules[second]
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            continue
        if norm.weight.requires_grad:
            continue
        learns, shift_learns = conv.weight.requires_grad, norm.bias.requires_grad
        folded = torch.nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())
        folded.weight.requires_grad_(learns)
        folded.bias.requires_grad_(shift_learns)
        module._modules[first], module._modules[second] = folded, nn.Identity()


if __name__ == "__main__":
    main()
