"""Drawing goes on after a kill at any moment, and many processes find what one does."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from processes import Started, start
from var_compressor.evaluation.benchmarks import Sample, image_seed
from var_compressor.evaluation.gallery import Gallery, Writer, read_carried, read_image
from var_compressor.evaluation.results import read_results, read_rows
from var_compressor.evaluation.runner import Plan, PromptSet, draw_sets
from var_compressor.evaluation.sharding import Crew
from var_compressor.models.sampling import Sampling
from var_compressor.models.tensor_files import CheckpointError
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.team import SOLO

WORDS = ("a", "red", "cat", "a cat", "red cat", "cat red", "cat cat", "red red", "a red cat")
SAMPLING = Sampling(cfg=2.0, tau=0.7)


@pytest.fixture(scope="module")
def pipeline(model_dir: Path) -> InfinityPipeline:
    return InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)


def samples(*prompts: str) -> PromptSet:
    return PromptSet("words", tuple(Sample(f"{i:02d}", text) for i, text in enumerate(prompts)))


def gallery(root: Path, **changes: object) -> Gallery:
    return Gallery(root, "tiny", {"seed": 3, **changes})


def draw(pipeline, one: Gallery, prompts: PromptSet, *, batch: int = 1, notes: list | None = None):
    """Failures, and how far the bar came at each step."""
    plan = Plan(pipeline.schedule_for(1.0, None), SAMPLING, batch)
    steps = []
    failed = draw_sets(
        one,
        [prompts],
        plan,
        opened=lambda: pipeline,
        crew=Crew(SOLO, torch.device("cpu")),
        on_progress=lambda stage, done, total: steps.append((done, total)),
        note=(notes if notes is not None else []).append,
    )
    return failed[prompts.name], steps


def pixels(one: Gallery, prompts: PromptSet) -> dict[str, torch.Tensor]:
    return {s.id: read_image(one.path("words", s)) for s in prompts.samples}


# ---- one process


def test_images_are_those_that_generate_draws_with_the_prompts_own_seed(pipeline, tmp_path):
    prompts, one = samples(*WORDS[:3]), gallery(tmp_path)
    draw(pipeline, one, prompts)
    for sample in prompts.samples:
        path = one.path("words", sample)
        image_3YX, carried = read_image(path), read_carried(path)
        seed = image_seed("words", sample.prompt, 3)
        wanted = pipeline.generate([sample.prompt], seed=seed, sampling=SAMPLING)
        assert torch.equal(image_3YX, wanted.uint8_BYX3[0].permute(2, 0, 1))
        assert carried["prompt"] == sample.prompt and carried["seed"] == seed
    assert json.loads((one.folder / "identity.json").read_text()) == one.identity


def test_what_is_there_is_kept_and_what_is_missing_or_damaged_is_drawn(pipeline, tmp_path):
    prompts, one = samples(*WORDS[:6]), gallery(tmp_path)
    draw(pipeline, one, prompts)
    whole = pixels(one, prompts)
    paths = [one.path("words", sample) for sample in prompts.samples]
    written = {path: path.stat().st_mtime_ns for path in paths}
    content = paths[1].read_bytes()
    paths[0].unlink()
    paths[1].write_bytes(content[: len(content) // 2])
    paths[2].write_bytes(content[:100] + b"\0" * 20 + content[120:])
    paths[3].write_bytes(paths[4].read_bytes())  # an image of another prompt
    (paths[0].parent / f".{paths[0].name}.77.tmp").write_bytes(content[:50])

    failed, steps = draw(pipeline, one, prompts)
    assert not failed and steps[0] == (2, 6) and steps[-1] == (6, 6)
    again = pixels(one, prompts)
    assert all(torch.equal(again[id], whole[id]) for id in whole)
    kept = [path.stat().st_mtime_ns == written[path] for path in paths]
    assert kept == [False, False, False, False, True, True]
    assert {path.name for path in paths[0].parent.iterdir()} == {path.name for path in paths}


def test_nothing_is_opened_when_nothing_is_missing(pipeline, tmp_path):
    prompts, one = samples("a"), gallery(tmp_path)
    draw(pipeline, one, prompts)
    plan = Plan(pipeline.schedule_for(1.0, None), SAMPLING, 1)
    silent = {"on_progress": lambda *_: None, "note": lambda _: None}
    crew = Crew(SOLO, torch.device("cpu"))
    draw_sets(one, [prompts], plan, opened=lambda: pytest.fail("opened"), crew=crew, **silent)


def test_other_settings_and_other_prompts_never_share_an_image(pipeline, tmp_path):
    one, other = gallery(tmp_path), gallery(tmp_path, cfg=3)
    assert one.folder != other.folder and one.key == gallery(tmp_path).key
    draw(pipeline, one, samples("a cat"))
    changed = samples("a red cat")
    draw(pipeline, one, changed)
    path = one.path("words", changed.samples[0])
    image_3YX, carried = read_image(path), read_carried(path)
    assert carried["prompt"] == "a red cat" and len(one.names("words")) == 2
    wanted = pipeline.generate(
        ["a red cat"], seed=image_seed("words", "a red cat", 3), sampling=SAMPLING
    )
    assert torch.equal(image_3YX, wanted.uint8_BYX3[0].permute(2, 0, 1))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_bad_prompt_is_listed_and_the_others_are_drawn(pipeline, tmp_path, monkeypatch, batch):
    prompts, one = samples("a", " ", "cat", "red", "a cat"), gallery(tmp_path)
    encode = InfinityPipeline.encode

    def choosy(self, texts):
        if texts == ["red"]:
            raise RuntimeError("no such\ncolour")
        return encode(self, texts)

    monkeypatch.setattr(InfinityPipeline, "encode", choosy)
    failed, steps = draw(pipeline, one, prompts, batch=batch)
    assert [(f.id, f.prompt, f.reason) for f in failed] == [
        ("01", " ", "the prompt is empty"),
        ("03", "red", "no such colour"),
    ]
    assert steps[-1] == (5, 5) and len(one.names("words")) == 3
    monkeypatch.undo()
    # the one that can be drawn now is, and no other
    assert [f.id for f in draw(pipeline, one, prompts, batch=batch)[0]] == ["01"]
    assert len(one.names("words")) == 4


def test_a_prompt_that_only_fails_when_drawn_leaves_its_batch_mates_their_images(
    pipeline, tmp_path, monkeypatch
):
    prompts, one = samples("a", "cat", "red"), gallery(tmp_path)
    decode = InfinityPipeline.decode
    drawn = []

    def fragile(self, latent_BDYX, *, strip_rows):
        drawn.append(len(latent_BDYX))
        image_B3YX = decode(self, latent_BDYX, strip_rows=strip_rows)
        return image_B3YX * float("nan") if len(drawn) in (1, 3) else image_B3YX

    monkeypatch.setattr(InfinityPipeline, "decode", fragile)
    failed, _ = draw(pipeline, one, prompts, batch=3)
    assert drawn == [3, 1, 1, 1]
    assert [(f.id, f.reason) for f in failed] == [("01", "the image is not finite")]
    assert len(one.names("words")) == 2


def test_without_any_image_the_run_ends(pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"words: no image.*the prompt is empty"):
        draw(pipeline, gallery(tmp_path), samples("", " "))


def test_what_is_no_prompts_fault_ends_the_run(pipeline, tmp_path, monkeypatch):
    def broken(self, texts):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(InfinityPipeline, "encode", broken)
    with pytest.raises(torch.OutOfMemoryError):
        draw(pipeline, gallery(tmp_path), samples("a", "cat"))


def test_a_lost_process_is_told_of_once(pipeline, tmp_path):
    prompts, one = samples("a"), gallery(tmp_path)
    one.open()
    left = one.mark_running(1)
    notes: list[str] = []
    draw(pipeline, one, prompts, notes=notes)
    assert len(notes) == 1 and f"process-1-pid-{os.getpid()}" in notes[0]
    assert not left.exists() and not list(one.folder.glob(".running*"))
    draw(pipeline, one, prompts, notes=notes)
    assert len(notes) == 1


def test_two_runs_do_not_draw_into_the_same_folder(pipeline, tmp_path):
    from var_compressor.models.new_directory import locked

    one = gallery(tmp_path)
    one.open()
    with locked(one.folder), pytest.raises(CheckpointError, match="another process"):
        draw(pipeline, one, samples("a"))


def test_what_the_writer_runs_into_ends_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    image_3YX = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(OSError), Writer() as writer:
        writer.put(image_3YX, tmp_path / "file" / "x.png", {})


def test_a_writer_waits_for_its_images(tmp_path):
    image_3YX = torch.randint(256, (3, 64, 48), dtype=torch.uint8)
    with Writer() as writer:
        for i in range(40):
            writer.put(image_3YX + i, tmp_path / f"{i}.png", {"i": i})
    for i in range(40):
        path = tmp_path / f"{i}.png"
        found, carried = read_image(path), read_carried(path)
        assert torch.equal(found, image_3YX + i) and carried["i"] == i


def test_a_batch_is_drawn_whole_or_kept(pipeline, tmp_path):
    """One missing image of a batch is drawn in the company that it had."""
    prompts, one = samples(*WORDS[:5]), gallery(tmp_path)
    draw(pipeline, one, prompts, batch=2)
    whole = pixels(one, prompts)
    one.path("words", prompts.samples[3]).unlink()
    _, steps = draw(pipeline, one, prompts, batch=2)
    assert steps[0] == (3, 5)
    again = pixels(one, prompts)
    assert all(torch.equal(again[id], whole[id]) for id in whole)


# ---- several processes

NUM_PROMPTS = 24


@pytest.fixture(scope="module")
def words(model_dir, kv_artifact_dir, tmp_path_factory) -> list[str]:
    """`varc evaluate` of a compressed model, its roots relative to the working directory."""
    prompts = tmp_path_factory.mktemp("prompts") / "words.txt"
    prompts.write_text("\n".join(" ".join(WORDS[i % 9] for i in (n, n // 9)) for n in range(24)))
    return [
        *("evaluate", "recipes/model/infinity-tiny.yaml", f"model.path={model_dir}"),
        *("model.device=cpu", "model.dtype=float32", "--artifact", str(kv_artifact_dir)),
        *("--gen-root", "gen", "--ref-root", "ref", "--out", "results"),
        *("--benchmarks", str(prompts), "--num-samples", "100", "--metrics", "psnr", "ssim"),
    ]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory) -> Path:
    """Where one process has done it all."""
    folder = tmp_path_factory.mktemp("one")
    finished(start(words, [folder]))
    return folder


def finished(processes: list[Started]) -> str:
    ended = [process.wait() for process in processes]
    assert all(code == 0 for code, _ in ended), "\n".join(said for _, said in ended)
    return ended[0][1]


def check_equal(a: Path, b: Path) -> None:
    rows_a, rows_b = read_rows(a / "results"), read_rows(b / "results")
    assert rows_a.keys() == rows_b.keys() == {"words/psnr", "words/ssim"}
    assert all(torch.equal(rows_a[name], rows_b[name]) for name in rows_a)
    assert rows_a["words/psnr"].shape == (NUM_PROMPTS,)
    assert 5 < rows_a["words/psnr"].min() < rows_a["words/psnr"].max() < 100
    found, other = (read_results(one / "results").benchmarks["words"] for one in (a, b))
    assert replace(found, seconds_per_image=0.0) == replace(other, seconds_per_image=0.0)


def pngs(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*.png"))


TEAMS = """
import torch
from var_compressor.evaluation.sharding import crew_of_environment

for turn in range(3):
    with crew_of_environment(torch.device("cpu")) as crew:
        mine = list(crew.queue(7))
        everybodys = crew.gathered(mine)
        rows = {i: torch.tensor([i + 0.1, -0.0, float("nan")]) for i in mine if i != 4}
        whole = crew.whole(rows, 7)
        wide = crew.whole({}, 7)
        wanted = torch.stack([torch.tensor([i + 0.1, -0.0, float("nan")]) for i in range(7)])
        wanted[4] = 0.0
        assert sorted(sum(everybodys, [])) == list(range(7)), everybodys
        assert torch.equal(whole.view(torch.int32), wanted.view(torch.int32)), whole
        assert wide is None and crew.told(lambda: crew.rank) == 0
        try:
            crew.told(lambda: int("x"))
        except ValueError as error:
            print(turn, error)
"""


def test_teams_share_out_jobs_and_add_up_rows_to_the_bit(tmp_path):
    """And meet again: neither counters nor addresses of the team before are in the way."""
    folders = [tmp_path / str(rank) for rank in range(3)]
    finished(start([], folders, program=TEAMS))
    for rank, folder in enumerate(folders):
        said = (folder / f"printed-{rank}.txt").read_text()
        assert said.count("invalid literal") == 3, said


def test_processes_with_a_disk_each_find_exactly_what_one_does(words, undisturbed, tmp_path):
    disks = [tmp_path / "0", tmp_path / "1"]
    # some images are there, on different disks
    there = {disks[0]: ("gen", range(0, 5)), disks[1]: ("ref", range(3, 20))}
    for disk, (root, numbers) in there.items():
        paths = sorted((undisturbed / root).rglob("*.png"))
        for number in numbers:
            target = disk / paths[number].relative_to(undisturbed)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(paths[number], target)
    finished(start(words, disks))
    check_equal(undisturbed, disks[0])
    assert not (disks[1] / "results").exists()
    # nothing was drawn twice, and every full-precision image is somewhere
    drawn = [name for disk in disks for name in pngs(disk / "gen")]
    assert sorted(drawn) == pngs(undisturbed / "gen")
    assert {n for disk in disks for n in pngs(disk / "ref")} == set(pngs(undisturbed / "ref"))
    index = json.loads((disks[0] / "results" / "images.json").read_text())["words"]
    for entry in index.values():
        for image in entry.values():
            assert image["machines"] == [socket.gethostname()]
            assert any((disk / image["file"]).is_file() for disk in disks)
    assert len(index) == NUM_PROMPTS and entry.keys() == {"images", "reference"}
    assert (disks[0] / "results" / "index.html").read_text().count("data:image/png") == 24


def test_processes_killed_at_random_and_started_again_find_what_one_does(
    words, undisturbed, tmp_path
):
    dice = random.Random(1)
    # the full-precision images are drawn first; one process is killed then, and later both
    for num_images, num_killed in ((dice.randint(5, 20), 1), (dice.randint(40, 44), 2)):
        processes = start(words, [tmp_path, tmp_path])
        while len(pngs(tmp_path)) < num_images:
            assert all(process.process.is_alive() for process in processes)
            time.sleep(0.002)
        for _ in range(num_killed):
            processes.pop(dice.randrange(len(processes))).kill()
        for code, said in (process.wait() for process in processes):
            # the other one does what is left, and ends with a line that says what to do
            assert code == 2 and "another process of this run has died" in said, said
            assert "start the same command again" in said and "Traceback" not in said
        assert not (tmp_path / "results").exists()
        if num_killed == 1:
            for path in sorted((tmp_path / "gen").rglob("*.png"))[::3]:
                path.unlink()
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in pngs(tmp_path)}
    assert len(times) < 2 * NUM_PROMPTS
    said = finished(start(words, [tmp_path, tmp_path]))
    assert "was cut off in an earlier run" in said
    assert all((tmp_path / name).stat().st_mtime_ns == then for name, then in times.items())
    check_equal(undisturbed, tmp_path)
    assert pngs(tmp_path) == pngs(undisturbed)
    for name in pngs(tmp_path):
        assert torch.equal(read_image(tmp_path / name), read_image(undisturbed / name))
