"""The studio without its page: orders, the queue, models on the shelf, images, reports."""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
import random
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from studio_model import make_smallest
from var_compressor.evaluation.agreement import bit_agreement
from var_compressor.images import SETTINGS_KEY, read_settings, write_png
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.resident import resident_bytes
from var_compressor.studio.comparing import FULL_DIFFERENCE, difference_map
from var_compressor.studio.drawing import PREVIEW_STAGE, Drawing, Painter, draw, preview
from var_compressor.studio.engine import (
    INTERNAL_ERROR,
    CancelledError,
    Engine,
    QueueFullError,
    State,
)
from var_compressor.studio.gallery import Gallery
from var_compressor.studio.orders import MAX_PROMPT, MAX_SEED, Order
from var_compressor.studio.reports import Reports
from var_compressor.studio.shelf import MAX_OPEN, OUT_OF_MEMORY, Opening, Shelf, offers

OPENING = Opening(torch.float32, "auto", 16, False)
CPU = torch.device("cpu")
PATIENCE = 60


def pixels(image):
    return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()


def ignore(progress):
    """A report that nobody reads."""


@pytest.fixture
def shelf(model_dir, artifact_dir):
    return Shelf(offers([str(model_dir), str(artifact_dir)]), CPU, OPENING)


@pytest.fixture
def painter(shelf, tmp_path):
    return Painter(shelf, Gallery(tmp_path / "gallery"))


@pytest.fixture
def names(shelf):
    return tuple(shelf.offered)


class Held:
    """A worker whose jobs report again and again until they are let go."""

    def __init__(self):
        self.let_go = threading.Event()

    def __call__(self, order, report):
        report("begun")
        while not self.let_go.wait(0.002):
            report("held")
        return order


@pytest.fixture
def held():
    return Held()


@pytest.fixture
def engine(held):
    engine = Engine([held], max_waiting=3)
    yield engine
    engine.close()


def until(condition, seconds=PATIENCE):
    lapse = threading.Event()
    for _ in range(int(seconds / 0.002)):
        if condition():
            return
        lapse.wait(0.002)
    raise AssertionError("nothing happened")


# --- orders --------------------------------------------------------------------------------------


GOOD = {"prompt": "a cat", "models": ("m",)}


def test_an_order_of_a_page_is_that_of_its_png(tmp_path):
    order = Order.checked(
        GOOD
        | {"prompt": ' <b>"ü\n猫', "negative": "dog", "seed": str(MAX_SEED), "cfg": 2, "tau": 0.7}
        | {"aspect_ratio": 0.76, "pixel_budget": "0.25M", "top_p": 0.5}
    )
    assert (order.aspect_ratio, order.seed) == (0.75, MAX_SEED)
    write_png(Image.new("RGB", (4, 4)), tmp_path / "x.png", order.settings("m"))
    assert Order.checked(read_settings(tmp_path / "x.png") | {"models": ("m",)}) == order


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is not a text"),
        ({"prompt": "x" * 2**20}, f"1,048,576 characters; at most {MAX_PROMPT:,}"),
        ({"negative": "x" * (MAX_PROMPT + 1)}, "negative prompt has 2,001 characters"),
        ({"seed": "-1"}, "seed is '-1'"),
        ({"seed": "1e3"}, "seed is '1e3'"),
        ({"seed": "٣"}, "seed is"),
        ({"seed": True}, "seed is 'True'"),
        ({"seed": MAX_SEED + 1}, "the largest is"),
        ({"cfg": float("nan")}, "guidance is nan"),
        ({"cfg": 1e9}, "guidance is 1000000000.0; give a number from 1 to 20"),
        ({"tau": 0}, "temperature is 0"),
        ({"tau": "hot"}, "temperature is hot"),
        ({"top_p": 2}, "top-p is 2"),
        ({"aspect_ratio": 0}, "aspect ratio is 0"),
        ({"pixel_budget": "9M"}, "image size is 9M"),
        ({"pixel_budget": ["1M"]}, "image size is"),
        ({"models": ()}, "choose one model"),
        ({"models": ("a", "b", "c")}, "choose one model"),
    ],
)
def test_an_order_that_cannot_be_says_why(change, message):
    with pytest.raises(ValueError, match=message) as refused:
        Order.checked(GOOD | change)
    assert len(str(refused.value)) < 200


def test_half_a_character_does_not_reach_the_tokenizer():
    assert Order.checked(GOOD | {"prompt": "a \ud800 cat"}).prompt == "a ? cat"


# --- the queue -----------------------------------------------------------------------------------


def test_first_come_first_served_and_everybody_knows_the_position(engine, held):
    jobs = [engine.submit(0, "me")]
    until(lambda: jobs[0].snapshot().latest == "held")
    jobs += [engine.submit(i, "me") for i in (1, 2, 3)]
    assert [job.snapshot().position for job in jobs] == [0, 1, 2, 3]
    jobs[1].cancel()
    assert jobs[1].snapshot().state is State.cancelled
    assert [job.snapshot().position for job in jobs] == [0, 0, 1, 2]
    held.let_go.set()
    assert [job.wait(PATIENCE).result for job in jobs] == [0, None, 2, 3]


def test_a_full_queue_says_so_and_takes_orders_again(engine, held):
    jobs = [engine.submit(0, "me")]
    until(lambda: engine.num_running == 1)
    jobs += [engine.submit(i, "me") for i in (1, 2, 3)]
    with pytest.raises(QueueFullError, match="queue is full: 3 drawings wait already; try again"):
        engine.submit(4, "me")
    jobs[2].cancel()
    jobs.append(engine.submit(5, "me"))
    held.let_go.set()
    assert [job.wait(PATIENCE).result for job in jobs] == [0, 1, None, 3, 5]


def test_a_visitor_cancels_his_own_jobs_alone(engine, held):
    mine, yours = engine.submit("mine", "me"), engine.submit("yours", "you")
    also_mine = engine.submit("also mine", "me")
    engine.cancel_all_of("me")
    assert mine.wait(PATIENCE).state is also_mine.wait(PATIENCE).state is State.cancelled
    held.let_go.set()
    assert yours.wait(PATIENCE).result == "yours"
    yours.cancel()
    assert yours.snapshot().state is State.done


def test_one_jobs_fault_ends_no_other(capsys):
    def work(order, report):
        raise order

    engine = Engine([work], max_waiting=4)
    faults = [ValueError("no\nsuch model"), KeyError("secret"), MemoryError(), OSError("disk")]
    said = [engine.submit(fault, "").wait(PATIENCE) for fault in faults]
    engine.close()
    assert {one.state for one in said} == {State.failed}
    wanted = ["no such model", INTERNAL_ERROR, INTERNAL_ERROR, "disk"]
    assert [one.message for one in said] == wanted
    assert "KeyError: 'secret'" in capsys.readouterr().err


def test_closing_cancels_what_runs_and_waits_and_takes_no_more(held):
    engine = Engine([held], max_waiting=3)
    jobs = [engine.submit(i, "") for i in range(3)]
    engine.close(PATIENCE)
    assert [job.snapshot().state for job in jobs] == [State.cancelled] * 3
    with pytest.raises(QueueFullError, match="closing"):
        engine.submit(3, "")


# --- models --------------------------------------------------------------------------------------


def test_an_artifact_comes_with_the_model_it_was_made_of(model_dir, artifact_dir):
    both = offers([str(artifact_dir)])
    assert [one.source for one in both] == [str(model_dir), str(artifact_dir)]
    assert [one.is_compressed for one in both] == [False, True]
    assert both == offers([str(artifact_dir), str(model_dir), str(artifact_dir)])
    assert [one.source for one in offers([])] == ["infinity-tiny"]
    with pytest.raises(ValueError, match="no such directory"):
        offers(["nowhere-at-all"])


def test_models_share_a_text_encoder_and_few_are_open(model_dir, artifact_dir, kv_artifact_dir):
    shelf = Shelf(offers(list(map(str, (artifact_dir, kv_artifact_dir)))), CPU, OPENING)
    opened = [shelf.take(name) for name in shelf.offered]
    assert len(opened) == 3 and len(shelf.open_names) == MAX_OPEN
    assert len({id(pipeline.text_encoder) for pipeline in opened}) == 1
    assert shelf.open_names == list(shelf.offered)[1:]
    with pytest.raises(ValueError, match="no such model here"):
        shelf.take("x" * 1000)


@pytest.mark.parametrize(("failures", "state"), [(1, State.done), (9, State.failed)])
def test_memory_that_runs_out_is_an_answer(painter, names, monkeypatch, failures, state):
    """The failing allocation is a real one: more than any machine has."""
    order, before = Order("a cat", names[:1]), []
    plain, left = InfinityPipeline.decode, [failures]

    def decode(self, latent_BDYX, **options):
        before.append(list(painter.shelf.open_names))
        if left[0]:
            left[0] -= 1
            torch.empty(2**46)
        return plain(self, latent_BDYX, **options)

    painter(Order("a cat", names[1:]), ignore)
    engine = Engine([painter], max_waiting=1)
    with monkeypatch.context() as patched:
        patched.setattr(InfinityPipeline, "decode", decode)
        said = engine.submit(order, "").wait(PATIENCE)
    assert said.state is state and said.message == (OUT_OF_MEMORY if failures > 1 else "")
    # the second try has the memory of every other model
    assert before[0] == [names[1], names[0]] and before[1] == [names[0]]
    assert engine.submit(order, "").wait(PATIENCE).state is State.done
    engine.close()


# --- drawing -------------------------------------------------------------------------------------


def test_a_picture_is_what_the_pipeline_draws(painter, names, model_dir):
    seen = []
    order = Order("a red cat", names[:1], negative="cat", seed=5, aspect_ratio=0.5, cfg=2.0)
    picture = painter(order, seen.append).pictures[0]
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    same = pipeline.generate(
        ["a red cat"], seed=5, sampling=Sampling(cfg=2.0), negative=["cat"], aspect_ratio=0.5
    )
    assert pixels(picture.image) == pixels(same.pil[0]) and picture.kv_bytes == same.kv_bytes
    with Image.open(picture.file) as kept:
        assert pixels(kept) == pixels(picture.image)
    assert Order.checked(read_settings(picture.file) | {"models": names[:1]}) == order
    num_levels = len(pipeline.schedule_for(0.5, None).levels)
    stages = [stage.name for stage in picture.stages]
    levels = [f"level {index + 1}" for index in range(num_levels)]
    assert stages == ["text", *levels, "VAE", PREVIEW_STAGE]
    assert all(stage.seconds > 0 and stage.peak_bytes > 2**20 for stage in picture.stages)
    assert [one.done_levels for one in seen if one.num_levels] == list(range(num_levels + 1))
    shown = [one.preview for one in seen if one.stage == "drawing"]
    assert shown == list(picture.previews) and len(shown) == num_levels - 1


def test_the_preview_of_a_whole_image_is_the_image(painter, names):
    pipeline = painter.shelf.take(names[0])
    generation = pipeline.generate(["a cat"], seed=0)
    schedule = pipeline.schedule_for(1.0, None)
    shown = preview(pipeline, generation.latent_BDYX, schedule.levels[-1], schedule)
    assert pixels(shown) == pixels(generation.pil[0])


@pytest.mark.parametrize("stop_after", range(4))
def test_a_cancelled_drawing_leaves_the_model_as_it_was(painter, names, stop_after):
    pipeline, order = painter.shelf.take(names[1]), Order("a cat", names[1:], seed=3)
    wanted, _ = draw(pipeline, order, model="", report=ignore)

    def report(progress):
        if progress.done_levels == stop_after:
            raise CancelledError

    with pytest.raises(CancelledError):
        draw(pipeline, order, model="", report=report)
    again, _ = draw(pipeline, order, model="", report=ignore)
    assert pixels(again.image) == pixels(wanted.image)


def test_images_beyond_the_models_own_size_are_refused(painter, names):
    with pytest.raises(ValueError, match=r"1M is beyond this model's own 0\.06M"):
        painter(Order("a cat", names[:1], pixel_budget="1M"), ignore)


def test_a_model_compared_with_itself_is_the_same(painter, names):
    found = painter(Order("a cat", (names[0], names[0])), ignore).comparison
    assert set(found.drawn) == set(found.forced) == {1.0}
    assert (found.mean_difference, found.max_difference, found.changed) == (0, 0, 0)


def test_a_comparison_agrees_with_the_evaluation(painter, names):
    order = Order("a red cat", names, seed=1, cfg=2.0, tau=0.7)
    drawing = painter(order, ignore)
    full, compressed = (painter.shelf.take(name) for name in names)
    options = {"seed": 1, "sampling": order.sampling, "with_trace": True}
    one, other = (pipeline.generate(["a red cat"], **options) for pipeline in (full, compressed))
    bits = one.trace.bits
    wanted = bit_agreement(full, compressed, full.encode(["a red cat"]), bits, cfg=2.0)
    found = drawing.comparison
    assert found.num_bits == wanted.num_bits
    assert found.forced == pytest.approx(wanted.same_bit, abs=2e-3)
    assert found.mean(found.forced) == pytest.approx(wanted.mean_same_bit, abs=2e-3)
    equal = [(a == b).float().mean().item() for a, b in zip(bits, other.trace.bits, strict=True)]
    assert found.drawn == pytest.approx(equal) and min(equal) < 1
    a, b = (np.asarray(picture.image, dtype=float) for picture in drawing.pictures)
    assert found.mean_difference == pytest.approx(abs(a - b).mean())
    assert found.max_difference == abs(a - b).max()
    assert found.changed == pytest.approx((a != b).any(-1).mean())


def test_the_difference_map_is_brighter_where_more_differs():
    steps = np.array([0, 1, 20, 40, 60, 80, FULL_DIFFERENCE, 255])
    shown = np.asarray(difference_map(np.stack([steps * 0, steps, steps // 2], -1)[None]))
    brightness = shown[0].astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness[:-1]) > 0).all() and brightness[-1] == brightness[-2]


def test_two_kinds_of_models_are_drawn_but_not_compared_by_bits(model_dir, tmp_path):
    shelf = Shelf(offers([str(model_dir), "infinity-tiny"]), CPU, OPENING)
    painter = Painter(shelf, Gallery(tmp_path))
    drawing = painter(Order("a cat", tuple(shelf.offered)), ignore)
    assert drawing.comparison is None and "not comparable" in drawing.note
    assert len(drawing.pictures) == 2


# --- many at once --------------------------------------------------------------------------------


def test_200_visitors_get_their_own_images(tmp_path):
    """Two workers, room for 24: nobody is lost or mixed up, who is refused asks again."""
    gallery = Gallery(tmp_path / "gallery")
    offered = offers([str(make_smallest(tmp_path / "model"))])
    shelves = [Shelf(offered, CPU, OPENING) for _ in range(2)]
    engine = Engine([Painter(shelf, gallery) for shelf in shelves], max_waiting=24)
    words = ["a", "red", "cat", "a red", "red cat", "a cat", "cat red", "a red cat"]
    orders = [
        Order(prompt, (offered[0].name,), seed=seed, cfg=cfg)
        for seed, (prompt, cfg) in zip(
            range(200), itertools.cycle(itertools.product(words, (1.0, 3.0))), strict=False
        )
    ]
    got, refusals, most_waiting = {}, [], []

    def visit(index):
        pause, own = threading.Event(), random.Random(index)
        while True:
            try:
                job = engine.submit(orders[index], str(index))
                break
            except QueueFullError as error:
                refusals.append(str(error))
                pause.wait(own.uniform(0.05, 0.3))
        most_waiting.append(engine.num_waiting)
        drawing = job.wait(PATIENCE).result
        assert drawing.order is orders[index]
        got[index] = pixels(drawing.pictures[0].image), drawing.pictures[0].file

    before = resident_bytes()
    visitors = [threading.Thread(target=visit, args=(index,)) for index in range(200)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(PATIENCE)
    engine.close()
    assert len(got) == 200 and max(most_waiting) <= 24
    assert refusals and all("queue is full" in said for said in refusals)
    assert len({pixels for pixels, _ in got.values()}) == 200
    pipeline = shelves[0].take(offered[0].name)
    for index in range(0, 200, 5):
        order = orders[index]
        alone = pipeline.generate([order.prompt], seed=order.seed, sampling=order.sampling)
        assert got[index][0] == pixels(alone.pil[0])
    for index, (drawn, file) in got.items():
        settings = read_settings(file)
        assert (settings["prompt"], settings["seed"]) == (orders[index].prompt, index)
        with Image.open(file) as kept:
            assert pixels(kept) == drawn
    gc.collect()
    assert not any(type(one) is Drawing for one in gc.get_objects())
    assert resident_bytes() - before < 200 * 2**20


# --- gallery and PNGs ----------------------------------------------------------------------------


def test_the_gallery_shows_the_newest_first_and_only_ours(tmp_path):
    gallery = Gallery(tmp_path / "new" / "folder")
    for seed in range(5):
        gallery.add(Image.new("RGB", (4, 4)), {"prompt": "p" * 200, "seed": seed})
    (gallery.folder / "zzz.png").write_bytes(b"not a PNG")
    Image.new("RGB", (4, 4)).save(gallery.folder / "zz.png")
    found = gallery.newest(3)
    assert [entry.settings["seed"] for entry in found] == [4, 3, 2]
    assert found[0].caption == "p" * 80 + "… · seed 4"


def _png_with(path, text):
    info = PngInfo()
    info.add_itxt(SETTINGS_KEY, text, zip=len(text) > 10**5)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("hello"), "not a readable PNG"),
        (lambda path: path.write_bytes(b""), "not a readable PNG"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "not a readable PNG"),
        (lambda path: Image.new("RGB", (4, 4)).save(path, "JPEG"), "not a readable PNG"),
        (lambda path: Image.new("RGB", (4, 4)).save(path), "carries no settings"),
        (lambda path: _png_with(path, "{"), "settings are damaged"),
        (lambda path: _png_with(path, "[1]"), "settings are damaged"),
        (lambda path: _png_with(path, "[" * 10**5), "settings are damaged"),
        (lambda path: _png_with(path, " " * 10**8), "not a readable PNG"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, make, message):
    path = tmp_path / "x.png"
    make(path)
    with pytest.raises(ValueError, match=message):
        read_settings(path)


# --- reports -------------------------------------------------------------------------------------


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


HOSTILE = '</iframe><script>parent.x = 1</script>"><img src=x onerror="alert(1)"> ${1+1} {{7*7}}'


def test_a_report_stays_in_its_frame(tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    (folder / "index.html").write_text(HOSTILE)
    ((tag, attributes),) = Elements(Reports([folder]).frame("eval/index.html")).found
    assert tag == "iframe" and attributes["sandbox"] == ""
    assert attributes["srcdoc"].endswith(HOSTILE) and "default-src 'none'" in attributes["srcdoc"]


def test_reports_are_those_of_their_folders_alone(tmp_path):
    folder, secret = tmp_path / "eval", tmp_path / "secret.html"
    (folder / "a" / ".hidden").mkdir(parents=True)
    secret.write_text("secret")
    Image.new("RGB", (4, 4)).save(folder / "grid.png")
    (folder / "a" / "index.html").write_text("page")
    (folder / "a" / ".hidden" / "x.html").write_text("hidden")
    (folder / "notes.txt").write_text("text")
    (folder / "fake.png").write_text("<svg onload=alert(1)>")
    os.symlink(secret, folder / "link.html")
    reports = Reports([folder])
    assert list(reports.found()) == ["eval/a/index.html", "eval/fake.png", "eval/grid.png"]
    assert Elements(reports.frame("eval/grid.png")).found[0][0] == "img"
    for name in ("eval/link.html", "eval/../secret.html", str(secret), "", "eval/notes.txt"):
        with pytest.raises(ValueError, match="no such report"):
            reports.frame(name)
    with pytest.raises(ValueError, match="is not a PNG"):
        reports.frame("eval/fake.png")
    with pytest.raises(ValueError, match="no such directory"):
        Reports([Path("nowhere")])
