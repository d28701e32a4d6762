"""Reference tensors of published networks: inputs, outputs, state dicts and their configurations."""

import json
from pathlib import Path
from typing import NamedTuple

import safetensors

FOLDER = Path(__file__).parent / "reference" / "networks"


class Published(NamedTuple):
    given: dict
    expected: dict
    state_dict: dict
    config: dict


def published(name):
    """A file's parts, by the first word of the tensors' names."""
    with safetensors.safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    parts = (
        {k.removeprefix(part): t for k, t in tensors.items() if k.startswith(part)}
        for part in ("input.", "output.", "state_dict.")
    )
    return Published(*parts, config)
