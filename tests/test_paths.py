"""Measuring compute paths: every path runs as asked, and the fastest ends up in the table."""

import time
from types import SimpleNamespace

import pytest
import torch

from kernels import DEVICE

pytest.importorskip("triton")

from interpreter import true_bf16  # noqa: F401
from var_compressor.bench import paths
from var_compressor.layers.compute import CANDIDATES
from var_compressor.models.config import MODELS


def test_the_table_holds_what_was_timed(monkeypatch):
    asked = []

    def time_ms(linears, x_MK, path):
        """One call, in place of graphs; w4a4 wins for 2 tokens, w4a8 for 72."""
        assert len(linears) == 2 and linears[0] is not linears[1]
        asked.append((len(x_MK), path, linears[0](x_MK).shape))
        return abs(CANDIDATES.index(path) - (2 if len(x_MK) == 2 else 1)) + 1.0

    if DEVICE == "cpu":
        gpu = SimpleNamespace(major=8, minor=0, multi_processor_count=4)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        monkeypatch.setattr(paths, "_time_ms", time_ms)
    monkeypatch.setattr(paths, "TOKENS", (2, 72))
    monkeypatch.setattr(paths, "_MOST_SETS", 2)
    steps = []
    started = time.perf_counter()
    table = paths.measure_paths(
        [(64, 128), (64, 128)], torch.device(DEVICE), lambda *step: steps.append(step)
    )
    assert steps == [("paths", 1, 2), ("paths", 2, 2)]
    ((shape, entries),) = table.measured.items()
    assert shape == (64, 128) and [tokens for tokens, _ in entries] == [2, 72]
    assert all(
        0 < ms < 1e3 * (time.perf_counter() - started) for _, e in entries for ms in e.values()
    )
    if DEVICE == "cpu":
        assert len(asked) == 6 and {shape for *_, shape in asked} == {(2, 64), (72, 64)}
        assert table.choose(2, 64, 128).path == "w4a4"
        assert table.choose(50, 64, 128).path == "w4a8"


def test_shapes_are_those_of_a_block():
    config = MODELS["infinity-2b"].transformer
    assert paths.linear_shapes(config) == ((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192))
