"""T5 text encoder: prompts to packed features; load, encode, release, remember on disk.

Shapes: T tokens, E channels of the features; N output and K input channels of a weight.

Source: Infinity conditions on flan-t5-xl, tokenised to at most 512 tokens, without padding.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from var_compressor.models.tensor_files import is_as_sealed, open_tensors, seal_of
from var_compressor.models.transformer import TextFeatures

PROMPT_CACHE_VERSION = 2
# transformers patches torch for all threads while it makes a model
_ONE_AT_A_TIME = threading.Lock()


class CodedLinears(Protocol):
    """Makes the linears of an encoder that is held in fewer than 16 bits."""

    @property
    def nbits(self) -> int: ...

    def linear(self, weight_NK: Tensor) -> nn.Module: ...


@dataclass(frozen=True)
class T5Shape:
    """All that the size of a T5 encoder depends on; ``is_gated`` tells the newer feed-forward."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    is_gated: bool
    num_buckets: int = 32

    @staticmethod
    def of_config(values: Mapping[str, Any], where: str) -> T5Shape:
        """From a ``config.json`` of transformers. Raises: ValueError for that of another model."""
        kind = str(values.get("feed_forward_proj", "relu"))
        try:
            sizes = {name: int(values[name]) for name in _T5_SIZES}
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{where}: not the config of a T5 encoder") from None
        buckets = int(values.get("relative_attention_num_buckets", 32))
        return T5Shape(**sizes, is_gated=kind.startswith("gated"), num_buckets=buckets)

    def to_config(self) -> dict[str, Any]:
        """The ``config.json`` that transformers reads as a T5EncoderModel of this shape."""
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            **{name: getattr(self, name) for name in _T5_SIZES},
            "relative_attention_num_buckets": self.num_buckets,
            "feed_forward_proj": "gated-gelu" if self.is_gated else "relu",
            "layer_norm_epsilon": 1e-6,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "is_encoder_decoder": False,
            "use_cache": False,
        }

    @property
    def num_values(self) -> int:
        """Of all tensors."""
        return sum(math.prod(size) for size in (*self.linears().values(), *self.others().values()))

    def num_bytes(self, nbits: int) -> int:
        """In bf16, with linears of so many bits as `layers.weight_only` stores them."""
        channels = self.linears().values()
        linears = sum(rows * columns * nbits // 8 for rows, columns in channels)
        scales = {
            16: 0,
            8: sum(2 * rows for rows, _ in channels),
            4: sum(2 * rows * columns // 64 for rows, columns in channels),
        }
        others = sum(2 * math.prod(size) for size in self.others().values())
        return linears + scales[nbits] + others

    def linears(self) -> dict[str, tuple[int, int]]:
        """Shape (out, in) of every linear's weight, by its name in a file."""
        width, inner = self.d_model, self.num_heads * self.d_kv
        attention = {**dict.fromkeys("qkv", (inner, width)), "o": (width, inner)}
        opening = ("wi_0", "wi_1") if self.is_gated else ("wi",)
        ffn = {**dict.fromkeys(opening, (self.d_ff, width)), "wo": (width, self.d_ff)}
        parts = {f"layer.0.SelfAttention.{name}": shape for name, shape in attention.items()}
        parts |= {f"layer.1.DenseReluDense.{name}": shape for name, shape in ffn.items()}
        return {
            f"encoder.block.{index}.{name}.weight": shape
            for index in range(self.num_layers)
            for name, shape in parts.items()
        }

    def others(self) -> dict[str, tuple[int, ...]]:
        """Shape of everything but the linears: the embedding, attention's biases, and norms."""
        norms = [
            f"encoder.block.{index}.layer.{half}.layer_norm.weight"
            for index in range(self.num_layers)
            for half in (0, 1)
        ]
        bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return {
            "shared.weight": (self.vocab_size, self.d_model),
            bias: (self.num_buckets, self.num_heads),
            **dict.fromkeys([*norms, "encoder.final_layer_norm.weight"], (self.d_model,)),
        }


_T5_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
FLAN_T5_XL = T5Shape(32128, 2048, 64, 5120, 24, 32, is_gated=True)


class TextEncoder:
    """A T5 encoder with its tokenizer, loaded when first needed.

    ``encoder_dir`` and ``tokenizer_dir`` are ordinary Hugging Face folders (or hub ids). With
    ``cache_dir`` every prompt's features are kept as safetensors and the encoder is not even
    loaded when all prompts are known. ``coded`` makes linears of fewer bits out of the weights,
    one by one as they are read; None keeps them in ``dtype``.
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
        coded: CodedLinears | None = None,
    ) -> None:
        self.encoder_dir, self.tokenizer_dir = str(encoder_dir), str(tokenizer_dir)
        self.max_length = max_length
        self.dtype = dtype
        self.device = torch.device(device)
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self.coded = coded
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def nbits(self) -> int:
        """Of the linears' weights: 16, 8 or 4."""
        return 16 if self.coded is None else self.coded.nbits

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
            with _ONE_AT_A_TIME:
                self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_dir)
                if self.coded is None:
                    model: Any = T5EncoderModel.from_pretrained(self.encoder_dir, dtype=self.dtype)
                else:
                    model = read_coded(self.encoder_dir, self.coded, self.dtype, self.device)
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
        return sum(tensor.nbytes for tensor in [*self._model.parameters(), *self._model.buffers()])

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
        dtype = str(self.dtype) if self.coded is None else f"{self.dtype} of {self.nbits} bits"
        what = [PROMPT_CACHE_VERSION, encoder, self.max_length, dtype, prompt]
        digest = hashlib.sha256("\0".join(map(str, what)).encode()).hexdigest()
        return self.cache_dir / f"{digest}.safetensors"

    def _read_cached(self, path: Path) -> TextFeatures:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            if not is_as_sealed(path, tensors):
                raise ValueError("its content changed, sha256 differs")
            features_TE = tensors["features_TE"].to(self.device)
            return TextFeatures(features_TE, (len(features_TE),))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: unreadable prompt cache ({error}); delete the file"
            ) from error

    def _write_cached(self, path: Path, features_TE: torch.Tensor) -> None:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        tensors = {"features_TE": features_TE.cpu().contiguous()}
        save_file(tensors, temporary, metadata=seal_of(tensors))
        os.replace(temporary, path)


def read_coded(
    encoder_dir: str, coded: CodedLinears, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A T5EncoderModel whose linears ``coded`` made; no more than one weight is whole at a time.

    Embeddings and norms are in ``dtype``. A hub id is downloaded.
    Raises: CheckpointError, OSError or KeyError for a folder that is no T5 encoder.
    """
    from huggingface_hub import snapshot_download
    from transformers import T5Config, T5EncoderModel

    folder = encoder_dir
    if not Path(folder).is_dir():
        wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        folder = snapshot_download(encoder_dir, allow_patterns=wanted)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_pretrained(folder))
    source = open_tensors(folder)

    def read(name: str) -> Tensor:
        return source.read(name, dtype).to(device)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            linear = coded.linear(read(f"{name}.weight"))
            setattr(model.get_submodule(parent), attribute, linear)
    # both names of the embedding become one tensor below
    names = [name for name, _ in model.named_parameters() if "embed_tokens" not in name]
    model.load_state_dict({name: read(name) for name in names}, strict=False, assign=True)
    model.set_input_embeddings(model.shared)
    return model
