"""Blocks of kernels against plain blocks: the same network, by every path."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from kernels import DEVICE, HALF, IS_INTERPRETED
from tiny import random_text, tiny_pipeline

pytest.importorskip("triton")

from interpreter import true_bf16  # noqa: F401
from var_compressor.layers.compute import (
    PATHS,
    PathTable,
    Policy,
    has_room,
    read_table,
    write_table,
)
from var_compressor.layers.kernel_block import KernelBlock, packed_numel, use_kernels
from var_compressor.layers.kernel_linear import LowBitLinear, Scratch, UnpackedLinear
from var_compressor.layers.kv_cache import PlainCache
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.schedule import Schedule
from var_compressor.models.transformer import TextFeatures
from var_compressor.pipeline import InfinityPipeline
from var_compressor.spec import PRESETS

HOPPER, AMPERE = (9, 0), (8, 0)


def snr_db(found, wanted):
    wanted, error = wanted.double(), found.double() - wanted.double()
    return 10 * torch.log10(wanted.square().sum() / error.square().sum()).item()


def run_levels(pipeline, dtype, *, levels, batch=1):
    """Hidden states of the first levels, each of random inputs."""
    return torch.cat([
        h_RLC.flatten(0, 1)
        for h_RLC in levels_of(pipeline, dtype, random_text((5, 3)[:batch]), levels)
    ])  # fmt: skip


def levels_of(pipeline, dtype, features, levels):
    torch.manual_seed(1)
    model = pipeline.transformer
    schedule = Schedule.of(1.0, "0.06M")
    context = pipeline.embed_text(pipeline.encode(features), None, guided=True)
    rows = len(context.cond_RC)
    cache = PlainCache(model.config, schedule, rows=rows, dtype=dtype, device=DEVICE)
    rope = model.rotary_table(schedule)
    outputs = []
    for level in schedule.levels[:levels]:
        x_RLC = torch.randn(rows, level.num_tokens, model.config.embed_dim, device=DEVICE)
        outputs.append(model(x_RLC, (level,), context, cache, rope))
    return outputs


@pytest.fixture(scope="module")
def full():
    pipeline = tiny_pipeline(dtype=HALF)
    pipeline.transformer.to(DEVICE)
    return pipeline


@pytest.fixture
def compressed(artifact_dir):
    return InfinityPipeline.from_pretrained(
        artifact_dir, dtype=HALF, device=DEVICE, compute="reference"
    )


def with_kernels(pipeline, compute, capability):
    found = copy.deepcopy(pipeline)
    use_kernels(found.transformer, Policy(compute, capability, 4))
    assert isinstance(found.transformer.blocks[0], KernelBlock)
    return found


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2])
def test_full_precision_is_the_same_network(full, batch):
    plain = run_levels(full, HALF, levels=3, batch=batch)
    kernels = run_levels(with_kernels(full, "auto", HOPPER), HALF, levels=3, batch=batch)
    assert snr_db(kernels, plain) > 44


# what the tiny random model loses to 4-bit inputs; w4a4 must lose the same, the others less
@torch.inference_mode()
@pytest.mark.parametrize(("compute", "decibels"), [("w4a8", 25), ("w4a16", 45), ("bf16", 45)])
@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
def test_paths_are_nearer_to_unrounded_inputs_than_w4a4(compressed, compute, decibels, capability):
    if IS_INTERPRETED and capability == HOPPER and compute == "w4a8":
        pytest.skip("the interpreter rounds wrongly to e4m3")
    reference = copy.deepcopy(compressed)
    for linear in reference.transformer.modules():
        if isinstance(linear, QuantizedLinear):
            without_shift(linear)
    plain = run_levels(reference, HALF, levels=2)
    found = run_levels(with_kernels(compressed, compute, capability), HALF, levels=2)
    assert snr_db(found, plain) > decibels


def without_shift(linear):
    """Read inputs in 16 bits, neither rounded nor shifted."""
    from var_compressor.layers.kernel_linear import _without_shift

    linear.bias = _without_shift(linear) if linear.shift else linear.bias
    linear.shift, linear.act_format = 0.0, None


@torch.inference_mode()
@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
def test_w4a4_linears_equal_the_reference(compressed, capability):
    """On equal inputs, linear by linear: later ones would amplify a rounding to other codes."""
    kernels = with_kernels(compressed, "w4a4", capability)
    ours = dict(kernels.transformer.blocks[1].named_modules())
    checked = 0
    for name, linear in compressed.transformer.blocks[1].named_modules():
        if not isinstance(linear, QuantizedLinear):
            continue
        assert isinstance(ours[name], LowBitLinear)
        for M in (1, 5):
            x_MK = torch.randn(M, ours[name].in_features, device=DEVICE).to(HALF)
            if linear.shift:
                x_MK = torch.nn.functional.gelu(x_MK)
            assert snr_db(ours[name](x_MK), linear(x_MK)) > 44
            checked += 1
    assert checked == 14


@torch.inference_mode()
def test_several_levels_at_once_equal_one_by_one(full):
    model = with_kernels(full, "auto", HOPPER).transformer
    schedule = Schedule.of(1.0, "0.06M")
    levels = schedule.levels[:3]
    context = full.embed_text(full.encode(random_text((5,))), None, guided=False)
    rope = model.rotary_table(schedule)
    x_RLC = torch.randn(1, levels[-1].end, model.config.embed_dim, device=DEVICE)
    caches = [
        PlainCache(model.config, schedule, rows=1, dtype=HALF, device=DEVICE) for _ in range(2)
    ]
    together = model(x_RLC, levels, context, caches[0], rope)
    single = [model(x_RLC[:, lv.offset : lv.end], (lv,), context, caches[1], rope) for lv in levels]
    assert snr_db(torch.cat(single, dim=1), together) > 44


def test_the_policy_says_why():
    assert Policy("auto", HOPPER, 132).choose(2, 64, 64).path == "w4a16"
    assert Policy("auto", HOPPER, 132).choose(None, 64, 64).path == "w4a8"
    found = Policy("auto", AMPERE, 8).choose(2048, 64, 64)
    assert found.path == "w4a4" and "sm_80" in found.why
    roomy = Policy("auto", HOPPER, 132, has_room=True)
    assert roomy.unpacks and roomy.choose(2, 64, 64).path == "w8a8"
    for packed in (
        Policy("packed", HOPPER, 132, has_room=True), Policy("auto", AMPERE, 8, has_room=True)
    ):  # fmt: skip
        assert not packed.unpacks and packed.choose(2, 64, 64).path == "w4a16"
    for asked in PATHS:
        assert Policy(asked, AMPERE, 8).choose(9, 64, 64).path == asked
    with pytest.raises(ValueError, match="'fast'"):
        Policy("fast", AMPERE, 8)


def test_a_measured_table_decides_for_its_shapes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few, many = {"w4a8": 0.4, "w4a4": 0.2}, {"w4a8": 1.0, "w4a4": 2.0, "w4a16": 3.0}
    versions = {"torch": "1"}
    path = write_table(PathTable({(64, 32): ((8, few), (128, many))}), "A GPU", versions)
    write_table(PathTable({(32, 32): ((8, few),)}), "A GPU", versions)
    assert read_table("A GPU", {"torch": "2"}) is None
    assert read_table("another", versions) is None
    policy = Policy("auto", HOPPER, 132, read_table("A GPU", versions))
    chosen = [policy.choose(tokens, 64, 32).path for tokens in (1, 8, 9, 128, 999, None)]
    assert chosen == ["w4a4", "w4a4", "w4a8", "w4a8", "w4a8", "w4a8"]
    assert "0.200 ms, w4a8 0.400 ms" in policy.choose(3, 64, 32).why
    assert policy.choose(3, 32, 32).path == "w4a4"
    assert policy.choose(3, 99, 99).why.startswith("at most")
    for damage in ("{", "[]", '{"versions": {"torch": "1"}, "shapes": {"64x32": []}}'):
        path.write_text(damage)
        if damage == "[]":
            assert read_table("A GPU", versions) is None
        else:
            with pytest.raises(ValueError, match="delete it"):
                read_table("A GPU", versions)


@torch.inference_mode()
def test_weights_unpacked_for_good_give_what_w4a8_gives(compressed):
    if IS_INTERPRETED:
        pytest.skip("the interpreter rounds wrongly to e4m3")
    unpacked = with_kernels(compressed, "w8a8", HOPPER)
    linears = [m for m in unpacked.transformer.modules() if isinstance(m, UnpackedLinear)]
    assert len(linears) == 7 * len(unpacked.transformer.blocks)
    found = run_levels(unpacked, HALF, levels=2)
    assert torch.equal(found, run_levels(with_kernels(compressed, "w4a8", HOPPER), HALF, levels=2))
    with pytest.raises(ValueError, match="sm_80"):
        with_kernels(compressed, "w8a8", AMPERE)


def test_a_gpu_has_room_for_weights_of_a_quarter_of_its_memory(compressed):
    numel = packed_numel(compressed.transformer)
    linears = [m for m in compressed.transformer.modules() if isinstance(m, QuantizedLinear)]
    assert numel == sum(2 * one.qweight.shape[0] * one.qweight.shape[1] for one in linears) > 0
    assert has_room(numel, 4 * numel) and not has_room(numel, 4 * numel - 1)


@torch.inference_mode()
@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
def test_an_image_does_not_depend_on_its_batch_mates(compressed, capability):
    """Bit for bit, beside others of other lengths."""
    compute = "w4a16" if IS_INTERPRETED and capability == HOPPER else "packed"
    kernels = with_kernels(compressed, compute, capability)
    found = []
    for mates in (random_text((3, 2), seed=1), random_text((1, 4), seed=2)):
        features = TextFeatures.concat([random_text((5,)), mates])
        found.append(levels_of(kernels, HALF, features, levels=2))
    for level, other in zip(*found, strict=True):
        # the first image's rows: as prompted, and unconditional
        assert torch.equal(level[0], other[0]) and torch.equal(level[3], other[3])
        assert not torch.equal(level[1], other[1])


@torch.inference_mode()
def test_a_path_depends_on_one_image_alone(compressed):
    """Levels that are few tokens of one image, and many of two, are multiplied alike."""
    found = with_kernels(compressed, "auto", AMPERE)
    linear = found.transformer.blocks[0].ffn.fc1
    asked = []
    linear.policy = replace(linear.policy, table=None)
    choose, schedule = linear.choice, Schedule.of(1.0, "0.06M")
    linear.choice = lambda tokens: asked.append(tokens) or choose(tokens)
    for batch in (1, 2):
        run_levels(found, HALF, levels=2, batch=batch)
    per_image = {2 * level.num_tokens for level in schedule.levels[:2]}
    assert set(asked) == per_image


def test_blocks_of_kernels_are_saved_under_the_same_names(full):
    assert with_kernels(full, "auto", HOPPER).transformer.state_dict().keys() == (
        full.transformer.state_dict().keys()
    )


@torch.inference_mode()
@pytest.mark.parametrize("compute", ["w4a4", "w4a16", "bf16"])
@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
def test_a_lora_in_the_branch_is_multiplied_too(compressed, tmp_path, compute, capability):
    """On a linear with a shift and one without; the rank is no multiple of a tile."""
    torch.manual_seed(0)
    names = ("ffn.fc1", "ffn.fc2")
    shapes = {"ffn.fc1": (256, 64), "ffn.fc2": (64, 256)}
    tensors = {}
    for name, (N, K) in shapes.items():
        tensors[f"blocks.1.{name}.lora_A.weight"] = torch.randn(5, K) * 0.3
        tensors[f"blocks.1.{name}.lora_B.weight"] = torch.randn(N, 5) * 0.3
    save_file(tensors, tmp_path / "lora.safetensors")
    compressed.load_lora(tmp_path / "lora.safetensors")
    block = with_kernels(compressed, compute, capability).transformer.blocks[1]
    for name in names:
        linear = compressed.transformer.blocks[1].get_submodule(name)
        x_MK = torch.nn.functional.gelu(torch.randn(5, shapes[name][1], device=DEVICE)).to(HALF)
        found = block.get_submodule(name)(x_MK)
        if compute != "w4a4":
            without_shift(linear)
        assert snr_db(found, linear(x_MK)) > 40, name


@pytest.mark.parametrize(
    ("asked", "capability", "itemsize"),
    [("packed", (9, 0), 1), ("auto", (8, 7), 0), ("w4a8", (8, 6), 0), ("bf16", (8, 7), 2)],
)
def test_room_for_unpacked_weights_is_held_where_a_path_unpacks(asked, capability, itemsize):
    spec = PRESETS["svdquant"].for_module("blocks.0.ffn.fc1")
    with torch.device(DEVICE):
        linear = QuantizedLinear(128, 256, spec, bias_dtype=torch.float32)
    for tensor in linear.buffers():
        tensor.fill_(1)
    scratch = Scratch(torch.device(DEVICE))
    held = LowBitLinear(linear, Policy(asked, capability, 8), scratch, dtype=HALF)
    assert held.scratch_bytes() == itemsize * 128 * 256
    assert all(buffer.numel() == itemsize * 128 * 256 for buffer in scratch.buffers)
    # and no path of that policy unpacks to more
    for num_tokens in (1, 64, 65, 4096):
        form = held.form(held.choice(num_tokens).path)
        assert (0 if form is None else form.dtype.itemsize) <= itemsize
