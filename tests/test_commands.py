"""`varc quantize`, `calibrate-kv`, `generate` and `inspect` on saved models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from var_compressor import cli
from var_compressor.artifact import read_kv, read_manifest
from var_compressor.compress import choose_device, choose_dtype
from var_compressor.images import SETTINGS_KEY, write_png
from var_compressor.interop.kv_quant_calib import use_cache
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.activations import parse_bytes
from var_compressor.recipe import load_recipe

QUICK = (
    *("collect.num_prompts=1", "collect.top_k=0", "model.dtype=float32", "model.device=cpu"),
    *("quant.low_rank.rank=8", "quant.low_rank.max_iters=1", "quant.smooth.num_grids=2"),
)
RECIPES = ("recipes/model/infinity-tiny.yaml", "recipes/collect/tiny.yaml")
INT4 = "recipes/svdquant/int4.yaml"


@pytest.fixture
def varc(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["varc", *map(str, arguments)])
        monkeypatch.delenv("VARC_TRACEBACK", raising=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return run


def refused(result: tuple[int, str, str], words: str) -> None:
    """Exit code 2, nothing on stdout, and one line of ours that holds ``words``."""
    code, out, err = result
    assert code == 2 and out == "", result
    lines = [line for line in err.splitlines() if line.startswith("varc: ")]
    assert len(lines) == 1 and words in lines[0], err
    assert "Traceback" not in err


# --- quantize and calibrate-kv -------------------------------------------------------------------


def test_a_model_goes_through_all_commands(varc, model_dir, tmp_path):
    out = tmp_path / "art"
    words = (*RECIPES, INT4, f"model.path={model_dir}", *QUICK)
    code, printed, _ = varc("quantize", *words, "--out", out)
    assert code == 0 and f"wrote {out}: transformer" in printed
    follow_up = printed.splitlines()[-1].removeprefix("next: varc ").split()
    assert varc(*follow_up)[0] == 0
    assert read_manifest(out).kv["format"]["name"] == "int8"
    code, printed, _ = varc("inspect", out)
    assert code == 0 and "W4A4 g64 rank 8" in printed and "INT8 KV cache" in printed
    code, _, _ = varc("generate", "a red cat", "--model", out, "--out", tmp_path / "x.png")
    assert code == 0
    refused(varc("quantize", *words, "--out", out), "holds a finished artifact")


def test_print_config_stops_there_and_loads_again(varc, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = varc("quantize", *RECIPES, INT4, *QUICK, "--print-config", "--out", out)
    assert code == 0 and not out.exists()
    (tmp_path / "again.yaml").write_text(printed)
    assert load_recipe([tmp_path / "again.yaml"], []) == load_recipe([*RECIPES, INT4], list(QUICK))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((INT4,), "--out is missing"),
        ((INT4, "quant.weight.fromat=x"), "did you mean 'format'"),
        ((INT4, "quant.wieght.format=x"), "did you mean 'weight'"),
        (("recipes/svdquant/int5.yaml",), "no such recipe"),
        ((INT4, "quant.low_rank.rank=-1"), "quant.low_rank.rank: expected 0 to 1024, got -1"),
        ((INT4, "quant.low_rank.rank=two"), "expected an integer"),
    ],
)
def test_recipes_that_cannot_be_are_one_line(varc, tmp_path, words, message):
    refused(varc("quantize", *RECIPES, *words), message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((INT4, "quant.weight.group_size=96", "quant.act.group_size=64"), "do not nest"),
        ((INT4, "quant.act.format=uint4"), "uint4 holds only what GELU puts out"),
        ((INT4, "model.device=gpu"), "device 'gpu' is unknown"),
        ((INT4, "model.path=nowhere/else/x"), "nowhere/else/x: no such directory"),
        ((INT4, "collect.num_prompts=100000"), "asked for 100000 prompts"),
        ((INT4, "collect.prompts=missing.txt"), "missing.txt: no such prompt file"),
        ((INT4, "collect.pixel_budget=9M"), "pixel_budget is '9M'; use one of 0.06M"),
        ((INT4, "collect.cfg=[1,2]"), "cfg has 2 values, the schedule has 7"),
        ((INT4, "model.vae_path=vae.pth", "model.path=x.pth"), "varc convert"),
        ((INT4, "model.text_encoder_path=t5"), "model.text_encoder_path goes with official files"),
        ((INT4, "quant.low_rank.rank=65"), "rank 65 does not fit a weight of shape"),
    ],
)
def test_runs_that_cannot_be_are_one_line(varc, model_dir, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    given = {word.split("=")[0] for word in words}
    kept = [word for word in QUICK if word.split("=")[0] not in given]
    if "model.path" not in given:
        kept.append(f"model.path={model_dir}")
    refused(varc("quantize", *RECIPES, *words, *kept, "--out", "out"), message)


def test_int8_runs_with_the_recipe_as_it_is(varc, model_dir, tmp_path):
    words = (*RECIPES, "recipes/svdquant/int8.yaml", f"model.path={model_dir}", *QUICK)
    code, _, err = varc("quantize", *words, "--out", tmp_path / "w8a8")
    assert code == 0, err
    assert "W8A8 per row rank 8" in varc("inspect", tmp_path / "w8a8")[1]


def test_no_calibration_is_proposed_where_the_cache_stays_16_bit(varc, model_dir, tmp_path):
    words = (*RECIPES, INT4, f"model.path={model_dir}", *QUICK, "quant.kv.format=bf16")
    code, printed, _ = varc("quantize", *words, "--out", tmp_path / "out")
    assert code == 0 and "calibrate-kv" not in printed
    refused(varc("calibrate-kv", *words, "--artifact", tmp_path / "out"), "quant.kv.format is bf16")


def test_calibrate_kv_wants_an_artifact(varc, model_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (model_dir, tmp_path, tmp_path / "none", tmp_path / "file"):
        refused(varc("calibrate-kv", *RECIPES, *QUICK, "--artifact", path), f"{path}")
    refused(varc("calibrate-kv", *RECIPES, *QUICK), "--artifact or --out is missing")


def kv_bytes_of(model_dir, **options):
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    use_cache(pipeline, options["kv"])
    return pipeline.generate(["a red cat"], seed=0, sampling=Sampling(cfg=2.0)).kv_bytes


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (("quant.kv.format=int4",), ["6 heads in 4 bits; "]),
        (("quant.kv.format=int4", "quant.kv.dynamic=true"), ["6 heads in 4 bits; "]),
        (("quant.kv.format=fp8", "quant.kv.plain_levels=2"), ["6 heads in 8 bits; "]),
        (("quant.kv.keep=0.3",), ["6 heads in 8 bits", "drop levels", "of the attention"]),
        # 6 heads of 2 x 2 x 265 x 32 values: 203,520 bytes in 8 bits
        (("--kv-budget", "203520"), ["6 heads in 8 bits; "]),
        (("--kv-budget", "160KiB"), [" heads in 8 bits, ", " heads in 4 bits; "]),
        (
            ("--kv-budget", "170KiB", "quant.kv.dynamic=true"),
            [" heads in 8 bits, ", " heads in 4 bits; "],
        ),
        (("--kv-budget", "60KiB"), ["6 heads in 4 bits, ", "drop levels"]),
    ],
)
def test_a_full_precision_model_gets_a_cache_of_its_own(varc, model_dir, tmp_path, words, chosen):
    """Of every format: written beside the model, told, and used by `generate`."""
    out, png = tmp_path / "kv", tmp_path / "x.png"
    source = (*RECIPES, *QUICK, f"model.path={model_dir}", "collect.cfg=2")
    code, printed, err = varc("calibrate-kv", *source, *words, "--out", out)
    assert code == 0, err
    assert all(text in printed for text in chosen), printed
    kv = read_kv(out)
    assert kv["bytes_per_image"] == kv_bytes_of(model_dir, kv=out)
    if "--kv-budget" in words:
        limit = parse_bytes(words[1])
        assert 0.8 * limit < kv["bytes_per_image"] <= limit
    if "quant.kv.keep=0.3" in words:
        assert 0.25 * 203520 < kv["bytes_per_image"] <= 0.3 * 203520
    draw = ("generate", "a red cat", "--model", model_dir, "--cfg", 2, "--out", png)
    assert varc(*draw, "--kv", out)[0] == 0
    first = (out / "kv_cache.safetensors").read_bytes(), json.dumps(kv), pixels(png)
    assert settings_of(png)["kv"] == str(out)
    assert varc("calibrate-kv", *source, *words, "--out", out)[0] == 0
    assert varc(*draw, "--kv", out)[0] == 0
    again = (out / "kv_cache.safetensors").read_bytes(), json.dumps(read_kv(out)), pixels(png)
    assert first == again


def test_an_artifact_gets_the_cache_of_a_budget(varc, artifact_dir, tmp_path):
    out = tmp_path / "artifact"
    shutil.copytree(artifact_dir, out)
    words = (*RECIPES, *QUICK, "collect.cfg=2", "--kv-budget", "160KiB")
    code, printed, err = varc("calibrate-kv", *words, "--artifact", out)
    assert code == 0 and f"wrote {out}/kv_cache.safetensors" in printed, err
    assert "MIXED KV cache" in varc("inspect", out)[1]
    pipeline = InfinityPipeline.from_pretrained(out, dtype=torch.float32)
    run = pipeline.generate(["a red cat"], seed=0, sampling=Sampling(cfg=2.0))
    kv = read_manifest(out).kv
    assert run.kv_bytes == kv["bytes_per_image"] <= 160 * 2**10
    bits = [tuple(layer["nbits"]) for layer in kv["layers"]]
    assert bits == [layer.nbits for layer in pipeline.kv_params.layers]
    assert {4, 8} == {nbits for layer in bits for nbits in layer}


def test_kv_files_that_cannot_be_are_one_line(varc, model_dir, artifact_dir, tmp_path):
    out = tmp_path / "kv"
    source = (*RECIPES, *QUICK, f"model.path={model_dir}")
    assert varc("calibrate-kv", *source, "--out", out)[0] == 0
    draw = ("generate", "a red cat", "--out", tmp_path / "x.png")
    refused(varc(*draw, "--kv", out), "layer 0 is of another model")
    mine = (*draw, "--model", model_dir)
    refused(varc(*mine, "--kv", artifact_dir), "has no KV parameters; run `varc calibrate-kv`")
    refused(varc(*mine, "--kv", tmp_path), "kv_cache.json: not readable")
    refused(varc("calibrate-kv", *source, "--out", artifact_dir), "is an artifact; give it as")
    refused(varc("calibrate-kv", *source, "--out", out, "--kv-budget", "0.5KiB"), "less than 1 %")
    refused(varc("calibrate-kv", *source, "--out", out, "--kv-budget", "x"), "'x' is no size")
    refused(varc("calibrate-kv", *source, "--out", out, "quant.kv.keep=2"), "quant.kv.keep: exp")
    words = ("--artifact", artifact_dir, "--format", "pt")
    refused(varc("calibrate-kv", *source, *words), "give --out")
    words = ("--out", out, "--format", "pt", "quant.kv.format=int4")
    refused(varc("calibrate-kv", *source, *words), "holds calibrated int8 ranges alone")
    ranges = out / "kv_cache.safetensors"
    ranges.write_bytes(ranges.read_bytes()[:-1] + b"x")
    refused(varc(*mine, "--kv", out), "is not the file of")


def test_kv_ranges_as_the_original_writes_them(varc, model_dir, tmp_path):
    source = (*RECIPES, *QUICK, f"model.path={model_dir}")
    out, png = tmp_path / "kv", tmp_path / "x.png"
    assert varc("calibrate-kv", *source, "--out", out)[0] == 0
    assert varc("calibrate-kv", *source, "--out", out, "--format", "pt")[0] == 0
    draw = ("generate", "a red cat", "--model", model_dir, "--out", png)
    images = []
    for kv in (out, out / "kv_quant_calib.pt"):
        assert varc(*draw, "--kv", kv)[0] == 0
        images.append(pixels(png))
    assert images[0] == images[1]


def test_an_artifact_is_not_compressed_again(varc, artifact_dir, tmp_path):
    words = (*RECIPES, INT4, f"model.path={artifact_dir}", *QUICK)
    refused(varc("quantize", *words, "--out", tmp_path / "x"), "is compressed already")


def test_devices_and_dtypes(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu and choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    for name in ("gpu", "meta", "cuda:x", "", "mps"):
        with pytest.raises(ValueError, match=f"device '{name}' is unknown; use auto, cpu or cuda"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == cpu
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="torch sees 1 GPU here"):
        choose_device("cuda:1")
    with pytest.raises(ValueError, match="dtype 'fp4' is unknown; use auto, bfloat16 or float32"):
        choose_dtype("fp4", cpu)


# --- generate ------------------------------------------------------------------------------------


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def largest_difference(one: Path, other: Path) -> int:
    return max(abs(x - y) for x, y in zip(pixels(one), pixels(other), strict=True))


def settings_of(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text[SETTINGS_KEY])


def test_generate_draws_what_the_pipeline_draws_and_says_how(varc, model_dir, tmp_path):
    out = tmp_path / "new" / "folder" / "x.png"
    words = ("--model", model_dir, "--seed", 7, "--cfg", 2, "--tau", 0.7, "--top-p", 0.9)
    code, printed, _ = varc("generate", 'a "red" cat – größer', *words, "--out", out)
    assert code == 0 and printed == f"wrote {out}\n"
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    said = settings_of(out)
    assert {k: said[k] for k in ("prompt", "seed", "cfg", "tau", "top_p")} == {
        "prompt": 'a "red" cat – größer',
        "seed": 7,
        "cfg": 2,
        "tau": 0.7,
        "top_p": 0.9,
    }
    # the file is drawn again from what it says
    again = pipeline.generate(
        [said["prompt"]],
        seed=said["seed"],
        sampling=Sampling(cfg=said["cfg"], tau=said["tau"], top_p=said["top_p"]),
        aspect_ratio=said["aspect_ratio"],
        pixel_budget=said["pixel_budget"],
    )
    assert again.pil[0].tobytes() == pixels(out)


def test_two_prompts_are_two_files_each_with_its_own_seed(varc, model_dir, tmp_path):
    out = tmp_path / "x.png"
    code, printed, _ = varc(
        "generate", "a red cat", "", "--model", model_dir, "--seed", 3, "--out", out
    )
    names = [tmp_path / "x-0.png", tmp_path / "x-1.png"]
    assert code == 0 and printed.split() == ["wrote", str(names[0]), "wrote", str(names[1])]
    assert sorted(tmp_path.iterdir()) == names
    for i, prompt in enumerate(("a red cat", "")):
        alone = tmp_path / f"alone-{i}.png"
        varc("generate", prompt, "--model", model_dir, "--seed", 3 + i, "--out", alone)
        assert settings_of(names[i])["seed"] == 3 + i
        # a batch rounds otherwise
        assert largest_difference(alone, names[i]) <= 1


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (("--negative", "a cat"), True),
        (("--negative", ""), True),
        (("--cfg", "1"), True),
        (("--seed", "1"), True),
        (("--release-text-encoder",), False),
        (("--keep-text-encoder",), False),
        (("--pixel-budget", "0.06M"), False),
        (("--dtype", "float32"), False),
        (("--device", "cpu"), False),
    ],
)
def test_options_do_what_they_say(varc, model_dir, tmp_path, words, changes):
    images = []
    for name, more in (("a.png", ()), ("b.png", words)):
        path = tmp_path / name
        common = ("--model", model_dir, "--top-p", 0, "--tau", 1)
        assert varc("generate", "red", *common, *more, "--out", path)[0] == 0
        images.append(pixels(path))
    assert (images[0] != images[1]) == changes


def test_strips_change_rounding_only_and_shapes_follow_the_ratio(varc, model_dir, tmp_path):
    sizes = []
    for name, words in (("a", ()), ("b", ("--strip-rows", 5))):
        path = tmp_path / f"{name}.png"
        tall = ("--aspect-ratio", 0.5, "--pixel-budget", "0.06M")
        code, _, err = varc("generate", "a", "--model", model_dir, *tall, *words, "--out", path)
        assert code == 0, err
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes[0] == sizes[1] and sizes[0][0] > 1.9 * sizes[0][1]
    assert largest_difference(tmp_path / "a.png", tmp_path / "b.png") <= 1


def test_known_prompts_need_no_text_encoder(varc, model_dir, tmp_path):
    copied, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(model_dir, copied)
    words = ("--model", copied, "--prompt-cache", cache)
    assert varc("generate", "a red cat", *words, "--out", tmp_path / "a.png")[0] == 0
    assert len(list(cache.iterdir())) == 1
    (copied / "text_encoder/model.safetensors").unlink()
    assert varc("generate", "a red cat", *words, "--out", tmp_path / "b.png")[0] == 0
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")
    refused(varc("generate", "a", *words, "--out", tmp_path / "c.png"), "no T5 encoder")


def test_a_prompt_cache_tells_models_of_the_same_relative_name_apart(
    varc, model_dir, tmp_path, monkeypatch
):
    for name in ("a", "b"):
        shutil.copytree(model_dir, tmp_path / name / "model")
    weights = tmp_path / "b/model/text_encoder/model.safetensors"
    save_file({n: 2 * t for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    for name in ("a", "b"):
        monkeypatch.chdir(tmp_path / name)
        words = ("--model", "model", "--prompt-cache", tmp_path / "cache", "--out", "x.png")
        code, _, err = varc("generate", "a red cat", *words)
        assert code == 0, err
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "x.jpg"), "x.jpg: images are written as PNG"),
        (("--out", "x"), "x: images are written as PNG"),
        (("--out", "folder.png"), "folder.png: is a directory"),
        (("--out", "file/x.png"), "file: "),
        (("--pixel-budget", "2M"), "pixel_budget is '2M'; use one of 0.06M"),
        (("--pixel-budget", "-1"), "pixel_budget is '-1'"),
        (("--aspect-ratio", "0"), "aspect_ratio is 0.0"),
        (("--aspect-ratio", "-2"), "aspect_ratio is -2.0"),
        (("--aspect-ratio", "nan"), "aspect_ratio is nan"),
        (("--aspect-ratio", "inf"), "aspect_ratio is inf"),
        (("--tau", "0"), "tau must be > 0"),
        (("--tau", "nan"), "tau must be finite, got nan"),
        (("--cfg", "inf"), "cfg must be finite, got inf"),
        (("--top-p", "1.5"), "top_p 1.5"),
        (("--dtype", "int4"), "dtype 'int4' is unknown"),
        (("--device", "tpu"), "device 'tpu' is unknown"),
        (("--model", "infinity-2b"), "varc convert"),
        (("--model", "no such thing"), "no such directory"),
    ],
)
def test_generate_refuses_in_one_line(varc, model_dir, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("file").write_text("x")
    given = dict([words])
    defaults = {"--out": "new.png", "--model": model_dir}
    more = [word for pair in (defaults | given).items() for word in pair]
    refused(varc("generate", "a", *more), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_name_that_cannot_be_written_is_refused_before_anything_is_loaded(
    varc, tmp_path, monkeypatch
):
    def fail(*arguments, **options):
        raise AssertionError("the model was opened first")

    monkeypatch.setattr(InfinityPipeline, "from_pretrained", fail)
    refused(varc("generate", "a", "--out", tmp_path / "x.jpg"), "images are written as PNG")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refused(varc("generate", "a", "--out", tmp_path / "x.png"), f"{tmp_path}: Permission denied")


@pytest.mark.parametrize("seed", ["-1", str(2**64), "1.5"])
def test_a_seed_that_no_generator_takes_is_a_usage_error(varc, tmp_path, seed):
    code, out, err = varc("generate", "a", "--seed", seed, "--out", tmp_path / "x.png")
    assert code == 2 and out == "" and "--seed" in err and "Traceback" not in err


def test_a_too_long_prompt_is_cut_to_what_the_model_takes(varc, model_dir, tmp_path):
    long = " ".join(["red"] * 500)
    code, _, err = varc("generate", long, "--model", model_dir, "--out", tmp_path / "x.png")
    assert code == 0, err


def test_an_image_replaces_another_whole_or_not_at_all(tmp_path, monkeypatch):
    path, image = tmp_path / "x.png", Image.new("RGB", (4, 4), "red")
    write_png(image, path, {"seed": 1})

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", fail)
        with pytest.raises(OSError, match="No space"):
            write_png(Image.new("RGB", (4, 4), "blue"), path, {"seed": 2})
    assert settings_of(path)["seed"] == 1 and list(tmp_path.iterdir()) == [path]


# --- inspect -------------------------------------------------------------------------------------


def test_inspect_knows_the_embedded_model_by_name(varc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = varc("inspect", "infinity-tiny")
    assert code == 0 and "infinity-tiny transformer" in printed
    # a folder of that name comes first
    Path("infinity-tiny").mkdir()
    code, _, _ = varc("inspect", "infinity-tiny")
    assert code == 2


def test_inspect_refuses_damaged_artifacts_in_one_line(varc, artifact_dir, tmp_path):
    copied = tmp_path / "artifact"
    shutil.copytree(artifact_dir, copied)
    (copied / "blocks/001.safetensors").write_bytes(b"x")
    refused(varc("inspect", copied), "blocks/001.safetensors")
    (copied / "manifest.json").write_text("[]")
    refused(varc("inspect", copied), "manifest.json: not of format")
    (copied / "manifest.json").rename(copied / "resume.json")
    refused(varc("inspect", copied), "was cut off; repeat its command")


def test_inspect_as_json(varc, kv_artifact_dir):
    code, printed, _ = varc("inspect", kv_artifact_dir, "--json", "--hashes")
    found = json.loads(printed)
    assert code == 0 and found["kind"] == "artifact"
    listed = {file["name"]: file["sha256"] for file in found["files"]}
    manifest = read_manifest(kv_artifact_dir)
    assert all(listed[name] == entry["sha256"] for name, entry in manifest.files.items())
