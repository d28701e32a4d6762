"""Tables and pictures of docs/stability.md from what stability.py has written."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pictures import write
from stability_networks import DIT_OPTIONS, SIZES

from lightning_diffusion.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROWS, LAYERS = DOCS / "results" / "stability.csv", DOCS / "results" / "stability_layers.csv"
ALL = "+".join(DIT_OPTIONS)
NAMES = {
    ("dit", ALL): "DiT, all options",
    ("dit", "rotary+rms_norm+swiglu"): "DiT, all but qk_norm",
    ("dit", "plain"): "DiT, no option",
    ("unet", "plain"): "UNet",
    ("magnitude_preserving", "qk_norm+weight_norm"): "MagnitudePreservingUNet",
    ("magnitude_preserving", "qk_norm"): "the same without weight norm",
    ("magnitude_preserving", "weight_norm"): "the same without qk norm",
}
POSITIONS = {
    ("dit", "qk_norm+rms_norm+swiglu"): "DiT, all but rotary",
    ("dit", "qk_norm"): "DiT, qk_norm alone",
}
COLOURS = ("#0072B2", "#2A9D8F", "#8AB17D", "#E9A23B", "#C1440E")
"""From the smallest network to the largest, or from the first layer to the last."""
Row = dict[str, str]


def rows(path: Path, **where: Any) -> list[Row]:
    """Those of a file whose columns are as given."""
    with path.open() as file:
        return [r for r in csv.DictReader(file) if all(r[k] == str(v) for k, v in where.items())]


def values(found: Iterable[Row], name: str) -> list[float]:
    return [float(row[name]) for row in found]


def table() -> None:
    for part in (rates, losses, options, long, photographs, precisions):
        print("\n".join(part()), end="\n\n")


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def rates() -> list[str]:
    """The highest rate before the first that diverges (of any seed), by size."""
    body = [
        [
            name,
            *(
                _highest(rows(ROWS, images=8, network=n, variant=v, size=size, precision="bf16"))
                for size in SIZES
            ),
        ]
        for (n, v), name in NAMES.items()
    ]
    return markdown(["network", *(f"size {size}" for size in SIZES)], body)


def _highest(found: list[Row]) -> str:
    lost = min((float(row["rate"]) for row in found if row["diverged"] == "1"), default=math.inf)
    kept = max((float(row["rate"]) for row in found if float(row["rate"]) < lost), default=None)
    if kept is None:
        return "" if math.isinf(lost) else f"below {lost:g}"
    return f"{kept:g}" if math.isfinite(lost) else f"{kept:g} or more"


def losses() -> list[str]:
    """Held-out loss, largest logit and activation on the digits at each rate, size 3, median of seeds."""
    tried = sorted({float(row["rate"]) for row in rows(ROWS, images=8, size=3)})
    body = [
        [
            name,
            *(
                _figures(rows(ROWS, images=8, network=n, variant=v, size=3, rate=r, precision="bf16"))
                for r in tried
            ),
        ]
        for (n, v), name in NAMES.items()
    ]
    return markdown(["network, size 3", *(f"rate {rate:g}" for rate in tried)], body)


def _figures(found: list[Row]) -> str:
    if not found:
        return ""
    loss, logit, activation = (median(values(found, name)) for name in ("end", "logit", "activation"))
    lost = sum(row["diverged"] == "1" for row in found)
    return f"{short(loss)}, {short(logit)}, {short(activation)}" + (
        " diverged" if 2 * lost > len(found) else ""
    )


def short(value: float) -> str:
    """Two or three digits; powers of ten from 10,000 on."""
    return (
        f"{value:.0e}".replace("e+0", "e")
        if value >= 1e4
        else f"{value:.3g}"
        if value < 100
        else f"{value:.0f}"
    )


def options() -> list[str]:
    """Each option of DiT on and off, over the eight combinations of the others and all seeds."""
    found = rows(ROWS, images=8, network="dit", size=3, precision="bf16")
    tried = sorted({float(row["rate"]) for row in found if row["variant"] == "qk_norm+swiglu"})
    body = []
    for option in DIT_OPTIONS:
        for on in (True, False):
            own = [row for row in found if (option in row["variant"].split("+")) == on]
            cells = [_effect([row for row in own if float(row["rate"]) == rate]) for rate in tried]
            body.append([f"`{option}`", "on" if on else "off", *(cell for part in cells for cell in part)])
    head = [f"{what} at {rate:g}" for rate in tried for what in ("loss", "logit", "activation", "diverged")]
    return markdown(["option", "", *head], body)


def _effect(found: list[Row]) -> list[str]:
    figures = [short(median(values(found, name))) for name in ("end", "logit", "activation")]
    return [*figures, f"{sum(row['diverged'] == '1' for row in found)} of {len(found)}"]


def long() -> list[str]:
    """Held-out loss, largest logit and activation after 600 steps of 32 digits at a usual rate, median of seeds."""
    body = [
        [name, _figures(found)]
        for (n, v), name in (NAMES | POSITIONS).items()
        if (found := rows(DOCS / "results" / "stability_long.csv", network=n, variant=v))
    ]
    return markdown(["network, size 3", "600 steps, rate 0.002"], body)


def photographs() -> list[str]:
    """Held-out loss, largest logit and activation by size, crops of photographs."""
    tried = sorted({float(row["rate"]) for row in rows(ROWS, images=32)})
    body = [
        [
            name,
            f"{r:g}",
            *(_figures(rows(ROWS, images=32, network=n, variant=v, size=size, rate=r)) for size in SIZES),
        ]
        for (n, v), name in (NAMES | POSITIONS).items()
        for r in tried
        if rows(ROWS, images=32, network=n, variant=v, rate=r)
    ]
    return markdown(["network, 32 x 32", "rate", *(f"size {size}" for size in SIZES)], body)


def precisions() -> list[str]:
    """The control: the same trainings in float32."""
    control = rows(ROWS, precision="float32")
    tried = sorted({float(row["rate"]) for row in control})
    body = [
        [name, kind, *(_figures(rows(ROWS, **_same(n, v, r), precision=kind)) for r in tried)]
        for (n, v), name in NAMES.items()
        if any((row["network"], row["variant"]) == (n, v) for row in control)
        for kind in ("bf16", "float32")
    ]
    return markdown(["network, size 3", "precision", *(f"rate {rate:g}" for rate in tried)], body)


def _same(network: str, variant: str, rate: float) -> dict[str, Any]:
    return {"images": 8, "network": network, "variant": variant, "size": 3, "rate": rate, "seed": 1}


def picture() -> None:
    for draw in (logits, layers, final_losses):
        with style():
            write(draw(), DOCS / "images" / f"stability_{draw.__name__}.png")


def panels(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True)


def logits() -> Figure:
    """Largest attention logit of any layer over the steps, a line for each size."""
    networks = list(NAMES)[:5]
    figure, axes = panels(2, 5, 4.6)
    for line, rate in zip(axes, (0.004, 0.064), strict=True):
        for panel, (network, variant) in zip(line, networks, strict=True):
            found = rows(LAYERS, images=8, network=network, variant=variant, rate=rate)
            _sizes(panel, found, lambda row: max(numbers(row["logits"])))
            panel.set(yscale="log", ylim=(0.5, 3e5), xlim=(0, 100), xticks=(0, 40, 80))
            if rate == 0.004:
                panel.set_title(NAMES[network, variant].replace("Preserving", "-\nPreserving"), fontsize=9)
            if panel is not line[0]:
                panel.tick_params(labelleft=False)
        line[0].set_ylabel(f"rate {rate:g}")
    figure.supylabel("largest attention logit", fontsize=10)
    figure.supxlabel("step", fontsize=10)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside right upper", title="size", fontsize=9
    )
    return figure


def _sizes(panel: Axes, found: list[Row], value: Callable[[Row], float]) -> None:
    for size, colour in zip(SIZES, COLOURS, strict=True):
        own = [row for row in found if row["size"] == str(size)]
        panel.plot([int(r["step"]) for r in own], [value(r) for r in own], color=colour, label=str(size))


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split()]


def layers() -> Figure:
    """Activations and weights of every block over the steps, largest network."""
    networks = [name for name in NAMES if name[0] != "dit" or "qk_norm" in name[1] or name[1] == "plain"][:5]
    figure, axes = panels(2, len(networks), 4.8)
    for column, (network, variant) in zip(axes.T, networks, strict=True):
        found = rows(LAYERS, images=8, network=network, variant=variant, size=5, rate=0.004)
        for panel, name in zip(column, ("activations", "weights"), strict=True):
            _blocks(panel, found, name)
            panel.set(
                yscale="log",
                xlim=(0, 100),
                xticks=(0, 40, 80),
                ylim=(0.1, 20) if name == "activations" else (0.8, 2),
            )
            if panel not in axes[:, 0]:
                panel.tick_params(labelleft=False)
        title = (
            NAMES[network, variant]
            .replace("Preserving", "-\nPreserving")
            .replace("same without", "same\nwithout")
        )
        column[0].set_title(title, fontsize=9)
    axes[0, 0].set_ylabel("activations")
    axes[1, 0].set_ylabel("weights over their start")
    for panel in axes[1]:
        panel.set(yscale="linear")
    figure.supxlabel("step", fontsize=10)
    return figure


def _blocks(panel: Axes, found: list[Row], name: str) -> None:
    from matplotlib import colormaps

    if not found:
        return
    series = list(zip(*(numbers(row[name]) for row in found), strict=True))
    if name == "weights":
        series = [tuple(value / line[0] for value in line) for line in series]
    for index, line in enumerate(series):
        colour = colormaps["viridis"](0.9 * index / max(len(series) - 1, 1))
        panel.plot([int(row["step"]) for row in found], line, color=colour, linewidth=1.2)


def final_losses() -> Figure:
    """Held-out loss after the training against the learning rate, diverged ones marked."""
    figure, axes = panels(2, 3, 5.6)
    for panel, (network, variant) in zip(axes.flat, list(NAMES)[:6], strict=True):
        for size, colour in zip(SIZES, COLOURS, strict=True):
            found = rows(ROWS, images=8, network=network, variant=variant, size=size, precision="bf16")
            _curve(panel, found, colour, str(size))
        panel.axhline(1.018, color="0.6", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", ylim=(0.45, 1.3), title=NAMES[network, variant])
    figure.supxlabel("learning rate", fontsize=10)
    figure.supylabel("held-out loss after 100 steps", fontsize=10)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside right upper", title="size", fontsize=9
    )
    return figure


def _curve(panel: Axes, found: list[Row], colour: str, label: str) -> None:
    tried = sorted({float(row["rate"]) for row in found})
    ends = [
        min(median(values((r for r in found if float(r["rate"]) == rate), "end")), 1.25) for rate in tried
    ]
    ends = [1.25 if math.isnan(end) else end for end in ends]
    panel.plot(tried, ends, "o-", color=colour, label=label, markersize=3.5)
    lost = [(rate, end) for rate, end in zip(tried, ends, strict=True) if end > 1.018]
    panel.plot(
        *zip(*lost, strict=True) if lost else ((), ()), "x", color=colour, markersize=9, markeredgewidth=2
    )
