"""What `evaluate` found: lines on the screen, evaluation.csv, .json and .png.

The CSV repeats in every row what is the same for all, so that rows of several evaluations can be joined and each still
says how it was made.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_diffusion.generative import FIGURES
from lightning_diffusion.io import write_atomically
from lightning_diffusion.plots import QualityPoint, quality_curves

Row = dict[str, Any]

SHOWN = ("weights", "sampler", "steps", "guidance", "evaluations", *FIGURES, "seconds")
GUIDANCE = ("guidance_interval", "guidance_rescale", "guide", "guide_weights")
COLUMNS = (*SHOWN[:4], *GUIDANCE, "evaluations", *FIGURES, "seconds", "sampler_settings")
SAID = (
    "checkpoint",
    "checkpoint_step",
    "samples",
    "seed",
    "data",
    "data_hash",
    "training_images",
    "held_out_images",
    "extractor",
    "versions",
)

_HEADS = {name: name.replace("near_copies_held_out", "held_out") for name in SHOWN}
_WIDTHS = {head: max(len(head), 9) for head in _HEADS.values()}


def heading() -> str:
    """Of the table on the screen."""
    return "  ".join(name.rjust(width) for name, width in _WIDTHS.items())


def line(row: Row) -> str:
    """Of the table on the screen."""
    return "  ".join(_cell(row[name]).rjust(_WIDTHS[head]) for name, head in _HEADS.items())


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(out: Path, rows: Sequence[Row], said: Mapping[str, Any]) -> None:
    """CSV and JSON, after every row, so that what was measured is not lost.

    Args:
        out: folder.
        rows: with the `COLUMNS`.
        said: of all rows, with the names in `SAID`.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, (*COLUMNS, *SAID))
    writer.writeheader()
    writer.writerows({**row, **said} for row in rows)
    clean = [{k: None if v != v else v for k, v in row.items()} for row in rows]  # JSON has no nan
    text = json.dumps({**said, "rows": clean}, indent=1)
    for name, content in {"evaluation.csv": table.getvalue(), "evaluation.json": text}.items():
        write_atomically(out / name, lambda file, content=content: file.write(content.encode()))  # type: ignore[misc]


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Frechet distance against evaluations of the network, a line per sampler, weights and guidance."""
    points = [
        QualityPoint(_curve(row), row["evaluations"], row["frechet"])
        for row in rows
        if math.isfinite(row["frechet"])
    ]
    if points:
        figure = quality_curves(points, title)
        write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _curve(row: Row) -> str:
    guided = "" if row["guidance"] == 1 else f", guidance {row['guidance']:g}"
    return f"{row['sampler']}, {row['weights']}{guided}"
