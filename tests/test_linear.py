"""Quantized linears against float64 on their codes, and loading them back.

Shapes: N output and K input channels, G groups, R rank of the branch, M tokens.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tiny import QUICK_SPEC, random_text, tiny_pipeline
from var_compressor.artifact import ArtifactError, block_file, read_manifest
from var_compressor.layers.linear import (
    QuantizedLinear,
    check_runnable,
    linear_specs,
    load_compressed,
    resolved_group,
    swap_linears,
)
from var_compressor.pipeline import InfinityPipeline
from var_compressor.spec import (
    MODULES,
    PRESETS,
    ActSpec,
    LinearSpec,
    LowRankSpec,
    ModuleRule,
    QuantSpec,
    SmoothSpec,
    WeightSpec,
)

K, N = 192, 40
FORMATS = {
    "W4A4 g64": (WeightSpec("sint4", 64), ActSpec("sint4", 64)),
    "W4A4 per row": (WeightSpec("sint4", -1), ActSpec("sint4", -1)),
    "W4A16": (WeightSpec("sint4", 64), ActSpec(None, 64)),
    "W4A8": (WeightSpec("sint4", 64), ActSpec("sint8", -1)),
    "W8A8": (WeightSpec("sint8", -1), ActSpec("sint8", -1)),
}


def make_spec(name: str, rank: int = 4) -> LinearSpec:
    return LinearSpec(*FORMATS[name], LowRankSpec(rank=rank), SmoothSpec())


def random_linear(
    spec: LinearSpec, *, bias_dtype: torch.dtype = torch.float32, smooth: bool = True
) -> QuantizedLinear:
    rng = torch.Generator().manual_seed(1)
    linear = QuantizedLinear(K, N, spec, bias_dtype=bias_dtype)
    state = linear.state_dict()
    rank = spec.low_rank.rank
    if spec.weight.format == "sint4":
        state["qweight"] = torch.randint(0, 256, (N, K // 2), generator=rng).to(torch.uint8)
    else:
        state["qweight"] = torch.randint(-127, 128, (N, K), generator=rng).to(torch.int8)
    state["wscales"] = torch.rand(state["wscales"].shape, generator=rng) * 0.02 + 0.01
    state["smooth_factor"] = torch.rand(K, generator=rng) * 3 + 0.3 if smooth else torch.ones(K)
    state["proj_down"] = torch.randn(rank, K, generator=rng) * 0.1
    state["proj_up"] = torch.randn(N, rank, generator=rng)
    state["bias"] = torch.randn(N, generator=rng)
    linear.load_state_dict(state)
    return linear


def signed_codes(qweight: torch.Tensor) -> np.ndarray:
    """int64 codes; of a byte the low nibble is the even channel, two's complement."""
    stored = qweight.numpy().astype(np.int64)
    if qweight.dtype == torch.int8:
        return stored
    nibbles = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)
    return np.where(nibbles > 7, nibbles - 16, nibbles)


def expected_output(linear: QuantizedLinear, x_MK: torch.Tensor, spec: LinearSpec) -> np.ndarray:
    """Both sides dequantized, everything summed in float64; only the codes are found in float32."""
    x_hat_MK = x_MK.float().numpy() / linear.smooth_factor.numpy()
    qmax = {"sint4": 7, "sint8": 127}
    if spec.act.format is None:
        qx_MK = x_hat_MK.astype(np.float64)
    else:
        group = K if spec.act.group_size == -1 else spec.act.group_size
        grouped = x_hat_MK.reshape(len(x_hat_MK), -1, group)
        scales = np.abs(grouped).max(-1, keepdims=True) / np.float32(qmax[spec.act.format])
        scales[scales == 0] = 1
        codes = np.round(grouped / scales)
        assert np.abs(codes).max() <= qmax[spec.act.format]
        qx_MK = (codes.astype(np.float64) * scales).reshape(x_hat_MK.shape)
    wscales_NG = linear.wscales.double().numpy()
    weight_NK = signed_codes(linear.qweight) * np.repeat(wscales_NG, K // wscales_NG.shape[1], 1)
    branch_NK = linear.proj_up.double().numpy() @ linear.proj_down.double().numpy()
    x64_MK = x_hat_MK.astype(np.float64)
    return qx_MK @ weight_NK.T + x64_MK @ branch_NK.T + linear.bias.double().numpy()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("shape", [(1,), (7,), (300,), (2, 3), (2, 1, 5)])
def test_the_output_equals_float64_on_the_codes(name, rank, shape):
    spec = make_spec(name, rank)
    linear = random_linear(spec)
    x = torch.randn(*shape, K, generator=torch.Generator().manual_seed(len(shape)))
    x[..., 5] *= 30
    x[..., :64] *= (torch.arange(shape[-1]) % 2)[:, None]  # some groups are zero throughout
    y = linear(x)
    wanted = expected_output(linear, x.flatten(0, -2), spec)
    assert y.shape == (*shape, N) and y.dtype == torch.float32
    error = np.abs(y.flatten(0, -2).double().numpy() - wanted).max()
    assert error <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("name", FORMATS)
def test_a_bf16_input_is_read_exactly_and_the_result_rounded_once(name):
    spec = make_spec(name)
    linear = random_linear(spec, bias_dtype=torch.bfloat16)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = linear(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear(x.float()).bfloat16())
    wanted = expected_output(linear, x, spec)
    assert np.abs(y.double().numpy() - wanted).max() <= 2**-8 * np.abs(wanted).max()


def test_a_row_does_not_depend_on_its_neighbours():
    for name in FORMATS:
        linear = random_linear(make_spec(name))
        x = torch.randn(6, K, generator=torch.Generator().manual_seed(3))
        together = linear(x)
        x[1:] *= 1000
        # a product with another number of rows may sum in another order
        assert (linear(x)[0] - together[0]).abs().max() <= 1e-5 * together[0].abs().max()


def test_smoothing_moves_ranges_and_changes_nothing_else():
    """With 16-bit inputs, dividing x and multiplying the weight's columns cancel exactly."""
    linear = random_linear(make_spec("W4A16"), smooth=False)
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(4))
    plain = linear(x)
    factors = 2.0 ** torch.randint(-3, 4, (K,), generator=torch.Generator().manual_seed(5))
    linear.smooth_factor.copy_(factors)
    assert torch.equal(linear(x * factors), plain)


@pytest.mark.parametrize(
    ("weight", "act", "message"),
    [
        (WeightSpec("nvfp4", 16), ActSpec("nvfp4", 16), "nvfp4 with input format nvfp4 has no op"),
        (WeightSpec("sint4", 64), ActSpec("uint4", 64), "sint4 with input format uint4 has no op"),
        (WeightSpec("sint8", -1), ActSpec(None, 64), "sint8 with input format 16 bits has no op"),
        (WeightSpec("fp8_e4m3", -1), ActSpec("fp8_e4m3", -1), "fp8_e4m3 with .* has no op"),
        (WeightSpec("sint8", 64), ActSpec("sint8", -1), "sint8 weights take one scale per row"),
        (WeightSpec("sint8", -1), ActSpec("sint8", 64), "sint8 weights take one scale per row"),
        (WeightSpec("sint4", 64), ActSpec("sint4", 32), "groups of 64 and input groups of 32"),
        (WeightSpec("sint4", 64), ActSpec("sint8", 64), "one scale per token"),
    ],
)
def test_formats_without_an_op_are_named_with_what_works(weight, act, message):
    spec = LinearSpec(weight, act, LowRankSpec(), SmoothSpec())
    with pytest.raises(ValueError, match=message) as caught:
        check_runnable(spec)
    if "no op" in message:
        assert "sint4 x sint4" in str(caught.value)
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(K, N, spec, bias_dtype=torch.float32)


def test_every_preset_but_nvfp4_runs():
    for name, preset in PRESETS.items():
        found = [preset.for_module(module) for module in MODULES]
        if name == "nvfp4":
            with pytest.raises(ValueError, match="has no op"):
                check_runnable(found[0])
            continue
        for spec in found:
            check_runnable(spec)


def test_channels_that_do_not_split_are_named():
    assert resolved_group(-1, 96) == 96
    with pytest.raises(ValueError, match="96 input channels do not split into groups of 64"):
        resolved_group(64, 96)


# --- putting them in place, and loading ----------------------------------------------------------


def test_a_rule_may_name_one_block():
    spec = replace(QuantSpec(), exceptions=(ModuleRule("blocks.1.ffn.fc2", weight=None),))
    blocks = tiny_pipeline().transformer.blocks
    for index, block in enumerate(blocks):
        found = linear_specs(spec, block, index)
        assert set(MODULES) - found.keys() == ({"ffn.fc2"} if index == 1 else set())
        swap_linears(block, found)
        assert isinstance(block.ffn.fc2, nn.Linear) == (index == 1)
        assert isinstance(block.ffn.fc1, QuantizedLinear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_artifact_equals_the_model_it_was_made_from(model_dir, artifact_dir, dtype):
    """The same tensors put into a deep copy of the full-precision model, block by block."""
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=dtype)
    in_memory = InfinityPipeline(copy.deepcopy(pipeline.transformer), pipeline.vae, None)
    for index, block in enumerate(in_memory.transformer.blocks):
        swap_linears(block, linear_specs(QUICK_SPEC, block, index))
        block.load_state_dict(load_file(artifact_dir / block_file(index)))
    loaded = InfinityPipeline.from_pretrained(artifact_dir, dtype=dtype)
    text = random_text((4, 7))
    run, again = (one.generate(text, seed=0, with_trace=True) for one in (in_memory, loaded))
    assert loaded.transformer.blocks[0].self_attn.qkv.qweight.dtype == torch.uint8
    for ours, theirs in zip(run.trace.logits, again.trace.logits, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(run.image_B3YX, again.image_B3YX)


@pytest.mark.parametrize("file", ["blocks/001.safetensors", "transformer.safetensors"])
def test_files_that_do_not_fit_are_named(artifact_dir, tmp_path, file):
    folder = tmp_path / "artifact"
    shutil.copytree(artifact_dir, folder)
    good = load_file(folder / file)
    name = "ffn.fc1.wscales" if file.startswith("blocks") else "head_proj.weight"
    for change, message in (
        ({name: None}, f"{name} is missing, expected float"),
        ({name: good[name][1:].clone()}, rf"{name} is float \[\d+, \d+\], expected float"),
        ({"foreign": torch.zeros(2)}, r"foreign is float \[2\], expected missing"),
        ({name: good[name].to(torch.int32)}, f"{name} is int32 .*, expected float"),
    ):
        tensors = {key: value for key, value in (good | change).items() if value is not None}
        save_file(tensors, folder / file)
        with pytest.raises(ArtifactError, match=f"{file}: {message}"):
            load_compressed(folder, read_manifest(folder), dtype=torch.float32, device="cpu")


def test_codes_are_never_cast(artifact_dir, tmp_path):
    folder = tmp_path / "artifact"
    shutil.copytree(artifact_dir, folder)
    file = folder / block_file(0)
    tensors = load_file(file)
    tensors["ffn.fc1.qweight"] = tensors["ffn.fc1.qweight"].float()
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=r"ffn\.fc1\.qweight is float .*, expected uint8"):
        load_compressed(folder, read_manifest(folder), dtype=torch.float32, device="cpu")
