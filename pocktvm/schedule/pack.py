"""Layouts of build-time constants, by name: what a rule asks for in `Emitted.pack`.

A packer takes the constant in the graph's layout and its parameters and returns a flat array; it is
applied once, at build time, and its result is what the device keeps (the original is dropped).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Packer = Callable[..., np.ndarray]
PACKERS: dict[str, Packer] = {}


def packer(function: Packer) -> Packer:
    """Register a packer under its function's name."""
    PACKERS[function.__name__] = function
    return function


def apply_pack(name: str, array: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """The packed constant, flat and contiguous."""
    return np.ascontiguousarray(PACKERS[name](array, **params)).ravel()


@packer
def panels(array: np.ndarray, *, nr: int, transpose: bool = False) -> np.ndarray:
    """A matrix [K, N] (or [N, K] with transpose) as column panels [panel][K][width].

    The last panel is narrower when nr does not divide N. Leading axes are flattened into K, so a
    1x1 convolution's HWIO weight is a matrix too.
    """
    matrix = array.reshape(-1, array.shape[-1])
    if transpose:
        matrix = matrix.T
    pieces = [
        np.ascontiguousarray(matrix[:, c : c + nr]).ravel() for c in range(0, matrix.shape[1], nr)
    ]
    return np.concatenate(pieces)


@packer
def quarter_panels(array: np.ndarray, *, nr: int, transpose: bool = False) -> np.ndarray:
    """A matrix [K, N] (or [N, K]) as [panel][b11, b21, b22, b12][K / 2][width].

    Panels run over half of the columns and hold those of both halves (schedule/gemm_strassen.py).
    """
    matrix = array.reshape(-1, array.shape[-1])
    if transpose:
        matrix = matrix.T
    k, n = matrix.shape[0] // 2, matrix.shape[1] // 2
    pieces = []
    for c in range(0, n, nr):
        left, right = slice(c, min(c + nr, n)), slice(n + c, n + min(c + nr, n))
        quarters = ((slice(k), left), (slice(k, None), left), (slice(k, None), right),
                    (slice(k), right))  # fmt: skip
        pieces += [np.ascontiguousarray(matrix[q]).ravel() for q in quarters]
    return np.concatenate(pieces)


@packer
def conv_panels(array: np.ndarray, *, nr: int, groups: int = 1, swap: bool = False) -> np.ndarray:
    """HWIO weights as [group][panel][tap][depth][panel width], the last panel narrower.

    With `swap` for the input gradient, which sums over output channels: depth is then O / groups
    and the panels run over I.
    """
    h, w, i, o = array.shape
    pieces = []
    for g in range(groups):
        part = array[..., g * (o // groups) : (g + 1) * (o // groups)].reshape(h * w, i, -1)
        part = part.transpose(0, 2, 1) if swap else part
        pieces.append(panels(part, nr=nr))
    return np.concatenate(pieces)


_R = 4 / 3  # 1 / s
_WINOGRAD_G = {
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [  # at 0, s, -s, 2s, -2s and infinity, s = 3/4 (schedule/winograd_transforms.py)
        [_R**4 / 4, 0, 0],
        [-(_R**4) / 6, -(_R**3) / 6, -(_R**2) / 6],
        [-(_R**4) / 6, _R**3 / 6, -(_R**2) / 6],
        [_R**4 / 24, _R**3 / 12, _R**2 / 6],
        [_R**4 / 24, -(_R**3) / 12, _R**2 / 6],
        [0, 0, 1],
    ],
}


@packer
def winograd_panels(array: np.ndarray, *, m: int, nr: int, swap: bool = False) -> np.ndarray:
    """3x3 HWIO weights transformed, G w G^T, as [plane][panel][depth][panel width].

    With `swap` for the input gradient: taps flipped, panels over I, depth O. Computed in float64.
    """
    weights = array.astype(np.float64)
    if swap:
        weights = weights[::-1, ::-1].transpose(0, 1, 3, 2)
    g = np.array(_WINOGRAD_G[m])
    planes = np.einsum("ia,abco,jb->ijco", g, weights, g).reshape(-1, *weights.shape[2:])
    return np.concatenate([panels(plane, nr=nr) for plane in planes]).astype(array.dtype)
