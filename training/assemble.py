"""Put the trained parts together as the model directory that the package ships.

    PYTHONPATH=src python training/assemble.py --vae DIR --transformer DIR --reader DIR \\
        --out src/var_compressor/assets/infinity-tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from loop import MAX_FILE_BYTES
from safetensors.torch import load_file

from var_compressor.models.config import MODELS
from var_compressor.models.directory import ModelIndex
from var_compressor.models.new_directory import (
    new_directory,
    write_component,
    write_index,
    write_text_encoder,
)

CARD = ("README.md", "samples.jpg")  # written by hand; a new model must not erase them


def bf16_tensors(folder: Path, pattern: str) -> list[tuple[str, torch.Tensor]]:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        state |= load_file(path)
    return [(name, tensor.bfloat16()) for name, tensor in state.items()]


def provenance(vae: Path, transformer: Path) -> dict[str, object]:
    """What the records of training say about the parts on test scenes."""
    vae_record, transformer_record = (
        json.loads((folder / "metrics.json").read_text()) for folder in (vae, transformer)
    )
    return {
        "trained_by": "training/README.md",
        "vae_test": vae_record["metrics"]["test"],
        "transformer_test": transformer_record["test"],
    }


def assemble(*, vae: Path, transformer: Path, reader: Path, out: Path) -> None:
    """Write the model directory ``out``; one that is there is replaced, its model card kept."""
    config = MODELS["infinity-tiny"]
    components = (
        ("transformer", config.transformer, bf16_tensors(transformer, "transformer*.safetensors")),
        ("vae", config.vae, bf16_tensors(vae, "model*.safetensors")),
    )
    with new_directory(out, overwrite=True) as folder:
        for name, part, tensors in components:
            write_component(folder / name, part, tensors, max_shard_bytes=MAX_FILE_BYTES)
        write_text_encoder(
            folder, str(transformer / "text_encoder"), str(transformer / "tokenizer")
        )
        shutil.copytree(reader, folder / "reader")
        for name in CARD:
            if (out / name).is_file():
                shutil.copyfile(out / name, folder / name)
        write_index(folder, ModelIndex(True, "", provenance(vae, transformer)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("vae", "transformer", "reader", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    assemble(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
