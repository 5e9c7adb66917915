"""A compressed model in one directory: it is whole, and goes wherever an artifact does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from original import write_base, write_original
from test_lora import write as write_lora
from tiny import random_text
from var_compressor.artifact import (
    ArtifactError,
    enclosing_model,
    is_artifact,
    read_manifest,
    verify_files,
)
from var_compressor.artifact_inspection import inspect_artifact
from var_compressor.bench import sources
from var_compressor.cli import app
from var_compressor.evaluation.evaluate import Request, evaluate
from var_compressor.interop.import_original import import_artifact, settings_of
from var_compressor.layers.compute import Policy
from var_compressor.layers.switches import Switches
from var_compressor.models.directory import load_transformer, read_index
from var_compressor.models.tensor_files import CheckpointError
from var_compressor.pipeline import InfinityPipeline
from var_compressor.planning import model_shape
from var_compressor.recipe import load_recipe
from var_compressor.studio.shelf import offers

PROMPT = "a red cat"


def opened(source: Path, **options) -> InfinityPipeline:
    return InfinityPipeline.from_pretrained(source, dtype=torch.float32, **options)


def image_of(pipeline: InfinityPipeline) -> torch.Tensor:
    text = [PROMPT] if pipeline.text_encoder is not None else random_text((5,))
    return pipeline.generate(text, seed=3).image_B3YX


def contents(folder: Path) -> dict[str, bytes]:
    files = (one for one in folder.rglob("*") if one.is_file())
    return {str(one.relative_to(folder)): one.read_bytes() for one in files}


def varc(*words: object) -> str:
    """What a command prints."""
    found = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.fixture(scope="module")
def folder(kv_artifact_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "model"
    opened(kv_artifact_dir).save_pretrained(out)
    return out


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")


# --- saving ---------------------------------------------------------------------------------------


def test_it_needs_no_other_model(model_dir, kv_artifact_dir, tmp_path):
    base, artifact = tmp_path / "base", tmp_path / "artifact"
    shutil.copytree(model_dir, base)
    shutil.copytree(kv_artifact_dir, artifact)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["base"]["source"] = str(base)
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    pipeline = opened(artifact)
    wanted, saving = image_of(pipeline), image_of(opened(artifact, low_memory=True))
    pipeline.save_pretrained(tmp_path / "saved")
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="no such directory"):
        opened(artifact)
    shutil.rmtree(artifact)
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    assert torch.equal(image_of(opened(moved)), wanted)
    assert torch.equal(image_of(opened(moved, low_memory=True)), saving)
    assert torch.equal(image_of(opened(moved / "transformer")), wanted)


def test_the_artifact_s_files_are_in_it_as_they_were(kv_artifact_dir, folder, tmp_path):
    artifact, saved = contents(kv_artifact_dir), contents(folder)
    for name in ("manifest.json", *read_manifest(kv_artifact_dir).files):
        assert saved[f"transformer/{name}"] == artifact[name]
    verify_files(folder, read_manifest(folder))
    # and again, from it, over itself
    opened(folder).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == saved
    opened(tmp_path / "again").save_pretrained(tmp_path / "again", overwrite=True)
    assert contents(tmp_path / "again") == saved


def test_config_json_tells_other_programs_what_it_is(kv_artifact_dir, folder):
    manifest = read_manifest(kv_artifact_dir)
    config = json.loads((folder / "transformer/config.json").read_text())
    told = config.pop("quantization_config")
    assert config == {"_class_name": "Infinity", **manifest.config}
    assert told["quant_method"] == "var_compressor"
    assert told["weights"]["format"] == "sint4" and told["activations"]["format"] == "sint4"
    assert told["low_rank"]["rank"] == 8 and told["kv_cache"]["name"] == "int8"


def test_imported_artifacts_are_saved_the_same_way(tmp_path):
    base, source = write_base(tmp_path / "base"), write_original(tmp_path / "source")
    import_artifact(source, str(base), tmp_path / "out", settings_of(source, []))
    pipeline = opened(tmp_path / "out")
    wanted = image_of(pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    shutil.rmtree(base)
    assert torch.equal(image_of(opened(tmp_path / "saved")), wanted)


def test_it_is_saved_after_kernels_took_over(artifact_dir, tmp_path):
    pytest.importorskip("triton")
    from var_compressor.layers.kernel_block import KernelBlock, use_kernels

    pipeline = InfinityPipeline.from_pretrained(artifact_dir, dtype=torch.bfloat16)
    use_kernels(pipeline.transformer, Policy("auto", (9, 0), 4))
    assert isinstance(pipeline.transformer.blocks[0], KernelBlock)
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(image_of(opened(tmp_path / "saved")), image_of(opened(artifact_dir)))


def test_a_text_encoder_is_copied_referred_to_or_left_away(kv_artifact_dir, tmp_path):
    pipeline = opened(kv_artifact_dir)
    pipeline.save_pretrained(tmp_path / "refers", copy_text_encoder=False)
    index = read_index(tmp_path / "refers")
    assert index.text_encoder == pipeline.text_encoder.encoder_dir
    assert not (tmp_path / "refers/text_encoder").exists()
    pipeline.text_encoder = None
    pipeline.save_pretrained(tmp_path / "without", provenance={"license": "mit"})
    assert opened(tmp_path / "without").text_encoder is None
    assert read_index(tmp_path / "without").provenance == {"license": "mit"}


def test_what_the_artifact_does_not_have_is_not_lost_in_silence(
    model_dir, artifact_dir, kv_artifact_dir, tmp_path
):
    out = tmp_path / "out"
    adapter = write_lora(tmp_path / "lora.safetensors")
    pipeline = opened(artifact_dir, lora=[(adapter, 0.5)])
    with pytest.raises(ValueError, match=r"has adapters .*lora\.safetensors.*unload_lora"):
        pipeline.save_pretrained(out)
    pipeline.unload_lora(str(adapter))
    pipeline.save_pretrained(tmp_path / "plain")
    assert torch.equal(image_of(opened(tmp_path / "plain")), image_of(opened(artifact_dir)))
    pipeline.kv_params = opened(kv_artifact_dir).kv_params
    with pytest.raises(ValueError, match="KV cache is not the one of"):
        pipeline.save_pretrained(out)
    made = opened(model_dir)
    made.transformer = opened(artifact_dir).transformer
    with pytest.raises(ValueError, match="was compressed in memory"):
        made.save_pretrained(out)
    assert not out.exists()


def test_a_file_that_changed_since_is_not_saved(kv_artifact_dir, folder, tmp_path):
    for change in (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), Path.unlink):
        artifact = shutil.copytree(folder, tmp_path / "artifact", dirs_exist_ok=True)
        pipeline = opened(artifact)
        change(artifact / "transformer/blocks/001.safetensors")
        with pytest.raises(ArtifactError, match=r"001\.safetensors: (its content|missing)"):
            pipeline.save_pretrained(tmp_path / "out")
        assert [one.name for one in tmp_path.iterdir()] == ["artifact"]


def test_other_people_s_files_are_left_alone(folder, kv_artifact_dir, tmp_path):
    pipeline = opened(folder)
    before = contents(kv_artifact_dir)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="holds other files"):
            pipeline.save_pretrained(kv_artifact_dir, overwrite=overwrite)
    with pytest.raises(CheckpointError, match="holds a model already"):
        pipeline.save_pretrained(folder)
    assert contents(kv_artifact_dir) == before


# --- where an artifact may be given ---------------------------------------------------------------


def test_commands_take_it_as_the_artifact(folder, kv_artifact_dir, tmp_path):
    png = tmp_path / "x.png"
    varc("generate", PROMPT, "--model", folder, "--out", png, "--dtype", "float32", "--seed", 3)
    varc("generate", PROMPT, "--model", kv_artifact_dir, "--out", tmp_path / "y.png", "--dtype",
         "float32", "--seed", 3)  # fmt: skip
    from PIL import Image

    assert Image.open(png).tobytes() == Image.open(tmp_path / "y.png").tobytes()
    by_itself, inside = (
        json.loads(varc("inspect", path, "--json")) for path in (kv_artifact_dir, folder)
    )
    assert inside["kind"] == by_itself["kind"] == "artifact"
    assert inside["parts"][: len(by_itself["parts"])] == by_itself["parts"]
    assert any(part["name"].startswith("vae: ") for part in inside["parts"])
    assert any(part["name"].startswith("text_encoder: ") for part in inside["parts"])
    plans = [
        json.loads(varc("plan", "--model", path, "--budget", "8GiB", "--json"))
        for path in (kv_artifact_dir, folder)
    ]
    assert {**plans[0], "model": ""} == {**plans[1], "model": ""}
    shapes = [model_shape(str(path)) for path in (kv_artifact_dir, folder)]
    assert replace(shapes[0], name="", kv=None) == replace(shapes[1], name="", kv=None)
    models = []
    for name, path in (("alone", kv_artifact_dir), ("inside", folder)):
        varc("export", path, "--to", "varcompressor", "--out", tmp_path / name)
        assert (tmp_path / name / "kv_quant_calib.pt").is_file()
        models.append(torch.load(tmp_path / name / "model.pt", weights_only=True))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_bench_and_studio_take_it_with_and_without_its_base(folder, copied, model_dir):
    def choice(model: Path, baseline: bool) -> sources.Choice:
        return sources.Choice(
            str(model), None, "auto", False, baseline, torch.device("cpu"), torch.float32
        )

    def unused(*_: object) -> None:
        raise AssertionError

    found = sources.saved(choice(folder, True), unused)
    assert [one.name for one in found] == [str(folder), sources.BASELINE]
    assert [one.source for one in offers([str(folder)])] == [str(model_dir), str(folder)]
    manifest = copied / "transformer/manifest.json"
    content = json.loads(manifest.read_text())
    content["base"]["source"] = "a folder named elsewhere"
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"made of is not here.*--baseline none"):
        sources.saved(choice(copied, True), unused)
    (alone,) = sources.saved(choice(copied, False), unused)
    assert torch.equal(image_of(alone.open()), image_of(opened(folder)))
    assert [one.is_compressed for one in offers([str(copied)])] == [True]


def test_evaluate_takes_it_and_knows_its_base_by_its_files(copied, model_dir, tmp_path):
    """Also where the manifest names a folder of another machine."""
    manifest = copied / "transformer/manifest.json"
    content = json.loads(manifest.read_text())
    content["base"]["source"] = "a folder named elsewhere"
    manifest.write_text(json.dumps(content))
    prompts = tmp_path / "words.json"
    prompts.write_text(json.dumps({"0": PROMPT, "1": "a cat"}))
    words = ["model.device=cpu", "model.dtype=float32", "collect.cfg=2", "collect.top_k=0"]
    request = Request(
        recipe=load_recipe([], [f"model.path={model_dir}", *words]),
        artifact=copied,
        switches=Switches(),
        benchmarks=(str(prompts),),
        metrics=("psnr",),
        num_samples=2,
        seed=7,
        subset_seed=0,
        batch=1,
        compute="w4a4",
        gen_root=tmp_path / "gen",
        ref_root=tmp_path / "ref",
        data_root=tmp_path,
        metric_weights=None,
        prompt_cache=None,
        out=tmp_path / "results",
    )
    found = evaluate(request, on_progress=lambda *_: None, note=lambda _: None)
    assert found.results.subject.weight_bytes == read_manifest(copied).num_weight_bytes
    without = replace(request, switches=Switches(weights=False), out=tmp_path / "plain")
    assert evaluate(without, on_progress=lambda *_: None, note=lambda _: None) is not None
    other = shutil.copytree(model_dir, tmp_path / "other")
    file = other / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    another = load_recipe([], [f"model.path={other}", *words])
    with pytest.raises(ValueError, match="name the same model"):
        evaluate(replace(request, recipe=another), on_progress=lambda *_: None, note=print)
    # and its results go into the card, unless they are of another model
    card = published_card(copied, tmp_path / "out", "--results", tmp_path / "results")
    (benchmark,) = found.results.benchmarks.values()
    value = benchmark.metrics["psnr"]
    assert f"| psnr | {value.value:.4g} | {value.low:.4g} to {value.high:.4g} | 2 |" in card
    with pytest.raises(ValueError, match="are of a model that is"):
        plain = shutil.copytree(copied.parent / "copied", tmp_path / "no-kv")
        without_kv(plain)
        published_card(plain, tmp_path / "out2", "--results", tmp_path / "results")


def without_kv(folder: Path) -> None:
    from var_compressor.artifact import _DIGEST, _digest_of, model_config

    path = folder / "transformer/manifest.json"
    content = json.loads(path.read_text())
    content["kv"] = None
    del content["files"]["kv_cache.safetensors"], content[_DIGEST]
    path.write_text(json.dumps({**content, _DIGEST: _digest_of(content)}))
    (folder / "transformer/kv_cache.safetensors").unlink()
    config = path.with_name("config.json")
    told = json.loads(config.read_text())
    told["quantization_config"]["kv_cache"] = None
    config.write_text(json.dumps(told))
    assert json.loads(config.read_text()) == model_config(read_manifest(folder))


def test_it_stays_as_it_is(folder, model_dir, tmp_path):
    before = contents(folder)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{path: {model_dir}, device: cpu}}\n")
    runner = CliRunner()
    found = runner.invoke(app, ["calibrate-kv", str(recipe), "--artifact", str(folder)])
    assert "stays as it is" in str(found.exception)
    found = runner.invoke(
        app, ["quantize", f"model.path={folder}", "--out", str(tmp_path / "twice")]
    )
    assert "compressed already" in str(found.exception)
    with pytest.raises(CheckpointError, match="its weights are compressed"):
        load_transformer(folder, dtype=torch.float32, device="cpu")
    assert contents(folder) == before


# --- contradictions -------------------------------------------------------------------------------


def config_with(**changes):
    def change(folder: Path) -> None:
        path = folder / "transformer/config.json"
        content = json.loads(path.read_text())
        content["quantization_config"] |= changes.pop("quantization", {})
        path.write_text(json.dumps({**content, **changes}))

    return change


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def plain_config(folder: Path) -> None:
    path = folder / "transformer/config.json"
    content = json.loads(path.read_text())
    del content["quantization_config"]
    path.write_text(json.dumps(content))


def damaged_vae(folder: Path) -> None:
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (plain_config, "config.json: quantization_config is missing, manifest.json beside it"),
        (config_with(quantization={"quant_method": "gptq"}), "of method 'gptq'"),
        (config_with(quantization={"kv_cache": None}), "kv_cache is null, manifest.json says"),
        (config_with(quantization={"low_rank": {"rank": 9}}), 'low_rank is {"rank": 9}'),
        (config_with(depth=4), "depth is 4, manifest.json says 3"),
        (config_with(quantization_config=[]), "quantization_config is a list"),
        (remove("transformer/config.json"), "config.json: No such file"),
        (remove("transformer/manifest.json"), "its weights are compressed, expected full"),
        (remove("transformer/blocks/001.safetensors"), "001.safetensors: missing"),
        (remove("model_index.json"), "model_index.json: No such file"),
        (remove("vae/config.json"), "vae/config.json: No such file"),
        (damaged_vae, "is not the VAE that"),
    ],
)
def test_a_directory_that_contradicts_itself_is_refused_in_a_line(copied, change, message):
    change(copied)
    with pytest.raises(ValueError) as error:
        opened(copied)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_full_precision_directory_with_a_part_of_a_compressed_one_is_refused(
    model_dir, kv_artifact_dir, folder, tmp_path
):
    both = shutil.copytree(model_dir, tmp_path / "both")
    shutil.copy(kv_artifact_dir / "manifest.json", both / "transformer")
    with pytest.raises(ArtifactError, match="quantization_config is missing"):
        opened(both)
    said = shutil.copytree(model_dir, tmp_path / "said")
    shutil.copy(folder / "transformer/config.json", said / "transformer")
    with pytest.raises(CheckpointError, match="has a quantization_config"):
        opened(said)
    assert is_artifact(folder) and enclosing_model(folder) == folder
    assert not is_artifact(model_dir) and enclosing_model(kv_artifact_dir) is None


# --- the card -------------------------------------------------------------------------------------


def published_card(source: Path, out: Path, *words: object) -> str:
    varc("export", source, "--to", "hub", "--out", out, "--name", "someone/tiny", *words)
    return (out / "README.md").read_text()


def test_the_folder_for_the_hub_is_what_was_saved_with_a_card(kv_artifact_dir, folder, tmp_path):
    card = published_card(kv_artifact_dir, tmp_path / "out")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "license": "other",
        "library_name": "var-compressor",
        "pipeline_tag": "text-to-image",
        "tags": ["infinity", "visual-autoregressive", "quantized", "w4a4"],
    }
    manifest = read_manifest(kv_artifact_dir)
    for digest in (*manifest.base["vae"].values(), *manifest.base["transformer"].values()):
        assert digest in card
    assert manifest.calibration["prompts_sha256"] in card
    assert 'from_pretrained("someone/tiny")' in card
    parts = inspect_artifact(kv_artifact_dir, with_hashes=False).parts
    for part in parts:
        assert f"| {part.name} | {part.num_bytes:,} |" in card
    pipeline = opened(kv_artifact_dir)
    cache = pipeline.new_cache(pipeline.schedule_for(1.0, None), rows=2)
    assert f"guidance on | {cache.num_bytes:,} |" in card
    assert "No evaluation came with this model" in card and "Unknown: the files say" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["quant"] == manifest.spec
    there, saved = contents(tmp_path / "out"), contents(folder)
    differing = {name for name in there.keys() | saved.keys() if there.get(name) != saved.get(name)}
    assert differing == {"README.md", "transformer/manifest.json"}
    assert str(kv_artifact_dir.parent).encode() not in b"".join(there.values())
    assert torch.equal(image_of(opened(tmp_path / "out")), image_of(pipeline))


def test_a_card_that_was_edited_is_kept_and_licences_come_from_the_base(folder, tmp_path):
    published_card(folder, tmp_path / "out")
    (tmp_path / "out/README.md").write_text("# mine\n")
    said = varc("push", tmp_path / "out", "someone/tiny", "--dry-run")
    assert said.rstrip().endswith("# mine") and "transformer/blocks/000.safetensors" in said
    card = published_card("infinity-tiny", tmp_path / "tiny")
    # its own, which lies beside it
    assert card.startswith("---\nlicense: apache-2.0") and "# Infinity-Tiny" in card
    InfinityPipeline.from_pretrained("infinity-tiny").save_pretrained(
        tmp_path / "saved", provenance={"license": "apache-2.0"}
    )
    card = published_card(tmp_path / "saved", tmp_path / "again")
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    assert "| **transformer** | **" in card and "How it was made" not in card
