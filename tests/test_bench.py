"""`varc bench`: random shapes, counted work, kinds of kernels, and the command itself."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tiny import tiny_pipeline
from var_compressor import cli
from var_compressor.bench import kinds, session, sources, timing, work
from var_compressor.bench.memory import part_bytes
from var_compressor.bench.shapes import random_pipeline, random_text
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.sampling import Sampling
from var_compressor.spec import PRESETS, QuantSpec

TINY = "infinity-tiny"


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


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "kv"),
    [(None, None), (PRESETS["svdquant"], None), (QuantSpec(), "int8"), (QuantSpec(), "int4")],
)
def test_a_random_pipeline_draws(spec, kv):
    pipeline = random_pipeline(TINY, spec=spec, kv=kv, dtype=torch.float32, device="cpu", seed=0)
    text = random_text(pipeline.transformer.config, batch=1, seed=0)
    drawn = pipeline.generate(text, seed=0, with_trace=True)
    assert pipeline.is_compressed == (spec is not None)
    assert all(logits.isfinite().all() for logits in drawn.trace.logits)
    # neither noise nor certainty, so that sampling does what it does with trained weights
    assert all(0.3 < logits.std() < 10 for logits in drawn.trace.logits)
    assert drawn.image_B3YX.isfinite().all() and drawn.image_B3YX.std() > 0.05


def test_random_weights_are_codes_with_the_variance_of_full_precision():
    made = {"dtype": torch.float32, "device": "cpu", "seed": 0, "kv": None}
    full = random_pipeline(TINY, spec=None, **made).transformer
    small = random_pipeline(TINY, spec=QuantSpec(), **made).transformer
    compressed = {n: m for n, m in small.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(compressed) == 7 * full.config.depth
    for name, linear in compressed.items():
        weight_NK = full.get_submodule(name).weight
        assert linear.residual().std() == pytest.approx(float(weight_NK.std()), rel=0.1)
    assert torch.equal(small.bit_embed.weight, full.bit_embed.weight)


# --- counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "cfg", "ratio"), [(1, 3.0, 1.0), (2, 1.0, 1.0), (2, (1.0, 1, 1, 3, 3, 3, 3), 1.5)]
)
def test_operations_are_those_that_torch_counts(batch, cfg, ratio):
    pipeline = random_pipeline(TINY, spec=None, kv=None, dtype=torch.float32, device="cpu", seed=0)
    config, sampling = pipeline.transformer.config, Sampling(cfg=cfg)
    text = random_text(config, batch=batch, seed=0)
    schedule = pipeline.schedule_for(ratio, None)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(query, key, value, *rest, out_shape=None, **others):
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
        drawn = pipeline.draw(text, schedule, seed=0, sampling=sampling)
    counted = counter.get_flop_counts()["Global"]
    found = work.count(
        pipeline.transformer, work.Batch(schedule, sampling, text.lens), kv_bytes=drawn.kv_bytes
    )
    # a padded batch attends through a mask, in another kernel
    attention_ops = sum(n for op, n in counted.items() if "attention" in str(op))
    assert found.attention_ops == attention_ops
    assert found.linear_ops + found.attention_ops == sum(counted.values())


def test_traffic_is_every_weight_once_a_level_and_the_cache_as_far_as_it_is():
    made = {"dtype": torch.float32, "device": "cpu", "seed": 0}
    pipeline = random_pipeline(TINY, spec=QuantSpec(), kv=None, **made)
    schedule = pipeline.schedule_for(1.0, None)
    batch = work.Batch(schedule, Sampling(), (5,))
    found = work.count(pipeline.transformer, batch, kv_bytes=schedule.num_cached_tokens)
    # one byte per token: levels of 1, 4, 16, 36, 64 and 144 tokens before the last one of 256
    assert found.cache_bytes == 265 + (0 + 1 + 5 + 21 + 57 + 121 + 265)
    read = sum(
        tensor.nbytes * (1 if "cross_attn.kv" in name or not name.startswith("blocks") else 7)
        for name, tensor in pipeline.transformer.state_dict().items()
        if not name.startswith(("uncond", "start", "text_norm", "level_embed"))
    )
    outside = (pipeline.transformer.head_ada_proj, pipeline.transformer.head_proj)
    often = sum(map(work.parameter_bytes, (*outside, pipeline.transformer.bit_embed)))
    assert found.weight_bytes == read + 6 * often


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT", kinds.LINEAR),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", kinds.LINEAR),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", kinds.LINEAR),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", kinds.LINEAR),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", kinds.LINEAR),
        ("_gemm_groups", kinds.LINEAR),
        ("_gemm_w4a16", kinds.LINEAR),
        ("_expand_weight", kinds.LINEAR),
        ("aten::addmm", kinds.LINEAR),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<cutlass>>", kinds.ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", kinds.ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_knob_7_64x128x128", kinds.ATTENTION),
        ("_attend_int8", kinds.ATTENTION),
        ("_expand_codes", kinds.ATTENTION),
        ("_normalize_rotate", kinds.ATTENTION),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", kinds.ATTENTION),
        ("aten::bmm", kinds.ATTENTION),
        ("_prepare", kinds.REST),
        ("void at::native::vectorized_elementwise_kernel<4, gelu>", kinds.REST),
        ("Memcpy HtoD (Pageable -> Device)", kinds.REST),
    ],
)
def test_kernels_are_told_apart_by_their_names(name, kind):
    assert kinds.kind_of(name) == kind


def test_a_profile_has_the_operations_of_the_call():
    a = torch.randn(64, 64)
    found = kinds.profile_kinds(lambda: torch.addmm(a, a, a).relu(), torch.device("cpu"))
    assert found.seconds[kinds.LINEAR] > 0 and found.seconds[kinds.ATTENTION] == 0
    assert "aten::addmm" in found.longest


def test_an_operation_is_not_counted_in_the_one_that_calls_it():
    def event(name: str, start: int, duration: int, thread: int = 1) -> SimpleNamespace:
        values = {"name": name, "start_ns": start, "duration_ns": duration}
        values["start_thread_id"] = thread
        return SimpleNamespace(**{key: lambda v=value: v for key, value in values.items()})

    events = [event("outer", 0, 100), event("inner", 10, 50), event("core", 20, 10)]
    events += [event("inner", 60, 30), event("next", 100, 5), event("other", 40, 7, thread=2)]
    assert kinds._self_ns(events) == {"outer": 20, "inner": 70, "core": 10, "next": 5, "other": 7}


def test_memory_is_predicted_for_the_shapes_that_are_measured():
    settings = session.Settings("", 1, 0, 1, 1.0, None)
    made = {"kv": "int8", "dtype": torch.bfloat16, "device": "cpu", "seed": 0}
    choice = sources.Choice(TINY, "int8", "auto", False, True, torch.device("cpu"), torch.bfloat16)
    for source, spec in zip(sources.random(choice, seed=0), (QuantSpec(), None), strict=True):
        pipeline = random_pipeline(TINY, spec=spec, **made)
        request = session.request_for(pipeline, settings)
        found = session.predicted_peaks(source, pipeline, request, request.text)
        held = sum(part_bytes(pipeline).values())
        assert held <= found["text"] < 1.01 * held
        assert found["text"] < min(found["draw"], found["VAE"])


# --- the command ----------------------------------------------------------------------------------


def test_the_command_compares_an_artifact_with_its_model(varc, kv_artifact_dir, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = varc(
        "bench", kv_artifact_dir, "--prompt", "a cat", "--runs", 2, "--out", out
    )
    assert code == 0
    last = json.loads(printed.splitlines()[-1])
    found = json.loads((out / "results.json").read_text())
    first, second = found["measured"]
    assert (first["name"], second["name"]) == (str(kv_artifact_dir), "full precision")
    for one in found["measured"]:
        assert len(one["runs"]) == 2
        for run in one["runs"]:
            parts = (run["text_s"], *run["level_s"], run["vae_s"], run["png_s"])
            assert all(seconds > 0 for seconds in parts) and len(run["level_s"]) == 7
            assert sum(parts) == pytest.approx(run["total_s"], rel=0.05)
        assert one["memory"]["parts"]["text encoder"] > 0
        weights = sum(one["memory"]["parts"].values()) - one["memory"]["parts"]["KV cache"]
        assert min(one["memory"]["stage_peaks"].values()) >= weights
    assert second["memory"]["parts"]["KV cache"] == 4 * first["memory"]["parts"]["KV cache"]
    assert found["settings"]["seed"] == 0 and found["machine"]["torch"] == torch.__version__
    totals = [[run["total_s"] for run in one["runs"]] for one in found["measured"]]
    assert last["seconds"] == pytest.approx(sum(totals[0]) / 2)
    assert last["speedup"] == pytest.approx(sum(totals[1]) / sum(totals[0]))
    with Image.open(out / "bench.png") as picture:
        assert picture.width > 500
    assert "prompt to PNG" in printed and "level 6, 16×16" in printed


def test_shapes_alone_need_no_files_and_json_is_one_line(varc, tmp_path):
    words = ("--kv", "int4", "--baseline", "none", "--runs", 1, "--json")
    code, printed, shown = varc("bench", TINY, "--shapes-only", *words, "--out", tmp_path)
    assert code == 0 and len(printed.splitlines()) == 1
    last = json.loads(printed)
    assert last["baseline"] is None and last["speedup"] is None and last["num_runs"] == 1
    assert "features are random" in shown and "prompt to PNG" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("no-such-model",), "no such directory, embedded model"),
        (("infinity-2b",), "does not come with the package"),
        (("infinity-9b", "--shapes-only"), "use one of infinity-2b"),
        ((TINY, "--shapes-only", "--kv", "int3"), "names a format: int8 or int4"),
        ((TINY, "--pixel-budget", "2M"), "use one of 0.06M"),
        ((TINY, "--device", "tpu"), "use auto, cpu or cuda"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(varc, tmp_path, words, message):
    code, printed, shown = varc("bench", *words, "--out", tmp_path / "out")
    assert code == 2 and printed == "" and shown.count("\n") == 1
    assert shown.startswith("varc: ") and message in shown
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_no_results(varc, tmp_path, monkeypatch):
    calls = []

    def stop_at_the_second(pipeline, request):
        calls.append(request)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return timing.time_run(pipeline, request)

    monkeypatch.setattr(session, "time_run", stop_at_the_second)
    code, printed, shown = varc("bench", TINY, "--shapes-only", "--out", tmp_path)
    assert code == 130 and printed == "" and "varc: interrupted" in shown
    assert list(tmp_path.iterdir()) == []


def test_two_that_do_not_fit_together_are_measured_one_after_the_other(monkeypatch):
    opened = []

    def source(name: str) -> session.Source:
        def open_it():
            opened.append(name)
            if opened == ["a", "b"]:
                raise torch.OutOfMemoryError("both at once")
            return tiny_pipeline()

        return session.Source(name, open_it, lambda: None)

    found = session.benchmark(
        [source("a"), source("b")],
        session.Settings("", 1, 0, 1, 1.0, None),
        device=torch.device("cpu"),
        dtype=torch.float32,
        on_progress=lambda *shown: None,
    )
    assert opened == ["a", "b", "b"]
    assert [one.name for one in found.measured] == ["a", "b"]
    assert session.IN_TURNS in found.notes
