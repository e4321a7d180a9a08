"""Which tensors learn: a name, or patterns over torch's parameter names.

A mapping is read top to bottom and the last pattern that matches a parameter decides it; what no
pattern names is frozen. Names are shorthands over the model's blocks and classifier.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pocktvm.errors import InternalError, PockError
from pocktvm.ir.model import Axes, Model, Parameter
from pocktvm.ir.part import choose, parse_value, ranks_by_activation

NAMES = (
    "full", "last", "head", "bias:N", "blocks:N", "bitfit", "norm", "pockengine", "lora:N:r=8",
    "auto",
)  # fmt: skip


class Scheme:
    """What a training step updates.

    `Scheme({"blocks.1[4-6].*.bias": 1, "classifier.*": 1})` is a mapping of `fnmatchcase` patterns;
    `Scheme.full()`, `.last()`, `.bias(n)`, `.blocks(n)`, `.pockengine()` are the named ones and
    `Scheme.parse(x)` takes any spelling of the command line: a name, inline JSON, a TOML file.

    A TOML file holds the patterns in a table `[update]` (a table `[about]` may stand beside it), or
    alone at the top level; dotted keys need quotes only when they hold wildcards:

        [update]
        "blocks.1[4-6].*.bias" = 1
        "blocks.15.pw1.weight" = 0.25
        classifier.weight = 1
    """

    def __init__(self, mapping: Mapping[str, Any] | None, *, name: str = "") -> None:
        if mapping is not None and not isinstance(mapping, Mapping):
            raise PockError(f"Scheme(...) takes a mapping of patterns, not {mapping!r}.")
        self.mapping = None if mapping is None else _checked(mapping, name or "the scheme")
        self.name = name

    @classmethod
    def full(cls) -> Scheme:
        """Every tensor that requires a gradient."""
        return cls(None, name="full")

    @classmethod
    def last(cls) -> Scheme:
        """The classifier alone."""
        return cls(None, name="last")

    @classmethod
    def bias(cls, n: int) -> Scheme:
        """Biases (norm shifts included) of the last `n` blocks, and the classifier."""
        return cls(None, name=f"bias:{_count(n, 'bias')}")

    @classmethod
    def blocks(cls, n: int) -> Scheme:
        """All of the last `n` blocks, and the classifier."""
        return cls(None, name=f"blocks:{_count(n, 'blocks')}")

    @classmethod
    def pockengine(cls) -> Scheme:
        """The zoo model's published scheme; elsewhere biases and first matrix of the later half
        of the blocks, and the classifier."""
        return cls(None, name="pockengine")

    @classmethod
    def from_toml(cls, path: str | Path) -> Scheme:
        """Read a TOML file (format: see the class). Raises PockError when it is not one."""
        path = Path(path)
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PockError(f"cannot read the scheme '{path}': {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PockError(f"the scheme '{path}' is not TOML: {error}.") from error
        if "update" in document and isinstance(document["update"], dict):
            extra = sorted(set(document) - {"update", "about"})
            if extra:
                raise PockError(
                    f"the scheme '{path}' has {', '.join(map(repr, extra))} beside [update]; "
                    "put every pattern inside [update]."
                )
            document = document["update"]
        return cls(_flatten(document), name=str(path))

    @classmethod
    def parse(cls, spec: str | Path | Mapping[str, Any] | Scheme) -> Scheme:
        """Any spelling of a scheme. Raises PockError with the names there are."""
        if isinstance(spec, Scheme):
            return spec
        if isinstance(spec, Mapping):
            return cls(spec)
        if isinstance(spec, Path):
            return cls.from_toml(spec)
        if not isinstance(spec, str):
            raise PockError(f"a scheme is a name, a mapping or a TOML file, not {spec!r}.")
        text = spec.strip()
        if text.startswith("{"):
            return cls(_from_json(text))
        if text.endswith(".toml") or Path(text).is_file():
            return cls.from_toml(text)
        if text.partition(":")[0] == "lora":
            from pocktvm.ir.lora import LoRA

            return LoRA.from_text(text)
        return cls(None, name=_checked_name(text))

    @property
    def needs_data(self) -> bool:
        """True when channels are chosen by what they carry on the caller's data."""
        return any(ranks_by_activation(v) for v in (self.mapping or {}).values())

    def resolve(self, model: Model, activity: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Parameter name -> share that learns (1.0: the whole tensor), in the model's order.

        A share below 1 is a `Part` (ir/part.py), which says which indices of which axis. Only what
        learns is in the result. `requires_grad=False` freezes whatever the scheme says.
        `activity`: weight -> a number for each input channel, for what ranks by activation.
        Raises PockError for a pattern that matches nothing, for more blocks than the model has,
        and when nothing would learn.
        """
        if self.mapping is not None:
            wanted = _match(self.mapping, model, str(self))
        else:
            wanted = self._named(model)
        learns = {
            name: _share(model, parameter, wanted[name], activity or {})
            for name, parameter in model.parameters.items()
            if wanted.get(name) and _can_learn(parameter)
        }
        if not learns:
            raise PockError(_nothing(self, model, [n for n, v in wanted.items() if v]))
        return learns

    def _named(self, model: Model) -> dict[str, int]:
        word, _, rest = self.name.partition(":")
        if word == "full":
            return dict.fromkeys(model.parameters, 1)
        if word in ("last", "head"):
            return _all(model, _in_classifier(model))
        if word == "bitfit":
            return _biases(model, lambda name: True) | _all(model, _in_classifier(model))
        if word == "norm":
            return _norms(model) | _all(model, _in_classifier(model))
        if word == "lora":
            return _adapters(model)
        if word == "pockengine":
            return _pockengine(model)
        if word in ("bias", "blocks"):
            inside = under(last_blocks(model, int(rest), self.name))
            chosen = _biases(model, inside) if word == "bias" else _all(model, inside)
            return chosen | _all(model, _in_classifier(model))
        if word == "auto":
            raise PockError(
                "the scheme 'auto' is chosen from an analysis of your data, which this build was "
                "not given. Name the tensors (--scheme pockengine, bias:N, blocks:N or a TOML)."
            )
        raise InternalError(f"a scheme named '{self.name}'")

    def __str__(self) -> str:
        if self.name:
            return self.name
        return json.dumps(dict(self.mapping or {}))

    def __repr__(self) -> str:
        return f"Scheme({self})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scheme):
            return NotImplemented
        return (self.name, self.mapping) == (other.name, other.mapping)

    def __hash__(self) -> int:
        return hash(str(self))


# Spellings -------------------------------------------------------------------------------------


def _checked_name(text: str) -> str:
    word, _, rest = text.partition(":")
    if text in ("full", "last", "head", "bitfit", "norm", "pockengine", "auto"):
        return word
    if word in ("bias", "blocks"):
        return f"{word}:{_count(rest, word)}"
    near = difflib.get_close_matches(word, [n.split(":")[0] for n in NAMES], n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise PockError(
        f"there is no scheme '{text}'.{hint}\n"
        f"  A scheme is one of {', '.join(NAMES)}, a TOML file, or JSON such as "
        "'{\"classifier.*\": 1}'."
    )


def _count(text: Any, word: str) -> int:
    try:
        count = int(text)
    except (TypeError, ValueError):
        count = -1
    if count < 0:
        raise PockError(f"the scheme '{word}:{text}' needs a number of blocks, such as {word}:2.")
    return count


def _from_json(text: str) -> dict[str, Any]:
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise PockError(
            f"the scheme is not JSON: {error.msg} at character {error.pos} of {text!r}."
        ) from error
    return _flatten(mapping)


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`blocks.0.weight = 1` in TOML is a table in a table: join the keys again."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _checked(mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not mapping:
        raise PockError(f"{where} names no tensor; give patterns such as {{'classifier.*': 1}}.")
    return {pattern: parse_value(pattern, value) for pattern, value in mapping.items()}


# Choices ---------------------------------------------------------------------------------------

Chooses = Callable[[str], bool]


def _match(mapping: Mapping[str, Any], model: Model, label: str) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    for pattern, value in mapping.items():
        hits = [
            name
            for name, parameter in model.parameters.items()
            if any(fnmatchcase(n, pattern) for n in (name, *parameter.aliases))
        ]
        # A conv without a bias of its own has the shift of the BN behind it.
        hits = hits or [
            shift for conv, shift in model.shifts.items() if fnmatchcase(_bias_of(conv), pattern)
        ]
        if not hits:
            raise PockError(no_match(pattern, model, label))
        wanted |= dict.fromkeys(hits, value)
    return wanted


def no_match(pattern: str, model: Model, label: str) -> str:
    """What to say of a pattern that names no parameter: the nearest names."""
    names = [n for name, p in model.parameters.items() for n in (name, *p.aliases)]
    bare = pattern.replace("*", "")
    near = difflib.get_close_matches(bare, names, n=3, cutoff=0.0)
    text = f"scheme {label if len(label) < 60 else ''}".rstrip()
    return (
        f"{text}: '{pattern}' matches none of the {len(names)} parameters of '{model.name}'.\n"
        f"  The nearest names: {', '.join(near) or 'it has none'}."
    )


def under(prefixes: Iterable[str]) -> Chooses:
    """Chooses the modules of these names and all that is in them."""
    fixed = tuple(prefixes)
    return lambda name: any(name == p or name.startswith(p + ".") for p in fixed)


def _all(model: Model, inside: Chooses) -> dict[str, int]:
    return {
        name: 1
        for name, parameter in model.parameters.items()
        if any(inside(n) for n in (name, *parameter.aliases))
    }


def _is_bias(name: str, parameter: Parameter) -> bool:
    return name.rpartition(".")[2].endswith("bias") and parameter.value.ndim <= 1


def _bias_of(conv_weight: str) -> str:
    return conv_weight.removesuffix("weight") + "bias"


def _biases(model: Model, inside: Chooses) -> dict[str, int]:
    chosen = {n: 1 for n in _all(model, inside) if _is_bias(n, model.parameters[n])}
    shifts = {shift: 1 for conv, shift in model.shifts.items() if inside(conv)}
    return chosen | shifts


def _norms(model: Model) -> dict[str, int]:
    """Scales and shifts of norms: vectors called weight, and the biases beside them."""
    scales = {
        n: 1
        for n, p in model.parameters.items()
        if n.rpartition(".")[2] == "weight" and p.value.ndim == 1
    }
    shifts = {n.removesuffix("weight") + "bias": 1 for n in scales}
    return scales | {n: 1 for n in shifts if n in model.parameters}


def _adapters(model: Model) -> dict[str, int]:
    """LoRA's matrices, and the classifier unless an embedding reads it, too."""
    chosen = {name: 1 for a in model.adapters.values() for name in (a.a, a.b)}
    head = _all(model, _in_classifier(model))
    return chosen | {n: 1 for n in head if not model.parameters[n].aliases}


def _in_classifier(model: Model) -> Chooses:
    """Parameters behind the last block; where the frontend found none, the last layer with a
    matrix."""
    if model.classifier:
        return under(model.classifier)
    matrices = [n for n, p in model.parameters.items() if p.value.ndim >= 2]
    return under([matrices[-1].rpartition(".")[0] or matrices[-1]] if matrices else [])


def last_blocks(model: Model, count: int, label: str) -> tuple[str, ...]:
    """Names of the last `count` blocks. PockError, naming the scheme, where there are fewer."""
    if count > len(model.blocks):
        has = f"{len(model.blocks)} blocks" if model.blocks else "no repeated blocks"
        fix = f"Use at most {len(model.blocks)}, or 'full'." if model.blocks else "Name tensors."
        raise PockError(
            f"the scheme '{label}' asks for {count} blocks; '{model.name}' has {has}. {fix}"
        )
    return model.blocks[len(model.blocks) - count :]


def _pockengine(model: Model) -> dict[str, Any]:
    """Biases and first matrix (the expanding convolution, the query projection) of the later half
    of the blocks: what the published schemes have in common."""
    if model.scheme is not None:
        return _match(_checked(model.scheme, "the published scheme"), model, "pockengine")
    in_classifier = _in_classifier(model)
    units = model.blocks or tuple(
        dict.fromkeys(n.rpartition(".")[0] or n for n in model.parameters if not in_classifier(n))
    )
    later = units[len(units) // 2 :]
    chosen = _biases(model, under(later))
    for block in later:
        names = _all(model, under([block]))
        first = next((n for n in names if model.parameters[n].value.ndim >= 2), None)
        if first is not None:
            chosen[first] = 1
    return chosen | _all(model, in_classifier)


def _share(
    model: Model, parameter: Parameter, value: Any, activity: Mapping[str, Any]
) -> float:
    if value == 1:
        return 1.0
    axes = model.channels.get(parameter.name, Axes())
    return choose(parameter, axes, value, activity.get(parameter.name))


def _can_learn(parameter: Parameter) -> bool:
    return parameter.requires_grad and parameter.value.dtype.kind == "f"


def _nothing(scheme: Scheme, model: Model, named: list[str]) -> str:
    if named:
        return (
            f"the scheme '{scheme}' trains nothing: all {len(named)} tensors it names have "
            f"requires_grad=False ({', '.join(named[:3])}{', …' if len(named) > 3 else ''}).\n"
            "  Set requires_grad on what should learn, or name other tensors."
        )
    return (
        f"the scheme '{scheme}' trains nothing in '{model.name}': every tensor is frozen.\n"
        "  Give at least one pattern the value 1, such as '*.bias' = 1."
    )
