"""What a constructor call leaves behind is enough to make the object again, and is plain data."""

from abc import ABC
from dataclasses import dataclass

import lightning
import numpy as np
import pytest
import torch
from torch import nn

from lightning_diffusion.recording import INSTANTIATOR, Recorded, public_path, spec


class Density(ABC):  # noqa: B024
    pass


@dataclass(frozen=True)
class Normal(Density):
    mean: float = 0.0


class Objective(Recorded, nn.Module):
    def __init__(self, density: Density, scale: float = 0.5) -> None:
        super().__init__()
        self.density, self.scale = density, scale


class Preset(Objective):
    def __init__(self, density: Density = Normal(-1.0)) -> None:
        super().__init__(density, scale=2.0)


class Network(Recorded, nn.Module):
    def __init__(
        self, shape: tuple[int, ...] = (1, 2), width: int = 2, scales: list[float] | None = None
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)


class Holder(Recorded):
    def __init__(self, part: object) -> None:
        self.part = part


class Module(lightning.LightningModule):
    def __init__(
        self, network: Network | nn.Module, objective: Objective = Preset(), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.network, self.objective, self.dropout = network, objective, dropout
        specs = {"network": spec(network), "objective": spec(objective), "dropout": dropout}
        given = {name: value for name, value in specs.items() if value is not None}
        self.save_hyperparameters({**given, **INSTANTIATOR}, logger=False)


@pytest.fixture
def checkpoint(tmp_path):
    def save(module):
        trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "module.ckpt")
        return tmp_path / "module.ckpt"

    return save


def test_the_outermost_constructor_is_the_one_that_made_the_object():
    recorded = spec(Preset(Normal(3.0)))
    assert recorded["class_path"] == f"{__name__}.Preset"
    assert recorded["init_args"] == {
        "density": {"class_path": f"{__name__}.Normal", "init_args": {"mean": 3.0}}
    }


def test_numbers_from_numpy_and_tensors_become_python_numbers():
    recorded = spec(Network(width=np.int64(2), scales=(np.float64(0.5), torch.tensor(2.0))))["init_args"]
    assert recorded == {"shape": [1, 2], "width": 2, "scales": [0.5, 2.0]}
    assert [type(value) for value in (recorded["width"], *recorded["scales"])] == [int, float, float]


def test_later_changes_of_the_argument_and_of_the_spec_do_not_reach_the_record():
    scales = [1.0]
    network = Network(scales=scales)
    scales.append(2.0)
    spec(network)["init_args"]["scales"].append(3.0)
    assert spec(network)["init_args"]["scales"] == [1.0]


@pytest.mark.parametrize(
    "foreign",
    [nn.Linear(1, 1), Holder(nn.Linear(1, 1)), Holder(lambda x: x), 3],
    ids=["layer", "of a layer", "of a function", "number"],
)
def test_what_cannot_be_written_has_no_spec(foreign):
    assert spec(foreign) is None


def test_classes_inside_functions_have_no_spec():
    class Local(Recorded):
        def __init__(self) -> None:
            pass

    assert spec(Local()) is None


def test_errors_of_the_constructor_stay_its_own():
    with pytest.raises(TypeError, match=r"Network.__init__\(\) got an unexpected keyword argument 'widht'"):
        Network(widht=3)


def test_the_shortest_public_path_is_used():
    from lightning_diffusion import NoiseLevel

    assert public_path(NoiseLevel) == "lightning_diffusion.NoiseLevel"
    assert public_path(nn.Linear) == "torch.nn.Linear"


def test_a_checkpoint_loads_without_arguments(checkpoint):
    made = Module(Network(width=np.int64(3)), objective=Preset(Normal(np.float64(7.0))), dropout=0.3)
    path = checkpoint(made)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["dropout"] == 0.3
    loaded = Module.load_from_checkpoint(path)
    assert (type(loaded.objective), loaded.objective.density, loaded.dropout) == (Preset, Normal(7.0), 0.3)
    assert torch.equal(loaded.network.layer.weight, made.network.layer.weight)


def test_an_instance_given_while_loading_wins(checkpoint):
    path, network = checkpoint(Module(Network())), Network()
    assert Module.load_from_checkpoint(path, network=network).network is network
    assert Module.load_from_checkpoint(path, dropout=0.7).dropout == 0.7


def test_a_foreign_network_has_to_be_given_while_loading(checkpoint):
    path = checkpoint(Module(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(Exception, match=r"required: module\.network"):
        Module.load_from_checkpoint(path)
    other = nn.Sequential(nn.Linear(2, 2))
    assert Module.load_from_checkpoint(path, network=other).network is other
