"""Train Infinity-Tiny's transformer and text encoder on the bits of the trained VAE.

    PYTHONPATH=src python training/transformer.py --vae DIR --text DIR --judge DIR --out DIR

Scenes are rendered and encoded once, by a process of its own while this one compiles; the bits are
taken afresh in every step, with random flips that later levels learn to correct (bitwise
self-correction).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from loop import Run, machine, save_grid, save_json, save_weights
from safetensors.torch import load_file, save_file
from text import build_encoder, build_tokenizer, load_t5, save_text_encoder
from torch import Tensor, nn
from transformers import T5EncoderModel

from var_compressor.evaluation.captions import captions
from var_compressor.evaluation.reader import Reader
from var_compressor.evaluation.rendering import render
from var_compressor.evaluation.scenes import sample_scenes, truths
from var_compressor.evaluation.scores import caption_accuracy, score_caption
from var_compressor.models.bits import Pyramid, quantize_latent, teacher_inputs
from var_compressor.models.config import MODELS, config_to_dict
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Level, Schedule
from var_compressor.models.text_encoder import TextEncoder
from var_compressor.models.transformer import Infinity
from var_compressor.models.vae import VAE
from var_compressor.pipeline import InfinityPipeline

CONFIG = MODELS["infinity-tiny"]
SCHEDULE = Schedule.of(1.0, CONFIG.transformer.pixel_budget)
MAX_FLIP = 0.15
CAPTION_DROP = 0.1
ENCODER_LR_FACTOR = 0.1


class LevelCausal:
    """A cache that stores nothing: one masked attention over all levels."""

    def __init__(self, device: str) -> None:
        sizes = torch.tensor([level.num_tokens for level in SCHEDULE.levels])
        level_of = torch.arange(len(sizes)).repeat_interleave(sizes).to(device)
        self.mask_LL = level_of[:, None] >= level_of[None, :]

    def attend(
        self, layer: int, levels: Sequence[Level], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask_LL, scale=1.0)


class TeacherForced(nn.Module):
    """Captions and the tokens of all levels to the logits of all bits."""

    def __init__(self, encoder: T5EncoderModel, transformer: Infinity, device: str) -> None:
        super().__init__()
        self.encoder, self.transformer = encoder, transformer
        self.cache = LevelCausal(device)
        self.rope = transformer.rotary_table(SCHEDULE)

    def forward(
        self, ids_BT: Tensor, mask_BT: Tensor, drop_B: Tensor, tokens_BLQ: Tensor
    ) -> Tensor:
        model = self.transformer
        text = self.encoder(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
        unconditional = model.uncond_text[: ids_BT.shape[1]].expand_as(text)
        text = torch.where(drop_B[:, None, None], unconditional, text)
        mask = mask_BT[:, None, None].bool()
        context = model.with_cross_kv(model.context_of(text, mask, num_images=len(ids_BT)))
        x = torch.cat([model.start_token(context), model.embed_bits(tokens_BLQ, context)], dim=1)
        h = model(x, SCHEDULE.levels, context, self.cache, self.rope)
        return model.head(h, context.cond_RC).float()


def initialise(model: Infinity) -> None:
    """Small weights; residual branches start at a quarter of their strength."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.level_embed.weight, std=0.1)
    nn.init.normal_(model.text_pool.query, std=1.0)
    nn.init.normal_(model.ada_proj.weight, std=0.002)
    nn.init.normal_(model.head_ada_proj.weight, std=0.002)
    nn.init.normal_(model.head_proj.weight, std=0.02)
    for block in model.blocks:
        block.ada_offset.data[:, :, :2] = 0.25


def bit_loss(logits_BLQ2: Tensor, bits_BLQ: Tensor, weight_L: Tensor) -> tuple[Tensor, Tensor]:
    """Level-weighted cross-entropy, and the plain one per token position."""
    margin = logits_BLQ2[..., 1] - logits_BLQ2[..., 0]
    entropy_L = F.binary_cross_entropy_with_logits(margin, bits_BLQ.float(), reduction="none").mean(
        (0, 2)
    )
    return (entropy_L * weight_L).sum(), entropy_L.detach()


def level_weights(device: str) -> Tensor:
    """Every level weighs the same, however many tokens it has: what goes where is decided early."""
    sizes = torch.tensor([level.num_tokens for level in SCHEDULE.levels], dtype=torch.float32)
    weight_L = sizes.reciprocal().repeat_interleave(sizes.long())
    return (weight_L / weight_L.sum()).to(device)


def self_corrected(latent_BDYX: Tensor) -> tuple[Tensor, Tensor]:
    """Targets ``[B, L, Q]`` and teacher tokens ``[B, L-1, Q]`` after random flips of bits."""
    flipped: list[Tensor] = []

    def flip(bits_BLQ: Tensor, level: Level) -> Tensor:
        share_B11 = torch.rand(len(bits_BLQ), 1, 1, device=bits_BLQ.device) * MAX_FLIP
        flips = torch.rand(bits_BLQ.shape, device=bits_BLQ.device) < share_B11
        flipped.append(bits_BLQ ^ flips.to(torch.uint8))
        return flipped[-1]

    bits, _ = quantize_latent(latent_BDYX, SCHEDULE, patchify=False, flip=flip)
    pyramid = Pyramid(
        SCHEDULE,
        code_dim=CONFIG.vae.code_dim,
        patchify=False,
        batch=len(latent_BDYX),
        device=latent_BDYX.device,
    )
    return torch.cat(bits, dim=1), teacher_inputs(flipped, pyramid)


def caption_ids(first_and_count: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of a range of training captions (runs in a worker process)."""
    torch.set_num_threads(1)
    first, count = first_and_count
    texts = captions(sample_scenes(torch.arange(first, first + count), "train"))
    tokens = build_tokenizer()(
        texts, padding="max_length", max_length=CONFIG.transformer.text_maxlen, return_tensors="pt"
    )
    return tokens.input_ids, tokens.attention_mask.bool()


def encode_scenes(vae_folder: Path, count: int, path: Path) -> None:
    """Encoder outputs of the first training scenes, bf16 ``[N, D, Y, X]``, into a file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_vae(vae_folder).to(device, memory_format=torch.channels_last)
    latents = torch.empty(count, CONFIG.vae.code_dim, 16, 16, dtype=torch.bfloat16)
    draw = torch.compile(render) if device == "cuda" else render
    size = min(500, count)
    with torch.inference_mode(), autocast(device):
        for start in range(0, count, size):
            image = draw(sample_scenes(torch.arange(start, start + size, device=device), "train"))
            image = image.contiguous(memory_format=torch.channels_last)
            latents[start : start + size] = vae.encoder(image).cpu()
    save_file({"latents": latents}, path)


def evaluate(
    pipeline: InfinityPipeline, judge: Reader, split: str, count: int, sampling: Sampling
) -> tuple[dict[str, float], Tensor]:
    """Caption accuracy of generated images, and the first of them."""
    scores, shown = [], []
    for start in range(0, count, 100):
        scenes = sample_scenes(torch.arange(start, min(start + 100, count)), split)
        images = pipeline.generate(captions(scenes), seed=start, sampling=sampling).image_B3YX
        readings = judge.read(images)
        scores += [score_caption(r, t) for r, t in zip(readings, truths(scenes), strict=True)]
        shown.append(images[:24].float().cpu())
    accuracy = caption_accuracy(scores)
    return {"objects_right": accuracy.objects, "captions_right": accuracy.captions}, shown[0]


class SceneSource:
    """Training scenes as captions and encoder outputs, made by processes beside this one."""

    def __init__(self, options: argparse.Namespace) -> None:
        processes = multiprocessing.get_context("spawn")
        self.path = options.scratch / "latents.safetensors"
        self.encoding = processes.Process(
            target=encode_scenes, args=(options.vae, options.scenes, self.path)
        )
        self.encoding.start()
        self.pool = processes.Pool(min(12, multiprocessing.cpu_count()))
        chunk = min(2000, options.scenes)
        ranges = [(first, chunk) for first in range(0, options.scenes, chunk)]
        self.pending = self.pool.map_async(caption_ids, ranges)

    def load(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for latents, token ids and masks of all scenes, and bring them to the device."""
        columns = zip(*self.pending.get(), strict=True)
        ids_NT, mask_NT = (torch.cat(column).to(device) for column in columns)
        self.pool.terminate()
        self.encoding.join()
        latents_NDYX = load_file(self.path, device=device)["latents"]
        self.path.unlink()
        return latents_NDYX, ids_NT, mask_NT


class BitObjective:
    """Latents and captions to the loss; compiled on a GPU."""

    def __init__(self, model: TeacherForced, device: str) -> None:
        compiled = torch.compile if device == "cuda" else lambda function: function
        self.forward, self.corrected = compiled(model), compiled(self_corrected)
        self.weight_L, self.device = level_weights(device), device

    def __call__(
        self, latent_BDYX: Tensor, ids_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            bits_BLQ, tokens_BLQ = self.corrected(latent_BDYX.float())
        drop_B = torch.rand(len(ids_BT), device=self.device) < CAPTION_DROP
        with autocast(self.device):
            logits_BLQ2 = self.forward(ids_BT, mask_BT, drop_B, tokens_BLQ)
        return bit_loss(logits_BLQ2, bits_BLQ, self.weight_L)

    def warm_up(self, batch_size: int) -> None:
        """Compile forward and backward on noise; leaves gradients behind."""
        shape = (batch_size, CONFIG.transformer.text_maxlen)
        blank = torch.zeros(shape, dtype=torch.int64, device=self.device)
        noise = torch.randn(batch_size, CONFIG.vae.code_dim, 16, 16, device=self.device).bfloat16()
        self(noise, blank, blank == 0)[0].backward()


def build_models(options: argparse.Namespace) -> tuple[T5EncoderModel, Infinity]:
    encoder, transformer = build_encoder(len(build_tokenizer())), Infinity(CONFIG.transformer)
    initialise(transformer)
    load_t5(encoder, options.text)
    if options.init:
        transformer.load_state_dict(load_parts(options.init, "transformer*.safetensors"))
    return encoder.train(), transformer


def train(
    run: Run, objective: BitObjective, scenes: tuple[Tensor, Tensor, Tensor], batch_size: int
) -> None:
    """Steps on random scenes until the run's seconds are over."""
    latents_NDYX, ids_NT, mask_NT = scenes
    run.start()
    next_log = 0.0
    while run.elapsed < run.seconds:
        index = torch.randint(len(latents_NDYX), (batch_size,), device=latents_NDYX.device)
        loss, entropy_L = objective(latents_NDYX[index], ids_NT[index], mask_NT[index])
        run.step(loss)
        if run.elapsed >= next_log:
            next_log = run.elapsed + run.seconds / 40
            per_level = {
                f"level{level.index}": entropy_L[level.offset : level.end].mean().item()
                for level in SCHEDULE.levels
            }
            run.log(
                run.step_index * batch_size,
                loss=loss.item(),
                mean=entropy_L.mean().item(),
                **per_level,
            )


def measure(
    transformer: Infinity, options: argparse.Namespace, device: str
) -> tuple[dict[str, object], Tensor]:
    """Choose guidance and temperature on validation captions; measure them on test captions."""
    text_encoder = TextEncoder(
        options.out / "text_encoder",
        options.out / "tokenizer",
        max_length=CONFIG.transformer.text_maxlen,
        dtype=torch.float32,
        device=device,
    )
    vae = load_vae(options.vae).to(device)
    pipeline = InfinityPipeline(transformer.eval(), vae, text_encoder)
    judge = Reader.load(options.judge / "model.safetensors").to(device).eval()
    sweep, count = [], options.eval_captions
    for cfg, tau in [(1.5, 0.5), (3.0, 0.5), (2.0, 0.3)]:
        tried, sampling = min(200, count), Sampling(cfg=cfg, tau=tau)
        accuracy, _ = evaluate(pipeline, judge, "validation", tried, sampling)
        sweep.append({"cfg": cfg, "tau": tau, "captions": tried, **accuracy})
        print(sweep[-1], flush=True)
    best = max(sweep, key=lambda row: (row["captions_right"], row["objects_right"]))
    chosen = {name: best[name] for name in ("cfg", "tau")}
    accuracy, shown = evaluate(pipeline, judge, "test", count, Sampling(**chosen))
    print(accuracy, flush=True)
    return {"sweep": sweep, "test": {**accuracy, **chosen, "captions": count}}, shown


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vae", type=Path, required=True, help="folder of training/vae.py")
    parser.add_argument("--text", type=Path, required=True, help="folder of training/text.py")
    parser.add_argument("--judge", type=Path, required=True, help="folder of the reader")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="go on from the transformer in this folder")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="for encoded scenes"
    )
    parser.add_argument(
        "--total-seconds", type=float, default=500, help="rendering and compiling included"
    )
    parser.add_argument("--scenes", type=int, default=150_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-captions", type=int, default=500)
    return parser.parse_args()


def main() -> None:
    options, began = parse_options(), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    source = SceneSource(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    encoder, transformer = (module.to(device) for module in build_models(options))
    objective = BitObjective(TeacherForced(encoder, transformer, device), device)
    run = Run(
        [transformer, encoder],
        seconds=options.total_seconds,
        peak_lr=options.lr,
        weight_decay=0.03,
        lr_factors=[1.0, ENCODER_LR_FACTOR],
    )
    objective.warm_up(options.batch_size)
    run.optimizer.zero_grad(set_to_none=True)
    print(f"compiled after {time.monotonic() - began:.1f} s", flush=True)
    scenes = source.load(device)
    print(f"scenes and captions ready after {time.monotonic() - began:.1f} s", flush=True)
    run.seconds = options.total_seconds - (time.monotonic() - began)
    train(run, objective, scenes, options.batch_size)

    record: dict[str, object] = {
        "machine": machine(),
        "seed": options.seed,
        "seconds": run.elapsed,
        "scenes": options.scenes,
        "images": run.step_index * options.batch_size,
        "batch_size": options.batch_size,
        "curve": run.curve,
    }
    # measured is what is shipped: averaged weights, rounded to bf16
    transformer, encoder = (module.to(torch.bfloat16).float() for module in run.averaged)
    save_weights(transformer, options.out / "transformer.safetensors")
    save_json(config_to_dict(CONFIG.transformer), options.out / "transformer.json")
    save_text_encoder(encoder, options.out)
    save_json(record, options.out / "metrics.json")
    measured, shown = measure(transformer, options, device)
    save_json({**record, **measured}, options.out / "metrics.json")
    save_grid(shown, options.out / "samples.png")


def autocast(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")


def load_parts(folder: Path, pattern: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        state |= {name: tensor.float() for name, tensor in load_file(path).items()}
    return state


def load_vae(folder: Path) -> VAE:
    vae = VAE(CONFIG.vae)
    vae.load_state_dict(load_parts(folder, "model*.safetensors"))
    return vae.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
