"""A transformer block as Triton kernels run it, and putting it in place of the plain one.

The same network as `models.transformer.Block`, with what lies between two matrix products in one
pass: the residual's update, the norm, smoothing and rounding of the next input. Differences to the
plain block are those of rounding (float32 sums in another order).

Shapes: R rows, L tokens, C embed_dim, M = R * L.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from var_compressor.layers.compute import Policy
from var_compressor.layers.kernel_linear import (
    KernelLinear,
    LowBitLinear,
    PlainLinear,
    Scratch,
    UnpackedLinear,
    has_kernels,
)
from var_compressor.layers.kv_cache import LevelCache
from var_compressor.models.schedule import Level
from var_compressor.models.transformer import MAX_LOG_SCALE, Block, Infinity, TextContext


class KernelBlock(nn.Module):
    """Takes the place of a `Block` whose linears are kernel linears.

    ``saves_memory`` runs the feed-forward for one row at a time.
    """

    saves_memory = False
    q_scale_H: Tensor
    cross_gain_1C: Tensor
    cross_bias_1C: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.ada_offset = block.ada_offset
        self.self_attn, self.cross_attn = block.self_attn, block.cross_attn
        self.cross_norm, self.ffn = block.cross_norm, block.ffn
        log_scale_H = block.self_attn.q_log_scale.float().flatten()
        self.register_buffer(
            "q_scale_H", log_scale_H.clamp(max=MAX_LOG_SCALE).exp(), persistent=False
        )
        self.register_buffer(
            "cross_gain_1C", block.cross_norm.weight.float()[None], persistent=False
        )
        self.register_buffer("cross_bias_1C", block.cross_norm.bias.float()[None], persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.ada_offset.dtype

    def forward(
        self,
        x_RLC: Tensor,
        context: TextContext,
        rope_2LD: Tensor,
        cache: LevelCache,
        layer: int,
        levels: Sequence[Level],
    ) -> Tensor:
        """``x_RLC``, the float32 residual stream, is updated in place and returned."""
        from var_compressor.ops.inputs import GELU, Norm, add_update

        R, L, C = x_RLC.shape
        x_MC = x_RLC.view(-1, C)
        modulation_R6C = (self.ada_offset.float() + context.ada_R16C)[:, 0]
        gain1, gain2, scale1, scale2, shift1, shift2 = modulation_R6C.unbind(1)
        tokens = R * L // context.num_images
        how: dict[str, Any] = {"image_tokens": tokens, "tokens_per_row": L, "dtype": self.dtype}

        # these are kernel linears, which types of the plain block do not tell
        attn: Any = self.self_attn
        cross: Any = self.cross_attn
        ffn: Any = self.ffn
        qkv_MN = attn.qkv.multiply(attn.qkv.prepare(x_MC, Norm(1 + scale1, shift1), **how), tokens)
        o_RLC = self._attend(qkv_MN.view(R, L, -1), rope_2LD, cache, layer, levels)
        y_MC = attn.proj(o_RLC.view(-1, C), tokens)
        del qkv_MN, o_RLC

        norm = Norm(self.cross_gain_1C, self.cross_bias_1C, y_MC, gain1)
        q_MC = cross.q.multiply(cross.q.prepare(x_MC, norm, **how), tokens)
        o_RLC = self._attend_text(q_MC.view(R, L, C), context, layer)
        y_MC = cross.proj(o_RLC.reshape(-1, C), tokens)
        del q_MC, o_RLC

        # row by row: half the memory, each weight unpacked twice
        parts = [(slice(None), slice(None))]
        if self.saves_memory:
            parts = [(slice(r * L, (r + 1) * L), slice(r, r + 1)) for r in range(R)]
        for part, rows in parts:
            norm = Norm(1 + scale2[rows], shift2[rows], y_MC[part])
            h_MF = ffn.fc1.multiply(ffn.fc1.prepare(x_MC[part], norm, **how), tokens)
            prepared = ffn.fc2.prepare(h_MF, GELU, **how)
            del h_MF
            update = Norm(gain2, gain2, ffn.fc2.multiply(prepared, tokens), gain2[rows])
            add_update(x_MC[part], update, tokens_per_row=L)
        return x_RLC

    def _attend(
        self,
        qkv_RLN: Tensor,
        rope_2LD: Tensor,
        cache: LevelCache,
        layer: int,
        levels: Sequence[Level],
    ) -> Tensor:
        start, outputs = levels[0].offset, []
        for level in levels:
            part = slice(level.offset - start, level.end - start)
            qkv, rope = qkv_RLN[:, part], rope_2LD[:, part]
            outputs.append(cache.attend_qkv(layer, level, qkv, self.q_scale_H, rope))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend_text(self, q_RLC: Tensor, context: TextContext, layer: int) -> Tensor:
        return self.cross_attn.attend(q_RLC, context.cross_kv[layer], context.mask_R11T)


def kernels_run(transformer: Infinity) -> str | None:
    """Why kernels cannot run this transformer where it is; None if they can."""
    device = transformer.start_position.device
    if device.type != "cuda":
        return f"no kernels for {device.type}"
    if transformer.block_dtype not in (torch.bfloat16, torch.float16):
        return f"blocks in {transformer.block_dtype}; kernels want 16 bits"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "kernels want compute capability 8.0"
    return None


def packed_numel(transformer: Infinity) -> int:
    """Weights that kernels would multiply as 4-bit codes, and could unpack to a byte each."""
    linears = (one for block in transformer.blocks for _, _, one in _linears(block))
    return sum(2 * one.qweight.numel() for one in linears if has_kernels(one))


def use_kernels(transformer: Infinity, policy: Policy) -> None:
    """Replace blocks and their linears by kernels', where there are kernels for all of a block.

    Raises: ValueError where a path is asked for that the GPU lacks.
    """
    if policy.asked == "w8a8" and not policy.has_fp8:
        major, minor = policy.capability
        raise ValueError(
            f"compute w8a8 multiplies 8-bit floats, and this GPU (sm_{major}{minor}) has none; "
            "use auto"
        )
    scratch = Scratch(transformer.start_position.device)
    previous: KernelLinear | None = None
    for index, block in enumerate(transformer.blocks):
        if not isinstance(block, Block) or not all(_runs(one) for _, _, one in _linears(block)):
            previous = None
            continue
        for parent, name, linear in list(_linears(block)):
            setattr(parent, name, _kernel_linear(linear, policy, scratch, block.dtype))
        transformer.blocks[index] = KernelBlock(block)
        for linear in _in_order(block):
            if isinstance(previous, LowBitLinear) and isinstance(linear, LowBitLinear):
                previous.is_followed_by(linear)
            previous = linear


def _in_order(block: Block) -> tuple[KernelLinear, ...]:
    """The linears of a level, as `KernelBlock` multiplies them."""
    attn, cross, ffn = block.self_attn, block.cross_attn, block.ffn
    return (attn.qkv, attn.proj, cross.q, cross.proj, ffn.fc1, ffn.fc2)  # type: ignore[return-value]


def _linears(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in block.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) or hasattr(child, "qweight"):
                yield parent, name, child


def _runs(linear: nn.Module) -> bool:
    return isinstance(linear, nn.Linear) or has_kernels(linear)


def _kernel_linear(
    linear: nn.Module, policy: Policy, scratch: Scratch, dtype: torch.dtype
) -> KernelLinear:
    if isinstance(linear, nn.Linear):
        return PlainLinear(linear)
    packed = LowBitLinear(linear, policy, scratch, dtype=dtype)  # type: ignore[arg-type]
    return UnpackedLinear(packed) if packed.choice(None).path == "w8a8" else packed


def linears_of(transformer: Infinity) -> dict[str, KernelLinear]:
    """The kernel linears of the first block, which stand for those of all."""
    block = transformer.blocks[0]
    return {n: one for n, one in block.named_modules() if isinstance(one, KernelLinear)}
