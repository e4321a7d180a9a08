"""The exported program's operators, one by one, into Relax.

TVM's importer is taken where it is right. `converters/` replaces it where it is silently wrong
(`clamp_max` reads the wrong argument, `add` drops its alpha, integers times a float stay integers,
a bool `cumsum` loses its type, SELU its scale, nearest interpolation its grid) or coarser than what
the gradient rules and kernels want (attention, RMS norm, padding, slices).
Every Relax variable is recorded with the torch layer it comes from, for messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from pocktvm.errors import PockError
from pocktvm.frontend.converters import CONVERTERS
from pocktvm.frontend.exported import constant, layer_of, operator_name
from pocktvm.tvm_api import relax, torch_importer


def make_importer() -> Any:
    """TVM's importer with our converters; `.layers` maps Relax variables to torch layers."""

    class Importer(torch_importer()):  # type: ignore[misc]
        def create_convert_map(self) -> dict[str, Any]:
            self.layers: dict[str, str] = {}
            self._layer = ""
            table = super().create_convert_map()
            for name, function in {**CONVERTERS, constant.__name__: _constant}.items():
                table[name] = lambda node, function=function: function(self, node)
            return {name: self._guarded(function) for name, function in table.items()}

        def _guarded(self, function: Callable[[fx.Node], Any]) -> Callable[[fx.Node], Any]:
            def convert(node: fx.Node) -> Any:
                self._layer = layer_of(node)
                self._record_emits()
                try:
                    return function(node)
                except PockError:
                    raise
                except Exception as error:
                    raise PockError(
                        f"cannot import '{operator_name(node)}' (layer '{self._layer}'): "
                        f"{_first_line(error)}\n  Write the layer with other operators."
                    ) from error

            return convert

        def _record_emits(self) -> None:
            builder = self.block_builder
            if getattr(builder, "pock_recording", False):
                return
            emit = builder.emit

            def recording(expr: Any, name_hint: str = "") -> Any:
                var = emit(expr, name_hint)
                self.layers[var.name] = self._layer
                return var

            builder.emit = recording
            builder.pock_recording = True

    return Importer()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"


def _constant(importer: Any, node: fx.Node) -> Any:
    array = node.args[0].value
    return relax.const(array, str(array.dtype))
