"""Adapters and named schemes: torch with the same adapters learns the same."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from equality import Work, assert_losses_equal
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import pocktvm
from pocktvm.cli.app import app
from pocktvm.errors import PockError
from pocktvm.frontend.lora import add_adapters
from pocktvm.frontend.source import import_model
from pocktvm.ir.scheme import Scheme

pytestmark = pytest.mark.build

STEPS = 5


def resolved(spec, scheme, batch=2):
    work = Work.of(spec, batch)
    wanted = Scheme.parse(scheme)
    model = import_model(work.source.module, work.source.example_inputs)
    model = add_adapters(model, wanted)
    return work, model, wanted.resolve(model)


CNN = "cnn:channels=8,depth=3,image=12,classes=5"
BERT = "bert:depth=2,dim=32,heads=2,hidden=64,vocab=60,positions=24,tokens=12"
LLAMA = "llama:depth=2,dim=32,heads=4,kv=2,hidden=48,vocab=60,tokens=12"


def hook(module, a, b, scale):
    """torch's LoRA: the layer's output plus scale * B (A x)."""

    def add(layer, inputs, output):
        (x,) = inputs
        if isinstance(layer, nn.Linear):
            return output + scale * F.linear(F.linear(x, a), b)
        inner = F.conv2d(x, a, None, layer.stride, layer.padding, layer.dilation)
        return output + scale * F.conv2d(inner, b)

    module.register_forward_hook(add)


def torch_lora(work, model, updated, make_optimizer):
    """Losses, the trained tensors by name, and the module with its hooks."""
    module = copy.deepcopy(work.source.module).eval()
    tensors = dict(module.named_parameters())
    for parameter in tensors.values():
        parameter.requires_grad_(False)
    layers = dict(module.named_modules())
    for name, adapter in model.adapters.items():
        for side in (adapter.a, adapter.b):
            tensors[side] = torch.tensor(model.parameters[side].value, requires_grad=True)
        layer = layers[name.removesuffix(".weight")]
        hook(layer, tensors[adapter.a], tensors[adapter.b], adapter.scale)
    learns = [tensors[n].requires_grad_(True) for n in updated]
    optimizer = make_optimizer(learns)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(*work.x), work.y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: tensors[n].detach().numpy() for n in updated}, module


@pytest.mark.parametrize(
    ("spec", "scheme"),
    [
        (CNN, "lora:2:r=3,alpha=6"),
        (BERT, "lora:1:r=4,alpha=8,on=*.q.weight|*.f2.weight"),
        (LLAMA, "lora:2:r=4"),
    ],
)
def test_adapters_learn_as_in_torch(spec, scheme):
    work, model, updated = resolved(spec, scheme)
    losses, theirs, module = torch_lora(
        work, model, updated, lambda p: torch.optim.SGD(p, lr=0.05)
    )
    artifact = pocktvm.compile(
        work.source.module, work.source.example_inputs, scheme=scheme,
        optimizer=pocktvm.SGD(lr=0.05),
    )  # fmt: skip
    assert artifact.updated == updated
    with artifact.load() as trainer:
        arrays = [t.numpy() for t in (*work.x, work.y)]
        ours = [trainer.step(*arrays) for _ in range(STEPS)]
        apart, merged = trainer.state_dict(merged=False), trainer.state_dict()
        assert trainer.adapters().keys() == {n for n in updated if ".lora_" in n}
        output = trainer.predict(*arrays[:-1])
    assert_losses_equal(ours, losses)
    for name, tensor in theirs.items():
        np.testing.assert_allclose(apart[name], tensor, atol=1e-5, rtol=1e-3, err_msg=name)
    plain = copy.deepcopy(work.source.module).eval()
    for name, before in plain.named_parameters():
        if name not in updated:
            assert np.array_equal(apart[name], before.detach().numpy()), f"{name} changed"
    plain.load_state_dict({n: torch.from_numpy(a) for n, a in merged.items()}, strict=False)
    assert not set(dict(plain.named_parameters())) - set(merged)
    with torch.no_grad():
        scale = float(np.abs(output).max())
        np.testing.assert_allclose(plain(*work.x).numpy(), output, atol=2e-5 * scale)
        np.testing.assert_allclose(module(*work.x).numpy(), output, atol=2e-4 * scale)


def test_a_checkpoint_holds_the_adapters_and_merges_into_weights(tmp_path):
    module = nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        nn.Linear(8, 3),
    ).eval()  # fmt: skip
    artifact = pocktvm.compile(
        module, (torch.randn(4, 6),), scheme=pocktvm.LoRA(1, r=2), out=tmp_path / "a",
        optimizer=pocktvm.SGD(lr=0.1),
    )  # fmt: skip
    x, y = np.ones((4, 6), np.float32), np.array([0, 1, 2, 0])
    with artifact.load() as trainer:
        for _ in range(3):
            trainer.step(x, y)
        trainer.save(tmp_path / "c.safetensors")
        merged = trainer.state_dict()
    from safetensors.numpy import load_file

    saved = load_file(tmp_path / "c.safetensors")
    assert set(saved) == {"1.0.lora_A", "1.0.lora_B", "2.weight", "2.bias"}
    assert saved["1.0.lora_B"].any()
    command = ["merge", str(tmp_path / "a"), "--resume", str(tmp_path / "c.safetensors"), "-o"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "m.safetensors")]).exit_code == 0
    whole = load_file(tmp_path / "m.safetensors")
    assert whole.keys() == dict(module.named_parameters()).keys()
    assert all(np.array_equal(whole[n], merged[n]) for n in whole)
    assert not np.array_equal(whole["1.0.weight"], module[1][0].weight.detach().numpy())
    done = CliRunner().invoke(app, [*command, str(tmp_path / "l.safetensors"), "--apart"])
    assert done.exit_code == 0
    assert set(load_file(tmp_path / "l.safetensors")) == {"1.0.lora_A", "1.0.lora_B"}


def test_adapters_of_matrices_and_convolutions_on_the_last_blocks():
    _, model, updated = resolved("mobilenetv2:width=0.35,image=32,classes=10", "lora:2:r=4")
    adapted = {n for n in model.adapters}
    assert adapted == {f"blocks.{i}.{c}.0.weight" for i in (15, 16) for c in ("pw1", "pw2")}
    assert set(updated) - {"fc.weight", "fc.bias"} == {
        n.replace("weight", f"lora_{m}") for n in adapted for m in "AB"
    }
    a = model.parameters["blocks.16.pw1.0.lora_A"].value
    assert a.shape == (4, 56, 1, 1)
    assert not model.parameters["blocks.16.pw1.0.lora_B"].value.any()


def test_named_schemes():
    _, model, updated = resolved(BERT, "bitfit")
    head = {"pre.weight", "pre.bias", "fc.weight", "fc.bias"}
    assert set(updated) == {n for n in model.parameters if n.endswith("bias")} | head
    _, model, updated = resolved(BERT, "norm")
    assert set(updated) - head == {
        n for n in model.parameters if n.split(".")[-2] in ("ln", "ln1", "ln2")
    }
    _, _, updated = resolved(BERT, "head")
    assert set(updated) == head


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora", "last N blocks"),
        ("lora:x", "last N blocks"),
        ("lora:0", "last N blocks"),
        ("lora:1:r=0", "rank"),
        ("lora:1:rank=3", "no option 'rank'"),
        ("lora:1:alpha=-1", "alpha"),
        ("lora:1:r=2.5", "whole number"),
    ],
)
def test_bad_spellings_are_one_message(text, message):
    with pytest.raises(PockError, match=message):
        Scheme.parse(text)


def test_nothing_to_adapt_names_what_there_is():
    with pytest.raises(PockError, match=r"adapts nothing.*blocks\.1\.q\.weight"):
        resolved(BERT, "lora:1:on=*.nothing")
    with pytest.raises(PockError, match="9 blocks"):
        resolved(BERT, "lora:9")


def test_text_and_class_agree():
    scheme = Scheme.parse("lora:2:r=4,alpha=8,on=*.q.weight")
    assert scheme == pocktvm.LoRA(2, r=4, alpha=8, on="*.q.weight")
    assert Scheme.parse(str(scheme)) == scheme
