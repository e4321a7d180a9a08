"""`pocktvm inspect`: what an artifact holds, from its manifest; every file is checked."""

from __future__ import annotations

import json

from pocktvm.cli import options
from pocktvm.cli.show import show
from pocktvm.manifest import check_files, read_manifest, summary


def inspect(
    artifact: options.Artifact,
    as_json: options.Json = False,
) -> None:
    """Show plan, kernels and updated tensors of an artifact."""
    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    facts = summary(artifact, manifest)
    if as_json:
        print(json.dumps(facts))
    else:
        show(facts, tensors=10_000)
