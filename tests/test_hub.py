"""Compressed models as one directory, and all models through a hub of these tests' own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from hub_server import TOKEN, Hub, Repo, running_hub
from var_compressor.pipeline import InfinityPipeline

REPO = "someone/tiny-w4a4"
# a user's three lines; the rest tells us what came of them
DRAW = """
import hashlib, sys, torch
from var_compressor import InfinityPipeline
found = []
for repo in sys.argv[1:]:
    pipe = InfinityPipeline.from_pretrained(repo, dtype=torch.float32)
    image = pipe.generate(["a red cat"], seed=3).image_B3YX
    found.append(hashlib.sha256(image.numpy().tobytes()).hexdigest())
print(" ;; ".join(found))
"""
PUSH = """
import sys, torch
from var_compressor import InfinityPipeline
for source, repo in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = InfinityPipeline.from_pretrained(source, dtype=torch.float32)
    print(pipe.push_to_hub(repo, commit_message="the first"))
"""
# damages files one after the other, and does what the message says
DAMAGE = """
import hashlib, re, sys, torch
from pathlib import Path
from var_compressor import InfinityPipeline
from var_compressor.models.directory import resolve
lines, folder = [], resolve(sys.argv[1])
for name in sys.argv[2:]:
    content = (folder / name).read_bytes()
    (folder / name).resolve().write_bytes(content[: len(content) // 2])
    try:
        InfinityPipeline.from_pretrained(sys.argv[1])
    except ValueError as error:
        lines.append(str(error))
    for path in re.search("delete (.*) and (.*) and open", lines[-1]).groups():
        Path(path).unlink()
    pipe = InfinityPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
image = pipe.generate(["a red cat"], seed=3).image_B3YX
print(" ;; ".join([*lines, hashlib.sha256(image.numpy().tobytes()).hexdigest()]))
"""
REFUSED = """
import sys
from var_compressor import InfinityPipeline
lines = []
for repo in sys.argv[1:]:
    try:
        InfinityPipeline.from_pretrained(repo)
    except ValueError as error:
        lines.append(str(error))
print(" ;; ".join(lines))
"""
MAIN = "from var_compressor.cli import main; main()"


@pytest.fixture
def hub():
    with running_hub() as found:
        yield found


@pytest.fixture(scope="module")
def folder(kv_artifact_dir, tmp_path_factory) -> Path:
    """A compressed model that needs no other."""
    out = tmp_path_factory.mktemp("saved") / "tiny-w4a4"
    InfinityPipeline.from_pretrained(kv_artifact_dir, dtype=torch.float32).save_pretrained(out)
    return out


@pytest.fixture
def run(hub: Hub, tmp_path: Path):
    """Runs a program with this hub and a cache of its own; what it says, which is one line."""

    def call(program: str, *words: str, fails: bool = False, **environment: str) -> str:
        settings = {
            **os.environ,
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            **environment,
        }
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            if name not in environment:
                settings.pop(name, None)
        found = subprocess.run(
            [sys.executable, "-c", program, *words],
            env=settings,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (found.returncode != 0) == fails, found.stderr
        return (found.stderr if fails else found.stdout).strip().splitlines()[-1]

    return call


def image_of(source: Path) -> torch.Tensor:
    pipeline = InfinityPipeline.from_pretrained(source, dtype=torch.float32)
    return pipeline.generate(["a red cat"], seed=3).image_B3YX


def drawn_by(source: Path) -> str:
    return hashlib.sha256(image_of(source).numpy().tobytes()).hexdigest()


# --- down -----------------------------------------------------------------------------------------


def test_three_lines_draw_from_a_cold_cache(hub, run, folder):
    hub.add(REPO, folder, **{"transformer__evil.bin": b"pickled", "notes.txt": b"mine"})
    # once more in the same run: nothing comes again
    assert run(DRAW, REPO, REPO) == " ;; ".join([drawn_by(folder)] * 2)
    fetched = hub.fetched()
    assert "transformer/blocks/002.safetensors" in fetched and len(set(fetched)) == len(fetched)
    assert not {"transformer/evil.bin", "notes.txt"} & set(fetched)
    # with no network the cache is enough, whether it is told so or not
    hub.asked.clear()
    assert run(DRAW, REPO, HF_HUB_OFFLINE="1") == drawn_by(folder)
    assert hub.asked == []
    start = time.monotonic()
    assert run(DRAW, REPO, HF_ENDPOINT="http://127.0.0.1:9") == drawn_by(folder)
    assert time.monotonic() - start < 30


def test_full_precision_opens_by_its_id_and_revision(hub, run, model_dir, folder):
    hub.add(REPO, folder)
    hub.add(REPO, model_dir, revision="full")
    opens = DRAW.replace("dtype=", "revision='full', dtype=")
    assert run(opens, REPO) == drawn_by(model_dir) != drawn_by(folder)
    assert "at none: the hub has no such revision" in run(
        opens.replace("'full'", "'none'"), REPO, fails=True
    )
    assert "only a hub id has a revision" in run(opens, str(model_dir), fails=True)


def test_a_connection_that_breaks_once_is_not_noticed(hub, run, folder):
    hub.add(REPO, folder)
    hub.cuts["transformer/blocks/001.safetensors"] = (1000, 1)
    assert run(DRAW, REPO) == drawn_by(folder)
    assert hub.fetched().count("transformer/blocks/001.safetensors") == 2


def test_a_download_that_was_cut_off_goes_on_with_what_is_missing(hub, run, folder, tmp_path):
    hub.add(REPO, folder)
    last = "transformer/blocks/001.safetensors"
    # more often than the client tries
    hub.cuts[last] = (1000, 99)
    generate = (MAIN, "generate", "a red cat", "--model", REPO, "--out", "x.png")
    said = run(*generate, fails=True)
    assert said.startswith(f"varc: {REPO}: the hub gave no answer") and "run it again" in said
    (snapshot,) = (tmp_path / "hf/hub").glob("models--*/snapshots/*")
    arrived = {str(one.relative_to(snapshot)) for one in snapshot.rglob("*") if one.is_file()}
    wanted = {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}
    assert len(arrived) > 5 and last not in arrived
    said = run(*generate, fails=True, HF_HUB_OFFLINE="1")
    assert said.startswith(f"varc: {REPO}: ") and "what is there stays" in said
    hub.cuts.clear()
    hub.asked.clear()
    assert run(DRAW, REPO) == drawn_by(folder)
    assert set(hub.fetched()) == wanted - arrived


def test_a_damaged_file_in_the_cache_is_named_with_the_way_out(hub, run, folder):
    hub.add(REPO, folder)
    names = [
        "transformer/blocks/001.safetensors",
        "transformer/manifest.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    *lines, drawn = run(DAMAGE, REPO, *names).split(" ;; ")
    assert drawn == drawn_by(folder)
    for name, line in zip(names, lines, strict=True):
        assert f"/{name}: " in line and "and open the model again to download it" in line
    fetched = hub.fetched()
    assert [fetched.count(name) for name in names] == [2, 2, 2]
    assert len(fetched) == len(set(fetched)) + len(names)


def test_what_the_hub_refuses_is_one_line(hub, run, folder):
    hub.add("someone/gated", folder).gated = True
    hub.add("someone/empty", folder).revisions["main"] = {"README.md": b"#"}
    refusals = {
        "someone/nothing": "the hub gave no model of that id",
        "someone/gated": "its owner lets only those in who accepted its terms",
        "someone/empty": "has no model_index.json",
    }
    lines = run(REFUSED, *refusals).split(" ;; ")
    for (repo, message), line in zip(refusals.items(), lines, strict=True):
        assert line.startswith(repo) and message in line
    assert run(DRAW, "someone/gated", HF_TOKEN=TOKEN) == drawn_by(folder)


# --- up -------------------------------------------------------------------------------------------


def test_what_is_pushed_draws_the_same_images(hub, run, kv_artifact_dir, folder, tmp_path):
    said = run(PUSH, str(kv_artifact_dir), REPO, HF_TOKEN=TOKEN)
    repo = hub.repos[REPO]
    assert said.startswith(f"{hub.address}/{REPO}/commit/")
    assert repo.messages == ["the first"] and not repo.private
    files = repo.revisions["main"]
    saved = {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}
    assert files.keys() == {*saved, "README.md"}
    assert run(DRAW, REPO) == drawn_by(kv_artifact_dir)
    # where the base was on this machine is nobody's business
    assert not any(str(kv_artifact_dir.parent).encode() in content for content in files.values())
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["license"] == "other" and "base_model" not in front
    assert f'from_pretrained("{REPO}")' in files["README.md"].decode()


def test_a_push_that_was_cut_off_sends_only_the_rest(hub, run, folder):
    number = len({one.read_bytes() for one in folder.rglob("*.safetensors")})
    hub.puts_left = 2
    said = run(MAIN, "push", str(folder), REPO, fails=True, HF_TOKEN=TOKEN)
    assert said.startswith(f"varc: {REPO}: ") and "403" in said
    assert hub.repos[REPO].revisions["main"] == {} and len(hub.objects) == 2
    hub.puts_left = None
    hub.asked.clear()
    said = run(MAIN, "push", str(folder), REPO, "--private", HF_TOKEN=TOKEN)
    assert "pushed" in said and hub.uploads() == number - 2
    assert run(DRAW, REPO) == drawn_by(folder)


def test_another_model_takes_the_place_of_the_one_before(hub, run, model_dir, folder):
    full = "someone/full"
    hub.repos[REPO] = Repo({"main": {"samples/mine.png": b"png"}})
    run(PUSH, str(model_dir), full, str(model_dir), REPO, str(folder), REPO, HF_TOKEN=TOKEN)
    assert run(DRAW, full, REPO) == f"{drawn_by(model_dir)} ;; {drawn_by(folder)}"
    there = hub.repos[REPO].revisions["main"]
    assert not any("diffusion_pytorch_model" in name for name in there if name[0] == "t")
    assert there["samples/mine.png"] == b"png"
    # what the hub has is not sent again
    assert hub.uploads() == len(hub.objects)


def test_what_cannot_be_pushed_is_one_line_and_nothing_is_sent(hub, run, folder, tmp_path):
    refused = run(MAIN, "push", str(folder), REPO, fails=True)
    assert "401" in refused and "hf auth login" in refused
    assert "expected org/name" in run(MAIN, "push", str(folder), "tiny", fails=True)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    block = damaged / "transformer/blocks/000.safetensors"
    block.write_bytes(block.read_bytes()[:-1] + b"!")
    hub.asked.clear()
    said = run(MAIN, "push", str(damaged), REPO, fails=True, HF_TOKEN=TOKEN)
    assert "its content changed" in said and hub.asked == []
    (damaged / "text_encoder/pytorch_model.bin").write_bytes(b"pickled")
    said = run(MAIN, "push", str(damaged), REPO, fails=True, HF_TOKEN=TOKEN)
    assert "text_encoder/pytorch_model.bin: only JSON, safetensors" in said and hub.asked == []
