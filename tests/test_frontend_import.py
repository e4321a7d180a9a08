"""import_torch beyond the zoo: names, structure, notices, refusals; MODEL and weights."""

import textwrap

import numpy as np
import pytest
import torch
from frontend_tools import Lambda, run_models
from safetensors.torch import save_file
from torch import nn

from pocktvm.errors import PockError
from pocktvm.frontend.resolve import resolve_model
from pocktvm.frontend.torch import import_torch


class Part(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.25)

    def forward(self, x):
        return self.drop(torch.relu(self.norm(self.fc(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6)))
        self.body = nn.ModuleList(Part(6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 4)
        self.unused = nn.Parameter(torch.zeros(2))
        self.body[0].fc.weight.requires_grad_(False)

    def forward(self, features, mask=None):
        x = self.pair(features)
        for part in self.body:
            x = part(x)
        return self.out(self.norm(x))


ROWS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    module = Net().train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    model = import_torch(module, (ROWS,))
    return module, before, model


def test_module_is_not_mutated(net):
    module, before, _ = net
    assert module.training and module.body[0].norm.training
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_training_mode_is_imported_as_inference_and_said(net):
    module, _, model = net
    expected = import_expected(module)
    output = run_models({"net": model}, {"net": (ROWS,)})["net"]
    np.testing.assert_allclose(output, expected, atol=1e-5)
    assert len(model.notices) == 2
    assert "3 batch norms use their stored statistics" in model.notices[0]
    assert "dropout (p up to 0.25" in model.notices[1]


def import_expected(module):
    import copy

    with torch.no_grad():
        return copy.deepcopy(module).eval()(ROWS).numpy()


def test_structure(net):
    module, _, model = net
    assert list(model.parameters) == [n for n, _ in module.named_parameters()]
    assert list(model.inputs) == ["features"]
    assert model.blocks == ("body.0", "body.1", "body.2")  # longer than `pair`
    assert model.classifier == ("out",)  # the norm in front of it is a feature
    assert not model.parameters["body.0.fc.weight"].requires_grad
    assert model.parameters["body.1.fc.weight"].requires_grad


def test_functional_dropout_is_left_out():
    x = torch.ones(2, 6)
    model = import_torch(Lambda(lambda x: nn.functional.dropout(x, 0.5) * 2), (x,))
    assert (run_models({"m": model}, {"m": (x,)})["m"] == 2).all()
    assert any("dropout" in notice for notice in model.notices)


def test_inputs_by_name_and_half_precision():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(6, dtype=torch.float16))

        def forward(self, left, right):
            return (left - right) * self.w.to(left.dtype)

    model = import_torch(Two(), {"right": ROWS, "left": ROWS * 3})
    assert sorted(model.inputs) == ["left", "right"]
    assert model.parameters["w"].value.dtype == np.float32
    assert "float16" in model.notices[0]


@pytest.mark.parametrize(
    ("function", "x", "words"),
    [
        (lambda x: (x, x), ROWS, ["returns 2 values", "one tensor"]),
        (lambda x: x.argmax(1), ROWS, ["int64", "float32"]),
        (lambda x: x.float(), ROWS > 0, ["is bool", "Convert"]),
        (lambda x: x if x.sum() > 0 else -x, ROWS, ["torch.export cannot trace"]),
        (lambda x: x @ x, ROWS, ["torch.export cannot trace"]),
    ],
)
def test_refusals(function, x, words):
    with pytest.raises(PockError) as caught:
        import_torch(Lambda(function), (x,))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 25


def test_nan_weights_are_refused():
    linear = nn.Linear(6, 2)
    linear.weight.data[0, 0] = float("nan")
    with pytest.raises(PockError, match=r"weight' holds NaN"):
        import_torch(linear, (ROWS,))


# --- MODEL ---------------------------------------------------------------------------------------

FILE = """
import torch
from torch import nn
import helper

def net(batch=4):
    return nn.Linear(helper.WIDTH, 2), (torch.zeros(batch, helper.WIDTH),)

def fixed():
    return nn.Linear(3, 2), (torch.zeros(5, 3),)

def alone():
    return nn.Linear(3, 2)

def broken():
    raise ValueError("no such table")

def needy(width, batch):
    return None
"""


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "helper.py").write_text("WIDTH = 3\n")
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(FILE))
    return path


def test_users_function(user_file):
    source = resolve_model(f"{user_file}:net")
    assert source.example_inputs[0].shape == (4, 3)
    assert source.name == "mine_net" and source.loss == "cross_entropy"
    assert resolve_model(f"{user_file}:net", batch=7).example_inputs[0].shape == (7, 3)
    assert resolve_model(f"{user_file}:fixed").example_inputs[0].shape == (5, 3)


@pytest.mark.parametrize(
    ("function", "batch", "words"),
    [
        (":nett", None, ["no function 'nett'", "nearest: net"]),
        ("", None, ["names no function", "mine.py:function"]),
        (":alone", None, ["returned a Linear", "(module, example_inputs)"]),
        (":broken", None, ["ValueError: no such table", "mine.py, line 16"]),
        (":fixed", 2, ["takes no batch="]),
        (":needy", None, ["needs arguments (width, batch)"]),
    ],
)
def test_users_mistakes(user_file, function, batch, words):
    with pytest.raises(PockError) as caught:
        resolve_model(f"{user_file}{function}", batch=batch)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_files_that_do_not_load(tmp_path):
    with pytest.raises(PockError, match="there is no file"):
        resolve_model(f"{tmp_path}/none.py:net")
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\ndef net(:\n")
    with pytest.raises(PockError, match=r"SyntaxError.*bad.py, line 2"):
        resolve_model(f"{bad}:net")
    bad.write_text("import nowhere_to_be_found\n")
    with pytest.raises(PockError, match=r"ModuleNotFoundError.*line 1"):
        resolve_model(f"{bad}:net")


# --- weights -------------------------------------------------------------------------------------


def test_weights_by_name(tmp_path):
    source = resolve_model("cnn:image=16,seed=3", batch=1)
    path = tmp_path / "w.safetensors"
    state = source.module.state_dict()
    save_file(state, path)
    loaded = resolve_model("cnn:image=16", batch=1, weights=path).module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())

    changed = dict(state)
    changed["fc.scale"] = changed.pop("fc.bias")
    changed["fc.weight"] = torch.zeros(3, 3)
    save_file(changed, path)
    with pytest.raises(PockError) as caught:
        resolve_model("cnn:image=16", batch=1, weights=path)
    text = str(caught.value)
    assert "missing in the file: fc.bias" in text
    assert "not in the model: fc.scale" in text
    assert "fc.weight: [3, 3] in the file, [10, 64] in the model" in text


def test_weights_of_a_tied_head_need_one_name(tmp_path):
    spec = "stories260k:depth=1,tokens=8"
    state = resolve_model(f"{spec},seed=5", batch=1).module.state_dict()
    path = tmp_path / "w.safetensors"
    save_file({"tok_embeddings.weight": state.pop("fc.weight"), **_without(state)}, path)
    module = resolve_model(spec, batch=1, weights=path).module
    assert torch.equal(module.fc.weight, state["tok.weight"])


def _without(state):
    return {name: tensor for name, tensor in state.items() if name != "tok.weight"}


def test_weights_that_are_none(tmp_path):
    with pytest.raises(PockError, match="no file of weights"):
        resolve_model("mlp", weights=tmp_path / "none.safetensors")
    path = tmp_path / "torn.safetensors"
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(PockError, match="cannot be read as safetensors"):
        resolve_model("mlp", weights=path)


def test_torchvision_and_hugging_face_names():
    from pocktvm.models import bert, llama, mobilenetv2, resnet

    assert mobilenetv2.zoo_name("features.1.conv.1.weight") == "blocks.0.pw2.0.weight"
    assert mobilenetv2.zoo_name("features.1.conv.2.bias") == "blocks.0.pw2.1.bias"
    assert mobilenetv2.zoo_name("features.4.conv.1.1.running_var") == "blocks.3.dw.1.running_var"
    assert mobilenetv2.zoo_name("features.18.1.weight") == "head.1.weight"
    stages = resnet.STAGES[50]
    assert resnet.zoo_name("layer2.0.downsample.1.bias", stages) == "blocks.3.down.1.bias"
    assert resnet.zoo_name("layer4.2.bn3.weight", stages) == "blocks.15.c3.1.weight"
    assert resnet.zoo_name("conv1.weight", stages) == "stem.0.weight"
    name = "distilbert.transformer.layer.1.attention.q_lin.weight"
    assert bert.zoo_name(name) == "blocks.1.q.weight"
    assert bert.zoo_name("bert.encoder.layer.0.output.LayerNorm.bias") == "blocks.0.ln2.bias"
    assert llama.zoo_name("layers.3.feed_forward.w3.weight") == "blocks.3.w3.weight"
