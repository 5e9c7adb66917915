"""A whole PTQ run of the original on a tiny random Infinity: its first block, before and after.

`golden/quant/tinyptq_a`: weights, recorded inputs, and what the original stored. The names of
linears are ours; the original has q, k and v of an attention apart.

Shapes: N output and K input channels, G groups of 64, R rank, L tokens of a level, T text tokens;
B = 2 guidance rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from var_compressor.models.checkpoint import block_name, transformer_names
from var_compressor.models.config import InfinityConfig
from var_compressor.models.transformer import Block
from var_compressor.ops.primitives import FORMATS, round_trip

STEM = Path(__file__).parent / "golden" / "quant" / "tinyptq_a"
CONFIG = InfinityConfig(
    depth=2, embed_dim=128, num_heads=2, num_chunks=2, bits_per_token=16, text_channels=128
)
GROUP_SIZE, RANK = 64, 16
LEVEL_SIDES = (1, 2, 4, 6)
NUM_IMAGES = 2


@dataclass(frozen=True)
class Source:
    """Where one of our linears is in the original's artifacts.

    `parts`: its linears, stacked by rows; `smooth` and `branch`: whose factors and branch it uses,
    and `first_row` where its share of a joint branch begins; `inputs`: the name of its recordings.
    """

    parts: tuple[str, ...]
    smooth: str
    branch: str
    first_row: int
    inputs: str


_QKV, _CROSS = "sa.to_q", "ca.to_q"
# the original computes one branch for q, k and v of the cross-attention, whose inputs differ
SOURCES = {
    "self_attn.qkv": Source(("sa.to_q", "sa.to_k", "sa.to_v"), _QKV, _QKV, 0, "sa"),
    "self_attn.proj": Source(("sa.proj",), "sa.proj", "sa.proj", 0, "sa_out"),
    "cross_attn.q": Source(("ca.to_q",), _CROSS, _CROSS, 0, "ca"),
    "cross_attn.kv": Source(("ca.to_k", "ca.to_v"), "ca.kv_smooth_scale", _CROSS, 128, "ca_k"),
    "cross_attn.proj": Source(("ca.proj",), "ca.proj", "ca.proj", 0, "ca_out"),
    "ffn.fc1": Source(("ffn.fc1",), "ffn.fc1", "ffn.fc1", 0, "ffn_fc1"),
    "ffn.fc2": Source(("ffn.fc2",), "ffn.fc2", "ffn.fc2", 0, "ffn_fc2"),
}


@dataclass(frozen=True)
class OriginalLinear:
    """What the original stored for one of our linears; `x -> y` is its forward pass.

    codes_NK int8 and scales_NG float32 give the residual weight; the branch is up_NR @ down_RK, on
    the input divided by smooth_K.
    """

    codes_NK: Tensor
    scales_NG: Tensor
    smooth_K: Tensor
    down_RK: Tensor
    up_NR: Tensor
    bias_N: Tensor

    @property
    def residual_NK(self) -> Tensor:
        return self.codes_NK * self.scales_NG.repeat_interleave(GROUP_SIZE, dim=1)

    def __call__(self, x_MK: Tensor) -> Tensor:
        x_hat_MK = x_MK / self.smooth_K
        low_MN = (x_hat_MK @ self.down_RK.T) @ self.up_NR.T
        qx_MK = round_trip(
            x_hat_MK, format=FORMATS["sint4"], group_size=GROUP_SIZE, scale_dtype=torch.float32
        )
        return qx_MK @ self.residual_NK.T + low_MN + self.bias_N


@dataclass(frozen=True)
class Capture:
    """The attention inputs of one image at one level; row 0 is conditional, row 1 its twin.

    text_TC: text tokens of both rows, packed; row 0 has the first `text_lens[0]`.
    """

    image: int
    level: int
    self_attn_BLC: Tensor
    cross_attn_BLC: Tensor
    text_TC: Tensor
    text_lens: tuple[int, ...]


def load_tensors() -> dict[str, Tensor]:
    return load_file(STEM.with_suffix(".safetensors"))


def load_record() -> dict[str, Any]:
    """How it was recorded, and every error of the original's searches, by its own names."""
    record: dict[str, Any] = json.loads(STEM.with_suffix(".json").read_text())
    return record


def original_block(tensors: dict[str, Tensor]) -> Block:
    """Our block with the original's full-precision weights, float32."""
    names = transformer_names(CONFIG)
    ours, official = "blocks.0.", f"{block_name(CONFIG, 0)}."
    block = Block(CONFIG)
    state = {}
    for name in block.state_dict():
        parts = [part.removeprefix(official) for part in names[f"{ours}{name}"]]
        state[name] = torch.cat([tensors[f"orig.{part}"] for part in parts])
    block.load_state_dict(state)
    return block.requires_grad_(False).eval()


def original_linears(tensors: dict[str, Tensor]) -> dict[str, OriginalLinear]:
    """The original's result for each of our linears, as functions x -> y in W4A4."""
    block = original_block(tensors)
    linears = {}
    for name, source in SOURCES.items():
        codes_NK, scales_NG = (
            torch.cat([tensors[f"{kind}.{part}"] for part in source.parts])
            for kind in ("codes", "scales")
        )
        joint_up = tensors[f"branch_pt.{source.branch}.b.weight"]
        linears[name] = OriginalLinear(
            codes_NK,
            scales_NG,
            tensors[f"smooth_pt.{source.smooth}"],
            tensors[f"branch_pt.{source.branch}.a.weight"],
            joint_up[source.first_row :][: len(codes_NK)],
            block.get_submodule(name).bias,
        )
    return linears


def calibration_inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The recorded inputs of each of our linears, [tokens, K], image after image, coarse to fine.

    The text is there once per capture, as the original counts it.
    """
    return {
        name: torch.cat([_recorded(tensors, i, source.inputs) for i in range(num_captures())])
        for name, source in SOURCES.items()
    }


def captures(tensors: dict[str, Tensor]) -> list[Capture]:
    """What the attention modules read, per image and level."""
    found = []
    for i in range(num_captures()):
        image, level = divmod(i, len(LEVEL_SIDES))
        ends = tensors[f"text_ends.{image}"]
        found.append(
            Capture(
                image,
                level,
                tensors[f"capture.{i}.sa"],
                tensors[f"capture.{i}.ca"],
                tensors[f"text.{image}"],
                tuple(ends.diff().tolist()),
            )
        )
    return found


def num_captures() -> int:
    return NUM_IMAGES * len(LEVEL_SIDES)


def _recorded(tensors: dict[str, Tensor], capture: int, inputs: str) -> Tensor:
    if inputs == "ca_k":
        return tensors[f"text.{capture // len(LEVEL_SIDES)}"]
    return tensors[f"capture.{capture}.{inputs}"].flatten(0, 1)
