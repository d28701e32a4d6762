"""Which networks stay stable when they grow: learning rates until they diverge, and what grows on the way.

    python benchmarks/stability.py run STAGE [--minutes 8]      # keeps the rows that it finds
    python benchmarks/stability.py table                        # the tables of docs/stability.md
    python benchmarks/stability.py picture                      # docs/images/stability_*.png

Stages. `sizes`: each network at five sizes on the digits, rates in factors of four up to the first that diverges.
`options`: DiT with each of the sixteen combinations of its options, at one size. `photographs`: five sizes on crops of
32 x 32 of two photographs. `long`: options of DiT at a usual rate. `float32`: the control.

A training is short, 100 steps of 16 digits or 40 of 8 crops (`long`: 600 of 32 digits): linear warm-up over a tenth of
it, then constant; AdamW without decay; the objective EDM. It diverges if it ends worse on held-out images than it
began, or not at a number. bfloat16 mixed precision by bfloat16_products.py under DiffusionPrecision.
Writes docs/results/stability.csv and stability_long.csv, a row for each training, and stability_layers.csv, the layers
of some over the steps.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from stability_networks import DIT_OPTIONS, SIZES, LongRun, Run
from stability_training import Trace, train

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
ROWS, LAYERS, LONG = (RESULTS / f"stability{part}.csv" for part in ("", "_layers", "_long"))
RATES = (0.004, 0.016, 0.064, 0.256, 1.024)
TRACED_RATES = (0.004, 0.064)
ALL, WHOLE = "+".join(DIT_OPTIONS), "qk_norm+weight_norm"
WITHOUT_ROTARY = ("qk_norm+rms_norm+swiglu", "qk_norm")
NETWORKS = (
    ("dit", ALL),
    ("dit", "rotary+rms_norm+swiglu"),
    ("dit", "plain"),
    ("unet", "plain"),
    ("magnitude_preserving", WHOLE),
)
WITHOUT_WEIGHT_NORM, WITHOUT_QK_NORM = (
    ("magnitude_preserving", variant) for variant in ("qk_norm", "weight_norm")
)
Row = dict[str, str]


def sizes() -> Iterator[Run]:
    """Both ends and the middle at all rates, what lies between at two, then a second seed."""
    for size, rate in product((1, 3, 5), RATES):
        for network in (*NETWORKS, WITHOUT_WEIGHT_NORM, *([WITHOUT_QK_NORM] if size == 3 else [])):
            yield Run(8, *network, size, rate)
    for size, rate, network in product((2, 4), TRACED_RATES, NETWORKS):
        yield Run(8, *network, size, rate)
    for rate, network in product(RATES, (*NETWORKS, WITHOUT_WEIGHT_NORM)):
        yield Run(8, *network, 3, rate, seed=2)


def options() -> Iterator[Run]:
    for rate, seed in ((0.016, 1), (0.064, 1), (0.032, 1), (0.016, 2), (0.032, 2)):
        for choice in product((True, False), repeat=len(DIT_OPTIONS)):
            on = [name for name, chosen in zip(DIT_OPTIONS, choice, strict=True) if chosen]
            yield Run(8, "dit", "+".join(on) or "plain", 3, rate, seed=seed)


def photographs() -> Iterator[Run]:
    """All networks at the low rate; DiT with and without rotary positions at more."""
    for size, network in product(SIZES, NETWORKS):
        yield Run(32, *network, size, 0.004)
    for rate, size, variant in product((0.016, 0.064, 0.004), (1, 3, 5), (ALL, *WITHOUT_ROTARY, "plain")):
        yield Run(32, "dit", variant, size, rate)


def long() -> Iterator[Run]:
    for seed, variant in product((1, 2), (ALL, *WITHOUT_ROTARY, "plain", "rotary+rms_norm+swiglu")):
        yield LongRun(8, "dit", variant, 3, 0.002, seed=seed)


def float32() -> Iterator[Run]:
    for rate, network in product(RATES[1:4], NETWORKS):
        yield Run(8, *network, 3, rate, "float32")


STAGES = {stage.__name__: stage for stage in (sizes, options, photographs, long, float32)}


def rows(path: Path) -> list[Row]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def key_of(row: Row, kind: type[Run] = Run) -> Run:
    """The run that a row is of."""
    kinds = {"images": int, "size": int, "seed": int, "rate": float}
    return kind(**{field.name: kinds.get(field.name, str)(row[field.name]) for field in fields(Run)})


def is_hopeless(run: Run, done: dict[Run, Row]) -> bool:
    """Whether a lower rate has diverged already."""
    return any(
        other.rate < run.rate and row["diverged"] == "1"
        for other, row in done.items()
        if {**asdict(other), "rate": 0} == {**asdict(run), "rate": 0}
    )


def sweep(stage: str, minutes: float) -> None:
    """Run what is not there yet, until the time is up."""
    began = time.monotonic()
    for run in STAGES[stage]():
        path = LONG if isinstance(run, LongRun) else ROWS
        done = {key_of(row, type(run)): row for row in rows(path)}
        if run in done or (stage != "options" and is_hopeless(run, done)):
            continue
        if time.monotonic() - began > 60 * minutes:
            return
        at = time.monotonic()
        found, trace = train(run)
        append(path, {**asdict(run), **found, "seconds": time.monotonic() - at})
        if (
            path is ROWS
            and run.seed == 1
            and run.rate in TRACED_RATES
            and run.precision == "bf16"
            and stage != "options"
        ):
            write_layers(run, trace)
    print(f"{stage}: all there")


def write_layers(run: Run, trace: Trace) -> None:
    for record in trace.records:
        lists = {
            name: " ".join(f"{v:.3g}" for v in value)
            for name, value in record.items()
            if isinstance(value, list)
        }
        key = {name: value for name, value in asdict(run).items() if name not in ("precision", "seed")}
        append(LAYERS, {**key, "step": record["step"], "loss": record["loss"], **lists}, quiet=True)


def append(path: Path, row: dict[str, Any], quiet: bool = False) -> None:
    new = not path.exists()
    written = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(written)
    if not quiet:
        print(*written.values(), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("stage", choices=list(STAGES))
    running.add_argument("--minutes", type=float, default=8.0)
    for name in ("table", "picture"):
        commands.add_parser(name)
    given = parser.parse_args(arguments)
    if given.command == "run":
        torch.set_num_threads(1)
        sweep(given.stage, given.minutes)
    else:
        import stability_report

        getattr(stability_report, given.command)()


if __name__ == "__main__":
    main()
