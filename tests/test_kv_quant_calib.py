"""`kv_quant_calib.pt`: a file of the original's is read, and what is written has its layout."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny import COLLECTION, tiny_config, tiny_pipeline
from var_compressor.interop.kv_quant_calib import FILE, read, write
from var_compressor.models.config import InfinityConfig
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.kv_calibration import calibrate_kv
from var_compressor.spec import KVSpec

GOLDEN = Path(__file__).parent / "golden" / "quant" / FILE
CONFIG = InfinityConfig(
    depth=2, embed_dim=128, num_heads=2, num_chunks=2, bits_per_token=8, text_channels=128
)


def original():
    return torch.load(GOLDEN, weights_only=True)


def test_a_file_of_the_originals_is_read():
    found = read(GOLDEN, CONFIG)
    assert found.format.name == "int8" and not found.format.dynamic
    for index, layer in enumerate(found.layers):
        assert layer.nbits == (8, 8) and layer.dropped == ((), ())
        for part in "kv":
            key = f"block_chunks.{index}.module.0.sa.{part}.cache"
            wanted = original()["params"][key]
            assert torch.equal(getattr(layer.ranges, f"{part}_scale_HD"), wanted["scale"])
            assert torch.equal(getattr(layer.ranges, f"{part}_zero_point_HD"), wanted["zero_point"])


@pytest.mark.parametrize("spec", [KVSpec(), KVSpec(mode="shared_percentile")])
def test_what_is_written_has_the_originals_layout_and_comes_back(model_dir, tmp_path, spec):
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    found = calibrate_kv(pipeline, COLLECTION, spec)
    write(tmp_path / FILE, found)
    content = torch.load(tmp_path / FILE, weights_only=True)
    keys = {f"block_chunks.{i}.module.0.sa.{part}.cache" for i in range(3) for part in "kv"}
    theirs = original()
    assert content.keys() == theirs.keys()
    for group, entries in content.items():
        assert entries.keys() == keys
        like = next(iter(theirs[group].values()))
        for entry in entries.values():
            assert entry.keys() == like.keys()
            for name, value in entry.items():
                assert type(value) is type(like[name])
                assert not isinstance(value, torch.Tensor) or value.dtype == like[name].dtype
    for key in keys:
        scale, zero = (content["params"][key][name] for name in ("scale", "zero_point"))
        bounds = content["percentiles"][key]
        assert torch.equal(bounds["hi"], (127 - zero) * scale)
        is_shared = spec.mode == "shared_percentile"
        assert (0.9 < bounds["p"] < 1) if is_shared else math.isnan(bounds["p"])
        assert torch.isfinite(content["diagnostics"][key]["mse_per_channel"]).all()
    back = read(tmp_path / FILE, pipeline.transformer.config)
    for ours, read_again in zip(found.params.layers, back.layers, strict=True):
        pairs = zip(vars(ours.ranges).values(), vars(read_again.ranges).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def changed(change, tmp_path):
    content = original()
    change(content["params"])
    torch.save(content, tmp_path / FILE)
    return tmp_path / FILE


KEY = "block_chunks.1.module.0.sa.v.cache"


def flatten(params):
    one = params.pop(KEY)
    params[f"[{KEY}]"] = {name: tensor.flatten() for name, tensor in one.items()}


def test_other_spellings_of_the_original_are_read(tmp_path):
    """A row of all channels, head after head, and a key in brackets."""
    ours, theirs = read(changed(flatten, tmp_path), CONFIG), read(GOLDEN, CONFIG)
    assert torch.equal(ours.layers[1].ranges.v_scale_HD, theirs.layers[1].ranges.v_scale_HD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params.pop(KEY), r"layer 1 v_scale_HD is nothing, expected \[2, 64\]"),
        (lambda params: params[KEY].pop("zero_point"), "layer 1 v_zero_point_HD is nothing"),
        (lambda params: params[KEY]["scale"].fill_(math.nan), "layer 1 v_scale_HD holds values"),
        (lambda params: params[KEY].update(scale=torch.ones(3)), r"layer 1 v_scale_HD is \[3\]"),
        (lambda params: params.update({"blocks.9.k": {}}), "holds blocks.9.k, which a model of 2"),
    ],
)
def test_files_that_cannot_be_are_refused_by_layer(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read(changed(change, tmp_path), CONFIG)


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="layer 0 k_scale_HD is"):
        read(GOLDEN, tiny_config().transformer)
    with pytest.raises(ValueError, match="layer 0 k_scale_HD is"):
        read(GOLDEN, replace(CONFIG, num_heads=4))
    (tmp_path / FILE).write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"not a readable kv_quant_calib\.pt"):
        read(tmp_path / FILE, CONFIG)
    torch.save([1], tmp_path / FILE)
    with pytest.raises(ValueError, match="holds no params"):
        read(tmp_path / FILE, CONFIG)
    assert tiny_pipeline().kv_params is None
