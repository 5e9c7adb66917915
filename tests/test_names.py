"""Names, shapes, sizes, schedules and positions are those of the originals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tiny import MANIFESTS
from var_compressor.models.checkpoint import to_official, transformer_names, vae_names
from var_compressor.models.config import MODELS, config_from_dict, config_to_dict
from var_compressor.models.directory import meta_transformer, meta_vae
from var_compressor.models.schedule import Schedule

# name -> parameters of the whole transformer and of one block, without the zero key biases
NUM_PARAMETERS = {
    "infinity-2b": (2_204_564_032, 67_147_792),
    "infinity-8b": (8_375_791_824, 205_589_020),
    "infinity-layer12": (125_148_800, 9_451_784),
    "infinity-layer16": (361_578_464, 21_255_564),
    "infinity-layer24": (940_871_072, 37_777_936),
    "infinity-layer32": (2_256_595_040, 68_729_332),
    "infinity-layer40": (4_716_292_832, 115_656_600),
    "infinity-layer48": (8_767_037_216, 179_837_180),
}
VAE_PARAMETERS = {"infinity-2b": 110_118_051, "infinity-8b": 81_624_209}
DERIVED = ("quantizer.lfq.mask", "quantize.lfq.mask")


def manifest(name):
    recorded = json.loads((MANIFESTS / f"manifest_{name}.json").read_text())
    return {key: shape for key, (shape, _) in recorded.items() if key not in DERIVED}


@pytest.mark.parametrize("name", ["infinity-2b", "infinity-8b", "infinity-layer12"])
def test_transformer_names_and_shapes(name):
    model = meta_transformer(MODELS[name].transformer, torch.float32)
    names = transformer_names(model.config)
    assert names.keys() == model.state_dict().keys()
    official = {key: list(t.shape) for key, t in to_official(model.state_dict(), names)}
    assert official == manifest(name.replace("-", "_"))


@pytest.mark.parametrize(("name", "file"), [("infinity-2b", "d32"), ("infinity-8b", "d56_f8_14")])
def test_vae_names_and_shapes(name, file):
    model = meta_vae(MODELS[name].vae, torch.float32)
    official = {k: list(t.shape) for k, t in to_official(model.state_dict(), vae_names(model))}
    assert official == manifest(f"vae_{file}")
    assert sum(t.numel() for t in model.parameters()) == VAE_PARAMETERS[name]


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_parameter_totals(name):
    model = meta_transformer(MODELS[name].transformer, torch.float32)

    def count(module):
        official = {}
        names = transformer_names(model.config)
        for key, tensor in to_official(module, {k: names[k] for k in module}):
            official[key] = 0 if key.endswith("zero_k_bias") else tensor.numel()
        return sum(official.values())

    state = model.state_dict()
    block = {key: value for key, value in state.items() if key.startswith("blocks.0.")}
    assert (count(state), count(block)) == NUM_PARAMETERS[name]


def test_every_schedule():
    recorded = json.loads((MANIFESTS / "scale_schedules.json").read_text())
    assert len(recorded) == 15
    for ratio, budgets in recorded.items():
        for budget, expected in budgets.items():
            schedule = Schedule.of(float(ratio), budget)
            grids = [[level.height, level.width] for level in schedule.levels]
            assert grids == expected["scales_hw"], (ratio, budget)
            assert [level.offset for level in schedule.levels] == expected["offsets"]
            assert schedule.num_tokens == expected["tokens"]
            assert list(schedule.image_size) == expected["pixel_hw"]


def test_rotary_positions_of_every_ratio():
    recorded = load_file(MANIFESTS / "rope_indices.safetensors")
    assert len(recorded) == 15
    for ratio, positions in recorded.items():
        ours = Schedule.of(float(ratio), "1M").token_positions()
        assert torch.equal(ours, positions.long()), ratio


@pytest.mark.parametrize("name", MODELS)
def test_configs_survive_json(name):
    for config in (MODELS[name].transformer, MODELS[name].vae):
        values = json.loads(json.dumps(config_to_dict(config)))
        assert config_from_dict(type(config), values, "here") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": "32"}, "depth is '32'"),
        ({"depth": True}, "depth is True"),
        ({"embed_dim": 10**9}, "embed_dim is 1000000000"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"colour": 1}, "unknown keys \\['colour'\\]"),
        ({"pixel_budget": "9M"}, "pixel_budget is '9M'"),
    ],
)
def test_a_bad_config_names_the_key(change, message):
    config = MODELS["infinity-2b"].transformer
    with pytest.raises(ValueError, match=message):
        config_from_dict(type(config), config_to_dict(config) | change, "config.json")
