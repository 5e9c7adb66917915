"""A model as small as one can be that still draws: for hundreds of images in a few seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tiny import make_t5, tiny_config
from var_compressor.models.directory import meta_transformer, meta_vae
from var_compressor.models.random_init import random_tensors
from var_compressor.models.text_encoder import TextEncoder
from var_compressor.pipeline import InfinityPipeline


def make_smallest(folder: Path) -> Path:
    """A model directory with its text encoder, which knows the words a, red and cat."""
    config = tiny_config()
    models = (
        meta_transformer(
            replace(config.transformer, depth=1, embed_dim=64, num_chunks=1), torch.float32
        ),
        meta_vae(
            replace(
                config.vae, stride=4, base_channels=2, channel_mult=(1, 1, 1), num_norm_groups=1
            ),
            torch.float32,
        ),
    )
    for model in models:
        model.load_state_dict(dict(random_tensors(model, seed=0)), assign=True)
        model.requires_grad_(False).eval()
    t5 = make_t5(folder.with_name(f"{folder.name}-t5"))
    encoder = TextEncoder(t5, t5, max_length=16, dtype=torch.float32, device="cpu")
    InfinityPipeline(*models, encoder).save_pretrained(folder)
    return folder
