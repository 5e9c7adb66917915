"""Compiles the kernels of linears for Ampere and Hopper, without a GPU; in a process of its own.

Each is compiled as for many tokens, and as for one: Triton makes an argument of 1 a constant.
"""

from triton import compile as triton_compile
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from var_compressor.ops import gemm, inputs

BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 64}
RANK = {"RANK": 32, "HAS_BIAS": True}
FP8 = "*fp8e4nv"


def compiled(kernel, types, constants, *, capability):
    """``types`` by prefix of an argument's name; all others are 32-bit integers."""
    names = kernel.arg_names
    for fixed in ({}, {"M": 1, "tokens_per_row": 1}):
        known = constants | {name: 1 for name in fixed if name in names}
        signature = {
            name: "constexpr"
            if name in known
            else next((t for prefix, t in types.items() if name.startswith(prefix)), "i32")
            for name in names
        }
        constexprs = {(names.index(name),): value for name, value in known.items()}
        source = ASTSource(kernel, signature, constexprs=constexprs)
        triton_compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def main():
    for capability in (80, 90):
        is_hopper = capability == 90
        coded = FP8 if is_hopper else "*i8"
        floats = {
            "xscales_ptr": "*fp32", "wscales_ptr": "*bf16", "low_ptr": "*bf16", "up_ptr": "*bf16",
            "bias_ptr": "*fp32", "y_ptr": "*bf16", "parts_ptr": "*fp32", "down_ptr": "*bf16",
            "smooth_ptr": "*fp32", "inverse_smooth_ptr": "*fp32", "row_scales_ptr": "*fp32",
        }  # fmt: skip
        for packed in (True, False)[: 1 + is_hopper]:
            sides = {"x_ptr": "*i8", "w_ptr": "*u8"} if packed else {"x_ptr": FP8, "w_ptr": FP8}
            switches = {"GROUP": 64, "PACKED": packed, "TMA": False} | RANK | BLOCKS
            compiled(gemm._gemm_groups, floats | sides, switches, capability=capability)
        if is_hopper:
            switches = {"TMA": False, "EVEN_K": False, "HAS_BIAS": True, "BLOCK_K": 64} | BLOCKS
            sides = {"x_ptr": FP8, "w_ptr": FP8, "wscales_ptr": "*fp32"}
            compiled(gemm._gemm_rows, floats | sides, switches, capability=capability)
        for is_split in (True, False):
            sides = {"x_ptr": "*bf16", "w_ptr": "*u8"} | ({"y_ptr": "*fp32"} if is_split else {})
            switches = {"GROUP": 64, "IS_SPLIT": is_split} | RANK | BLOCKS
            compiled(gemm._gemm_w4a16, floats | sides, switches, capability=capability)
        compiled(gemm._sum_splits, floats, {"SPLITS": 4} | RANK | BLOCKS, capability=capability)
        for merged in (True, False):
            out = {"out_ptr": FP8 if is_hopper else "*bf16", "w_ptr": "*u8"}
            switches = {
                "HALF": 32, "IS_MERGED": merged, "HAS_ROW_SCALES": merged and is_hopper,
                "RANK": 32 if merged else 0, "PADDED_RANK": 32, "BLOCK_N": 64, "GROUPS": 2,
            }  # fmt: skip
            compiled(gemm._expand_weight, floats | out, switches, capability=capability)
        compile_inputs(coded, floats, capability)


def compile_inputs(coded, floats, capability):
    rows = {"gain_ptr": "*fp32", "bias_ptr": "*fp32", "update_ptr": "*bf16", "shift": "fp32"}
    rows |= {"update_gain_ptr": "*fp32", "low_ptr": "*bf16"}
    for source, x in ((inputs.NORM, "*fp32"), (inputs.GELU, "*bf16")):
        switches = {
            "SOURCE": source, "HAS_UPDATE": True, "HAS_UPDATE_GAIN": True, "IS_NATIVE": True,
            "ROUND_TO": tl.bfloat16,
        }  # fmt: skip
        types = floats | rows | {"x_ptr": x, "values_ptr": coded}
        last = inputs.FP8_TOKEN if coded == FP8 else inputs.INT8_TOKEN
        more = {"IS_SMOOTHED": True, "CODING": last, "BLOCK_K": 1024}
        compiled(inputs._prepare_rows, types, switches | more, capability=capability)
        for block_m in (1, 16):
            more = {
                "SHIFTED": True, "GROUP": 64, "LOWEST": -7, "HIGHEST": 7, "RANK": 32,
                "PADDED_RANK": 32, "BLOCK_M": block_m, "BLOCK_K": 128,
            }  # fmt: skip
            compiled(inputs._prepare_groups, types, switches | more, capability=capability)
    types = floats | rows | {"values_ptr": coded}
    few = {"HAS_SCALES": True, "BLOCK_K": 256}
    compiled(inputs._project_few, types, few, capability=capability)
    many = few | {"RANK": 32, "PADDED_RANK": 32, "BLOCK_M": 16}
    compiled(inputs._project_many, types, many, capability=capability)
    compiled(inputs._add_parts, types, {"SPLITS": 4, "BLOCK": 256}, capability=capability)
    update = {"HAS_UPDATE_GAIN": True, "BLOCK_K": 256}
    compiled(inputs._add_update, types | {"x_ptr": "*fp32"}, update, capability=capability)


if __name__ == "__main__":
    main()
