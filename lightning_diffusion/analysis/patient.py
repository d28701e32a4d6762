"""What is examined before it is trained: a module, its data, and what its Trainer is told."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_diffusion.analysis.drawn_data import DrawnData, drawn
from lightning_diffusion.analysis.trainer_settings import TrainerSettings
from lightning_diffusion.batches import LABEL, Repeatable, every_sample, unpack
from lightning_diffusion.objective import DiffusionObjective
from lightning_diffusion.sampling import Sampler

_SEED = "PL_GLOBAL_SEED"
_SAMPLES = 2048
_ELEMENTS = 2**27  # of all samples: half a gigabyte in float32


class Patient:
    """A module with its data and its Trainer's settings; batches are drawn when an examination asks for them.

    Args:
        module: not to be changed: examinations that train take `prepared()`.
        data: a datamodule, or the loader of training batches.
        trainer: a Trainer or its settings.
        steps: how many training steps an examination may take.
        memory: bytes of a device that the run has to fit into; None where nothing is said.
        seed: of the run.

    Raises:
        ValueError: for fewer than one step.
    """

    def __init__(
        self,
        module: LightningModule,
        data: LightningDataModule | Iterable[Any],
        trainer: Trainer | TrainerSettings | None = None,
        steps: int = 50,
        memory: int | None = None,
        seed: int = 0,
    ) -> None:
        if steps < 1:
            raise ValueError(f"Found {steps} steps to examine; expected at least 1.")
        self.module, self.data = module, data
        self.trainer = (
            TrainerSettings.of(trainer) if isinstance(trainer, Trainer) else trainer or TrainerSettings()
        )
        self.steps, self.memory, self.seed = steps, memory, seed
        self._drawn: list[Any] = []

    @classmethod
    def from_config(
        cls,
        paths: Sequence[str | os.PathLike[str]],
        options: Sequence[str] = (),
        steps: int = 50,
        memory: int | None = None,
        own_options: Sequence[str] = ("--config",),
    ) -> Patient:
        """What `lightning-diffusion fit --config PATH ... OPTIONS` would train.

        Args:
            paths: YAML files, later ones win.
            options: as on the command line, such as ["--trainer.max_steps", "100"].
            steps, memory: as for the patient itself.
            own_options: what a mistaken option may have been meant to be, besides those of the configuration.
        """
        from lightning_diffusion.commands.reading import read_configuration

        configs = [word for path in paths for word in ("--config", os.fspath(path))]
        with isolate_rng(), _environment(_SEED, os.environ.get(_SEED)):
            cli = read_configuration([*configs, *options], own_options)
        given = vars(cli.config_init["trainer"]).items()
        arguments = {name: value for name, value in given if value is not None}
        seed = int(cli.config["seed_everything"] or 0)
        return cls(cli.model, cli.datamodule, TrainerSettings(arguments), steps, memory, seed)

    def batches(self, number: int | None = None) -> list[Any]:
        """The first training batches as the loader yields them, `steps` of them if no number is given."""
        number = self.steps if number is None else number
        while len(self._drawn) < number:
            try:
                self._drawn.append(next(self._endless))
            except StopIteration:
                raise ValueError("Found no training batch; expected at least one.") from None
        return self._drawn[:number]

    @cached_property
    def loader(self) -> Any:
        """Of training batches."""
        if not isinstance(self.data, LightningDataModule):
            return self.data
        self.data.prepare_data()
        self.data.setup("fit")
        return self.data.train_dataloader()

    @cached_property
    def _endless(self) -> Iterator[Any]:
        return _again_and_again(self.loader)

    @cached_property
    def batch_size(self) -> int:
        """Samples of a micro-batch on one device."""
        return len(unpack(self.batches(1)[0])[0])

    @cached_property
    def one_pass(self) -> list[Any]:
        """Batches of at most 2,048 samples and 2^27 numbers, or the first; no sample is drawn in a second pass."""
        images = unpack(self.batches(1)[0])[0]
        samples = min(_SAMPLES, _ELEMENTS // images[0].numel())
        most = min(self.steps, samples // self.batch_size)
        return self.batches(max(1, int(min(most, _length(self.loader)))))

    @cached_property
    def drawn(self) -> DrawnData:
        """Samples of one pass as the objective gets them."""
        return drawn(self._ready, self.one_pass, self.seed)

    @property
    def objective(self) -> DiffusionObjective:
        """Of a DiffusionModule."""
        objective: DiffusionObjective = self._ready.objective
        return objective

    @property
    def sampler(self) -> Sampler:
        """Of a DiffusionModule."""
        sampler: Sampler = self._ready.sampler
        return sampler

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """Of what the loader has to yield; None where nothing says so."""
        keeps = getattr(getattr(self.module, "representation", None), "keeps_shape", False)
        shape = getattr(self.module, "image_shape", None)
        return tuple(shape) if keeps and shape is not None else None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None where nothing limits them."""
        steps = [] if self.trainer.max_steps is None else [self.trainer.max_steps]
        if self.trainer.max_epochs is not None and hasattr(self.loader, "__len__"):
            steps.append(self.trainer.max_epochs * self.steps_per_epoch)
        return min(steps) if steps else None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass through the data, over all devices."""
        return max(1, math.ceil(len(self.loader) / self.trainer.devices / self.trainer.accumulate))

    def prepared(self) -> LightningModule:
        """A copy of the module to do anything with, its representation measured on the batches, as a fit begins."""
        module: LightningModule = copy.deepcopy(self._ready)
        return module

    @cached_property
    def _ready(self) -> Any:
        module: Any = copy.deepcopy(self.module)
        representation = getattr(module, "representation", None)
        if representation is not None and representation.needs_measuring:
            representation.measure(self._images())
        target = getattr(getattr(module, "objective", None), "stable_target", None)
        if target is not None and target.reference_size:
            target.remember(self._references(module))
        return module

    def _references(self, module: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
        for batch in every_sample(self.loader):
            images, condition = unpack(batch)
            yield module.representation.encode(images), condition.get(LABEL)

    def _images(self) -> Iterable[Tensor]:
        return Repeatable(lambda: (unpack(batch)[0] for batch in self.batches()))

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Random numbers of the run inside; the process's own generators and seed as they were afterwards."""
        with isolate_rng(), _environment(_SEED, str(self.seed)):
            yield


def _length(loader: Any) -> float:
    try:
        return len(loader)
    except TypeError:
        return math.inf


def _again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    some = True
    while some:
        some = False
        for batch in loader:
            some = True
            yield batch


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before: Mapping[str, str] = {name: os.environ[name]} if name in os.environ else {}
    _put(name, value)
    try:
        yield
    finally:
        _put(name, before.get(name))


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
