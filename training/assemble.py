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
from var_compressor.models.directory import (
    ModelIndex,
    new_directory,
    write_component,
    write_index,
    write_text_encoder,
)


def bf16_tensors(folder: Path, pattern: str) -> list[tuple[str, torch.Tensor]]:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        state |= load_file(path)
    return [(name, tensor.bfloat16()) for name, tensor in state.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--reader", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    config = MODELS["infinity-tiny"]
    metrics = {
        part: json.loads((folder / "metrics.json").read_text())
        for part, folder in (("vae", args.vae), ("transformer", args.transformer))
    }
    provenance = {
        "trained_by": "training/README.md",
        "vae_test": metrics["vae"]["metrics"]["test"],
        "transformer_test": metrics["transformer"]["test"],
    }
    with new_directory(args.out, overwrite=True) as folder:
        for name, part_config, tensors in (
            (
                "transformer",
                config.transformer,
                bf16_tensors(args.transformer, "transformer*.safetensors"),
            ),
            ("vae", config.vae, bf16_tensors(args.vae, "model*.safetensors")),
        ):
            write_component(folder / name, part_config, tensors, max_shard_bytes=MAX_FILE_BYTES)
        write_text_encoder(
            folder, str(args.transformer / "text_encoder"), str(args.transformer / "tokenizer")
        )
        shutil.copytree(args.reader, folder / "reader")
        write_index(folder, ModelIndex(True, "", provenance))


if __name__ == "__main__":
    main()
