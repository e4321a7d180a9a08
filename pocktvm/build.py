"""What a build is made of: a model, a device, what learns and how, and the bounds it must keep.

Everything else follows from it: the model and the tensors that learn (`resolve`), the programs
whose kernels are compiled (`programs`). Builds are compared by changing a field:
`replace(build, scheme=…)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pocktvm.autodiff.differentiate import differentiate
from pocktvm.autodiff.losses import parse_loss
from pocktvm.autodiff.optimizers import parse_optimizer
from pocktvm.data import check_data
from pocktvm.errors import PockError
from pocktvm.frontend.lora import add_adapters
from pocktvm.frontend.source import import_model
from pocktvm.identity import label_inputs
from pocktvm.ir.graph import SAVED, Graph
from pocktvm.ir.model import Model
from pocktvm.ir.part import selectable
from pocktvm.ir.scheme import Scheme
from pocktvm.ir.target import Target
from pocktvm.passes import run_passes
from pocktvm.search.activity import measure_activity
from pocktvm.targets import load_target
from pocktvm.units import parse_bytes

Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class Build:
    """Everything that decides an artifact.

    module          an nn.Module, or the path of an ONNX file; never mutated
    example_inputs  a tensor, a tuple, or a dict by name: the shapes of a step
    scheme          what learns
    loss, optimizer autodiff.losses.Loss, autodiff.optimizers.Optimizer
    limit           most bytes of the whole plan; None: no bound
    threads         stored default of the artifact
    dropout         the step drops, seeded
    resample        the trainer may choose other channels for the parts that learn
    saved           how activations wait for the backward pass: float32 | bf16 | int8
                    (passes/narrow_saved.py)
    rates           the step reads factors of lr by channel (ir/rates.py)
    name, published the model's name; the scheme that "pockengine" stands for
    mean, scale     per channel: how the device reads uint8 samples
    samples         arrays by input name, for schemes that ask for data
    analysis        the table of an analysis, for the scheme "auto"
    facts           more entries of the manifest
    """

    module: Any
    example_inputs: Any
    scheme: Scheme
    loss: Any
    optimizer: Any
    target: Target
    limit: int | None = None
    threads: int | None = None
    dropout: bool = False
    resample: bool = False
    rates: bool = False
    saved: str = "float32"
    name: str = "model"
    published: Mapping[str, Any] | None = None
    mean: Sequence[float] = ()
    scale: Sequence[float] = ()
    samples: Mapping[str, Any] | None = None
    analysis: str | Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        module: Any,
        example_inputs: Any,
        *,
        target: str | Target = "host",
        scheme: Any = "full",
        loss: str = "cross_entropy",
        optimizer: Any = None,
        budget: int | str | None = None,
        **others: Any,
    ) -> Build:
        """A build from the spellings `pocktvm.compile` takes; `others` are fields as they are.

        Raises PockError for a spelling that says nothing.
        """
        build = cls(
            module,
            example_inputs,
            scheme=Scheme.parse(scheme),
            loss=parse_loss(loss),
            optimizer=parse_optimizer(optimizer or "sgd"),
            target=target if isinstance(target, Target) else load_target(target),
            limit=_bytes(budget) if isinstance(budget, str) else budget,
            **others,
        )
        _check_saved(build.saved, build.target)
        return build

    def settled(self, progress: Progress | None = None) -> Build:
        """The build with its scheme chosen, where that is "auto" (docs/schemes.md)."""
        if self.scheme.name != "auto":
            return self
        from pocktvm.search.auto import automatic_scheme

        # what the search may choose from is more than parts
        plain = replace(self, resample=False)
        return replace(self, scheme=automatic_scheme(plain, progress))

    def resolve(self) -> tuple[Model, dict[str, float]]:
        """The model with the scheme's adapters, and what learns of it: tensor -> share."""
        model = import_model(
            self.module, self.example_inputs, name=self.name, scheme=self.published,
            mean=self.mean, scale=self.scale, dropout=self.dropout,
        )  # fmt: skip
        model = add_adapters(model, self.scheme)
        activity = None
        if self.scheme.needs_data and self.samples is not None:
            specs = label_inputs(model, self.loss)
            arrays = check_data(self.samples, specs, labels_optional=True)
            activity = measure_activity(model, arrays)
        updated = self.scheme.resolve(model, activity)
        return model, selectable(model, updated) if self.resample else updated

    def programs(self) -> tuple[Graph, ...]:
        """The optimised step and predict, up to the kernels."""
        model, updated = self.resolve()
        graphs = differentiate(model, updated, self.loss, self.optimizer)
        return tuple(run_passes(graph, self.target, saved=self.saved) for graph in graphs)


def _check_saved(saved: str, target: Target) -> None:
    if saved not in SAVED:
        raise PockError(f"saved activations are kept as {' or '.join(SAVED)}, not '{saved}'.")
    if saved != "float32" and target.is_gpu:
        raise PockError(
            f"--saved {saved} is for processors: {target.name} keeps activations as float32.\n"
            "  Leave it out; --budget makes a step smaller there, too."
        )


def _bytes(budget: str) -> int:
    try:
        return parse_bytes(budget)
    except ValueError as error:
        raise PockError(f"budget: {error}.") from None
