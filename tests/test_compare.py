"""Comparing results: differences by image, other prompts refused, and a page that stands alone."""

from __future__ import annotations

import base64
import json
import re
import sys
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from var_compressor import cli
from var_compressor.evaluation import compare_page, plots
from var_compressor.evaluation.compare import compare_all
from var_compressor.evaluation.results import (
    BenchmarkResult,
    Drawing,
    MetricResult,
    Results,
    ResultsError,
    Subject,
    write_results,
)
from var_compressor.evaluation.scores import frechet_distance
from var_compressor.evaluation.statistics import Estimate

COUNT = 60
IDS = [f"p{i:03d}" for i in range(COUNT)]


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HARDNESS_N = 5 * normal(COUNT, seed=1)
TRUTH_NF = normal(200, 6, seed=2)


def quiet(stage, done, total):
    pass


def metric(values, *, higher=True):
    mean = float(values.mean())
    return MetricResult(mean, mean - 1, mean + 1, len(values), "", "image", higher)


def write(folder, *, shift=0.0, seed=3, ids=IDS, prompts="a" * 64, num_bytes=2**20, **changed):
    """Results whose images differ in how hard they are far more than models do."""
    place = [IDS.index(one) for one in ids]
    psnr_N = (20 + HARDNESS_N + shift + 0.1 * normal(COUNT, seed=seed))[place]
    features_NF = (normal(COUNT, 6, seed=4) + 0.1 * normal(COUNT, 6, seed=seed) + shift)[place]
    rows = {
        "set one/psnr": psnr_N,
        "set one/fid": features_NF.float(),
        "set one/fid/truth": TRUTH_NF.float(),
    }
    distance = frechet_distance(features_NF.float(), TRUTH_NF.float())
    fid = MetricResult(distance, distance - 1, distance + 1, len(ids), "net", "truth", False)
    benchmark = BenchmarkResult(
        num_samples=len(ids),
        subset_seed=0,
        prompts_sha256=prompts,
        seconds_per_image=num_bytes / 2**21,
        metrics={"psnr": metric(psnr_N), "fid": fid},
        reference={},
        changes={},
        skipped={},
        failed=[],
        notes=[],
        images={},
        ids=list(ids),
    )
    subject = Subject("base", None, "0" * 64, f"<{folder.name}>", True, True, True, num_bytes, 0)
    drawing = Drawing(0, {"cfg": 2.0}, 1.0, "0.06M", "w4a4", [], "float32", "cpu", 1)
    results = Results(
        replace(subject, **{k: v for k, v in changed.items() if k in vars(subject)}),
        replace(drawing, **{k: v for k, v in changed.items() if k in vars(drawing)}),
        {"name": "cpu"},
        {"set one": replace(benchmark, **{k: v for k, v in changed.items() if k == "skipped"})},
    )
    write_results(folder, results, rows)
    return folder


def test_differences_are_paired_by_image(tmp_path):
    folders = [write(tmp_path / "full"), write(tmp_path / "small", shift=-0.5, seed=8)]
    (found,) = compare_all(folders, on_progress=quiet).benchmarks
    first, second = found.entries
    assert (first.name, second.name) == ("full", "small") and first.differences == {}
    change = second.differences["psnr"]
    wanted = 0.1 * (normal(COUNT, seed=8) - normal(COUNT, seed=3)) - 0.5
    assert change.value == pytest.approx(float(wanted.mean()))
    # the textbook's interval of the paired difference, not the tenfold one of the two means
    margin = 1.96 * float(wanted.std(correction=0)) / COUNT**0.5
    assert change.high - change.value == pytest.approx(margin, rel=0.1)
    assert change.high < 0 and 10 * margin < 5 / COUNT**0.5
    distance = second.differences["fid"]
    assert distance.value == pytest.approx(
        second.metrics["fid"].value - first.metrics["fid"].value, rel=1e-9
    )
    assert 0 < distance.low < distance.value < distance.high
    cells = compare_page.difference_rows(found)[0]
    assert cells[1].endswith("▼") and cells[2].startswith("+") and cells[2].endswith("▼")


def test_images_that_one_result_lacks_are_left_out_and_told(tmp_path):
    shuffled = [IDS[i] for i in torch.randperm(COUNT, generator=torch.Generator()).tolist()]
    folders = [write(tmp_path / "full"), write(tmp_path / "small", seed=8, ids=shuffled[:40])]
    (found,) = compare_all(folders, on_progress=quiet).benchmarks
    assert found.num_samples == 40
    wanted = 0.1 * (normal(COUNT, seed=8) - normal(COUNT, seed=3))
    kept = [IDS.index(one) for one in shuffled[:40]]
    assert found.entries[1].differences["psnr"].value == pytest.approx(float(wanted[kept].mean()))
    assert any(note.startswith("full: 20 of its images") for note in found.notes)


def test_other_prompts_are_refused(tmp_path):
    folders = [write(tmp_path / "full"), write(tmp_path / "small", prompts="b" * 64)]
    with pytest.raises(ValueError, match="set one: small is over other prompts than full"):
        compare_all(folders, on_progress=quiet)


def test_what_else_differs_is_told(tmp_path):
    folders = [
        write(tmp_path / "full"),
        write(tmp_path / "seeds", seed=8, skipped={"clip_iqa": "no weights"}),
    ]
    drawing = json.loads((folders[1] / "results.json").read_text())
    drawing["drawing"]["seed"] = 7
    (folders[1] / "results.json").write_text(json.dumps(drawing))
    (found,) = compare_all(folders, on_progress=quiet).benchmarks
    assert "seeds differ: 0 full; 7 seeds" in found.notes
    assert "seeds: skipped clip_iqa: no weights" in found.notes


def test_what_most_have_in_common_is_not_listed(tmp_path):
    folders = [write(tmp_path / name, seed=i) for i, name in enumerate("abcde")]
    content = json.loads((folders[3] / "results.json").read_text())
    content["drawing"]["seed"] = 7
    (folders[3] / "results.json").write_text(json.dumps(content))
    (found,) = compare_all(folders, on_progress=quiet).benchmarks
    assert found.notes == ("seeds differ: 7 d; 0 all others",)


def test_a_reason_for_all_is_told_once(tmp_path):
    lacking = {"clip_iqa": "no weights", "clip_score": "no weights"}
    folders = [write(tmp_path / name, seed=i, skipped=lacking) for i, name in enumerate("ab")]
    (found,) = compare_all(folders, on_progress=quiet).benchmarks
    assert found.notes == ("skipped clip_iqa, clip_score: no weights",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["full"], "needs two results"),
        (["full", "full"], "is given twice"),
        (["full", "./full/results.json"], "is given twice"),
        (["full", "nowhere"], "no such file"),
        (["full", "broken"], "not readable"),
        (["full", "cut"], "rows.safetensors: is not the file"),
    ],
)
def test_results_that_cannot_be_compared(tmp_path, monkeypatch, names, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "full")
    write(tmp_path / "cut", seed=8)
    rows = tmp_path / "cut" / "rows.safetensors"
    rows.write_bytes(rows.read_bytes()[:-100])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"format": ')
    with pytest.raises(ValueError, match=message) as caught:
        compare_all(names, on_progress=quiet)
    # what cannot be read is told by the reader of results
    is_unreadable = names[-1] in ("nowhere", "broken", "cut")
    assert isinstance(caught.value, ResultsError) == is_unreadable


def test_folders_of_one_name_are_called_by_their_path(tmp_path):
    folders = [write(tmp_path / "a" / "run"), write(tmp_path / "b" / "run", seed=8)]
    found = compare_all(folders, on_progress=quiet)
    assert [one.name for one in found.benchmarks[0].entries] == [str(one) for one in folders]


@pytest.fixture
def run(monkeypatch, capsys):
    def varc(*words):
        monkeypatch.setattr(sys, "argv", ["varc", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr()

    return varc


def test_the_command_writes_page_plots_and_json(tmp_path, run):
    names = ("full", "w4a4", "w4a4-kv8")
    for i, name in enumerate(names):
        write(tmp_path / name, shift=-0.3 * i, seed=10 + i, num_bytes=(3 - i) * 2**20)
    out = tmp_path / "out"
    code, printed = run("compare", *(tmp_path / name for name in names), "--out", out)
    assert code == 0, printed.err
    assert "PSNR, dB" in printed.out and "difference to full" in printed.out
    page = (out / "index.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "http" not in page and "<script" not in page and "&lt;w4a4&gt;" in page
    found = json.loads((out / "comparison.json").read_text())
    shown = found["benchmarks"][0]["entries"][2]["differences"]["psnr"]
    text = f"{shown['value']:.2f} [{shown['low']:.2f}, {shown['high']:.2f}]"
    assert text in page and text.split(" [")[0] in printed.out
    assert "prefers-color-scheme" in page or "color-scheme: light dark" in page
    assert "@media print" in page
    pictures = [base64.b64decode(url) for url in re.findall(r"base64,([^']+)'", page)]
    files = [out / "bytes-set-one.png", out / "latency-set-one.png"]
    assert pictures == [path.read_bytes() for path in files]
    code, printed = run("compare", tmp_path / "full", tmp_path / "w4a4", "--out", out, "--json")
    assert json.loads(printed.out)["sources"]["w4a4"] == str(tmp_path / "w4a4")


def test_a_line_tells_why_there_is_no_comparison(tmp_path, run):
    write(tmp_path / "full")
    write(tmp_path / "other", prompts="b" * 64)
    code, printed = run("compare", tmp_path / "full", tmp_path / "other", "--out", tmp_path / "out")
    assert code == 2 and len(printed.err.strip().splitlines()[-1:]) == 1
    assert "other prompts" in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "can_draw", lambda: False)
    folders = [write(tmp_path / "full"), write(tmp_path / "small", seed=8)]
    found = compare_all(folders, on_progress=quiet)
    written = compare_page.write_comparison(found, tmp_path / "out")
    assert [path.name for path in written] == ["index.html", "comparison.json"]
    assert plots.MISSING.split("'")[0] in (tmp_path / "out" / "index.html").read_text()


# --- plots ----------------------------------------------------------------------------------------


def colors_in(png):
    with Image.open(BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return {tuple(map(int, one)) for one in np.unique(pixels, axis=0)}


def hex_color(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def test_every_model_has_a_colour_and_a_shape_of_its_own():
    names = [f"model {i}" for i in range(12)]
    styles = plots.styles_of(names)
    assert len({(one.color, one.marker) for one in styles.values()}) == 12
    values = {name: Estimate(i, i - 0.5, i + 0.4) for i, name in enumerate(names)}
    png = plots.quality_over_cost(
        {name: float(i) for i, name in enumerate(names)},
        "MiB",
        [plots.Panel("up", values), plots.Panel("few", dict(list(values.items())[:2]))],
        styles,
    )
    assert {hex_color(one) for one in plots.COLORS} <= colors_in(png)
    lines = plots.line_by_line(names, [plots.Panel("up", values, band=(2, 4))], styles)
    assert {hex_color(one) for one in plots.COLORS} <= colors_in(lines)


def test_a_value_outside_its_skewed_interval_can_be_drawn():
    styles = plots.styles_of(["a"])
    panel = plots.Panel("odd", {"a": Estimate(1.0, 1.2, 1.5)})
    assert plots.line_by_line(["a"], [panel], styles).startswith(b"\x89PNG")
