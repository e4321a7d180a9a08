"""`pocktvm.compile`: the door for Python. compiler.py is what it opens on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocktvm import compiler
from pocktvm.artifact import Artifact
from pocktvm.build import Build, Progress
from pocktvm.ir.target import Target


def compile(
    module: Any,
    example_inputs: Any,
    *,
    target: str | Target = "host",
    scheme: Any = "full",
    loss: str = "cross_entropy",
    optimizer: Any = None,
    budget: int | str | None = None,
    threads: int | None = None,
    dropout: bool = False,
    resample: bool = False,
    out: str | Path | None = None,
    name: str = "model",
    published: Mapping[str, Any] | None = None,
    mean: Sequence[float] = (),
    scale: Sequence[float] = (),
    samples: Mapping[str, Any] | None = None,
    analysis: str | Path | None = None,
    rates: bool = False,
    saved: str = "float32",
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a module into an artifact that trains it.

    module          an nn.Module; never mutated. It is trained at the shapes of `example_inputs`.
                    Or the path of an .onnx file: `example_inputs` then only tell the batch, and
                    may be None where the file fixes it
    example_inputs  a tensor, a tuple of them, or a dict by name; axis 0 is the batch
    target          a name of `pocktvm targets`, the path of a TOML, or a Target
    scheme          what learns: a name, a mapping of patterns, a TOML path, or a Scheme
    loss            as text, with options after a colon ("cross_entropy:label_smoothing=0.1")
    optimizer       pocktvm.SGD() and the like, or text ("adamw:weight_decay=0.01"); None: SGD
    budget          most bytes the device may give (arena, frozen weights and code), or text:
                    "64MB" is 64e6 bytes, "64MiB" 64 * 2**20
    threads         stored default of the artifact; `load(threads=…)` overrides it
    dropout         the step drops with seeded masks (the seed is `load(seed=…)`); without it
                    dropouts are identities, told once
    resample        the channels that learn of a tensor can be chosen anew between steps, as many as
                    the scheme names (docs/schemes.md)
    out             the artifact's folder; None keeps it in a temporary one (`save` copies it)
    mean, scale     per channel: how the device reads uint8 samples, (u8 - mean) * scale
    saved           how activations wait for the backward pass: "float32", or "bf16" or "int8" for
                    half or a third of their memory (docs/memory.md)
    samples         arrays by input name, labels as `y`: for the scheme "auto", and for channels
                    ranked by activation (docs/schemes.md)
    progress        called as (stage, detail) while it works

    The other arguments are fields of pocktvm.build.Build. Raises PockError for everything the
    caller can mend, before any long work where possible.
    """
    build = Build.of(
        module, example_inputs, target=target, scheme=scheme, loss=loss, optimizer=optimizer,
        budget=budget, threads=threads, dropout=dropout, resample=resample, rates=rates, name=name,
        published=published, mean=mean, scale=scale, samples=samples, analysis=analysis,
        saved=saved, facts=facts or {},
    )  # fmt: skip
    return compiler.compile(build, out, progress)
