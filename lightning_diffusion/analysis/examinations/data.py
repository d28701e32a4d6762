"""What the loader yields, held against what the objective assumes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_diffusion.analysis.findings import Examination, Finding, Picture, Section, Severity, Table
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.batches import LABEL, unpack
from lightning_diffusion.checks import TOLERANCE
from lightning_diffusion.plots import image_grid
from lightning_diffusion.targets import Space

_FAR, _OFF = 1.5, 1.2  # factors between deviations: an error, a warning
_OFF_CENTRE = 0.3  # of the deviation
_COPIES, _CONSTANT = 0.02, 0.01  # shares
_UNEVEN = 10  # times as many of one class as of another
_SHOWN = 32


class DataExamination(Examination):
    """Range, deviation, broken and repeated images, sizes, classes; nothing is read but what training draws."""

    name = "data"

    def __call__(self, patient: Patient) -> Section:
        images = [unpack(batch)[0] for batch in patient.one_pass]
        broken = list(_broken(patient, images))
        if broken:
            return Section(self.name, tuple(broken), (_as_loaded(images),))
        loaded = Loaded.of(torch.cat(images), getattr(patient.module, "representation", None))
        tables, pictures = [_as_loaded(images)], _pictures(loaded)
        found = [*_images(loaded), *_classes(patient)]
        if getattr(patient.module, "objective", None) is not None and not loaded.all_constant:
            trained = Trained.of(patient)
            found += _deviation(patient, trained)
            tables.append(trained.table)
        return Section(self.name, tuple(found), tuple(tables), pictures)


@dataclass(frozen=True)
class Loaded:
    """Images (N, ...) of a loader; `bounded`: whether they should lie in [-1, 1]."""

    images: Tensor
    bounded: bool
    standardized: bool

    @classmethod
    def of(cls, images: Tensor, representation: Any) -> Loaded:
        """With what the representation says of them."""
        measured = getattr(representation, "sigma_data", None) is not None
        return cls(images.float(), getattr(representation, "bounded", False), measured)

    @property
    def constant(self) -> int:
        """Images of one value each."""
        flat = self.images.flatten(1)
        return int((flat.amax(1) - flat.amin(1) < 1e-6).sum())

    @property
    def all_constant(self) -> bool:
        """Whether there is nothing but one value everywhere."""
        return bool(self.images.amax() - self.images.amin() < 1e-6)

    @property
    def copies(self) -> int:
        """Images that are bit by bit an earlier one."""
        flat = self.images.flatten(1).contiguous().numpy()
        return len(flat) - len({hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in flat})


@dataclass(frozen=True)
class Trained:
    """Moments of what is trained on: over all, and by channel (C,)."""

    assumed: float
    mean: float
    std: float
    stds: tuple[float, ...]

    @classmethod
    def of(cls, patient: Patient) -> Trained:
        """Measured after the representation."""
        x0, objective = patient.drawn.x0, patient.objective
        stds = x0.transpose(0, 1).flatten(1).std(1).tolist() if x0.ndim > 1 else [float(x0.std())]
        return cls(objective.sigma_data, float(x0.mean()), float(x0.std()), tuple(stds))

    @property
    def factor(self) -> float:
        """Between the measured deviation and the assumed one, at least 1."""
        ratio = self.std / self.assumed
        return max(ratio, 1 / ratio) if ratio > 0 else float("inf")

    @property
    def table(self) -> Table:
        """Measured beside assumed."""
        shown = ", ".join(f"{std:.3g}" for std in self.stds[:8]) + (", ..." if len(self.stds) > 8 else "")
        rows = (
            ("mean", f"{self.mean:.3g}", "0"),
            ("deviation", f"{self.std:.3g}", f"{self.assumed:.3g}"),
            ("by channel", shown, "alike"),
        )
        return Table("After the representation", ("", "measured", "assumed"), rows)


def _as_loaded(images: Sequence[Tensor]) -> Table:
    number = sum(map(len, images))
    finite = torch.cat([x.flatten().float() for x in images])
    finite = finite[finite.isfinite()]
    rows = (
        ("images drawn", str(number)),
        ("shape", " or ".join(sorted({str(tuple(x.shape[1:])) for x in images}))),
        ("range", f"{finite.min():.4g} .. {finite.max():.4g}" if len(finite) else "nothing finite"),
        ("mean, deviation", f"{finite.mean():.4g}, {finite.std():.4g}" if len(finite) else ""),
    )
    return Table("As loaded", ("", ""), rows)


def _pictures(loaded: Loaded) -> tuple[Picture, ...]:
    shape = loaded.images.shape
    if not loaded.bounded or len(shape) != 4 or shape[1] not in (1, 3):
        return ()
    shown = loaded.images[:_SHOWN].clamp(-1, 1)
    return (Picture("The first images, as [-1, 1]", lambda dark: image_grid(shown, 16)),)


def _broken(patient: Patient, images: Sequence[Tensor]) -> Iterator[Finding]:
    """What stops every other check."""
    shapes = sorted({tuple(x.shape[1:]) for x in images})
    wanted = patient.image_shape
    if len(shapes) > 1 or (wanted is not None and shapes[0] != wanted):
        evidence = f"found {' and '.join(map(str, shapes))}, the network takes {wanted or 'one shape'}"
        remedy = f"model.network.init_args.image_shape: {list(shapes[0])}" if len(shapes) == 1 else ""
        yield _error("size", "Images have not the network's shape.", evidence, remedy)
    kinds = sorted({str(x.dtype) for x in images if not x.is_floating_point()})
    if kinds:
        evidence = f"found {', '.join(kinds)}; convert 8-bit images by images.float() / 127.5 - 1"
        yield _error("range", "Images are integers, expected floating point in [-1, 1].", evidence)
    missing = sum(int((~x.isfinite().flatten(1).all(1)).sum()) for x in images if x.is_floating_point())
    if missing:
        evidence = (
            f"{missing} of {sum(map(len, images))} images; look for damaged files or a division by zero"
        )
        yield _error("nan", "Images hold NaN or infinity: one of them ends the training.", evidence)


def _images(loaded: Loaded) -> Iterator[Finding]:
    number = len(loaded.images)
    yield from _range(loaded)
    if loaded.constant > _CONSTANT * number:
        whole = loaded.constant > number / 2
        title = "Images are constant: there is nothing to learn from them."
        evidence = f"{loaded.constant} of {number} images have one value each"
        severity = Severity.ERROR if whole else Severity.WARNING
        yield Finding("constant", severity, title, evidence)
    if loaded.copies > _COPIES * number and not loaded.constant > number / 2:
        title = (
            "Images come more than once within one pass through the data: they are learned by heart first."
        )
        evidence = f"{loaded.copies} of {number} are bit by bit an earlier one"
        yield Finding("duplicates", Severity.WARNING, title, evidence)


def _range(loaded: Loaded) -> Iterator[Finding]:
    low, high = float(loaded.images.amin()), float(loaded.images.amax())
    found = f"found {low:.4g} .. {high:.4g} in {len(loaded.images)} images"
    if not loaded.bounded:
        return
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        scale = "divide by 127.5 and subtract 1" if low >= 0 and high <= 255 else "scale them to [-1, 1]"
        yield _error("range", "Images are outside of [-1, 1], where samples are cut.", f"{found}; {scale}")
    elif low >= -TOLERANCE and high > 0.5:
        title = "Images lie in [0, 1], expected [-1, 1]: samples will be cut and shown by the wrong range."
        severity = Severity.WARNING if loaded.standardized else Severity.ERROR
        yield Finding("range", severity, title, f"{found}; write 2 * images - 1 where they are loaded")
    elif high - low < 0.5 and not loaded.all_constant:
        title = "Images use a small part of [-1, 1]."
        yield Finding("range", Severity.WARNING, title, found)


def _deviation(patient: Patient, trained: Trained) -> Iterator[Finding]:
    unit_variance = patient.objective.preconditioning.output_space is Space.RESIDUAL
    evidence = f"deviation {trained.std:.3g}, assumed {trained.assumed:.3g}: a factor of {trained.factor:.3g}"
    if trained.factor > _OFF:
        severity = Severity.ERROR if unit_variance and trained.factor > _FAR else Severity.WARNING
        title = "The data do not have the deviation sigma_data that the objective assumes."
        yield Finding("sigma-data", severity, title, evidence, _mended(patient, trained))
    if abs(trained.mean) > _OFF_CENTRE * trained.std:
        title = "The data do not have zero mean, which the coefficients and the start of sampling assume."
        evidence = f"mean {trained.mean:.3g} at a deviation of {trained.std:.3g}"
        yield Finding("mean", Severity.WARNING, title, evidence, _mended(patient, trained))
    if min(trained.stds) > 0 and max(trained.stds) > _FAR * min(trained.stds):
        title = "Channels have different deviations: noise drowns one of them long before another."
        evidence = f"deviations by channel from {min(trained.stds):.3g} to {max(trained.stds):.3g}"
        yield Finding("channels", Severity.WARNING, title, evidence, _mended(patient, trained))


def _mended(patient: Patient, trained: Trained) -> str:
    """Measure where something can; a constant channel has to be told."""
    representation: Any = getattr(patient.module, "representation", None)
    if hasattr(representation, "autoencoder"):
        return "model.representation.init_args: {shift: null, scale: null}  # measured when the fit starts"
    assumed = trained.assumed
    return f"model.representation: {{class_path: Standardize, init_args: {{sigma_data: {assumed:g}}}}}"


def _classes(patient: Patient) -> Iterator[Finding]:
    number = getattr(patient.module, "num_classes", 0)
    labels = [unpack(batch)[1].get(LABEL) for batch in patient.one_pass]
    known = [label for label in labels if label is not None]
    if not number or not known or any(label.is_floating_point() for label in known):
        return
    counts = torch.bincount(torch.cat(known).clamp(0, number), minlength=number + 1)[:number]
    least, most = int(counts.min()), int(counts.max())
    if most > _UNEVEN * max(least, 1) and int(counts.sum()) > 10 * number:
        evidence = (
            f"{least} of class {int(counts.argmin())}, {most} of class {int(counts.argmax())} were drawn"
        )
        title = "Classes are drawn very unevenly: rare ones will look like common ones."
        yield Finding("classes", Severity.WARNING, title, evidence)


def _error(check: str, title: str, evidence: str, remedy: str = "") -> Finding:
    return Finding(check, Severity.ERROR, title, evidence, remedy)
