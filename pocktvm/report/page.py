"""The report: what learns, where the memory goes over a step, which rule took each kernel.

Everything comes from the artifact's manifest; the page refers to nothing outside itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pocktvm.report.chart import stacked_area
from pocktvm.units import format_bytes

COLOURS = {
    "frozen": "#b0b7c3",
    "trained": "#4c78a8",
    "optimizer": "#72b7b2",
    "activations": "#f2b04b",
    "gradients": "#d1605e",
    "workspace": "#9a86c0",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; color: #222;
       padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: .15em .8em .15em 0; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } code { font-size: .9em; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: #555; }
.dim { color: #666; }
"""


def report(manifest: Mapping[str, Any], seconds: float | None = None) -> str:
    """The page as HTML. `seconds`: how long the build took, where it is known."""
    title = f"{manifest['model']} for {manifest['target']}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _facts(manifest, seconds),
        _memory(manifest["plan"]),
        *_timelines(manifest),
        _kernels(manifest),
        _updated(manifest.get("updated") or {}),
        _versions(manifest.get("versions") or {}),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(s for s in sections if s)
        + "\n</body></html>\n"
    )


def _facts(manifest: Mapping[str, Any], seconds: float | None) -> str:
    words = [f"{key} {manifest[key]}" for key in ("scheme", "batch", "loss", "optimizer", "lr")
             if manifest.get(key) is not None]  # fmt: skip
    if seconds is not None:
        words.append(f"built in {seconds:.1f} s")
    notices = "".join(f"<br>{escape(str(n))}" for n in manifest.get("notices") or ())
    return f'<p class="dim">{escape(" · ".join(words))}{notices}</p>'


def _memory(plan: Mapping[str, Any]) -> str:
    rows = [
        (f'<span class="swatch" style="background:{COLOURS.get(kind, "#ccc")}"></span>'
         f"{escape(kind)}", format_bytes(nbytes))
        for kind, nbytes in plan["by_class"].items()
    ]  # fmt: skip
    slack = plan["arena_bytes"] / max(1, plan["lower_bound_bytes"]) - 1
    rows += [
        ("<b>arena</b>, one block with fixed offsets", format_bytes(plan["arena_bytes"])),
        (f"live at the peak (packing adds {slack:.1%})", format_bytes(plan["lower_bound_bytes"])),
        ("<b>total</b>, with frozen weights and code", format_bytes(plan["total_bytes"])),
    ]
    return "<h2>Memory</h2>" + _table(rows)


def _timelines(manifest: Mapping[str, Any]) -> Iterable[str]:
    """The arena's live bytes over each program's calls, and the fullest calls of the step."""
    timelines = manifest.get("timeline") or (manifest.get("extra") or {}).get("timeline") or {}
    for name, entries in timelines.items():
        if entries:
            yield f"<h2>Live bytes over one {escape(name)}</h2>" + _chart(entries)
    if timelines.get("step"):
        yield "<h2>The fullest calls of a step</h2>" + _fullest(timelines["step"])


def _chart(entries: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in COLOURS if any(name in e["bytes"] for e in entries)]
    series = {name: [e["bytes"].get(name, 0) for e in entries] for name in names}
    totals = [sum(e["bytes"].values()) for e in entries]
    labels = [e["call"] for e in entries]
    return stacked_area(series, COLOURS, labels, marker=totals.index(max(totals)))


def _fullest(entries: Sequence[Mapping[str, Any]]) -> str:
    largest = sorted(entries, key=lambda e: -sum(e["bytes"].values()))[:10]
    rows = [(f"<code>{escape(e['call'])}</code>", format_bytes(sum(e["bytes"].values())))
            for e in largest]  # fmt: skip
    return _table(rows)


def _kernels(manifest: Mapping[str, Any]) -> str:
    kernels = manifest.get("kernels") or {}
    rules = dict(manifest.get("rules") or {})
    timelines = manifest.get("timeline") or (manifest.get("extra") or {}).get("timeline") or {}
    if not rules:
        rules = dict(Counter(e["rule"] for entries in timelines.values() for e in entries))
    head = ", ".join(f"{count} {kind}" for kind, count in kernels.items())
    rows = [(escape(rule), str(n)) for rule, n in sorted(rules.items(), key=lambda r: -r[1])]
    return f"<h2>Kernels by rule</h2><p>{escape(head)}</p>" + _table(rows)


def _updated(updated: Mapping[str, float]) -> str:
    rows = [(f"<code>{escape(name)}</code>", "all" if share == 1 else f"{share:.0%}")
            for name, share in updated.items()]  # fmt: skip
    return (
        f"<h2>What learns</h2><details{' open' if len(rows) <= 20 else ''}>"
        f"<summary>{len(rows)} tensors</summary>{_table(rows)}</details>"
    )


def _versions(versions: Mapping[str, str]) -> str:
    text = " · ".join(f"{name} {version}" for name, version in versions.items())
    return f'<p class="dim">{escape(text)}</p>' if text else ""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of (HTML, text on the right)."""
    body = "".join(f'<tr><td>{a}</td><td class="n">{escape(b)}</td></tr>' for a, b in rows)
    return f"<table>{body}</table>"
