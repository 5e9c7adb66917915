"""Results come back as they were written, and what is no result is refused with one line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from var_compressor.evaluation.results import (
    TRUTH,
    BenchmarkResult,
    Change,
    Drawing,
    Failure,
    MetricResult,
    Results,
    ResultsError,
    Subject,
    read_results,
    read_rows,
    rows_name,
    write_results,
)
from var_compressor.evaluation.statistics import SizedFrechet

FID = MetricResult(
    20.5, 19.0, 22.0, 4, "Inception-v3", "truth", False, [SizedFrechet(2, 2, 30.0, 1.5)]
)
RESULTS = Results(
    subject=Subject("infinity-tiny", "out/a", "ab" * 32, "W4A4", True, False, True, 123, 45),
    drawing=Drawing(3, {"cfg": [1.0, 2.0]}, 1.0, "0.06M", "w4a4", ["w4a4"], "float32", "cpu", 1),
    machine={"name": "a box", "num_processes": 2},
    benchmarks={
        "a/b": BenchmarkResult(
            num_samples=4,
            subset_seed=0,
            prompts_sha256="cd" * 32,
            seconds_per_image=0.5,
            metrics={"fid": FID},
            reference={"fid": replace(FID, value=19.5, by_size=[])},
            changes={"fid": Change(1.0, 0.5, 1.5)},
            skipped={"lpips": "no weights"},
            failed=[Failure("7", "<script>", "empty")],
            notes=["a note"],
            images={"images": "gen/x"},
            ids=["1", "2", "3", "4"],
        )
    },
)
ROWS = {
    rows_name("a/b", "fid"): torch.randn(4, 3),
    rows_name("a/b", "fid", TRUTH): torch.randn(5, 3),
    rows_name("a/b", "psnr"): torch.randn(4, dtype=torch.float64),
}


def test_there_and_back(tmp_path):
    path = write_results(tmp_path / "out", RESULTS, ROWS)
    assert read_results(path) == read_results(tmp_path / "out") == RESULTS
    rows = read_rows(path)
    assert rows.keys() == ROWS.keys() == {"a/b/fid", "a/b/fid/truth", "a/b/psnr"}
    assert all(
        torch.equal(rows[name], ROWS[name]) and rows[name].dtype == ROWS[name].dtype
        for name in rows
    )
    assert json.loads(path.read_text())["format"] == "var-compressor-results/1"
    assert not list(path.parent.glob(".*"))


def test_without_rows(tmp_path):
    path = write_results(tmp_path, replace(RESULTS, benchmarks={}), {})
    assert read_rows(path) == {} and read_results(path).benchmarks == {}


def broken(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other/1"), "not of format"),
        (lambda c: c.update(extra=1), "extra"),
        (lambda c: c.pop("machine"), "machine"),
        (lambda c: c["subject"].pop("kv"), "kv is missing"),
        (lambda c: c["drawing"].update(more=1), "more is missing or foreign"),
        (lambda c: c.update(benchmarks=[]), "benchmarks is list"),
        (lambda c: c["benchmarks"]["a/b"].pop("ids"), "ids"),
        (lambda c: c["benchmarks"]["a/b"].update(metrics=3), "metrics is int"),
        (lambda c: c["benchmarks"]["a/b"]["metrics"]["fid"].pop("value"), "value"),
        (lambda c: c["benchmarks"]["a/b"]["metrics"]["fid"].update(by_size=3), "malformed"),
        (lambda c: c["benchmarks"]["a/b"]["changes"]["fid"].update(low="1"), "low is '1'"),
        (lambda c: c["benchmarks"]["a/b"].update(failed={}), "failed"),
        (lambda c: c["benchmarks"].update(x=None), "benchmark is NoneType"),
    ],
)
def test_malformed_results(tmp_path, change, message):
    path = write_results(tmp_path, RESULTS, ROWS)
    broken(path, change)
    with pytest.raises(ResultsError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b"{"])
def test_what_is_no_json_of_ours(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    for read in (read_results, read_rows):
        with pytest.raises(ResultsError, match=r"results\.json"):
            read(tmp_path)
    path.unlink()
    with pytest.raises(ResultsError, match="no such file; `varc evaluate` writes one"):
        read_results(path)


def test_rows_of_other_results(tmp_path):
    path = write_results(tmp_path, RESULTS, ROWS)
    rows = tmp_path / "rows.safetensors"
    rows.write_bytes(rows.read_bytes()[:-1] + b"x")
    with pytest.raises(ResultsError, match="is not the file of"):
        read_rows(path)
    rows.unlink()
    with pytest.raises(ResultsError, match=r"rows\.safetensors: missing"):
        read_rows(path)
