"""From one GPU to 1,024: memory, communication, averages, checkpoints, data and failures, each with its formula.

python benchmarks/scaling.py [--width 1536 --depth 36 --heads 24] [--global-batch 2048] [--mfu 0.4] ...

Prints the tables of docs/scaling.md. Counted on the network itself, made without memory: parameters, operations, the
memory plan. Measured on this machine: what one process reads of latents. All else is computed from the assumptions,
which are the arguments.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import lightning_diffusion as ld
from lightning_diffusion.analysis.memory import MemoryPlanner, Setting, Strategy
from lightning_diffusion.callbacks import EMA
from lightning_diffusion.chunk_reading import ChunkReader
from lightning_diffusion.chunks import write_chunk, write_index

SHAPE, DEVICES = (4, 64, 64), (1, 8, 64, 256, 1024)
DAY, SAMPLES = 86_400.0, 2048
SETTING = ("bf16-mixed", True)
ASSUMPTIONS: dict[str, tuple[float, str]] = {
    "width": (1536, "of the DiT; patches of 2 x 2"),
    "depth": (36, "blocks"),
    "heads": (24, "attention heads"),
    "global_batch": (2048, "images per step"),
    "micro_batch": (16, "images per device and micro-batch, at most"),
    "images": (1e9, "trained on in all"),
    "peak": (989e12, "FLOP/s of a device, bfloat16 dense: NVIDIA H100 SXM data sheet"),
    "mfu": (0.4, "share of the peak, operations done again not counted"),
    "node": (8, "devices per node"),
    "bus_inside": (360e9, "B/s, NCCL's bus bandwidth in a node: 80 % of NVLink 4's 450 GB/s per direction"),
    "bus_across": (320e9, "B/s, across nodes: 80 % of eight 400 Gb/s adapters per node"),
    "memory_rate": (3.35e12, "B/s of device memory: H100 data sheet"),
    "write_node": (2e9, "B/s that a node writes to shared storage"),
    "write_all": (100e9, "B/s that the storage takes in all"),
    "failures": (
        4.7e-4,
        "per device and day: 419 in 54 days on 16,384 GPUs (Dubey et al. 2024, section 3.3.4)",
    ),
    "restart": (600, "s from a failure to the first step: noticing, replacing, reading the checkpoint"),
    "averages": (2, "EMAs that are kept"),
}


@dataclass(frozen=True)
class Counts:
    """Of the network: parameters, operations of forward and backward per image, bytes of a latent with its label."""

    parameters: int
    operations: int
    sample_bytes: int


def network(given: Any) -> ld.DiT:
    size = ld.DiTSize(int(given.width), int(given.depth), int(given.heads))
    with torch.device("meta"):
        return ld.DiT(SHAPE, 2, size, num_classes=1000)


def count(net: ld.DiT) -> Counts:
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        out = net(torch.empty(1, *SHAPE), torch.empty(1), label=torch.zeros(1, dtype=torch.int64))
        out.sum().backward()
    numbers = math.prod(SHAPE)
    return Counts(sum(p.numel() for p in net.parameters()), counter.get_total_flops(), 2 * 4 * numbers + 8)


def micro_batch(n: int, given: Any) -> tuple[int, int]:
    """Images per device and micro-batch, and micro-batches per step."""
    size = int(min(given.micro_batch, given.global_batch / n))
    return size, int(given.global_batch / (n * size))


def volume(n: int, strategy: Strategy, counts: Counts, given: Any) -> float:
    """Bytes through each device per step. All-reduce: 2 (n-1)/n 4 P. FSDP2: per micro-batch two gathers of 2 P and a
    scatter of 4 P, (n-1)/n of each."""
    share = (n - 1) / n
    if strategy == "ddp":
        return 2 * share * 4 * counts.parameters
    return share * 8 * counts.parameters * micro_batch(n, given)[1]


def seconds(n: int, strategy: Strategy, counts: Counts, given: Any) -> tuple[float, float]:
    """Of a step: computing, C B / (n MFU peak); communicating, volume / bus bandwidth."""
    computing = counts.operations * given.global_batch / (n * given.mfu * given.peak)
    bus = given.bus_inside if n <= given.node else given.bus_across
    return computing, volume(n, strategy, counts, given) / bus if n > 1 else 0.0


def checkpoint(counts: Counts, given: Any) -> float:
    """Bytes: weights and Adam's two moments, and the averages, 4 P each."""
    return 4 * counts.parameters * (3 + given.averages)


def writing(n: int, counts: Counts, given: Any) -> tuple[float, float]:
    """Seconds to write a checkpoint: one process alone; all nodes, each its shards."""
    size, nodes = checkpoint(counts, given), max(n / given.node, 1)
    return size / given.write_node, size / min(nodes * given.write_node, given.write_all)


def interval(cost: float, between: float) -> float:
    """Seconds between checkpoints that lose the least: Young 1974, sqrt(2 C M), with Daly 2006's next terms."""
    x = cost / (2 * between)
    return math.sqrt(2 * cost * between) * (1 + math.sqrt(x) / 3 + x / 9) - cost


def lost(cost: float, between: float, restart: float) -> float:
    """Share of the time: writing, C / T; what is done again, T / 2 M; starting again, R / M."""
    t = interval(cost, between)
    return cost / t + (t / 2 + restart) / between


def table(title: str, head: str, rows: list[list[str]], side: str = "---:") -> None:
    columns = head.split(" | ")
    print(f"\n### {title}\n\n| {head} |\n| {' | '.join([side] * len(columns))} |")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def memory_rows(net: ld.DiT, given: Any) -> list[list[str]]:
    callbacks = [EMA() for _ in range(int(given.averages))]
    batch = (int(given.micro_batch), *SHAPE)
    planner = MemoryPlanner(ld.DiffusionModule(net), batch, Setting(*SETTING), callbacks)
    rows = []
    sharded: list[tuple[Strategy, int]] = [("fsdp", n) for n in DEVICES[1:]]
    strategies: list[tuple[Strategy, int]] = [("one", 1), ("ddp", 8), *sharded]
    for strategy, n in strategies:
        parts = planner.over(Setting(*SETTING, strategy, n)).parts
        rows.append([str(n), strategy, *(f"{part / 1e9:.2f}" for part in parts), f"{sum(parts) / 1e9:.1f}"])
    return rows


def step_rows(counts: Counts, given: Any) -> list[list[str]]:
    rows = []
    for n in DEVICES:
        for strategy in ("ddp", "fsdp") if n > 1 else ("one",):
            computing, talking = seconds(n, strategy, counts, given)
            moved = volume(n, strategy, counts, given) / 1e9 if n > 1 else 0.0
            rates = [given.global_batch / t for t in (max(computing, talking), computing + talking)]
            batches = " x ".join(str(number) for number in micro_batch(n, given))
            times = [f"{1e3 * computing:,.0f}", f"{1e3 * talking:,.0f}"]
            rows.append(
                [str(n), strategy, batches, f"{moved:.1f}", *times, *(f"{rate:,.0f}" for rate in rates)]
            )
    return rows


def run_rows(counts: Counts, given: Any, read: float) -> list[list[str]]:
    """With DDP's step, communication hidden behind computing."""
    rows = []
    for n in DEVICES:
        step = max(seconds(n, "ddp", counts, given))
        rate, update = given.global_batch / step, 12 * given.averages * counts.parameters / given.memory_rate
        data = rate * counts.sample_bytes / 1e6
        days = given.images / rate / DAY
        readers = rate / n / read
        percent = [f"{100 * update / step:.2f} %", f"{100 * update / n / step:.3f} %"]
        rows.append([str(n), f"{days:,.2f}", f"{data:,.0f}", f"{data / n:.2f}", f"{readers:.3f}", *percent])
    return rows


def failure_rows(counts: Counts, given: Any) -> list[list[str]]:
    rows = []
    for n in DEVICES:
        per_day = given.failures * n
        between = DAY / per_day
        alone, sharded = writing(n, counts, given)
        chosen = [
            f"{interval(c, between) / 60:.0f} min, {100 * lost(c, between, given.restart):.2f} %"
            for c in (alone, sharded)
        ]
        hourly = 3600 / between / 2 + alone / 3600 + given.restart / between
        costs = [f"{alone:.0f}", f"{sharded:.1f}"]
        rows.append(
            [str(n), f"{per_day:.4f}", f"{between / DAY:,.1f}", *costs, *chosen, f"{100 * hourly:.2f} %"]
        )
    return rows


def measured_reading() -> float:
    """Latents per second that one process reads, decodes and stacks, in batches of 64 in a drawn order."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "training"
        mean = torch.randn(SAMPLES // 4, *SHAPE, generator=generator)
        label = torch.zeros(len(mean), dtype=torch.int64)
        samples = {"mean": mean, "std": mean.abs(), "label": label}
        for number in range(4):
            write_chunk(folder, number, samples)
        write_index(folder, 4, {name: x[:1] for name, x in samples.items()})
        reader, order = ChunkReader(temporary, "training"), torch.randperm(SAMPLES, generator=generator)
        reader.read(order.tolist())
        began = time.perf_counter()
        for part in order.split(64):
            reader.read(part.tolist())
        return SAMPLES / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (default, meaning) in ASSUMPTIONS.items():
        help_text = meaning.replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default, help=help_text)
    parser.add_argument("--only-measure", action="store_true", help="only read")
    given = parser.parse_args()
    read = measured_reading()
    print(f"measured: one process reads {read:,.0f} latents of {2 * 4 * math.prod(SHAPE):,} bytes per second")
    if given.only_measure:
        return
    net = network(given)
    counts = count(net)
    print(
        f"counted: {counts.parameters / 1e9:.3f} B parameters, {counts.operations / 1e12:.2f} TFLOP per image"
    )
    print(f"computed: a checkpoint has {checkpoint(counts, given) / 1e9:.1f} GB")
    rows = [
        [f"`--{name.replace('_', '-')}`", f"{getattr(given, name):g}", said]
        for name, (_, said) in ASSUMPTIONS.items()
    ]
    table("Assumptions", "argument | value | what", rows, "---")
    head = "devices | strategy | parameters | gradients | Adam | averages | activations | communication | GB"
    table("Memory", head, memory_rows(net, given))
    head = (
        "devices | strategy | micro-batches | GB | computing, ms | communicating, ms | images/s | not hidden"
    )
    table("A step", head, step_rows(counts, given))
    head = "devices | days | MB/s | per device | readers per device | averages, DDP | averages, FSDP2"
    table("A run", head, run_rows(counts, given, read))
    head = "devices | failures a day | days between | one file, s | sharded, s | one file: every, lost"
    head += " | sharded: every, lost | one file hourly"
    table("Failures", head, failure_rows(counts, given))


if __name__ == "__main__":
    main()
