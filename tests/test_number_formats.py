"""What formats can hold, against an enumeration of all their numbers; which one is recommended where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_diffusion.analysis.number_formats import (
    FORMATS,
    Hardware,
    formats_table,
    hardware_of,
    number_format,
    recommended_precision,
)

INTEGERS = {8: torch.uint8, 16: torch.int16}
BY_NAME = {f.name: f for f in FORMATS}


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a type of at most 16 bits, sorted."""
    bits = torch.finfo(dtype).bits
    patterns = torch.arange(2**bits, dtype=torch.int32).to(INTEGERS[bits])
    every = patterns.view(dtype).double()
    return every[every.isfinite()].unique()


@pytest.mark.parametrize("name", [name for name, f in BY_NAME.items() if f.bits <= 16])
def test_limits_are_those_of_all_numbers(name):
    found, every = BY_NAME[name], numbers(BY_NAME[name].dtype)
    positive = every[every > 0]
    assert found.largest == float(every.max())
    assert found.smallest_subnormal == float(positive.min())
    assert found.relative_precision == float(every[every > 1].min()) - 1
    gaps = positive.diff()
    assert found.smallest_normal == float(
        positive[:-1][gaps / positive[:-1] <= found.relative_precision].min()
    )


def test_float32_goes_down_to_its_last_bit():
    smallest = torch.tensor(1, dtype=torch.int32).view(torch.float32).double()
    assert BY_NAME["float32"].smallest_subnormal == float(smallest) > 0
    assert (BY_NAME["float32"].bits, BY_NAME["float32"].relative_precision) == (32, 2.0**-23)


def test_a_type_has_its_format():
    assert number_format(torch.bfloat16).name == "bfloat16"
    with pytest.raises(ValueError, match=r"Found torch.int8; expected one of float32, float16"):
        number_format(torch.int8)


CASES = [
    (Hardware("cuda", bfloat16=True, float16=True), "bf16-mixed"),
    (Hardware("cuda", bfloat16=False, float16=True), "16-mixed"),
    (Hardware("cuda", bfloat16=False, float16=False), "32-true"),
    (Hardware("cpu", bfloat16=True, float16=False), "bf16-mixed"),
    (Hardware("cpu", bfloat16=False, float16=False), "32-true"),
]


@pytest.mark.parametrize(("hardware", "precision"), CASES)
def test_bfloat16_where_there_is_hardware_and_float16_elsewhere(hardware, precision):
    assert recommended_precision(hardware).precision == precision


def test_this_machine_is_known():
    assert hardware_of("cpu").kind == "cpu"
    assert hardware_of("meta").bfloat16


def test_the_documentation_shows_this_table():
    page = Path(__file__).resolve().parents[1] / "docs" / "precision.md"
    assert formats_table() in page.read_text()
