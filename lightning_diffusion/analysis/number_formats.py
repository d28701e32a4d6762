"""Number formats of training: what they can hold, computed from torch.finfo, and which one to train in.

largest              beyond it a number becomes infinite (float8_e4m3fn has no infinity: NaN)
smallest normal      below it precision is lost bit by bit
smallest subnormal   below half of it a number becomes zero
relative precision   from 1 to the next number; rounding errs by at most half of it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NumberFormat:
    """A floating-point type of torch and the hardware that multiplies in it.

    Args:
        dtype: the type.
        hardware: where it is fast.
    """

    dtype: torch.dtype
    hardware: str

    @property
    def name(self) -> str:
        """As torch calls it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return torch.finfo(self.dtype).bits

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return torch.finfo(self.dtype).max

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number of full precision."""
        return torch.finfo(self.dtype).smallest_normal

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number: subnormal numbers are as far apart as the smallest normal ones."""
        return self.smallest_normal * self.relative_precision

    @property
    def relative_precision(self) -> float:
        """The distance from 1 to the next number."""
        return torch.finfo(self.dtype).eps


FORMATS = (
    NumberFormat(torch.float32, "all"),
    NumberFormat(
        torch.float16, "NVIDIA from Volta (2017), AMD from MI100, Apple; CPUs with AVX512-FP16 or AMX-FP16"
    ),
    NumberFormat(
        torch.bfloat16, "NVIDIA from Ampere (2020), AMD from MI100, TPU; CPUs with AVX512-BF16 or AMX"
    ),
    NumberFormat(torch.float8_e4m3fn, "NVIDIA from Ada and Hopper (2022), AMD from MI350; products only"),
    NumberFormat(torch.float8_e5m2, "as float8_e4m3fn; for gradients"),
)


def number_format(dtype: torch.dtype) -> NumberFormat:
    """The format of a type.

    Raises:
        ValueError: for a type that is not in FORMATS.
    """
    for number_format in FORMATS:
        if number_format.dtype is dtype:
            return number_format
    raise ValueError(f"Found {dtype}; expected one of {', '.join(f.name for f in FORMATS)}.")


def formats_table(formats: Sequence[NumberFormat] = FORMATS) -> str:
    """The formats as a table in Markdown."""
    head = ["format", "bits", "largest", "smallest normal", "smallest subnormal", "relative precision"]
    lines = [[*head, "hardware"], ["---"] * (len(head) + 1), *map(_row, formats)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(f: NumberFormat) -> list[str]:
    numbers = [f.largest, f.smallest_normal, f.smallest_subnormal, f.relative_precision]
    return [f.name, str(f.bits), *(f"{number:.5g}" for number in numbers), f.hardware]


@dataclass(frozen=True)
class Hardware:
    """What a device multiplies in at full speed.

    Args:
        kind: cpu, cuda, mps or another of torch's device types.
        bfloat16, float16: whether it does in these.
    """

    kind: str
    bfloat16: bool
    float16: bool


@dataclass(frozen=True)
class Recommendation:
    """A precision for `DiffusionPrecision` (32-true: none is needed), and why."""

    precision: str
    reason: str


def hardware_of(device: torch.device | str = "cpu") -> Hardware:
    """What a device of this machine can do."""
    kind = torch.device(device).type
    if kind == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware(kind, bfloat16, float16=bool(torch.version.hip) or _capability(device) >= (7, 0))
    if kind == "cpu":
        bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.6
        return Hardware(kind, bfloat16, float16=bool(found.get("avx512_fp16") or found.get("amx_fp16")))
    if kind == "mps":
        return Hardware(kind, torch.backends.mps.is_macos_or_newer(14, 0), float16=True)
    return Hardware(kind, bfloat16=True, float16=False)


def recommended_precision(hardware: Hardware) -> Recommendation:
    """bfloat16 where there is hardware for it, float16 with dynamic loss scaling elsewhere, else float32."""
    if hardware.bfloat16 and hardware.kind == "cpu":
        return Recommendation(
            "bf16-mixed", "bfloat16 in hardware; small networks may be faster in float32: measure"
        )
    if hardware.bfloat16:
        return Recommendation("bf16-mixed", "bfloat16 in hardware, with float32's range: no loss scaling")
    if hardware.float16:
        return Recommendation("16-mixed", "float16 in hardware but not bfloat16: needs dynamic loss scaling")
    return Recommendation("32-true", f"this {hardware.kind} is not faster in 16 bits")


def _capability(device: torch.device | str) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
