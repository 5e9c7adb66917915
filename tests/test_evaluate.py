"""`varc evaluate`: kinds of quantization by themselves, numbers of images, and what it says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from test_linear import K, make_spec, random_linear, random_parts
from var_compressor import cli
from var_compressor.cli.evaluate import spread
from var_compressor.evaluation import bit_rows
from var_compressor.evaluation.evaluate import Evaluation, Request, evaluate
from var_compressor.evaluation.evaluation_report import write_page
from var_compressor.evaluation.gallery import read_carried, read_image
from var_compressor.evaluation.measuring import summarize
from var_compressor.evaluation.metrics import MetricUnavailable
from var_compressor.evaluation.metrics.pixels import Psnr
from var_compressor.evaluation.results import REFERENCE, TRUTH, read_results, read_rows
from var_compressor.evaluation.scores import frechet_distance
from var_compressor.images import SETTINGS_KEY, write_png
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.layers.switches import RoundedInputLinear, Switches, switch_linears
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.recipe import load_recipe

SAMPLING = Sampling(cfg=2.0, tau=0.5, top_k=0, top_p=0.97)
OFF = Switches(False, False, False)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path_factory.getbasetemp() / "no-hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


# ---- kinds of quantization by themselves

FORMATS = [
    "sint4 x sint4",
    "sint4 x uint4",
    "sint8 x sint8",
    "fp8_e4m3 x fp8_e4m3",
    "nvfp4 x nvfp4",
]


def plain_linear(quantized: QuantizedLinear, bias_N: torch.Tensor) -> nn.Linear:
    """The full-precision linear that ``quantized`` would be without any rounding of weights."""
    weight_NK = quantized.weight_on_inputs().float()
    linear = nn.Linear(*reversed(weight_NK.shape))
    linear.load_state_dict({"weight": weight_NK, "bias": bias_N})
    return linear.requires_grad_(False)


@pytest.mark.parametrize("format", FORMATS)
def test_rounded_inputs_alone_are_the_quantized_linear_of_a_weight_that_needs_no_rounding(format):
    spec = make_spec(format)
    quantized = random_linear(spec)
    bias_N = random_parts(spec.low_rank.rank, bias_dtype=torch.float32)["bias_N"]
    alone = RoundedInputLinear(quantized, plain_linear(quantized, bias_N))
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(alone(x), quantized(x), rtol=2e-4, atol=2e-3)
    # and not what the weight makes of unrounded inputs
    assert (alone(x) - alone.linear(x)).abs().max() > 0.02


@pytest.mark.parametrize("format", FORMATS)
def test_rounded_weights_alone_are_the_dequantized_weight(format, model_dir):
    transformer = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32).transformer
    spec = make_spec(format)
    quantized = random_linear(spec)
    bias_N = random_parts(spec.low_rank.rank, bias_dtype=torch.float32)["bias_N"]
    wanted = plain_linear(quantized, bias_N)
    transformer.blocks[0].ffn.fc1 = quantized
    switch_linears(transformer, Switches(weights=True, activations=False, kv=True), None)
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(quantized(x), wanted(x), rtol=2e-4, atol=2e-3)


def drawn(pipeline: InfinityPipeline) -> torch.Tensor:
    return pipeline.generate(["a red cat"], seed=1, sampling=SAMPLING).latent_BDYX


def test_every_switch_alone(model_dir, kv_artifact_dir):
    """With all off the artifact draws what full precision does; each one on changes that."""

    def switched(*on: bool) -> InfinityPipeline:
        switches = Switches(*on)
        pipeline = InfinityPipeline.from_pretrained(kv_artifact_dir, dtype=torch.float32)
        base = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32).transformer
        switch_linears(pipeline.transformer, switches, base)
        pipeline.kv_params = pipeline.kv_params if switches.kv else None
        return pipeline

    full = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    whole = InfinityPipeline.from_pretrained(kv_artifact_dir, dtype=torch.float32)
    latents = [drawn(full), drawn(whole)]
    assert torch.equal(drawn(switched(False, False, False)), latents[0])
    assert torch.equal(drawn(switched(True, True, True)), latents[1])
    # full precision with the artifact's cache
    full.kv_params = whole.kv_params
    kv_alone = drawn(switched(False, False, True))
    assert torch.equal(kv_alone, drawn(full))
    alone = [drawn(switched(*on)) for on in ((True, False, False), (False, True, False))]
    latents += [*alone, kv_alone]
    for i, a in enumerate(latents):
        assert not any(torch.equal(a, b) for b in latents[:i])


# ---- an evaluation


PROMPTS = {"x-<b>": "a <script>alert(1)</script> cat", "y": "red cat", "z": "a", "w": "cat"}


@pytest.fixture(scope="module")
def request_of(model_dir, kv_artifact_dir, tmp_path_factory):
    """A request in a folder of its own; changes go on top."""
    root = tmp_path_factory.mktemp("evaluate")
    prompts = root / "words.json"
    prompts.write_text(json.dumps(PROMPTS))
    words = [f"model.path={model_dir}", "model.device=cpu", "model.dtype=float32"]
    recipe = load_recipe([], [*words, "collect.cfg=2", "collect.top_k=0"])
    request = Request(
        recipe=recipe,
        artifact=kv_artifact_dir,
        switches=Switches(),
        benchmarks=(str(prompts),),
        metrics=("psnr", "ssim"),
        num_samples=100,
        seed=7,
        subset_seed=0,
        batch=1,
        compute="w4a4",
        gen_root=root / "gen",
        ref_root=root / "ref",
        data_root=root,
        metric_weights=None,
        prompt_cache=None,
        out=None,
    )
    return lambda **changes: replace(request, **changes)


def run(request: Request, notes: list[str] | None = None) -> Evaluation:
    said = [] if notes is None else notes
    found = evaluate(request, on_progress=lambda *_: None, note=said.append)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def found(request_of) -> Evaluation:
    return run(request_of())


def test_numbers_are_those_of_the_images_on_disk(found, model_dir, kv_artifact_dir):
    results = read_results(found.out)
    assert results == found.results
    one, rows = results.benchmarks["words"], read_rows(found.out)
    assert one.ids == sorted(PROMPTS) and one.num_samples == 4 and not one.failed
    images = {}
    for side, folder in one.images.items():
        loaded = [(read_image(path), read_carried(path)) for path in Path(folder).glob("*.png")]
        images[side] = {carried["id"]: (image.double(), carried) for image, carried in loaded}
        assert images[side].keys() == PROMPTS.keys()
    for number, id in enumerate(one.ids):
        (image, carried), (reference, other) = images["images"][id], images["reference"][id]
        assert carried["seed"] == other["seed"] and carried["prompt"] == PROMPTS[id]
        mse = ((image - reference) / 255).square().mean()
        assert float(rows["words/psnr"][number]) == pytest.approx(float(-10 * mse.log10()))
    assert one.metrics["psnr"].value == pytest.approx(float(rows["words/psnr"].mean()))
    assert one.metrics["psnr"].low < one.metrics["psnr"].value < one.metrics["psnr"].high
    assert one.notes == ["words has 4 prompts; all are taken"]
    # the pictures are what each model draws at that seed
    seed, id = images["images"]["y"][1]["seed"], "y"
    for side, source in (("images", kv_artifact_dir), ("reference", model_dir)):
        pipeline = InfinityPipeline.from_pretrained(source, dtype=torch.float32)
        sampling = replace(SAMPLING, tau=0.5)
        wanted = pipeline.generate([PROMPTS[id]], seed=seed, sampling=sampling).uint8_BYX3[0]
        assert torch.equal(images[side][id][0], wanted.permute(2, 0, 1).double())


def test_bytes_are_what_the_artifact_and_its_cache_take(found, request_of, kv_artifact_dir):
    subject = found.results.subject
    files = [p for p in kv_artifact_dir.rglob("*.safetensors") if p.name != "kv_cache.safetensors"]
    assert subject.weight_bytes == sum(path.stat().st_size for path in files)
    pipeline = InfinityPipeline.from_pretrained(kv_artifact_dir, dtype=torch.float32)
    drawn = pipeline.generate(["a"], seed=0, sampling=SAMPLING)
    assert subject.kv_bytes_per_image == drawn.kv_bytes
    no_kv = run(request_of(switches=Switches(kv=False), metrics=("psnr",))).results.subject
    assert no_kv.weight_bytes == subject.weight_bytes
    # 16 bits instead of 8
    assert no_kv.kv_bytes_per_image == pytest.approx(2 * subject.kv_bytes_per_image, rel=0.05)
    assert (no_kv.weights, no_kv.activations, no_kv.kv) == (True, True, False)


def test_the_page_shows_prompts_as_text_and_pairs_from_the_worst(found):
    page = write_page(found).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    rows = read_rows(found.out)["words/ssim"]
    pairs = found.pairs["words"]
    assert pairs.metric == "ssim"
    worst = found.results.benchmarks["words"].ids[int(rows.argmin())]
    assert pairs.worst[0].note.startswith(f"{worst}: ssim")
    assert page.count("data:image/png") == 2 * (len(pairs.worst) + len(pairs.median)) == 16


def test_other_kinds_of_quantization_and_other_seeds_are_drawn_apart(found, request_of):
    same = run(request_of(metrics=("psnr",)))
    assert same.out == found.out
    psnr = "words", "psnr"

    def value(one: Evaluation) -> float:
        return one.results.benchmarks[psnr[0]].metrics[psnr[1]].value

    assert value(same) == value(found)
    kv = run(request_of(switches=Switches(False, False, True), metrics=("psnr",)))
    seed = run(request_of(seed=8, metrics=("psnr",)))
    folders = {one.out for one in (found, kv, seed)}
    assert len(folders) == 3
    # an 8-bit cache alone does less harm than all of it
    assert value(kv) > value(found)
    references = {one.results.benchmarks["words"].images["reference"] for one in (found, kv)}
    assert len(references) == 1


def test_with_everything_off_it_is_the_full_precision_model(found, request_of):
    notes: list[str] = []
    off = run(request_of(switches=OFF), notes)
    assert off.results.subject.artifact is None and off.results.subject.is_full_precision
    assert any("this is the full-precision model" in note for note in notes)
    one = off.results.benchmarks["words"]
    assert one.metrics == {} and set(one.skipped) == {"psnr", "ssim"}
    assert "full-precision model" in one.skipped["psnr"]
    # its images are the references of others
    assert one.images["images"] == found.results.benchmarks["words"].images["reference"]
    plain = run(request_of(artifact=None))
    assert plain.results.subject == off.results.subject and plain.out == off.out


def test_a_metric_without_weights_is_skipped_by_name(request_of, monkeypatch):
    def missing(name, **_):
        raise MetricUnavailable(f"{name} lacks a file")

    opened = sys.modules["var_compressor.evaluation.measuring"].open_metric
    monkeypatch.setattr(
        "var_compressor.evaluation.measuring.open_metric",
        lambda name, **how: missing(name) if name == "lpips" else opened(name, **how),
    )
    one = run(request_of(metrics=("psnr", "lpips", "fid"))).results.benchmarks["words"]
    assert set(one.metrics) == {"psnr"} and one.skipped["lpips"] == "lpips lacks a file"
    assert "fid" in one.skipped


def test_measuring_goes_on_where_it_was_cut_off(request_of, tmp_path, monkeypatch):
    """Nothing is measured twice but what is of other images; bits without opening a model."""
    measured = []
    row, draw = Psnr.row, bit_rows.bitwise_rows

    def counted(self, image_13YX, prompt, reference_13YX):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return row(self, image_13YX, prompt, reference_13YX)

    request = request_of(metrics=("psnr", "bit_kl"), gen_root=tmp_path / "gen", out=tmp_path / "a")
    wanted = run(request_of(metrics=("psnr", "bit_kl"), gen_root=tmp_path / "other"))
    monkeypatch.setattr(Psnr, "row", counted)
    with pytest.raises(KeyboardInterrupt):
        run(request)
    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        # two more, and all are there; then the bits
        monkeypatch.setattr(bit_rows, "bitwise_rows", lambda *_, **__: cut_off())
        run(request)
    assert len(measured) == 2
    monkeypatch.setattr(bit_rows, "bitwise_rows", draw)
    monkeypatch.setattr(Psnr, "row", lambda *_: pytest.fail("measured again"))
    again = run(request)
    assert values(again) == values(wanted)
    opened = property(lambda self: pytest.fail("opened"))
    monkeypatch.setattr(bit_rows._Compare, "pipelines", opened)
    assert values(run(request)) == values(wanted)
    # an image that is drawn again has other bytes, and is measured
    folder = Path(again.results.benchmarks["words"].images["images"])
    path = sorted(folder.glob("*.png"))[0]
    with Image.open(path) as image:
        carried = json.loads(image.info[SETTINGS_KEY])
        black = Image.new("RGB", image.size)
    write_png(black, path, {**carried, "seconds": 1.0})
    monkeypatch.setattr(Psnr, "row", lambda *_: torch.tensor(-1.0, dtype=torch.float64))
    changed = run(replace(request, metrics=("psnr",)))
    rows_N = read_rows(changed.out)["words/psnr"]
    assert int((rows_N == -1).sum()) == 1


def cut_off():
    raise KeyboardInterrupt


def values(found: Evaluation) -> dict[str, float]:
    return {name: one.value for name, one in found.results.benchmarks["words"].metrics.items()}


def test_a_failed_prompt_is_left_out_on_both_sides_and_listed(request_of, monkeypatch, tmp_path):
    encode = InfinityPipeline.encode

    def choosy(self, texts):
        # the compressed model alone cannot draw this one
        if texts == ["red cat"] and self.is_compressed:
            raise RuntimeError("no")
        return encode(self, texts)

    monkeypatch.setattr(InfinityPipeline, "encode", choosy)
    one = run(request_of(gen_root=tmp_path)).results.benchmarks["words"]
    assert [(f.id, f.reason) for f in one.failed] == [("y", "no")]
    assert one.ids == sorted(PROMPTS.keys() - {"y"}) and one.metrics["psnr"].num_samples == 3


# ---- what rows amount to


def test_distances_and_changes_of_distributions():
    generator = torch.Generator().manual_seed(0)
    own, full, truth = (torch.randn(64, 5, generator=generator) + i for i in (1.0, 0.2, 0.0))
    rows = {"fid": {"": own, REFERENCE: full, TRUTH: truth}}
    found = summarize(rows, torch.device("cpu"))
    wanted = [frechet_distance(one, truth) for one in (own, full)]
    assert found.metrics["fid"].value == pytest.approx(wanted[0])
    assert found.reference["fid"].value == pytest.approx(wanted[1])
    change = found.changes["fid"]
    assert change.value == pytest.approx(wanted[0] - wanted[1])
    assert 0 < change.low < change.value < change.high
    sizes = found.metrics["fid"].by_size
    assert [one.num_images for one in sizes] == [8, 16, 32, 64]
    assert sizes[-1].value == pytest.approx(wanted[0]) and sizes[0].value > sizes[-1].value


def test_changes_of_means_are_paired():
    generator = torch.Generator().manual_seed(0)
    full = 100 * torch.randn(200, generator=generator, dtype=torch.float64)
    own = full + 1 + 0.1 * torch.randn(200, generator=generator, dtype=torch.float64)
    found = summarize({"clip_score": {"": own, REFERENCE: full}}, torch.device("cpu"))
    change = found.changes["clip_score"]
    # far narrower than the two intervals apart
    assert 0.97 < change.low < change.value < change.high < 1.03
    assert found.metrics["clip_score"].high - found.metrics["clip_score"].low > 10


# ---- the command


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("m.yaml --metrics fid psnr --seed 1", "m.yaml --metrics fid --metrics psnr --seed 1"),
        (
            "m.yaml --benchmarks MJHQ DCI --num-samples 9 a.b=1",
            "m.yaml --benchmarks MJHQ --benchmarks DCI --num-samples 9 a.b=1",
        ),
        ("--benchmarks a,b c a.b=1 d", "--benchmarks a,b --benchmarks c a.b=1 d"),
        ("--metrics a --metrics b", "--metrics a --metrics b"),
        ("m --metrics=a --no-kv", "m --metrics=a --no-kv"),
        ("m --metrics --seed 1", "m --metrics --seed 1"),
        ("m --benchmarks", "m --benchmarks"),
    ],
)
def test_lists_of_words(words, wanted):
    assert spread(words.split()) == wanted.split()


def varc(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["varc", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


def test_the_command_as_it_is_documented(monkeypatch, capsys, tmp_path, model_dir, kv_artifact_dir):
    (tmp_path / "a.txt").write_text("a\ncat")
    (tmp_path / "b.txt").write_text("red")
    monkeypatch.chdir(tmp_path)
    code, out, err = varc(
        monkeypatch,
        capsys,
        *("evaluate", "recipes/model/infinity-tiny.yaml", "recipes/svdquant/int4.yaml"),
        *("--artifact", str(kv_artifact_dir), "--benchmarks", "a.txt", "b.txt"),
        *("--num-samples", "2", "--metrics", "psnr", "clip_score", "--gen-root", "g"),
        *("--ref-root", "r", "--no-weights", "--no-activations", "--kv", "--json"),
        *(f"model.path={model_dir}", "model.device=cpu", "quant.low_rank.rank=8"),
        *("quant.low_rank.max_iters=2", "quant.smooth.num_grids=3"),
    )
    assert code == 0, err
    found = json.loads(out)
    assert list(found["benchmarks"]) == ["a", "b"]
    assert found["subject"]["kv"] and not found["subject"]["weights"]
    assert found["benchmarks"]["b"]["notes"] == ["b has 1 prompts; all are taken"]
    assert "clip_score" in found["benchmarks"]["a"]["skipped"]
    assert "psnr" in err and "index.html" in err and "note: b has 1 prompts" in err
    (results,) = (tmp_path / "g").glob("*/results.json")
    assert results.with_name("index.html").is_file()
    assert json.loads(results.with_name("identity.json").read_text())["sampling"]["cfg"] == 3.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metrics", "psnr", "fidd"), "no metric is called 'fidd'"),
        (("--benchmarks", "COCO"), "COCO: no such benchmark"),
        (("--benchmarks", "MJHQ", "--data-root", "nowhere"), "nowhere/MJHQ-30K/meta_data.json"),
        (("--artifact", "nowhere"), "nowhere: has no manifest.json"),
        (
            ("--artifact", "ARTIFACT", "--compute", "w4a16"),
            "runs on kernels, which cannot run here",
        ),
        (("--artifact", "ARTIFACT", "quant.low_rank.rank=9"), "quant.low_rank.rank is 9"),
        (("--artifact", "ARTIFACT", "model.path=null"), "was made from"),
        (("--num-samples", "1"), "--num-samples"),
        (("collect.pixel_budget=3M",), "pixel_budget"),
        (("collect.tau=[0.5,0.5]",), "tau has 2 values"),
        (("--benchmarks", "empty.csv"), "no image could be drawn"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    monkeypatch, capsys, tmp_path, model_dir, kv_artifact_dir, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text('prompt\n" "\n')
    words = [str(kv_artifact_dir) if word == "ARTIFACT" else word for word in words]
    start = ["evaluate", f"model.path={model_dir}", "model.device=cpu", "--gen-root", "g"]
    if "--benchmarks" not in words:
        (tmp_path / "a.txt").write_text("a\ncat")
        start += ["--benchmarks", "a.txt"]
    if "--metrics" not in words:
        start += ["--metrics", "psnr"]
    code, _, err = varc(monkeypatch, capsys, *start, *words)
    assert code == 2 and message in err, err
    assert "Traceback" not in err
