"""What the tests of gradients share: a module in, our step against torch's autograd out."""

import numpy as np
import torch
from torch import nn

from pocktvm.autodiff.differentiate import differentiate
from pocktvm.autodiff.losses import parse_loss
from pocktvm.autodiff.optimizers import SGD
from pocktvm.frontend.torch import import_torch
from pocktvm.reference import evaluate


class Probe(nn.Module):
    """`function` of x + p, so that p's gradient is the gradient of the function's input."""

    def __init__(self, function, *shape, low=None):
        super().__init__()
        start = torch.randn(shape) if low is None else torch.rand(shape) + low
        self.p = nn.Parameter(start)
        self.function = function

    def forward(self, x):
        return self.function(x + self.p)


class Rows(nn.Module):
    """The sum of many probes' losses: one export for a whole table. A row's gradients carry its
    name and depend on no other row."""

    def __init__(self, probes):
        super().__init__()
        self.rows = nn.ModuleDict(probes)
        with torch.no_grad():
            for name, probe in probes.items():
                self.register_buffer(f"y_{name}", torch.randn_like(probe(torch.zeros(1))))

    def forward(self, x):
        losses = [
            (row(x) - getattr(self, f"y_{n}")).square().mean() for n, row in self.rows.items()
        ]
        return torch.stack(losses).sum()


def check_rows(probes, **options):
    """`check` of all rows of a table at once; returns the step's operators by row."""
    module = Rows({name: probe.eval() for name, probe in probes.items()})
    step = check(module, 0.1 * torch.randn(1), "none", **options)
    layers = {name: f"rows.{name}" for name in probes}
    return {
        name: {n.op for n in step.nodes if n.layer == layer or n.layer.startswith(layer + ".")}
        for name, layer in layers.items()
    }


def build(module, inputs, loss="mse", updated=None, optimizer=None):
    """(model, step, predict) of a module where everything learns unless `updated` says less."""
    model = import_torch(module, inputs)
    names = updated if updated is not None else [*model.parameters]
    optimizer = optimizer or SGD(lr=1.0)
    shares = {name: 1.0 for name in names}
    return model, *differentiate(model, shares, parse_loss(loss), optimizer)


def feed(model, inputs, y=None):
    """Arrays by the program's input names."""
    arrays = {name: x.numpy() for name, x in zip(model.inputs, inputs, strict=True)}
    return arrays if y is None else {**arrays, "y": y.numpy()}


def check(module, inputs, loss="mse", torch_loss=nn.functional.mse_loss, y=None, difference=True):
    """Loss, output and every gradient equal torch's; one random direction equals a difference.

    The tolerance, 1e-5, is relative to the larger of 1 and the gradient's largest element:
    gradients are read off an update with lr 1, whose rounding is that of the parameter.
    """
    module, tolerance = module.eval(), 1e-5
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    model, step, predict = build(module, inputs, loss)
    out = module(*inputs)
    if y is None and loss != "none":
        y = torch.randn_like(out)
    expected = torch_loss(out, y) if y is not None else out
    params = dict(module.named_parameters())
    torch_grads = torch.autograd.grad(expected, list(params.values()), allow_unused=True)
    arrays = feed(model, inputs, y)
    result = evaluate(step, arrays, lr=1.0)
    assert abs(result.outputs["loss"] - expected.item()) <= tolerance * max(1, abs(expected.item()))
    given = {name: arrays[name] for name in predict.inputs}
    output = evaluate(predict, given).outputs["output"]
    np.testing.assert_allclose(output, out.detach(), rtol=tolerance, atol=tolerance)
    grads = {}
    for (name, p), grad in zip(params.items(), torch_grads, strict=True):
        if grad is None:
            assert name not in result.updates, name
            continue
        grads[name] = grad.numpy()
        ours = p.detach().numpy() - result.updates[name]
        scale = max(1.0, float(np.abs(grads[name]).max()))
        assert np.isfinite(ours).all(), name
        np.testing.assert_allclose(ours, grads[name], rtol=0, atol=tolerance * scale, err_msg=name)
    if difference:
        _check_difference(step, arrays, {n: params[n].detach().numpy() for n in grads}, grads)
    return step


def _check_difference(step, arrays, params, grads):
    """Central differences in float64 along one random direction."""
    rng = np.random.default_rng(1)
    direction = {n: rng.standard_normal(p.shape) for n, p in params.items()}
    size = np.sqrt(sum((d**2).sum() for d in direction.values()))
    h = 1e-6

    def loss(sign):
        moved = {n: p.astype("float64") + sign * h * direction[n] / size for n, p in params.items()}
        return float(evaluate(step, arrays, params=moved, dtype="float64").outputs["loss"])

    measured = (loss(1) - loss(-1)) / (2 * h)
    expected = sum((grads[n] * direction[n]).sum() for n in grads) / size
    assert abs(measured - expected) <= 1e-4 * max(1.0, abs(expected)), (measured, expected)


def count(graph, *ops):
    """Nodes with these operators."""
    return sum(node.op in ops for node in graph.nodes)
