"""Quantizing a whole model: it opens and draws, beats plain rounding, and survives being stopped.

Shapes: N output and K input channels, T tokens, H heads, D head channels.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tiny import COLLECTION, QUICK_SPEC, random_text
from var_compressor import artifact as artifact_module
from var_compressor.artifact import (
    KV_FILE,
    MANIFEST,
    ArtifactError,
    artifact_writer,
    put_kv,
    read_manifest,
    verify_files,
)
from var_compressor.compress import calibrate_cache, store_cache
from var_compressor.layers.kv_cache import PlainCache
from var_compressor.layers.kv_params import params_to_tensors
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.sampling import Sampling
from var_compressor.models.tensor_files import CheckpointError
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.activations import MemoryBounds
from var_compressor.quant.kv import calibrate_channels
from var_compressor.quant.kv_calibration import calibrate_kv
from var_compressor.quant.linear import LinearInputs, quantize_linear, snr_db
from var_compressor.quant.objectives import ProjectionOutput
from var_compressor.quant.ptq import quantize_model
from var_compressor.quant.report import TIMING_FILE
from var_compressor.recipe import CollectSpec, ModelSource, Recipe
from var_compressor.spec import (
    PRESETS,
    KVSpec,
    LowRankSpec,
    ModuleRule,
    SmoothSpec,
    WeightSpec,
)


def open_tiny(folder: Path) -> InfinityPipeline:
    return InfinityPipeline.from_pretrained(folder, dtype=torch.float32)


def quantize(model_dir: Path, out: Path, spec=QUICK_SPEC, collection=COLLECTION, **options):
    return quantize_model(
        open_tiny(model_dir), collection, spec, base=str(model_dir), out=out, **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the times, which no run repeats."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != TIMING_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- the result ----------------------------------------------------------------------------------


def test_an_artifact_opens_draws_and_stays_close(model_dir, artifact_dir):
    full, compressed = open_tiny(model_dir), open_tiny(artifact_dir)
    assert compressed.is_compressed and not full.is_compressed
    for block in compressed.transformer.blocks:
        kinds = {type(m) for m in block.modules() if "Linear" in type(m).__name__}
        assert kinds == {QuantizedLinear}
    run = full.generate(["a red cat"], seed=0, with_trace=True)
    wanted = full.teacher_logits(["a red cat"], run.trace.bits, cfg=1)
    got = compressed.teacher_logits(["a red cat"], run.trace.bits, cfg=1)
    assert min(snr_db(a, b) for a, b in zip(wanted, got, strict=True)) > 10
    images = [compressed.generate(["a red cat"], seed=0).image_B3YX for _ in range(2)]
    assert torch.equal(*images) and images[0].std() > 0.01


def test_what_is_not_quantized_is_unchanged(model_dir, artifact_dir):
    full = open_tiny(model_dir).transformer.state_dict()
    compressed = open_tiny(artifact_dir).transformer.state_dict()
    linears = {name.rsplit(".", 1)[0] for name in compressed if name.endswith(".qweight")}
    kept = {name for name in full if name.rsplit(".", 1)[0] not in linears}
    assert len(linears) == 21 and kept
    assert all(torch.equal(full[name], compressed[name]) for name in kept)
    for name in linears:
        is_shifted = name.endswith("ffn.fc2")
        assert torch.equal(full[f"{name}.bias"], compressed[f"{name}.bias"]) != is_shifted


def test_the_report_says_what_the_tensors_do(model_dir, artifact_dir):
    """The reported gain over plain rounding is there, and no linear lost by it."""
    report = json.loads((artifact_dir / "report.json").read_text())
    assert [len(block["linears"]) for block in report["blocks"]] == [7, 7, 7]
    for block in report["blocks"]:
        for linear in block["linears"]:
            assert linear["snr_db"]["final"] >= linear["snr_db"]["nearest"], linear


def quantize_alone(linear, spec, x_TK):
    """A linear by itself, judged by its own output."""
    return quantize_linear(
        "x",
        linear,
        spec,
        LinearInputs(x_TK, *x_TK.aminmax(dim=0)),
        ProjectionOutput(x_TK, linear.weight),
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize("preset", ["svdquant", "gptq", "w4a16", "w4a8", "w8a8"])
def test_svdquant_beats_rounding_on_outliers(preset):
    """Correlated inputs with a few strong channels, where plain rounding loses everything else."""
    rng = torch.Generator().manual_seed(0)
    N, K, T = 96, 128, 300
    x_TK = torch.randn(T, 16, generator=rng) @ torch.randn(16, K, generator=rng)
    x_TK += torch.randn(T, K, generator=rng)
    x_TK[:, ::40] *= 50
    linear = nn.Linear(K, N).requires_grad_(False)
    linear.weight.data = torch.randn(N, K, generator=rng) / K**0.5
    linear.weight.data += torch.randn(N, 4, generator=rng) @ torch.randn(4, K, generator=rng) / 8
    linear.bias.data = torch.randn(N, generator=rng)
    spec = replace(
        PRESETS[preset].for_module("ffn.fc1"),
        low_rank=LowRankSpec(rank=16, max_iters=5),
        smooth=SmoothSpec(num_grids=6),
    )
    with torch.inference_mode():
        quantized, report = quantize_alone(linear, spec, x_TK)
    gain = {"svdquant": 4, "gptq": 4, "w4a16": 4, "w4a8": 4, "w8a8": 3}[preset]
    assert report.snr_db["final"] >= report.snr_db["nearest"] + gain
    # the report is about the module's own output, float64 here
    wanted = x_TK.double() @ linear.weight.double().T
    got = quantized(x_TK).double() - linear.bias.double()
    measured = 10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum())
    assert report.snr_db["final"] == pytest.approx(float(measured), abs=1e-2)


@torch.inference_mode()
@pytest.mark.parametrize("rank", [0, 8])
def test_no_way_of_rounding_ends_above_plain_rounding(rank):
    """On the same calibration: a range search and GPTQ, row by row, then the refitted branch."""
    rng = torch.Generator().manual_seed(4)
    x_TK = torch.randn(400, 8, generator=rng) @ torch.randn(8, 128, generator=rng)
    x_TK += torch.randn(400, 128, generator=rng)
    x_TK[:, 5] *= 40
    linear = nn.Linear(128, 64).requires_grad_(False)
    errors = {}
    for rounding, range_search in (("rtn", False), ("rtn", True), ("gptq", False), ("gptq", True)):
        spec = replace(
            PRESETS["svdquant"].for_module("ffn.fc1"),
            weight=WeightSpec(rounding=rounding, range_search=range_search),
            low_rank=LowRankSpec(rank=rank, max_iters=3),
            smooth=SmoothSpec(num_grids=4),
        )
        quantized, _ = quantize_alone(linear, spec, x_TK)
        lost_TN = quantized(x_TK) - linear(x_TK)
        errors[rounding, range_search] = float(lost_TN.double().square().sum())
    assert errors["rtn", True] <= 1.001 * errors["rtn", False]
    assert errors["gptq", False] <= errors["rtn", False]
    assert errors["gptq", True] <= errors["rtn", True]


def test_a_linear_whose_input_is_zero_is_reported_in_json():
    linear = nn.Linear(64, 64)
    with torch.inference_mode():
        quantized, report = quantize_alone(
            linear, QUICK_SPEC.for_module("ffn.fc1"), torch.zeros(5, 64)
        )
    json.dumps(vars(report), allow_nan=False)
    assert report.snr_db["final"] == 200
    assert torch.allclose(quantized(torch.zeros(2, 64)), linear.bias.expand(2, -1))


def test_exceptions_reach_single_blocks_and_a_block_may_be_left_alone(model_dir, tmp_path):
    rules = (ModuleRule("blocks.0.*", weight=None), ModuleRule("blocks.2.ffn.fc2", weight=None))
    quantize(model_dir, tmp_path / "out", replace(QUICK_SPEC, exceptions=rules))
    opened = open_tiny(tmp_path / "out")
    names = {
        name
        for name, module in opened.transformer.blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert names == {
        *(f"0.{name}" for name in ("self_attn.qkv", "self_attn.proj", "ffn.fc1", "ffn.fc2")),
        *(f"0.cross_attn.{name}" for name in ("q", "kv", "proj")),
        "2.ffn.fc2",
    }
    opened.generate(random_text((3,)), seed=0)


def test_bf16_blocks_quantize_too(model_dir, tmp_path):
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.bfloat16)
    quantize_model(pipeline, COLLECTION, QUICK_SPEC, base=str(model_dir), out=tmp_path / "out")
    opened = InfinityPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    text = random_text((4,))
    run = pipeline.generate(text, seed=0, with_trace=True)
    wanted, got = (p.teacher_logits(text, run.trace.bits, cfg=1) for p in (pipeline, opened))
    assert min(snr_db(a, b) for a, b in zip(wanted, got, strict=True)) > 10


# --- refusing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(QUICK_SPEC, low_rank=LowRankSpec(rank=65)), "rank 65 does not fit a weight of"),
        (
            replace(
                QUICK_SPEC,
                weight=WeightSpec("sint4", 48),
                act=replace(QUICK_SPEC.act, group_size=48),
            ),
            "self_attn.qkv: 64 input channels do not split into groups of 48",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn_or_written(
    model_dir, tmp_path, spec, message
):
    def on_progress(*step):
        raise AssertionError("it began")

    with pytest.raises(ValueError, match=message):
        quantize(model_dir, tmp_path / "out", spec, on_progress=on_progress)
    assert not (tmp_path / "out").exists()


def test_a_compressed_pipeline_is_not_quantized_again(artifact_dir, tmp_path):
    pipeline = open_tiny(artifact_dir)
    with pytest.raises(ValueError, match="is compressed already"):
        quantize_model(pipeline, COLLECTION, QUICK_SPEC, base="x", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_occupied_directories_are_refused_and_left_as_they_are(model_dir, artifact_dir, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / ".notes.tmp").write_text("mine")
    a_file = tmp_path / "file"
    a_file.write_text("mine")
    for out, message in (
        (artifact_dir, "holds a finished artifact"),
        (foreign, "holds other files"),
        (model_dir, "holds other files"),
        (a_file, "is a file"),
    ):
        before = contents(out)
        with pytest.raises(ArtifactError, match=message):
            quantize(model_dir, out)
        assert contents(out) == before
    assert a_file.read_text() == "mine"


# --- being stopped -------------------------------------------------------------------------------

# every child continues in the same directory and is killed at a later write: before its rename,
# with the temporary file on the disk
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import torch
from pathlib import Path
from test_ptq import quantize
# once, for all children
from transformers import AutoTokenizer, T5EncoderModel

def run(kill_at):
    replaced, replace = [], os.replace
    def counted(source, target):
        replaced.append(target)
        if len(replaced) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = counted
    quantize(Path(sys.argv[1]), Path(sys.argv[2]))

statuses = []
for kill_at in (1, 2, 4, 1, 3, 1):
    child = os.fork()
    if child == 0:
        run(kill_at)
        os._exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(statuses)
"""


def test_a_run_that_is_killed_again_and_again_gives_the_same_bytes(
    model_dir, artifact_dir, tmp_path
):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(model_dir), str(out), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"{[-signal.SIGKILL] * 6}\n", done.stderr
    assert list(out.rglob(".*.tmp")), "it was not killed while writing"
    with pytest.raises(ArtifactError, match="was cut off; repeat"):
        open_tiny(out)
    quantize(model_dir, out)
    assert contents(out) == contents(artifact_dir)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_ctrl_c_or_a_full_disk_can_be_continued(
    model_dir, artifact_dir, tmp_path, monkeypatch, stop
):
    out, fsync, calls = tmp_path / "out", os.fsync, []

    def failing(descriptor):
        calls.append(descriptor)
        # two a file: resume, trace, then times, report and tensors of a block; in the second block
        if len(calls) == 13:
            raise stop
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(artifact_module.os, "fsync", failing)
        with pytest.raises(stop if isinstance(stop, type) else OSError):
            quantize(model_dir, out)
    names = set(contents(out))
    assert "resume.json" in names and "blocks/000.safetensors" in names
    assert not [name for name in names if name.endswith(".tmp")]
    steps = []
    quantize(model_dir, out, on_progress=lambda *step: steps.append(step))
    assert contents(out) == contents(artifact_dir)
    assert steps[-1] == ("quantizing", 21, 21)


def test_finished_blocks_are_not_made_again(model_dir, tmp_path, monkeypatch):
    out, made = tmp_path / "out", []

    def stop_after_two(stage, done, total):
        if (stage, done) == ("quantizing", 15):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model_dir, out, on_progress=stop_after_two)
    before = {name: (out / name).stat().st_mtime_ns for name in contents(out)}
    from var_compressor.quant import ptq

    inner = ptq.quantize_linear
    monkeypatch.setattr(ptq, "quantize_linear", lambda *a, **k: made.append(1) or inner(*a, **k))
    monkeypatch.setattr(ptq, "record", None)
    quantize(model_dir, out)
    assert len(made) == 7
    for name in ("blocks/000.safetensors", "blocks/001.safetensors"):
        assert (out / name).stat().st_mtime_ns == before[name]


@pytest.mark.parametrize("stop_after", [3, 7, 10, 14])
def test_behind_quantized_blocks_a_run_goes_on_the_same(model_dir, tmp_path, stop_after):
    """Inputs that come from finished blocks come from the artifact after an interruption."""
    calibration = replace(QUICK_SPEC.calibration, prefix="quantized")
    spec = replace(QUICK_SPEC, calibration=calibration)

    def stop(stage, done, total):
        if (stage, done) == ("quantizing", stop_after):
            raise KeyboardInterrupt

    quantize(model_dir, tmp_path / "whole", spec)
    with pytest.raises(KeyboardInterrupt):
        quantize(model_dir, tmp_path / "twice", spec, on_progress=stop)
    quantize(model_dir, tmp_path / "twice", spec)
    assert contents(tmp_path / "whole") == contents(tmp_path / "twice")


@pytest.mark.parametrize(
    "memory", [MemoryBounds(), MemoryBounds(ram_bytes=0), MemoryBounds(ram_bytes=300_000)]
)
def test_blocks_read_one_by_one_and_activations_on_disk_change_nothing(
    model_dir, artifact_dir, tmp_path, memory
):
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32, stream_blocks=True)
    assert not isinstance(pipeline.transformer.blocks, nn.ModuleList)
    quantize_model(
        pipeline, COLLECTION, QUICK_SPEC, base=str(model_dir), out=tmp_path / "out", memory=memory
    )
    assert contents(tmp_path / "out") == contents(artifact_dir)


def test_quantized_prefixes_change_what_is_calibrated_on(model_dir, artifact_dir, tmp_path):
    """The first block's inputs are the same, the next ones' are not."""
    calibration = replace(QUICK_SPEC.calibration, prefix="quantized")
    quantize(model_dir, tmp_path / "out", replace(QUICK_SPEC, calibration=calibration))
    ours, theirs = contents(tmp_path / "out"), contents(artifact_dir)
    assert ours["blocks/000.safetensors"] == theirs["blocks/000.safetensors"]
    assert ours["blocks/001.safetensors"] != theirs["blocks/001.safetensors"]


@pytest.fixture
def begun(model_dir, tmp_path) -> Path:
    """An artifact whose run was interrupted before its first block."""

    def interrupt(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model_dir, tmp_path / "begun", on_progress=interrupt)
    return tmp_path / "begun"


def test_another_run_does_not_continue_and_says_what_differs(model_dir, begun, tmp_path):
    cooler = replace(COLLECTION, sampling=Sampling(cfg=2.0, tau=0.5))
    other_prompts = replace(COLLECTION, prompts={"0": "a red cat", "1": "a cat!"})
    for spec, collection, key in (
        (replace(QUICK_SPEC, low_rank=LowRankSpec(rank=9, max_iters=2)), COLLECTION, "spec.low_ra"),
        (replace(QUICK_SPEC, kv=KVSpec("bf16")), COLLECTION, "spec.kv.format"),
        (QUICK_SPEC, replace(COLLECTION, seed=4), "calibration.seed = 3, now it is 4"),
        (QUICK_SPEC, replace(COLLECTION, aspect_ratio=0.5), "calibration.aspect_ratio"),
        (QUICK_SPEC, other_prompts, "calibration.prompts_sha256"),
        (QUICK_SPEC, cooler, "calibration.sampling.tau = 0.7, now it is 0.5"),
    ):
        before = contents(begun)
        with pytest.raises(ArtifactError, match=f"was begun with {key}"):
            quantize(model_dir, begun, spec, collection)
        assert contents(begun) == before
    bf16 = InfinityPipeline.from_pretrained(model_dir, dtype=torch.bfloat16)
    with pytest.raises(
        ArtifactError, match=r'calibration\.dtype = "float32", now it is "bfloat16"'
    ):
        quantize_model(bf16, COLLECTION, QUICK_SPEC, base=str(model_dir), out=begun)


def test_a_changed_base_model_does_not_continue(model_dir, begun, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(model_dir, copied)
    resume = json.loads((begun / "resume.json").read_text())
    resume["base"]["source"] = str(copied)
    (begun / "resume.json").write_text(json.dumps(resume))
    weights = copied / "transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"was begun with base\.transformer"):
        quantize(copied, begun)


def test_a_second_process_is_refused_while_the_first_writes(model_dir, begun):
    identity = json.loads((begun / "resume.json").read_text())
    with (
        artifact_writer(begun, identity),
        pytest.raises(CheckpointError, match="another process is writing it"),
    ):
        quantize(model_dir, begun)
    quantize(model_dir, begun)
    verify_files(begun, read_manifest(begun))


def test_a_damaged_resume_file_is_named(model_dir, begun):
    for content in (b"{", b"[]", b"\xff\xfe"):
        (begun / "resume.json").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"resume\.json: unreadable; delete the directory"):
            quantize(model_dir, begun)


# --- the KV cache --------------------------------------------------------------------------------


class Collector(PlainCache):
    """What a real generation puts into its cache, per layer."""

    def attend_level(self, layer, level, q, k, v):
        if not level.is_last:
            self.kept.setdefault(layer, []).append((k.clone(), v.clone()))
        return super().attend_level(layer, level, q, k, v)


def test_kv_parameters_equal_those_of_real_generations(artifact_dir, monkeypatch):
    pipeline = open_tiny(artifact_dir)
    found = calibrate_kv(pipeline, COLLECTION, KVSpec(weighting="none"))
    kept = {}
    model = pipeline.transformer

    def new_cache(schedule, *, rows):
        cache = Collector(model.config, schedule, rows=rows, dtype=torch.float32, device="cpu")
        cache.kept = kept
        return cache

    monkeypatch.setattr(pipeline, "new_cache", new_cache)
    for i, prompt in enumerate(COLLECTION.prompts.values()):
        pipeline.generate([prompt], seed=COLLECTION.seed + i, sampling=COLLECTION.sampling)
    schedule = pipeline.schedule_for(1.0, None)
    for layer, ranges in enumerate(one.ranges for one in found.params.layers):
        reports = found.kv["layers"][layer]
        assert reports["num_tokens"] == 2 * 2 * schedule.num_cached_tokens
        for j, (scale_HD, zero_HD) in enumerate(
            (
                (ranges.k_scale_HD, ranges.k_zero_point_HD),
                (ranges.v_scale_HD, ranges.v_zero_point_HD),
            )
        ):
            x_HTD = torch.cat([pair[j].transpose(0, 1).flatten(1, 2) for pair in kept[layer]], 1)
            # both guidance rows of both prompts, all levels but the last
            assert x_HTD.shape[1] == 2 * 2 * schedule.num_cached_tokens
            wanted = calibrate_channels(x_HTD, nbits=8)
            torch.testing.assert_close(scale_HD, wanted.scale_HD, rtol=1e-3, atol=0)
            assert (zero_HD - wanted.zero_point_HD).abs().max() <= 1
            codes = (x_HTD / scale_HD[:, None] + zero_HD[:, None]).round().clamp(-128, 127)
            back = (codes - zero_HD[:, None]) * scale_HD[:, None]
            report = reports["kv"[j]]
            assert snr_db(x_HTD, back) == pytest.approx(report["snr_db"], abs=0.02)
            assert report["snr_db"] > 30
            mse_HD = (x_HTD - back).square().mean(1)
            torch.testing.assert_close(found.mse_HD[layer]["kv"[j]], mse_HD, rtol=1e-3, atol=0)
            range_HD = x_HTD.amax(1) - x_HTD.amin(1)
            skewness_HD = (
                ((x_HTD - x_HTD.mean(1, keepdim=True)) / x_HTD.std(1, keepdim=True)).pow(3).mean(1)
            )
            told = [report[name] for name in ("range_cv_channels", "skewness_max", "mse")]
            wanted = (range_HD.std() / range_HD.mean(), skewness_HD.abs().max(), mse_HD.mean())
            assert told == pytest.approx([float(x) for x in wanted], rel=1e-2)
            inside = (codes > -128) & (codes < 127)
            assert min(report["kept_share"]) >= float(inside.float().mean(1).min())


def test_a_cache_in_int8_draws_nearly_the_same(artifact_dir, kv_artifact_dir):
    plain, int8 = open_tiny(artifact_dir), open_tiny(kv_artifact_dir)
    prompts = ["a red cat", "cat"]
    run = plain.generate(prompts, seed=0, with_trace=True)
    wanted, got = (p.teacher_logits(prompts, run.trace.bits, cfg=1) for p in (plain, int8))
    assert min(snr_db(a, b) for a, b in zip(wanted, got, strict=True)) > 20
    assert 4 * int8.generate(prompts, seed=0).kv_bytes == run.kv_bytes


def recipe_for(model_dir: Path, tmp_path: Path) -> Recipe:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na cat\n")
    collect = CollectSpec(prompts=str(prompts), num_prompts=2, seed=3, cfg=2.0, tau=0.7, top_k=0)
    return Recipe(ModelSource(path=str(model_dir), dtype="float32", device="cpu"), collect)


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_calibrating_twice_and_being_killed_in_between(
    model_dir, artifact_dir, tmp_path, monkeypatch, kill_at
):
    """At every write the artifact stays one that opens, and the next run completes it."""
    out, recipe = tmp_path / "artifact", recipe_for(model_dir, tmp_path)
    shutil.copytree(artifact_dir, out)

    def calibrate(recipe):
        store_cache(calibrate_cache(recipe, out, on_progress=lambda *step: None), out, None)
        return read_manifest(out)

    first = calibrate(recipe)
    after_first = contents(out)
    other = replace(recipe, collect=replace(recipe.collect, seed=9))
    replaced, do_replace = [], os.replace

    def killed(source, target):
        replaced.append(Path(target).name)
        if len(replaced) == kill_at:
            # what a kill leaves: nothing is cleaned up
            raise SystemExit
        do_replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(artifact_module.os, "replace", killed)
        patched.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        with pytest.raises(SystemExit):
            calibrate(other)
    assert replaced == [MANIFEST, KV_FILE, MANIFEST][:kill_at]
    assert list(out.glob(".*.tmp"))
    expected_kv = first.kv if kill_at == 1 else None
    assert read_manifest(out).kv == expected_kv
    opened = open_tiny(out)
    assert (opened.kv_params is not None) == (kill_at == 1)

    second = calibrate(other)
    assert second.kv["calibration"]["seed"] == 9
    assert contents(out).keys() == after_first.keys()
    assert contents(out)[KV_FILE] != after_first[KV_FILE]
    assert open_tiny(out).kv_params is not None
    if kill_at == 3:
        assert calibrate(recipe) == first and contents(out) == after_first


def test_kv_params_of_the_recipe_mode_are_used(artifact_dir):
    pipeline = open_tiny(artifact_dir)
    found = [
        params_to_tensors(calibrate_kv(pipeline, COLLECTION, KVSpec(mode=mode)).params)
        for mode in ("per_channel", "shared_percentile")
    ]
    zero_points = found[1]["000.k_zero_point_HD"]
    # the original's search confines zero points to the codes
    assert zero_points.min() >= -128 and zero_points.max() <= 127
    assert not torch.equal(found[0]["000.k_scale_HD"], found[1]["000.k_scale_HD"])


def test_kv_of_another_model_is_refused_on_opening(kv_artifact_dir, tmp_path):
    out = tmp_path / "artifact"
    shutil.copytree(kv_artifact_dir, out)
    tensors, kv = artifact_module.read_tensors(out / KV_FILE, "cpu"), read_manifest(out).kv
    put_kv(out, {n: t for n, t in tensors.items() if n != "002.k_scale_HD"}, kv)
    with pytest.raises(ValueError, match=r"kv_cache\.safetensors: layer 2 k_scale_HD is nothing"):
        open_tiny(out)
    layers = copy.deepcopy(kv["layers"])
    layers[1]["block"] = layers[0]["block"]
    put_kv(out, tensors, {**kv, "layers": layers})
    with pytest.raises(ValueError, match="layer 1 is of another model than the one that the rang"):
        open_tiny(out)
    put_kv(out, tensors, {**kv, "format": {**kv["format"], "name": "int4"}})
    with pytest.raises(ValueError, match=r"layer 0 nbits_H holds \[8\], int4 has 4"):
        open_tiny(out)
    put_kv(out, tensors, {**kv, "format": {**kv["format"], "name": "int3"}})
    with pytest.raises(
        ValueError, match=r"kv\.format\.name is 'int3', this program reads fp8, int8"
    ):
        open_tiny(out)
