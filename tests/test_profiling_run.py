"""A whole profile: against the model run in one piece, resumed, streamed, reported, refused."""

from __future__ import annotations

import copy
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from tiny import COLLECTION, QUICK_SPEC
from var_compressor import cli
from var_compressor.evaluation.outliers import ScaledFeedForward
from var_compressor.layers.kv_cache import PlainCache
from var_compressor.models.agreement import compare_logits
from var_compressor.models.bits import teacher_inputs
from var_compressor.pipeline import InfinityPipeline
from var_compressor.profiling import original
from var_compressor.profiling.report import PICTURE_LIST, write_report
from var_compressor.profiling.rows import rows_of, worst_first
from var_compressor.profiling.run import profile_model
from var_compressor.profiling.sensitivity import KV, replaced
from var_compressor.quant.activations import MemoryBounds, activation_store
from var_compressor.quant.recording import record
from var_compressor.spec import MODULES, KVSpec, LowRankSpec, QuantSpec

SOURCE = {"source": "a <b>small</b> model"}


def run(pipeline: InfinityPipeline, out: Path, **options) -> dict:
    options = {"spec": QUICK_SPEC, "probe": "all", **options}
    return profile_model(
        pipeline, COLLECTION, options.pop("spec"), source=SOURCE, out=out, **options
    )


@pytest.fixture(scope="module")
def pipeline(model_dir):
    return InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32, compute="reference")


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "out"
    run(pipeline, out)
    return out


@pytest.fixture
def undrawn(monkeypatch, folder):
    """Without the report, which takes longer than all the rest of a small model."""
    monkeypatch.setattr("var_compressor.profiling.run.write_report", lambda profile, out: True)


@pytest.fixture(scope="module")
def profile(folder) -> dict:
    return json.loads((folder / "profile.json").read_text())


@pytest.fixture(scope="module")
def trace(pipeline, tmp_path_factory):
    place = tmp_path_factory.mktemp("trace")
    with (
        torch.inference_mode(),
        activation_store(pipeline.device, MemoryBounds(), place) as store,
    ):
        return record(pipeline, COLLECTION, store, on_progress=lambda *_: None)


class KeepingCache(PlainCache):
    """Keeps keys and values of all levels, also of the last."""

    def attend_level(self, layer, level, q, k, v):
        self.seen[layer, level.index] = (k, v)
        return super().attend_level(layer, level, q, k, v)


@torch.inference_mode()
def whole_forward(pipeline, trace, i):
    """(logits per level, inputs by block and linear, K and V by block and level) of a recording."""
    model, schedule = pipeline.transformer, trace.schedule
    context = pipeline.embed_text(trace.recordings[i].text, None, guided=trace.guided)
    pyramid = pipeline.new_pyramid(schedule, batch=1)
    tokens = teacher_inputs(list(trace.recordings[i].bits), pyramid)
    x = torch.cat([model.start_token(context), model.embed_bits(tokens, context)], dim=1)
    rows = len(context.cond_RC)
    cache = KeepingCache(model.config, schedule, rows=rows, dtype=x.dtype, device="cpu")
    cache.seen, inputs, handles = {}, {}, []
    for index, block in enumerate(model.blocks):
        for name in MODULES:
            keep = lambda _, given, key=(index, name): inputs.update({key: given[0]})  # noqa: E731
            handles.append(block.get_submodule(name).register_forward_pre_hook(keep))
    context = model.with_cross_kv(context)
    h = model(x, schedule.levels, context, cache, model.rotary_table(schedule))
    for handle in handles:
        handle.remove()
    logits = pipeline.transformer.guided_logits(h, context, COLLECTION.sampling.cfg)
    return (
        list(logits.split([level.num_tokens for level in schedule.levels], 1)),
        inputs,
        cache.seen,
    )


def check(found: dict, x_TK: torch.Tensor) -> None:
    x = x_TK.double().numpy()
    ranges_K, ranges_T = np.ptp(x, axis=0), np.ptp(x, axis=1)
    # the model itself is the same only up to float32's rounding, once level by level, once at once
    near = {"rel": 2e-3, "abs": 1e-3}
    assert found["num_tokens"] == len(x)
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(x, axis=None), **near)
    assert found["max"] == pytest.approx(np.abs(x).max(), **near)
    assert found["median"] == pytest.approx(np.median(np.abs(x)), **near)
    assert found["std"] == pytest.approx(x.std(), **near)
    assert found["cv_channel"] == pytest.approx(
        ranges_K.std(ddof=1) / (ranges_K.mean() + 1e-6), **near
    )
    assert found["cv_token"] == pytest.approx(
        ranges_T.std(ddof=1) / (ranges_T.mean() + 1e-6), **near
    )
    if len(x) > 8:
        skew = np.abs(stats.skew(x, axis=0))
        assert found["skewness"] == pytest.approx(skew.mean(), **near)
        assert found["max_skew"] == pytest.approx(skew.max(), **near)


def test_every_tensor_of_every_level_is_the_models_own(pipeline, trace, profile):
    forwards = [whole_forward(pipeline, trace, i) for i in range(len(trace.recordings))]
    levels = trace.schedule.levels
    for index, block in enumerate(profile["blocks"]):
        for name in MODULES:
            seen = [inputs[index, name] for _, inputs, _ in forwards]
            found = block["linears"][name]["input"]
            check(found["all"], torch.cat([x.flatten(0, 1) for x in seen]))
            if name == "cross_attn.kv":
                assert len(found["levels"]) == 1
                continue
            for level in levels:
                here = [x[:, level.offset : level.end].flatten(0, 1) for x in seen]
                check(found["levels"][level.index], torch.cat(here))
        for place, name in enumerate("kv"):
            by_level = [
                torch.cat(
                    [
                        seen[index, level.index][place].transpose(1, 2).flatten(2).flatten(0, 1)
                        for _, _, seen in forwards
                    ]
                )
                for level in levels
            ]
            for level, x_TK in zip(levels, by_level, strict=True):
                check(block["cache"][name]["levels"][level.index], x_TK)
            # the last level is never stored
            check(block["cache"][name]["all"], torch.cat(by_level[:-1]))


def test_sensitivity_is_what_the_whole_model_does(pipeline, trace, profile):
    wanted, _, _ = whole_forward(pipeline, trace, 0)
    layers = profile["sensitivity"]["layers"]
    assert len(layers) == 3 * (len(MODULES) + 1)
    for index, name in ((0, "self_attn.qkv"), (1, "ffn.fc2"), (2, "cross_attn.kv")):
        spec = QUICK_SPEC.for_module(f"blocks.{index}.{name}")
        with replaced(pipeline.transformer.blocks[index], name, spec):
            logits, _, _ = whole_forward(pipeline, trace, 0)
        agreement = compare_logits(wanted, logits).pooled()
        found = layers[f"blocks.{index}.{name}"]
        assert found["kl_nats"] == pytest.approx(agreement.mean_kl_nats, rel=0.02, abs=1e-7)
        assert found["same_bit_by_level"] == pytest.approx(list(agreement.same_bit), abs=3e-3)
    assert all(layers[f"blocks.{index}.{KV}"]["stream_snr_db"] > 20 for index in range(3))


@pytest.mark.usefixtures("undrawn")
def test_only_the_worst_are_followed_to_the_bits(pipeline, profile, tmp_path, monkeypatch):
    monkeypatch.setattr("var_compressor.profiling.run.NUM_WORST", 4)
    layers = run(pipeline, tmp_path / "out", probe="worst")["sensitivity"]["layers"]
    everything = profile["sensitivity"]["layers"]
    assert {name: one["stream_snr_db"] for name, one in layers.items()} == pytest.approx(
        {name: one["stream_snr_db"] for name, one in everything.items()}, rel=1e-6
    )
    worst = sorted(layers, key=lambda name: layers[name]["stream_snr_db"])[:4]
    assert {name for name, one in layers.items() if one["kl_nats"] is not None} == set(worst)
    for name in worst:
        for key, value in everything[name].items():
            assert layers[name][key] == pytest.approx(value, rel=1e-6), (name, key)


class KilledError(Exception):
    pass


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("stop_at", [("recording", 1), ("statistics", 1), ("sensitivity", 2)])
def test_a_run_that_was_cut_off_ends_the_same(pipeline, folder, tmp_path, stop_at):
    def stop(stage, done, total):
        if (stage, done) == stop_at:
            raise KilledError

    out = tmp_path / "out"
    with pytest.raises(KilledError):
        run(pipeline, out, on_progress=stop)
    assert not (out / "profile.json").exists()
    with pytest.raises(ValueError, match="low_rank"):
        other = QuantSpec(low_rank=LowRankSpec(rank=4), calibration=QUICK_SPEC.calibration)
        run(pipeline, out, spec=other)
    seen = []
    run(pipeline, out, on_progress=lambda stage, done, total: seen.append(stage))
    assert ("recording" in seen) == (stop_at[0] == "recording")
    for name in ("profile.json", "infinity_stats.json", "blocks/002.safetensors"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    assert not [path for path in out.rglob("*") if "tmp" in path.name or path.name == "resume.json"]
    with pytest.raises(ValueError, match="holds a finished profile"):
        run(pipeline, out)


@pytest.mark.usefixtures("undrawn")
def test_streamed_blocks_give_the_same(model_dir, profile, tmp_path):
    streamed = InfinityPipeline.from_pretrained(
        model_dir, dtype=torch.float32, compute="reference", stream_blocks=True
    )
    assert json.loads(json.dumps(run(streamed, tmp_path / "out"))) == profile


def test_unusual_recipes(pipeline, tmp_path, request):
    """Nothing rounded, a 16-bit cache, no sensitivity; fp8, and a dynamic cache."""
    nothing = QuantSpec(modules=(), kv=KVSpec(format="bf16"), calibration=QUICK_SPEC.calibration)
    found = run(pipeline, tmp_path / "nothing", spec=nothing)
    assert all(row.output is None for row in rows_of(found))
    assert found["bytes"]["transformer_before"] == found["bytes"]["transformer_after"]
    assert found["bytes"]["cache_before"] == found["bytes"]["cache_after"]
    assert worst_first(found)[0].ratio == max(row.ratio for row in rows_of(found))
    request.getfixturevalue("undrawn")
    fp8 = QuantSpec.from_dict(
        {
            "weight": {"format": "fp8_e4m3", "group_size": -1},
            "act": {"format": "fp8_e4m3", "group_size": -1},
            "kv": {"format": "fp8"},
        }
    )
    found = run(pipeline, tmp_path / "fp8", spec=fp8, probe="none")
    assert found["sensitivity"] is None
    assert all(row.output["plain"] > 25 for row in rows_of(found))


# --- findings -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_planted_outliers_are_found(pipeline, profile, tmp_path):
    planted = copy.deepcopy(pipeline)
    config, block = planted.transformer.config, planted.transformer.blocks[1]
    gain_K = torch.ones(config.ffn_dim)
    gain_K[7] = 512.0
    block.ffn = ScaledFeedForward(config, block.ffn, gain_K)
    # signed, because unsigned inputs count on GELU's own range
    spec = QuantSpec.from_dict(
        {
            "act": {"allow_unsigned": False},
            "calibration": {"max_tokens_per_level": 64, "max_attention_tokens": 600},
        }
    )
    found = run(planted, tmp_path / "out", spec=spec)
    findings = {one["topic"]: one for one in found["findings"]}
    assert "blocks.1.ffn.fc2" in findings["outliers"]["text"]
    worst = max(rows_of(found), key=lambda row: row.ratio)
    assert (worst.block, worst.name) == (1, "ffn.fc2")
    (before,) = (row for row in rows_of(profile) if row.full_name == "blocks.1.ffn.fc2")
    assert worst.ratio > 50 * before.ratio / 2
    # the same function: what is not quantized does not change
    assert worst.input["num_tokens"] == before.input["num_tokens"]
    # one channel sets the step of its group, and smoothing takes it away
    assert worst.output["smoothed"] > worst.output["plain"] + 3
    assert worst.report["input"]["all"]["group_ratio"] > 100


def test_findings_rest_on_the_profiles_numbers(profile):
    findings = {one["topic"]: one for one in profile["findings"]}
    by_kind = findings["outliers"]["numbers"]["max_median_ratio"]
    for name, value in by_kind.items():
        ratios = [row.ratio for row in rows_of(profile) if row.name == name]
        assert value == pytest.approx(np.median(ratios))
    gains = findings["low_rank"]["numbers"]["gain_db"]
    rows = [row for row in rows_of(profile) if row.name == "ffn.fc1"]
    assert gains["ffn.fc1"] == pytest.approx(
        np.median([row.output["branch"] - row.output["smoothed"] for row in rows])
    )
    kl = {row.full_name: row.effect["kl_nats"] for row in rows_of(profile, only_rounded=True)}
    order = [row.full_name for row in worst_first(profile)]
    assert order == sorted(kl, key=lambda name: -kl[name])
    for name, value in findings["protect"]["numbers"].items():
        assert value == kl[name] >= 3 * np.median(list(kl.values()))
    advice = findings["protect"]["advice"]
    if advice is not None:
        assert all(name in advice for name in findings["protect"]["numbers"])


# --- files ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    VOID = ("meta", "img", "br", "link", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_file(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    # nothing is fetched: only the names of XML name spaces look like addresses
    rest = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    rest = re.sub(r"data:[^\"']*", "", rest)
    assert "http" not in rest and "@import" not in rest and "<script" not in text
    assert page.tags.count("figure") == len(PICTURE_LIST) and page.tags.count("svg") >= 8
    assert "a &lt;b&gt;small&lt;/b&gt; model" in text and "<b>small" not in text
    # inks of the pictures follow the page's
    assert "currentColor" in text and "#101214" not in text
    for picture in PICTURE_LIST:
        png = Image.open(folder / "pictures" / f"{picture.name}.png")
        colors = png.convert("RGB").resize((200, 100)).getcolors(20_000)
        assert min(png.size) > 200 and len(colors) > 50, picture.name
    json.loads((folder / "profile.json").read_text(), parse_constant=pytest.fail)


def test_without_matplotlib_there_is_a_page_without_pictures(
    folder, profile, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not write_report(profile, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "pip install" in text and "<svg" not in text and "blocks.2.ffn.fc2" in text
    assert not (tmp_path / "pictures").exists()


def test_the_originals_keys(folder, profile):
    found = json.loads((folder / original.FILE).read_text())
    config = profile["config"]
    assert config["depth"] // config["num_chunks"] == 1
    cache = {
        *("kurtosis", "max_median_ratio", "max", "cv_channel", "cv_token", "dominance", "skewness"),
        *("max_skew", "ideal_zero_point", "global_min", "global_max"),
    }
    for index, block in enumerate(profile["blocks"]):
        place = f"block_chunks.{index}.module.0"
        ((entry,), (stored,)) = (found[f"{place}.{name}"] for name in ("ffn_down", "attn_k"))
        assert entry.keys() == {"kurtosis", "max_median_ratio", "max"} and stored.keys() == cache
        assert entry["max"] == block["linears"]["ffn.fc2"]["input"]["all"]["max"]
        assert stored["cv_channel"] == block["cache"]["k"]["all"]["cv_channel"]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def varc(monkeypatch, capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["varc", *map(str, arguments)])
        monkeypatch.delenv("VARC_TRACEBACK", raising=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return call


@pytest.mark.usefixtures("undrawn")
def test_the_command(varc, model_dir, artifact_dir, tmp_path):
    words = (
        *("recipes/model/infinity-tiny.yaml", "recipes/collect/tiny.yaml"),
        *("collect.num_prompts=1", "model.device=cpu", "model.dtype=bfloat16"),
        "collect.aspect_ratio=0.666",
    )
    model = f"model.path={model_dir}"
    code, printed, err = varc("profile", *words, model, "--out", tmp_path / "a", "--json")
    found = json.loads(printed)
    assert code == 0 and "wrote" in err
    assert len(found["worst"]) == 10 and found["bytes"]["transformer_after"] > 0
    profile = json.loads((tmp_path / "a/profile.json").read_text())
    assert profile["method"]["median_relative_error"] == 0
    assert profile["levels"][-1]["height"] < profile["levels"][-1]["width"]
    assert profile["source"]["source"] == str(model_dir) and profile["source"]["transformer"]
    code, printed, err = varc("profile", *words, model, "--out", tmp_path / "a")
    assert code == 2 and printed == "" and "holds a finished profile" in err
    compressed = f"model.path={artifact_dir}"
    code, printed, err = varc("profile", *words, compressed, "--out", tmp_path / "b")
    assert code == 2 and "compressed already" in err and not (tmp_path / "b").exists()
    code, _, err = varc("profile", "nowhere.yaml", "--out", tmp_path / "b")
    assert code == 2 and "nowhere.yaml" in err and "Traceback" not in err
    code, _, err = varc("profile", *words, model, "--out", tmp_path / "a/profile.json")
    assert code == 2 and "is a file" in err
