"""ema: averages of any width after training, from what a run has saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diffusion.commands.parser import Parser, run_action

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_diffusion.reconstruction import Reconstruction
    from lightning_diffusion.snapshots import Snapshot

POOR = 0.02

HELP = """\
usage: lightning-diffusion ema list RUN
       lightning-diffusion ema reconstruct RUN --sigma-rel S[,S...] --out FILE.safetensors
       lightning-diffusion ema sweep RUN --sigma-rels FROM:TO:COUNT --metric frechet|val-loss
       lightning-diffusion ema average CHECKPOINT ... --out FILE.safetensors

Averages of the weights over any width, after training with PostHocEMA. A width is the deviation of the
average over the length of the training: 0.03 is short, 0.25 long.

  list          what was saved, and which widths it can express
  reconstruct   write averages as files, which `sample --weights FILE` and others read
  sweep         try several widths, draw the curve, write the best
  average       mean of ordinary checkpoints, for a run that kept no averages

lightning-diffusion ema ACTION --help tells the options of each."""


def run(command: str, arguments: list[str]) -> int:
    """Do what the first word says."""
    return run_action("ema", arguments, _ACTIONS, HELP)


def _list(arguments: list[str]) -> None:
    parser = Parser("ema list", "What snapshots a run has, and which widths they can express.")
    parser.add_argument("run", metavar="RUN", help="run folder, or folder of snapshots")
    given = parser.parse(arguments)
    from lightning_diffusion.reconstruction import snapshots_of

    snapshots = snapshots_of(given.run)
    print(_described(snapshots))
    for sigma_rel, error in _expected_errors(snapshots):
        print(f"  {sigma_rel:<6g} error {error:.1e}{'   poor' if error > POOR else ''}")


def _described(snapshots: Sequence[Snapshot]) -> str:
    steps = sorted({s.step for s in snapshots})
    widths = ", ".join(f"{w:g}" for w in sorted({s.sigma_rel for s in snapshots}))
    size = sum(s.path.stat().st_size for s in snapshots) / 1e6
    return (
        f"{snapshots[0].path.parent}: {len(snapshots)} snapshots, {size:.1f} MB, of widths {widths}\n"
        f"at {len(steps)} steps from {steps[0]} to {steps[-1]}; run {snapshots[0].run}\n"
        f"Widths at step {steps[-1]}, and |rebuilt - true| over |true - online| to expect:"
    )


def _expected_errors(snapshots: Sequence[Snapshot]) -> list[tuple[float, float]]:
    from lightning_diffusion.posthoc import predicted_error, solve_coefficients

    times, widths, end = [s.time for s in snapshots], [s.sigma_rel for s in snapshots], snapshots[-1].time
    candidates = (0.01, 0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25, 0.28)
    found = [(s, solve_coefficients(times, widths, end, s, "random_walk")) for s in candidates]
    return [(s, predicted_error(times, widths, end, s, x)) for s, x in found]


def _reconstruct(arguments: list[str]) -> None:
    parser = Parser(
        "ema reconstruct", "Write averages of one or several widths, as float32 by parameter name."
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, or folder of snapshots")
    add("--sigma-rel", required=True, metavar="S[,S...]", help="widths, between 0 and 0.2887")
    add("--out", required=True, metavar="FILE", help="NAME.safetensors; of several widths NAME-S.safetensors")
    add("--at-step", type=int, metavar="N", help="as the average was at the snapshot of this step (the last)")
    _add_common(parser)
    given = parser.parse(arguments)
    widths = parse_widths(given.sigma_rel)
    files = {w: _file_of(given.out, w if len(widths) > 1 else None) for w in widths}
    for file in files.values():
        refuse_file(file, given.overwrite)
    from lightning_diffusion.reconstruction import reconstruct, snapshots_of

    for rebuilt in reconstruct(
        snapshots_of(given.run), widths, given.at_step, given.metric.replace("-", "_")
    ):
        write_weights(files[rebuilt.sigma_rel], rebuilt.weights)
        where = f"average of width {rebuilt.sigma_rel:g} at step {rebuilt.step}"
        print(f"{files[rebuilt.sigma_rel]}: {where}, {expected(rebuilt)}")


def expected(rebuilt: Reconstruction) -> str:
    """How good an average is, in words."""
    warning = "   warning: these snapshots cannot express this width well"
    return f"expected error {rebuilt.error:.1e}{warning if rebuilt.error > POOR else ''}"


def _average(arguments: list[str]) -> None:
    parser = Parser("ema average", "Mean of the weights of ordinary checkpoints of one run.")
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="files, in any order")
    add("--decay", type=float, default=1.0, metavar="B", help="share of a checkpoint over the next one (1)")
    add("--out", required=True, metavar="FILE", help="NAME.safetensors")
    add("--overwrite", action="store_true", help="replace what is there")
    given = parser.parse(arguments)
    out = _file_of(given.out)
    refuse_file(out, given.overwrite)
    from lightning_diffusion.commands.quiet import quiet
    from lightning_diffusion.reconstruction import average_checkpoints

    quiet()
    write_weights(
        out, average_checkpoints(given.checkpoints, given.decay, _averaged_names(given.checkpoints[0]))
    )
    print(f"{out}: mean of {len(given.checkpoints)} checkpoints, decay {given.decay:g}")


def _averaged_names(checkpoint: str) -> list[str] | None:
    """The names of a DiffusionModule's averaged parameters; None for what is not one."""
    from lightning_diffusion.commands.sample import load
    from lightning_diffusion.io import load_checkpoint

    recorded = load_checkpoint(checkpoint).get("hyper_parameters", {})
    return list(load(checkpoint).averaged_parameters()) if "network" in recorded else None


def _add_common(parser: Parser) -> None:
    metrics = ["random-walk", "white"]
    parser.add_argument(
        "--metric",
        choices=metrics,
        default=metrics[0],
        help="of the solve; white is the published one (random-walk)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def parse_widths(text: str) -> list[float]:
    """`0.03,0.07` or `FROM:TO:COUNT`, geometrically spaced."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, count = text.split(":")
        low, high, number = float(first), float(last), int(count)
        return [low * (high / low) ** (i / max(number - 1, 1)) for i in range(number)]
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"widths {text!r}: expected S, S,S,... or FROM:TO:COUNT such as 0.03:0.25:12"
        ) from None


def _file_of(out: str, sigma_rel: float | None = None) -> Path:
    path = Path(out)
    if path.suffix != ".safetensors":
        raise ValueError(f"--out {out}: expected a name that ends in .safetensors")
    return path if sigma_rel is None else path.with_name(f"{path.stem}-{sigma_rel:g}{path.suffix}")


def refuse_file(path: Path, overwrite: bool) -> None:
    """Nothing is overwritten unasked."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: give another --out, or --overwrite")


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """A safetensors file, there when it is whole."""
    from safetensors.torch import save_file

    from lightning_diffusion.io import publish, temporary_beside

    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        save_file({name: x.contiguous() for name, x in weights.items()}, temporary)
        publish(temporary, path)


def _sweep(arguments: list[str]) -> None:
    from lightning_diffusion.commands.ema_sweep import sweep

    sweep(arguments)


_ACTIONS: dict[str, Any] = {"list": _list, "reconstruct": _reconstruct, "sweep": _sweep, "average": _average}
