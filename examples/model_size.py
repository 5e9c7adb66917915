"""A model size of its own: one entry, then everything that takes a model's name takes it.

python examples/model_size.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from var_compressor.footprint import Request
from var_compressor.models.config import MODELS, InfinityConfig, ModelConfig
from var_compressor.models.convert import WriteOptions, init_random, num_bytes
from var_compressor.models.schedule import Schedule
from var_compressor.planning import MemoryPlan, model_shape, plan_memory

MODELS["infinity-mini"] = ModelConfig(
    InfinityConfig(
        depth=6,
        embed_dim=384,
        num_heads=6,
        num_chunks=1,
        bits_per_token=32,
        text_channels=256,
        text_maxlen=64,
        pixel_budget="0.06M",
    ),
    MODELS["infinity-tiny"].vae,
    text_encoder="infinity-tiny",
)


def plan(name: str, *, budget_bytes: int) -> MemoryPlan:
    """How a model of that name fits into a GPU, before any weight exists."""
    shape = model_shape(name)
    schedule = Schedule.of(1.0, shape.transformer.pixel_budget)
    request = Request(schedule, batch=1, prompt_tokens=shape.transformer.text_maxlen)
    return plan_memory(shape, request, budget_bytes=budget_bytes)


def main(out: Path) -> dict[str, float | str]:
    config = MODELS["infinity-mini"]
    init_random(
        config,
        out / "infinity-mini",
        seed=0,
        with_vae=True,
        with_text_encoder=False,
        options=WriteOptions(torch.bfloat16),
    )
    found = plan("infinity-mini", budget_bytes=2**30)
    return {
        "stored": num_bytes(config, torch.bfloat16, with_vae=True, with_text_encoder=False),
        "weights": found.setup.weights,
        "peak": found.footprint.peak_bytes,
    }


def report(result: dict[str, float | str]) -> str:
    return (
        f"stored: {result['stored']} bytes\n"
        f"in a budget of 1 GiB: {result['weights']} weights, peak {result['peak']} bytes"
    )


if __name__ == "__main__":
    print(report(main(Path(sys.argv[1]))))
