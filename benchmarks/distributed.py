"""The digits job on 1, 2 and 4 processes with one global batch: the same data, the same steps, the same result?

    OMP_NUM_THREADS=1 python benchmarks/distributed.py [--out runs/distributed]

The network, objective and optimizer of configs/digits.yaml, for 120 steps of 64 images: as one process (three seeds),
DDP and FSDP2 on 2 and 4 gloo processes, and FSDP2 stopped and resumed on 2 -> 1 -> 4 processes after a third of the
steps each, in the middle of epochs. Each run is a fresh torchrun. What is done is kept in the folder; delete it to do
it again.

Asserted: in every step the processes have different images, together those of the one process; in no epoch an image
comes twice. In the first 20 steps the noise, which is otherwise each process's own, is drawn for the global batch as
well: the gradient's norm, before clipping and after, and the averages are then those of one process up to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from distributed_rank import BOUND, GIVEN, GLOBAL_BATCH, STEPS
from torch import Tensor

import lightning_diffusion as ld
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.resume import RandomKey, hash_seed

THIRD, REPEATS, PATIENCE = STEPS // 3, 16, 400
LEVELS = "levels of the held-out images, for the validation loss"


@dataclass(frozen=True)
class Run:
    """A row of the table.

    Args:
        folder: of the run.
        strategy: one, ddp or fsdp2.
        parts: processes, and the step that they stop at, one after the other.
        seed: of everything.
    """

    folder: Path
    strategy: str
    parts: tuple[tuple[int, int], ...]
    seed: int = 1

    def __str__(self) -> str:
        return {"one": f"one process, seed {self.seed}", "ddp": "DDP", "fsdp2": "FSDP2"}[self.strategy]

    @property
    def processes(self) -> str:
        return " -> ".join(str(world) for world, _ in self.parts)

    def ranks(self, part: int) -> list[Any]:
        """What the processes of a part wrote; empty if it has not been done."""
        world, until = self.parts[part]
        files = [self.folder / f"rank-{until}-{rank}.json" for rank in range(world)]
        return [json.loads(file.read_text()) for file in files] if all(map(Path.exists, files)) else []

    def steps(self) -> Iterator[list[dict[str, Any]]]:
        """What each process saw in a step, for all steps of all parts."""
        for part in range(len(self.parts)):
            yield from zip(*(rank["steps"] for rank in self.ranks(part)), strict=True)  # type: ignore[misc]

    def train(self) -> None:
        """All parts that have not been done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for part, (world, until) in enumerate(self.parts):
            if not self.ranks(part):
                print(f"{self}: {world} process(es) until step {until}", file=sys.stderr, flush=True)
                given = ("--strategy", self.strategy, "--world", world, "--seed", self.seed, "--until", until)
                launch(world, self.folder, *given)


def runs(out: Path) -> list[Run]:
    """All rows; the first is what the others are compared with."""
    seeds = [Run(out / f"one-{seed}", "one", ((1, STEPS),), seed) for seed in (1, 2, 3)]
    worlds = [(name, world) for name in ("ddp", "fsdp2") for world in (2, 4)]
    several = [Run(out / f"{name}-{world}", name, ((world, STEPS),)) for name, world in worlds]
    resumed = Run(out / "resumed", "fsdp2", ((2, THIRD), (1, 2 * THIRD), (4, STEPS)))
    return [*seeds, *several, resumed]


def launch(world: int, *given: object) -> None:
    """A torchrun of its own, ended with all its processes if it takes too long."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    line += [
        os.path.join(os.path.dirname(os.path.abspath(__file__)), "distributed_rank.py"),
        *map(str, given),
    ]
    started = subprocess.Popen(
        line, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, said = started.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise SystemExit(f"{line} did not end within {PATIENCE} s.") from None
    if started.returncode:
        raise SystemExit(f"{line} failed:\n{said[-6000:]}")


def check_images(run: Run, single: Run) -> None:
    """Different images on all processes, together those of one; none twice in an epoch, none left out at a stop."""
    epochs: dict[int, list[int]] = {}
    taken = list(zip(run.steps(), single.steps(), strict=True))
    assert [ranks[0]["step"] for ranks, _ in taken] == list(range(1, STEPS + 1)), run
    for ranks, (alone,) in taken:
        images = [image for rank in ranks for image in rank["images"]]
        assert len(set(images)) == len(images) == GLOBAL_BATCH, (run, ranks[0]["step"])
        assert set(images) == set(alone["images"]), (run, ranks[0]["step"])
        epochs.setdefault(ranks[0]["epoch"], []).extend(images)
    assert all(len(set(images)) == len(images) for images in epochs.values()), run


def furthest_norm(run: Run, single: Run, name: str) -> float:
    """The largest relative difference of a gradient's norm in the steps whose noise is given, over all processes."""
    steps = list(zip(run.steps(), single.steps(), strict=True))[:GIVEN]
    return max(abs(rank[name] / alone[name] - 1) for ranks, (alone,) in steps for rank in ranks)


def was_clipped(run: Run) -> float:
    """Share of the steps whose noise is given in which the gradient was longer than the bound."""
    return sum(ranks[0]["norm"] > BOUND for ranks in list(run.steps())[:GIVEN]) / GIVEN


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference |a - b| / |b| of a parameter's average."""
    return max(float((found[name] - x).norm() / x.norm().clamp(min=1e-12)) for name, x in expected.items())


@torch.no_grad()
def validation_losses(module: ld.DiffusionModule) -> tuple[float, float]:
    """Of the online and the averaged weights, on the held-out digits at the same levels and noise for all runs."""
    data = DigitsDataModule().held_out_data()
    batch = data.__getitems__(range(len(data)))
    x0, label = module.eval().representation.encode(batch["image"]), {"label": batch["label"]}

    def loss() -> float:
        keys = [RandomKey(hash_seed(LEVELS), batch=index) for index in range(REPEATS)]
        losses = [module.objective.loss(module.network, x0, label, key).loss for key in keys]
        return float(torch.stack(losses).mean())

    online = loss()
    module.load_state_dict(module.averages["ema"], strict=False)
    return online, loss()


def of_processes(run: Run, value: Callable[[dict[str, Any]], float]) -> list[float]:
    """A figure of the processes of the last part."""
    return [value(rank) for rank in run.ranks(len(run.parts) - 1)]


def figures(run: Run, single: Run) -> dict[str, Any]:
    """A row; losses and weights from the checkpoint."""
    check_images(run, single if run.seed == single.seed else run)
    module, reference = (ld.load_module(one.folder / "last.ckpt") for one in (run, single))
    averages = {name: x.clone() for name, x in module.averages["ema"].items()}
    online, averaged = validation_losses(module)
    early = [torch.load(one.folder / "early.pt") for one in (run, single)]
    return {
        "online": online,
        "averaged": averaged,
        "norm": furthest_norm(run, single, "norm"),
        "clipped": furthest_norm(run, single, "clipped"),
        "early": apart(early[0], early[1]),
        "end": apart(averages, reference.averages["ema"]),
        "images/s": GLOBAL_BATCH / max(of_processes(run, lambda rank: rank["step_seconds"])),
        "kept": max(of_processes(run, lambda rank: rank["kept"])),
        "peak": max(of_processes(run, lambda rank: rank["peak"])),
    }


def result_table(rows: dict[Run, dict[str, Any]]) -> str:
    """The same result? Relative differences are from seed 1."""
    lines = [
        f"| | processes | loss, online | loss, averaged | norms, {GIVEN} steps | clipped | averages, {GIVEN} steps "
        "| averages, end |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run, row in rows.items():
        apart_by = [f"{row[name]:.1e}" for name in ("norm", "clipped", "early", "end")]
        cells = [f"{row['online']:.4f}", f"{row['averaged']:.4f}", *(apart_by if row["end"] else [""] * 4)]
        lines.append(f"| {run} | {run.processes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(rows: dict[Run, dict[str, Any]]) -> str:
    """Images per second and memory."""
    lines = ["| | processes | images/s | state, MB | peak, MB |", "| --- | --- | ---: | ---: | ---: |"]
    for run, row in rows.items():
        if run.seed == 1 and len(run.parts) == 1:
            numbers = f"{row['images/s']:.0f} | {row['kept']:.2f} | {row['peak']:.0f}"
            lines.append(f"| {run} | {run.processes} | {numbers} |")
    return "\n".join(lines)


def verdict(rows: dict[Run, dict[str, Any]]) -> str:
    """How far the losses are from those of the seeds of one process, in their sample deviations."""
    said = []
    for name in ("online", "averaged"):
        alone = torch.tensor([row[name] for run, row in rows.items() if run.strategy == "one"])
        others = [row[name] for run, row in rows.items() if run.strategy != "one"]
        furthest = max(abs(loss - float(alone.mean())) for loss in others)
        said.append(
            f"{name}: seeds {alone.mean():.4f} +- {alone.std():.4f}, furthest other {furthest / alone.std():.1f} "
            "deviations away"
        )
    return "; ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/distributed"), help="what is done is kept here"
    )
    all_runs = runs(parser.parse_args().out)
    for run in all_runs:
        run.train()
    single = all_runs[0]
    rows = {run: figures(run, single) for run in all_runs}
    print(result_table(rows), "\n\n", cost_table(rows), sep="")
    print(f"\nclipped in the first {GIVEN} steps: {was_clipped(single):.0%} of steps. {verdict(rows)}")


if __name__ == "__main__":
    main()
