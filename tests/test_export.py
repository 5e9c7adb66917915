"""Artifacts in the original's files, and back: the same bytes, the same images."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from original import BLOCK, GOLDEN
from tiny import COLLECTION, QUICK_SPEC
from var_compressor.artifact import KV_FILE, TRANSFORMER_FILE, block_file, read_tensors
from var_compressor.cli import app
from var_compressor.interop.export_original import export_original
from var_compressor.interop.import_original import import_artifact, settings_of
from var_compressor.interop.kv_quant_calib import FILE as KV_PT
from var_compressor.interop.original import BRANCH, KEY_BIASES, MODEL, RECIPE, SCALE, SMOOTH
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.ptq import quantize_model
from var_compressor.quant.recording import Collection
from var_compressor.spec import (
    PRESETS,
    CalibrationSpec,
    LowRankSpec,
    ModuleRule,
    SmoothSpec,
    WeightSpec,
)


def there_and_back(artifact: Path, base: str, tmp_path: Path, **options) -> Path:
    exported, again = tmp_path / "exported", tmp_path / "again"
    export_original(artifact, exported, **{"dtype": torch.float32, **options})
    import_artifact(exported, base, again, settings_of(exported, []))
    return again


def assert_same(one: Path, other: Path, files: list[str]) -> None:
    for name in files:
        ours, theirs = read_tensors(one / name, "cpu"), read_tensors(other / name, "cpu")
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.dtype == theirs[key].dtype, key
            # as bytes: there are 8-bit floats
            a, b = (t.reshape(-1).contiguous().view(torch.uint8) for t in (tensor, theirs[key]))
            assert torch.equal(a, b), f"{name}: {key}"


def files_of(depth: int) -> list[str]:
    return [TRANSFORMER_FILE, *map(block_file, range(depth))]


def test_an_artifact_comes_back_byte_by_byte(kv_artifact_dir, model_dir, tmp_path):
    again = there_and_back(kv_artifact_dir, str(model_dir), tmp_path)
    assert_same(kv_artifact_dir, again, [*files_of(3), KV_FILE])


def quick(spec):
    return replace(
        spec,
        calibration=QUICK_SPEC.calibration,
        low_rank=replace(spec.low_rank, rank=min(8, spec.low_rank.rank), max_iters=1),
        smooth=replace(spec.smooth, num_grids=2),
    )


RULES = (
    ModuleRule("blocks.1.ffn.fc2", weight=None),
    ModuleRule("cross_attn.q", weight="sint8", act="sint8"),
    ModuleRule("ffn.fc1", low_rank=False, smooth=False),
)
SPECS = {
    "w8a8": PRESETS["w8a8"],
    "nvfp4": PRESETS["nvfp4"],
    "no smoothing": replace(PRESETS["svdquant"], smooth=SmoothSpec(enabled=False)),
    "no branch": replace(PRESETS["svdquant"], low_rank=LowRankSpec(rank=0)),
    "mixed": replace(PRESETS["svdquant"], exceptions=RULES),
    "groups of 32": replace(PRESETS["w4a16"], weight=WeightSpec(group_size=32)),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_recipe_comes_back(model_dir, tmp_path, name):
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    collection = replace(COLLECTION, prompts={"0": "a cat"})
    spec = quick(SPECS[name])
    quantize_model(pipeline, collection, spec, base=str(model_dir), out=tmp_path / "artifact")
    again = there_and_back(tmp_path / "artifact", str(model_dir), tmp_path)
    assert_same(tmp_path / "artifact", again, files_of(3))


def test_infinity_tiny_draws_the_same_image_bit_by_bit(tmp_path):
    """With biases of cross-attention's keys, which the original has no place for."""
    pipeline = InfinityPipeline.from_pretrained("infinity-tiny", dtype=torch.float32)
    collection = Collection({"0": "a large red metal cube."}, 0, Sampling(cfg=3.0))
    spec = replace(
        PRESETS["svdquant"],
        weight=WeightSpec(range_search=False),
        smooth=SmoothSpec(enabled=False),
        low_rank=LowRankSpec(rank=16, max_iters=1),
        calibration=CalibrationSpec(max_tokens_per_level=16, max_attention_tokens=200),
    )
    artifact = tmp_path / "artifact"
    quantize_model(pipeline, collection, spec, base="infinity-tiny", out=artifact)
    again = there_and_back(artifact, "infinity-tiny", tmp_path)
    images = [
        InfinityPipeline.from_pretrained(folder, dtype=torch.float32)
        .generate(["a small blue rubber ball."], seed=3)
        .image_B3YX
        for folder in (artifact, again)
    ]
    assert torch.equal(*images)
    assert (tmp_path / "exported" / KEY_BIASES).is_file()


def test_files_look_like_the_originals(artifact_dir, tmp_path):
    """The same names, dtypes and numbers of dimensions as it wrote for a block."""
    with tarfile.open(GOLDEN / "original_block_a.tar.xz") as archive:
        archive.extractall(tmp_path / "theirs", filter="data")
    export_original(artifact_dir, tmp_path / "ours", dtype=torch.float32)
    for name in (MODEL, SCALE, SMOOTH, BRANCH):
        ours, theirs = (
            described(torch.load(tmp_path / who / name, weights_only=True))
            for who in ("ours", "theirs")
        )
        assert ours == theirs


def described(content):
    return {
        key: {name: like(part) for name, part in value.items()}
        if isinstance(value, dict)
        else like(value)
        for key, value in content.items()
        if key.startswith(BLOCK)
    }


def like(tensor):
    return tensor.dtype, tensor.ndim, tensor.device.type


def test_what_the_original_computes_from_the_files(artifact_dir, model_dir, tmp_path):
    """Dequantized weight and joint branch give our linears' weights, cross-attention's too."""
    export_original(artifact_dir, tmp_path / "ours", dtype=torch.float32)
    model, smooth, branch = (
        torch.load(tmp_path / "ours" / name, weights_only=True) for name in (MODEL, SMOOTH, BRANCH)
    )
    block = InfinityPipeline.from_pretrained(artifact_dir, dtype=torch.float32).transformer.blocks
    for part, factors, joint, rows, ours, own in (
        ("ca.to_v", "ca.kv_smooth_scale", "ca.to_q", slice(128, 192), "cross_attn.kv", 64),
        ("ca.to_q", "ca.to_q", "ca.to_q", slice(0, 64), "cross_attn.q", 0),
        ("sa.to_k", "sa.to_q", "sa.to_q", slice(64, 128), "self_attn.qkv", 64),
        ("ffn.fc2", "ffn.fc2", "ffn.fc2", slice(0, 64), "ffn.fc2", 0),
    ):
        names = [f"{BLOCK}.{name}" for name in (part, factors, joint)]
        up_NR, down_RK = (branch[names[2]][f"{side}.weight"] for side in "ba")
        whole = model[f"{names[0]}.weight"] + up_NR[rows] @ down_RK
        linear = block[0].get_submodule(ours)
        wanted = linear.weight_on_inputs()[own : own + 64]
        assert torch.allclose((whole / smooth[names[1]]).double(), wanted, rtol=1e-4, atol=1e-6)
        if linear.shift:
            plain = linear.bias.double() + linear.shift * linear.weight_on_inputs().sum(-1)
            assert torch.allclose(model[f"{names[0]}.bias"].double(), plain, atol=1e-6)
    ranks = {tuple(one["a.weight"].shape[:1]) for one in branch.values()}
    assert ranks == {(16,)}, "one rank for all, as the original reads them"


def test_weights_in_bfloat16_keep_their_codes(artifact_dir, model_dir, tmp_path):
    again = there_and_back(artifact_dir, str(model_dir), tmp_path, dtype=torch.bfloat16)
    ours, theirs = (read_tensors(f / block_file(1), "cpu") for f in (artifact_dir, again))
    for key, tensor in ours.items():
        if key.endswith(("qweight", "wscales", "smooth_factor", "proj_up", "proj_down")):
            assert torch.equal(tensor, theirs[key]), key


def test_a_file_of_another_run_among_them_is_found(artifact_dir, model_dir, tmp_path):
    export_original(artifact_dir, tmp_path / "ours", dtype=torch.float32)
    path = tmp_path / "ours" / SCALE
    torch.save({k: v * 1.05 for k, v in torch.load(path, weights_only=True).items()}, path)
    with pytest.raises(ValueError, match=r"is not on the grid of its scales.*blocks 0-2"):
        settings = settings_of(tmp_path / "ours", [])
        import_artifact(tmp_path / "ours", str(model_dir), tmp_path / "again", settings)


def varc(*words: object) -> tuple[int, str]:
    """Exit code and output; errors as `varc` prints them."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, f"{result.output}{result.exception or ''}"


def test_the_commands(kv_artifact_dir, model_dir, tmp_path):
    code, text = varc(
        "export", kv_artifact_dir, "--to", "varcompressor", "--out", tmp_path / "pt", "--json"
    )
    assert code == 0
    told = json.loads(text)
    assert told["files"] == sorted((BRANCH, KV_PT, MODEL, RECIPE, SCALE, SMOOTH))
    code, text = varc(
        "import-artifact", tmp_path / "pt", "--base", model_dir, "--out", tmp_path / "again"
    )
    assert code == 0 and "ffn.fc1" in text and "with its KV cache" in text
    code, text = varc(
        "import-artifact", tmp_path / "pt", "--base", model_dir, "--out", tmp_path / "again"
    )
    assert code != 0 and "holds a finished artifact" in text
    code, text = varc("export", kv_artifact_dir, "--to", "varcompressor", "--out", tmp_path / "pt")
    assert code != 0 and "holds other files" in text
    code, text = varc("export", model_dir, "--to", "nunchaku", "--out", tmp_path / "n")
    assert code != 0 and "is it an artifact?" in text
    code, text = varc("import-artifact", tmp_path, "--base", model_dir, "--out", tmp_path / "x")
    assert code != 0 and "4 mismatches" in text and "branch.pt: no such file" in text
