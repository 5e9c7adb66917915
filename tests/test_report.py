"""Warnings, table and plot of a run, on reports made up so that the answer is known."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from var_compressor import cli, compress
from var_compressor.ops.primitives import FORMATS, round_trip
from var_compressor.quant.report import (
    SUMMARY_COLUMNS,
    LinearReport,
    all_warnings,
    expected_snr_db,
    final_snr_db,
    model_warnings,
    normal_snr_db,
    read_report,
    stage_seconds,
    summary_rows,
    vanishing_ratio,
    warnings_for,
    write_plot,
)
from var_compressor.spec import (
    ACT_FORMATS,
    MODULES,
    PRESETS,
    WEIGHT_FORMATS,
    ActSpec,
    LowRankSpec,
    QuantSpec,
    SmoothSpec,
)

SPEC = QuantSpec().for_module("ffn.fc1")
STEPS = ("nearest", "smoothed", "branch", "refined", "final")
GOOD = LinearReport(
    name="ffn.fc1",
    snr_db=dict(zip(STEPS, (12.0, 14.0, 15.5, 16.0, 16.0), strict=True)),
    objective="projection output",
    alpha=0.5,
    beta=0.25,
    smooth_gain_db=2.0,
    low_rank_steps=12,
    low_rank_best=6,
    outlier_ratio=30.0,
)


def with_snr(final: float, nearest: float = 12.0, **fields) -> LinearReport:
    return replace(GOOD, snr_db={**GOOD.snr_db, "nearest": nearest, "final": final}, **fields)


def make_report(num_blocks: int, *, seed: int = 0) -> dict:
    """As a run writes it: JSON of linears in the order of a block."""
    rng = random.Random(seed)
    blocks = []
    for index in range(num_blocks):
        linears = []
        for place, name in enumerate(MODULES):
            nearest = 9 + 0.8 * place + 2 * math.sin(index / 4) + rng.gauss(0, 0.4)
            gains = [nearest + gain + rng.random() for gain in (0, 1.5, 3, 4, 4)]
            linears.append(
                replace(
                    GOOD,
                    name=name,
                    snr_db=dict(zip(STEPS, (nearest, *gains[1:]), strict=True)),
                    alpha=rng.randrange(20) / 20,
                    beta=rng.choice([0.0, 0.5]),
                    outlier_ratio=math.exp(rng.gauss(2 + place / 3, 0.5)),
                )
            )
        blocks.append({"linears": [asdict(linear) for linear in linears]})
    return json.loads(json.dumps({"blocks": blocks}))


def make_timing(num_blocks: int) -> dict:
    seconds = {"inputs": 0.5} | {name: 1.0 + place for place, name in enumerate(MODULES)}
    blocks = {str(index): seconds for index in range(num_blocks)}
    return {"blocks": blocks, "stages": {"recording": 4.5}}


# --- warnings ------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_a_good_linear():
    assert warnings_for(GOOD, SPEC) == ()


@pytest.mark.parametrize(
    ("report", "spec", "words"),
    [
        (with_snr(11.0, 9.0), SPEC, ("SNR 11.0 dB", "should keep 11.4 dB", "quant.low_rank.rank")),
        (with_snr(15.0, 15.5), SPEC, ("SNR 15.0 dB", "15.5 dB", "quant.exceptions")),
        (replace(GOOD, alpha=0, beta=0), SPEC, ("30x the median", "quant.smooth.num_grids")),
        (
            replace(GOOD, low_rank_steps=100, low_rank_best=97),
            SPEC,
            ("limit of 100 steps before it settled", "quant.low_rank.max_iters"),
        ),
    ],
)
def test_each_fault_is_one_line_with_its_number_and_a_way_out(report, spec, words):
    (line,) = warnings_for(report, spec)
    assert all(word in line for word in words) and "\n" not in line, line


@pytest.mark.parametrize(
    ("report", "spec"),
    [
        # as good as plain rounding but for the branch's own rounding, and just above the bound
        (with_snr(11.98), SPEC),
        (with_snr(11.5, 11.0), SPEC),
        # a 16-bit input does not mind outliers, and who switched smoothing off knows
        (with_snr(16.0, alpha=0, beta=0), replace(SPEC, act=ActSpec(format=None))),
        (with_snr(16.0, alpha=0, beta=0), replace(SPEC, smooth=SmoothSpec(enabled=False))),
        (with_snr(16.0, alpha=0, beta=0, outlier_ratio=13.0), SPEC),
        (with_snr(16.0, alpha=0, beta=0.5), SPEC),
        # patience ran out at the very limit; a limit of one step asks for no refinement
        (replace(GOOD, low_rank_steps=100, low_rank_best=94), SPEC),
        (
            replace(GOOD, low_rank_steps=1, low_rank_best=0),
            replace(SPEC, low_rank=LowRankSpec(max_iters=1)),
        ),
        (replace(GOOD, low_rank_steps=1, low_rank_best=0), replace(SPEC, low_rank=LowRankSpec(0))),
    ],
)
def test_what_is_meant_or_harmless_is_not_warned_of(report, spec):
    assert warnings_for(report, spec) == ()


def test_the_bound_follows_the_formats():
    """What W8A8 must keep is far above what W4A4 can."""
    w8a8 = PRESETS["w8a8"].for_module("ffn.fc1")
    assert len(warnings_for(with_snr(30.0), w8a8)) == 1
    assert warnings_for(with_snr(34.0), w8a8) == ()


def test_noise_and_range_of_the_formats():
    known = {
        "sint4": (19.4, 14), "uint4": (19.4, 30), "nvfp4": (20.4, 24),
        "fp8_e4m3": (31.6, 448 * 2**10), "sint8": (41.2, 254),
    }  # fmt: skip
    assert known.keys() == {*WEIGHT_FORMATS, *ACT_FORMATS}
    for name, (snr_db, ratio) in known.items():
        assert normal_snr_db(name) == pytest.approx(snr_db, abs=0.1)
        assert vanishing_ratio(name) == ratio


@pytest.mark.parametrize("preset", ["svdquant", "w8a8", "w4a16", "w4a8", "nvfp4"])
def test_the_expected_snr_is_that_of_normal_tensors(preset):
    spec = PRESETS[preset].for_module("ffn.fc1")
    generator = torch.Generator().manual_seed(0)
    x_TK, weight_NK = (torch.randn(256, 2048, generator=generator) for _ in range(2))

    def rounded(x, name, group_size):
        if name is None:
            return x
        size = x.shape[1] if group_size == -1 else group_size
        return round_trip(x, format=FORMATS[name], group_size=size, scale_dtype=torch.float32)

    wanted = x_TK @ weight_NK.T
    got = (
        rounded(x_TK, spec.act.format, spec.act.group_size)
        @ rounded(weight_NK, spec.weight.format, spec.weight.group_size).T
    )
    snr_db = 10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum())
    assert expected_snr_db(spec) == pytest.approx(float(snr_db), abs=0.5)


def test_the_median_channel_vanishes_beyond_the_ratio():
    """Two channels of a group: the small one rounds to 0 only if it is smaller than the ratio."""
    for name in ("sint4", "sint8"):
        for ratio, vanishes in ((0.98, False), (1.02, True)):
            x = torch.zeros(1, 16)
            x[0, 0], x[0, 1] = 1.0, 1 / (ratio * vanishing_ratio(name))
            x_back = round_trip(x, format=FORMATS[name], group_size=16, scale_dtype=torch.float32)
            assert (x_back[0, 1] == 0) == vanishes, (name, ratio)


def test_a_block_far_below_its_kind_is_found_furthest_first():
    report = make_report(5)
    for block in report["blocks"]:
        for linear in block["linears"]:
            linear["snr_db"]["final"] = 16.0
    report["blocks"][3]["linears"][6]["snr_db"]["final"] = 9.0
    report["blocks"][1]["linears"][0]["snr_db"]["final"] = 7.5
    report["blocks"][2]["linears"][0]["snr_db"]["final"] = 10.5
    lines = model_warnings(report)
    assert [line.split(":")[0] for line in lines] == ["blocks.1.self_attn.qkv", "blocks.3.ffn.fc2"]
    assert "SNR 7.5 dB, 8.5 dB below the median self_attn.qkv" in lines[0]


def test_all_warnings_name_the_linear_start_with_the_worst_and_do_not_repeat_themselves():
    report = make_report(3)
    for block, final, warnings in ((2, 11.0, ["b", "x"]), (0, 12.0, ["a", "x"]), (1, 13.0, ["x"])):
        linear = report["blocks"][block]["linears"][4]
        linear["warnings"], linear["snr_db"]["final"] = warnings, final
    lines, outstanding = all_warnings(report), model_warnings(report)
    assert lines[: len(outstanding)] == outstanding
    assert lines[len(outstanding) :] == [
        "blocks.2.cross_attn.proj: b",
        "blocks.2.cross_attn.proj and 2 more: x",
        "blocks.0.cross_attn.proj: a",
    ]


# --- numbers -------------------------------------------------------------------------------------


def test_the_summary_counts_over_blocks():
    report = make_report(3)
    for index, (nearest, final) in enumerate([(10.0, 15.0), (8.0, 13.5), (11.0, 14.0)]):
        report["blocks"][index]["linears"][6]["snr_db"] |= {"nearest": nearest, "final": final}
    rows = summary_rows(report, make_timing(3))
    assert [row[0] for row in rows] == list(MODULES)
    assert {len(row) for row in rows} == {len(SUMMARY_COLUMNS)}
    assert rows[6] == ("ffn.fc2", "10.0", "8.0", "14.0", "13.5", "1", "21.0")


def test_stages_add_up_to_all_that_was_measured():
    wanted = {"recording": 4.5, "inputs": 1.5, "linears": 3 * 28.0}
    assert stage_seconds(make_timing(3)) == pytest.approx(wanted)


def test_a_linear_left_out_of_a_block_and_blocks_without_times():
    report = make_report(3)
    del report["blocks"][0]["linears"][0]
    timing = make_timing(3)
    del timing["blocks"]["0"], timing["blocks"]["1"]
    rows = summary_rows(report, timing)
    assert rows[0][0] == "self_attn.qkv" and rows[0][5] in "12" and rows[0][6] == "1.0"
    assert final_snr_db({"blocks": [{"linears": []}]}) is None


def test_the_mean_and_the_minimum_are_over_all_linears():
    report = make_report(2)
    finals = [li["snr_db"]["final"] for block in report["blocks"] for li in block["linears"]]
    assert final_snr_db(report) == pytest.approx({"mean": sum(finals) / 14, "min": min(finals)})


def test_reports_are_read_from_the_artifact(tmp_path):
    report, timing = make_report(2), make_timing(2)
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "timing.json").write_text(json.dumps(timing))
    assert read_report(tmp_path) == (report, timing)


# --- plot ----------------------------------------------------------------------------------------


def drawn(path) -> tuple[set[tuple[int, int, int]], tuple[int, int]]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        rgb = image.convert("RGB")
        return set(rgb.get_flattened_data()), rgb.size


@pytest.mark.parametrize("num_blocks", [1, 8, 40])
def test_the_plot_shows_both_lines_and_leaves_no_other_file(tmp_path, num_blocks):
    path = tmp_path / "report.png"
    assert write_plot(make_report(num_blocks), make_timing(num_blocks), path)
    colors, size = drawn(path)
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= colors and size[0] >= 1200
    assert list(tmp_path.iterdir()) == [path]


def test_a_plot_with_gaps_is_grey_where_nothing_was_quantized(tmp_path):
    report, timing = make_report(4), make_timing(4)
    write_plot(report, timing, tmp_path / "full.png")
    for block in report["blocks"][:2]:
        del block["linears"][2]
    timing["blocks"] = {}
    assert write_plot(report, timing, tmp_path / "gaps.png")
    grey = (0xDD, 0xDD, 0xDD)
    with (
        Image.open(tmp_path / "full.png") as full,
        Image.open(tmp_path / "gaps.png") as gaps,
    ):
        counts = [list(im.convert("RGB").get_flattened_data()).count(grey) for im in (full, gaps)]
    assert counts[1] > 10 * max(counts[0], 100)


def test_without_matplotlib_there_is_no_plot_and_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not write_plot(make_report(2), make_timing(2), tmp_path / "report.png")
    assert not list(tmp_path.iterdir())


# --- varc quantize -------------------------------------------------------------------------------

RECIPES = ("recipes/model/infinity-tiny.yaml", "recipes/svdquant/int4.yaml")


@pytest.fixture
def finished(monkeypatch):
    """Runs the command with a compressor that only leaves a report behind."""

    def run(out: Path, report: dict, *words: str):
        def quantize(recipe, out, *, on_progress, memory, team):
            out.mkdir()
            (out / "report.json").write_text(json.dumps(report))
            (out / "timing.json").write_text(json.dumps(make_timing(len(report["blocks"]))))
            return SimpleNamespace(num_weight_bytes=3 * 2**20)

        monkeypatch.setattr(compress, "quantize", quantize)
        return CliRunner().invoke(cli.app, ["quantize", *RECIPES, "--out", str(out), *words])

    return run


def test_json_is_all_that_is_printed_and_says_what_the_report_says(finished, tmp_path):
    report = make_report(3)
    report["blocks"][1]["linears"][0]["warnings"] = ["odd"]
    shown = finished(tmp_path / "out", report, "--json")
    assert shown.exit_code == 0, shown.exception
    found = json.loads(shown.stdout)
    assert found["out"] == str(tmp_path / "out") and found["after_bytes"] == 3 * 2**20
    assert found["before_bytes"] > found["after_bytes"]
    assert found["snr_db"] == pytest.approx(final_snr_db(report))
    assert found["seconds"] == stage_seconds(make_timing(3))
    assert found["num_warnings"] == len(all_warnings(report))
    assert "warning: blocks.1.self_attn.qkv: odd" in shown.stderr
    assert (tmp_path / "out/report.png").is_file()


def test_people_get_plan_table_warnings_times_and_what_to_do_next(finished, tmp_path):
    report = make_report(14)
    for index, block in enumerate(report["blocks"]):
        block["linears"][0]["warnings"] = [f"fault {index}"]
        block["linears"][0]["snr_db"]["final"] = 15 + index / 10
    shown = finished(tmp_path / "out", report)
    assert "sint4 g64" in shown.stderr and "sint4 g64" not in shown.stdout
    for cell in summary_rows(report, make_timing(14))[6]:
        assert cell in shown.stdout.split()
    lines = shown.stdout.splitlines()
    warned = [line for line in lines if line.startswith("warning: ")]
    assert len(warned) == 10 and warned[0].endswith("blocks.0.self_attn.qkv: fault 0")
    hidden = len(all_warnings(report)) - 10
    after = lines[lines.index(warned[-1]) + 1 :]
    assert after[0] == f"and {hidden} more in {tmp_path}/out/report.json"
    assert after[1] == "time: recording 4.5 s, inputs 7.0 s, linears 392.0 s"
    assert after[-1].startswith("next: varc calibrate-kv ")


def test_a_missing_matplotlib_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = finished(tmp_path / "out", make_report(2))
    assert "no plot: pip install 'var-compressor[plots]'" in shown.stdout
    assert shown.exit_code == 0 and not (tmp_path / "out/report.png").exists()


def test_a_run_that_quantized_no_linear_has_no_table(finished, tmp_path):
    shown = finished(tmp_path / "out", {"blocks": [{"linears": []}]}, "--json")
    found = json.loads(shown.stdout)
    assert found["snr_db"] is None and found["num_warnings"] == 0
