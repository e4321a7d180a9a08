"""ONNX files import as what they are, train as torch does, and are refused with a reason."""

import sys

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="reading .onnx needs the extra `onnx`")

from onnx import reference  # noqa: E402
from onnx_models import FLOAT, block, cnn, mlp, model, node  # noqa: E402

import pocktvm  # noqa: E402
from pocktvm.autodiff.differentiate import differentiate  # noqa: E402
from pocktvm.autodiff.losses import parse_loss  # noqa: E402
from pocktvm.autodiff.optimizers import SGD  # noqa: E402
from pocktvm.errors import PockError  # noqa: E402
from pocktvm.frontend.onnx import import_onnx  # noqa: E402
from pocktvm.frontend.resolve import resolve_model  # noqa: E402
from pocktvm.frontend.source import import_model  # noqa: E402
from pocktvm.frontend.torch import import_torch  # noqa: E402
from pocktvm.ir.scheme import Scheme  # noqa: E402
from pocktvm.reference import evaluate  # noqa: E402

CASES = {"mlp": mlp, "cnn": cnn, "block": block}
LR, STEPS = 0.05, 10


def saved(tmp_path, proto, name="m.onnx"):
    path = tmp_path / name
    onnx.save(proto, path)
    return path


def graphs(imported, scheme="full"):
    updated = Scheme.parse(scheme).resolve(imported)
    return differentiate(imported, updated, parse_loss("cross_entropy"), SGD())


def device_input(array):
    return array if array.dtype == np.float32 else array.astype("int32")


def torch_steps(case, start, labels):
    """Losses and weights after ten steps of torch's SGD."""
    p = {n: torch.from_numpy(v.copy()).requires_grad_() for n, v in start.items()}
    optimizer = torch.optim.SGD(p.values(), lr=LR)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(case.forward(p, torch.from_numpy(case.x)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: t.detach().numpy() for n, t in p.items()}


@pytest.mark.parametrize("name", CASES)
def test_forward_is_onnxs_and_ten_steps_are_torchs(name, tmp_path):
    case = CASES[name]()
    imported = import_onnx(saved(tmp_path, case.proto), batch=len(case.x))
    step, predict = graphs(imported)
    (input_name,) = imported.inputs
    x = {input_name: device_input(case.x)}
    expected = reference.ReferenceEvaluator(case.proto).run(None, {input_name: case.x})[0]
    assert imported.output_shape == expected.shape
    output = evaluate(predict, x).outputs["output"]
    np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-5)

    labels = np.arange(len(case.x)) % case.classes
    start = {n: p.value for n, p in imported.parameters.items()}
    losses, weights = torch_steps(case, start, torch.from_numpy(labels))
    feed, params, ours = {**x, "y": labels.astype("int32")}, {}, []
    for t in range(1, STEPS + 1):
        result = evaluate(step, feed, params=params, lr=LR, t=t)
        params |= result.updates
        ours.append(float(result.outputs["loss"]))
    np.testing.assert_allclose(ours, losses, rtol=1e-4)
    assert set(params) == set(weights)
    for tensor, value in weights.items():
        np.testing.assert_allclose(params[tensor], value, rtol=1e-3, atol=1e-5, err_msg=tensor)


# operator, shape of the operand, further inputs, attributes, opset
F, I = np.float32, np.int64  # noqa: E741
OPERATORS = {
    "Slice": ((3, 6), {"a": I([4]), "b": I([-9]), "c": I([1]), "d": I([-2])}, {}, 18),
    "Slice-9": ((3, 6), {}, {"starts": [1], "ends": [100], "axes": [1]}, 9),
    "Pad": ((1, 2, 3, 3), {"p": I([0, 0, 1, 0, 0, 0, 1, 2]), "v": F(0.5)}, {}, 18),
    "Pad-reflect": ((1, 2, 3, 4), {"p": I([1, 1]), "": F(0), "a": I([3])}, {"mode": "reflect"}, 18),
    "Resize": ((1, 2, 3, 3), {"": F(0), " ": F(0), "s": I([1, 2, 6, 6])}, {"mode": "linear"}, 18),
    "Resize-nearest": ((1, 2, 3, 2), {"": F(0), "s": F([1, 1, 2, 2])}, {}, 18),
    "Expand": ((3, 1), {"s": I([2, 1, 4])}, {}, 18),
    "Max": ((3, 4), {"b": F([0.1, -0.2, 0.3, 0]), "c": F(0.05)}, {}, 18),
    "Mean": ((3, 4), {"b": F([0.1, -0.2, 0.3, 0])}, {}, 18),
    "Clip-6": ((3, 4), {}, {"min": -0.5, "max": 0.25}, 8),
    "Clip": ((3, 4), {"": F(0), "hi": F(0.25)}, {}, 18),
    "LeakyRelu": ((3, 4), {}, {"alpha": 0.2}, 18),
    "HardSwish": ((3, 4), {}, {}, 18),
    "HardSigmoid": ((3, 4), {}, {"alpha": 1 / 6}, 18),
    "Elu": ((3, 4), {}, {"alpha": 0.7}, 18),
    "Selu": ((3, 4), {}, {}, 18),
    "Softplus": ((3, 4), {}, {}, 18),
    "Gelu": ((3, 4), {}, {"approximate": "tanh"}, 20),
    "AveragePool": (
        (1, 2, 5, 5), {}, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 18
    ),
    "MaxPool": (
        (1, 2, 5, 5), {}, {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, 18
    ),
    "Conv": ((1, 2, 7), {"w": np.ones((3, 2, 3), "float32"), "b": F([1, 2, 3])}, {}, 18),
    "ConvTranspose": ((1, 2, 3, 3), {"w": np.ones((2, 3, 2, 2), F)}, {"strides": [2, 2]}, 18),
    "InstanceNormalization": ((2, 3, 4), {"g": F([1, 2, 3]), "b": F([0, 1, 0])}, {}, 18),
    "GroupNormalization": (
        (1, 4, 3, 3), {"g": F([1, 2, 3, 4]), "b": F([0, 1, 0, 1])}, {"num_groups": 2}, 21
    ),
    "Gather": ((3, 4), {"i": I(-1)}, {"axis": 1}, 18),
    "Gather-many": ((3, 4), {"i": I([-1, 0, 0])}, {"axis": 1}, 18),
    "Split-11": ((4, 3), {}, {"split": [1, 3]}, 11),
    "LogSoftmax": ((3, 4), {}, {}, 18),
    "Softmax-11": ((2, 3, 4), {}, {"axis": 2}, 11),
    "ReduceL2": ((3, 4), {"a": I([1])}, {"keepdims": 0}, 18),
    "ReduceMax-11": ((3, 4), {}, {"axes": [0]}, 11),
    "Squeeze": ((3, 1, 4), {"a": I([1])}, {}, 18),
    "Unsqueeze-11": ((3, 4), {}, {"axes": [0, 3]}, 11),
    "Pow": ((3, 4), {"e": F(2)}, {}, 18),
    "Transpose": ((3, 4, 2), {}, {"perm": [2, 0, 1]}, 18),
    "Concat": ((3, 4), {"b": np.ones((3, 2), "float32")}, {"axis": 1}, 18),
    "DepthToSpace": ((1, 8, 2, 2), {}, {"blocksize": 2, "mode": "CRD"}, 18),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_onnxs_and_has_a_gradient(name, tmp_path):
    shape, stored, attrs, opset = OPERATORS[name]
    operator = name.partition("-")[0]
    given = {f"/c{i}": np.asarray(a) for i, (n, a) in enumerate(stored.items()) if n.strip()}
    names = [f"/c{i}" if n.strip() else "" for i, n in enumerate(stored)]
    outputs = ["y", "z"] if operator == "Split" else ["y"]
    nodes = [
        node("Mul", "x w", "h"),
        onnx.helper.make_node(operator, ["h", *names], outputs, name="op", **attrs),
        node("Identity", outputs[-1], "out"),
    ]
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape).astype("float32")
    proto = model(nodes, [("x", FLOAT, list(shape))], ["out"], {"w": weight, **given}, opset)
    x = rng.standard_normal(shape).astype("float32")
    (expected,) = reference.ReferenceEvaluator(proto).run(None, {"x": x})
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.shape.dim.extend(
        [onnx.TensorShapeProto.Dimension() for _ in expected.shape]
    )
    imported = import_onnx(saved(tmp_path, proto))
    updated = Scheme({"w": 1}).resolve(imported)
    _, predict = differentiate(imported, updated, parse_loss("mse"), SGD())
    output = evaluate(predict, {"x": x}).outputs["output"]
    np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-5)


def test_structure_of_a_convolutional_net(tmp_path):
    imported = import_onnx(saved(tmp_path, cnn().proto), mean=(1, 2, 3), scale=(1, 1, 1))
    assert imported.blocks == ("blocks.0", "blocks.1")
    assert set(imported.classifier) == {"head.fc.weight", "head.fc.bias"}
    assert imported.shifts == {
        "blocks.0.conv.weight": "blocks.0.bn.bias",
        "blocks.1.conv.weight": "blocks.1.bn.bias",
    }
    names = set(imported.parameters)
    assert not {n for n in names if "running" in n} and not {"low", "high"} & names
    assert imported.inputs["x"].mean == (1, 2, 3)
    learned = Scheme.bias(1).resolve(imported)
    assert set(learned) == {
        "blocks.1.conv.bias", "blocks.1.bn.bias", "head.fc.weight", "head.fc.bias"
    }  # fmt: skip


def test_structure_without_blocks_or_layer_names(tmp_path):
    imported = import_onnx(saved(tmp_path, block().proto), batch=3)
    assert imported.blocks == ()
    assert set(Scheme.parse("last").resolve(imported)) == {"head", "head.bias"}
    assert imported.inputs["ids"].bound == 11 and imported.inputs["ids"].dtype == "int32"
    assert not [n for n in imported.parameters if "Constant" in n]
    assert any("onnx::MatMul_9" in line for line in imported.notices)


def test_the_batch_is_the_callers_or_the_files(tmp_path):
    opened, fixed = saved(tmp_path, mlp().proto), saved(tmp_path, mlp(4).proto, "fixed.onnx")
    source = resolve_model(str(opened), batch=5)
    assert source.name == "m" and [tuple(t.shape) for t in source.example_inputs] == [(5, 6)]
    assert resolve_model(str(fixed)).example_inputs == ()
    for inputs in ((), None, np.zeros((4, 6)), {"x": np.zeros((4, 6))}):
        assert import_model(fixed, inputs).output_shape == (4, 3)
    assert import_model(str(opened), source.example_inputs).output_shape == (5, 3)
    with pytest.raises(PockError, match=r"its batch is open.\n.*--batch"):
        resolve_model(str(opened))
    with pytest.raises(PockError, match=r"is fixed to \[4, 6\]"):
        resolve_model(str(fixed), batch=5)
    with pytest.raises(PockError, match="leave out --weights"):
        resolve_model(str(fixed), weights=tmp_path / "w.safetensors")
    square = model([node("Relu", "x", "y")], [("x", FLOAT, ["n", 3, "h"])], ["y"], {})
    with pytest.raises(PockError, match="dimension 2 is open"):
        import_onnx(saved(tmp_path, square), batch=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "spec", ["cnn:channels=4,depth=2,image=8", "vit-tiny:depth=2,dim=16,heads=2,image=32"]
)
def test_what_torch_exports_is_the_torch_model(spec, tmp_path):
    source, path = resolve_model(spec, batch=2), tmp_path / "m.onnx"
    try:
        torch.onnx.export(
            source.module.eval(), source.example_inputs, str(path), dynamo=False,
            opset_version=17, do_constant_folding=False, input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    except (ImportError, TypeError) as error:
        pytest.skip(f"this torch does not export without onnxscript: {error}")
    ours, theirs = import_onnx(path, batch=2), import_torch(source.module, source.example_inputs)
    assert set(ours.parameters) == set(theirs.parameters)
    for name, parameter in theirs.parameters.items():
        assert np.array_equal(ours.parameters[name].value, parameter.value)
    assert ours.blocks == theirs.blocks and ours.shifts == dict(theirs.shifts)
    last = Scheme.parse("last")
    assert set(last.resolve(ours)) == set(last.resolve(theirs))
    (x,) = source.example_inputs
    output = evaluate(graphs(ours, "last")[1], {"x": x.numpy()}).outputs["output"]
    np.testing.assert_allclose(output, source.module(x).detach(), rtol=1e-4, atol=1e-5)


def test_weights_merged_by_the_exporter_learn_apart(tmp_path):
    ones = {"n1.weight": np.ones(4, "float32"), "n1.bias": np.zeros(4, "float32")}
    nodes = [
        node("Identity", "n1.weight", "n2.weight"),
        node("LayerNormalization", "x n1.weight n1.bias", "h"),
        node("Relu", "h", "r"),
        node("LayerNormalization", "r n2.weight n1.bias", "y"),
    ]
    proto = model(nodes, [("x", FLOAT, [3, 4])], ["y"], ones)
    imported = import_onnx(saved(tmp_path, proto))
    assert list(imported.parameters) == ["n1.weight", "n1.bias", "n2.weight"]
    step, _ = graphs(imported)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype("float32")
    updates = evaluate(step, {"x": x, "y": np.array([0, 1, 2], "int32")}, lr=1.0).updates
    assert not np.allclose(updates["n1.weight"], updates["n2.weight"])


def test_unsupported_operators_are_listed_together(tmp_path):
    nodes = [node("Det", "x", "a"), node("LSTM", "x w r", "b"), node("Relu", "x", "y")]
    nodes.insert(1, onnx.helper.make_node("Magic", ["x"], ["c"], "m", domain="com.acme"))
    w = {"w": np.ones((1, 8, 3), "float32"), "r": np.ones((1, 8, 2), "float32")}
    proto = model(nodes, [("x", FLOAT, [3, 3, 3])], ["y"], w)
    proto.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    with pytest.raises(PockError, match="3 operators") as error:
        import_onnx(saved(tmp_path, proto))
    assert all(text in str(error.value) for text in ("Det", "LSTM", "com.acme.Magic"))


def test_damaged_files_and_other_refusals(tmp_path):
    path = saved(tmp_path, mlp(4).proto)
    whole = path.read_bytes()
    for content in (b"", b"not a protobuf, not a model", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(PockError, match=r"is not an? (valid )?ONNX model"):
            import_onnx(path)
    with pytest.raises(PockError, match="there is no ONNX file"):
        import_onnx(tmp_path / "none.onnx")
    x = [("x", FLOAT, [2, 3])]
    two = model([node("Relu", "x", "y"), node("Abs", "x", "z")], x, ["y", "z"], {})
    with pytest.raises(PockError, match=r"has 2 outputs \(y, z\)"):
        import_onnx(saved(tmp_path, two))
    late = model([node("Relu", "x", "y")], x, ["y"], {}, opset=99)
    with pytest.raises(PockError, match="uses opset 99"):
        import_onnx(saved(tmp_path, late))
    half = model([node("Mul", "x w", "y")], x, ["y"], {"w": np.ones(3)})
    with pytest.raises(PockError, match="is float64"):
        import_onnx(saved(tmp_path, half))


def test_without_the_package_the_command_is_named(tmp_path, monkeypatch):
    path = saved(tmp_path, mlp(4).proto)
    monkeypatch.setitem(sys.modules, "onnx.checker", None)
    with pytest.raises(PockError, match=r"pip install onnx"):
        resolve_model(str(path))


@pytest.mark.build
def test_an_artifact_trains_as_torch_does(tmp_path):
    case = mlp()
    path = saved(tmp_path, case.proto)
    imported = import_onnx(path, batch=4)
    start = {n: p.value for n, p in imported.parameters.items()}
    labels = np.arange(4) % 3
    losses, weights = torch_steps(case, start, torch.from_numpy(labels))
    source = resolve_model(str(path), batch=4)
    artifact = pocktvm.compile(path, source.example_inputs, out=tmp_path / "artifact")
    with artifact.load() as trainer:
        ours = [trainer.step(case.x, labels, lr=LR) for _ in range(STEPS)]
        state = trainer.state_dict()
    np.testing.assert_allclose(ours, losses, rtol=1e-4)
    for tensor, value in weights.items():
        np.testing.assert_allclose(state[tensor], value, rtol=1e-3, atol=1e-5, err_msg=tensor)
