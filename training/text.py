"""Infinity-Tiny's text encoder: a small T5 and a word-level tokenizer, as Hugging Face folders.

    PYTHONPATH=src python training/text.py --out DIR --seconds 900

trains the encoder alone, on a CPU, to keep apart which words describe which object: linear probes
read the attributes and relations of every object off the features of its noun, on training
captions. The transformer is then trained on top of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from loop import Run, machine, save_json
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from var_compressor.evaluation.captions import (
    COLOR_WORDS,
    MATERIAL_WORDS,
    SHAPE_WORDS,
    VOCABULARY,
    captions,
    tokenize,
)
from var_compressor.evaluation.scenes import (
    COLORS,
    MATERIALS,
    MAX_OBJECTS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    SceneTruth,
    sample_scenes,
    truths,
)
from var_compressor.models.config import MODELS

SPECIAL = ("<pad>", "</s>", "<unk>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark, lower case, ``</s>`` at the end."""
    words = {word: i for i, word in enumerate([*SPECIAL, *VOCABULARY])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MODELS["infinity-tiny"].transformer.text_maxlen,
    )


def build_encoder(vocabulary_size: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=-(-vocabulary_size // 64) * 64,
        d_model=MODELS["infinity-tiny"].transformer.text_channels,
        d_kv=64,
        num_heads=4,
        d_ff=768,
        num_layers=3,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        tie_word_embeddings=False,
    )
    encoder = T5EncoderModel(config)
    start_local(encoder)
    return encoder


@torch.no_grad()
def start_local(encoder: T5EncoderModel) -> None:
    """Let heads start by looking left, right, far left and anywhere.

    From T5's own start, near zero, the position biases need thousands of Adam steps to tell a
    word's neighbours from the rest, and until then no noun finds its adjectives.
    """
    bias_BH = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    distance_B = torch.arange(len(bias_BH) // 2, dtype=torch.float32)
    before_B, after_B = (
        torch.cat([distance_B, distance_B + 8]),
        torch.cat([distance_B + 8, distance_B]),
    )
    bias_BH.copy_(
        torch.stack([-0.7 * before_B, -0.7 * after_B, -0.2 * before_B, 0 * before_B], dim=1)
    )


def load_t5(encoder: T5EncoderModel, folder: Path) -> None:
    stored = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    encoder.load_state_dict(stored.state_dict())


def save_text_encoder(encoder: T5EncoderModel, out: Path) -> None:
    """``out/text_encoder`` and ``out/tokenizer``, as ``from_pretrained`` reads them."""
    shipped = build_encoder(encoder.config.vocab_size)
    shipped.load_state_dict(encoder.state_dict())
    shipped.to("cpu", torch.bfloat16).save_pretrained(out / "text_encoder")
    build_tokenizer().save_pretrained(out / "tokenizer")


class NounProbe(nn.Module):
    """Linear classifiers on the features of a noun: what object it is, and where it belongs.

    Classes: shape, colour, material, size, number of objects, and how it stands to the objects
    named before and after it. So the encoder has to gather at the noun what its neighbours say.
    """

    CLASSES = (
        *(len(SHAPES), len(COLORS), len(MATERIALS), len(SIZES)),
        *(MAX_OBJECTS + 1, len(RELATIONS) + 1, len(RELATIONS) + 1),
    )

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, sum(self.CLASSES))

    def forward(self, nouns_ME: Tensor) -> list[Tensor]:
        return list(self.head(nouns_ME).split(self.CLASSES, dim=-1))


def word_classes(words: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Every single word of a table of synonyms, and the class it stands for."""
    return {
        word: i for i, choices in enumerate(words.values()) for c in choices for word in c.split()
    }


NOUNS, COLOR_OF, MATERIAL_OF = map(word_classes, (SHAPE_WORDS, COLOR_WORDS, MATERIAL_WORDS))


def noun_targets(caption: str, truth: SceneTruth) -> list[tuple[int, list[int]]]:
    """Position of every noun in the caption, and its classes as in ``NounProbe``."""
    mentions = mentioned_objects(caption, truth)
    order = list(dict.fromkeys(index for _, index in mentions))
    to_previous = [len(RELATIONS)] * MAX_OBJECTS
    to_next = list(to_previous)
    for relation in truth.relations:
        sides = {relation.subject: relation.kind, relation.object: OPPOSITE[relation.kind]}
        earlier, later = sorted(sides, key=order.index)
        to_next[earlier] = RELATIONS.index(sides[earlier])
        to_previous[later] = RELATIONS.index(sides[later])
    return [
        (
            position,
            [
                *truth.objects[index].attributes,
                len(truth.objects),
                to_previous[index],
                to_next[index],
            ],
        )
        for position, index in mentions
    ]


def mentioned_objects(caption: str, truth: SceneTruth) -> list[tuple[int, int]]:
    """Position of every noun, and the index of the object it names."""
    named = [thing.attributes[:3] for thing in truth.objects]
    mentions, color, material = [], -1, -1
    for position, word in enumerate(tokenize(caption)):
        color, material = COLOR_OF.get(word, color), MATERIAL_OF.get(word, material)
        if word in NOUNS:
            mentions.append((position, named.index((NOUNS[word], color, material))))
    return mentions


def probe_loss(logits: list[Tensor], classes_MK: Tensor) -> tuple[Tensor, float]:
    """Mean cross-entropy, and the share of right classes."""
    columns = classes_MK.unbind(1)
    pairs = list(zip(logits, columns, strict=True))
    loss = sum(F.cross_entropy(got, wanted) for got, wanted in pairs) / len(pairs)
    right = sum((got.argmax(-1) == wanted).float().mean().item() for got, wanted in pairs)
    return loss, right / len(pairs)


def step_loss(
    encoder: T5EncoderModel,
    probe: NounProbe,
    tokenizer: PreTrainedTokenizerFast,
    ids_B: Tensor,
) -> tuple[Tensor, float]:
    """``probe_loss`` on the nouns of some training captions."""
    scenes = sample_scenes(ids_B, "train")
    written = captions(scenes)
    tokens = tokenizer(written, padding=True, return_tensors="pt")
    text_BTE = encoder(**{k: tokens[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
    targets = [noun_targets(*pair) for pair in zip(written, truths(scenes), strict=True)]
    rows_M = torch.tensor([row for row, nouns in enumerate(targets) for _ in nouns])
    positions_M = torch.tensor([position for nouns in targets for position, _ in nouns])
    classes_MK = torch.tensor([classes for nouns in targets for _, classes in nouns])
    return probe_loss(probe(text_BTE[rows_M, positions_M]), classes_MK)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="go on from this folder")
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    encoder = build_encoder(len(tokenizer)).train()
    if options.init:
        load_t5(encoder, options.init)
    probe = NounProbe(encoder.config.d_model)
    run = Run([encoder, probe], seconds=options.seconds, peak_lr=options.lr, weight_decay=0.01)
    next_log, recent = 0.0, []
    while run.elapsed < options.seconds:
        first = run.step_index * options.batch_size
        ids_B = torch.arange(first, first + options.batch_size)
        loss, right = step_loss(encoder, probe, tokenizer, ids_B)
        run.step(loss)
        recent.append((loss.item(), right))
        if run.elapsed >= next_log:
            next_log = run.elapsed + options.seconds / 60
            mean_loss, mean_right = torch.tensor(recent).mean(0).tolist()
            run.log(run.step_index * options.batch_size, loss=mean_loss, right=mean_right)
            recent = []
            save_text_encoder(run.averaged[0], options.out)
    save_text_encoder(run.averaged[0], options.out)
    record = {"machine": machine(), "seed": options.seed, "curve": run.curve}
    save_json(record, options.out / "text.json")


if __name__ == "__main__":
    main()
