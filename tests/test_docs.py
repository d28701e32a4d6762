"""What the documentation says is so: examples run and print what they say, YAML is accepted, links lead somewhere."""

import contextlib
import io
import math
import re
import textwrap
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

import lightning_diffusion as ld
from lightning_diffusion import callbacks, datamodules
from lightning_diffusion.cli import main
from lightning_diffusion.stable_targets import References

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [ROOT / "docs" / name for name in ("objective.md", "knobs.md", "networks.md")]


def name_of(page):
    return page.name if isinstance(page, Path) else None


def blocks(page, language):
    """Fenced blocks of a language."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(text) for _, text in found]


def prose(page):
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_is_python(page):
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


@cache
def names(page):
    """What the page's Python, run from top to bottom, leaves; its prints must be what the comments behind them say."""
    space = {}
    for block in blocks(page, "python"):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, page.name, "exec"), space)
        promised = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
        assert said.getvalue().splitlines() == promised
    return space


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_python_prints_what_it_says(page):
    assert names(page)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_yaml_is_accepted_by_fit(page, folder, capsys):
    for number, block in enumerate(blocks(page, "yaml")):
        Path(f"{number}.yaml").write_text(block)
        files = ["--config", str(ROOT / "configs" / "digits.yaml"), "--config", f"{number}.yaml"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *files, "--print_config"])
        assert stopped.value.code == 0, block
        model = yaml.safe_load(capsys.readouterr().out)["model"]
        assert built(model["objective"]).sigma_data == built(model["representation"]).sigma_data, block


def built(part):
    """What `{class_path, init_args}` stands for."""
    if not isinstance(part, dict) or "class_path" not in part:
        return part
    arguments = {name: built(value) for name, value in part.get("init_args", {}).items()}
    return getattr(ld, part["class_path"].rpartition(".")[2])(**arguments)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_classes_that_are_named_are_there(page):
    for word in re.findall(r"`([A-Z][A-Za-z0-9]+)(?:\([^`]*\))?`", prose(page)):
        assert any(hasattr(module, word) for module in (ld, callbacks, datamodules)), word


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_every_picture_has_words_for_those_who_do_not_see_it(page):
    assert all(len(words) > 20 for words in re.findall(r"!\[(.*?)\]", prose(page)))


def test_the_callback_of_knobs_logs_the_parts_of_the_axis(tmp_path):
    space = names(ROOT / "docs" / "knobs.md")
    data = datamodules.DigitsDataModule(batch_size=256)
    trainer = L.Trainer(
        max_steps=2, log_every_n_steps=1, callbacks=[space["LossByLevel"]()], default_root_dir=tmp_path, logger=False,
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(space["model"], datamodule=data)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if "loss/" in name}
    assert logged.keys() == {"loss/noise", "loss/middle", "loss/data"}
    assert all(0.5 < value < 1.5 for value in logged.values()), "the residual has variance 1"


def test_full_preconditioning_trains_what_ddpm_trains():
    """As docs/knobs.md says of its example."""
    preconditioning = ld.EDMPreconditioning(ld.Epsilon(), 1.0)
    full = ld.DiffusionObjective(ld.LinearSchedule(), ld.UniformTime(), preconditioning, ld.Constant())
    log_snr = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(full.effective_weight(log_snr), ld.DDPM().effective_weight(log_snr))


@pytest.mark.parametrize(("multiple", "left"), [(1, 0.15), (2, 0.5), (4, 0.95)])
def test_where_stable_targets_stop_helping(multiple, left):
    """At SNR = ln(n) / (D sigma_data^2), and multiples of it, as docs/objective.md says."""
    n, dimensions = 1024, 512
    generator, totals = torch.Generator().manual_seed(0), torch.zeros(2)
    snr = multiple * math.log(n) / dimensions
    level = ld.EDMSchedule().at(torch.full((256,), math.log(snr)))
    for _ in range(6):
        x0 = torch.randn(n, dimensions, generator=generator)
        noise = torch.randn(256, dimensions, generator=generator)
        stable, _ = ld.StableTarget().posterior(x0[:256], noise, level, References(x0), None)
        exact = level.diffuse(x0[:256], noise) * snr / (1 + snr)
        totals += torch.stack([(x - exact).square().sum() for x in (stable, x0[:256])])
    assert abs(totals[0] / totals[1] - left) < 0.08
