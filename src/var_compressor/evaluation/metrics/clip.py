"""CLIP score and CLIP-IQA: an image's direction in CLIP's space against those of texts.

Shapes: T texts, E numbers of an embedding.
Sources: A. Radford et al., arXiv:2103.00020 (CLIP); J. Hessel et al., arXiv:2104.08718 (CLIP
score, here 100 times the cosine); J. Wang et al., arXiv:2207.12396 (CLIP-IQA).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from var_compressor.evaluation.metrics.metric import Metric, MetricSpec
from var_compressor.evaluation.metrics.resize import clip_pixels
from var_compressor.evaluation.metrics.weights import WeightFile
from var_compressor.models.tensor_files import CheckpointError

CLIP_FOLDER = WeightFile(
    names=("clip-vit-large-patch14",),
    source="https://huggingface.co/openai/clip-vit-large-patch14",
    hub_repo="openai/clip-vit-large-patch14",
    parts=("config.json", "model.safetensors", "tokenizer*.json", "vocab.json", "merges.txt"),
)
CLIP_SCORE = MetricSpec(
    name="clip_score",
    compares="prompt",
    higher_is_better=True,
    meaning="100 times the cosine of image and prompt, of which CLIP reads 77 tokens",
    backbone="CLIP ViT-L/14",
    files=(CLIP_FOLDER,),
)
CLIP_IQA = MetricSpec(
    name="clip_iqa",
    compares="image",
    higher_is_better=True,
    meaning="CLIP's probability of 'Good photo.' rather than 'Bad photo.', from 0 to 1",
    backbone="CLIP ViT-L/14",
    files=(CLIP_FOLDER,),
)
QUALITY = ("Good photo.", "Bad photo.")
# what CLIP multiplied its cosines with at the end of its training
_LOGIT_FACTOR = 100.0


class Clip:
    """Directions (length 1, float32) of images and texts."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.side: int = model.config.vision_config.image_size
        self.max_tokens: int = model.config.text_config.max_position_embeddings

    def image(self, image_13YX: Tensor) -> Tensor:
        """``[E]``."""
        pixels_13YX = clip_pixels(image_13YX, self.side)
        pooled = self.model.vision_model(pixel_values=pixels_13YX).pooler_output
        return _direction(self.model.visual_projection(pooled))[0]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """``[T, E]``; each is cut to what CLIP reads, and none is padded to another's length."""
        found = []
        for text in texts:
            tokens = self.tokenizer(
                text, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).to(self.model.device)
            pooled = self.model.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            found.append(_direction(self.model.text_projection(pooled))[0])
        return torch.stack(found)


def _direction(x_BE: Tensor) -> Tensor:
    return x_BE / x_BE.norm(dim=-1, keepdim=True)


# one model for both metrics, for as long as one of them is open
_opened: WeakValueDictionary[tuple[Path, torch.device], Clip] = WeakValueDictionary()


def open_clip(folder: Path, device: torch.device) -> Clip:
    """Raises: CheckpointError when the folder does not hold a whole CLIP model."""
    if (clip := _opened.get((folder, device))) is None:
        clip = _opened[folder, device] = _read_clip(folder, device)
    return clip


def _read_clip(folder: Path, device: torch.device) -> Clip:
    from transformers import AutoTokenizer, CLIPModel

    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind != "clip":
            raise ValueError(f"its model_type is {kind!r}, not 'clip'")
        loaded: Any = CLIPModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        model, report = loaded
        if missing := report["missing_keys"]:
            raise ValueError(f"its weights lack {min(map(str, missing))}")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # a folder can be wrong in any way there is
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder}: not a whole CLIP model ({reason}); "
            f"it needs {', '.join(CLIP_FOLDER.parts)} of {CLIP_FOLDER.source}"
        ) from None
    return Clip(model.eval().requires_grad_(False).to(device), tokenizer)


class ClipScore(Metric):
    """Rows are 100 times the cosine, float64; a set's value is their mean, at least 0."""

    def __init__(self, spec: MetricSpec, clip: Clip, device: torch.device) -> None:
        super().__init__(spec, device)
        self.clip = clip

    @classmethod
    def opened(cls, spec: MetricSpec, files: Mapping[str, Path], device: torch.device) -> ClipScore:
        return cls(spec, open_clip(files[CLIP_FOLDER.name], device), device)

    def row(self, image_13YX: Tensor, prompt: str, reference_13YX: Tensor | None) -> Tensor:
        return 100 * self.clip.image(image_13YX).double().dot(self.clip.texts([prompt])[0].double())

    def value(self, rows: Tensor, truth_rows: Tensor | None = None) -> float:
        return max(super().value(rows), 0.0)


class ClipIqa(Metric):
    """Rows are probabilities, float64; a set's value is their mean."""

    def __init__(self, spec: MetricSpec, clip: Clip, device: torch.device) -> None:
        super().__init__(spec, device)
        self.clip = clip
        with torch.inference_mode():
            self.poles_TE = clip.texts(QUALITY).double()

    @classmethod
    def opened(cls, spec: MetricSpec, files: Mapping[str, Path], device: torch.device) -> ClipIqa:
        return cls(spec, open_clip(files[CLIP_FOLDER.name], device), device)

    def row(self, image_13YX: Tensor, prompt: str, reference_13YX: Tensor | None) -> Tensor:
        cosines_T = self.poles_TE @ self.clip.image(image_13YX).double()
        return (_LOGIT_FACTOR * cosines_T).softmax(0)[0]
