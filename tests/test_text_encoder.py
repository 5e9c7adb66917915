"""The text encoder in fewer bits, its exact size, and random ones of a real shape."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from var_compressor.evaluation.agreement import bit_agreement
from var_compressor.layers.weight_only import WeightOnly, weight_only
from var_compressor.models.config import MODELS
from var_compressor.models.convert import WriteOptions, init_random, num_bytes
from var_compressor.models.directory import text_encoder_shape
from var_compressor.models.sampling import Sampling
from var_compressor.models.text_encoder import FLAN_T5_XL, T5Shape, TextEncoder
from var_compressor.pipeline import InfinityPipeline

PROMPTS = ["a large red metal cube on a wooden floor.", "a small blue sphere."]


@pytest.fixture(scope="module")
def full() -> InfinityPipeline:
    return InfinityPipeline.from_pretrained("infinity-tiny", dtype=torch.float32)


def encoder_like(t5: TextEncoder, nbits: int, dtype=torch.float32, cache_dir=None) -> TextEncoder:
    return TextEncoder(
        t5.encoder_dir,
        t5.tokenizer_dir,
        max_length=64,
        dtype=dtype,
        device="cpu",
        cache_dir=cache_dir,
        coded=weight_only(nbits),
    )


@pytest.mark.parametrize(("nbits", "snr_db", "same_bit"), [(8, 40, 0.998), (4, 19, 0.98)])
def test_coded_features_are_near_and_draw_the_same_bits(full, nbits, snr_db, same_bit):
    wanted = full.encode(PROMPTS)
    found = encoder_like(full.text_encoder, nbits).encode(PROMPTS)
    noise = (found.packed_TE - wanted.packed_TE).square().sum()
    assert 10 * torch.log10(wanted.packed_TE.square().sum() / noise) > snr_db
    schedule = full.schedule_for(1.0, None)
    drawn = full.draw(wanted, schedule, seed=0, sampling=Sampling(), with_trace=True)
    coded = InfinityPipeline(full.transformer, full.vae, None)
    coded.encode = lambda prompts: found
    agreement = bit_agreement(full, coded, wanted, drawn.trace.bits, cfg=3.0)
    assert 1 > agreement.mean_same_bit > same_bit


@pytest.mark.parametrize("nbits", [8, 4])
def test_a_coded_linear_multiplies_by_its_codes_times_scales(nbits):
    weight_NK = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    linear = WeightOnly(nbits).linear(weight_NK)
    groups = 1 if nbits == 8 else 2
    assert linear.wscales.shape == (24, groups)
    step_NK = linear.wscales.float().repeat_interleave(128 // groups, 1)
    restored_NK = linear.expanded(torch.float32)
    # half a step, and what bf16 scales take off the outermost code
    assert ((restored_NK - weight_NK).abs() <= step_NK * (0.5 + 2**-8 * 127)).all()
    codes_NK = restored_NK.double() / step_NK.double()
    assert torch.equal(codes_NK, codes_NK.round())
    # the product of a code and a bf16 scale is rounded once
    assert torch.equal(linear.expanded(torch.bfloat16), restored_NK.bfloat16())
    x_MK = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear(x_MK), x_MK @ restored_NK.T)


def test_coded_and_plain_features_are_cached_apart(full, tmp_path):
    features = [
        encoder_like(full.text_encoder, nbits, cache_dir=tmp_path).encode(PROMPTS[:1]).packed_TE
        for nbits in (16, 8, 4)
    ]
    assert len(list(tmp_path.iterdir())) == 3
    again = encoder_like(full.text_encoder, 4, cache_dir=tmp_path)
    assert torch.equal(again.encode(PROMPTS[:1]).packed_TE, features[2])
    assert not again.is_loaded


def test_the_pipeline_takes_the_bits_and_refuses_others():
    opened = InfinityPipeline.from_pretrained("infinity-tiny", text_encoder_bits=4)
    assert opened.text_encoder.nbits == 4
    features_TE = opened.encode(PROMPTS).packed_TE
    assert features_TE.isfinite().all()
    with pytest.raises(ValueError, match="a text encoder of 5 bits"):
        InfinityPipeline.from_pretrained("infinity-tiny", text_encoder_bits=5)


@pytest.mark.parametrize("nbits", [16, 8, 4])
def test_the_size_is_known_before_anything_is_read(full, nbits):
    shape = text_encoder_shape("infinity-tiny")
    encoder = encoder_like(full.text_encoder, nbits, torch.bfloat16).load()
    assert shape.num_bytes(nbits) == encoder.num_bytes


def test_flan_t5_xl_has_the_tensors_of_transformers():
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**FLAN_T5_XL.to_config()))
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if "embed_tok" not in n}
    assert expected == FLAN_T5_XL.others() | FLAN_T5_XL.linears()
    # as published: 1.22 billion
    assert FLAN_T5_XL.num_values == 1_223_527_424


def test_a_random_text_encoder_is_read_like_any_other(tmp_path, monkeypatch):
    gated = T5Shape(200, 64, 16, 128, 2, 4, is_gated=True)
    monkeypatch.setattr("var_compressor.models.convert.text_encoder_shape", lambda name: gated)
    tiny = MODELS["infinity-tiny"]
    config = replace(tiny, transformer=replace(tiny.transformer, depth=1))
    written = []
    options = WriteOptions(
        torch.bfloat16, max_shard_bytes=2**16, on_tensor=lambda name, size: written.append(size)
    )
    parts = {"with_vae": True, "with_text_encoder": True}
    init_random(config, tmp_path / "model", seed=0, **parts, options=options)
    assert sum(written) == num_bytes(config, torch.bfloat16, **parts)
    encoder_dir = tmp_path / "model/text_encoder"
    assert T5Shape.of_config(json.loads((encoder_dir / "config.json").read_text()), "") == gated
    assert len(list(encoder_dir.glob("model-*.safetensors"))) > 1
    for bits in (16, 4):
        pipeline = InfinityPipeline.from_pretrained(tmp_path / "model", text_encoder_bits=bits)
        features = pipeline.encode(["a red cube", "a cone"])
        assert features.packed_TE.isfinite().all()
        # normalised, and of different tokens
        assert 0.5 < features.packed_TE.std() < 2
        assert not torch.allclose(features.packed_TE[0], features.packed_TE[1], atol=0.1)


def test_another_models_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    with pytest.raises(ValueError, match=r"config.json: not the config of a T5 encoder"):
        text_encoder_shape(str(tmp_path))
