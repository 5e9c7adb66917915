"""One command from weights to the published table: run on a small model, and what it misses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from var_compressor import cli
from var_compressor.artifact import read_manifest
from var_compressor.cli import compare as commands
from var_compressor.evaluation import reproduce
from var_compressor.evaluation.reproduce import COMPRESSED, FULL, read_reproduction
from var_compressor.evaluation.results import read_results
from var_compressor.evaluation.steps import Steps
from var_compressor.recipe import RecipeError, recipes_dir

SHIPPED = sorted((recipes_dir() / "reproduce").glob("*.yaml"))
RECIPE = """
recipes: [recipes/model/infinity-tiny.yaml, recipes/collect/tiny.yaml, recipes/svdquant/fast.yaml]
benchmark: tiny
metrics: [psnr, reader_fid, bit_agreement]
num_samples: 3
bench: {prompt: a red cat, runs: 1}
published:
  source: published by somebody
  machine: a big machine
  num_samples: 5000
  rows:
    - {quantity: reader_fid, full: 12.25, compressed: 13.5}
    - {quantity: peak_gb, full: 37.1, compressed: 13.3}
"""
QUICK = (
    *("collect.num_prompts=2", "quant.smooth.num_grids=2", "quant.low_rank.max_iters=1"),
    *("quant.low_rank.rank=8", "model.device=cpu", "model.dtype=float32"),
)


@pytest.fixture
def varc(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["varc", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr()

    return run


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def test_from_weights_to_the_page_and_then_nothing_twice(
    recipe, tmp_path, model_dir, varc, monkeypatch
):
    out = tmp_path / "out"
    words = ("reproduce", recipe, f"model.path={model_dir}", *QUICK, "--out", out)
    code, printed = varc(*words)
    assert code == 0, printed.err
    assert read_manifest(out / "artifact").kv["format"]["name"] == "int8"
    found = json.loads((out / "reproduction.json").read_text())
    page = (out / "index.html").read_text()
    assert "http" not in page and "published by somebody" in page
    for name, folder in ((FULL, "full"), (COMPRESSED, "compressed")):
        result = read_results(out / folder)
        assert result.subject.is_full_precision == (name == FULL)
        value = result.benchmarks["tiny"].metrics["reader_fid"].value
        assert f"{value:.3f} [" in page and f"{value:.3f} [" in printed.out
        assert found["timed"]["seconds"][name] > 0 and found["timed"]["peak_bytes"][name] > 0
        assert f"{found['timed']['seconds'][name]:.2f}" in page
    # measured beside published, as it was published
    for number in ("12.25", "13.5", "37.1", "13.3"):
        assert number in page and number in printed.out
    details = json.loads((out / "bench" / "results.json").read_text())
    assert [one["name"] for one in details["measured"]] == [str(out / "artifact"), "full precision"]
    assert "FID falls with the number of images: 3 here, 5000 there" in page

    def fail(*args, **options):
        raise AssertionError("done before")

    monkeypatch.setattr(reproduce, "evaluate", fail)
    monkeypatch.setattr(commands, "_bench", fail)
    manifest = (out / "artifact" / "manifest.json").stat().st_mtime_ns
    code, printed = varc(*words)
    assert code == 0 and printed.err.count("done before") == 3
    assert (out / "artifact" / "manifest.json").stat().st_mtime_ns == manifest
    assert json.loads((out / "reproduction.json").read_text()) == found
    # what was asked otherwise is measured again
    with pytest.raises(AssertionError):
        varc(*words, "--num-samples", 2)
    # and other weights do not pass for these
    code, printed = varc(*words, "quant.calibration.seed=9")
    assert code == 2 and "was made with calibration" in printed.err


def test_everything_that_is_missing_is_told_at_once(varc, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    for size, channels in (("2b", 32), ("8b", 14)):
        shipped = f"recipes/reproduce/infinity-{size}.yaml"
        code, printed = varc("reproduce", shipped, "--data-root", "sets", "--out", out)
        assert code == 2 and not out.exists()
        lines = [line for line in printed.err.splitlines() if line.startswith("- ")]
        model, data, *metrics = lines
        assert f"model infinity-{size}: not here" in model and "model.path=DIR" in model
        assert f"VAE of {channels} channels" in model and "flan-t5-xl" in model
        assert "sets/MJHQ-30K/meta_data.json: missing" in data
        names = [line.split()[2] for line in metrics]
        assert names == ["fid", "clean_fid", "image_reward", "clip_iqa", "clip_score", "lpips"]
        assert all("--metric-weights" in line for line in metrics)
        assert f"({len(lines)})" in printed.err and "Traceback" not in printed.err


def test_a_wrong_model_path_is_named(varc, tmp_path, recipe):
    code, printed = varc("reproduce", recipe, "model.path=/nowhere", "--out", tmp_path / "out")
    assert code == 2 and "model /nowhere: not here" in printed.err


# --- the recipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_name_recipes_and_metrics_that_exist(path):
    from var_compressor.recipe import load_recipe

    asked = read_reproduction(path)
    merged = load_recipe(asked.recipes, [])
    assert merged.model.name == path.stem and merged.quant.kv.format == "int8"
    assert merged.quant.summary().startswith("W4A4")
    known = {*asked.metrics, reproduce.PEAK_GB, reproduce.SECONDS}
    assert {row.quantity for row in asked.published.rows} <= known


def test_the_published_numbers():
    """As the VAR-Compressor authors give them: MJHQ-30K, 5,000 samples; AGX Orin 64 GB."""
    published = {
        size: {
            row.quantity: (row.full, row.compressed)
            for row in read_reproduction(
                Path(f"recipes/reproduce/infinity-{size}.yaml")
            ).published.rows
        }
        for size in ("2b", "8b")
    }
    assert published["8b"] == {
        **{"fid": (19.6, 19.0), "image_reward": (1.18, 1.13), "clip_iqa": (0.945, 0.935)},
        **{"peak_gb": (37.1, 13.3), "seconds": (25.1, 27.0)},
    }
    assert published["2b"] == {
        **{"fid": (21.3, 20.2), "image_reward": (0.981, 0.840), "clip_iqa": (0.947, 0.919)},
        **{"peak_gb": (16.0, 7.71), "seconds": (8.46, 11.5)},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("metrics: [psnr,", "metrics: [beauty,"), "no metric is called 'beauty'"),
        (("num_samples: 3", "num_samples: 1"), "num_samples of 2 or more"),
        (("benchmark: tiny", "benchmark: [tiny]"), "benchmark: expected text"),
        (("bench: {prompt: a red cat, runs: 1}", ""), "lacks the key 'bench'"),
        (("benchmark: tiny", "bench_mark: tiny"), "bench_mark: unknown key"),
        (("full: 12.25", "full: much"), "full: expected a number"),
        (("recipes:", "recipes: ["), "not a readable YAML file"),
    ],
)
def test_a_recipe_that_cannot_be_is_named_with_its_key(recipe, change, message):
    recipe.write_text(RECIPE.replace(*change, 1))
    with pytest.raises(RecipeError, match=message) as caught:
        read_reproduction(recipe)
    assert "mine.yaml" in str(caught.value)


# --- steps ----------------------------------------------------------------------------------------


def test_a_step_is_done_again_for_other_inputs_and_lost_outputs(tmp_path):
    told, made = [], tmp_path / "made"
    steps = Steps(tmp_path, tell=told.append)

    def work():
        made.touch()

    def broken():
        raise RuntimeError

    inputs = {"a": (1, 2), "b": None}
    assert steps.run("one", inputs, [made], work)
    assert not steps.run("one", {"a": [1, 2], "b": None}, [made], broken)
    with pytest.raises(RuntimeError):
        steps.run("one", {**inputs, "b": 0}, [made], broken)
    # a step that failed is not done, whatever it was before
    assert steps.run("one", inputs, [made], work)
    made.unlink()
    assert steps.run("one", inputs, [made], work)
    (tmp_path / "steps" / "one.json").write_text('{"a": [1,')
    assert steps.run("one", inputs, [made], work)
    assert told[:2] == ["one: begun", "one: done before"]
