"""The step holds what the tensors that learn need, and nothing else."""

import pytest
import torch
from gradients import build, check, count
from torch import nn
from torch.nn import functional as F

from pocktvm.autodiff.ops import PREFIX
from pocktvm.errors import PockError

WEIGHT_GRADS = ("conv2d_weight_grad",)
INPUT_GRADS = ("conv2d_input_grad",)


def convolutions(n):
    """n convolutions with norms between, then a classifier: `0.0`, `0.1`, `1.0`, …, `n`."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6())]
    blocks += [
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6())
        for _ in range(n - 1)
    ]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(*blocks, pool).eval()


X = torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize(
    ("updated", "weight_grads", "input_grads"),
    [
        (["4.2.weight", "4.2.bias"], 0, 0),
        (["3.1.bias"], 0, 0),
        (["3.0.bias"], 0, 0),
        (["3.0.weight"], 1, 0),
        (["2.0.weight"], 1, 1),
        (["1.1.weight", "3.0.weight"], 1, 2),
        (["0.0.weight"], 1, 3),
        (["0.0.bias"], 0, 3),
        (None, 4, 3),
    ],
)
def test_gradients_stop_at_the_earliest_tensor_that_learns(updated, weight_grads, input_grads):
    _, step, predict = build(convolutions(4), X, "cross_entropy", updated)
    assert count(step, *WEIGHT_GRADS) == weight_grads
    assert count(step, *INPUT_GRADS) == input_grads
    assert updated is None or {n for n in step.params} == set(updated)
    assert not any(v.role == "gradient" for v in predict.values.values())
    assert predict.outputs.keys() == {"output"}


def test_every_node_is_needed_and_gradients_say_so():
    _, step, _ = build(convolutions(2), X, "cross_entropy", ["1.0.weight"])
    users, results = step.users(), step.results()
    for node in step.nodes:
        assert any(o in users or o in results for o in node.outputs), node
    roles = {step.values[n.outputs[0]].role for n in step.nodes if n.op.endswith("_grad")}
    assert roles == {"gradient"}


def test_updated_tensors_equal_full_backpropagation():
    module = convolutions(3)
    torch.manual_seed(1)
    y = torch.randint(0, 3, (2,))
    check(module, X, "cross_entropy", F.cross_entropy, y)


def test_frozen_branches_need_no_gradient_rule():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x) + torch.asinh(self.b(x))

    x = torch.randn(2, 4)
    _, step, _ = build(Branch(), x, "mse", ["a.weight"])
    assert count(step, "relax") == 1
    with pytest.raises(PockError, match=r"no gradient for 'relax.asinh' \(layer 'b'\)"):
        build(Branch(), x, "mse", ["b.weight"])


def test_all_missing_gradients_are_named_at_once():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return torch.acosh(2 + self.b(torch.sinh(self.a(x))).square())

    with pytest.raises(PockError) as caught:
        build(Odd(), torch.randn(2, 4), "mse")
    message = str(caught.value)
    assert "'relax.sinh' (layer 'a')" in message
    assert "'relax.acosh' (layer 'b')" in message
    assert "pocktvm/autodiff/rules/" in message


def test_a_tensor_without_influence_stays_as_it_is():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x)

    x = torch.randn(2, 4)
    _, step, _ = build(Unused(), x, "mse", ["a.weight", "b.weight"])
    assert [*step.updates] == ["a.weight"]
    with pytest.raises(PockError, match="influence on the loss"):
        build(Unused(), x, "mse", ["b.weight"])


def test_slices_that_cover_a_tensor_give_one_concat():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            q, k, v = self.qkv(x).split(4, -1)
            return q * k + v

    torch.manual_seed(1)
    step = check(Fused(), torch.randn(2, 5, 4))
    assert (count(step, "concat"), count(step, "strided_slice_grad")) == (1, 0)


def test_names_agree_between_programs():
    """Constants and the forward's values carry the same names in step and predict."""
    _, step, predict = build(convolutions(2), X, "cross_entropy", ["1.0.weight"])
    for name, array in predict.consts.items():
        if name in step.consts:
            assert (array == step.consts[name]).all()
    shared = {n.outputs for n in predict.nodes} & {n.outputs for n in step.nodes}
    assert len(shared) == len(predict.nodes)


def test_no_operator_of_autodiff_leaves_it_with_a_prefix():
    _, step, _ = build(convolutions(2), X, "cross_entropy")
    assert not any(node.op.startswith((PREFIX, "relax.")) for node in step.nodes)
