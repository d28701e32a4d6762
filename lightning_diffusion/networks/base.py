"""What the rest of the package expects of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.func import functional_call

from lightning_diffusion.recording import Recorded


class Network(Recorded, nn.Module, ABC):
    """F(x, c_noise, **condition), of the shape of x.

    Conditions are the keywords that `forward` declares. Labels are int64 (B,), the null label is `num_classes`; context
    is embeddings (B, T, context_dim) from anywhere, the null context is zeros.

    Attributes:
        image_shape: (C, H, W) of x without the batch.
        num_classes: 0 if there are no labels.
        context_dim: 0 if there is no context.
        float32_modules: patterns of the names of parts that precision plugins keep in float32, besides those that
            they keep in any network.
    """

    image_shape: tuple[int, ...]
    num_classes: int = 0
    context_dim: int = 0
    float32_modules: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), c_noise (B,), label (B,) or None for the null label; returns (B, C, H, W)."""


class Reweighted(nn.Module):
    """A network called with other values for its parameters; the network itself is left alone.

    Args:
        network: whose forward is run.
        values: parameter name (as in the network's named_parameters) to tensor.
    """

    def __init__(self, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        own = dict(network.named_parameters())
        self._network = [network]
        self._values = {name: value.to(own[name]) for name, value in values.items()}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self._network[0].parameters(recurse)

    def forward(self, *args: Tensor, **condition: Tensor) -> Tensor:
        output: Tensor = functional_call(self._network[0], self._values, args, condition)
        return output
