"""Networks that judge images, without their published weights: names and sizes of the published
files, and arithmetic against independent computations.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from metric_weights import filled, images, noise
from var_compressor.evaluation.metrics import METRICS, clip, image_reward, open_metric
from var_compressor.evaluation.metrics.clip import open_clip
from var_compressor.evaluation.metrics.image_reward import RewardConfig, RewardNetwork
from var_compressor.evaluation.metrics.inception import (
    CLEAN_FID,
    FID,
    INCEPTION_FILE,
    InceptionDistance,
    InceptionV3,
)
from var_compressor.evaluation.metrics.lpips import LPIPS, AlexNet, Heads, Lpips
from var_compressor.evaluation.metrics.resize import clip_pixels, pil_resize, tensorflow_resize
from var_compressor.models.tensor_files import CheckpointError

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden" / "inception_features.json"


def shapes_of(module):
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def with_weights(module, state):
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


# ---------------------------------------------------------------- Inception

# layers of the published file: by block, what stands between "Mixed_" and ".conv.weight"
BRANCHES = {
    "5b 5c 5d": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool",
    "6a": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "6b 6c 6d 6e": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    "7a": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "7b 7c": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool",
}


@pytest.fixture(scope="module")
def inception_state():
    return filled(shapes_of(InceptionV3()))


@pytest.fixture(scope="module")
def inception_file(inception_state, tmp_path_factory):
    """With the head and the counters that a published file may have."""
    path = tmp_path_factory.mktemp("weights") / INCEPTION_FILE.name
    head = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    counter = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(inception_state | head | counter, path)
    return path


def opened_inception(spec, path):
    return InceptionDistance.opened(spec, {INCEPTION_FILE.name: path}, CPU)


def test_names_and_size_of_inception_are_the_published_files():
    layers = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    layers += [
        f"Mixed_{block}.branch{branch}"
        for blocks, branches in BRANCHES.items()
        for block in blocks.split()
        for branch in branches.split()
    ]
    parts = ["conv.weight", *(f"bn.{p}" for p in ["weight", "bias", "running_mean", "running_var"])]
    shapes = shapes_of(InceptionV3())
    assert shapes.keys() == {f"{layer}.{part}" for layer in layers for part in parts}
    # Keras counts 21,802,784 without its head: without norm weights, with both statistics
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert len(layers) == 94
    assert sum(n for name, n in sizes.items() if not name.endswith("bn.weight")) == 21_802_784
    assert sum(n for name, n in sizes.items() if "running" not in name) == 21_785_568


def stated_again(state, x):
    """Inception's features in one function: convolutions by their names, padded to keep the size
    unless told otherwise.
    """

    def conv(x, name, stride=1, same=True):
        weight = state[f"{name}.conv.weight"].to(x)
        pad = tuple(k // 2 for k in weight.shape[2:]) if same else 0
        x = F.conv2d(x, weight, stride=stride, padding=pad)
        mean, var, gain, bias = (
            state[f"{name}.bn.{part}"].to(x)[:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-3).sqrt() * gain + bias).clamp_min(0)

    def chain(x, block, *names):
        for name in names:
            halves = name.endswith("!")
            x = conv(x, f"Mixed_{block}.branch{name.rstrip('!')}", 1 + halves, not halves)
        return x

    def mean_around(x):
        ones = torch.ones_like(x[:, :1])
        kernel = torch.ones(x.shape[1], 1, 3, 3).to(x)
        total = F.conv2d(x, kernel, padding=1, groups=x.shape[1])
        return total / F.conv2d(ones, kernel[:1], padding=1)

    def max_around(x):
        return F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-math.inf), 3, 1)

    x = conv(conv(x, "Conv2d_1a_3x3", 2, False), "Conv2d_2a_3x3", same=False)
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3"), 3, 2)
    x = conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", same=False)
    x = F.max_pool2d(x, 3, 2)
    for b in ("5b", "5c", "5d"):
        deep = chain(x, b, "3x3dbl_1", "3x3dbl_2", "3x3dbl_3")
        pooled = chain(mean_around(x), b, "_pool")
        x = torch.cat([chain(x, b, "1x1"), chain(x, b, "5x5_1", "5x5_2"), deep, pooled], 1)
    deep = chain(x, "6a", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3!")
    x = torch.cat([chain(x, "6a", "3x3!"), deep, F.max_pool2d(x, 3, 2)], 1)
    for b in ("6b", "6c", "6d", "6e"):
        deep = chain(x, b, *(f"7x7dbl_{i}" for i in range(1, 6)))
        middle, pooled = chain(x, b, "7x7_1", "7x7_2", "7x7_3"), chain(mean_around(x), b, "_pool")
        x = torch.cat([chain(x, b, "1x1"), middle, deep, pooled], 1)
    deep = chain(x, "7a", "7x7x3_1", "7x7x3_2", "7x7x3_3", "7x7x3_4!")
    x = torch.cat([chain(x, "7a", "3x3_1", "3x3_2!"), deep, F.max_pool2d(x, 3, 2)], 1)
    for b, around in (("7b", mean_around), ("7c", max_around)):
        first, deep = chain(x, b, "3x3_1"), chain(x, b, "3x3dbl_1", "3x3dbl_2")
        forks = [chain(first, b, f"3x3_2{end}") for end in "ab"]
        forks += [chain(deep, b, f"3x3dbl_3{end}") for end in "ab"]
        x = torch.cat([chain(x, b, "1x1"), *forks, chain(around(x), b, "_pool")], 1)
    return x.flatten(2).mean(2)


def test_inception_equals_a_second_statement_of_it(inception_state):
    network = with_weights(InceptionV3(), inception_state)
    x = (images(1, 139, 123).float() - 128) / 128
    wanted = stated_again(inception_state, x.double())
    assert torch.allclose(network(x).double(), wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 1


@pytest.mark.parametrize(("height", "width"), [(299, 299), (160, 352)])
def test_features_equal_the_reference_extractors(inception_file, height, width):
    """Recorded from torch-fidelity's extractor with the same weights, its resizing included."""
    wanted = torch.tensor(json.loads(GOLDEN.read_text())["features"][f"{height}x{width}"])
    metric = opened_inception(FID, inception_file)
    found = metric.rows(images(1, height, width), prompts=[])
    assert found.dtype == torch.float32 and found.shape == (1, 2048)
    assert torch.allclose(found[0, ::64], wanted, rtol=1e-4, atol=1e-4)


def test_features_of_an_image_do_not_depend_on_batch_mates(inception_file):
    metric = opened_inception(FID, inception_file)
    batch = images(2, 96, 80)
    together = metric.rows(batch, prompts=[])
    assert torch.equal(together[1], metric.rows(batch[1:], prompts=[])[0])
    assert not torch.equal(*together)


def test_the_two_distances_differ_in_resizing_alone(inception_file):
    fid, clean = (opened_inception(spec, inception_file) for spec in (FID, CLEAN_FID))
    small, exact = images(1, 400, 400), images(1, 299, 299)
    rows = [metric.rows(small, prompts=[]) for metric in (fid, clean)]
    assert (rows[0] - rows[1]).abs().max() > 1e-2
    assert torch.equal(*(metric.rows(exact, prompts=[]) for metric in (fid, clean)))


def test_a_distance_is_between_the_rows_of_two_sets(inception_file):
    metric = opened_inception(FID, inception_file)
    a_NF, b_NF = noise((5, 2048), 0).float(), noise((6, 2048), 1).float()
    # neither set's spread overlaps with the other's by much, so the closed form is near
    spread = a_NF.double().var(0).sum() + b_NF.double().var(0).sum()
    means = (a_NF.double().mean(0) - b_NF.double().mean(0)).square().sum()
    assert float(means) < metric.value(a_NF, b_NF) < float(means + spread)
    assert metric.value(a_NF, a_NF) == pytest.approx(0, abs=1e-9)
    assert metric.value(a_NF, a_NF + 0.5) == pytest.approx(2048 / 4, rel=1e-6)
    with pytest.raises(ValueError, match="got 5 and 0 rows"):
        metric.value(a_NF)


# ---------------------------------------------------------------- resizing


def test_tensorflows_resize_meets_corners_and_averages_nothing():
    row = torch.tensor([0.0, 10, 20, 40]).to(torch.uint8)
    image = row.expand(1, 3, 4, 4)
    # 4 -> 8: half steps from the left corner; the last pixel has no right neighbour
    assert tensorflow_resize(image, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 30, 40, 40]
    # 4 -> 2: every second pixel as it is
    assert tensorflow_resize(image, 2)[0, 0, 0].tolist() == [0, 20]
    # rows alike
    assert tensorflow_resize(image.transpose(2, 3), 8)[0, 0, :, 0].tolist()[:4] == [0, 5, 10, 15]


def bicubic_row(row, size):
    """One row by the cubic kernel with a = -1/2, widened by the scale, in float64."""
    step = len(row) / size
    wide = max(step, 1.0)
    found = []
    for i in range(size):
        center = (i + 0.5) * step
        places = range(
            max(0, int(center - 2 * wide + 0.5)), min(len(row), int(center + 2 * wide + 0.5))
        )
        distances = [abs((p + 0.5 - center) / wide) for p in places]
        kernel = [
            1.5 * d**3 - 2.5 * d**2 + 1
            if d < 1
            else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
            if d < 2
            else 0
            for d in distances
        ]
        found.append(sum(k * row[p] for k, p in zip(kernel, places, strict=True)) / sum(kernel))
    return found


@pytest.mark.parametrize("size", [5, 29])
def test_pillows_resize_is_an_antialiased_bicubic(size):
    row = (255 * noise((13,), 1)).round()
    image = row.to(torch.uint8).expand(1, 3, 4, 13)
    found = pil_resize(image, (4, size))[0, 1, 2].tolist()
    assert found == pytest.approx(bicubic_row(row.tolist(), size), abs=1e-3)


def test_clips_pixels_are_the_normalized_middle():
    image = images(1, 20, 47)
    whole = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((18, 8), Image.BICUBIC)
    middle = np.asarray(whole).astype(np.float64)[:, 5:13] / 255
    wanted = (middle - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    found = clip_pixels(image, 8)[0].permute(1, 2, 0)
    assert np.allclose(found.numpy(), wanted, atol=1e-5)
    # an image of the right size is not resampled
    exact = clip_pixels(images(1, 8, 8), 8)[0, 0] * 0.26862954 + 0.48145466
    assert torch.allclose(exact * 255, images(1, 8, 8)[0, 0].float(), atol=1e-3)


# ---------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def lpips():
    network, heads = AlexNet(), Heads()
    weights = {name: x.abs() for name, x in filled(shapes_of(heads)).items()}
    with_weights(network, filled(shapes_of(network)))
    return Lpips(LPIPS, network, with_weights(heads, weights), CPU)


def test_names_of_alexnet_and_heads_are_the_published_files():
    shapes = shapes_of(AlexNet())
    assert shapes["features.0.weight"] == (64, 3, 11, 11)
    assert shapes["features.3.weight"] == (192, 64, 5, 5)
    assert {name.split(".")[1] for name in shapes} == {"0", "3", "6", "8", "10"}
    # all of AlexNet's 61,100,840 but its three fully connected layers
    dense = 9216 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    assert sum(math.prod(shape) for shape in shapes.values()) == 61_100_840 - dense
    widths = {0: 64, 1: 192, 2: 384, 3: 256, 4: 256}
    assert shapes_of(Heads()) == {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in widths.items()}


def test_lpips_equals_its_definition(lpips):
    """Place by place in float64, convolutions as products with unfolded patches."""
    state = {name: x.double() for name, x in lpips.network.state_dict().items()}
    heads = [x.double().flatten() for x in lpips.heads.state_dict().values()]

    def conv(x, name, kernel, stride, padding):
        weight, bias = state[f"features.{name}.weight"], state[f"features.{name}.bias"]
        size = [(s + 2 * padding - kernel) // stride + 1 for s in x.shape[1:]]
        patches = F.unfold(x[None], kernel, padding=padding, stride=stride)[0]
        return (weight.flatten(1) @ patches + bias[:, None]).clamp_min(0).unflatten(1, size)

    def maps(image):
        x = image.double() / 255 * 2 - 1
        shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
        spread = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
        one = conv((x - shift) / spread, 0, 11, 4, 2)
        two = conv(F.max_pool2d(one, 3, 2), 3, 5, 1, 2)
        three = conv(F.max_pool2d(two, 3, 2), 6, 3, 1, 1)
        four = conv(three, 8, 3, 1, 1)
        return [one, two, three, four, conv(four, 10, 3, 1, 1)]

    a, b = images(1, 70, 95), images(1, 70, 95, seed=5)
    expected = 0.0
    for head, x, y in zip(heads, maps(a[0]), maps(b[0]), strict=True):
        gaps = [
            (head * (p / p.norm() - q / q.norm()).square()).sum()
            for p, q in zip(x.flatten(1).T, y.flatten(1).T, strict=True)
        ]
        expected += float(torch.stack(gaps).mean())
    found = lpips.rows(a, prompts=[], reference_B3YX=b)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert found.dtype == torch.float64 and expected > 0.1


def test_lpips_is_a_symmetric_distance_of_single_images(lpips):
    a, b = images(3, 64, 64), images(3, 64, 64, seed=7)
    together = lpips.rows(a, prompts=[], reference_B3YX=b)
    assert torch.equal(together, lpips.rows(b, prompts=[], reference_B3YX=a))
    assert lpips.rows(a, prompts=[], reference_B3YX=a).tolist() == [0, 0, 0]
    alone = lpips.rows(a[1:2], prompts=[], reference_B3YX=b[1:2])
    assert torch.equal(together[1:2], alone) and len(together.unique()) == 3
    with pytest.raises(ValueError, match="lpips of images of 30 x 64 pixels"):
        lpips.rows(a[:, :, :30], prompts=[], reference_B3YX=b[:, :, :30])


# ---------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP of 224 pixels whose tokenizer knows letters."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("weights") / "clip-vit-large-patch14"
    folder.mkdir()
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text = {"vocab_size": len(words), "num_attention_heads": 4, "max_position_embeddings": 77}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    vision = {"image_size": 224, "patch_size": 32, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=sizes | text | ends, vision_config=sizes | vision, projection_dim=16
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def cosines_of(folder, image_3YX, texts):
    """By the model's own joint pass, one text at a time, on pixels made here."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pixels_1 = clip_pixels(image_3YX[None], 224)
    cosines = []
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            logits = model(**tokens, pixel_values=pixels_1).logits_per_image
        cosines.append(logits.item() / model.logit_scale.exp().item())
    return cosines


def test_clip_score_is_100_times_the_cosine(clip_folder):
    metric = open_metric("clip_score", weights_dir=clip_folder.parent, device=CPU)
    batch, prompts = images(3, 240, 300), ["a red cube", "b", "word " * 200]
    rows = metric.rows(batch, prompts=prompts)
    wanted = [
        100 * cosines_of(clip_folder, image, [text])[0]
        for image, text in zip(batch, prompts, strict=True)
    ]
    assert rows.tolist() == pytest.approx(wanted, abs=1e-3)
    assert rows.dtype == torch.float64 and len(rows.unique()) == 3
    # rows are signed, so that they can be resampled; a set's value is not below zero
    assert metric.value(rows) == pytest.approx(max(0.0, sum(wanted) / 3), abs=1e-3)
    assert metric.value(-rows.abs()) == 0
    assert torch.equal(metric.rows(batch[1:2], prompts=prompts[1:2]), rows[1:2])
    with pytest.raises(ValueError, match="clip_score: 2 prompts for 3 images"):
        metric.rows(batch, prompts=prompts[:2])
    assert math.isfinite(metric.rows(batch[:1], prompts=[""]).item())


def test_clip_iqa_is_the_probability_of_a_good_photo(clip_folder):
    metric = open_metric("clip_iqa", weights_dir=clip_folder.parent, device=CPU)
    batch = images(2, 224, 224)
    rows = metric.rows(batch, prompts=["", ""])
    for row, image in zip(rows.tolist(), batch, strict=True):
        good, bad = cosines_of(clip_folder, image, ["Good photo.", "Bad photo."])
        assert row == pytest.approx(1 / (1 + math.exp(100 * (bad - good))), abs=1e-4)
    assert 0 < rows.min() < rows.max() < 1
    assert METRICS["clip_iqa"].backbone == "CLIP ViT-L/14"


def test_both_clip_metrics_share_a_model(clip_folder):
    score = open_metric("clip_score", weights_dir=clip_folder.parent, device=CPU)
    iqa = open_metric("clip_iqa", weights_dir=clip_folder.parent, device=CPU)
    assert score.clip is iqa.clip
    del score, iqa
    assert (clip_folder, CPU) not in clip._opened


def test_a_folder_without_a_whole_clip_is_named(clip_folder, tmp_path):
    folder = tmp_path / "clip-vit-large-patch14"
    folder.mkdir()
    for part in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / part).write_bytes((clip_folder / part).read_bytes())
    with pytest.raises(CheckpointError, match=r"not a whole CLIP model .* needs config\.json"):
        open_clip(folder, CPU)
    (folder / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="not a whole CLIP model"):
        open_clip(folder, CPU)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="model_type is 'bert', not 'clip'"):
        open_clip(folder, CPU)


# ---------------------------------------------------------------- ImageReward

TINY = RewardConfig(
    image_side=64,
    image_width=48,
    image_depth=2,
    image_heads=4,
    text_width=32,
    text_depth=2,
    text_heads=2,
    text_inner=64,
    num_words=12,
    num_positions=40,
)


def test_names_and_sizes_of_image_reward_are_the_published_files():
    with torch.device("meta"):
        shapes = shapes_of(RewardNetwork(RewardConfig()))
    # the published network, but for two projections of 256 x 1024 and 256 x 768 that it never uses
    assert len(shapes) == 620
    assert sum(math.prod(shape) for shape in shapes.values()) == 446_206_689
    wanted = {
        "blip.visual_encoder.pos_embed": (1, 197, 1024),
        "blip.visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
        "blip.visual_encoder.blocks.23.attn.qkv.weight": (3072, 1024),
        "blip.visual_encoder.blocks.0.mlp.fc1.bias": (4096,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (30524, 768),
        "blip.text_encoder.embeddings.LayerNorm.weight": (768,),
        "blip.text_encoder.encoder.layer.11.attention.self.query.weight": (768, 768),
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight": (768, 1024),
        "blip.text_encoder.encoder.layer.0.crossattention.output.dense.bias": (768,),
        "blip.text_encoder.encoder.layer.3.output.LayerNorm.bias": (768,),
        "mlp.layers.0.weight": (1024, 768),
        "mlp.layers.6.weight": (16, 64),
        "mlp.layers.7.bias": (1,),
    }
    assert {name: shapes.get(name) for name in wanted} == wanted


@pytest.fixture
def reward_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(image_reward, "RewardConfig", lambda: TINY)
    state = filled(shapes_of(RewardNetwork(TINY)))
    unused = {
        "blip.vision_proj.weight": torch.zeros(8, 48),
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
    }
    torch.save(state | unused, tmp_path / "ImageReward.pt")
    (tmp_path / "bert-base-uncased").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["a", "red", "cube", "blue", "ball", "##s", ","]
    (tmp_path / "bert-base-uncased/vocab.txt").write_text("\n".join(words))
    return tmp_path


def judged_by_blip(state, pixels_13YX, words):
    """The same reward through transformers' BLIP, padded to 35 tokens as the authors' code does."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=48,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
            layer_norm_eps=1e-6,
        )
    )
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=12,
            hidden_size=32,
            encoder_hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
        ),
        add_pooling_layer=False,
    )
    theirs = {
        ".norm1.": ".layer_norm1.",
        ".norm2.": ".layer_norm2.",
        ".attn.": ".self_attn.",
        ".proj.": ".projection.",
        "blocks.": "encoder.layers.",
        "patch_embed.projection": "embeddings.patch_embedding",
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
    }
    seen = {}
    for name, value in state.items():
        if (short := name.removeprefix("blip.visual_encoder.")) != name:
            for ours, other in theirs.items():
                short = short.replace(ours, other)
            seen["post_layernorm." + short[5:] if short.startswith("norm.") else short] = value
    vision.load_state_dict(seen, strict=True)
    prefix = "blip.text_encoder."
    own = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    missing, unexpected = text.load_state_dict(own, strict=False)
    assert set(missing) <= {"embeddings.position_ids"} and not unexpected
    padded = torch.tensor([words + [0] * (35 - len(words))])
    with torch.no_grad():
        image = vision.eval()(pixel_values=pixels_13YX).last_hidden_state
        x = text.eval()(
            input_ids=padded,
            attention_mask=(torch.arange(35) < len(words)).long()[None],
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(1, image.shape[1]),
            is_decoder=False,
        ).last_hidden_state[:, 0]
        for layer in (0, 2, 4, 6, 7):
            x = x @ state[f"mlp.layers.{layer}.weight"].T + state[f"mlp.layers.{layer}.bias"]
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_equals_transformers_blip(reward_folder):
    metric = open_metric("image_reward", weights_dir=reward_folder, device=CPU)
    state = metric.network.state_dict()
    batch = images(3, 80, 100)
    prompts = {
        "A red cube, blue balls": [2, 5, 6, 7, 11, 8, 9, 10, 3],
        "Café": [2, 1, 3],
        "": [2, 3],
    }
    rows = metric.rows(batch, prompts=list(prompts))
    for row, image, words in zip(rows.tolist(), batch, prompts.values(), strict=True):
        wanted = judged_by_blip(state, clip_pixels(image[None], 64), words)
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert rows.dtype == torch.float64 and len(rows.unique()) == 3
    assert torch.equal(metric.rows(batch[1:2], prompts=["Café"]), rows[1:2])
    assert metric.value(rows) == pytest.approx(sum(rows.tolist()) / 3)


def test_a_prompt_is_cut_at_35_tokens(reward_folder):
    metric = open_metric("image_reward", weights_dir=reward_folder, device=CPU)
    image = images(1, 64, 64)
    long, longer, short = (
        metric.rows(image, prompts=["red " * count]).item() for count in (33, 300, 32)
    )
    assert long == longer != short
    assert metric.tokenizer.encode("red " * 300).ids == [2, *[6] * 33, 3]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00"])
def test_another_file_than_berts_vocabulary_is_refused(reward_folder, content):
    (reward_folder / "bert-base-uncased/vocab.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"vocab\.txt: not BERT's vocabulary"):
        open_metric("image_reward", weights_dir=reward_folder, device=CPU)
