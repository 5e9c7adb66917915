"""What only a GPU shows: kernels in graphs, for batches, cancelled drawings and too little memory.

python -m pytest tests/test_on_gpu.py -m gpu
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tiny import QUICK_SPEC
from var_compressor.layers.kernel_block import KernelBlock
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.ptq import quantize_model
from var_compressor.quant.recording import Collection
from var_compressor.studio.drawing import Painter, draw
from var_compressor.studio.engine import CancelledError, Engine, State
from var_compressor.studio.gallery import Gallery
from var_compressor.studio.orders import Order
from var_compressor.studio.shelf import OUT_OF_MEMORY, Opening, Shelf, offers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda", 0)
PROMPTS = [
    "a large red metal cube to the left of a small blue striped ball on a wooden floor.",
    "a tiny yellow star on a checkerboard.",
    "a green ball.",
    "a small purple cone above a large white cube on grass.",
]
SAMPLING = Sampling(cfg=2.0, tau=0.5)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "w4a4"
    pipeline = InfinityPipeline.from_pretrained(
        "infinity-tiny", dtype=torch.float32, device=CUDA, compute="reference"
    )
    collection = Collection({"0": PROMPTS[0], "1": PROMPTS[1]}, 0, SAMPLING)
    quantize_model(pipeline, collection, QUICK_SPEC, base="infinity-tiny", out=out)
    return out


def opened(artifact, compute):
    pipeline = InfinityPipeline.from_pretrained(artifact, device=CUDA, compute=compute)
    assert isinstance(pipeline.transformer.blocks[0], KernelBlock)
    return pipeline


def drawn_bits(pipeline, prompts, seeds):
    made = pipeline.generate(prompts, seed=seeds, sampling=SAMPLING, with_trace=True)
    return [level_BLQ.clone() for level_BLQ in made.trace.bits]


@pytest.mark.parametrize("compute", ["w4a4", "packed", "w8a8"])
def test_an_image_does_not_depend_on_its_neighbours(artifact, compute):
    pipeline = opened(artifact, compute)
    one = drawn_bits(pipeline, PROMPTS, [3, 4, 5, 6])
    other = drawn_bits(pipeline, [PROMPTS[0], *PROMPTS[:0:-1]], [3, 8, 9, 10])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))
    assert not any(torch.equal(a[1:], b[1:]) for a, b in zip(one[2:], other[2:], strict=True))


@pytest.mark.parametrize("compute", ["w4a4", "packed", "w8a8"])
def test_the_number_of_neighbours_changes_rounding_only(artifact, compute):
    """Other shapes are multiplied by other kernels, which add in another order."""
    pipeline, options = opened(artifact, compute), {"sampling": SAMPLING, "with_trace": True}
    alone = [
        pipeline.generate([prompt], seed=seed, **options).trace
        for seed, prompt in enumerate(PROMPTS)
    ]
    bits = [torch.cat(rows) for rows in zip(*(one.bits for one in alone), strict=True)]
    forced = pipeline.generate(PROMPTS, seed=[0, 1, 2, 3], forced_bits=bits, **options).trace
    logits = [torch.cat(rows) for rows in zip(*(one.logits for one in alone), strict=True)]
    shares = [
        (a.argmax(-1) == b.argmax(-1)).float().mean().item()
        for a, b in zip(logits, forced.logits, strict=True)
    ]
    print(compute, " ".join(f"{share:.4f}" for share in shares))
    # a changed rounding changes which 4-bit codes inputs get
    assert min(shares) > (0.8 if compute == "w4a4" else 0.95)


@pytest.mark.parametrize("compute", ["w4a4", "packed", "w8a8"])
def test_replayed_graphs_draw_what_the_first_run_drew(artifact, compute):
    pipeline = opened(artifact, compute)
    first = drawn_bits(pipeline, PROMPTS[:1], [7])
    for _ in range(3):
        again = drawn_bits(pipeline, PROMPTS[:1], [7])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_graphs_of_another_model_may_die_while_graphs_are_recorded(artifact):
    wanted = drawn_bits(opened(artifact, "packed"), PROMPTS[:1], [7])
    other = opened(artifact, "packed")
    for _ in range(3):
        drawn_bits(other, PROMPTS[:1], [7])
    other.itself = other
    kept, num_dropped = [other], 0
    del other

    def drop_the_other(*_):
        nonlocal num_dropped
        if kept and torch.cuda.is_current_stream_capturing():
            kept.clear()
            num_dropped += 1

    pipeline = opened(artifact, "packed")
    hook = pipeline.transformer.blocks[0].register_forward_pre_hook(drop_the_other)
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(3):
            again = drawn_bits(pipeline, PROMPTS[:1], [7])
            assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))
    finally:
        gc.set_threshold(*thresholds)
        hook.remove()
    assert num_dropped == 1


# --- the studio ----------------------------------------------------------------------------------


@pytest.fixture
def painter(artifact, tmp_path):
    opening = Opening(torch.bfloat16, "auto", 16, False)
    shelf = Shelf(offers([str(artifact)]), CUDA, opening)
    return Painter(shelf, Gallery(tmp_path / "gallery"))


def ignore(progress):
    """A report that nobody reads."""


def ordered(painter, num_models=1, seed=3):
    names = tuple(painter.shelf.offered)
    return Order(PROMPTS[0], names if num_models == 2 else names[1:], seed=seed, cfg=2.0)


def test_a_picture_with_previews_is_what_the_pipeline_draws(painter):
    order = ordered(painter)
    for _ in range(3):
        picture = painter(order, ignore).pictures[0]
    pipeline = painter.shelf.take(order.models[0])
    same = pipeline.generate([order.prompt], seed=order.seed, sampling=order.sampling)
    assert picture.image.tobytes() == same.pil[0].tobytes()
    assert len(picture.previews) == len(pipeline.schedule_for(1.0, None).levels) - 1
    assert all(stage.seconds > 0 and stage.peak_bytes > 2**20 for stage in picture.stages)


@pytest.mark.parametrize("num_before", [0, 1, 2])
@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_a_cancelled_drawing_leaves_the_model_as_it_was(painter, num_before, stop_after):
    """Cancelled in the plain run, while graphs are recorded, and while they are replayed."""
    order = ordered(painter)
    pipeline = painter.shelf.take(order.models[0])
    wanted, _ = draw(pipeline, order, model="", report=ignore)
    pipeline.free_cache()
    for _ in range(num_before):
        draw(pipeline, order, model="", report=ignore)

    def report(progress):
        if progress.done_levels == stop_after:
            raise CancelledError

    with pytest.raises(CancelledError):
        draw(pipeline, order, model="", report=report)
    for _ in range(3):
        again, _ = draw(pipeline, order, model="", report=ignore)
        assert again.image.tobytes() == wanted.image.tobytes()


def test_two_models_are_compared(painter):
    found = painter(ordered(painter, num_models=2), ignore).comparison
    assert 0.5 < found.mean(found.forced) < 1
    assert found.forced[0] > 0.9 and found.max_difference > 0


@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_too_little_memory_ends_the_order_and_not_the_studio(painter, num_before):
    order = ordered(painter)
    engine = Engine([painter], max_waiting=4)
    wanted = engine.submit(order, "").wait(120)
    assert wanted.state is State.done
    for _ in range(num_before):
        assert engine.submit(order, "").wait(120).state is State.done
    painter.shelf.put_away(keep=order.models[0])
    total = torch.cuda.get_device_properties(CUDA).total_memory
    room = torch.cuda.memory_reserved(CUDA)
    # another shape: what is kept for the last image does not serve it
    other = Order(order.prompt, order.models, negative="a cube", seed=1, cfg=2.0, aspect_ratio=0.5)
    try:
        torch.cuda.set_per_process_memory_fraction(room / total, CUDA)
        said = engine.submit(other, "").wait(120)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert said.state is State.failed and said.message == OUT_OF_MEMORY
    for _ in range(3):
        again = engine.submit(order, "").wait(120)
        assert again.state is State.done
        assert again.result.pictures[0].image.tobytes() == wanted.result.pictures[0].image.tobytes()
    engine.close()


def test_graphs_are_not_recorded_where_memory_is_short(artifact):
    """The pipeline alone, which no shelf frees: it draws the same, and records once it can.

    Without a VAE, for which there is no room either.
    """
    pipeline = opened(artifact, "packed")
    text, schedule = pipeline.encode(PROMPTS), pipeline.schedule_for(1.0, None)
    options = {"seed": [0, 1, 2, 3], "sampling": SAMPLING, "with_trace": True}
    wanted = drawn_bits(pipeline, PROMPTS, [0, 1, 2, 3])
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(free - 2**26, dtype=torch.uint8, device=CUDA)
    try:
        for _ in range(2):
            again = pipeline.draw(text, schedule, **options).trace.bits
            assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))
        assert pipeline._kept.logits.graphs.text_graph is None
    finally:
        del filler
    torch.cuda.empty_cache()
    for _ in range(3):
        again = drawn_bits(pipeline, PROMPTS, [0, 1, 2, 3])
        assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))
    assert all(pipeline._kept.logits.graphs.recorded.values())


def test_memory_that_runs_out_while_drawing(artifact):
    pipeline = opened(artifact, "packed")
    wanted = drawn_bits(pipeline, PROMPTS, [0, 1, 2, 3])
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    try:
        room = torch.cuda.memory_reserved(CUDA)
        torch.cuda.set_per_process_memory_fraction(room / total, CUDA)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            drawn_bits(pipeline, PROMPTS * 4, list(range(16)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    for _ in range(3):
        again = drawn_bits(pipeline, PROMPTS, [0, 1, 2, 3])
        assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_gpus_draw_at_once_what_one_draws(artifact):
    """Each in a thread of its own, as the studio's workers do, recording at the same time."""
    wanted = drawn_bits(opened(artifact, "packed"), PROMPTS, [0, 1, 2, 3])
    devices = [torch.device("cuda", number) for number in (0, 1)]
    pipelines = [
        InfinityPipeline.from_pretrained(artifact, device=device, compute="packed")
        for device in devices
    ]

    def draw_often(pipeline):
        assert torch.cuda.current_device() == 0
        return [drawn_bits(pipeline, PROMPTS, [0, 1, 2, 3]) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(draw_often, pipelines))
    for runs in found:
        for bits in runs:
            assert all(torch.equal(a, b.to(CUDA)) for a, b in zip(wanted, bits, strict=True))
