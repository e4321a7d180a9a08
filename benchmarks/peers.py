"""A folder of peers: one environment a framework, one set of weights for everybody.

    DIR/v_tf/bin/python, DIR/v_ort/…, DIR/v_jax/…   the environments
    DIR/data_<workload>.npz     `__x`, `__y`, then parameters and BN statistics by torch's name
    DIR/train_<workload>.json   scheme -> names that learn
    bench_tf.py, bench_ort.py, bench_jax.py          in DIR, in its parent, or in $POCKTVM_PEERS

A script is called in DIR as `bench_tf.py --workload w1a --scheme sparse --threads 1` and prints one
JSON line with `ms_per_step_median`, `loss0` and `peak_rss_mb` (in units of 2**20 bytes).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# a framework -> the workloads its script knows
SCRIPTED = {
    "tf": ("w1a", "w1b"),
    "ort": ("w1a", "w1b", "w2", "w4"),
    "jax": ("w1a", "w1b", "w2", "w3", "w4"),
}


@dataclass(frozen=True)
class PeersDir:
    """The folder, checked for what a workload needs. Raises SystemExit with the missing path."""

    folder: Path
    workload: str

    @property
    def weights(self) -> Path:
        """The shared weights and batch."""
        return self._there(self.folder / f"data_{self.workload}.npz")

    def trained(self, scheme: str) -> list[str]:
        """Torch's names of what learns."""
        path = self._there(self.folder / f"train_{self.workload}.json")
        return json.loads(path.read_text())[scheme]

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels) that the peers train on."""
        data = np.load(self.weights)
        return data["__x"], data["__y"]

    def command(self, peer: str, scheme: str, threads: int) -> list[str]:
        """How to launch a scripted peer."""
        python = self._there(self.folder / f"v_{peer}" / "bin" / "python")
        arguments = ["--workload", self.workload, "--scheme", scheme, "--threads", str(threads)]
        return [str(python), str(self._script(f"bench_{peer}.py")), *arguments]

    def _script(self, name: str) -> Path:
        beside = Path(__file__).resolve().parents[2] / "shared" / "peers"
        given = os.environ.get("POCKTVM_PEERS")
        places = [*([Path(given)] if given else []), self.folder, self.folder.parent, beside]
        for place in places:
            if (place / name).is_file():
                return (place / name).resolve()
        raise SystemExit(
            f"no {name} in {', '.join(map(str, places[:-1]))}; POCKTVM_PEERS names its folder"
        )

    def _there(self, path: Path) -> Path:
        if not path.exists():
            raise SystemExit(f"--peers-dir {self.folder}: no {path}; see benchmarks/peers.py")
        return path.parent.resolve() / path.name


def load_weights(module, path: Path) -> None:
    """Fill a module from a peers' file; a tensor that the file lacks must be a tied one's alias."""
    import torch

    data = np.load(path)
    values = {k: torch.from_numpy(data[k]) for k in data.files if not k.startswith("__")}
    missing, extra = module.load_state_dict(values, strict=False)
    own = dict(module.named_parameters())  # without the aliases of tied tensors
    missing = [n for n in missing if n in own]
    if missing or extra:
        raise SystemExit(f"{path} is of another model: missing {missing[:4]}, extra {extra[:4]}")
