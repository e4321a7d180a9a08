"""Models whose tensors learn in part, and torch's oracle: full backprop, other updates undone."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

import pocktvm
from pocktvm.frontend.source import import_model
from pocktvm.ir.part import Part
from pocktvm.ir.scheme import Scheme
from pocktvm.reference import evaluate

STEPS = 4


class Kinds(nn.Module):
    """Every kind of weight with channels: plain, grouped, depthwise, transposed, 1-D, matrices."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depth = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.twice = nn.Conv2d(8, 16, 1, groups=8)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.line = nn.Conv1d(6, 8, 3, padding=1)
        self.right = nn.Parameter(torch.randn(8, 10) * 0.3)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.plain(x)))
        x = torch.relu(self.depth(self.grouped(x)))
        x = self.up(torch.relu(self.twice(x)))
        x = torch.relu(self.line(x.flatten(2))).mean(2)
        return self.fc(torch.tanh(x @ self.right))


KINDS = {
    "plain.weight": [0, 2],
    "norm.weight": 0.5,
    "grouped.weight": 0.5,
    "depth.weight": [0, 3, 4],
    "twice.weight": 0.25,
    "up.weight": [1, 2, 7, 11],
    "line.weight": "out:[0, 3, 4]",
    "right": 0.4,
    "fc.weight": "out:0.4",
    "fc.bias": [4],
}
OPTIMIZERS = {
    "sgd": (
        pocktvm.SGD(lr=0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    ),
    "adam": (pocktvm.Adam(lr=1e-3), lambda p: torch.optim.Adam(p, lr=1e-3)),
    "adamw": (
        pocktvm.AdamW(lr=1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    ),
}


def kinds():
    torch.manual_seed(1)
    return Kinds().eval(), (torch.randn(4, 3, 8, 8),), torch.tensor([0, 3, 1, 4])


def parts_of(module, inputs, scheme):
    model = import_model(module, inputs)
    return model, Scheme.parse(scheme).resolve(model)


def rows(part):
    return (slice(None),) * part.axis + (list(part.indices),)


def torch_slices(module, inputs, labels, updated, make_optimizer, steps=STEPS):
    """Full backprop whose updates outside the slices are undone."""
    module = copy.deepcopy(module).eval()
    names = dict(module.named_parameters())
    start = {n: p.detach().clone() for n, p in names.items()}
    for name, parameter in names.items():
        parameter.requires_grad_(name in updated)
    optimizer = make_optimizer([names[n] for n in updated])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(*inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for name, part in updated.items():
                if isinstance(part, Part):
                    trained = names[name][rows(part)].clone()
                    names[name].copy_(start[name])
                    names[name][rows(part)] = trained
    return losses, {n: p.detach().numpy() for n, p in names.items()}, start


def assert_slices_equal(state, theirs, start, updated, tolerance=2e-4):
    for name, before in start.items():
        part, ours, was = updated.get(name), state[name], before.numpy()
        moved = np.zeros(was.shape, bool)
        if part is not None:
            moved[rows(part) if isinstance(part, Part) else ...] = True
        assert np.array_equal(ours[~moved], was[~moved]), f"{name}: the frozen part changed"
        if part is None:
            continue
        assert not np.array_equal(ours[moved], was[moved]), f"{name} did not learn"
        scale = max(np.abs(theirs[name] - was).max(), 1e-6)
        gap = np.abs(ours - theirs[name]).max()
        assert gap <= tolerance * max(scale, np.abs(was).max()), f"{name}: {gap} of {scale}"


def interpret(graph, batch, lr, steps=STEPS):
    """Losses, and the tensors with torch's axes, of a graph in the reference interpreter."""
    params, losses = {n: p.value for n, p in graph.params.items()}, []
    for t in range(1, steps + 1):
        result = evaluate(graph, batch, params=params, lr=lr, t=t, keep=False)
        losses.append(float(result.outputs["loss"]))
        params |= result.updates
    back = {n: p.perm and np.argsort(p.perm) for n, p in graph.params.items()}
    return losses, {
        n: v if back[n] is None else v.transpose(back[n])
        for n, v in params.items()
    }  # fmt: skip


class Narrow(nn.Module):
    """Linear bottlenecks: what a weight's gradient keeps is its block's input and nothing else."""

    def __init__(self, blocks=6, width=32):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.Identity()) for _ in range(blocks)
        )
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


ZOO = {
    "mobilenetv2:width=0.35,image=32,classes=10": (
        {"blocks.1[3-5].pw1.0.weight": 0.25, "blocks.14.dw.0.weight": [3, 5, 99], "fc.weight": 0.3},
        "sgd",
    ),
    "bert:depth=2,dim=32,heads=2,hidden=64,vocab=60,positions=24,tokens=12": (
        {"blocks.*.weight": 0.25, "blocks.1.f2.weight": "out:[0, 7, 30]", "tok.weight": 0.5},
        "adam",
    ),
    "llama:depth=2,dim=32,heads=4,kv=2,hidden=48,vocab=60,tokens=12": (
        {"*.weight": "out:0.5"},
        "adam",
    ),
}
