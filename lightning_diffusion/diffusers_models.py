"""diffusers' models as networks here, and networks here as diffusers' models.

A UNet2DModel is built otherwise than any network here: `DiffusersUNet` holds one. A DiTTransformer2DModel is a DiT with
other names: tensors are carried over, both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_diffusion.networks.base import Network
from lightning_diffusion.networks.dit import DiT, DiTOptions, DiTSize

FREQUENCIES = (1e-4, 1.0)
"""Of the noise embedding of diffusers' DiT, in radians per timestep; the published DiT's lowest is 1e-4^(127/128)."""


def import_diffusers() -> Any:
    """The package, or an error that says how to get it."""
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "diffusers is not installed: run `pip install 'lightning-diffusion[diffusers]'`."
        ) from error
    return diffusers


class DiffusersUNet(Network):
    """diffusers.UNet2DModel as a network: c_noise is its timestep, its last class embedding the null label.

    Args:
        config: the model's own arguments, as in its config.json; sample_size must be there, num_class_embeds is one
            more than there are classes.

    Raises:
        ValueError: for a model that cannot be called so.
    """

    float32_modules = ("model.time_embedding",)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = import_diffusers().UNet2DModel.from_config(config)
        self.image_shape = _shape(self.model.config)
        self.num_classes = (self.model.config.num_class_embeds or 1) - 1

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        if self.model.class_embedding is None:
            label = None
        elif label is None:
            label = torch.full((len(x),), self.num_classes, device=x.device)
        output: Tensor = self.model(x, c_noise, label, return_dict=False)[0]
        return output[:, : x.shape[1]]


def _shape(config: Any) -> tuple[int, ...]:
    size, channels = config.sample_size, config.in_channels
    problems = {
        "sample_size=None, expected the height and width of images": size is None,
        f"out_channels={config.out_channels}, expected {channels} or twice that": config.out_channels
        not in (channels, 2 * channels),
        f"class_embed_type={config.class_embed_type!r}, expected None": config.class_embed_type is not None,
        f"time_embedding_type={config.time_embedding_type!r}, expected 'positional'": config.time_embedding_type
        != "positional",
        "center_input_sample=True, expected False": config.center_input_sample,
    }
    found = [what for what, is_wrong in problems.items() if is_wrong]
    if found:
        raise ValueError(f"This UNet2DModel cannot be called as F(c_in x_t, c_noise): {'; '.join(found)}.")
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


def unet_from_diffusers(model: Any, has_null_label: bool = True) -> DiffusersUNet:
    """A diffusers.UNet2DModel with its parameters as a network.

    Args:
        model: the UNet2DModel; it is copied.
        has_null_label: whether its last class embedding is that of no class; otherwise one is added, the mean of all.

    Raises:
        ValueError: for a model that cannot be called as a network.
    """
    _expect(model, "UNet2DModel")
    config, state = _plain_config(model), model.state_dict()
    if config["num_class_embeds"] and not has_null_label:
        config["num_class_embeds"] += 1
        table = state["class_embedding.weight"]
        state["class_embedding.weight"] = torch.cat([table, table.mean(0, keepdim=True)])
    network = DiffusersUNet(config)
    network.model.load_state_dict(state)
    return network


def unet_to_diffusers(network: DiffusersUNet) -> Any:
    """The diffusers.UNet2DModel in a network, copied, in eval mode."""
    _expect(network, "DiffusersUNet")
    model = type(network.model).from_config(network.model.config)
    model.load_state_dict(network.model.state_dict())
    return model.eval()


def dit_from_diffusers(model: Any) -> DiT:
    """A diffusers.DiTTransformer2DModel as a DiT: c_noise is its timestep, labels are its classes.

    Layer norms have 1e-6 under the root here; a model with norm_eps=1e-5, which is diffusers' default, answers the same
    to about 1e-5.

    Raises:
        ValueError: for layers that DiT does not have, or blocks that embed noise and class each in its own way.
    """
    _expect(model, "DiTTransformer2DModel")
    config = model.config
    _check_dit(config)
    channels, side = config.in_channels, config.sample_size
    width = config.num_attention_heads * config.attention_head_dim
    learned_variance = config.out_channels == 2 * channels
    options = DiTOptions(False, False, False, False, learned_variance, FREQUENCIES)
    size = DiTSize(width, config.num_layers, config.num_attention_heads)
    network = DiT((channels, side, side), config.patch_size, size, config.num_embeds_ada_norm, options)
    own, state = network.state_dict(), model.state_dict()
    _check_embedded_alike(state, config.num_layers)
    network.load_state_dict({name: _from_diffusers(name, state, own) for name in own})
    return network.eval()


def dit_to_diffusers(network: DiT) -> Any:
    """A diffusers.DiTTransformer2DModel that answers as a DiT without options does, in eval mode.

    Raises:
        ValueError: for a DiT with options, frequencies or image shapes that diffusers' has not.
    """
    _expect(network, "DiT")
    _check_options(network)
    channels, side, _ = network.image_shape
    model = import_diffusers().DiTTransformer2DModel(
        network.head_modulation.in_features // network.head_width, network.head_width, channels,
        network.outputs, len(network.blocks), sample_size=side, patch_size=network.patch_size,
        num_embeds_ada_norm=max(network.num_classes, 1), norm_eps=1e-6,
    )  # fmt: skip
    state = {
        name: x for ours, value in _all_tensors(network) for name, x in _to_diffusers(ours, value, network)
    }
    model.load_state_dict(state)
    return model.eval()


_OUTER = {
    "stem": "pos_embed.proj",
    "head": "proj_out_2",
    "head_modulation": "proj_out_1",
}
_EMBEDDING = {
    "embedding.0": "timestep_embedder.linear_1",
    "embedding.2": "timestep_embedder.linear_2",
    "label": "class_embedder.embedding_table",
}
_BLOCK = {
    "attention.proj": "attn1.to_out.0",
    "feed_forward.0": "ff.net.0.proj",
    "feed_forward.2": "ff.net.2",
    "modulation": "norm1.linear",
}
_QKV = ("to_q", "to_k", "to_v")


def _from_diffusers(name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
    if name == "positions":
        return own[name]
    if name == "embedding.0.weight":
        return _turned(state[_diffusers_names(name)[0]])
    return torch.cat([state[theirs] for theirs in _diffusers_names(name)])


def _to_diffusers(name: str, value: Tensor, network: DiT) -> Iterator[tuple[str, Tensor]]:
    """The embeddings once for every block, as they are there."""
    value = _turned(value) if name == "embedding.0.weight" else value
    theirs = _diffusers_names(name)
    copies = len(network.blocks) if name.rpartition(".")[0] in _EMBEDDING else 1
    for one, part in zip(theirs, value.chunk(len(theirs)), strict=True):
        yield one, part
        yield from ((one.replace("blocks.0", f"blocks.{n}", 1), part) for n in range(1, copies))


def _diffusers_names(name: str) -> list[str]:
    """'blocks.0.attention.qkv.bias' -> the names of q, k and v there; of the embeddings the first block's."""
    layer, _, kind = name.rpartition(".")
    if layer in _EMBEDDING:
        return [f"transformer_blocks.0.norm1.emb.{_EMBEDDING[layer]}.{kind}"]
    if layer in _OUTER:
        return [f"{_OUTER[layer]}.{kind}"]
    number, inner = layer.split(".", 2)[1:]
    block = f"transformer_blocks.{number}"
    if inner == "attention.qkv":
        return [f"{block}.attn1.{part}.{kind}" for part in _QKV]
    return [f"{block}.{_BLOCK[inner]}.{kind}"]


def _all_tensors(network: DiT) -> Iterator[tuple[str, Tensor]]:
    """Those that diffusers' model has too; a model without classes has one, whose embedding is nothing."""
    yield from ((name, x) for name, x in network.state_dict().items() if name != "positions")
    if network.label is None:
        yield "label.weight", network.head_modulation.weight.new_zeros(2, network.head_modulation.in_features)


def _turned(weight: Tensor) -> Tensor:
    """Columns for cos and sin from the highest to the lowest frequency, or the other way round."""
    return weight.reshape(len(weight), 2, -1).flip(2).reshape(weight.shape)


def _check_dit(config: Any) -> None:
    expected = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero",
                "norm_elementwise_affine": False, "dropout": 0.0}  # fmt: skip
    wrong = [
        f"{name}={config[name]!r}, not {value!r}" for name, value in expected.items() if config[name] != value
    ]
    if config.norm_eps > 1e-5:
        wrong.append(f"norm_eps={config.norm_eps}, not 1e-5 or 1e-6")
    if wrong:
        raise ValueError(f"This DiTTransformer2DModel has layers that DiT has not: {'; '.join(wrong)}.")


def _check_embedded_alike(state: Mapping[str, Tensor], depth: int) -> None:
    first = {name: x for name, x in state.items() if name.startswith("transformer_blocks.0.norm1.emb.")}
    for number in range(1, depth):
        for name, x in first.items():
            other = state[name.replace("blocks.0.", f"blocks.{number}.", 1)]
            if not torch.equal(x, other):
                raise ValueError(
                    f"Block {number} of this DiTTransformer2DModel embeds noise and class otherwise than block 0, as "
                    "after training in diffusers; DiT embeds them once. Take a model whose embeddings were not trained."
                )


def _check_options(network: DiT) -> None:
    found = network.options
    expected = DiTOptions(False, False, False, False, found.learned_variance, FREQUENCIES)
    if found != expected:
        raise ValueError(
            f"Found {found}; diffusers' DiT is {expected}, so another network. Train with those options, or export to "
            "safetensors or torch-export, which take any."
        )
    _, height, width = network.image_shape
    if height != width:
        raise ValueError(f"Found images of {height} x {width}; diffusers' DiT takes squares only.")


def _plain_config(model: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(model.config).items() if not name.startswith("_")}


def _expect(found: nn.Module, name: str) -> None:
    if type(found).__name__ != name:
        raise TypeError(f"Found {type(found).__name__}; expected {name}.")
