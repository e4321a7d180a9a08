"""Hexagon's vector unit takes the integer work of a step: V67's has no floating point."""

from __future__ import annotations

import re

import pytest

from pocktvm.ir.graph import Node, Value
from pocktvm.schedule.compile_kernel import choose_rule
from pocktvm.schedule.rule import Task, defaults
from pocktvm.targets import load_target
from pocktvm.tvm_api import IRModule, compile_module, tvm_target

pytestmark = pytest.mark.build

VECTOR_STORE = re.compile(r"vmem[u]?\(r\d+\S*\)\s*=\s*v\d+")  # vmem, vmemu: 128 bytes at once


def assembly(op: str, dtypes: dict[str, str], shape: tuple[int, ...], **attrs: object) -> str:
    """The assembly of one operator's kernel for hexagon-v67."""
    values = {name: Value(name, shape, dtype) for name, dtype in dtypes.items()}
    *inputs, output = dtypes
    node = Node(op, tuple(inputs), (output,), attrs)
    task = Task(node, values, {}, frozenset(), load_target("hexagon-v67"))
    rule = choose_rule(task)
    func = rule.emit(task, defaults(rule.knobs(task))).func
    target = tvm_target(task.target.tvm)
    func = func.with_attr("global_symbol", "main").with_attr("target", target)
    return compile_module(IRModule({"main": func}), target).mod.inspect_source("asm")


@pytest.mark.parametrize(
    "op, dtypes, attrs",
    [
        ("add", {"a": "int32", "b": "int32", "y": "int32"}, {}),
        ("maximum", {"a": "int32", "b": "int32", "y": "int32"}, {}),
        ("multiply", {"a": "int32", "b": "int32", "y": "int32"}, {}),
        ("strided_slice", {"x": "int32", "y": "int32"}, {"begin": (0, 0), "end": (8, 96)}),
        ("strided_slice", {"x": "float32", "y": "float32"}, {"begin": (0, 0), "end": (8, 96)}),
    ],
    ids=["add", "maximum", "multiply", "move-int32", "move-float32"],
)
def test_integers_and_moved_data_use_hvx(op, dtypes, attrs):
    assert VECTOR_STORE.search(assembly(op, dtypes, (8, 96), **attrs))


def test_float_arithmetic_stays_on_the_scalar_unit():
    text = assembly("add", {"a": "float32", "b": "float32", "y": "float32"}, (8, 96))
    assert "sfadd" in text and not VECTOR_STORE.search(text)
