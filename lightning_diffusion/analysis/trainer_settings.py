"""What a Trainer is told, without making one: a run on eight GPUs can be examined on a machine that has none."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import Precision

_SHORT_RUN: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}


@dataclass(frozen=True)
class TrainerSettings:
    """The arguments of a Trainer.

    Args:
        arguments: by their names in `lightning.Trainer`; those left out are Lightning's defaults.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, trainer: Trainer) -> TrainerSettings:
        """Those of a Trainer that was made in Python."""
        arguments = {
            "max_steps": trainer.max_steps,
            "max_epochs": trainer.max_epochs,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "accelerator": trainer.accelerator,
            "devices": trainer.world_size,
            "strategy": trainer.strategy,
            "precision": trainer.precision,
            "plugins": [trainer.precision_plugin],
            "callbacks": list(trainer.callbacks),  # type: ignore[attr-defined]
        }
        return cls(arguments)

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps; None if they are not limited."""
        steps = self.arguments.get("max_steps")
        return None if steps is None or steps < 0 else int(steps)

    @property
    def max_epochs(self) -> int | None:
        """Passes through the data; None if they are not limited. Lightning makes 1000 where nothing is said."""
        epochs = self.arguments.get("max_epochs")
        if epochs is None:
            return 1000 if self.max_steps is None and self.arguments.get("max_time") is None else None
        return None if epochs < 0 else int(epochs)

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        return int(self.arguments.get("accumulate_grad_batches") or 1)

    @property
    def device(self) -> torch.device:
        """That kind which the Trainer would take, if this machine has one; else the CPU."""
        given = self.arguments.get("accelerator") or "auto"
        name = given if isinstance(given, str) else type(given).__name__.removesuffix("Accelerator").lower()
        wants_gpu = name in ("auto", "gpu", "cuda")
        return torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")

    @property
    def devices(self) -> int:
        """Processes on all nodes."""
        nodes = int(self.arguments.get("num_nodes") or 1)
        return nodes * _number_of(self.arguments.get("devices", "auto"))

    @property
    def strategy(self) -> Any:
        """A name or one of Lightning's strategies."""
        return self.arguments.get("strategy") or "auto"

    @property
    def callbacks(self) -> tuple[Callback, ...]:
        """Those that are configured."""
        return tuple(_listed(self.arguments.get("callbacks")))

    @property
    def precision_plugin(self) -> Precision | None:
        """A plugin that was given in place of `precision`."""
        plugins = [p for p in _listed(self.arguments.get("plugins")) if isinstance(p, Precision)]
        return plugins[0] if plugins else None

    @property
    def precision(self) -> str:
        """32-true, bf16-mixed, 16-mixed, bf16-true, ...: the plugin's, if there is one."""
        plugin = self.precision_plugin
        named = str(plugin.precision if plugin else self.arguments.get("precision") or "32-true")
        return {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}.get(named, named)

    @contextmanager
    def short_trainer(self, steps: int, callbacks: Sequence[Callback] = ()) -> Iterator[Trainer]:
        """A Trainer for a few optimizer steps on one device of this machine, which writes nothing that stays.

        Precision, accumulation and clipping are the run's own; callbacks are only those given here.
        """
        kept = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "accelerator")
        arguments = {name: self.arguments[name] for name in kept if self.arguments.get(name) is not None}
        if not torch.cuda.is_available() and arguments.get("accelerator") in ("gpu", "cuda"):
            arguments["accelerator"] = "cpu"
        plugin = copy.deepcopy(self.precision_plugin)
        arguments |= {"plugins": [plugin]} if plugin else {"precision": self.precision}
        with tempfile.TemporaryDirectory() as folder:
            yield Trainer(
                **_SHORT_RUN,
                **arguments,
                devices=1,
                max_steps=steps,
                callbacks=list(callbacks),
                default_root_dir=folder,
            )


def _listed(given: Any) -> list[Any]:
    several = given if isinstance(given, (list, tuple)) else [given]
    return [one for one in several if one is not None]


def _number_of(devices: Any) -> int:
    if isinstance(devices, (list, tuple)):
        return len(devices)
    text = str(devices)
    if text.lstrip("-").isdigit() and int(text) > 0:
        return int(text)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return max(torch.cuda.device_count(), 1)
