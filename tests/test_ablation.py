"""The ablation grid on a small random model: switches do what they say, nothing is done twice."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from var_compressor import cli
from var_compressor.evaluation import ablation, ablation_page
from var_compressor.evaluation.ablation import Cell, Grid, cells_of, correlated
from var_compressor.evaluation.bitwise import packed_bits, unpacked_bits
from var_compressor.evaluation.compare import ComparedBenchmark, Entry
from var_compressor.evaluation.gallery import read_carried, read_image
from var_compressor.evaluation.metrics import BIT_METRICS
from var_compressor.evaluation.results import MetricResult, read_results, read_rows
from var_compressor.layers.switches import Switches
from var_compressor.models.schedule import Schedule
from var_compressor.pipeline import InfinityPipeline
from var_compressor.recipe import load_recipe

RECIPES = (
    "recipes/model/infinity-tiny.yaml",
    "recipes/collect/tiny.yaml",
    "recipes/svdquant/int4.yaml",
)
QUICK = (
    *("collect.num_prompts=2", "quant.smooth.num_grids=2", "quant.low_rank.max_iters=1"),
    *("quant.low_rank.rank=8", "model.device=cpu", "model.dtype=float32", "collect.tau=0.7"),
)
GRID = Grid(
    recipes=RECIPES,
    overrides=QUICK,
    methods=("naive", "smoothquant", "svdquant"),
    benchmark="tiny",
    metrics=ablation.METRICS,
    num_samples=3,
    group_prompts=2,
    seed=0,
    data_root=Path("data"),
    metric_weights=None,
)


# --- what is in the grid --------------------------------------------------------------------------


def test_methods_are_the_shipped_ablation_recipes():
    for method, name in (("naive", "-naive"), ("smoothquant", "-smoothquant"), ("svdquant", "")):
        model = f"recipes/model/infinity-tiny{name}.yaml"
        shipped = load_recipe([model, *RECIPES[1:]], []).quant
        assert replace(GRID, overrides=()).recipe(method).quant == shipped


def test_every_combination_is_in_the_grid_once():
    cells = cells_of(GRID)
    assert len(cells) == 22 == len({one.name for one in cells}) == len({c.title for c in cells})
    for method in GRID.methods:
        switches = {one.switches for one in cells if one.method == method}
        wanted = {Switches(w, a, k) for w in (0, 1) for a in (0, 1) for k in (0, 1) if w or a}
        assert wanted <= switches
    assert sum(one.method is None for one in cells) == 3
    titles = {one.title for one in cells}
    assert {"SVDQuant W4A4 KV8", "naive A4", "SmoothQuant W4 KV8", "KV8 alone"} <= titles
    assert cells[0].title == ablation.FULL
    int4 = replace(GRID, overrides=(*QUICK, "quant.kv.format=int4"))
    assert "SVDQuant A4 KV4" in {one.title for one in cells_of(int4)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ("naive", "awq")}, "no method is called 'awq'; there are naive, smoothquant"),
        ({"overrides": (*QUICK, "quant.act.format=null")}, "nothing to switch"),
        ({"overrides": (*QUICK, "quant.kv.format=bf16")}, "needs no calibration"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_the_work(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        run(replace(GRID, **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- running it -----------------------------------------------------------------------------------


def run(grid, out, told=None):
    return ablation.ablate(
        grid,
        out,
        on_progress=lambda *words: None,
        tell=(lambda line: None) if told is None else told.append,
    )


@pytest.fixture(scope="module")
def grid(model_dir):
    """Of the small random model, for which bits are drawn in no time."""
    return replace(
        GRID,
        overrides=(*QUICK, f"model.path={model_dir}"),
        methods=("naive", "svdquant"),
        metrics=("psnr", "reader_fid", *BIT_METRICS),
        num_samples=2,
    )


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def done(grid, tmp_path_factory):
    """The whole grid, by a run that was cut off in its fifth evaluation, and one that went on."""
    out, evaluations = tmp_path_factory.mktemp("ablation"), []
    real = ablation.evaluate

    def evaluate(request, **options):
        evaluations.append(request.out.name)
        if len(evaluations) == 5:
            raise Killed
        return real(request, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "evaluate", evaluate)
        with pytest.raises(Killed):
            run(grid, out)
        found = run(grid, out)
    return found, out, evaluations


def test_a_run_that_was_cut_off_goes_on(done, grid):
    found, _, evaluations = done
    names = [one.name for one in cells_of(grid)]
    # the fifth was begun twice, and no other
    assert evaluations == [*names[:5], *names[4:]]
    assert [one.name for one in found.compared.entries] == [one.title for one in cells_of(grid)]


def test_a_finished_grid_is_read_only(done, grid, monkeypatch):
    found, out, _ = done

    def fail(*args, **options):
        raise AssertionError("done before")

    told = []
    for name in ("evaluate", "group_agreement"):
        monkeypatch.setattr(ablation, name, fail)
    again = run(grid, out, told)
    assert again.to_dict() == found.to_dict()
    assert all(line.endswith("done before") for line in told)
    # one cell whose results went is evaluated again, and so is all of another size
    (out / "cells" / "kv" / "results.json").rename(out / "cells" / "kv" / "kept.json")
    with pytest.raises(AssertionError):
        run(grid, out)
    (out / "cells" / "kv" / "kept.json").rename(out / "cells" / "kv" / "results.json")
    with pytest.raises(AssertionError):
        run(replace(grid, num_samples=3), out)


def test_another_recipe_does_not_take_the_artifacts_of_the_first(done, grid):
    _, out, _ = done
    other = replace(grid, overrides=(*grid.overrides, "quant.calibration.seed=5"))
    with pytest.raises(ValueError, match=r"was made with calibration .*; give another --out"):
        run(other, out)


def test_switches_quantize_what_they_say(done):
    found, out, _ = done
    kl = {
        one.name: one.metrics["bit_kl"].value
        for one in found.compared.entries
        if "bit_kl" in one.metrics
    }
    for title in ("naive", "SVDQuant"):
        alone = (kl[f"{title} W4"], kl[f"{title} A4"])
        assert min(alone) > 0 and kl[f"{title} W4A4"] > max(alone)
        # an 8-bit cache hardly shows beside them
        assert kl[f"{title} W4A4 KV8"] == pytest.approx(kl[f"{title} W4A4"], rel=0.3)
    assert 0 < kl["KV8 alone"] < min(kl["naive W4"], kl["SVDQuant W4"]) / 5
    for cell in found.cells:
        subject = read_results(out / "cells" / cell.name).subject
        assert (subject.weights, subject.activations, subject.kv) == (
            cell.switches.weights,
            cell.switches.activations,
            cell.switches.kv,
        )
    sizes = {one.name: one.num_bytes for one in found.compared.entries}
    assert sizes["naive W4"] < sizes["naive A4"] == sizes[ablation.FULL]
    assert sizes["naive W4A4 KV8"] < sizes["naive W4A4"] < sizes["SVDQuant W4A4"]


def test_the_noise_floor_is_the_same_model_with_other_bits(done):
    found, _, _ = done
    assert len(found.noise_floor) == 2
    for title in found.noise_floor:
        one = next(one for one in found.compared.entries if one.name == title)
        assert not {"bit_agreement", "bit_kl"} & one.metrics.keys()
        assert value_of(found, title, "first_divergence") < 2
        assert value_of(found, title, "latent_error") > 0.1 and (
            value_of(found, title, "psnr") < 60
        )
    assert "psnr" not in found.compared.entries[0].metrics


def value_of(found, title, metric):
    return next(one for one in found.compared.entries if one.name == title).metrics[metric].value


def test_rows_by_level_average_to_the_metric(done):
    found, out, _ = done
    rows = read_rows(out / "cells" / "naive-w4-a4")
    levels = rows["tiny/bit_kl/levels"]
    schedule = Schedule.of(1.0, "0.06M")
    shares = torch.tensor([level.num_tokens for level in schedule.levels]).double()
    assert torch.allclose(levels @ (shares / shares.sum()), rows["tiny/bit_kl"])
    assert found.levels["naive W4A4"]["bit_kl"] == pytest.approx(levels.mean(0).tolist())


def test_images_carry_the_bits_that_they_were_drawn_from(done, grid, model_dir):
    _, out, _ = done
    paths = sorted((out / "images").glob("*full-precision*/tiny/*.png"))
    assert len(paths) == 6
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    schedule = pipeline.schedule_for(1.0, None)
    image_3YX, carried = read_image(paths[0]), read_carried(paths[0])
    bits = unpacked_bits([carried["bits"]], schedule, 8)
    pyramid = pipeline.new_pyramid(schedule, batch=1)
    for level, bits_BLQ in zip(schedule.levels, bits, strict=True):
        pyramid.add(bits_BLQ, level)
    decoded = ((pipeline.decode(pyramid.latent_BDYX, strip_rows=None)[0] + 1) / 2 * 255).to(
        torch.uint8
    )
    assert (decoded.int() - image_3YX.int()).abs().max() <= 1
    assert packed_bits(bits) == [carried["bits"]]
    with pytest.raises(ValueError, match="expected 4168"):
        unpacked_bits([carried["bits"][:-4]], schedule, 8)


def test_groups_of_layers_are_in_the_page_with_their_costs(done):
    found, _, _ = done
    assert list(found.groups) == ["naive", "SVDQuant"]
    for costs in found.groups.values():
        assert {"all", "FFN down", "KV cache", "block 0"} <= costs.keys()
        kl = {name: cost.kl_nats.value for name, cost in costs.items()}
        assert all(0 < value <= 1.1 * kl["all"] for value in kl.values())
    assert found.num_group_prompts == 2


# --- correlation ----------------------------------------------------------------------------------


def test_correlations_are_over_quantized_lines_with_log_kl():
    def entry(name, kl, psnr):
        metrics = {
            "bit_kl": MetricResult(kl, kl, kl, 9, "", "bits", False),
            "psnr": MetricResult(psnr, psnr, psnr, 9, "", "reference", True),
        }
        return Entry(name, "", 1, 1.0, metrics, {})

    quantized = [entry(f"c{i}", 10.0**-i, 20.0 + 3 * i) for i in range(6)]
    # a floor that would spoil it
    entries = (entry("full", 0.0, 0.0), entry("floor", 1.0, 500.0), *quantized)
    off = Switches(False, False, False)
    cells = [Cell("full", "full", None, off), Cell("floor", "floor", None, off, 1)]
    cells += [Cell(one.name, one.name, "naive", Switches()) for one in quantized]
    (found,) = correlated(ComparedBenchmark("b", 9, entries, ()), cells)
    assert (found.bits, found.images, found.found.count) == ("bit_kl", "psnr", 6)
    assert found.found.pearson.value == pytest.approx(-1)
    assert found.found.spearman.value == pytest.approx(-1)


# --- what is written ------------------------------------------------------------------------------


def test_page_plots_tables_and_json(done, tmp_path):
    found, _, _ = done
    written = ablation_page.write_ablation(found, tmp_path)
    assert {path.name for path in written} == {
        *("index.html", "ablation.json", "tables.md"),
        *("grid.png", "bytes.png", "groups.png"),
    }
    page, tables = (tmp_path / "index.html").read_text(), (tmp_path / "tables.md").read_text()
    assert "http" not in page and "<script" not in page
    content = json.loads((tmp_path / "ablation.json").read_text())
    entry = next(one for one in content["compared"]["entries"] if one["name"] == "SVDQuant W4A4")
    shown = f"{100 * entry['metrics']['bit_agreement']['value']:.2f} ["
    for text in (page, tables):
        assert all(one.title in text for one in found.cells) and shown in text
    for name in ("grid.png", "bytes.png", "groups.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    columns, rows = ablation_page.tables(found)["Values"]
    assert all(len(row) == len(columns) for row in rows) and len(rows) == 16
    header = next(line for line in tables.splitlines() if line.startswith("| tiny"))
    assert header.count("|") == len(columns) + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "awq"), "no method is called 'awq'"),
        (("--benchmark", "nothing"), "nothing: no such benchmark"),
        (("--metrics", "psnr,beauty"), "no metric is called 'beauty'"),
        (("--num-samples", "1"), "--num-samples"),
        (("quant.nonsense=1",), "unknown key"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_the_work(
    tmp_path, monkeypatch, capsys, words, message
):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["varc", "ablate", "--out", str(out), *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and "Traceback" not in error
    assert not out.exists()
