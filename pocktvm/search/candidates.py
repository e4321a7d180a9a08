"""What an analysis tries: depths of bias training, and weights at several shares of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pocktvm.errors import PockError
from pocktvm.ir.model import Axes, Model
from pocktvm.ir.part import choose
from pocktvm.ir.scheme import Scheme, no_match, under

SHARES = (1.0, 0.5, 0.25, 0.125)
Key = tuple[str, str, float]
ALL = "all"  # the depth that reaches the input


@dataclass(frozen=True)
class Candidates:
    """The classifier, which always learns, and what may learn with it. Where an embedding is the
    classifier, too, the last norm is the head: the gradient of an embedding goes through all."""

    model: Model
    head: dict[str, float]
    depths: tuple[str, ...]  # "0", "1", … blocks, then ALL
    weights: tuple[str, ...]

    def keys(self, shares: Sequence[float]) -> list[Key]:
        """Every trial: depths, then whole weights, then their shares."""
        found: list[Key] = [("bias", depth, 1.0) for depth in self.depths if depth != "0"]
        return found + [("weight", name, share) for share in shares for name in self.weights]

    def updated(self, key: Key) -> dict[str, float]:
        """What learns in a trial."""
        kind, name, share = key
        if kind == "bias":
            return {**self.head, **self.biases(name)}
        return {**self.head, name: self.part(name, share)}

    def biases(self, depth: str) -> dict[str, float]:
        """Biases of the last blocks; of everything at the depth ALL. Scales of norms where a model
        has no biases. With the classifier."""
        every = _vectors(self.model)
        if depth != ALL:
            blocks = self.model.blocks
            inside = under(blocks[len(blocks) - int(depth) :])
            every = {name: part for name, part in every.items() if inside(name)}
        return {**self.head, **every}

    def part(self, name: str, share: float) -> float:
        """The channels that a share of a weight takes."""
        axes = self.model.channels.get(name, Axes())
        return choose(self.model.parameters[name], axes, share)

    def reaches(self, depth: str, weight: str) -> bool:
        """True when a backward pass of that depth comes by the weight anyway."""
        if depth == ALL:
            return True
        blocks = self.model.blocks
        before = blocks[: len(blocks) - int(depth)]
        first = self._first_block()
        place = list(self.model.parameters).index(weight)
        return place >= first and not under(before)(weight)

    def _first_block(self) -> int:
        inside = under(self.model.blocks)
        names = list(self.model.parameters)
        return next((i for i, name in enumerate(names) if inside(name)), len(names))


def find_candidates(model: Model, only: Sequence[str] = ()) -> Candidates:
    """All there is to try; `only`: patterns of the weights that may learn.

    Raises PockError for a pattern that matches no parameter.
    """
    head = _head(model)
    for pattern in only:
        if not any(fnmatchcase(n, pattern) for n in model.parameters):
            raise PockError(no_match(pattern, model, ""))
    weights = tuple(
        name
        for name, p in model.parameters.items()
        if p.value.ndim >= 2
        and p.requires_grad
        and name not in head
        and (not only or any(fnmatchcase(name, pattern) for pattern in only))
    )
    depths = [str(n) for n in range(len(model.blocks) + 1)]
    if weights or not set(_vectors(model)) <= set(head):
        depths.append(ALL)
    return Candidates(model, head, tuple(depths), weights)


def _head(model: Model) -> dict[str, float]:
    """The classifier; where it is tied to an embedding what else lies behind the last block, or
    the last vector there is."""
    classifier = Scheme.last().resolve(model)
    own = {name: part for name, part in classifier.items() if not model.parameters[name].aliases}
    if own:
        return own
    inside, names = under(model.blocks), list(model.parameters)
    last = max((place for place, name in enumerate(names) if inside(name)), default=-1)
    vectors = [n for n, p in model.parameters.items() if p.value.ndim == 1 and p.requires_grad]
    behind = [name for name in vectors if names.index(name) > last] or vectors[-1:]
    return dict.fromkeys(behind, 1.0) or classifier


def _vectors(model: Model) -> dict[str, float]:
    """Every bias outside the classifier; where there is none, the scales of norms."""
    classifier = Scheme.last().resolve(model)
    for name in ("bitfit", "norm"):
        found = Scheme.parse(name).resolve(model)
        if rest := {n: part for n, part in found.items() if n not in classifier}:
            return rest
    return {}
