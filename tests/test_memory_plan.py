"""The planner against brute force, and the verifier against plans broken on purpose."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocktvm.errors import InternalError, PockError
from pocktvm.ir.graph import Param
from pocktvm.ir.kernels import ALIGN, Buffer, Call, Kernel, Kernels, Program
from pocktvm.memory import check_budget, plan, timeline, verify
from pocktvm.memory.lifetimes import Block, Range, live_ranges
from pocktvm.memory.pack import live_bytes, pack


class Builder:
    """Programs by hand: `b.call(reads, {output: nbytes})`."""

    def __init__(self):
        self.calls, self.buffers, self.inputs = [], {}, []
        self.kernels, self.params, self.consts = {}, {}, {}

    def buffer(self, name, nbytes, kind="activation", alias=None):
        self.buffers[name] = Buffer(name, (nbytes,), "uint8", nbytes, kind, alias)
        return name

    def input(self, name, nbytes):
        self.inputs.append(self.buffer(name, nbytes, "input"))
        return name

    def param(self, name, nbytes, kind="trained"):
        self.params[name] = Param(name, np.zeros(nbytes, np.uint8), kind)
        return self.buffer(name, nbytes, kind)

    def frozen(self, name, nbytes):
        self.consts[name] = np.zeros(nbytes, np.uint8)
        return self.buffer(name, nbytes, "frozen")

    def call(self, reads, writes, inplace=(), label=""):
        symbol = f"k{len(self.calls)}"
        self.kernels[symbol] = Kernel(symbol, b"xyz", (), len(reads), len(writes), "test")
        args = (*reads, *writes)
        self.calls.append(Call(symbol, args, len(reads), len(writes), label, tuple(inplace)))

    def build(self, name="step", **outputs):
        program = Program(
            name, tuple(self.calls), self.buffers, tuple(self.inputs), outputs, scalars={}
        )
        return Kernels(self.kernels, {name: program}, self.params, self.consts)


def small_step(inplace=True):
    """x -> a -> relu in place -> loss; gradient; update of w over itself."""
    b = Builder()
    b.input("x", 1000)
    b.param("w", 640)
    b.frozen("f", 5000)
    for name in ("a", "r", "dr"):
        b.buffer(name, 2048)
    b.buffer("loss", 4)
    b.buffer("dw", 640, "gradient")
    b.buffer("w_new", 640, "trained", alias="w")
    b.call(["x", "w", "f"], ["a"], label="conv")
    b.call(["a"], ["r"], [(1, 0)] if inplace else [], label="relu")
    b.call(["r"], ["loss"], label="loss")
    b.call(["r", "w"], ["dr"], label="grad")
    b.call(["x", "dr"], ["dw"], label="wgrad")
    b.call(["w", "dw"], ["w_new"], [(2, 0)], label="update")
    return b.build(loss="loss")


def test_a_step_by_hand():
    kernels = small_step()
    result = plan(kernels)
    verify(kernels, result)
    offsets = result.offsets["step"]
    assert offsets["a"] == offsets["r"]
    assert "w_new" not in offsets and "f" not in offsets
    assert result.persistent_bytes == 640
    assert result.lower_bound_bytes == 640 + 1024 + 2048 + 2048 + 64  # at grad: x, r, dr, loss
    assert result.arena_bytes == result.lower_bound_bytes
    assert result.peak_call == "grad"
    assert result.total_bytes == result.arena_bytes + 5000 + 6 * 3
    assert sum(result.by_class.values()) == result.arena_bytes + 5000
    assert result.by_class["trained"] == 640


def test_without_the_pair_nothing_is_shared():
    kernels = small_step(inplace=False)
    result = plan(kernels)
    verify(kernels, result)
    assert result.offsets["step"]["a"] != result.offsets["step"]["r"]


def test_an_input_read_twice_by_the_call_is_not_overwritten():
    b = Builder()
    b.input("x", 64)
    b.buffer("y", 64)
    b.call(["x", "x"], ["y"], [(2, 0)])
    kernels = b.build(output="y")
    result = plan(kernels)
    verify(kernels, result)
    assert result.offsets["step"]["x"] != result.offsets["step"]["y"]
    b.calls[0] = replace(b.calls[0], inplace=((2, 0), (2, 1)))
    kernels = b.build(output="y")
    result = plan(kernels)
    verify(kernels, result)
    assert result.offsets["step"]["x"] == result.offsets["step"]["y"]


def test_a_view_keeps_its_root_alive():
    b = Builder()
    b.input("x", 64)
    b.buffer("v", 64, alias="x")
    for name in ("a", "b", "c"):
        b.buffer(name, 64)
    b.call(["x"], ["a"])
    b.call(["a"], ["b"])
    b.call(["b", "v"], ["c"])
    kernels = b.build(output="c")
    assert live_ranges(kernels.programs["step"])["x"].end == 2
    verify(kernels, plan(kernels))


def test_step_and_predict_share_parameters_and_the_rest_of_the_arena():
    step, b = small_step(), Builder()
    b.input("x", 1000)
    b.param("w", 640)
    b.buffer("logits", 9000)
    b.call(["x", "w"], ["logits"])
    predict = b.build("predict", output="logits")
    kernels = replace(
        step,
        kernels={**step.kernels, **predict.kernels},
        programs=step.programs | predict.programs,
    )
    result = plan(kernels)
    verify(kernels, result)
    assert result.offsets["step"]["w"] == result.offsets["predict"]["w"]
    assert result.arena_bytes == 640 + 1024 + 9024 - 0
    assert sum(result.by_class.values()) == result.arena_bytes + 5000


def corrupt(result, program="step", **changes):
    return replace(result, offsets={program: {**result.offsets[program], **changes}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: {"dr": o["r"]}, "over its argument"),
        (lambda o: {"dr": o["dr"] + 4}, "multiple"),
        (lambda o: {"dr": 64 * 1000}, "allowed"),
        (lambda o: {"dr": 0}, "allowed"),
        (lambda o: {"x": o["r"]}, "over its argument|holds"),
        (lambda o: {"loss": o["dr"]}, "holds"),
    ],
)
def test_the_verifier_rejects(change, message):
    kernels = small_step()
    result = plan(kernels)
    with pytest.raises(InternalError, match=message):
        verify(kernels, corrupt(result, **change(result.offsets["step"])))


def test_the_verifier_rejects_a_read_after_the_update():
    kernels = small_step()
    program = kernels.programs["step"]
    late = Call("k3", ("r", "w", "dr"), 2, 1, label="late reader")
    calls = (*program.calls[:3], program.calls[3], *program.calls[4:], late)
    broken = replace(kernels, programs={"step": replace(program, calls=calls)})
    with pytest.raises(
        InternalError, match=r"late reader: reads 'w' where the arena holds 'w_new'"
    ):
        verify(broken, plan(broken))


def test_the_verifier_rejects_an_undeclared_in_place_update():
    kernels = small_step()
    program = kernels.programs["step"]
    calls = (*program.calls[:-1], replace(program.calls[-1], inplace=()))
    broken = replace(kernels, programs={"step": replace(program, calls=calls)})
    with pytest.raises(InternalError, match="no in-place pair"):
        verify(broken, plan(broken))


def test_the_verifier_rejects_missing_and_moving_buffers():
    kernels = small_step()
    result = plan(kernels)
    without = {k: v for k, v in result.offsets["step"].items() if k != "dr"}
    with pytest.raises(InternalError, match="no place"):
        verify(kernels, replace(result, offsets={"step": without}))
    with pytest.raises(InternalError, match="no offsets"):
        verify(kernels, replace(result, offsets={}))


@st.composite
def programs(draw):
    """Random straight-line programs: views, in-place pairs, parameters updated at the end."""
    b = Builder()
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    live = [b.input(f"x{i}", int(rng.integers(1, 3000))) for i in range(draw(st.integers(1, 3)))]
    params = [b.param(f"w{i}", int(rng.integers(1, 2000))) for i in range(draw(st.integers(0, 3)))]
    for i in range(draw(st.integers(1, 25))):
        reads = [str(n) for n in rng.choice(live, size=min(len(live), 2), replace=False)]
        reads += [str(n) for n in rng.choice(params, size=1)] if params else []
        same = rng.random() < 0.5
        size = b.buffers[reads[0]].nbytes if same else int(rng.integers(1, 3000))
        kind = ("activation", "gradient", "workspace")[int(rng.integers(3))]
        outs = [b.buffer(f"v{i}", size, kind)]
        b.call(reads, outs, [(len(reads), 0)] if same else [], label=f"c{i}")
        live.append(outs[0])
        if rng.random() < 0.2:
            live.append(b.buffer(f"view{i}", size, alias=outs[0]))
    for name in params:
        new = b.buffer(f"{name}_new", b.buffers[name].nbytes, "trained", alias=name)
        b.call([name, live[-1]], [new], [(2, 0)], label="update")
    return b.build(output=live[-1])


def random_overlap_check(kernels, result):
    """Quadratic and independent: two roots whose calls overlap must not share bytes, but for an
    in-place pair at one call."""
    program = kernels.programs["step"]
    ranges = list(live_ranges(program).values())
    offsets = result.offsets["step"]
    for i, a in enumerate(ranges):
        for b in ranges[:i]:
            apart = a.end < b.start or b.end < a.start
            touching = a.end == b.start or b.end == a.start
            clear = (
                offsets[a.name] + a.nbytes <= offsets[b.name]
                or offsets[b.name] + b.nbytes <= offsets[a.name]
            )
            same = offsets[a.name] == offsets[b.name] and a.nbytes == b.nbytes
            assert apart or clear or (touching and same)


@given(programs())
@settings(max_examples=60, deadline=None)
def test_random_programs_plan_and_verify(kernels):
    result = plan(kernels)
    verify(kernels, result)
    random_overlap_check(kernels, result)
    assert all(o % ALIGN == 0 for o in result.offsets["step"].values())
    assert result.lower_bound_bytes <= result.arena_bytes
    assert max(
        sum(e["bytes"].values()) for e in timeline(kernels, kernels.programs["step"], result)
    ) <= (result.lower_bound_bytes)


@given(programs(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_random_plans_with_an_overlap_are_rejected(kernels, rng):
    """Move one buffer onto another that is live, read later, and not its in-place partner."""
    program = kernels.programs["step"]
    result = plan(kernels)
    ranges = list(live_ranges(program).values())
    victims = [
        (a, b)
        for a in ranges
        for b in ranges
        if a is not b and b.start < a.start < b.end and a.kind != "input"
    ]
    if not victims:
        return
    a, b = rng.choice(victims)
    moved = corrupt(result, **{a.name: result.offsets["step"][b.name]})
    with pytest.raises(InternalError):
        verify(kernels, replace(moved, arena_bytes=10**9))


def training_blocks(layers, seed):
    """Lifetimes as a step has them: activations until their backward, short gradients."""
    rng = np.random.default_rng(seed)
    calls = 4 * layers
    blocks = []
    for i in range(layers):
        size = int(rng.choice([1, 2, 3, 4, 6, 8, 12, 24, 48])) * 4096
        back = calls - 2 * i
        if rng.random() < 0.6:
            blocks.append((size, 2 * i, back))
        blocks.append((size, 2 * i, 2 * i + int(rng.integers(1, 4))))
        blocks.append((size, back - 2, back))
        blocks.append((int(rng.integers(1, 200)) * 64, back - 1, back - 1))
    return [Block((Range(f"b{i}", n, "activation", s, e),)) for i, (n, s, e) in enumerate(blocks)]


@pytest.mark.parametrize("layers", [20, 60, 140])
def test_packing_is_close_to_the_bound_and_quick(layers):
    for seed in range(2):
        blocks = training_blocks(layers, seed)
        began = time.process_time()
        offsets, height = pack(blocks)
        assert time.process_time() - began < 4
        bound = live_bytes(blocks, 4 * layers + 2).max()
        assert bound <= height <= 1.05 * bound
        assert pack(blocks) == (offsets, height)


def test_budget_message_has_peak_classes_and_savings():
    result = plan(small_step())
    check_budget(result, None)
    check_budget(result, result.total_bytes)

    def refuse():
        raise PockError("no")

    with pytest.raises(PockError) as caught:
        check_budget(
            result,
            result.total_bytes - 1,
            target="rpi4",
            suggestions={
                "batch 8 -> 4": lambda: result.total_bytes - 3000,
                "--scheme last": lambda: result.total_bytes - 2000,
                "--scheme blocks:1": refuse,
                "--optimizer sgd": lambda: -5,
            },
        )
    text = str(caught.value)
    assert "rpi4 was given" in text and "'grad'" in text
    assert text.index("--scheme last (-") < text.index("batch 8 -> 4 (-")
    assert "blocks:1" not in text and "sgd" not in text
