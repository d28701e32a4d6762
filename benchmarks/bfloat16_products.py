"""bfloat16 mixed precision on a processor without bfloat16 units, at the speed of float32.

Under autocast a product (linear, convolution, attention, matrix product) takes bfloat16 operands, sums in float32 and
puts out bfloat16. `Bfloat16Products` does this to the letter: operands are rounded, a float32 kernel multiplies, its
output is rounded; autograd rounds gradients at the same places. What lies between products runs in bfloat16 as under
autocast. Only the order of the sums is another, and attention's probabilities are not rounded on their way to the
values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = frozenset(
    {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__}
    | {torch.mm, torch.bmm}
)


class Bfloat16Products(TorchFunctionMode):
    """Products within `torch.autocast("cpu", torch.bfloat16)` by float32 kernels on rounded operands."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            operands = {name: rounded(value) for name, value in kwargs.items()}
            return func(*map(rounded, args), **operands).bfloat16()


def rounded(value: Any) -> Any:
    """A floating-point tensor with bfloat16's values in float32; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.bfloat16().float()
    return value
