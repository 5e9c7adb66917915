"""The examples run, what they print is right, and docs/EXTENDING.md shows them as they are."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tiny import COLLECTION, QUICK_SPEC
from var_compressor import InfinityPipeline, load_artifact, quantize_model
from var_compressor.images import read_settings
from var_compressor.layers.kernel_linear import has_kernels
from var_compressor.layers.kv_cache import LevelCache
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.layers.nunchaku_linear import fit
from var_compressor.models.config import MODELS
from var_compressor.ops.primitives import FORMATS, quantize_dynamic
from var_compressor.quant.gptq import RoundingOptions, rtn
from var_compressor.quant.ptq import specs_by_block
from var_compressor.spec import (
    WEIGHT_FORMATS,
    ActSpec,
    LinearSpec,
    LowRankSpec,
    QuantSpec,
    SmoothSpec,
    WeightSpec,
)

ROOT = Path(__file__).parents[1]
EXAMPLES, DOC = ROOT / "examples", ROOT / "docs" / "EXTENDING.md"
NAMES = ("custom_size", "number_format", "cache_format", "model_size")


def module(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module", params=NAMES)
def run(request, tmp_path_factory):
    """An example, its folder and its result; what it adds to tables is gone afterwards."""
    tables = (FORMATS, WEIGHT_FORMATS, MODELS)
    before = [dict(table) for table in tables]
    out = tmp_path_factory.mktemp(request.param)
    try:
        example = module(request.param)
        yield request.param, example, out, example.main(out)
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


def of(*names):
    return pytest.mark.parametrize("run", names, indirect=True, scope="module")


# --- independent answers --------------------------------------------------------------------------


def snr_db(wanted, found):
    """Of the levels' logits, in float64."""
    wanted, found = (torch.cat([one.double().flatten() for one in x]) for x in (wanted, found))
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


def same_bits(wanted, found):
    """Share of bits whose likelier value is the same."""
    wanted, found = (
        torch.cat([(one[..., 1] > one[..., 0]).flatten() for one in x]) for x in (wanted, found)
    )
    return float((wanted == found).double().mean())


def forced(example, pipeline, full):
    """Logits for the bits that full precision draws with the example's seed."""
    cfg = example.SAMPLING.cfg
    drawn = full.generate(example.UNSEEN, seed=1, sampling=example.SAMPLING, with_trace=True)
    return pipeline.teacher_logits(example.UNSEEN, drawn.trace.bits, cfg=cfg)


def integers(stored_NJ, nbits, num_channels):
    """Codes of a row by Python's own integers: the first one has the lowest bits."""
    rows = []
    for row in stored_NJ.tolist():
        number = int.from_bytes(bytes(row), "little")
        rows.append([(number >> nbits * k) & (2**nbits - 1) for k in range(num_channels)])
    return torch.tensor(rows)


def two_complement(codes, nbits):
    return torch.where(codes >= 2 ** (nbits - 1), codes - 2**nbits, codes)


class Rounded(nn.Module):
    """y = Q8(x / smooth) (codes scales)^T + (x / smooth) down^T up^T + bias, in float64."""

    def __init__(self, tensors, *, rounds_input):
        super().__init__()
        self.t = {name: tensor.double() for name, tensor in tensors.items()}
        codes_NK = integers(tensors["qweight"], 4, 2 * tensors["qweight"].shape[1])
        scales_NK = self.t["wscales"].repeat_interleave(64, dim=1)
        self.weight_NK, self.rounds_input = two_complement(codes_NK, 4) * scales_NK, rounds_input

    def forward(self, x):
        x_hat = x.double() / self.t["smooth_factor"]
        rounded = x_hat
        if self.rounds_input:
            step = x_hat.abs().amax(-1, keepdim=True) / 127
            rounded = torch.where(step == 0, x_hat, (x_hat / step).round() * step)
        branch = x_hat @ self.t["proj_down"].T @ self.t["proj_up"].T
        return (rounded @ self.weight_NK.T + branch + self.t["bias"]).to(x.dtype)


def replaced(pipeline, blocks, make):
    """A pipeline's linears replaced by what `make` gives for their stored tensors."""
    for index, block in enumerate(pipeline.transformer.blocks):
        tensors = load_file(blocks / f"{index:03d}.safetensors")
        names = [name for name, one in block.named_modules() if isinstance(one, nn.Linear)]
        for name in names:
            own = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}.")
            }
            if "qweight" in own:
                parent, _, attribute = name.rpartition(".")
                linear = block.get_submodule(name)
                setattr(block.get_submodule(parent), attribute, make(name, own, linear))
    return pipeline


# --- a model of one's own size --------------------------------------------------------------------


@of("custom_size")
def test_custom_size_counts_bytes_right(run):
    _, example, out, result = run
    files = sorted((out / "artifact/blocks").iterdir())
    assert len(files) == example.CONFIG.transformer.depth
    tensors = {name: t for file in files[:1] for name, t in load_file(file).items()}
    rank, num_linears = example.SPEC.low_rank.rank, 0
    for name in [name for name in tensors if name.endswith(".qweight")]:
        own = {key: t for key, t in tensors.items() if key.startswith(name[: -len("qweight")])}
        (N, J), K = tensors[name].shape, 2 * tensors[name].shape[1]
        expected = N * J + 2 * N * K // 64 + 4 * K + 2 * rank * (N + K) + 4 * N
        assert sum(t.nbytes for t in own.values()) == expected
        num_linears += 1
    assert num_linears == 7
    headers = [8 + struct.unpack("<Q", file.read_bytes()[:8])[0] for file in files]
    payload = sum(t.nbytes for file in files for t in load_file(file).values())
    assert result["compressed_bytes"] == sum(headers) + payload

    with safe_open(next((out / "model/transformer").glob("*.safetensors")), "pt") as stored:
        names = [name for name in stored.keys() if name.startswith("blocks.")]  # noqa: SIM118
        shapes = [stored.get_slice(name).get_shape() for name in names]
    assert result["full_bytes"] == 2 * sum(torch.Size(shape).numel() for shape in shapes)


@of("custom_size")
def test_custom_size_computes_what_the_artifact_holds(run):
    """Against the network with float64 linears, written down again from the files."""
    _, example, out, result = run
    full, own = (
        InfinityPipeline.from_pretrained(out / "model", dtype=torch.float32) for _ in range(2)
    )

    def make(name, tensors, linear):
        return Rounded(tensors, rounds_input=name != "cross_attn.kv")

    replaced(own, out / "artifact/blocks", make)
    wanted = forced(example, full, full)
    found = forced(example, own, full)
    compressed = forced(example, load_artifact(out / "artifact", dtype=torch.float32), full)
    # where a value lies between two codes, float32 may take the other one
    assert snr_db(found, compressed) > 40
    assert result["snr_db"] == pytest.approx(snr_db(wanted, found), abs=0.1)
    assert result["same_bits"] == pytest.approx(same_bits(wanted, found), abs=0.002)
    assert 0.9 < result["same_bits"] < 1


@of("custom_size")
def test_custom_size_draws_both(run):
    _, example, out, _ = run
    pair = Image.open(out / "pair.png")
    assert read_settings(out / "pair.png")["prompt"] == example.UNSEEN[0]
    opened = (
        InfinityPipeline.from_pretrained(out / "model", dtype=torch.float32),
        load_artifact(out / "artifact", dtype=torch.float32),
    )
    images = []
    for place, pipeline in enumerate(opened):
        drawn = pipeline.generate(example.UNSEEN, seed=1, sampling=example.SAMPLING).pil[0]
        box = (place * drawn.width, 0, (place + 1) * drawn.width, drawn.height)
        assert pair.crop(box).tobytes() == drawn.tobytes()
        images.append(drawn.tobytes())
    assert pair.size == (512, 256) and images[0] != images[1]


@of("custom_size")
def test_load_artifact_refuses_what_is_none(run, tmp_path):
    _, _, out, _ = run
    for path, message in (
        (out / "model", "is a full-precision model; make an artifact"),
        (tmp_path, "no model directory"),
        (tmp_path / "nowhere", "no such directory"),
    ):
        with pytest.raises(ValueError, match=message) as found:
            load_artifact(path)
        assert "\n" not in str(found.value) and str(path) in str(found.value)
    assert load_artifact(out / "artifact").transformer.block_dtype == torch.bfloat16


# --- number formats -------------------------------------------------------------------------------


def values_of(example, name, stored_NJ, num_channels):
    nbits = {"sint4": 4, "sint3": 3, "nf4": 4}[name]
    codes = integers(stored_NJ, nbits, num_channels)
    if name == "nf4":
        return torch.tensor(example.NF4_VALUES, dtype=torch.float64)[codes]
    return two_complement(codes, nbits).double()


@of("number_format")
def test_number_formats_lose_what_the_example_says(run):
    """Every weight against every value there is."""
    _, example, _, results = run
    full = InfinityPipeline.from_pretrained("infinity-tiny", dtype=torch.float32)
    weight_NGE = full.transformer.blocks[0].ffn.fc1.weight.double().unflatten(1, (-1, 64))
    grids = {
        "sint4": (range(-7, 8), 7.0, 4),
        "sint3": (range(-3, 4), 3.0, 3),
        "nf4": (example.NF4_VALUES, 1.0, 4),
    }
    for name, (values, largest, nbits) in grids.items():
        scales_NG1 = (weight_NGE.float().abs().amax(-1, keepdim=True) / largest).bfloat16().double()
        best = torch.full_like(weight_NGE, torch.inf)
        for value in values:
            error = weight_NGE - value * scales_NG1
            best = torch.where(error.abs() < best.abs(), error, best)
        snr = 10 * torch.log10(weight_NGE.square().sum() / best.square().sum())
        assert results[name]["weight_snr_db"] == pytest.approx(float(snr), abs=0.01)
        assert results[name]["bits_per_value"] == nbits + 16 / 64
    order = sorted(results, key=lambda name: results[name]["weight_snr_db"])
    assert order == ["sint3", "sint4", "nf4"]


@of("number_format")
@pytest.mark.parametrize("name", ["sint4", "sint3", "nf4"])
def test_number_formats_run_as_they_are_stored(run, name):
    _, example, out, results = run
    full, own = (
        InfinityPipeline.from_pretrained("infinity-tiny", dtype=torch.float32) for _ in range(2)
    )

    def make(_, tensors, linear):
        K = linear.in_features
        values_NK = values_of(example, name, tensors["qweight"], K)
        weight_NK = values_NK * tensors["wscales"].double().repeat_interleave(64, dim=1)
        assert tensors["qweight"].nbytes * 8 == weight_NK.numel() * (3 if name == "sint3" else 4)
        linear.weight = nn.Parameter(weight_NK.float(), requires_grad=False)
        return linear

    replaced(own, out / name / "blocks", make)
    wanted, found = forced(example, full, full), forced(example, own, full)
    assert results[name]["logits_snr_db"] == pytest.approx(snr_db(wanted, found), abs=0.05)
    assert results[name]["same_bits"] == pytest.approx(same_bits(wanted, found), abs=0.001)
    image = own.generate(example.UNSEEN, seed=1, sampling=example.SAMPLING).uint8_BYX3[0]
    stored = torch.frombuffer(
        bytearray(Image.open(out / f"{name}.png").tobytes()), dtype=torch.uint8
    ).view(image.shape)
    assert (image.int() - stored.int()).abs().float().mean() < 1


@of("number_format")
def test_integers_of_three_bits_multiply_integers_exactly(run):
    """With integer inputs as well: against float64."""
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(24, 128, generator=generator)
    x_MK = torch.randn(5, 128, generator=generator)
    spec = LinearSpec(
        WeightSpec("sint3", 64), ActSpec("sint4", 64), LowRankSpec(0), SmoothSpec(enabled=False)
    )
    rounded = rtn(weight_NK, None, RoundingOptions(FORMATS["sint3"], 64, torch.bfloat16))
    linear = QuantizedLinear.of(
        spec,
        rounded,
        smooth_factor_K=torch.ones(128),
        down_RK=torch.zeros(0, 128),
        up_NR=torch.zeros(24, 0),
        bias_N=torch.zeros(24),
    )
    assert spec.summary() == "W(sint3)A4 g64 rank 0"
    assert linear.qweight.shape == (24, 48) and linear.qweight.dtype == torch.uint8
    codes, scales = quantize_dynamic(
        x_MK, format=FORMATS["sint4"], group_size=64, scale_dtype=torch.float32
    )
    qx_MK = codes.double() * scales.double().repeat_interleave(64, dim=1)
    expected = qx_MK @ rounded.dequantize().double().T
    torch.testing.assert_close(linear(x_MK).double(), expected, rtol=1e-5, atol=1e-5)


@of("number_format")
@pytest.mark.parametrize(("name", "rounding"), [("sint3", "rtn"), ("nf4", "gptq")])
def test_smoothing_branch_and_rounding_search_in_them(run, name, rounding, model_dir, tmp_path):
    """With 4-bit inputs too: what is stored is better than plain rounding in the same formats."""
    spec = replace(QUICK_SPEC, weight=WeightSpec(name, 64, rounding)).validate()
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    quantize_model(pipeline, COLLECTION, spec, base=str(model_dir), out=tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    snr = [linear["snr_db"] for block in report["blocks"] for linear in block["linears"]]
    assert len(snr) == 21
    gains = [one["final"] - one["nearest"] for one in snr]
    assert min(gains) > -0.5 and sum(gains) / len(gains) > 1
    model = load_artifact(tmp_path / "out", dtype=torch.float32).transformer
    assert model.blocks[0].ffn.fc2.weight_format is FORMATS[name]


@of("number_format")
def test_nobody_else_s_kernels_take_a_table_for_theirs(run):
    """Codes of nf4 are nibbles like those of nvfp4, and mean something else."""
    spec = LinearSpec(
        WeightSpec("nf4", 16), ActSpec("nvfp4", 16), LowRankSpec(0), SmoothSpec(enabled=False)
    )
    linear = QuantizedLinear(128, 128, spec, bias_dtype=torch.float32)
    assert fit(linear).kind is None and "nf4" in fit(linear).why
    assert not has_kernels(linear)


@of("number_format")
def test_a_format_with_half_its_entries_or_channels_is_refused(run):
    config = replace(MODELS["infinity-tiny"].transformer, embed_dim=20, num_heads=1)
    spec = QuantSpec(
        weight=WeightSpec("sint3", -1), act=ActSpec(None, -1), low_rank=LowRankSpec(rank=0)
    )
    with pytest.raises(ValueError, match=r"self_attn.qkv: 20 input channels of 3 bits"):
        specs_by_block(spec, config)
    entry = FORMATS.pop("nf4")
    try:
        nf4 = replace(spec, weight=WeightSpec("nf4", 64)).validate()
        with pytest.raises(ValueError, match="'nf4' has no entry in FORMATS"):
            specs_by_block(nf4, MODELS["infinity-tiny"].transformer)
    finally:
        FORMATS["nf4"] = entry


@of("number_format")
def test_an_artifact_of_a_format_that_is_not_there_names_it(run):
    _, _, out, _ = run
    code = f"from var_compressor import load_artifact; load_artifact({str(out / 'sint3')!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    line = found.stderr.strip().splitlines()[-1]
    assert "unknown number format 'sint3'" in line and str(out / "sint3") in line


# --- a cache --------------------------------------------------------------------------------------


class RoundedCache(LevelCache):
    """Keys on a grid of 255, values on one of 15 values; attention by its formula, in float64."""

    def __init__(self):
        self.past = {}

    @staticmethod
    def rounded(x, largest, group):
        x = x.double().unflatten(-1, (-1, group))
        step = (x.float().abs().amax(-1, keepdim=True) / largest).half().double()
        return ((x / step).round().clamp(-largest, largest) * step).flatten(-2)

    def attend_level(self, layer, level, q, k, v):
        past_k, past_v = self.past.get(layer, (k[:, :, :0].double(), v[:, :, :0].double()))
        logits = q.double() @ torch.cat([past_k, k.double()], dim=2).mT
        o = logits.softmax(-1) @ torch.cat([past_v, v.double()], dim=2)
        D = k.shape[-1]
        self.past[layer] = (
            torch.cat([past_k, self.rounded(k, 127, D)], dim=2),
            torch.cat([past_v, self.rounded(v, 7, D // 2)], dim=2),
        )
        return o.to(v.dtype)


@of("cache_format")
def test_the_cache_loses_what_the_example_says(run):
    _, example, out, result = run

    class Rounding(InfinityPipeline):
        def new_cache(self, schedule, *, rows):
            return RoundedCache()

    full, own = (
        kind.from_pretrained("infinity-tiny", dtype=torch.float32)
        for kind in (InfinityPipeline, Rounding)
    )
    wanted, found = forced(example, full, full), forced(example, own, full)
    assert result["snr_db"] == pytest.approx(snr_db(wanted, found), abs=0.1)
    assert result["same_bits"] == pytest.approx(same_bits(wanted, found), abs=0.001)
    config, schedule = full.transformer.config, full.schedule_for(1.0, None)
    values = 2 * config.num_heads * (schedule.num_tokens - schedule.levels[-1].num_tokens)
    tokens, D = config.depth * values, config.head_dim
    assert result["plain_bytes"] == tokens * 2 * 2 * D
    assert result["coded_bytes"] == tokens * (D + 2 + D // 2 + 2 * 2)
    assert read_settings(out / "k8v4.png")["seed"] == 1


@of("cache_format")
def test_the_cache_holds_several_rows_and_levels_in_turn(run):
    """All levels at once do what one after the other does; a row does not see another."""
    _, example, _, _ = run
    pipeline = example.K8V4Pipeline.from_pretrained("infinity-tiny", dtype=torch.float32)
    schedule = pipeline.schedule_for(1.0, None)
    config = pipeline.transformer.config
    generator = torch.Generator().manual_seed(0)
    shape = (3, config.num_heads, schedule.num_tokens, config.head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    together = pipeline.new_cache(schedule, rows=3).attend(0, schedule.levels, q, k, v)
    cache, alone = pipeline.new_cache(schedule, rows=3), pipeline.new_cache(schedule, rows=1)
    for level in schedule.levels:
        part = slice(level.offset, level.end)
        found = cache.attend(0, (level,), q[:, :, part], k[:, :, part], v[:, :, part])
        assert torch.equal(found, together[:, :, part])
        third = alone.attend(0, (level,), q[2:, :, part], k[2:, :, part], v[2:, :, part])
        torch.testing.assert_close(third, found[2:], rtol=1e-5, atol=1e-5)


# --- a model size ---------------------------------------------------------------------------------


def varc(*words, entry=False):
    """The command in a process of its own, which knows the example's entry or does not."""
    code = "from var_compressor.cli import main; main()"
    if entry:
        code = "import model_size; " + code
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(EXAMPLES), *sys.path]))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=env
    )


@of("model_size")
def test_a_model_size_is_as_large_as_it_says(run):
    _, _, out, result = run
    files = sorted((out / "infinity-mini").rglob("*.safetensors"))
    assert result["stored"] == sum(t.nbytes for file in files for t in load_file(file).values())
    config = MODELS["infinity-mini"].transformer
    block = load_file(files[0])
    matrices = [t for n, t in block.items() if n.startswith("blocks.0.") and t.ndim == 2]
    C = config.embed_dim
    # qkv, proj, q, proj, fc1, fc2 and the text's keys and values
    linears = [t for t in matrices if min(t.shape) >= C]
    assert sum(t.numel() for t in linears) == C * C * (3 + 1 + 1 + 1 + 4 + 4 + 2)


@of("model_size")
def test_varc_takes_the_directory_without_knowing_the_name(run):
    _, _, out, result = run
    plan = varc("plan", "--model", out / "infinity-mini", "--budget", "1GiB", "--json",
                "--prompt-tokens", 64)  # fmt: skip
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["peak_bytes"] == result["peak"]
    png = out / "drawn.png"
    drawn = varc("generate", "a red cube.", "--model", out / "infinity-mini", "--out", png)
    assert drawn.returncode == 0, drawn.stderr
    assert Image.open(png).size == (256, 256)
    unknown = varc("init", "infinity-mini", "--out", out / "other")
    assert unknown.returncode == 2 and "model is 'infinity-mini'" in unknown.stderr


@of("model_size")
def test_varc_takes_the_name_where_the_entry_is(run, tmp_path):
    _, _, out, _ = run
    made = varc("init", "infinity-mini", "--out", tmp_path / "again", entry=True)
    assert made.returncode == 0, made.stderr
    for file in sorted((out / "infinity-mini").rglob("*.safetensors")):
        other = tmp_path / "again" / file.relative_to(out / "infinity-mini")
        assert other.read_bytes() == file.read_bytes()
    timed = varc("bench", "infinity-mini", "--shapes-only", "--baseline", "none", "--runs", 1,
                 "--out", tmp_path / "bench", "--json", entry=True)  # fmt: skip
    assert timed.returncode == 0, timed.stderr
    line = json.loads(timed.stdout)
    assert line["model"] == "infinity-mini, random W4" and line["draw_seconds"] > 0


# --- the text -------------------------------------------------------------------------------------


def blocks(language):
    found = re.findall(rf"^```{language}\n(.*?)^```$", DOC.read_text(), re.M | re.S)
    assert found
    return found


def test_every_program_in_the_text_is_an_example_s():
    sources = {name: (EXAMPLES / f"{name}.py").read_text() for name in NAMES}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NAMES)
    shown = dict.fromkeys(NAMES, 0)
    for block in blocks("python"):
        owners = [name for name, source in sources.items() if f"\n{block}" in source]
        assert len(owners) == 1, f"in {len(owners)} examples:\n{block}"
        shown[owners[0]] += 1
    assert all(shown.values())


def test_what_the_examples_print_is_what_the_text_shows(run):
    """Words and whole numbers are the same; measured ones within a unit."""
    name, example, _, result = run
    printed = example.report(result)
    outputs = dict(re.findall(r"^\$ python examples/(\w+)\.py OUT\n(.*?)^```$", DOC.read_text(),
                              re.M | re.S))  # fmt: skip
    number = re.compile(r"\d+(?:\.\d+)?")
    assert number.split(outputs[name].strip()) == number.split(printed)
    for shown, found in zip(number.findall(outputs[name]), number.findall(printed), strict=True):
        if "." in shown:
            assert float(found) == pytest.approx(float(shown), abs=1), (shown, found)
        else:
            assert found == shown
