"""Random models small enough for a test, and the recorded golden cases.

`golden/case_*`: tensors recorded while the original Infinity implementation ran on a CPU (float32,
torch 2.13.0); `golden/manifests`: tensor names, schedules and rotary positions of the originals.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from var_compressor.models.config import InfinityConfig, ModelConfig, VAEConfig
from var_compressor.models.directory import meta_transformer, meta_vae
from var_compressor.models.random_init import random_tensors
from var_compressor.models.sampling import Sampling
from var_compressor.models.text_encoder import TextEncoder
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.recording import Collection
from var_compressor.spec import CalibrationSpec, LowRankSpec, QuantSpec, SmoothSpec

GOLDEN = Path(__file__).parent / "golden"
MANIFESTS = GOLDEN / "manifests"
TEXT_CHANNELS = 128

# the shortest search that still does every step
QUICK_SPEC = QuantSpec(
    low_rank=LowRankSpec(rank=8, max_iters=2),
    smooth=SmoothSpec(num_grids=3),
    calibration=CalibrationSpec(max_tokens_per_level=64, max_attention_tokens=600),
)
COLLECTION = Collection({"0": "a red cat", "1": "a cat"}, 3, Sampling(cfg=2.0, tau=0.7))


def tiny_config(*, patchify: bool = False, num_chunks: int = 3) -> ModelConfig:
    transformer = InfinityConfig(
        depth=3,
        embed_dim=64,
        num_heads=2,
        num_chunks=num_chunks,
        bits_per_token=16 if patchify else 8,
        patchify=patchify,
        text_channels=TEXT_CHANNELS,
        text_maxlen=16,
        pixel_budget="0.06M",
    )
    vae = VAEConfig(
        code_dim=transformer.code_dim,
        stride=8 if patchify else 16,
        base_channels=8,
        channel_mult=(1, 2, 1, 1) if patchify else (1, 2, 1, 1, 1),
        num_res_blocks=1,
        num_norm_groups=4,
    )
    return ModelConfig(transformer, vae, "nowhere/t5")


def tiny_pipeline(
    *, patchify: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> InfinityPipeline:
    """A random pipeline without a text encoder."""
    config = tiny_config(patchify=patchify)
    models = (meta_transformer(config.transformer, dtype), meta_vae(config.vae, dtype))
    for model in models:
        model.load_state_dict(dict(random_tensors(model, seed=seed)), assign=True)
        model.requires_grad_(False).eval()
    return InfinityPipeline(*models, None)


def random_text(lens: Sequence[int], *, seed: int = 0) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    return TextFeatures(torch.randn(sum(lens), TEXT_CHANNELS, generator=generator), tuple(lens))


def make_t5(folder: Path) -> Path:
    """A random T5 encoder and a tokenizer that knows three words, in one Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=12, d_model=128, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "cat"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    return folder


def make_model(folder: Path) -> Path:
    """A model directory with a random transformer, VAE and text encoder."""
    t5 = make_t5(folder.with_name(f"{folder.name}-t5"))
    pipeline = tiny_pipeline()
    pipeline.text_encoder = TextEncoder(t5, t5, max_length=16, dtype=torch.float32, device="cpu")
    pipeline.save_pretrained(folder)
    return folder


def golden_config(case: str) -> tuple[ModelConfig, dict[str, Any]]:
    """Our config of a golden case, and everything its config.json says."""
    recorded = json.loads((GOLDEN / case / "config.json").read_text())
    model, vae = recorded["model"], recorded["vae"]
    transformer = InfinityConfig(
        depth=model["depth"],
        embed_dim=model["embed_dim"],
        num_heads=model["num_heads"],
        num_chunks=model["block_chunks"],
        bits_per_token=model["d_vae"],
        patchify=bool(model["apply_spatial_patchify"]),
        text_channels=model["text_channels"],
        pixel_budget=recorded["schedule"]["pn"],
    )
    vae_config = VAEConfig(
        code_dim=vae["codebook_dim"],
        stride=vae["patch_size"],
        base_channels=vae["base_ch"],
        channel_mult=tuple(vae["ch_mult"]),
        num_res_blocks=vae["num_res_blocks"],
        num_norm_groups=vae["group_norm_groups"],
    )
    return ModelConfig(transformer, vae_config, ""), recorded


def golden_pipeline(case: str, dtype: torch.dtype) -> tuple[InfinityPipeline, TextFeatures]:
    pipeline = InfinityPipeline.from_official(
        golden_config(case)[0],
        transformer=GOLDEN / case / "weights.safetensors",
        vae=GOLDEN / case / "vae.safetensors",
        text_encoder=None,
        dtype=dtype,
    )
    inputs = load_file(GOLDEN / case / "inputs.safetensors")
    return pipeline, TextFeatures(inputs["kv_compact"], tuple(inputs["lens"].tolist()))
