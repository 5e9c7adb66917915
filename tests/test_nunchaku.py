"""nunchaku's packed tensors: byte by byte what its packer makes, and computed as ours are."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import fake_nunchaku
from original import VAE
from quant_golden import load_golden
from tiny import COLLECTION, make_t5
from var_compressor.interop.nunchaku import export_nunchaku
from var_compressor.layers.linear import QuantizedLinear, load_compressed
from var_compressor.layers.nunchaku_linear import (
    NunchakuError,
    NunchakuFeedForward,
    NunchakuLinear,
    pack_w4a4,
    use_nunchaku,
    w4a4_tensors,
)
from var_compressor.models.config import InfinityConfig
from var_compressor.models.directory import meta_transformer, meta_vae
from var_compressor.models.random_init import random_tensors
from var_compressor.models.sampling import Sampling
from var_compressor.models.text_encoder import TextEncoder
from var_compressor.ops import nunchaku_layout as layout
from var_compressor.ops.packing import unpack_codes
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.ptq import quantize_model
from var_compressor.spec import (
    GELU_SHIFT,
    PRESETS,
    CalibrationSpec,
    LowRankSpec,
    SmoothSpec,
)

CONFIG = InfinityConfig(
    depth=2,
    embed_dim=128,
    num_heads=2,
    num_chunks=2,
    bits_per_token=16,
    text_channels=128,
    text_maxlen=16,
    pixel_budget="0.06M",
)


def same_bytes(one, other):
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


# --- the layout ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shift"),
    [("int4_a", 0.0), ("int4_nonmult_b", 0.0), ("int4_shift_f", GELU_SHIFT), ("fp4_a", 0.0)],
)
def test_w4a4_is_packed_byte_by_byte(name, shift):
    golden = load_golden(f"nunchaku_pack_{name}")
    scales_NG = golden["scale"][:, 0, :, 0]
    if name == "fp4_a":
        scales_NG = golden["subscale"][:, 0, :, 0].to(torch.float8_e4m3fn)
    packed = w4a4_tensors(
        golden["codes"],
        scales_NG,
        smooth_K=golden["smooth_in"],
        branch=(golden["lora_down_in"], golden["lora_up_in"]),
        bias_N=golden["bias_in"],
        shift=shift,
        dtype=golden["bias_in"].dtype,
    )
    for ours, theirs in (
        ("qweight", "qweight"),
        ("wscales", "wscales"),
        ("bias", "bias"),
        ("smooth_factor", "smooth"),
        ("smooth_factor_orig", "smooth"),
        ("proj_down", "lora_down"),
        ("proj_up", "lora_up"),
    ):
        assert packed[ours].shape == golden[f"packed.{theirs}"].shape
        assert same_bytes(packed[ours], golden[f"packed.{theirs}"]), ours


def test_awq_is_packed_byte_by_byte():
    golden = load_golden("nunchaku_pack_awq_a")
    packed = layout.pack_awq_weight(golden["codes"])
    assert packed.dtype == torch.int32 and torch.equal(packed, golden["packed.qweight"])
    scales_GN, zeros_GN = layout.awq_scales(golden["scale"][:, 0, :, 0])
    # the packer rounds up to 16 groups with zeros; loaders allocate what there is
    for found, name in ((scales_GN, "wscales"), (zeros_GN, "wzeros")):
        wanted = golden[f"packed.{name}"]
        assert torch.equal(found, wanted[: len(found)]) and not wanted[len(found) :].any()


sizes = st.integers(1, 300)
seeds = st.integers(0, 2**31)


@settings(max_examples=40, deadline=None)
@given(N=sizes, K=sizes, R=st.integers(0, 40), seed=seeds)
def test_unpacking_is_the_exact_inverse(N, K, R, seed):
    draw = torch.Generator().manual_seed(seed)
    signed = torch.randint(-8, 8, (N, K), generator=draw, dtype=torch.int8)
    packed = layout.pack_weight(signed)
    rows, columns = layout.padded_size(N), layout.padded_size(K)
    assert packed.shape == (rows, columns // 2) and packed.dtype == torch.int8
    assert torch.equal(layout.unpack_weight(packed, shape=(N, K), signed=True), signed)
    raw = layout.unpack_weight(packed, shape=(rows, columns), signed=False)
    assert not raw[N:].any() and not raw[:, K:].any(), "what is filled up is 0"
    vector = torch.randn(N, generator=draw)
    assert torch.equal(layout.unpack_vector(layout.pack_vector(vector), size=N), vector)
    up, down = torch.randn(N, R, generator=draw), torch.randn(R, K, generator=draw)
    assert torch.equal(layout.unpack_up(layout.pack_up(up), shape=(N, R)), up)
    assert torch.equal(layout.unpack_down(layout.pack_down(down), shape=(R, K)), down)


@settings(max_examples=30, deadline=None)
@given(N=sizes, G=st.integers(1, 40), seed=seeds)
def test_unpacking_scales_is_the_exact_inverse(N, G, seed):
    draw = torch.Generator().manual_seed(seed)
    scales = torch.rand(N, G, generator=draw).bfloat16()
    packed = layout.pack_group_scales(scales)
    assert packed.shape == (G + G % 2, layout.padded_size(N))
    assert torch.equal(layout.unpack_group_scales(packed, shape=(N, G)), scales)
    micro = scales.to(torch.float8_e4m3fn)
    packed = layout.pack_micro_scales(micro)
    assert packed.dtype == micro.dtype and packed.numel() % (128 * 4) == 0
    assert same_bytes(layout.unpack_micro_scales(packed, shape=(N, G)), micro)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), groups=st.integers(1, 5), seed=seeds)
def test_unpacking_awq_is_the_exact_inverse(rows, groups, seed):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-7, 9, (4 * rows, 64 * groups), generator=draw, dtype=torch.int8)
    assert torch.equal(layout.unpack_awq_weight(layout.pack_awq_weight(codes)), codes)


def test_awq_says_what_it_cannot_pack():
    with pytest.raises(ValueError, match="4 rows and 64 channels"):
        layout.pack_awq_weight(torch.zeros(6, 64, dtype=torch.int8))
    with pytest.raises(ValueError, match="found -8"):
        layout.pack_awq_weight(torch.full((4, 64), -8, dtype=torch.int8))


# --- artifacts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose sizes are whole tiles."""
    folder = tmp_path_factory.mktemp("nunchaku")
    models = (meta_transformer(CONFIG, torch.float32), meta_vae(VAE, torch.float32))
    for model in models:
        model.load_state_dict(dict(random_tensors(model, seed=0)), assign=True)
    t5 = make_t5(folder / "t5")
    encoder = TextEncoder(t5, t5, max_length=16, dtype=torch.float32, device="cpu")
    InfinityPipeline(*models, encoder).save_pretrained(folder / "model")
    return folder / "model"


def artifact(base: Path, name: str) -> Path:
    out = base.with_name(name)
    if not out.exists():
        spec = PRESETS[name]
        # AWQ has neither branch nor factors
        rank = 0 if name == "w4a16" else 20
        spec = replace(
            spec,
            low_rank=LowRankSpec(rank=rank, max_iters=1),
            smooth=SmoothSpec(enabled=name != "w4a16", num_grids=2),
            calibration=CalibrationSpec(max_tokens_per_level=16, max_attention_tokens=200),
        )
        pipeline = InfinityPipeline.from_pretrained(base, dtype=torch.float32)
        collection = replace(COLLECTION, prompts={"0": "a red cat"})
        quantize_model(pipeline, collection, spec, base=str(base), out=out)
    return out


def linears_of(folder: Path, dtype: torch.dtype) -> dict[str, QuantizedLinear]:
    pipeline = InfinityPipeline.from_pretrained(folder, dtype=dtype)
    return {
        name: module
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, QuantizedLinear)
    }


@pytest.mark.parametrize(("preset", "precision"), [("svdquant", "int4"), ("nvfp4", "fp4")])
def test_an_export_holds_the_artifact(base, tmp_path, preset, precision):
    folder = artifact(base, preset)
    packed = export_nunchaku(folder, tmp_path / "out", dtype=torch.bfloat16, lite=False)
    assert packed.files == ("config.json", f"svdq-{precision}_r32.safetensors")
    assert packed.counts == {"int4" if preset == "svdquant" else "nvfp4": 12, "16 bits": 2}
    assert packed.why.keys() == {"cross_attn.kv"} and packed.snr_db > 45
    tensors = load_file(tmp_path / "out" / packed.files[1])
    for name, linear in linears_of(folder, torch.float32).items():
        if name.endswith("cross_attn.kv"):
            wanted = linear.weight_on_inputs()
            assert torch.allclose(tensors[f"{name}.weight"].double(), wanted, rtol=2**-8)
            continue
        codes = unpack_codes(linear.qweight, format=linear.weight_format)
        shape = tuple(codes.shape)
        signed = preset == "svdquant"
        found = layout.unpack_weight(tensors[f"{name}.qweight"], shape=shape, signed=signed)
        assert torch.equal(found, codes)
        unpack = layout.unpack_group_scales if signed else layout.unpack_micro_scales
        scales = unpack(tensors[f"{name}.wscales"], shape=tuple(linear.wscales.shape))
        assert same_bytes(scales, linear.wscales)
        smooth = layout.unpack_vector(tensors[f"{name}.smooth_factor"], size=shape[1])
        assert torch.equal(smooth, linear.smooth_factor.bfloat16())
        up = layout.unpack_up(tensors[f"{name}.proj_up"], shape=(shape[0], 32))
        assert torch.equal(up[:, :20], linear.proj_up) and not up[:, 20:].any()
        if not signed:
            assert tensors[f"{name}.wtscale"] == linear.wtscale


def test_metadata_is_what_the_loader_reads(base, tmp_path):
    for preset, dtype, scales in (
        ("svdquant", "int4", (None, None, 64)),
        ("nvfp4", "fp4_e2m1_all", ([None, "fp8_e4m3_nan"], "fp8_e4m3_nan", 16)),
    ):
        out = tmp_path / preset
        files = export_nunchaku(artifact(base, preset), out, dtype=torch.bfloat16, lite=False).files
        with safe_open(out / files[1], framework="pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["config"])["embed_dim"] == 128
        found = json.loads(metadata["quantization_config"])
        assert (found["method"], found["rank"]) == ("svdquant", 32)
        for part, scale_dtype in zip(("weight", "activation"), scales[:2], strict=True):
            wanted = {"dtype": dtype, "scale_dtype": scale_dtype, "group_size": scales[2]}
            assert found[part] == wanted
    unsigned = json.loads((tmp_path / "svdquant" / "config.json").read_text())["act_unsigned"]
    assert unsigned == ["blocks.0.ffn.fc2", "blocks.1.ffn.fc2"]


@pytest.mark.parametrize("preset", ["svdquant", "nvfp4", "w4a16"])
def test_lite_names_are_exactly_those_of_the_patched_model(base, tmp_path, preset):
    """diffusers replaces the targets and then wants every name, and no other."""
    # in which AWQ's zeros, 7 scales each, are exact
    dtype = torch.float16 if preset == "w4a16" else torch.bfloat16
    told = export_nunchaku(artifact(base, preset), tmp_path / "o", dtype=dtype, lite=True)
    found = load_file(tmp_path / "o" / "diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "nunchaku_lite"
    assert getattr(torch, config["compute_dtype"]) == dtype
    expected = set(meta_transformer(CONFIG, torch.bfloat16).state_dict())
    svdq, awq = (config.get(part, {"targets": []}) for part in ("svdq_w4a4", "awq_w4a16"))
    more = ["wcscales", "wtscale"] if preset == "nvfp4" else []
    for targets, names in (
        (svdq["targets"], ["qweight", "wscales", "smooth_factor", "proj_down", "proj_up", *more]),
        (awq["targets"], ["qweight", "wscales", "wzeros"]),
    ):
        for target in targets:
            expected.remove(f"{target}.weight")
            expected |= {f"{target}.{name}" for name in names}
    assert found.keys() == expected
    if preset == "w4a16":
        assert len(awq["targets"]) == 14 and awq["group_size"] == 64 and "svdq_w4a4" not in config
        for name, linear in linears_of(artifact(base, preset), torch.float32).items():
            codes = layout.unpack_awq_weight(found[f"{name}.qweight"])
            scales, zeros = (found[f"{name}.{key}"].double() for key in ("wscales", "wzeros"))
            spread = [x.T.repeat_interleave(64, dim=1) for x in (scales, zeros)]
            weight = (codes + layout.AWQ_OFFSET) * spread[0] + spread[1]
            assert torch.equal(weight, linear.residual().double())
        assert told.snr_db == 200
    else:
        precision, group = ("int4", 64) if preset == "svdquant" else ("nvfp4", 16)
        assert (svdq["precision"], svdq["group_size"], svdq["rank"]) == (precision, group, 32)


def test_what_nunchaku_cannot_hold_is_said(base, artifact_dir, tmp_path):
    with pytest.raises(ValueError, match=r"no layout for any of its linears \(sint8 weights\)"):
        export_nunchaku(artifact(base, "w8a8"), tmp_path / "o", dtype=torch.bfloat16, lite=False)
    with pytest.raises(ValueError, match="no multiples of 128"):
        export_nunchaku(artifact_dir, tmp_path / "o", dtype=torch.bfloat16, lite=False)
    with pytest.raises(ValueError, match="computes in 16 bits"):
        export_nunchaku(artifact_dir, tmp_path / "o", dtype=torch.float32, lite=False)
    assert not (tmp_path / "o").exists()


def test_what_float16_cannot_hold_is_said(base, tmp_path, monkeypatch):
    def with_a_large_bias(*args, **options):
        model = load_compressed(*args, **options)
        model.blocks[1].ffn.fc1.bias[3] = 1e5
        return model

    monkeypatch.setattr("var_compressor.interop.nunchaku.load_compressed", with_a_large_bias)
    folder = artifact(base, "svdquant")
    export_nunchaku(folder, tmp_path / "a", dtype=torch.bfloat16, lite=True)
    with pytest.raises(
        ValueError, match=r"blocks\.1\.ffn\.fc1\.bias is out of the range of torch\.f"
    ):
        export_nunchaku(folder, tmp_path / "b", dtype=torch.float16, lite=True)
    assert not (tmp_path / "b").exists()


# --- running -------------------------------------------------------------------------------------


def snr_db(wanted, got):
    return 10 * torch.log10(wanted.double().square().sum() / (wanted - got).double().square().sum())


@pytest.mark.parametrize(("preset", "capability"), [("svdquant", (8, 6)), ("nvfp4", (12, 0))])
def test_its_kernels_compute_what_our_linears_do(base, monkeypatch, preset, capability):
    """From the packed tensors alone, by formulas that this project's packing does not know."""
    fake_nunchaku.install(monkeypatch)
    ours, theirs = (
        InfinityPipeline.from_pretrained(artifact(base, preset), dtype=torch.float16).transformer
        for _ in range(2)
    )
    use_nunchaku(theirs, capability=capability)
    torch.manual_seed(0)
    for our_block, their_block in zip(ours.blocks, theirs.blocks, strict=True):
        assert isinstance(their_block.ffn, NunchakuFeedForward)
        for path in ("self_attn.qkv", "self_attn.proj", "cross_attn.q", "cross_attn.proj", "ffn"):
            one, other = our_block.get_submodule(path), their_block.get_submodule(path)
            assert isinstance(other, NunchakuLinear | NunchakuFeedForward)
            # two rows of tokens, as guidance has them
            x = torch.randn(2, 5, 128).half()
            # what 16-bit factors and sums cost; codes that they move cost the most
            assert snr_db(one(x), other(x)) > 18, path
            assert other(x).shape == one(x).shape and other(x).dtype == torch.float16
        # 16-bit inputs with a branch stay ours
        assert isinstance(their_block.cross_attn.kv, QuantizedLinear)


def in_float32(linear: QuantizedLinear, *, unsigned: bool) -> fake_nunchaku.SVDQW4A4Linear:
    N, half = linear.qweight.shape
    tensors = pack_w4a4(linear, dtype=torch.float32, rank=32, unsigned=unsigned)
    kernel = fake_nunchaku.SVDQW4A4Linear(
        2 * half,
        N,
        rank=32,
        precision="nvfp4" if linear.wtscale is not None else "int4",
        act_unsigned=unsigned,
        torch_dtype=torch.float32,
    )
    if "wtscale" in tensors:
        kernel.wtscale = tensors.pop("wtscale").item()
    kernel.load_state_dict(tensors)
    return kernel


@pytest.mark.parametrize("preset", ["svdquant", "nvfp4"])
def test_in_float32_nothing_differs_at_all(base, preset):
    """The whole sum: shift, unsigned codes, the branch on plain inputs, the bias."""
    linears = linears_of(artifact(base, preset), torch.float32)
    torch.manual_seed(0)
    for name in ("self_attn.qkv", "cross_attn.proj", "ffn.fc1"):
        linear = linears[f"blocks.1.{name}"]
        x = torch.randn(1, 7, 128)
        assert snr_db(linear(x), in_float32(linear, unsigned=False)(x)) > 100
    fc1, fc2 = (linears[f"blocks.1.ffn.{name}"] for name in ("fc1", "fc2"))
    wanted = fc2(F.gelu(fc1(x), approximate="tanh"))
    kernels = (in_float32(fc1, unsigned=False), in_float32(fc2, unsigned=preset == "svdquant"))
    assert snr_db(wanted, fake_nunchaku.fused_gelu_mlp(x, *kernels)) > 100


def test_an_image_is_drawn_with_its_kernels(base, monkeypatch):
    """The first levels, with the bits of ours forced on it."""
    fake_nunchaku.install(monkeypatch)
    folder, sampling = artifact(base, "svdquant"), Sampling(num_levels=4)
    ours, theirs = (InfinityPipeline.from_pretrained(folder, dtype=torch.float16) for _ in "ab")
    use_nunchaku(theirs.transformer, capability=(8, 9))
    wanted = ours.generate(["a red cat"], seed=0, with_trace=True, sampling=sampling).trace
    found = theirs.generate(
        ["a red cat"], seed=0, with_trace=True, sampling=sampling, forced_bits=wanted.bits
    ).trace
    for one, other in zip(wanted.logits, found.logits, strict=True):
        assert snr_db(one, other) > 15


def test_what_it_cannot_run_is_one_line(base, artifact_dir):
    def transformer(folder, dtype=torch.bfloat16):
        return InfinityPipeline.from_pretrained(folder, dtype=dtype).transformer

    int4 = transformer(artifact(base, "svdquant"))
    for model, capability, message in (
        (int4, None, "runs on a CUDA GPU"),
        (int4, (9, 0), r"int4 kernels for sm_75, .*, this GPU is sm_90; use --compute auto"),
        (transformer(artifact(base, "nvfp4")), (8, 9), "nvfp4 kernels for sm_120, sm_121"),
        (transformer(artifact_dir), (8, 6), "no kernels for this model's linears"),
        (transformer(artifact(base, "svdquant"), torch.float32), (8, 6), "computes in 16 bits"),
        (int4, (7, 5), "no bfloat16 on this GPU"),
        (int4, (8, 6), "nunchaku is not installed; .*the nunchaku of PyPI is another package"),
    ):
        with pytest.raises(NunchakuError, match=message) as error:
            use_nunchaku(model, capability=capability)
        assert "\n" not in str(error.value)
    assert all(isinstance(block.ffn.fc1, QuantizedLinear) for block in int4.blocks)


def test_nothing_imports_it():
    program = (
        "import sys, var_compressor.pipeline, var_compressor.interop.nunchaku\n"
        "import var_compressor.layers.nunchaku_linear\n"
        "assert not any(name.split('.')[0] == 'nunchaku' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
