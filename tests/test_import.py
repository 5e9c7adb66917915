"""The original's `.pt` files become an artifact: every code is proved, every mismatch is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tinyptq
from original import BLOCK, CONFIG, change, write_base, write_original
from var_compressor.artifact import block_file, is_artifact, read_tensors
from var_compressor.interop.import_original import Imported, import_artifact, settings_of
from var_compressor.interop.kv_quant_calib import FILE as KV_FILE
from var_compressor.interop.kv_quant_calib import SPELLINGS
from var_compressor.interop.original import BRANCH, MODEL, PLACES, SCALE, SMOOTH, patched_names
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.checkpoint import transformer_names
from var_compressor.models.config import MODELS
from var_compressor.ops.packing import unpack_int4
from var_compressor.pipeline import InfinityPipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_original(tmp_path / "source")


def run(source: Path, base: Path, *words: str, out: str = "out") -> tuple[Imported, Path]:
    target = source.with_name(out)
    return import_artifact(source, str(base), target, settings_of(source, list(words))), target


def linears_of(out: Path) -> dict[str, QuantizedLinear]:
    pipeline = InfinityPipeline.from_pretrained(out, dtype=torch.float32)
    block = pipeline.transformer.blocks[0]
    return {name: block.get_submodule(name) for name in PLACES}


def test_codes_are_the_originals_and_proved(source, base):
    imported, out = run(source, base)
    golden = tinyptq.load_tensors()
    stored = read_tensors(out / block_file(0), "cpu")
    for name, place in PLACES.items():
        wanted = torch.cat([golden[f"codes.{part}"] for part in place.parts])
        assert torch.equal(unpack_int4(stored[f"{name}.qweight"]), wanted.to(torch.int8))
        scales = torch.cat([golden[f"scales.{part}"] for part in place.parts])
        assert torch.equal(stored[f"{name}.wscales"], scales.bfloat16())
    for linear in imported.blocks[0]:
        codes = linear["codes"]
        assert (codes["num_inexact"], codes["num_ambiguous"], codes["max_deviation"]) == (0, 0, 0)
        # only storing scales and branch in bfloat16 is lost
        assert linear["storage_snr_db"] > 50
        assert linear["base_snr_db"] > 12


def test_linears_put_out_what_the_originals_did(source, base):
    """Smoothing, the branch that q and k, v share, signed inputs: within bfloat16 of scales."""
    linears, golden = linears_of(run(source, base, "quant.modules=[{pattern: '*'}]")[1]), None
    golden = tinyptq.load_tensors()
    for name, place in PLACES.items():
        wide = {"cross_attn.kv": 2, "self_attn.qkv": 3}.get(name, 1)
        for number, part in enumerate(place.parts):
            if f"fakequant.in.{part}" not in golden:
                continue
            got = linears[name](golden[f"fakequant.in.{part}"]).chunk(wide, dim=-1)[number]
            wanted = golden[f"fakequant.out.{part}"]
            assert float((got - wanted).norm() / wanted.norm()) < 5e-3, part


def test_inputs_are_read_as_the_original_does_unless_told(source, base):
    as_original = linears_of(run(source, base)[1])
    assert as_original["ffn.fc2"].act_format.name == "sint4"
    assert as_original["cross_attn.kv"].act_format is None
    told = linears_of(run(source, base, "quant.act.allow_unsigned=true", out="other")[1])
    assert told["ffn.fc2"].act_format.name == "uint4" and told["ffn.fc2"].shift > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_exact_when_weights_are_stored_in_16_bits(source, base, dtype):
    def halve(content):
        for name, tensor in content.items():
            content[name] = tensor.to(dtype) if name.startswith("block_chunks") else tensor

    wanted = run(source, base)[0]
    change(source / MODEL, halve)
    imported, out = run(source, base, out="half")
    for linear in imported.blocks[0]:
        # not an integer multiple any more, but the bytes come back from the codes
        assert linear["codes"]["num_inexact"] == 0 and linear["codes"]["max_deviation"] < 0.03
    folder = source.with_name("out")
    one, other = (read_tensors(f / block_file(0), "cpu") for f in (folder, out))
    assert all(torch.equal(one[n], other[n]) for n in one if n.endswith("qweight"))
    assert wanted.manifest.spec == imported.manifest.spec


def test_codes_that_cannot_be_known_are_counted(source, base):
    def blur(content):
        weight = content[f"{BLOCK}.ffn.fc1.weight"]
        step = torch.load(source / SCALE, weights_only=True)[f"{BLOCK}.ffn.fc1.weight.scale.0"]
        weight[3, 5] += 0.4 * step[3, 0, 0, 0]
        weight[4, 5] += 0.1 * step[4, 0, 0, 0]

    change(source / MODEL, blur)
    codes = {one["name"]: one["codes"] for one in run(source, base)[0].blocks[0]}
    assert codes["ffn.fc1"]["num_inexact"] == 2 and codes["ffn.fc1"]["num_ambiguous"] == 1
    assert codes["ffn.fc1"]["max_deviation"] == pytest.approx(0.4, abs=1e-3)
    assert codes["ffn.fc2"]["num_inexact"] == 0


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_its_kv_cache_comes_along(source, base, spelling):
    """Under the names that the original has for the 2B and for the 8B."""
    if spelling != KV_FILE:
        shutil.copy(source / KV_FILE, source / spelling)
        with pytest.raises(ValueError, match="take one away"):
            run(source, base)
        (source / KV_FILE).unlink()
    imported, out = run(source, base)
    assert imported.has_kv
    params = InfinityPipeline.from_pretrained(out, dtype=torch.float32).kv_params
    wanted = torch.load(source / spelling, weights_only=True)["params"][f"{BLOCK}.sa.k.cache"]
    assert torch.equal(params.layers[0].ranges.k_scale_HD, wanted["scale"])


def test_a_run_without_smoothing_says_so_itself(source, base):
    torch.save({}, source / SMOOTH)
    with pytest.raises(ValueError, match=r"smooth\.pt is empty.*quant\.smooth\.enabled=false"):
        run(source, base)
    # whose weights were smoothed indeed, and are not the base's without the factors
    with pytest.raises(ValueError, match="is not the base's weight"):
        run(source, base, "quant.smooth.enabled=false")


def test_every_mismatch_is_named_at_once(source, base):
    change(
        source / MODEL, lambda c: (c.pop("head.bias"), c.update({"foreign.weight": torch.ones(1)}))
    )
    change(source / SCALE, lambda c: c.update({"other.scale": torch.ones(1)}))
    change(source / SMOOTH, lambda c: c[f"{BLOCK}.ffn.fc2"].neg_())
    with pytest.raises(ValueError) as error:
        run(source, base)
    for words in (
        "4 mismatches",
        "model.pt lacks head.bias",
        "model.pt has unknown foreign.weight",
        "scale.pt has unknown other.scale",
        "smooth.pt: ffn.fc2 is not positive in block 0",
    ):
        assert words in str(error.value)
    assert not source.with_name("out").exists()


def drop(name):
    return lambda content: content.pop(f"{BLOCK}.{name}")


def put(name, value):
    return lambda content: content.update({f"{BLOCK}.{name}": value})


NAN = float("nan")
MISMATCHES = [
    (SCALE, drop("sa.to_k.weight.scale.0"), r"scale\.pt lacks sa\.to_k in block 0"),
    (SCALE, put("ffn.fc1.weight.scale.0", torch.ones(512, 1, 3, 1)), r"fc1 has shape \[512, 1, 3"),
    (SCALE, put("ffn.fc1.weight.scale.0", torch.zeros(512, 1, 2, 1)), "fc1.* is not positive"),
    (SCALE, put("ffn.fc1.weight.zero", torch.tensor(3.0)), "only symmetric codes"),
    (SCALE, put("ffn.fc1.weight.scale.0", "a word"), "fc1.* is str, expected a tensor"),
    (SCALE, lambda c: c.clear(), "holds no scales"),
    (SMOOTH, drop("ffn.fc1"), r"smooth\.pt lacks ffn\.fc1 in block 0"),
    (SMOOTH, put("ffn.fc1", torch.ones(5)), r"ffn\.fc1 has shape \[5\], expected \[128\]"),
    (SMOOTH, put("ffn.fc1", torch.full((128,), NAN)), "fc1 holds NaN"),
    (SMOOTH, put("ffn.fc1", torch.ones(1).expand(128)), "claims .* more than is stored"),
    (BRANCH, put("ffn.fc1", {"a.weight": torch.ones(2, 3)}), "does not hold a.weight and b.weight"),
    (
        BRANCH,
        put("ffn.fc1", {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(512, 2)}),
        r"ffn\.fc1 has a \[2, 3\] and b \[512, 2\], expected 128 columns and 512 rows",
    ),
    (MODEL, put("ffn.fc1.weight", torch.ones(2, 2)), r"fc1\.weight has shape \[2, 2\], not"),
    (MODEL, put("ffn.fc1.weight", torch.ones(512, 128, dtype=torch.int8)), "is int8"),
    (MODEL, put("sa.to_out.0.weight", torch.ones(128, 128)), r"sa\.to_out\.0\.weight and sa\.proj"),
    (MODEL, put("ffn.fc1.bias", torch.ones(512)), r"ffn\.fc1\.bias is not the base's in block 0"),
    (MODEL, put("ada_gss", torch.full((1, 1, 6, 128), NAN)), "ada_offset holds NaN"),
]


@pytest.mark.parametrize(("file", "edit", "message"), MISMATCHES)
def test_what_does_not_fit_is_named(source, base, file, edit, message):
    change(source / file, edit)
    with pytest.raises(ValueError, match=message):
        run(source, base)
    assert not source.with_name("out").exists()


def test_weights_that_were_never_quantized_are_refused(source, base):
    golden = tinyptq.load_tensors()
    change(source / MODEL, put("ffn.fc2.weight", golden["orig.ffn.fc2.weight"]))
    with pytest.raises(ValueError, match=r"ffn\.fc2 is not on the grid of its scales.*block 0"):
        run(source, base)


def test_another_model_s_base_is_refused(source, base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    pipeline = InfinityPipeline.from_pretrained(other, dtype=torch.float32)
    block = pipeline.transformer.blocks[0]
    with torch.no_grad():
        block.ffn.fc1.weight.copy_(block.ffn.fc1.weight.flip(0).contiguous())
    pipeline.save_pretrained(other, overwrite=True)
    with pytest.raises(
        ValueError, match=r"ffn\.fc1 is not the base's weight.* in block 0"
    ) as error:
        run(source, other)
    assert "fc2" not in str(error.value)


def test_recipes_that_contradict_the_files_are_refused(source, base):
    with pytest.raises(ValueError, match="is sint4 in groups of 64, the recipe says nvfp4"):
        run(source, base, "quant.weight={format: nvfp4, group_size: 16}")
    with pytest.raises(ValueError, match=r"has a branch of rank 16, the recipe says 8"):
        run(source, base, "quant.low_rank.rank=8")
    with pytest.raises(ValueError, match="do not nest"):
        run(source, base, "quant.act.group_size=48")


@pytest.mark.parametrize("name", [MODEL, SCALE, SMOOTH, BRANCH])
def test_missing_and_damaged_files_are_named(source, base, name):
    data = (source / name).read_bytes()
    (source / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        run(source, base)
    (source / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{name}: not a readable torch checkpoint"):
        run(source, base)
    middle = len(data) // 2
    (source / name).write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
    with pytest.raises(ValueError, match=name):
        run(source, base)


def test_a_run_that_was_cut_off_goes_on(source, base):
    def stop(stage, done, total):
        raise KeyboardInterrupt

    out, recipe = source.with_name("out"), settings_of(source, [])
    with pytest.raises(KeyboardInterrupt):
        import_artifact(source, str(base), out, recipe, on_progress=stop)
    assert not is_artifact(out) and (out / block_file(0)).is_file()
    written = (out / block_file(0)).stat().st_mtime_ns
    run(source, base)
    assert is_artifact(out) and (out / block_file(0)).stat().st_mtime_ns == written


@pytest.mark.parametrize(("model", "last"), [("infinity-2b", (7, 3)), ("infinity-8b", (7, 4))])
def test_names_of_both_sizes(model, last):
    """Blocks go by chunk; around the blocks, the names are those of the checkpoint."""
    config = MODELS[model].transformer
    names, official = patched_names(config), transformer_names(config)
    assert names.keys() == official.keys()
    outside = [name for name in names if not name.startswith("blocks.")]
    assert all(names[name] == official[name] for name in outside)
    block = f"block_chunks.{last[0]}.module.{last[1]}"
    assert names[f"blocks.{config.depth - 1}.self_attn.qkv.weight"] == (
        f"{block}.sa.to_q.weight", f"{block}.sa.to_k.weight", f"{block}.sa.to_v.weight",
    )  # fmt: skip
    parts = [part for found in names.values() for part in found]
    assert len(set(parts)) == len(parts)


def test_the_block_of_the_config_is_the_one_that_was_recorded():
    assert replace(CONFIG, depth=2, num_chunks=2, text_maxlen=512, pixel_budget="1M") == (
        tinyptq.CONFIG
    )
