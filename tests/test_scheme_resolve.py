"""Schemes choose what the contract says, and refuse with the next step."""

import numpy as np
import pytest

from pocktvm.errors import PockError
from pocktvm.ir.model import Input, Model, Parameter
from pocktvm.ir.scheme import Scheme


def make_model(blocks=4, scheme=None, frozen=(), classifier=("fc",), tied=False):
    shapes = {"stem.weight": (8, 3, 3, 3), "bn.weight": (8,), "bn.bias": (8,)}
    shifts = {"stem.weight": "bn.bias"}
    for i in range(blocks):
        shapes |= {
            f"blocks.{i}.conv1.weight": (16, 8, 1, 1),
            f"blocks.{i}.bn1.weight": (16,),
            f"blocks.{i}.bn1.bias": (16,),
            f"blocks.{i}.lin.weight": (8, 16),
            f"blocks.{i}.lin.bias": (8,),
        }
        shifts[f"blocks.{i}.conv1.weight"] = f"blocks.{i}.bn1.bias"
    shapes |= {"fc.weight": (10, 8), "fc.bias": (10,)}
    parameters = {
        name: Parameter(
            name,
            np.zeros(shape, np.float32),
            requires_grad=name not in frozen,
            aliases=("tied.weight",) if tied and name == "stem.weight" else (),
        )
        for name, shape in shapes.items()
    }
    return Model(
        name="toy",
        module=None,
        inputs={"x": Input("x", (2, 3, 8, 8), "float32")},
        parameters=parameters,
        output_shape=(2, 10),
        blocks=tuple(f"blocks.{i}" for i in range(blocks)),
        classifier=classifier,
        scheme=scheme,
        shifts=shifts,
    )


def learns(scheme, model=None):
    return set(Scheme.parse(scheme).resolve(model or make_model()))


CLASSIFIER = {"fc.weight", "fc.bias"}


def test_full_trains_everything_in_order():
    model = make_model()
    updated = Scheme.full().resolve(model)
    assert list(updated) == list(model.parameters)
    assert set(updated.values()) == {1.0}


def test_last_is_the_classifier():
    assert learns("last") == CLASSIFIER
    assert learns("last", make_model(classifier=())) == CLASSIFIER


def test_bias_takes_biases_and_shifts_of_the_last_blocks():
    assert learns("bias:2") == CLASSIFIER | {
        f"blocks.{i}.{n}" for i in (2, 3) for n in ("bn1.bias", "lin.bias")
    }
    assert learns("bias:0") == CLASSIFIER


def test_a_shift_outside_the_block_belongs_to_its_conv():
    model = make_model()
    model.shifts["blocks.3.conv1.weight"] = "bn.bias"
    assert "bn.bias" in learns("bias:1", model)


def test_blocks_takes_whole_blocks():
    assert learns("blocks:1") == CLASSIFIER | {
        f"blocks.3.{n}"
        for n in ("conv1.weight", "bn1.weight", "bn1.bias", "lin.weight", "lin.bias")
    }


def test_too_many_blocks_says_how_many_there_are():
    with pytest.raises(PockError, match=r"asks for 5 blocks; 'toy' has 4 blocks"):
        learns("bias:5")
    with pytest.raises(PockError, match="no repeated blocks"):
        learns("blocks:1", make_model(blocks=0))


def test_pockengine_is_the_published_mapping_where_there_is_one():
    assert learns("pockengine", make_model(scheme={"blocks.1.lin.*": 1})) == {
        "blocks.1.lin.weight",
        "blocks.1.lin.bias",
    }


def test_pockengine_elsewhere_is_biases_and_first_matrix_of_the_later_half():
    expected = {f"blocks.{i}.{n}" for i in (2, 3) for n in ("bn1.bias", "lin.bias", "conv1.weight")}
    assert learns("pockengine") == expected | CLASSIFIER
    assert learns("pockengine", make_model(blocks=0)) >= CLASSIFIER


def test_last_match_wins_and_the_rest_is_frozen():
    assert learns({"blocks.*": 1, "*.weight": 0, "blocks.0.lin.weight": True}) == {
        f"blocks.{i}.{n}" for i in range(4) for n in ("bn1.bias", "lin.bias")
    } | {"blocks.0.lin.weight"}


def test_patterns_match_case_and_only_names_that_match():
    with pytest.raises(PockError, match="matches none"):
        learns({"FC.*": 1})


def test_an_alias_trains_the_one_tensor():
    assert learns({"tied.*": 1}, make_model(tied=True)) == {"stem.weight"}


def test_a_convs_missing_bias_is_the_shift_behind_it():
    assert learns({"blocks.0.conv1.bias": 1}) == {"blocks.0.bn1.bias"}
    assert learns({"blocks.0.conv1.*": 1}) == {"blocks.0.conv1.weight"}


def test_a_pattern_without_match_names_the_nearest():
    with pytest.raises(PockError, match=r"blocks\.1\.lin\.weight"):
        learns({"block.1.lin.weight": 1})


def test_requires_grad_false_freezes_whatever_the_scheme_says():
    assert learns({"fc.*": 1}, make_model(frozen=("fc.weight",))) == {"fc.bias"}
    with pytest.raises(PockError, match="requires_grad"):
        learns("last", make_model(frozen=CLASSIFIER))


def test_a_scheme_that_trains_nothing_is_refused():
    with pytest.raises(PockError, match="trains nothing"):
        learns({"fc.*": 0})
    with pytest.raises(PockError, match="no tensor"):
        Scheme({})


@pytest.mark.parametrize(
    ("value", "axis", "indices"),
    [(0.25, 1, 2), ("out:0.5", 0, 5), ([0, 3, 5], 1, 3), ("out: [1, 9]", 0, 2), ("in:0.5", 1, 4)],
)
def test_parts_of_tensors_say_which_axis_and_channels(value, axis, indices):
    part = Scheme({"fc.weight": value}).resolve(make_model())["fc.weight"]
    assert (part.axis, len(part.indices)) == (axis, indices)
    assert part == indices / (10, 8)[axis]


def test_all_or_none_of_the_channels_is_1_or_0():
    assert Scheme({"fc.*": 0.5, "fc.weight": "out:1", "fc.bias": 0.0}).mapping == {
        "fc.*": 0.5, "fc.weight": 1, "fc.bias": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [2, -1, "half", "out:3", [], [1, 1], [-1], None, "left:0.5", "out:[]", "best:0.5", "out:[1"],
)
def test_values_that_mean_nothing_are_refused(value):
    with pytest.raises(PockError, match="expected 1, 0"):
        Scheme({"fc.weight": value})


def test_toml_with_table_or_bare_and_dotted_keys(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('[about]\nfrom = "hand"\n[update]\n"blocks.[12].*" = 1\nfc.weight = 1\n')
    expected = {n for n in make_model().parameters if n.startswith(("blocks.1.", "blocks.2."))}
    assert learns(str(path)) == expected | {"fc.weight"}
    path.write_text('"fc.*" = 1\n')
    assert learns(path) == CLASSIFIER
    path.write_text('[update]\n"fc.*" = 1\n[other]\nx = 1\n')
    with pytest.raises(PockError, match="beside"):
        Scheme.from_toml(path)


def test_bad_files_and_texts_are_one_message(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text("= =")
    for spec in (str(path), str(tmp_path / "none.toml"), "{not json", "bias:x", "fulll", "", 3):
        with pytest.raises(PockError):
            Scheme.parse(spec)
    with pytest.raises(PockError, match="Did you mean 'full'"):
        Scheme.parse("fulll")


def test_inline_json_and_text_forms():
    assert learns('{"fc.*": 1}') == CLASSIFIER
    assert str(Scheme.bias(2)) == "bias:2" == str(Scheme.parse(" bias:2 "))
    assert str(Scheme({"fc.*": 1})) == '{"fc.*": 1}'
    assert Scheme.parse("full") == Scheme.full()


def test_auto_without_an_analysis_says_so():
    with pytest.raises(PockError, match="analysis"):
        learns("auto")
