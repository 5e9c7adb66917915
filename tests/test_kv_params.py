"""What a file says of a KV cache is checked against the model, and comes back as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tiny import tiny_config, tiny_pipeline
from var_compressor.layers.kv_params import (
    CacheFormat,
    CacheParams,
    KVParams,
    LayerParams,
    check_fingerprints,
    fingerprint,
    params_from_tensors,
    params_to_tensors,
)

CONFIG = tiny_config().transformer
INT8, MIXED = CacheFormat("int8", False, 0), CacheFormat("mixed", False, 2)


def some_params(format, *, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shape = (CONFIG.num_heads, CONFIG.head_dim)
    layers = []
    for layer in range(CONFIG.depth):
        scales = [torch.rand(shape, generator=rng) + 0.1 for _ in range(2)]
        zeros = [torch.randint(-999, 999, shape, generator=rng).int() for _ in range(2)]
        ranges = KVParams(scales[0], zeros[0], scales[1], zeros[1])
        nbits, dropped = (8, 8), ((), ())
        if format.name == "mixed":
            nbits, dropped = ((4, 8), ((), (layer, 12)))
        layers.append(LayerParams(nbits, dropped, None if format.dynamic else ranges))
    return CacheParams(format, tuple(layers))


@pytest.mark.parametrize("format", [INT8, MIXED, CacheFormat("int8", True, 0)])
def test_parameters_come_back_as_they_were(format):
    params = some_params(format)
    back = params_from_tensors(params_to_tensors(params), format, CONFIG, "x")
    assert back.format == format
    for ours, theirs in zip(params.layers, back.layers, strict=True):
        assert (ours.nbits, ours.dropped) == (theirs.nbits, theirs.dropped)
        assert (ours.ranges is None) == (theirs.ranges is None) == format.dynamic
        if ours.ranges is not None:
            pairs = zip(vars(ours.ranges).values(), vars(theirs.ranges).values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def put(value):
    def change(tensor):
        tensor[1, 3] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("002.v_scale_HD", put(math.nan), "layer 2 v_scale_HD holds values that are not finite"),
        ("000.k_scale_HD", put(0.0), "layer 0 k_scale_HD holds values that are not finite and pos"),
        ("001.k_scale_HD", put(-1.0), "layer 1 k_scale_HD holds values"),
        ("001.k_scale_HD", put(math.inf), "layer 1 k_scale_HD holds values"),
        (
            "001.v_scale_HD",
            lambda t: t[:, :-1],
            r"layer 1 v_scale_HD is \[2, 31\], expected \[2, 32",
        ),
        ("001.v_scale_HD", lambda t: t[0, 0], r"layer 1 v_scale_HD is \[\]"),
        (
            "001.k_scale_HD",
            lambda t: torch.zeros_like(t).int(),
            "layer 1 k_scale_HD is torch.int32",
        ),
        ("001.k_scale_HD", lambda t: t.double(), "layer 1 k_scale_HD is torch.float64"),
        ("002.k_zero_point_HD", lambda t: t.float(), "layer 2 k_zero_point_HD is torch.float32"),
        ("002.nbits_H", lambda t: t[:1], r"layer 2 nbits_H is \[1\], expected \[2\]"),
        ("001.nbits_H", lambda t: t * 2, r"layer 1 nbits_H holds \[8, 16\], mixed has 4 or 8"),
        ("001.dropped_HS", lambda t: t[:, :7], r"layer 1 dropped_HS is \[2, 7\], expected \[2, 13"),
        ("000.dropped_HS", lambda t: t.int(), "layer 0 dropped_HS is torch.int32, expected torch."),
    ],
)
def test_parameters_that_cannot_be_are_refused_by_layer(name, change, message):
    tensors = params_to_tensors(some_params(MIXED))
    tensors[name] = change(tensors[name].clone())
    with pytest.raises(ValueError, match=f"^here: {message}"):
        params_from_tensors(tensors, MIXED, CONFIG, "here")


def test_missing_and_foreign_parameters_are_named():
    tensors = params_to_tensors(some_params(INT8))
    del tensors["001.v_zero_point_HD"]
    with pytest.raises(ValueError, match="layer 1 v_zero_point_HD is nothing"):
        params_from_tensors(tensors, INT8, CONFIG, "here")
    # as many tensors as there should be, but not those
    with pytest.raises(ValueError, match=r"holds 003\.k_scale_HD, which a model of 3 layers"):
        params_from_tensors(tensors | {"003.k_scale_HD": torch.ones(2, 32)}, INT8, CONFIG, "here")
    dynamic = replace(INT8, dynamic=True)
    with pytest.raises(ValueError, match=r"holds 000\.k_scale_HD, which"):
        params_from_tensors(params_to_tensors(some_params(INT8)), dynamic, CONFIG, "here")


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (None, "kv.format.name is None, expected str"),
        ({"name": "int8", "dynamic": 0, "plain_levels": 0}, "kv.format.dynamic is 0, expected bo"),
        ({"name": "int8", "dynamic": False, "plain_levels": True}, "plain_levels is True, expect"),
        ({"name": "int2", "dynamic": False, "plain_levels": 0}, "'int2', this program reads fp8"),
    ],
)
def test_formats_that_cannot_be_are_refused(format, message):
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        CacheFormat.of({"format": format}, "here: ")


def test_another_models_layers_are_told_apart_in_every_dtype():
    blocks = {
        (seed, dtype): tiny_pipeline(seed=seed, dtype=dtype).transformer.blocks
        for seed in (0, 1)
        for dtype in (torch.float32, torch.bfloat16)
    }
    prints = {key: [fingerprint(block) for block in found] for key, found in blocks.items()}
    assert prints[0, torch.float32] == prints[0, torch.bfloat16]
    assert len({*prints[0, torch.float32], *prints[1, torch.float32]}) == 2 * CONFIG.depth
    mixed = [{"block": one} for one in prints[0, torch.float32]]
    check_fingerprints({"layers": mixed}, blocks[0, torch.bfloat16], "here")
    mixed[2] = {"block": prints[1, torch.float32][2]}
    with pytest.raises(ValueError, match=r"^here: layer 2 is of another model"):
        check_fingerprints({"layers": mixed}, blocks[0, torch.float32], "here")
    for layers in ([], mixed[:2]):
        with pytest.raises(ValueError, match=rf"^here: layer {len(layers)} is of another model"):
            check_fingerprints({"layers": layers}, blocks[0, torch.float32], "here")
