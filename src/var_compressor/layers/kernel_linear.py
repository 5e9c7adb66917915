"""Linears as Triton kernels run them: prepared input, then one product.

Shapes: M tokens, K input and N output channels, G groups, R rank of the branch, J = K/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.layers.compute import Choice, Policy
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.ops.packing import to_tile_order

if TYPE_CHECKING:
    from var_compressor.ops.gemm import Tiles
    from var_compressor.ops.inputs import CodedInput, Coding, Norm

# rows of a weight that are looked at together while its sums are taken
_ROWS = 1024


@dataclass(frozen=True)
class Form:
    """What a 4-bit weight is unpacked to: its plain codes, or the whole of it in 8 or 16 bits.

    ``per_row``: with a scale per output channel.
    """

    dtype: torch.dtype
    per_row: bool


class Scratch:
    """Memory that all linears share: two unpacked weights, one in use and one made ahead.

    Unpacking depends on no input. The next linear's weight is unpacked on another stream while this
    one's product runs, into the place that the product before has left.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2)]
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.current = 0
        self.ahead: tuple[LowBitLinear, Form, torch.cuda.Event] | None = None

    def reserve(self, num_bytes: int) -> None:
        if num_bytes > self.buffers[0].numel():
            self.buffers = [one.new_empty(num_bytes) for one in self.buffers]

    def weight(self, linear: LowBitLinear, form: Form) -> Tensor:
        """The weight in that form, made ahead or now; valid until the next call but one."""
        if self.ahead is not None:
            who, made, event = self.ahead
            self.ahead = None
            torch.cuda.current_stream().wait_event(event)
            if (who, made) == (linear, form):
                self.current = 1 - self.current
                return linear.room(form, self.buffers[self.current])
        return linear.expand(form, self.buffers[self.current])

    def make_ahead(self, linear: LowBitLinear, form: Form) -> None:
        """Start making a weight that the next call of `weight` will ask for."""
        if self.side is None:
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            linear.expand(form, self.buffers[1 - self.current])
            self.ahead = (linear, form, self.side.record_event())


class KernelLinear(nn.Module):
    """What a block of kernels asks of a linear: how it wants its input, and the product.

    The path follows from the tokens of one image, so that an image's path depends on no other image
    in its batch; ``image_tokens`` None stands for many.
    """

    in_features: int
    out_features: int
    smooth_factor: Tensor | None
    inverse_smooth: Tensor | None
    proj_down: Tensor | None

    def choice(self, image_tokens: int | None) -> Choice:
        """The path for as many tokens of an image."""
        raise AssertionError("a linear has a path")

    def coding(self, path: str) -> Coding:
        raise AssertionError("a linear says how it wants its input")

    def multiply(self, x: CodedInput, image_tokens: int | None) -> Tensor:
        raise AssertionError("a linear multiplies")

    def prepare(
        self,
        x_MK: Tensor,
        source: int | Norm,
        *,
        image_tokens: int | None,
        tokens_per_row: int,
        dtype: torch.dtype,
    ) -> CodedInput:
        """Its input, from where the network left it."""
        from var_compressor.ops import inputs

        path = self.choice(image_tokens).path
        coding = self.coding(path)
        if coding.kind == inputs.UNSMOOTHED and source == inputs.PLAIN:
            return inputs.CodedInput(x_MK, None, None)
        return inputs.prepare(
            x_MK,
            coding,
            smooth_K=self.smooth_factor,
            inverse_smooth_K=self.inverse_smooth,
            down_NK=self.proj_down if self.has_branch(path) else None,
            source=source,
            tokens_per_row=tokens_per_row,
            dtype=dtype,
        )

    def has_branch(self, path: str) -> bool:
        """Whether the branch reads the input, rather than being a part of the weight."""
        return False

    def forward(self, x: Tensor, image_tokens: int | None = None) -> Tensor:
        x_MK = x.flatten(0, -2)
        prepared = self.prepare(
            x_MK, 0, image_tokens=image_tokens, tokens_per_row=len(x_MK), dtype=x.dtype
        )
        return self.multiply(prepared, image_tokens).unflatten(0, x.shape[:-1])


class PlainLinear(KernelLinear):
    """A linear of 16 bits among kernels."""

    smooth_factor = None
    inverse_smooth = None
    proj_down = None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def choice(self, image_tokens: int | None) -> Choice:
        return Choice("bf16", "not compressed")

    def coding(self, path: str) -> Coding:
        from var_compressor.ops import inputs

        return inputs.Coding(inputs.UNSMOOTHED)

    def multiply(self, x: CodedInput, image_tokens: int | None) -> Tensor:
        return F.linear(x.values_MK, self.weight, self.bias)


class LowBitLinear(KernelLinear):
    """A 4-bit weight by any of the paths of `compute`.

    Takes over the tensors of a `QuantizedLinear`, the codes rearranged to tile order. The shift of
    unsigned inputs is for 4-bit codes only: ``plain_bias`` is the bias without its correction.
    Paths that unpack the weight to 8-bit or 16-bit floats unpack all of it, with the branch: their
    inputs are not projected.
    """

    smooth_factor: Tensor
    inverse_smooth: Tensor
    proj_up: Tensor | None
    bias: Tensor
    plain_bias: Tensor
    wscales_GN: Tensor
    qweight: Tensor
    row_scales_N: Tensor | None

    def __init__(
        self, linear: QuantizedLinear, policy: Policy, scratch: Scratch, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert has_kernels(linear)
        self.policy, self.scratch, self.dtype = policy, scratch, dtype
        self._following: list[LowBitLinear] = []
        self.act_format = linear.act_format
        self.act_group_size, self.shift = linear.act_group_size, linear.shift
        self.out_features, half = linear.qweight.shape
        self.in_features = 2 * half
        self.group_size = self.in_features // linear.wscales.shape[1]
        self.register_buffer("smooth_factor", linear.smooth_factor)
        self.register_buffer("inverse_smooth", 1 / linear.smooth_factor)
        self.register_buffer("proj_down", linear.proj_down if len(linear.proj_down) else None)
        self.register_buffer("proj_up", linear.proj_up if self.proj_down is not None else None)
        self.register_buffer("bias", linear.bias)
        self.register_buffer("plain_bias", _without_shift(linear) if self.shift else linear.bias)
        self.register_buffer("wscales_GN", linear.wscales.T.contiguous())
        self.register_buffer("qweight", to_tile_order(linear.qweight, group_size=self.group_size))
        self.register_buffer("row_scales_N", None)
        scratch.reserve(self.scratch_bytes())
        if policy.has_fp8:
            merged_NK = self.expand(Form(dtype, per_row=False), self._wide_buffer())
            largest_N = torch.linalg.vector_norm(merged_NK, ord=torch.inf, dim=1).float()
            self.row_scales_N = largest_N.clamp_min(1e-30) / 448

    def _wide_buffer(self) -> Tensor:
        """Room for the weight in 16 bits: the scratch's, if it has so much."""
        num_bytes = self.out_features * self.in_features * self.dtype.itemsize
        buffer = self.scratch.buffers[0]
        return buffer if buffer.numel() >= num_bytes else buffer.new_empty(num_bytes)

    @property
    def following(self) -> LowBitLinear | None:
        """The linear that multiplies next, whose weight can be unpacked meanwhile."""
        return self._following[0] if self._following else None

    def is_followed_by(self, linear: LowBitLinear) -> None:
        # in a list, or it would become a submodule
        self._following = [linear]

    def choice(self, image_tokens: int | None) -> Choice:
        """Inputs of 16 bits are never rounded to fewer."""
        found = self.policy.choose(image_tokens, self.out_features, self.in_features)
        if self.act_format is None and found.path in ("w4a4", "w4a8", "w8a8"):
            return Choice("bf16", "the recipe leaves inputs in 16 bits")
        if found.path == "w4a4" and self.act_format is not None and self.act_format.nbits == 8:
            return Choice("w4a8", "the recipe gives inputs 8 bits")
        return found

    def coding(self, path: str) -> Coding:
        from var_compressor.ops import inputs

        if path == "w4a8":
            return inputs.Coding(inputs.FP8_TOKEN if self.policy.has_fp8 else inputs.INT8_TOKEN)
        if path == "w4a4":
            assert self.act_format is not None
            return inputs.Coding(
                inputs.INT_GROUPS,
                self.act_group_size,
                int(self.act_format.qmin),
                int(self.act_format.qmax),
                as_fp8=self.policy.has_fp8,
                shift=self.shift,
            )
        return inputs.Coding(inputs.SMOOTHED)

    def has_branch(self, path: str) -> bool:
        return path in ("w4a4", "w4a16") or (path == "w4a8" and not self.policy.has_fp8)

    def form(self, path: str) -> Form | None:
        """What a path unpacks the weight to, if it does."""
        if path == "bf16":
            return Form(self.dtype, per_row=False)
        if not self.policy.has_fp8 or path == "w4a16":
            return None
        return Form(torch.float8_e4m3fn, per_row=path == "w4a8")

    def multiply(self, x: CodedInput, image_tokens: int | None) -> Tensor:
        path = self.choice(image_tokens).path
        form = self.form(path)
        weight = self.qweight if form is None else self.scratch.weight(self, form)
        if self.following is not None:
            following = self.following.choice(image_tokens).path
            if (coming := self.following.form(following)) is not None:
                self.scratch.make_ahead(self.following, coming)
        product = {"w4a4": self._w4a4, "w4a8": self._w4a8, "w4a16": self._w4a16, "bf16": self._bf16}
        return product[path](x, weight)

    def _w4a4(self, x: CodedInput, weight: Tensor) -> Tensor:
        from var_compressor.ops import gemm

        assert x.xscales_GM is not None
        return gemm.gemm_groups(
            x.values_MK, x.xscales_GM, weight, self.wscales_GN, x.low_MN, self.proj_up, self.bias,
            tiles=self._tiles("groups", x, weight), dtype=self.dtype,
        )  # fmt: skip

    def _w4a8(self, x: CodedInput, weight: Tensor) -> Tensor:
        from var_compressor.ops import gemm

        assert x.xscales_GM is not None
        if not self.policy.has_fp8:
            return gemm.gemm_groups(
                x.values_MK, x.xscales_GM, weight, self.wscales_GN,
                x.low_MN, self.proj_up, self.plain_bias,
                tiles=self._tiles("groups", x, weight), dtype=self.dtype,
            )  # fmt: skip
        assert self.row_scales_N is not None
        return gemm.gemm_rows(
            x.values_MK, x.xscales_GM[0], weight, self.row_scales_N, self.plain_bias,
            tiles=self._tiles("rows", x, weight), dtype=self.dtype,
        )  # fmt: skip

    def _w4a16(self, x: CodedInput, weight: Tensor) -> Tensor:
        from var_compressor.ops import gemm

        return gemm.gemm_w4a16(
            x.values_MK, weight, self.wscales_GN, x.low_MN, self.proj_up, self.plain_bias,
            tiles=self._tiles("w4a16", x, weight), dtype=self.dtype,
        )  # fmt: skip

    def _bf16(self, x: CodedInput, weight: Tensor) -> Tensor:
        return F.linear(x.values_MK, weight, self.plain_bias.to(weight.dtype))

    def _tiles(
        self, op: Literal["rows", "groups", "w4a16"], x: CodedInput, weight: Tensor
    ) -> Tiles:
        from var_compressor.ops import gemm

        return gemm.tiles_for(op, x.values_MK, weight, self.policy.gpu)

    def room(self, form: Form, buffer: Tensor) -> Tensor:
        """The place of the unpacked weight in a buffer."""
        N, K = self.out_features, self.in_features
        return buffer[: N * K * form.dtype.itemsize].view(form.dtype).view(N, K)

    def expand(self, form: Form, buffer: Tensor) -> Tensor:
        """The weight unpacked into a buffer."""
        from var_compressor.ops import gemm

        out_NK = self.room(form, buffer)
        if form.dtype.itemsize == 1 and not form.per_row:
            return gemm.expand_codes(self.qweight, group_size=self.group_size, out_NK=out_NK)
        return gemm.merge_weight(
            self.qweight, self.wscales_GN, self.proj_down, self.proj_up,
            self.row_scales_N if form.per_row else None, out_NK=out_NK,
        )  # fmt: skip

    def scratch_bytes(self) -> int:
        """Of the widest form that the policy may ask for; without fp8, other paths unpack none."""
        is_wide = self.policy.asked == "bf16" or self.act_format is None
        itemsize = self.dtype.itemsize if is_wide else int(self.policy.has_fp8)
        return self.out_features * self.in_features * itemsize


class UnpackedLinear(KernelLinear):
    """The product of w4a8 in e4m3 with its weight unpacked for good: a byte each, no scratch."""

    smooth_factor: Tensor
    inverse_smooth: Tensor
    proj_down = None
    weight_NK: Tensor
    row_scales_N: Tensor
    bias: Tensor

    def __init__(self, packed: LowBitLinear) -> None:
        super().__init__()
        assert packed.row_scales_N is not None
        self.policy, self.dtype = packed.policy, packed.dtype
        self.in_features, self.out_features = packed.in_features, packed.out_features
        form = Form(torch.float8_e4m3fn, per_row=True)
        room = packed.qweight.new_empty(self.out_features * self.in_features)
        self.register_buffer("weight_NK", packed.expand(form, room))
        self.register_buffer("row_scales_N", packed.row_scales_N)
        self.register_buffer("smooth_factor", packed.smooth_factor)
        self.register_buffer("inverse_smooth", packed.inverse_smooth)
        self.register_buffer("bias", packed.plain_bias)

    def choice(self, image_tokens: int | None) -> Choice:
        return self.policy.choose(image_tokens, self.out_features, self.in_features)

    def coding(self, path: str) -> Coding:
        from var_compressor.ops import inputs

        return inputs.Coding(inputs.FP8_TOKEN)

    def multiply(self, x: CodedInput, image_tokens: int | None) -> Tensor:
        from var_compressor.ops import gemm

        assert x.xscales_GM is not None
        return gemm.gemm_rows(
            x.values_MK, x.xscales_GM[0], self.weight_NK, self.row_scales_N, self.bias,
            tiles=gemm.tiles_for("rows", x.values_MK, self.weight_NK, self.policy.gpu),
            dtype=self.dtype,
        )  # fmt: skip


def has_kernels(linear: nn.Module) -> TypeGuard[QuantizedLinear]:
    """Whether kernels multiply these formats: 4-bit integer weights in groups, integer inputs."""
    if not isinstance(linear, QuantizedLinear) or linear.weight_format.name != "sint4":
        return False
    group = 2 * linear.qweight.shape[1] // linear.wscales.shape[1]
    if group not in (32, 64, 128):
        return False
    act = linear.act_format
    if act is None:
        return True
    K = 2 * linear.qweight.shape[1]
    if act.nbits == 4:
        return act.kind == "int" and linear.act_group_size == group
    return act.name == "sint8" and linear.act_group_size == K


def _without_shift(linear: QuantizedLinear) -> Tensor:
    """The bias for inputs that are not shifted, float32 [N]: the correction taken back."""
    from var_compressor.ops.packing import unpack_int4

    inverse_K = 1 / linear.smooth_factor.double()
    sums_N = linear.proj_up.double() @ (linear.proj_down.double() @ inverse_K)
    scales_NG = linear.effective_scales().double()
    inverse_GE = inverse_K.unflatten(0, (scales_NG.shape[1], -1))
    for start in range(0, len(sums_N), _ROWS):
        part = slice(start, start + _ROWS)
        codes_nGE = unpack_int4(linear.qweight[part]).unflatten(1, inverse_GE.shape)
        dots_nG = (codes_nGE.float() * inverse_GE.float()).sum(-1)
        sums_N[part] += (dots_nG.double() * scales_NG[part]).sum(-1)
    return (linear.bias.double() + linear.shift * sums_N).float()
