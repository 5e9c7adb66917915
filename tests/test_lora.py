"""Adapters act as merged weights do, come off without a trace, and foreign ones are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tiny import random_text, tiny_pipeline
from var_compressor.cli import app
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.layers.nunchaku_linear import NunchakuLinear
from var_compressor.models.tensor_files import CheckpointError
from var_compressor.pipeline import InfinityPipeline

RANK = 4
TEXT = random_text([3, 5])
# ours -> (official, N, K) of the tiny model
TARGETS = {
    "blocks.0.self_attn.qkv": ("block_chunks.0.module.0.sa.mat_qkv", 192, 64),
    "blocks.1.cross_attn.q": ("block_chunks.1.module.0.ca.mat_q", 64, 64),
    "blocks.2.ffn.fc2": ("block_chunks.2.module.0.ffn.fc2", 64, 256),
    "head_proj": ("head", 16, 64),
}


def factors(seed=0, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    return {
        ours: (
            torch.randn(RANK, K, generator=generator) * size,
            torch.randn(N, RANK, generator=generator) * size,
        )
        for ours, (_, N, K) in TARGETS.items()
    }


def write(path, *, seed=0, prefix="", names=None, sides=("lora_A", "lora_B"), **extra):
    tensors = {}
    for ours, (down_RK, up_NR) in factors(seed).items():
        module = prefix + (names(ours) if names else ours)
        tensors[f"{module}.{sides[0]}.weight"] = down_RK
        tensors[f"{module}.{sides[1]}.weight"] = up_NR
    save_file(tensors | extra, path)
    return path


def logits_of(pipeline):
    schedule = pipeline.schedule_for(1.0, None)
    generator = torch.Generator().manual_seed(1)
    shape = pipeline.transformer.config.bits_per_token
    bits = [
        torch.randint(0, 2, (2, level.num_tokens, shape), generator=generator, dtype=torch.uint8)
        for level in schedule.levels
    ]
    return torch.cat(pipeline.teacher_logits(TEXT, bits, cfg=2.0), dim=1)


def merged_pipeline(*pairs):
    """A full-precision pipeline whose weights hold (seed, strength) adapters."""
    pipeline = tiny_pipeline()
    for seed, strength in pairs:
        for ours, (down_RK, up_NR) in factors(seed).items():
            pipeline.transformer.get_submodule(ours).weight.data += strength * up_NR @ down_RK
    return pipeline


@pytest.fixture
def adapter(tmp_path):
    return write(tmp_path / "lora.safetensors")


def test_full_precision_equals_merging(adapter):
    pipeline = tiny_pipeline()
    before = logits_of(pipeline)
    pipeline.load_lora(adapter, scale=0.5)
    after = logits_of(pipeline)
    torch.testing.assert_close(after, logits_of(merged_pipeline((0, 0.5))), rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 0.1
    pipeline.unload_lora()
    assert torch.equal(logits_of(pipeline), before)


def test_several_add_up_and_come_off_one_by_one(tmp_path, adapter):
    pipeline = tiny_pipeline()
    pipeline.load_lora(adapter, name="a")
    alone = logits_of(pipeline)
    pipeline.load_lora(write(tmp_path / "b.safetensors", seed=1), name="b", scale=2.0)
    pipeline.set_lora_scale("b", -0.7)
    both = logits_of(merged_pipeline((0, 1.0), (1, -0.7)))
    torch.testing.assert_close(logits_of(pipeline), both, rtol=1e-5, atol=1e-5)
    pipeline.set_lora_scale("b", 0)
    assert torch.equal(logits_of(pipeline), alone)
    pipeline.unload_lora("a")
    pipeline.unload_lora("b")
    assert torch.equal(logits_of(pipeline), logits_of(tiny_pipeline()))


@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", ""])
def test_official_names_and_prefixes(tmp_path, adapter, prefix):
    plain, spelt = tiny_pipeline(), tiny_pipeline()
    plain.load_lora(adapter)
    file = write(
        tmp_path / "official.safetensors",
        prefix=prefix,
        names=lambda ours: TARGETS[ours][0],
        sides=("lora_down", "lora_up"),
    )
    spelt.load_lora(file)
    assert torch.equal(logits_of(plain), logits_of(spelt))


def test_alpha_of_a_tensor_a_folder_and_a_header(tmp_path, adapter):
    wanted = tiny_pipeline()
    wanted.load_lora(adapter, scale=8 / RANK)
    each = {f"{ours}.alpha": torch.tensor(8.0) for ours in TARGETS}
    by_tensor = write(tmp_path / "alpha.safetensors", **each)
    folder = tmp_path / "peft"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", sides=("lora_A.default", "lora_B.default"))
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": RANK}))
    by_header = tmp_path / "header.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    save_file(load_file(adapter), by_header, metadata)
    for source in (by_tensor, folder, by_header):
        pipeline = tiny_pipeline()
        pipeline.load_lora(source)
        torch.testing.assert_close(logits_of(pipeline), logits_of(wanted), rtol=1e-5, atol=1e-5)


# --- compressed -----------------------------------------------------------------------------------


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_compressed_linears_add_the_update_to_their_inputs_product(artifact_dir, adapter):
    """Beside rounding of the branch to bf16, whatever smoothing and shift the linear has."""
    plain = InfinityPipeline.from_pretrained(artifact_dir, dtype=torch.float32)
    adapted = InfinityPipeline.from_pretrained(
        artifact_dir, dtype=torch.float32, lora=[(adapter, 1.5)]
    )
    seen = set()
    for ours, (down_RK, up_NR) in factors().items():
        linear = plain.transformer.get_submodule(ours)
        if not isinstance(linear, QuantizedLinear):
            continue
        seen.add(linear.shift != 0)
        assert torch.equal(linear.qweight, adapted.transformer.get_submodule(ours).qweight)
        x_MK = torch.randn(7, down_RK.shape[1], generator=torch.Generator().manual_seed(3))
        x_MK = torch.nn.functional.gelu(x_MK)
        update_MN = adapted.transformer.get_submodule(ours)(x_MK) - linear(x_MK)
        assert distance(update_MN, 1.5 * x_MK @ down_RK.T @ up_NR.T) < 0.01, ours
    assert any(seen), "no linear with shifted inputs was tried"


def test_compressed_equals_merged_within_its_noise(artifact_dir, adapter):
    compressed = InfinityPipeline.from_pretrained(artifact_dir, dtype=torch.float32)
    before = logits_of(compressed)
    noise = distance(before, logits_of(tiny_pipeline()))
    compressed.load_lora(adapter)
    after, wanted = logits_of(compressed), logits_of(merged_pipeline((0, 1.0)))
    assert distance(after, wanted) < 1.5 * noise
    assert distance(before, wanted) > 3 * distance(after, wanted)
    compressed.unload_lora()
    assert torch.equal(logits_of(compressed), before)


# --- refusals -------------------------------------------------------------------------------------


def refused(path, pattern):
    pipeline = tiny_pipeline()
    with pytest.raises(CheckpointError, match=pattern) as caught:
        pipeline.load_lora(path)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits_of(pipeline), logits_of(tiny_pipeline()))


def test_files_that_do_not_fit_are_refused_by_name_and_shape(tmp_path, adapter):
    path, good = tmp_path / "bad.safetensors", load_file(adapter)

    def changed(**tensors):
        save_file({k: v for k, v in (good | tensors).items() if v is not None}, path)
        return path

    A, B = "head_proj.lora_A.weight", "head_proj.lora_B.weight"
    refused(changed(**{A: torch.ones(4, 65)}), r"head_proj.lora_A.weight \[4, 65\].*\[16, 64\]")
    refused(changed(**{B: torch.ones(16, 5)}), r"lora_B.weight \[16, 5\]")
    refused(changed(**{A: None}), r"head_proj.lora_B.weight has no lora_A")
    refused(changed(**{A: torch.full((4, 64), torch.nan)}), "not finite")
    refused(changed(**{A: torch.ones(4, 64, dtype=torch.int8)}), "is int8")
    refused(changed(**{"head_proj.alpha": torch.ones(2)}), r"alpha has shape \[2\]")
    refused(changed(**{"head_proj.alpha": torch.tensor(torch.inf)}), "far out of range")
    refused(changed(**{"head.lora_A.weight": torch.ones(4, 64)}), "same tensor")
    refused(changed(**{"head_proj.lora_magnitude_vector": torch.ones(4)}), "not a part of a LoRA")
    refused(changed(**{"unet.mid.to_q.lora_A.weight": torch.ones(4, 64)}), "no linear of this")
    refused(changed(**{"level_embed.lora_A.weight": torch.ones(4, 64)}), "no linear of this")
    path.write_bytes(adapter.read_bytes()[:-100])
    refused(path, "not a readable safetensors file")
    save_file({}, path)
    refused(path, "holds no adapter")
    refused(tmp_path / "none.safetensors", "no such file")


def test_a_flipped_bit_in_a_torch_file_does_not_become_a_weight(tmp_path, adapter):
    path = tmp_path / "lora.pt"
    tensors = load_file(adapter)
    torch.save(tensors, path)
    content = bytearray(path.read_bytes())
    first = tensors["head_proj.lora_A.weight"].numpy().tobytes()
    content[content.index(first) + 1] ^= 1
    path.write_bytes(content)
    refused(path, "is damaged")


def test_settings_that_change_the_sum_are_refused(tmp_path, adapter):
    folder = tmp_path / "peft"
    folder.mkdir()
    shutil.copy(adapter, folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    for text, pattern in (
        ('{"use_rslora": "false"}', "use_rslora is 'false', expected true or false"),
        ('{"use_dora": true}', "use_dora"),
        ('{"lora_alpha": "8"}', "lora_alpha is '8'"),
        ('{"lora_alpha": 1%s}' % ("0" * 400), "expected a number"),
        ('{"lora_alpha": NaN}', "expected a number"),
        ("[1]", "not the settings"),
        ("{", "not the settings"),
    ):
        config.write_text(text)
        refused(folder, pattern)


def test_names_scales_and_taken_over_linears(adapter):
    pipeline = tiny_pipeline()
    pipeline.load_lora(adapter, name="a")
    with pytest.raises(ValueError, match="named 'a' already"):
        pipeline.load_lora(adapter, name="a")
    with pytest.raises(ValueError, match="no LoRA is named 'b'; loaded are: 'a'"):
        pipeline.unload_lora("b")
    with pytest.raises(ValueError, match="finite"):
        pipeline.set_lora_scale("a", float("nan"))
    ffn = pipeline.transformer.blocks[0].ffn
    ffn.fc1 = NunchakuLinear(ffn.fc1)
    for change in (
        lambda: pipeline.load_lora(adapter, name="c"),
        lambda: pipeline.set_lora_scale("a", 2.0),
        lambda: pipeline.unload_lora("a"),
    ):
        with pytest.raises(ValueError, match="compute='reference'"):
            change()


def test_generate_takes_adapters(tmp_path, model_dir, adapter):
    plain, drawn = tmp_path / "plain.png", tmp_path / "drawn.png"
    command = ["generate", "a red cat", "--model", str(model_dir), "--dtype", "float32"]
    run = CliRunner().invoke
    assert run(app, [*command, "--out", str(plain)]).exit_code == 0
    with_lora = [*command, "--out", str(drawn), "--lora", str(adapter), "--lora-scale"]
    assert run(app, [*with_lora, "0"]).exit_code == 0
    from PIL import Image

    assert Image.open(plain).tobytes() == Image.open(drawn).tobytes()
    assert run(app, [*with_lora, "1"]).exit_code == 0
    assert Image.open(plain).tobytes() != Image.open(drawn).tobytes()
    found = run(app, [*with_lora, "1", "--lora-scale", "2"])
    assert "2 --lora-scale for 1 --lora" in str(found.exception)
