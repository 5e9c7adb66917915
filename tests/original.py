"""The original's `.pt` files of one block, as it wrote them, and the model they were made of."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tinyptq
from var_compressor.interop.kv_quant_calib import FILE as KV_FILE
from var_compressor.interop.original import MODEL, patched_names
from var_compressor.models.checkpoint import block_name
from var_compressor.models.config import VAEConfig
from var_compressor.models.directory import meta_transformer, meta_vae
from var_compressor.models.random_init import random_tensors
from var_compressor.pipeline import InfinityPipeline

GOLDEN = Path(__file__).parent / "golden" / "quant"
CONFIG = replace(tinyptq.CONFIG, depth=1, num_chunks=1, text_maxlen=16, pixel_budget="0.06M")
BLOCK = block_name(CONFIG, 0)
VAE = VAEConfig(
    code_dim=16, base_channels=8, channel_mult=(1, 2, 1, 1, 1), num_res_blocks=1, num_norm_groups=4
)


def write_base(folder: Path) -> Path:
    """A model directory: the recorded block, everything else random."""
    transformer = meta_transformer(CONFIG, torch.float32)
    transformer.load_state_dict(dict(random_tensors(transformer, seed=0)), assign=True)
    transformer.blocks[0] = tinyptq.original_block(tinyptq.load_tensors())
    vae = meta_vae(VAE, torch.float32)
    vae.load_state_dict(dict(random_tensors(vae, seed=0)), assign=True)
    InfinityPipeline(transformer.eval(), vae.eval(), None).save_pretrained(folder)
    return folder


def write_original(folder: Path) -> Path:
    """What the original wrote of that block; model.pt also gets what is around blocks."""
    folder.mkdir()
    with tarfile.open(GOLDEN / "original_block_a.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    transformer = meta_transformer(CONFIG, torch.float32)
    around = dict(random_tensors(transformer, seed=0))
    names = patched_names(CONFIG)
    outside = {
        part: piece.clone()
        for ours, tensor in around.items()
        if not ours.startswith("blocks.")
        for part, piece in zip(names[ours], tensor.chunk(len(names[ours])), strict=True)
    }
    change(folder / MODEL, lambda content: content.update(outside))
    kv = torch.load(GOLDEN / KV_FILE, weights_only=True)
    kept = {group: {k: v for k, v in kv[group].items() if BLOCK in k} for group in kv}
    torch.save(kept, folder / KV_FILE)
    return folder


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Load, edit, save again."""
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)
