"""ImageReward: what people would think of an image for its prompt, by BLIP with a fitted head.

A vision transformer reads the image; BERT reads the prompt and attends to the image in every layer;
its first token's state becomes the reward. The published package no longer installs beside current
transformers, so the network stands here; its tensor names are those of the published file.

Shapes: B images, P image tokens of width D, L text tokens of width C, H heads.
Sources: J. Xu et al., "ImageReward", arXiv:2304.05977, and github.com/THUDM/ImageReward for the
head, the constants and the names; J. Li et al., "BLIP", arXiv:2201.12086.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_compressor.evaluation.metrics.metric import Metric, MetricSpec
from var_compressor.evaluation.metrics.resize import clip_pixels
from var_compressor.evaluation.metrics.weights import WeightFile, load_strictly
from var_compressor.models.tensor_files import CheckpointError

REWARD_FILE = WeightFile(
    names=("ImageReward.pt",),
    source="https://huggingface.co/THUDM/ImageReward",
    hub_repo="THUDM/ImageReward",
    also_in=("~/.cache/ImageReward",),
)
VOCABULARY_FOLDER = WeightFile(
    names=("bert-base-uncased",),
    source="https://huggingface.co/google-bert/bert-base-uncased (vocab.txt)",
    hub_repo="google-bert/bert-base-uncased",
    parts=("vocab.txt",),
)
IMAGE_REWARD = MetricSpec(
    name="image_reward",
    compares="prompt",
    higher_is_better=True,
    meaning="predicted human preference for the prompt, 0 on average and 1 its standard deviation",
    backbone="ImageReward v1.0 (BLIP ViT-L/16)",
    files=(REWARD_FILE, VOCABULARY_FOLDER),
)

# of the rewards that the authors normalized by
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
# tokens of a prompt that are read, [CLS] and [SEP] among them
_MAX_TOKENS = 35


@dataclass(frozen=True)
class RewardConfig:
    """Sizes of both transformers; the defaults are the published model's."""

    image_side: int = 224
    patch: int = 16
    image_width: int = 1024
    image_depth: int = 24
    image_heads: int = 16
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    text_inner: int = 3072
    num_words: int = 30524
    num_positions: int = 512
    head_widths: tuple[int, ...] = (1024, 128, 64, 16, 1)


class ImageReward(Metric):
    """Rows are rewards, float64; a set's value is their mean."""

    def __init__(
        self, spec: MetricSpec, network: RewardNetwork, tokenizer: Any, device: torch.device
    ) -> None:
        super().__init__(spec, device)
        self.network = network
        self.tokenizer = tokenizer

    @classmethod
    def opened(
        cls, spec: MetricSpec, files: Mapping[str, Path], device: torch.device
    ) -> ImageReward:
        tokenizer = open_vocabulary(files[VOCABULARY_FOLDER.name] / "vocab.txt")
        with torch.device("meta"):
            network = RewardNetwork(RewardConfig())
        # two projections that only BLIP's own training used, and a table of 0, 1, 2, …
        others = r"blip\.(vision|text)_proj\..*|.*\.position_ids"
        load_strictly(network, files[REWARD_FILE.name], others=others, device=device)
        return cls(spec, network, tokenizer, device)

    def row(self, image_13YX: Tensor, prompt: str, reference_13YX: Tensor | None) -> Tensor:
        pixels_13YX = clip_pixels(image_13YX, self.network.config.image_side)
        words_1L = torch.tensor([self.tokenizer.encode(prompt).ids], device=self.device)
        reward_B = self.network(pixels_13YX, words_1L)
        return (reward_B[0].double() - _MEAN) / _STD


def open_vocabulary(path: Path) -> Any:
    """BERT's tokenizer of lower-cased word pieces, cutting prompts as the published model does.

    Raises: CheckpointError when the file is not such a vocabulary.
    """
    from tokenizers import BertWordPieceTokenizer

    try:
        tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)
    # the tokenizers package raises bare exceptions
    except Exception as error:
        raise CheckpointError(f"{path}: not BERT's vocabulary ({error})") from None
    tokenizer.enable_truncation(_MAX_TOKENS)
    return tokenizer


# --- the network ----------------------------------------------------------------------------------


class RewardNetwork(nn.Module):
    """Rewards before normalization."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        self.config = config
        self.blip = nn.ModuleDict(
            {"visual_encoder": ImageEncoder(config), "text_encoder": TextEncoder(config)}
        )
        # linear layers alone: the dropouts that stood at 1, 3 and 5 do nothing in inference
        widths = (config.text_width, *config.head_widths)
        layers = {
            name: nn.Linear(num_in, num_out)
            for name, num_in, num_out in zip("02467", widths, widths[1:], strict=False)
        }
        self.mlp = nn.ModuleDict({"layers": nn.ModuleDict(layers)})

    def forward(self, pixels_B3YX: Tensor, words_BL: Tensor) -> Tensor:
        """``[B]`` from normalized pixels and word numbers without padding."""
        image_BPD = self.blip["visual_encoder"](pixels_B3YX)
        x_BC = self.blip["text_encoder"](words_BL, image_BPD)[:, 0]
        for layer in self.get_submodule("mlp.layers").children():
            x_BC = layer(x_BC)
        return x_BC[:, 0]


def attend(q_BLC: Tensor, k_BMC: Tensor, v_BMC: Tensor, num_heads: int) -> Tensor:
    """Every query to all keys, by heads."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_BLC, k_BMC, v_BMC))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ImageBlock(nn.Module):
    """Norms in front, a fused projection."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        width = config.image_width
        self.num_heads = config.image_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x_BPD: Tensor) -> Tensor:
        q_BPD, k_BPD, v_BPD = self.attn["qkv"](self.norm1(x_BPD)).chunk(3, dim=-1)
        x_BPD = x_BPD + self.attn["proj"](attend(q_BPD, k_BPD, v_BPD, self.num_heads))
        return x_BPD + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x_BPD))))


class ImageEncoder(nn.Module):
    """A vision transformer: all tokens of the last layer, the class token's first."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        width, patch = config.image_width, config.patch
        num_tokens = 1 + (config.image_side // patch) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(ImageBlock(config) for _ in range(config.image_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels_B3YX: Tensor) -> Tensor:
        patches_BPD = self.patch_embed["proj"](pixels_B3YX).flatten(2).transpose(1, 2)
        first_B1D = self.cls_token.expand(len(patches_BPD), -1, -1)
        x_BPD = torch.cat([first_B1D, patches_BPD], dim=1) + self.pos_embed
        for block in self.blocks:
            x_BPD = block(x_BPD)
        return self.norm(x_BPD)


class Added(nn.Module):
    """A linear layer, then the norm of its output plus what came before."""

    def __init__(self, num_in: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(num_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, before_BLC: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before_BLC)


class TextAttention(nn.Module):
    """To the text itself or to the image, as the source's width says."""

    def __init__(self, width: int, source_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        projections = {
            "query": nn.Linear(width, width),
            "key": nn.Linear(source_width, width),
            "value": nn.Linear(source_width, width),
        }
        self.add_module("self", nn.ModuleDict(projections))
        self.output = Added(width, width)

    def forward(self, x_BLC: Tensor, source_BMD: Tensor) -> Tensor:
        query, key, value = self.get_submodule("self").children()
        heads_BLC = attend(query(x_BLC), key(source_BMD), value(source_BMD), self.num_heads)
        return self.output(heads_BLC, x_BLC)


class TextLayer(nn.Module):
    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        width, num_heads = config.text_width, config.text_heads
        self.attention = TextAttention(width, width, num_heads)
        self.crossattention = TextAttention(width, config.image_width, num_heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.text_inner)})
        self.output = Added(config.text_inner, width)

    def forward(self, x_BLC: Tensor, image_BPD: Tensor) -> Tensor:
        x_BLC = self.crossattention(self.attention(x_BLC, x_BLC), image_BPD)
        return self.output(F.gelu(self.intermediate["dense"](x_BLC)), x_BLC)


class TextEncoder(nn.Module):
    """BERT without token types, with attention to the image in every layer."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        width = config.text_width
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.num_words, width),
                "position_embeddings": nn.Embedding(config.num_positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        layers = nn.ModuleList(TextLayer(config) for _ in range(config.text_depth))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, words_BL: Tensor, image_BPD: Tensor) -> Tensor:
        words, positions, norm = self.embeddings.values()
        places_L = torch.arange(words_BL.shape[1], device=words_BL.device)
        x_BLC = norm(words(words_BL) + positions(places_L))
        for layer in self.get_submodule("encoder.layer").children():
            x_BLC = layer(x_BLC, image_BPD)
        return x_BLC
