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
from var_compressor.ops import primitives
from var_compressor.ops.primitives import QuantizedWeight
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

K, N, R = 192, 40, 4
WEIGHTS = {
    "sint4": WeightSpec("sint4", 64),
    "sint8": WeightSpec("sint8", -1),
    "fp8_e4m3": WeightSpec("fp8_e4m3", -1),
    "nvfp4": WeightSpec("nvfp4", 16),
}
INPUTS = {
    "16 bits": ActSpec(None, 64),
    "sint4": ActSpec("sint4", 64),
    "uint4": ActSpec("uint4", 64),
    "sint8": ActSpec("sint8", -1),
    "fp8_e4m3": ActSpec("fp8_e4m3", -1),
    "nvfp4": ActSpec("nvfp4", 16),
}
PAIRS = {f"{w} x {a}": (WEIGHTS[w], INPUTS[a]) for w in WEIGHTS for a in INPUTS}
GROUPINGS = {
    "W4A4 per row": (WeightSpec("sint4", -1), ActSpec("sint4", -1)),
    "W4 g64 A4 g16": (WeightSpec("sint4", 64), ActSpec("sint4", 16)),
    "W8 g32 A8": (WeightSpec("sint8", 32), ActSpec("sint8", -1)),
    "FP8 g64 x g32": (WeightSpec("fp8_e4m3", 64), ActSpec("fp8_e4m3", 32)),
}
FORMATS = PAIRS | GROUPINGS


def make_spec(name: str, rank: int = R) -> LinearSpec:
    return LinearSpec(*FORMATS[name], LowRankSpec(rank=rank), SmoothSpec())


def random_weight(spec: LinearSpec) -> QuantizedWeight:
    """Rounded normal values; a zero group, and one far below the rest of the matrix."""
    weight_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.05
    weight_NK[3, :64], weight_NK[4, :64] = 0, weight_NK[4, :64] * 1e-6
    return rounded(weight_NK, spec)


def rounded(weight_NK: torch.Tensor, spec: LinearSpec) -> QuantizedWeight:
    format = primitives.FORMATS[spec.weight.format]
    tensor_scale = primitives.choose_tensor_scale(weight_NK, format=format)
    scales_NG = primitives.choose_scales(
        weight_NK,
        format=format,
        group_size=resolved_group(spec.weight.group_size, weight_NK.shape[1]),
        scale_dtype=torch.bfloat16,
        tensor_scale=tensor_scale,
    )
    codes_NK = primitives.quantize_symmetric(weight_NK, scales_NG, format=format)
    return QuantizedWeight(codes_NK, scales_NG, format, tensor_scale)


def random_parts(rank: int, *, bias_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    return {
        "smooth_factor_K": torch.rand(K, generator=rng) * 3 + 0.3,
        "down_RK": (torch.randn(rank, K, generator=rng) * 0.1).bfloat16(),
        "up_NR": torch.randn(N, rank, generator=rng).bfloat16(),
        "bias_N": torch.randn(N, generator=rng).to(bias_dtype),
    }


def random_linear(
    spec: LinearSpec, *, bias_dtype: torch.dtype = torch.float32, **changes: torch.Tensor
) -> QuantizedLinear:
    parts = random_parts(spec.low_rank.rank, bias_dtype=bias_dtype) | changes
    return QuantizedLinear.of(spec, random_weight(spec), **parts)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()
# every value that a float code can stand for, in ascending order
GRIDS = {
    "fp8_e4m3": np.unique(E4M3[np.isfinite(E4M3)]),
    "nvfp4": np.unique([*E2M1, *-E2M1]),
}
RANGES = {
    "sint4": (-7, 7),
    "uint4": (0, 15),
    "sint8": (-127, 127),
    "fp8_e4m3": (-448, 448),
    "nvfp4": (-6, 6),
}


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The grid's nearest value; a midpoint goes to the larger one."""
    right = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    below = values - grid[right - 1] < grid[right] - values
    return np.where(below, grid[right - 1], grid[right])


def rounded_input(x_hat_MK: np.ndarray, act: ActSpec) -> np.ndarray:
    """Only the scale and the division are float32, as codes depend on them."""
    if act.format is None:
        return x_hat_MK.astype(np.float64)
    group = K if act.group_size == -1 else act.group_size
    grouped = x_hat_MK.reshape(len(x_hat_MK), -1, group)
    lowest, highest = RANGES[act.format]
    scales = np.abs(grouped).max(-1, keepdims=True) / np.float32(highest)
    if act.format == "nvfp4":
        scales = nearest(scales.astype(np.float64), GRIDS["fp8_e4m3"]).astype(np.float32)
    scales[scales == 0] = 1
    values = (grouped / scales).astype(np.float64)
    if act.format in GRIDS:
        codes = nearest(values, GRIDS[act.format])
    else:
        codes = np.clip(np.round(values), lowest, highest)
    return (codes * scales).reshape(x_hat_MK.shape)


def decoded_residual(linear: QuantizedLinear, format: str) -> np.ndarray:
    """float64 from the stored bytes; of a byte the low nibble is the even channel."""
    stored = linear.qweight
    wscales_NG = linear.wscales.double().numpy().copy()
    if format in ("sint4", "nvfp4"):
        byte = stored.numpy().astype(np.int64)
        nibbles = np.stack([byte & 15, byte >> 4], axis=-1).reshape(len(byte), -1)
        signed = np.where(nibbles > 7, nibbles - 16, nibbles)
        values = signed if format == "sint4" else np.array([*E2M1, *-E2M1])[nibbles]
    else:
        values = stored.double().numpy()
    if format == "nvfp4":
        wscales_NG *= linear.wtscale.double().numpy()
        wscales_NG[wscales_NG == 0] = 1
    return values * np.repeat(wscales_NG, K // wscales_NG.shape[1], 1)


def expected_output(linear: QuantizedLinear, x_MK: torch.Tensor, spec: LinearSpec) -> np.ndarray:
    """Both sides dequantized, everything summed in float64; only the codes are found in float32."""
    shift = np.float32(0.171875 if spec.act.format == "uint4" else 0)
    x_hat_MK = (x_MK.float().numpy() + shift) / linear.smooth_factor.numpy()
    residual_NK = decoded_residual(linear, spec.weight.format)
    branch_NK = linear.proj_up.double().numpy() @ linear.proj_down.double().numpy()
    y_MN = rounded_input(x_hat_MK, spec.act) @ residual_NK.T
    return y_MN + x_hat_MK.astype(np.float64) @ branch_NK.T + linear.bias.double().numpy()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rank", [0, R])
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


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours_or_on_strides(name):
    linear = random_linear(make_spec(name))
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(3))
    together = linear(x)
    # a product of other strides or another number of rows may sum in another order
    allowed = 1e-5 * together.abs().max()
    for strided in (x.T.contiguous().T, torch.stack((x, x), dim=1)[:, 0]):
        assert not strided.is_contiguous()
        assert (linear(strided) - together).abs().max() <= allowed
    x[1:] *= 1000
    assert (linear(x)[0] - together[0]).abs().max() <= allowed


@pytest.mark.parametrize("name", FORMATS)
def test_a_zero_input_gives_the_bias(name):
    """Unsigned inputs see the shift instead, rounded to a fifteenth of a group's largest value."""
    spec = make_spec(name)
    parts = random_parts(R, bias_dtype=torch.float32)
    linear = random_linear(spec)
    y_MN, bias_N = linear(torch.zeros(3, K)).double(), parts["bias_N"].double()
    if not spec.shift:
        assert torch.equal(y_MN, bias_N.expand(3, N))
        return
    step_K = spec.shift / parts["smooth_factor_K"].view(-1, 64).amin(1).repeat_interleave(64) / 15
    allowed_N = (linear.residual().abs() * step_K / 2).sum(-1) + 1e-5
    assert ((y_MN - bias_N).abs() <= allowed_N).all()


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_the_shift_cancels_exactly(weight, bias_dtype):
    """Inputs that unsigned codes hold without rounding: the result is that of no quantization."""
    spec = make_spec(f"{weight} x uint4")
    rng = torch.Generator().manual_seed(6)
    factors_K = 2.0 ** torch.randint(-3, 4, (K,), generator=rng)
    codes_MK = torch.randint(0, 16, (33, K), generator=rng)
    codes_MK[:, ::64] = 15
    steps_MG = 2.0 ** torch.randint(-5, 0, (33, K // 64), generator=rng)
    x_MK = codes_MK * steps_MG.repeat_interleave(64, dim=1) * factors_K - 0.171875
    assert x_MK.amin() == -0.171875

    linear = random_linear(spec, bias_dtype=bias_dtype, smooth_factor_K=factors_K)
    parts = random_parts(R, bias_dtype=bias_dtype)
    branch_NK = parts["up_NR"].double() @ parts["down_RK"].double()
    weight_NK = (random_weight(spec).dequantize().double() + branch_NK) / factors_K.double()
    wanted_MN = x_MK.double() @ weight_NK.T + parts["bias_N"].double()
    assert (linear(x_MK).double() - wanted_MN).abs().max() <= 2e-6 * wanted_MN.abs().max()


def test_smoothing_moves_ranges_and_changes_nothing_else():
    """With 16-bit inputs, dividing x and multiplying the weight's columns cancel exactly."""
    linear = random_linear(make_spec("sint4 x 16 bits"), smooth_factor_K=torch.ones(K))
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(4))
    plain = linear(x)
    factors = 2.0 ** torch.randint(-3, 4, (K,), generator=torch.Generator().manual_seed(5))
    linear.smooth_factor.copy_(factors)
    assert torch.equal(linear(x * factors), plain)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_was_rounded_and_survives_a_file(name, tmp_path):
    spec = make_spec(name)
    linear = random_linear(spec)
    assert torch.equal(linear.residual(), random_weight(spec).dequantize())
    save_file(linear.state_dict(), tmp_path / "linear.safetensors")
    loaded = load_file(tmp_path / "linear.safetensors")
    again = QuantizedLinear(K, N, spec, bias_dtype=torch.float32)
    assert again.state_dict().keys() == loaded.keys()
    for key, expected in again.state_dict().items():
        assert (loaded[key].dtype, loaded[key].shape) == (expected.dtype, expected.shape)
    again.load_state_dict(loaded, assign=True)
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(8))
    assert torch.equal(again(x), linear(x))


def test_scales_that_storage_would_change_are_refused():
    spec = make_spec("sint4 x sint4")
    weight = random_weight(spec)
    unrounded = replace(weight, scales_NG=weight.scales_NG * 1.001)
    with pytest.raises(AssertionError, match="scales changed in storage"):
        QuantizedLinear.of(spec, unrounded, **random_parts(R, bias_dtype=torch.float32))


@pytest.mark.parametrize(
    ("weight", "act"),
    [
        (WeightSpec("sint4", 64), ActSpec("sint4", 48)),
        (WeightSpec("sint8", 32), ActSpec("uint4", 48)),
    ],
)
def test_integer_groups_that_do_not_nest_are_named(weight, act):
    spec = LinearSpec(weight, act, LowRankSpec(), SmoothSpec())
    message = f"groups of {weight.group_size} and input groups of {act.group_size} do not nest"
    with pytest.raises(ValueError, match=message):
        check_runnable(spec)
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(K, N, spec, bias_dtype=torch.float32)
    # dequantized sides need not
    check_runnable(replace(spec, act=ActSpec("fp8_e4m3", 48)))


def test_every_preset_runs():
    for preset in PRESETS.values():
        for module in MODULES:
            check_runnable(preset.for_module(module))


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


@pytest.mark.parametrize("preset", ["w8a8", "fp8", "nvfp4", "svdquant"])
def test_every_format_is_loaded_as_stored_and_never_cast(artifact_dir, tmp_path, preset):
    spec = replace(PRESETS[preset], low_rank=LowRankSpec(rank=0))
    folder, pipeline = tmp_path / "artifact", tiny_pipeline()
    shutil.copytree(artifact_dir, folder)
    for index, block in enumerate(pipeline.transformer.blocks):
        for name, linear_spec in linear_specs(spec, block, index).items():
            linear = block.get_submodule(name)
            quantized = QuantizedLinear.of(
                linear_spec,
                rounded(linear.weight, linear_spec),
                smooth_factor_K=torch.ones(linear.in_features),
                down_RK=torch.empty(0, linear.in_features),
                up_NR=torch.empty(linear.out_features, 0),
                bias_N=linear.bias,
            )
            parent, attribute = name.rsplit(".", 1)
            setattr(block.get_submodule(parent), attribute, quantized)
        save_file(block.state_dict(), folder / block_file(index))
    manifest = replace(read_manifest(folder), spec=spec.to_dict())
    options = {"dtype": torch.float32, "device": "cpu"}
    loaded = load_compressed(folder, manifest, **options)
    for name, expected in pipeline.transformer.blocks.state_dict().items():
        found = loaded.blocks.state_dict()[name]
        assert found.dtype == expected.dtype
        # their bytes, because 8-bit floats can't be compared
        ours, theirs = (t.flatten().view(torch.uint8) for t in (found, expected))
        assert torch.equal(ours, theirs), name

    good = load_file(folder / block_file(0))
    eight_bits = [name for name, tensor in good.items() if tensor.itemsize == 1]
    assert {name.rsplit(".", 1)[1] for name in eight_bits} >= {"qweight"}
    for name in (eight_bits[0], eight_bits[-1]):
        save_file(good | {name: good[name].float()}, folder / block_file(0))
        message = rf"{name} is float .*, expected (u?int8|float8_e4m3fn)"
        with pytest.raises(ArtifactError, match=message):
            load_compressed(folder, manifest, **options)
