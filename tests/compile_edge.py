"""Compiles for Jetson Orin (sm_87) the kernels that draw there, with the tiles that they get there.

Without a GPU, in a process of its own. Prints the shared memory that each takes, in bytes.
Integers are taken to be multiples of 16, as sizes and strides of the 2B and 8B are: loads run ahead
then, through shared memory.
"""

import torch
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from var_compressor.models.config import MODELS
from var_compressor.ops import attention, gemm, qkv

ORIN = gemm.GPU((8, 7), num_processors=16)
# the most that a block of threads may ask for: CUDA C++ Programming Guide, compute capability 8.7
MOST_SHARED = 163 * 1024
FEW, MANY = 16, 8192


def shared_bytes(kernel, types, constants, tiles):
    """``types`` by prefix of an argument's name; all others are 32-bit integers."""
    names = kernel.arg_names
    free = [name for name in names if name not in constants]
    signature = dict.fromkeys(names, "constexpr") | {
        name: next((kind for prefix, kind in types.items() if name.startswith(prefix)), "i32")
        for name in free
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in free},
    )
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    target = GPUTarget("cuda", 10 * ORIN.capability[0] + ORIN.capability[1], 32)
    return triton_compile(source, target=target, options=options).metadata.shared


def linears():
    """The two paths that `auto` takes on Orin, for few and for many tokens."""
    floats = {
        "xscales_ptr": "*fp32", "wscales_ptr": "*bf16", "low_ptr": "*bf16", "up_ptr": "*bf16",
        "bias_ptr": "*fp32", "w_ptr": "*u8",
    }  # fmt: skip
    branch = {"GROUP": 64, "RANK": 32, "HAS_BIAS": True}
    config = MODELS["infinity-8b"].transformer
    weight_NJ = torch.empty(config.ffn_dim, config.embed_dim // 2, dtype=torch.uint8, device="meta")
    for num_tokens in (FEW, MANY):
        x_MK = torch.empty(num_tokens, config.embed_dim, device="meta")
        tiles = gemm.tiles_for("groups", x_MK, weight_NJ, ORIN)
        sizes = {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n}
        switches = {"PACKED": True, "TMA": False} | branch | sizes
        types = floats | {"x_ptr": "*i8", "y_ptr": "*bf16"}
        yield "w4a4", num_tokens, shared_bytes(gemm._gemm_groups, types, switches, tiles)
    x_MK = torch.empty(FEW, config.embed_dim, device="meta")
    tiles = gemm.tiles_for("w4a16", x_MK, weight_NJ, ORIN)
    switches = {"IS_SPLIT": tiles.splits > 1, "BLOCK_M": tiles.m, "BLOCK_N": tiles.n} | branch
    types = floats | {"x_ptr": "*bf16", "y_ptr": "*fp32"}
    yield "w4a16", FEW, shared_bytes(gemm._gemm_w4a16, types, switches, tiles)


def attentions():
    """On int4 and int8 codes, and what fills the cache; two bf16 channels are read as one int32."""
    head_dim = MODELS["infinity-8b"].transformer.head_dim
    ranges = dict.fromkeys(("k_scale", "k_offset", "v_scale", "v_offset"), "*fp32")
    values = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), "*i32")
    for coding, kind, num_queries in ((qkv.INT4, "*u8", FEW), (qkv.INT8, "*i16", MANY)):
        tiles = attention.tiles_for(num_queries, head_dim, ORIN.capability)
        switches = {
            "D": head_dim, "HALF": head_dim // 2, "CODING": coding.value,
            "BLOCK_M": tiles.m, "BLOCK_N": tiles.n,
        }  # fmt: skip
        types = {"k_codes_ptr": kind, "v_codes_ptr": kind} | ranges | values
        found = shared_bytes(attention._attend_codes, types, switches, tiles)
        yield f"attention on int{coding.value}", num_queries, found
    switches = {
        "D": head_dim, "HALF": head_dim // 2, "KEEPS_V": True, "CODING": qkv.INT8.value,
        "BLOCK_L": qkv._TOKENS_PER_PROGRAM,
    }  # fmt: skip
    types = {
        "k_codes_ptr": "*i16", "v_codes_ptr": "*i16", "k_zero": "*i32", "v_zero": "*i32",
        "q_scale_ptr": "*fp32", "rope_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32",
        "qkv_ptr": "*bf16", "q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16",
    }  # fmt: skip
    # as `normalize_rotate` launches it, with Triton's own number of stages
    tiles = attention.Tiles(0, 0, num_warps=4, num_stages=3)
    yield "rotation", MANY, shared_bytes(qkv._normalize_rotate, types, switches, tiles)


def main():
    for name, num_tokens, found in (*linears(), *attentions()):
        print(f"{name}, {num_tokens} tokens: {found} bytes of shared memory")
        assert found <= MOST_SHARED, (name, num_tokens, found)


if __name__ == "__main__":
    main()
