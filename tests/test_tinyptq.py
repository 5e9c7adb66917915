"""The helpers of `tinyptq.py` agree with each other and with what the original computed.

Shapes as there.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tinyptq
from tinyptq import GROUP_SIZE, LEVEL_SIDES, RANK, SOURCES
from var_compressor.ops.primitives import FORMATS, round_trip


@pytest.fixture(scope="module")
def tensors():
    return tinyptq.load_tensors()


# our linear, the original's part of it that was recorded, and its rows
RECORDED = [
    ("self_attn.qkv", "sa.to_q", slice(0, 128)),
    ("self_attn.qkv", "sa.to_v", slice(256, 384)),
    ("self_attn.proj", "sa.proj", slice(None)),
    ("cross_attn.q", "ca.to_q", slice(None)),
    ("cross_attn.kv", "ca.to_k", slice(0, 128)),
    ("cross_attn.proj", "ca.proj", slice(None)),
    ("ffn.fc1", "ffn.fc1", slice(None)),
    ("ffn.fc2", "ffn.fc2", slice(None)),
]


@pytest.mark.parametrize(("name", "part", "rows"), RECORDED)
def test_the_forward_pass_is_that_of_the_original(tensors, name, part, rows):
    got = tinyptq.original_linears(tensors)[name](tensors[f"fakequant.in.{part}"])
    torch.testing.assert_close(
        got[..., rows], tensors[f"fakequant.out.{part}"], rtol=1e-6, atol=1e-5
    )


def test_stored_parts_add_up_to_the_smoothed_weight(tensors):
    """Residual and branch differ from the weight by at most half a step of the residual's codes."""
    block = tinyptq.original_block(tensors)
    for name, linear in tinyptq.original_linears(tensors).items():
        smoothed_NK = block.get_submodule(name).weight * linear.smooth_K
        error_NK = smoothed_NK - linear.up_NR @ linear.down_RK - linear.residual_NK
        half_step_NK = linear.scales_NG.repeat_interleave(GROUP_SIZE, dim=1) / 2
        assert (error_NK.abs() <= half_step_NK * (1 + 1e-4)).all(), name


def test_the_block_maps_one_recording_to_the_next(tensors):
    """fc1 feeds fc2; at a level of one token self-attention is its own v; q attends to the text."""
    block, inputs = tinyptq.original_block(tensors), tinyptq.calibration_inputs(tensors)
    fc2_in = F.gelu(block.ffn.fc1(inputs["ffn.fc1"]), approximate="tanh")
    torch.testing.assert_close(fc2_in, inputs["ffn.fc2"], rtol=1e-5, atol=1e-5)
    for i, capture in enumerate(tinyptq.captures(tensors)):
        assert capture.self_attn_BLC.shape[1] == LEVEL_SIDES[capture.level] ** 2
        if capture.level == 0:
            v_BLC = block.self_attn.qkv(capture.self_attn_BLC).chunk(3, dim=-1)[2]
            torch.testing.assert_close(v_BLC, tensors[f"capture.{i}.sa_out"], rtol=1e-2, atol=1e-2)
        for row, text_TC in enumerate(capture.text_TC.split(capture.text_lens)):
            kv = block.cross_attn.kv(text_TC).unflatten(-1, (2, 2, 64)).permute(1, 2, 0, 3)
            q = block.cross_attn.q(capture.cross_attn_BLC[row]).unflatten(-1, (2, 64))
            o_LC = F.scaled_dot_product_attention(q.transpose(0, 1), *kv).transpose(0, 1).flatten(1)
            # recorded through bfloat16
            torch.testing.assert_close(
                o_LC, tensors[f"capture.{i}.ca_out"][row], rtol=2e-2, atol=2e-2
            )


@pytest.mark.parametrize("name", ["ffn.fc1", "ffn.fc2"])
def test_inputs_give_the_error_that_the_original_recorded(tensors, name):
    """Its search without smoothing: int4 beside a branch of rank 16."""

    def int4(x):
        return round_trip(
            x, format=FORMATS["sint4"], group_size=GROUP_SIZE, scale_dtype=torch.float32
        )

    weight_NK = tinyptq.original_block(tensors).get_submodule(name).weight
    x_TK = tinyptq.calibration_inputs(tensors)[name]
    u_NS, s_S, v_SK = torch.linalg.svd(weight_NK.double(), full_matrices=False)
    branch_NK = ((u_NS[:, :RANK] * s_S[:RANK]) @ v_SK[:RANK]).float()
    got_TN = int4(x_TK) @ int4(weight_NK - branch_NK).T + x_TK @ branch_NK.T
    error = float((got_TN - x_TK @ weight_NK.T).square().sum())
    assert error == pytest.approx(tinyptq.load_record()["smooth_errors"][name][0], rel=1e-4)


def test_every_linear_of_the_block_has_a_source(tensors):
    linears = tinyptq.original_linears(tensors)
    block = tinyptq.original_block(tensors)
    named = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert named.keys() == SOURCES.keys()
    for name, module in named.items():
        assert linears[name].codes_NK.shape == module.weight.shape
        assert tinyptq.calibration_inputs(tensors)[name].shape[1] == module.in_features
