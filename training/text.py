"""Infinity-Tiny's text encoder: a small T5 and a word-level tokenizer, as Hugging Face folders.

    PYTHONPATH=src python training/text.py --out DIR --seconds 900

trains the encoder alone, on a CPU, to keep apart which words describe which object: a probe reads
every object's attributes and their relations off the features of training captions. The
transformer is then trained on top of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from loop import Run, machine, save_json
from var_compressor.evaluation.scenes import (
    BACKGROUNDS,
    COLORS,
    MATERIALS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SIZES,
    VOCABULARY,
    SceneBatch,
    captions,
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
    return T5EncoderModel(config)


def save_text_encoder(encoder: T5EncoderModel, out: Path) -> None:
    """``out/text_encoder`` and ``out/tokenizer``, as ``from_pretrained`` reads them."""
    shipped = build_encoder(encoder.config.vocab_size)
    shipped.load_state_dict(encoder.state_dict())
    shipped.to("cpu", torch.bfloat16).save_pretrained(out / "text_encoder")
    build_tokenizer().save_pretrained(out / "tokenizer")


class SceneProbe(nn.Module):
    """Reads a scene's attributes off the text features: one query per mentioned object, one global.

    Single-head attention and linear classifiers, so that the encoder itself has to tell which
    words belong to which object.
    """

    ATTRIBUTES = (len(SHAPES), len(COLORS), len(MATERIALS), len(SIZES))
    GLOBAL = (MAX_OBJECTS + 1, len(BACKGROUNDS), len(RELATIONS) + 1, len(RELATIONS) + 1)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(MAX_OBJECTS + 1, width) / width**0.5)
        self.attribute_head = nn.Linear(width, sum(self.ATTRIBUTES))
        self.global_head = nn.Linear(width, sum(self.GLOBAL))

    def forward(self, text_BTE: Tensor, mask_BT: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        scores_BQT = self.queries @ text_BTE.transpose(1, 2)
        scores_BQT = scores_BQT.masked_fill(~mask_BT[:, None].bool(), -torch.inf)
        read_BQE = scores_BQT.softmax(-1) @ text_BTE
        attributes = self.attribute_head(read_BQE[:, :-1]).split(self.ATTRIBUTES, dim=-1)
        return list(attributes), list(self.global_head(read_BQE[:, -1]).split(self.GLOBAL, dim=-1))


def probe_targets(scenes: SceneBatch) -> tuple[Tensor, Tensor]:
    """Classes of every object ``[B, O, 4]`` (-100 in empty slots), and of the scene ``[B, 4]``."""
    objects = torch.stack([scenes.shape_BO, scenes.color_BO, scenes.material_BO, scenes.size_BO], dim=-1)
    objects = objects.masked_fill(~scenes.present_BO[..., None], -100)
    rows = []
    for truth in truths(scenes):
        relations = [len(RELATIONS)] * 2
        for relation in truth.relations:
            relations[min(relation.subject, relation.object)] = RELATIONS.index(relation.kind)
        rows.append([len(truth.objects), truth.background, *relations])
    return objects, torch.tensor(rows)


def probe_loss(outputs: tuple[list[Tensor], list[Tensor]], targets: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    """Mean cross-entropy, and the share of all present classes that are right."""
    attributes, scene = outputs
    objects_BO4, scene_B4 = targets
    pairs = [(logits.flatten(0, 1), objects_BO4[..., i].flatten()) for i, logits in enumerate(attributes)]
    pairs += [(logits, scene_B4[:, i]) for i, logits in enumerate(scene)]
    loss = sum(F.cross_entropy(logits, classes) for logits, classes in pairs) / len(pairs)
    right = sum((logits.argmax(-1) == classes).sum().item() for logits, classes in pairs)
    return loss, right / sum((classes >= 0).sum().item() for _, classes in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    encoder = build_encoder(len(tokenizer)).train()
    probe = SceneProbe(encoder.config.d_model)
    run = Run([encoder, probe], seconds=args.seconds, peak_lr=args.lr, weight_decay=0.01)
    next_log, recent = 0.0, []
    while run.elapsed < args.seconds:
        first = run.step_index * args.batch_size
        scenes = sample_scenes(torch.arange(first, first + args.batch_size), "train")
        tokens = tokenizer(captions(scenes), padding=True, return_tensors="pt")
        text = encoder(**{k: tokens[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
        loss, right = probe_loss(probe(text, tokens.attention_mask), probe_targets(scenes))
        run.step(loss)
        recent.append((loss.item(), right))
        if run.elapsed >= next_log:
            next_log = run.elapsed + args.seconds / 60
            mean_loss, mean_right = (sum(column) / len(recent) for column in zip(*recent, strict=True))
            run.log(run.step_index * args.batch_size, loss=mean_loss, right=mean_right)
            recent = []
            save_text_encoder(run.averaged[0], args.out)
    save_text_encoder(run.averaged[0], args.out)
    save_json({"machine": machine(), "seed": args.seed, "curve": run.curve}, args.out / "text.json")


if __name__ == "__main__":
    main()
