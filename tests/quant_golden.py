"""Tensors recorded from the original implementation; golden/README.md says what each file holds."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def load_golden(name: str) -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "golden" / "quant" / f"{name}.safetensors")


def joined(tensors: dict[str, Tensor], name: str, *, dim: int = 0) -> Tensor:
    """The numbered pieces `name.0`, `name.1`, ... in one tensor."""
    count = sum(key.startswith(f"{name}.") for key in tensors)
    return torch.cat([tensors[f"{name}.{i}"] for i in range(count)], dim=dim)


def tokens(tensors: dict[str, Tensor]) -> Tensor:
    """All recorded inputs `x.0`, `x.1`, ... as one [tokens, channels] matrix."""
    count = sum(key.startswith("x.") for key in tensors)
    return torch.cat([tensors[f"x.{i}"].flatten(0, 1) for i in range(count)])
