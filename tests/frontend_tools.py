"""Runs imported models on TVM's own virtual machine, an oracle independent of our kernels."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import nn

from pocktvm.ir.model import Model
from pocktvm.tvm_api import IRModule, TvmTarget, relax, tvm


def run_models(models: Mapping[str, Model], inputs: Mapping[str, tuple]):
    """Outputs as numpy, by name; all models compiled together since the build is what costs."""
    together = IRModule({name: model.module["main"] for name, model in models.items()})
    for name in models:
        function = together[name].with_attr("global_symbol", name)
        together.update_func(together.get_global_var(name), function)
    machine = relax.VirtualMachine(
        relax.build(together, target=TvmTarget({"kind": "llvm"})), tvm.cpu()
    )
    outputs = {}
    for name, model in models.items():
        arrays = [tensor.numpy() for tensor in inputs[name]]
        arrays += [parameter.value for parameter in model.parameters.values()]
        outputs[name] = machine[name](*[tvm.runtime.tensor(a) for a in arrays]).numpy()
    return outputs


class Lambda(nn.Module):
    """A function of the input and of some modules."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function = function
        self.m = nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.m)


def data_folder() -> Path:
    """The real weights, or a skip that says where they were looked for."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("POCKTVM_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder} (set POCKTVM_DATA)")
    return folder
