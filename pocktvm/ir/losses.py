"""The losses there are, with their options: the compiler writes them (autodiff/losses.py), `eval`
measures them in numpy (metrics.py), and both read `name:option=value,…` by this table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# name -> its options with their defaults, as torch.nn.functional has them
LOSSES: Mapping[str, Mapping[str, Any]] = {
    "cross_entropy": {"label_smoothing": 0.0, "ignore_index": -100, "weight": None},
    "bce_with_logits": {"pos_weight": None},
    "mse": {},
    "l1": {},
    "huber": {"delta": 1.0},
    "kl_div": {"log_target": False, "reduction": "mean"},
    "cosine_embedding": {},
    "none": {},
}
