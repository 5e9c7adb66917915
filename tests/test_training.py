"""The training scripts teach what they say, and what they made is what the package ships."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import var_compressor
from var_compressor.evaluation.captions import VOCABULARY, tokenize
from var_compressor.evaluation.scenes import Relation, SceneTruth, TrueObject
from var_compressor.models.bits import Pyramid, quantize_latent, teacher_inputs
from var_compressor.models.config import MODELS
from var_compressor.pipeline import InfinityPipeline

TRAINING = Path(__file__).parents[1] / "training"
ASSETS = Path(var_compressor.__file__).parent / "assets"
MODEL = ASSETS / "infinity-tiny"
MIB = 2**20

if not TRAINING.is_dir():
    pytest.skip("the training scripts come with a checkout only", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(TRAINING))
    yield
    sys.path.remove(str(TRAINING))


def _thing(shape, color, material, size):
    return TrueObject(shape, color, material, size, (0.0, 0.0), 30.0)


# a small red matte sphere left of a large blue metal cube
SPHERE, CUBE = _thing(0, 0, 0, 0), _thing(1, 5, 1, 1)
TWO = SceneTruth(0, (SPHERE, CUBE), 0, (Relation(0, "left", 1),))
LEFT, RIGHT, NONE = 0, 1, 4


@pytest.mark.parametrize(
    "caption, expected",
    [
        (
            "a small red matte sphere is left of a large blue metal cube on wooden boards.",
            [("sphere", [0, 0, 0, 0, 2, NONE, LEFT]), ("cube", [1, 5, 1, 1, 2, RIGHT, NONE])],
        ),
        (
            "a huge metallic blue block is right of a tiny dull crimson ball on wooden boards.",
            [("block", [1, 5, 1, 1, 2, NONE, RIGHT]), ("ball", [0, 0, 0, 0, 2, LEFT, NONE])],
        ),
        (
            "a small red matte ball and a large blue shiny metal cube on a beach. "
            "the red matte ball is left of the blue metal block.",
            [
                ("ball", [0, 0, 0, 0, 2, NONE, LEFT]),
                ("cube", [1, 5, 1, 1, 2, RIGHT, NONE]),
                ("ball", [0, 0, 0, 0, 2, NONE, LEFT]),
                ("block", [1, 5, 1, 1, 2, RIGHT, NONE]),
            ],
        ),
    ],
)
def test_nouns_are_labelled_by_order_of_mention(caption, expected):
    from text import noun_targets

    words = tokenize(caption)
    found = [(words[position], classes) for position, classes in noun_targets(caption, TWO)]
    assert found == expected


def test_levels_weigh_the_same():
    from transformer import SCHEDULE, level_weights

    weight_L = level_weights("cpu")
    assert weight_L.sum().item() == pytest.approx(1)
    for level in SCHEDULE.levels:
        share = weight_L[level.offset : level.end].sum().item()
        assert share == pytest.approx(1 / len(SCHEDULE.levels), rel=1e-5)


def _latents():
    config = MODELS["infinity-tiny"].vae
    return torch.randn(3, config.code_dim, 16, 16, generator=torch.Generator().manual_seed(5))


def test_without_flips_self_correction_is_quantization(monkeypatch):
    import transformer

    monkeypatch.setattr(transformer, "MAX_FLIP", 0.0)
    latent_BDYX, schedule = _latents(), transformer.SCHEDULE
    bits, _ = quantize_latent(latent_BDYX, schedule, patchify=False)
    pyramid = Pyramid(
        schedule, code_dim=latent_BDYX.shape[1], patchify=False, batch=3, device="cpu"
    )
    targets_BLQ, tokens_BLQ = transformer.self_corrected(latent_BDYX)
    assert torch.equal(targets_BLQ, torch.cat(bits, dim=1))
    assert torch.equal(tokens_BLQ, teacher_inputs(bits, pyramid))


def test_later_levels_correct_flips():
    import transformer

    latent_BDYX, schedule = _latents(), transformer.SCHEDULE
    torch.manual_seed(0)
    flipped_BLQ, _ = transformer.self_corrected(latent_BDYX)
    plain_BLQ = torch.cat(quantize_latent(latent_BDYX, schedule, patchify=False)[0], dim=1)
    first = schedule.levels[0].end
    assert torch.equal(flipped_BLQ[:, :first], plain_BLQ[:, :first])
    assert not torch.equal(flipped_BLQ[:, first:], plain_BLQ[:, first:])


def test_assembled_directory_opens_and_keeps_its_card(tmp_path):
    from assemble import assemble

    vae, transformer, out = tmp_path / "vae", tmp_path / "transformer", tmp_path / "model"
    vae.mkdir()
    shutil.copyfile(MODEL / "vae/diffusion_pytorch_model.safetensors", vae / "model.safetensors")
    (vae / "metrics.json").write_text(json.dumps({"metrics": {"test": {"psnr_db": 1.5}}}))
    transformer.mkdir()
    for i, shard in enumerate(sorted((MODEL / "transformer").glob("*.safetensors")), 1):
        shutil.copyfile(shard, transformer / f"transformer-{i}.safetensors")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(MODEL / name, transformer / name)
    (transformer / "metrics.json").write_text(json.dumps({"test": {"captions": 7}}))
    parts = {"vae": vae, "transformer": transformer, "reader": MODEL / "reader", "out": out}
    assemble(**parts)
    (out / "README.md").write_text("card\n")
    assemble(**parts)
    assert (out / "README.md").read_text() == "card\n"
    assert json.loads((out / "model_index.json").read_text())["provenance"]["vae_test"] == {
        "psnr_db": 1.5
    }
    ours, shipped = (InfinityPipeline.from_pretrained(source) for source in (out, MODEL))
    for name, tensor in shipped.transformer.state_dict().items():
        assert torch.equal(tensor, ours.transformer.state_dict()[name]), name


def test_shipped_tokenizer_is_the_one_that_is_built():
    from text import build_tokenizer
    from transformers import AutoTokenizer

    built, shipped = build_tokenizer(), AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    assert shipped.get_vocab() == built.get_vocab()
    for word in VOCABULARY:
        ids = shipped(word).input_ids
        assert ids == built(word).input_ids == [built.get_vocab()[word], built.eos_token_id]
    assert shipped("a Zebra.").input_ids[1] == shipped.unk_token_id


def test_shipped_files_are_small():
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    assert max(sizes.values()) <= 16 * MIB, max(sizes, key=sizes.__getitem__)
    assert sum(sizes.values()) <= 40 * MIB
