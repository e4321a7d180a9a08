"""Low-rank adapters: a frozen matrix learns through two small ones (Hu et al. 2021, LoRA).

    y = W x   →   y = W x + (alpha / r) B (A x)         A: r × inputs, B: outputs × r, B starts at 0

Of a convolution A has the convolution's window and B is 1×1.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocktvm.errors import PockError
from pocktvm.ir.options import parse_options
from pocktvm.ir.scheme import Scheme

_DEFAULTS = {"lora": {"r": 8, "alpha": 16.0, "on": "*"}}


@dataclass(frozen=True)
class Adapter:
    """The two matrices beside a weight. `turned`: the weight lies inputs × outputs."""

    a: str
    b: str
    scale: float
    turned: bool = False


class LoRA(Scheme):
    """Adapters on the matrices and ungrouped convolutions of the last `blocks` blocks.

    `r` is their rank, `alpha / r` what their result is multiplied by; `on` are patterns over the
    weights' names, separated by `|`, that choose among them. The classifier learns as it is, unless
    it is tied to an embedding. As text: `lora:2:r=8,alpha=16,on=*.q.weight|*.v.weight`.
    """

    def __init__(self, blocks: int, r: int = 8, alpha: float = 16.0, on: str = "*") -> None:
        if type(blocks) is not int or blocks < 1:
            raise PockError(f"lora takes the last N blocks, 1 or more, not {blocks!r}: lora:2:r=8.")
        if type(r) is not int or r < 1:
            raise PockError(f"lora's rank r={r!r} must be a whole number of 1 or more.")
        if not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
            raise PockError(f"lora's alpha={alpha!r} must be positive.")
        self.count, self.r, self.alpha, self.on = blocks, r, float(alpha), on
        more = "" if on == "*" else f",on={on}"
        super().__init__(None, name=f"lora:{blocks}:r={r},alpha={alpha:g}{more}")

    @classmethod
    def from_text(cls, text: str) -> LoRA:
        """Read `lora:N` or `lora:N:option=value,…`."""
        _, _, rest = text.partition(":")
        count, _, options = rest.partition(":")
        _, values = parse_options(f"lora:{options}" if options else "lora", "scheme", _DEFAULTS)
        return cls(int(count) if count.isdigit() else 0, **values)

    def patterns(self) -> tuple[str, ...]:
        """What chooses among the weights."""
        return tuple(p for p in self.on.split("|") if p)

