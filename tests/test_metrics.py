from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lightning_diffusion.metrics import frechet_distance, kernel_distance, near_copies, precision_recall


def normal(n: int, features: int, seed: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator, dtype=torch.float64) + mean


def with_moments(x: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """An affine image of x whose sample mean and covariance are exactly `mean` and `root root^T`."""
    centred = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(centred.T.cov()), centred.T, upper=False)
    return mean + whitened.T @ root.T


@pytest.fixture
def skewed() -> tuple[Tensor, Tensor]:
    """Two correlated sets that are not Gaussian, of different sizes and with an offset."""
    mix = normal(6, 6, seed=1)
    return normal(300, 6, seed=2) @ mix, normal(300, 6, seed=3).exp() @ mix * 0.7 + 0.3


class Flatten(torch.nn.Module):
    num_features = 6

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def torchmetrics_value(metric: torch.nn.Module, real: Tensor, generated: Tensor) -> Tensor:
    metric.set_dtype(torch.float64)
    metric.update(real[..., None, None], real=True)
    metric.update(generated[..., None, None], real=False)
    return metric.compute()


def test_frechet_distance_of_commuting_gaussians_has_a_closed_form() -> None:
    """Diagonal covariances: |m_1 - m_2|^2 + sum (s_1 - s_2)^2."""
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    s_1, s_2 = torch.tensor([[1.0, 2.0, 0.3], [0.5, 2.5, 0.3]], dtype=torch.float64)
    rotation = torch.linalg.qr(normal(3, 3, seed=0)).Q
    x = with_moments(normal(50, 3, seed=1), torch.zeros(3, dtype=torch.float64), rotation * s_1)
    y = with_moments(normal(70, 3, seed=2), mean, rotation * s_2)
    expected = mean.square().sum() + (s_1 - s_2).square().sum()
    torch.testing.assert_close(frechet_distance(x, y), expected)


def test_frechet_distance_agrees_with_torch_fidelity_and_torchmetrics(skewed: tuple[Tensor, Tensor]) -> None:
    real, generated = skewed
    statistics = [fid_features_to_statistics(x) for x in skewed]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    metrics = torchmetrics_value(FrechetInceptionDistance(feature=Flatten()), real, generated)
    ours = frechet_distance(real, generated).item()
    assert ours == pytest.approx(fidelity, rel=1e-9)
    assert ours == pytest.approx(metrics.item(), rel=1e-6)


def test_figures_agree_on_features_that_another_program_wrote(tmp_path: Path) -> None:
    """As benchmarks/metrics_agreement.py does at full size."""
    file = Path(__file__).resolve().parents[1] / "benchmarks" / "metrics_agreement.py"
    described = spec_from_file_location("metrics_agreement", file)
    assert described is not None
    assert described.loader is not None
    agreement = module_from_spec(described)
    described.loader.exec_module(agreement)
    agreement.write(tmp_path, sizes=(200, 200), large=0)
    different = agreement.differences(
        {program: agreement.read(program, tmp_path) for program in agreement.PROGRAMS}
    )
    assert {(figure, program) for _, figure, program in different} >= {
        (figure, program)
        for figure in ("frechet", "kernel")
        for program in ("torch-fidelity", "torchmetrics")
    }
    assert agreement.largest(different) < 1e-6


def test_a_set_is_at_distance_zero_from_itself_even_with_a_constant_feature(
    skewed: tuple[Tensor, Tensor],
) -> None:
    x = torch.cat([skewed[0], torch.ones(300, 1)], 1)
    torch.testing.assert_close(frechet_distance(x, x), x.new_zeros(()), atol=1e-10, rtol=0)


def test_one_feature_is_enough() -> None:
    x = normal(20, 1, seed=0)
    torch.testing.assert_close(frechet_distance(x, x + 3), torch.tensor(9.0, dtype=torch.float64))


def test_frechet_distance_warns_of_a_singular_covariance() -> None:
    with pytest.warns(UserWarning, match=r"5 generated samples for 6 features.*more than 6"):
        frechet_distance(normal(30, 6, seed=0), normal(5, 6, seed=1))


def test_kernel_distance_agrees_with_torch_fidelity_and_torchmetrics(skewed: tuple[Tensor, Tensor]) -> None:
    real, generated = skewed
    whole = {"kid_subsets": 1, "kid_subset_size": 300, "verbose": False}
    fidelity = kid_features_to_metric(*skewed, **whole)["kernel_inception_distance_mean"]
    metric = KernelInceptionDistance(feature=Flatten(), subsets=1, subset_size=300)
    ours = kernel_distance(real, generated).item()
    assert ours == pytest.approx(fidelity, rel=1e-9)
    assert ours == pytest.approx(torchmetrics_value(metric, real, generated)[0].item(), rel=1e-6)


def test_kernel_distance_is_unbiased_at_any_size() -> None:
    """Its mean over many small, unequal pairs from one distribution is zero within 3 standard errors."""
    draws = [kernel_distance(normal(5, 3, seed=i), normal(9, 3, seed=1000 + i)) for i in range(400)]
    values = torch.stack(draws)
    assert values.mean().abs() < 3 * values.std() / 20
    assert values.min() < 0


def test_kernel_distance_over_subsets_estimates_the_same_and_repeats(skewed: tuple[Tensor, Tensor]) -> None:
    whole = kernel_distance(*skewed)
    over_subsets = kernel_distance(*skewed, subset_size=150, num_subsets=200)
    assert over_subsets.item() == pytest.approx(whole.item(), rel=0.1)
    assert torch.equal(over_subsets, kernel_distance(*skewed, subset_size=150, num_subsets=200))


def test_precision_and_recall_agree_with_torch_fidelity(skewed: tuple[Tensor, Tensor]) -> None:
    real, generated = skewed
    theirs = prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False
    )
    ours = precision_recall(real, generated)
    assert 0 < ours.recall < 1
    assert (ours.precision.item(), ours.recall.item()) == pytest.approx(
        (theirs["precision"], theirs["recall"])
    )


def test_a_model_that_draws_one_mode_of_two_is_precise_and_recalls_half() -> None:
    both = torch.cat([normal(100, 4, seed=0), normal(100, 4, seed=1, mean=50.0)])
    shares = precision_recall(both, both[:100])
    assert shares.precision == 1
    assert shares.recall == 0.5


def test_results_do_not_depend_on_the_chunks(
    skewed: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def values() -> Tensor:
        return torch.stack([kernel_distance(*skewed), *precision_recall(*skewed), near_copies(*skewed)])

    whole = values()
    monkeypatch.setattr("lightning_diffusion.metrics._CHUNK_ROWS", 7)
    torch.testing.assert_close(values(), whole)


def test_near_copies_are_all_for_a_copier_and_the_quantile_for_fresh_data() -> None:
    train = normal(2000, 2, seed=0)
    assert near_copies(train + 1e-6, train) == 1
    assert near_copies(train + 100, train) == 0
    assert near_copies(normal(2000, 2, seed=1), train, quantile=0.2).item() == pytest.approx(0.2, abs=0.03)


def test_arrays_in_low_precision_are_taken() -> None:
    x = normal(50, 2, seed=0).numpy().astype(np.float32)
    assert frechet_distance(x, x).dtype == torch.float64


def test_nan_is_refused_with_its_count() -> None:
    bad = normal(10, 2, seed=0)
    bad[3, 1], bad[7, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="NaN or infinity in 0 and 2 rows"):
        kernel_distance(normal(10, 2, seed=1), bad)


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall, near_copies])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10, 3), r"\(10, 2\) and \(10, 3\), expected"),
        ((10, 2, 1), "flatten"),
        ((1, 2), "at least 2 samples"),
    ],
)
def test_features_of_another_shape_are_refused(metric: object, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(normal(10, 2, seed=0), torch.zeros(shape))  # type: ignore[operator]


def test_more_neighbours_or_subsets_than_samples_are_refused() -> None:
    x = normal(10, 2, seed=0)
    with pytest.raises(ValueError, match=r"neighbours is 10, .*Use 1 to 9"):
        precision_recall(x, x, neighbours=10)
    with pytest.raises(ValueError, match=r"subset_size is 11, .*Use 2 to 10"):
        kernel_distance(x, x, subset_size=11)
