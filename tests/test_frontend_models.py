"""The zoo: imported models compute what torch computes, under torch's names."""

import numpy as np
import pytest
import torch
from frontend_tools import data_folder, run_models
from torch import nn

from pocktvm.errors import PockError
from pocktvm.frontend.resolve import resolve_model
from pocktvm.frontend.torch import import_torch
from pocktvm.ir.scheme import Scheme
from pocktvm.models import MODELS, build

pytestmark = pytest.mark.build

SMALL_TEXT = "depth=2,dim=32,heads=4,hidden=48,vocab=60,tokens=8"
ZOO = {
    "mlp": "mlp:hidden=24",
    "cnn": "cnn:image=16,channels=8",
    "mobilenetv2": "mobilenetv2:width=0.35,image=32",
    "mobilenetv2-same": "mobilenetv2:width=0.35,image=32,padding=same,bn=folded",
    "mcunet": "mcunet:image=32",
    "resnet18": "resnet18:image=32",
    "resnet50": "resnet50:image=32",
    "vit-tiny": "vit-tiny:image=32,depth=2,dim=48",
    "bert": f"bert:{SMALL_TEXT},positions=16",
    "distilbert": f"distilbert:{SMALL_TEXT},positions=16",
    "minilm": f"minilm:{SMALL_TEXT},positions=16",
    "llama": f"llama:{SMALL_TEXT},rope=half,tied=no",
    "stories260k": "stories260k:tokens=16,depth=2",
}
BLOCKS = {"mlp": 3, "cnn": 3, "mcunet": 14, "resnet18": 8, "resnet50": 16}


# Many convolution shapes: TVM takes 6 s of CPU to compile each of these without a schedule.
SLOW = ("mobilenetv2", "mcunet", "resnet50")


@pytest.fixture(scope="module")
def zoo():
    sources = {name: resolve_model(spec, batch=2) for name, spec in ZOO.items()}
    models = {
        name: import_torch(s.module, s.example_inputs, name=name, scheme=s.scheme)
        for name, s in sources.items()
    }
    return sources, models


@pytest.fixture(scope="module")
def outputs(zoo):
    sources, models = zoo
    fast = {name: model for name, model in models.items() if name not in SLOW}
    return run_models(fast, {name: s.example_inputs for name, s in sources.items()})


def test_every_zoo_model_is_here():
    assert set(MODELS) <= set(ZOO)


def check_forward(source, model, output, tolerance=1e-5):
    with torch.no_grad():
        expected = source.module(*source.example_inputs).numpy()
    assert model.output_shape == expected.shape
    assert 1e-3 < expected.std() < 10  # neither vanished nor exploded on the way
    np.testing.assert_allclose(output, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in SLOW])
def test_forward_equals_torch(zoo, outputs, name):
    sources, models = zoo
    check_forward(sources[name], models[name], outputs[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_forward_of_large_models_equals_torch(zoo, name):
    source, model = zoo[0][name], zoo[1][name]
    output = run_models({name: model}, {name: source.example_inputs})[name]
    # The virtual machine sums ResNet-50's 4608-term dot products one by one, in float32.
    check_forward(source, model, output, 5e-5 if name == "resnet50" else 1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_names_blocks_classifier(zoo, name):
    sources, models = zoo
    model, module = models[name], sources[name].module
    assert list(model.parameters) == [n for n, _ in module.named_parameters()]
    expected = BLOCKS.get(name, 17 if name.startswith("mobilenetv2") else 2)
    assert model.blocks == tuple(f"blocks.{i}" for i in range(expected))
    pre = ("pre",) if name in ("bert", "distilbert") else ()
    assert model.classifier == (*pre, "fc")
    main = model.module["main"]
    shapes = [tuple(int(d) for d in p.ty.shape.values) for p in main.params]
    assert shapes[len(model.inputs) :] == [p.value.shape for p in model.parameters.values()]
    assert set(model.layers.values()) - {""} <= {n for n, _ in module.named_modules()}


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet50"])
def test_shifts_name_the_norm_behind_each_convolution(zoo, name):
    _, models = zoo
    convs = [n for n, p in models[name].parameters.items() if p.value.ndim == 4]
    assert models[name].shifts == {n: n.replace(".0.weight", ".1.bias") for n in convs}


def test_tied_weights_are_one_parameter(zoo):
    model = zoo[1]["stories260k"]
    assert "fc.weight" not in model.parameters
    assert model.parameters["tok.weight"].aliases == ("fc.weight",)
    assert zoo[1]["llama"].parameters["tok.weight"].aliases == ()


def test_token_inputs_are_bounded_by_the_vocabulary(zoo):
    ids = zoo[1]["bert"].inputs["ids"]
    assert (ids.dtype, ids.bound, ids.shape) == ("int32", 60, (2, 8))
    assert zoo[1]["mlp"].inputs["x"].bound is None


def test_padding_index_is_reported(zoo):
    assert zoo[1]["minilm"].padding == {"tok.weight": 0}
    assert zoo[1]["bert"].padding == {}


def test_pixels_are_read_as_the_zoo_says():
    source = resolve_model("cnn:image=8,channels=4", batch=1)
    model = import_torch(source.module, source.example_inputs, mean=source.mean, scale=source.scale)
    assert model.inputs["x"].mean == (127.5,) * 3
    assert model.inputs["x"].scale == (1 / 127.5,) * 3


# --- published schemes: the sets the paper names -------------------------------------------------


def learning(model):
    return set(Scheme.parse("pockengine").resolve(model))


def learning_in(spec):
    source = resolve_model(spec, batch=1)
    return learning(import_torch(source.module, source.example_inputs, scheme=source.scheme))


def test_scheme_of_mobilenetv2(zoo):
    model = zoo[1]["mobilenetv2"]
    names = learning(model)
    expected = {n for n in model.parameters if n.startswith("fc.")}
    for block in range(10, 17):
        expected |= {f"blocks.{block}.{part}.1.bias" for part in ("pw1", "dw", "pw2")}
        expected.add(f"blocks.{block}.pw1.0.weight")
    assert names == expected


def test_scheme_of_resnet50(zoo):
    model = zoo[1]["resnet50"]
    names = learning(model)
    expected = {"fc.weight", "fc.bias"}
    for block in range(8, 16):
        parts = ["c1", "c2", "c3"] + (["down"] if block == 13 else [])
        expected |= {f"blocks.{block}.{part}.1.bias" for part in parts}
        expected.add(f"blocks.{block}.c1.0.weight")
    assert names == expected & set(model.parameters)
    assert len(names) == 2 + 8 * 4 + 1


def test_scheme_of_the_six_layer_encoder():
    text = "dim=32,heads=4,hidden=48,vocab=60,tokens=8,positions=16"
    names = learning_in(f"distilbert:{text}")
    leaves = ("q", "k", "v", "o", "f1", "f2", "ln1", "ln2")
    expected = {f"blocks.{b}.{leaf}.bias" for b in (3, 4, 5) for leaf in leaves}
    expected |= {f"blocks.{b}.{m}.weight" for b in (4, 5) for m in ("q", "k", "v", "o", "f1")}
    assert names == expected | {f"{m}.{p}" for m in ("pre", "fc") for p in ("weight", "bias")}


def test_scheme_of_llama():
    names = learning_in("llama:dim=32,heads=4,hidden=48,vocab=60,tokens=8")
    matrices = ("q", "k", "v", "o", "w1")
    assert names == {f"blocks.{b}.{m}.weight" for b in range(1, 6) for m in matrices}


# --- seeds ----------------------------------------------------------------------------------------


def test_weights_are_seeded_and_the_callers_generator_untouched():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = build("mobilenetv2", {"width": "0.35"}, 2)
    assert torch.equal(torch.get_rng_state(), before)
    second = build("mobilenetv2", {"width": "0.35", "image": "64"}, 1)
    other = build("mobilenetv2", {"width": "0.35", "seed": "1"}, 2)
    pairs = zip(first.module.parameters(), second.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.module.fc.weight, other.module.fc.weight)
    norms = [m for m in first.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.running_mean.abs().max() > 1e-3 and m.running_var.min() > 0 for m in norms)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mobilenetv3", ["no zoo model", "nearest: mobilenetv2"]),
        ("mobilenetv2:widht=2", ["no option 'widht'", "nearest: width", "classes=10"]),
        ("mobilenetv2:width=wide", ["width is a number"]),
        ("mobilenetv2:classes=0", ["classes is a whole number"]),
        ("mobilenetv2:padding=valid", ["torch, same"]),
        ("mobilenetv2:width", ["width=VALUE"]),
        ("vit-tiny:image=30", ["multiple of patch"]),
        ("bert:tokens=600", ["positions=512"]),
    ],
)
def test_wrong_zoo_names(spec, words):
    with pytest.raises(PockError) as caught:
        resolve_model(spec, batch=1)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- published weights ----------------------------------------------------------------------------

FOLDED = "mobilenetv2-0.35/mobilenetv2_0.35_features_folded_fp32.safetensors"
STORED = "mobilenetv2-0.35/mobilenetv2_0.35_features_torchvision_keys_fp32.safetensors"
FULL = "mobilenetv2-1.0/mobilenetv2_1.0_imagenet_folded_fp32.safetensors"
MCUNET = "mcunet-5fps/mcunet-5fps_imagenet_folded_fp32.safetensors"
MINILM = "minilm-l6-pruned/minilm_l6_vocabpruned_fp16.safetensors"
STORIES = "stories260K/stories260K_fp32.safetensors"


@pytest.mark.data
def test_folded_and_unfolded_files_agree():
    options = "width=0.35,padding=same,head=new,image=96"
    folded = resolve_model(
        f"mobilenetv2:{options},bn=folded", batch=1, weights=data_folder() / FOLDED
    )
    stored = resolve_model(
        f"mobilenetv2:{options},eps=0.001", batch=1, weights=data_folder() / STORED
    )
    with torch.no_grad():
        a, b = (s.module.head(_features(s)) for s in (folded, stored))
    assert a.max() > 0.1
    np.testing.assert_allclose(a, b, atol=1e-4)


def _features(source):
    x = source.module.stem(source.example_inputs[0] * 0.3)
    for block in source.module.blocks:
        x = block(x)
    return x


@pytest.mark.data
@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        ("mobilenetv2:classes=1000,padding=same,bn=folded,pixels=128", FULL),
        ("mcunet:classes=1000,bn=folded", MCUNET),
    ],
)
def test_imagenet_weights_know_frogs_and_trucks(spec, weights):
    """On images enlarged from 32 pixels; chance is 4 %."""
    frogs, trucks = {30, 31, 32}, {555, 569, 586, 654, 656, 675, 717, 734, 779, 864, 867, 874}
    source = resolve_model(spec, batch=1, weights=data_folder() / weights)
    data = np.load(data_folder() / "cifar10-5k" / "cifar10_5k_1k_uint8.npz")
    mean, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (source.mean, source.scale))
    hits = []
    for label, classes in ((6, frogs), (9, trucks)):
        pixels = data["x_test"][data["y_test"] == label][:30]
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, size=128, mode="bicubic").clamp(0, 255)
        with torch.no_grad():
            best = source.module((x - mean) * scale).topk(5, 1)[1].tolist()
        hits += [bool(classes & set(row)) for row in best]
    assert np.mean(hits) > 0.2


@pytest.mark.data
def test_minilm_loads_and_ignores_padding():
    spec = "minilm:vocab=19481,positions=256,tokens=16,head=new"
    source = resolve_model(spec, batch=1, weights=data_folder() / MINILM)
    ids = torch.randint(1, 19481, (1, 16), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 8, dtype=torch.long)], 1)
    with torch.no_grad():
        np.testing.assert_allclose(source.module(ids), source.module(padded), atol=1e-5)
    assert source.module.tok.weight.dtype == torch.float32


@pytest.mark.data
def test_stories_predicts_text():
    source = resolve_model("stories260k", batch=1, weights=data_folder() / STORIES)
    ids = [1]
    with torch.no_grad():
        for _ in range(40):
            ids.append(int(source.module(torch.tensor([ids]))[0, :, -1].argmax()))
        logits = source.module(torch.tensor([ids]))[0].T
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    pieces = _vocabulary()
    text = "".join(pieces[i] for i in ids[1:])
    assert loss < 1.5 and "was" in text and " a " in text, text


def _vocabulary():
    import json

    return [
        piece for piece, _ in json.loads((data_folder() / "stories260K/tok512.json").read_text())
    ]
