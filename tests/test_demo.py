"""The model that comes with the package draws what captions say; the demo shows true numbers."""

from __future__ import annotations

import base64
import json
import re
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from var_compressor import cli
from var_compressor.artifact import read_manifest
from var_compressor.evaluation.agreement import bit_agreement
from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.reader import Reader
from var_compressor.evaluation.scenes import sample_scenes, truths
from var_compressor.evaluation.scores import caption_accuracy, score_caption
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline

SAMPLING = Sampling(cfg=2.0, tau=0.3, top_k=0, top_p=0.97)
QUICK = (
    *("collect.num_prompts=2", "quant.smooth.num_grids=2", "quant.low_rank.max_iters=1"),
    *("model.device=cpu", "model.dtype=float32"),
)


def test_the_embedded_model_draws_what_the_captions_say():
    scenes = sample_scenes(torch.arange(8), "validation")
    pipeline = InfinityPipeline.from_pretrained("infinity-tiny", dtype=torch.float32)
    run = pipeline.generate(captions(scenes), seed=0, sampling=SAMPLING)
    scores = [
        score_caption(reading, truth)
        for reading, truth in zip(Reader.load().read(run.image_B3YX), truths(scenes), strict=True)
    ]
    assert caption_accuracy(scores).objects >= 0.8


def picture(url: str) -> np.ndarray:
    with Image.open(BytesIO(base64.b64decode(url))) as image:
        return np.asarray(image).astype(np.float64)


def test_the_demo_from_end_to_end(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr(
        sys,
        "argv",
        ["varc", "demo", "--num-prompts", "2", "--seed", "5", "--out", str(out), *QUICK],
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    assert caught.value.code == 0, printed.err
    result = json.loads((out / "result.json").read_text())
    assert json.loads(printed.out.splitlines()[-1]) == result

    scenes = sample_scenes(torch.arange(2), "validation")
    texts = captions(scenes)
    full = InfinityPipeline.from_pretrained("infinity-tiny", dtype=torch.float32)
    compressed = InfinityPipeline.from_pretrained(out / "artifact", dtype=torch.float32)
    assert read_manifest(out / "artifact").kv["format"]["name"] == "int8"
    runs = [
        p.generate(texts, seed=5, sampling=SAMPLING, with_trace=True) for p in (full, compressed)
    ]
    images = [run.image_B3YX for run in runs]

    # the numbers
    agreement = bit_agreement(
        full, compressed, full.encode(texts), runs[0].trace.bits, cfg=SAMPLING.cfg
    )
    assert result["num_prompts"] == 2
    assert result["bit_agreement"]["same_bit"] == pytest.approx(list(agreement.same_bit))
    assert result["mean_bit_agreement"] == pytest.approx(agreement.mean_same_bit)
    assert 0.7 < agreement.mean_same_bit < 1
    mse = [float(((a - b) / 2).double().square().mean()) for a, b in zip(*images, strict=True)]
    assert result["mean_psnr_db"] == pytest.approx(-10 * np.mean(np.log10(mse)), abs=1e-3)
    for name, run in zip(("full", "compressed"), runs, strict=True):
        scores = [
            score_caption(reading, truth)
            for reading, truth in zip(
                Reader.load().read(run.image_B3YX), truths(scenes), strict=True
            )
        ]
        assert result[name]["objects_right"] == caption_accuracy(scores).objects
        assert result[name]["seconds_per_image"] > 0

    # bytes, counted from the network's shape: full precision as a bf16 pipeline holds it
    tensors = full.transformer.state_dict()
    in_blocks = sum(t.numel() for name, t in tensors.items() if name.startswith("blocks."))
    outside = sum(t.numel() for name, t in tensors.items() if not name.startswith("blocks."))
    assert result["full"]["transformer_bytes"] == 2 * in_blocks + 4 * outside
    stored = sum(t.nbytes for t in compressed.transformer.state_dict().values())
    assert result["compressed"]["transformer_bytes"] == stored
    schedule = full.schedule_for(1.0, None)
    # K and V, both guidance rows
    values = 2 * 2 * 8 * 256 * schedule.num_cached_tokens
    assert result["full"]["kv_bytes_per_image"] == 2 * values
    assert result["compressed"]["kv_bytes_per_image"] == values

    # the page and the grid show those very images
    page = (out / "index.html").read_text()
    shown = [picture(url) for url in re.findall(r"data:image/png;base64,([^']+)'", page)]
    assert "http" not in page and "{" not in page.split("<body>")[1]
    wanted = [(one[i] + 1) * 127.5 for i in range(2) for one in images]
    for ours, theirs in zip(shown, wanted, strict=True):
        # the demo draws in batches of its own, which may round otherwise
        assert np.abs(ours - theirs.permute(1, 2, 0).double().numpy()).max() <= 2
    assert all(caption in page for caption in texts)
    assert f"{result['mean_psnr_db']:.2f}" in page
    with Image.open(out / "grid.png") as image:
        grid = np.asarray(image).astype(np.float64)
    rows = [np.concatenate(shown[start::2], axis=1) for start in (0, 1)]
    assert np.array_equal(grid, np.concatenate(rows, axis=0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quant.kv.format=bf16",), "quant.kv.format is bf16"),
        (("collect.cfg=[1,2,3,4,5,6,7]",), "the demo takes one cfg"),
        (("quant.low_rank.rank=300",), "rank 300 does not fit"),
        (("--num-prompts", "0"), "--num-prompts"),
    ],
)
def test_a_demo_that_cannot_be_ends_before_the_work(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["varc", "demo", "--out", str(tmp_path / "demo"), *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
