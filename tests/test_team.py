"""Several processes that quantize one model: who does what, and that the result is the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_ptq import contents
from var_compressor.quant.team import Team, local_device


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 40])
def test_every_recording_is_somebodys(size):
    shares = [Team(rank, size).mine(16) for rank in range(size)]
    assert sorted(i for share in shares for i in share) == list(range(16))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_linears_of_a_block_are_shared_out_evenly():
    """In units of width^2: q/k/v 3, proj 1, cross q 1, k/v 2, proj 1, fc1 4, fc2 4."""
    costs = [3, 1, 1, 2, 1, 4, 4]
    for size, longest in ((1, 16), (2, 8), (4, 4), (9, 4)):
        owners = Team(0, size).owners(costs)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
        assert max(loads) == longest


@pytest.mark.parametrize("prefix", ["full", "quantized"])
def test_two_processes_make_the_same_bytes_as_one(model_dir, tmp_path, prefix):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na cat\ncat\n")
    words = [
        "recipes/svdquant/int4.yaml",
        f"model.path={model_dir}",
        "model.dtype=float32",
        f"collect.prompts={prompts}",
        "collect.num_prompts=3",
        "quant.low_rank.rank=8",
        "quant.low_rank.max_iters=2",
        "quant.smooth.num_grids=3",
        "quant.calibration.max_tokens_per_level=64",
        f"quant.calibration.prefix={prefix}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    together += ["--nproc-per-node", "2", "-m"]
    for name, launcher in (("one", [sys.executable, "-m"]), ("two", together)):
        command = [*launcher, "var_compressor.cli", "quantize", *words]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / name)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        assert done.returncode == 0, done.stderr
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    one, two = ({k: v for k, v in c.items() if k != "report.png"} for c in (one, two))
    assert one == two


def test_a_process_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert local_device(torch.device("cuda")) == torch.device("cuda", rank)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 2 .* there are 2; .* --nproc-per-node 2"):
        local_device(torch.device("cuda"))
    # what was asked for by number, and a CPU, are nobody's share
    assert local_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert local_device(torch.device("cpu")) == torch.device("cpu")
