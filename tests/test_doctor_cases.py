"""Twelve sick configurations are found out, the shipped recipes are left in peace (benchmarks/doctor_cases.py)."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from lightning_diffusion.analysis.findings import Severity

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("data", "objective", "averages")


def benchmark():
    spec = spec_from_file_location("doctor_cases", ROOT / "benchmarks" / "doctor_cases.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = benchmark()
NEED_STEPS = {"float16 without scaling"}
WHOLE = [
    case for case in cases.CASES if case.name in {*NEED_STEPS, "wrong sigma_data"}
]  # the script has them all
FAST = [pytest.param(case, id=case.name) for case in cases.CASES if case.name not in NEED_STEPS]


def test_there_are_twelve_half_of_them_made_in_python():
    assert len(cases.CASES) == 12
    assert sum(case.made is not None for case in cases.CASES) == 6


@pytest.mark.parametrize("case", FAST)
def test_the_finding_is_among_the_first_three(case):
    report = cases.report_of(case, QUICK, steps=4)
    assert report.status == (2 if report.cannot_run else 1)
    assert cases.place(report, case.check) in (1, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_the_finding_is_among_the_first_three_of_the_whole_report(case):
    assert cases.place(cases.report_of(case, steps=4), case.check) in (1, 2, 3)


@pytest.mark.parametrize("name", ["none", "ddpm", "min_snr_v", "latent_diffusion", "score_matching"])
def test_recipes_are_left_in_peace(name):
    check_healthy([cases.CONFIGS / "recipes" / f"{name}.yaml"] if name != "none" else [], QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm_stable_target", "rectified_flow"])
def test_recipes_are_left_in_peace_by_the_whole_report(name):
    check_healthy([cases.CONFIGS / "recipes" / f"{name}.yaml"], None)


def check_healthy(paths, only):
    report = cases.configured([cases.DIGITS, *paths], only, steps=4)
    assert [f for _, f in report.findings if f.severity is not Severity.NOTE] == []
    assert report.status == 0


def first_remedy(case):
    report = cases.report_of(case, QUICK, steps=4)
    return next(f.remedy for _, f in report.findings if f.check == case.check)


MENDED = [case for case in cases.CASES if case.yaml and case.name not in NEED_STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("case", MENDED, ids=lambda case: case.name)
def test_the_remedy_mends_the_configuration(case, tmp_path):
    (tmp_path / "sick.yaml").write_text(case.yaml)
    (tmp_path / "mended.yaml").write_text(first_remedy(case) + "\n")
    report = cases.configured(
        [cases.DIGITS, tmp_path / "sick.yaml", tmp_path / "mended.yaml"], QUICK, steps=4
    )
    assert case.check not in [f.check for _, f in report.findings]
