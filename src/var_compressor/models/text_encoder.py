"""T5 text encoder: prompts to packed features; load, encode, release, remember on disk.

Source: Infinity conditions on flan-t5-xl, tokenised to at most 512 tokens, without padding.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from var_compressor.models.transformer import TextFeatures

PROMPT_CACHE_VERSION = 1


class TextEncoder:
    """A T5 encoder with its tokenizer, loaded when first needed.

    ``encoder_dir`` and ``tokenizer_dir`` are ordinary Hugging Face folders (or hub ids). With
    ``cache_dir`` every prompt's features are kept as safetensors and the encoder is not even
    loaded when all prompts are known.
    """

    def __init__(
        self,
        encoder_dir: str | Path,
        tokenizer_dir: str | Path,
        *,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.encoder_dir, self.tokenizer_dir = str(encoder_dir), str(tokenizer_dir)
        self.max_length = max_length
        self.dtype = dtype
        self.device = torch.device(device)
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self._model: Any = None
        self._tokenizer: Any = None

    def load(self) -> TextEncoder:
        """Read tokenizer and weights; does nothing when they are there already.

        Raises: ValueError when a folder holds no T5 encoder or no tokenizer.
        """
        if self._model is not None:
            return self
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils.logging import disable_progress_bar

        # its bar would break ours
        disable_progress_bar()

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_dir)
            model: Any = T5EncoderModel.from_pretrained(self.encoder_dir, dtype=self.dtype)
        except (OSError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.encoder_dir}: no T5 encoder and tokenizer could be read there ({reason}); "
                "give a flan-t5-xl folder or hub id"
            ) from error
        self._model = model.to(self.device).eval().requires_grad_(False)
        return self

    def release(self) -> None:
        """Give the weights' memory back; the next ``encode`` loads them again."""
        self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in memory; 0 when released."""
        if self._model is None:
            return 0
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    def to(self, device: torch.device | str) -> TextEncoder:
        self.device = torch.device(device)
        if self._model is not None:
            self._model.to(self.device)
        return self

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of each prompt, float32, its end token included; an empty prompt has 1 token.

        Every prompt is encoded by itself, so that its features never depend on its batch.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError("prompts must be a non-empty list of strings")
        return TextFeatures.concat([self._encode_one(prompt) for prompt in prompts])

    def _encode_one(self, prompt: str) -> TextFeatures:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is {type(prompt).__name__}, expected a string")
        path = self._cache_path(prompt)
        if path is not None and path.exists():
            return self._read_cached(path)
        self.load()
        tokens = self._tokenizer(
            prompt, max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            output = self._model(
                input_ids=tokens.input_ids.to(self.device),
                attention_mask=tokens.attention_mask.to(self.device),
            )
        features_TE = output.last_hidden_state[0].float()
        if path is not None:
            self._write_cached(path, features_TE)
        return TextFeatures(features_TE, (len(features_TE),))

    def _cache_path(self, prompt: str) -> Path | None:
        if self.cache_dir is None:
            return None
        # a relative path means another folder from elsewhere
        folder = Path(self.encoder_dir)
        encoder = str(folder.absolute()) if folder.is_dir() else self.encoder_dir
        what = [PROMPT_CACHE_VERSION, encoder, self.max_length, str(self.dtype), prompt]
        digest = hashlib.sha256("\0".join(map(str, what)).encode()).hexdigest()
        return self.cache_dir / f"{digest}.safetensors"

    def _read_cached(self, path: Path) -> TextFeatures:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            features_TE = load_file(path, device=str(self.device))["features_TE"]
            return TextFeatures(features_TE, (len(features_TE),))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: unreadable prompt cache ({error}); delete the file"
            ) from error

    def _write_cached(self, path: Path, features_TE: torch.Tensor) -> None:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"features_TE": features_TE.cpu().contiguous()}, temporary)
        os.replace(temporary, path)
