"""InfinityPipeline: prompt → text → levels → bits → VAE → image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from var_compressor.artifact import (
    KV_FILE,
    ArtifactError,
    artifact_folder,
    companions,
    find_model,
    is_artifact,
    is_unfinished,
    read_manifest,
    read_tensors,
    verify_files,
)
from var_compressor.diffusers_call import (
    Generators,
    ImageOutput,
    OutputType,
    check_output_type,
    nearest_schedule,
    repeated,
    seeds_of,
    unit_images,
)
from var_compressor.generation import (
    Generation,
    InfinityModel,
    OnLevel,
    on_its_device,
)
from var_compressor.layers.kernel_block import (
    KernelBlock,
)
from var_compressor.layers.kv_params import (
    CacheFormat,
    CacheParams,
    check_fingerprints,
    params_from_tensors,
)
from var_compressor.layers.linear import load_compressed
from var_compressor.layers.lora import Adapters
from var_compressor.layers.nunchaku_linear import (
    NunchakuFeedForward,
    NunchakuLinear,
)
from var_compressor.layers.weight_only import WeightOnly, weight_only
from var_compressor.model_card import Measured
from var_compressor.models import directory
from var_compressor.models.bits import teacher_inputs
from var_compressor.models.checkpoint import load_official_transformer, load_official_vae
from var_compressor.models.config import ModelConfig
from var_compressor.models.convert import model_config
from var_compressor.models.hub import how_to_get_again
from var_compressor.models.inspection import sha256_of
from var_compressor.models.new_directory import (
    MAX_SHARD_BYTES,
    new_directory,
    write_component,
    write_index,
    write_text_encoder,
)
from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import Level
from var_compressor.models.streaming import StreamedBlocks, load_streamed
from var_compressor.models.tensor_files import CheckpointError
from var_compressor.models.text_encoder import TextEncoder
from var_compressor.models.transformer import (
    Infinity,
    TextFeatures,
)
from var_compressor.models.vae import VAE
from var_compressor.publishing import (
    ModelFiles,
    compressed_files,
    directory_files,
    published,
    push,
    write_files,
)

Text = Sequence[str] | TextFeatures
# diffusers' (pipeline, step, timestep, {"latents": …})
OnStepEnd = Callable[["InfinityPipeline", int, int, dict[str, Any]], object]


@dataclass(frozen=True)
class Origin:
    """The artifact that a compressed pipeline came from, and the directory of its VAE and T5.

    ``kv``: the cache's parameters that were with it.
    """

    artifact: Path
    home: Path
    kv: CacheParams | None


class InfinityPipeline(InfinityModel):
    """Text to image with an Infinity transformer, full precision or compressed."""

    def __init__(self, transformer: Infinity, vae: VAE, text_encoder: TextEncoder | None) -> None:
        super().__init__(transformer, vae)
        self.text_encoder = text_encoder
        # None for full precision, and for one that was compressed in memory
        self.origin: Origin | None = None
        self.adapters = Adapters(transformer)

    def load_lora(self, path: str | Path, *, name: str = "default", scale: float = 1.0) -> None:
        """Add a low-rank adapter: a file, or a folder that PEFT saved; see `layers.lora`.

        Raises: CheckpointError naming what does not fit; ValueError for a name in use, or once
        kernels run the blocks.
        """
        self._check_adaptable()
        self.adapters.load(path, name=name, strength=scale)

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Let an adapter count so much, 1 as trained. Raises: ValueError as `load_lora`."""
        self._check_adaptable()
        self.adapters.set_strength(name, scale)

    def unload_lora(self, name: str = "default") -> None:
        """Take an adapter off; outputs are those of before, to the bit. Raises: ValueError."""
        self._check_adaptable()
        self.adapters.unload(name)

    def _check_adaptable(self) -> None:
        taken_over = (KernelBlock, NunchakuLinear, NunchakuFeedForward)
        if any(isinstance(module, taken_over) for module in self.transformer.modules()):
            raise ValueError(
                "kernels have taken over this pipeline's linears; give a LoRA to from_pretrained("
                "lora=[(path, scale)]), or open it with compute='reference'"
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        text_encoder_cache: str | Path | None = None,
        text_encoder_bits: int = 16,
        stream_blocks: bool = False,
        compute: str = "auto",
        low_memory: bool = False,
        lora: Sequence[tuple[str | Path, float]] = (),
        on_tensor: directory.OnTensor | None = None,
        revision: str | None = None,
    ) -> InfinityPipeline:
        """Open a model directory, an artifact, an embedded model ("infinity-tiny") or a hub id.

        A compressed model opens by its directory, as `save_pretrained` writes it, too.

        The transformer's blocks, the VAE and the text encoder run in ``dtype``, everything else in
        float32. On a CPU, tensors stored in the dtype they run in stay mapped to their files; on a
        GPU they go there one by one. The text encoder is read when the first prompt needs it;
        ``text_encoder_cache`` is a folder that keeps prompts' features, and ``text_encoder_bits`` 8
        or 4 hold its linears in so many bits. ``stream_blocks`` leaves the blocks of a
        full-precision transformer in their files, to be read one at a time, and the VAE on the
        CPU. ``compute``: how blocks run where there are kernels (`layers.compute`); "reference"
        keeps the plain ones, which calibration needs. ``low_memory``: `save_memory`, and weights
        that stay packed if the choice is left to "auto". ``lora``: adapters and their scales, as by
        `load_lora`, each named by its path. ``on_tensor(name, bytes)`` is called as
        the transformer's tensors, or an artifact's files, arrive (`stored_bytes` in all).
        ``revision``: branch, tag or commit of a hub id; its newest otherwise.
        Raises: CheckpointError or ArtifactError (ValueErrors) naming the file that is missing or
        does not fit.
        """
        coded = weight_only(text_encoder_bits)
        if low_memory and compute == "auto":
            compute = "packed"
        folder = find_model(source, revision=revision)
        if is_artifact(folder) or is_unfinished(folder):
            opened = cls._from_artifact(folder, dtype, device, text_encoder_cache, on_tensor)
            return opened._made_ready(coded, compute, low_memory, lora)
        index = directory.read_index(folder)
        if not index.has_vae:
            raise CheckpointError(
                f"{folder}: holds no VAE; open its transformer with "
                "models.directory.load_transformer, or write it again with one"
            )
        if stream_blocks:
            transformer = load_streamed(folder, dtype=dtype, device=device)
        else:
            transformer = directory.load_transformer(
                folder, dtype=dtype, device=device, on_tensor=on_tensor
            )
        opened = cls._around(transformer, folder, dtype, device, text_encoder_cache)
        compute = "reference" if stream_blocks else compute
        return opened._made_ready(coded, compute, low_memory, lora)

    def _made_ready(
        self,
        coded: WeightOnly | None,
        compute: str,
        low_memory: bool,
        lora: Sequence[tuple[str | Path, float]],
    ) -> InfinityPipeline:
        """Itself, before the text encoder is read, which will have linears of that kind."""
        if self.text_encoder is not None:
            self.text_encoder.coded = coded
        # before kernels take the linears over
        for path, strength in lora:
            self.load_lora(path, name=str(path), scale=strength)
        if compute != "reference":
            self.use_kernels(compute)
        if low_memory:
            self.save_memory()
        return self

    @classmethod
    def _from_artifact(
        cls,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device | str,
        text_encoder_cache: str | Path | None,
        on_tensor: directory.OnTensor | None,
    ) -> InfinityPipeline:
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        base = companions(folder, manifest)
        for name, expected in manifest.base["vae"].items():
            path = base / "vae" / name
            if not path.is_file() or sha256_of(path) != expected:
                restore = f"restore the base model {manifest.base['source']}"
                raise ArtifactError(
                    f"{path}: is not the VAE that {folder} was made with; "
                    f"{how_to_get_again(path, restore)}"
                )
        transformer = load_compressed(
            folder, manifest, dtype=dtype, device=device, on_tensor=on_tensor
        )
        pipeline = cls._around(transformer, base, dtype, device, text_encoder_cache)
        if manifest.kv is not None:
            pipeline.use_kv(artifact_folder(folder) / KV_FILE, manifest.kv)
        pipeline.origin = Origin(artifact_folder(folder), base, pipeline.kv_params)
        return pipeline

    @staticmethod
    def stored_bytes(source: str | Path) -> int:
        """What `from_pretrained` tells ``on_tensor`` of, more or less: bytes of the transformer."""
        folder = find_model(source)
        if is_artifact(folder):
            return sum(entry["bytes"] for entry in read_manifest(folder).files.values())
        return sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))

    def use_kv(self, path: Path, kv: dict[str, Any]) -> None:
        """Store the cache as a file of parameters and a manifest's ``kv`` say.

        Raises: ValueError naming the layer whose parameters cannot be, or are another model's.
        """
        check_fingerprints(kv, self.transformer.blocks, str(path))  # type: ignore[arg-type]
        tensors, format = read_tensors(path, str(self.device)), CacheFormat.of(kv, f"{path}: ")
        self.kv_params = params_from_tensors(tensors, format, self.transformer.config, str(path))

    @classmethod
    def _around(
        cls,
        transformer: Infinity,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device | str,
        text_encoder_cache: str | Path | None,
    ) -> InfinityPipeline:
        """A pipeline with the VAE and the text encoder of a model directory."""
        streams = isinstance(transformer.blocks, StreamedBlocks)
        vae = directory.load_vae(folder, dtype=dtype, device="cpu" if streams else device)
        t5 = directory.text_encoder_folders(folder, directory.read_index(folder))
        if t5 is None:
            return cls(transformer, vae, None)
        text_encoder = TextEncoder(
            *t5,
            max_length=transformer.config.text_maxlen,
            dtype=dtype,
            device=device,
            cache_dir=text_encoder_cache,
        )
        return cls(transformer, vae, text_encoder)

    @classmethod
    def from_official(
        cls,
        model: str | ModelConfig,
        *,
        transformer: str | Path,
        vae: str | Path,
        text_encoder: str | Path | None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        text_encoder_cache: str | Path | None = None,
    ) -> InfinityPipeline:
        """Open official files as they are; ``model`` is "infinity-2b" or the like.

        ``text_encoder`` is a T5 folder or hub id; without one, prompts must be TextFeatures.
        Raises: CheckpointError (a ValueError) naming the file that is missing or does not fit.
        """
        config = model_config(model) if isinstance(model, str) else model
        network = directory.meta_transformer(config.transformer, dtype)
        load_official_transformer(network, transformer, device=device)
        decoder = directory.meta_vae(config.vae, dtype)
        load_official_vae(decoder, vae, device=device)
        if text_encoder is None:
            return cls(network, decoder, None)
        encoder = TextEncoder(
            text_encoder,
            text_encoder,
            max_length=config.transformer.text_maxlen,
            dtype=dtype,
            device=device,
            cache_dir=text_encoder_cache,
        )
        return cls(network, decoder, encoder)

    def save_pretrained(
        self,
        target: str | Path,
        *,
        copy_text_encoder: bool = True,
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """Write a model directory that ``from_pretrained`` opens, with everything that it needs.

        Of a compressed pipeline, the artifact's files are copied as they are, each checked by its
        hash, wherever the pipeline runs and whatever kernels did to its weights; they are a file
        per block, and its base model is needed no more. Adapters are not part of an artifact:
        unload them first (their files open with any pipeline). Of a full-precision pipeline, they
        are saved as part of its weights.
        A text encoder that is a local folder is copied, or referred to without
        ``copy_text_encoder``; one that is a hub id is always referred to. ``provenance`` is free
        JSON; of a compressed pipeline its base's stays.
        Raises: CheckpointError when ``target`` is occupied; ArtifactError for a file that is not
        the artifact's any more; ValueError for adapters or a KV cache that it does not have.
        """
        if self.is_compressed or self.origin is not None:
            files = self._compressed_files(copy_text_encoder, provenance)
            with new_directory(target, overwrite=overwrite) as folder:
                write_files(folder, files)
            return
        t5 = self.text_encoder
        reference = None if t5 is None else t5.encoder_dir
        if t5 is not None and copy_text_encoder and Path(t5.encoder_dir).is_dir():
            reference = ""
        with new_directory(target, overwrite=overwrite) as folder:
            for name, model in (("transformer", self.transformer), ("vae", self.vae)):
                write_component(
                    folder / name,
                    model.config,
                    model.state_dict().items(),
                    max_shard_bytes=max_shard_bytes,
                )
            if t5 is not None and reference == "":
                write_text_encoder(folder, t5.encoder_dir, t5.tokenizer_dir)
            index = directory.ModelIndex(True, reference, provenance or {})
            write_index(folder, index)

    def _compressed_files(
        self, copy_text_encoder: bool, provenance: dict[str, Any] | None
    ) -> ModelFiles:
        origin, t5 = self.origin, self.text_encoder
        if origin is None:
            raise ValueError(
                "this pipeline was compressed in memory; `quantize_model` or `varc quantize` makes "
                "an artifact, which can be opened and saved"
            )
        if self.adapters.by_name:
            raise ValueError(
                f"this pipeline has adapters ({', '.join(self.adapters.by_name)}), which are no "
                "part of its artifact; unload_lora them, or open it without, and save again"
            )
        if self.kv_params is not origin.kv:
            raise ValueError(
                f"this pipeline's KV cache is not the one of {origin.artifact}; put it there with "
                "`varc calibrate-kv --artifact`, or open it again, and save that"
            )
        encoder = None if t5 is None else (t5.encoder_dir, t5.tokenizer_dir)
        return compressed_files(
            origin.artifact,
            origin.home,
            encoder,
            copy_text_encoder=copy_text_encoder,
            provenance=provenance,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool = False,
        commit_message: str | None = None,
        results: Sequence[Measured] = (),
    ) -> str:
        """Put the model on the hub as "org/name", with a model card; the commit's address.

        What `save_pretrained` would write goes there in one commit, a compressed model straight
        from its files, a full-precision one by way of a temporary directory (TMPDIR). After an
        interruption, call it again: files that arrived are not sent again. ``results`` go into the
        card (`evaluation.card.measured` reads them from what `varc evaluate` wrote).
        Raises: CheckpointError when the hub refuses; ValueError as `save_pretrained`.
        """
        send = partial(push, token=token, private=private, commit_message=commit_message)
        if self.is_compressed or self.origin is not None:
            files = self._compressed_files(copy_text_encoder=True, provenance=None)
            return send(published(files, repo_id, results), repo_id)
        with TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "model")
            files = directory_files(Path(folder) / "model")
            return send(published(files, repo_id, results), repo_id)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Text,
        negative_prompt: str | Text | None = None,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 3.0,
        generator: Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: OnStepEnd | None = None,
    ) -> ImageOutput:
        """Draw images as diffusers' pipelines do; `generate` has every choice there is.

        ``height`` and ``width`` in pixels: the nearest size of the model is drawn, with a warning
        if it is another. The images of one ``generator`` are those of ``generate(seed=its seed)``.
        ``callback_on_step_end`` is called after each level; what it returns is not used.
        Raises: ValueError for anything that does not fit.
        """
        check_output_type(output_type)
        schedule = nearest_schedule(height, width, self.schedule_for(1.0, None))
        text = self.encode([prompt] if isinstance(prompt, str) else prompt)
        if isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * len(text.lens)
        negative = None if negative_prompt is None else self.encode(negative_prompt)

        def on_level(level: Level, latent_BDYX: Tensor) -> None:
            if callback_on_step_end is not None:
                callback_on_step_end(self, level.index, level.index, {"latents": latent_BDYX})

        drawn = self.draw(
            repeated(text, num_images_per_prompt),
            schedule,
            seed=seeds_of(generator, len(text.lens) * num_images_per_prompt),
            sampling=Sampling(cfg=guidance_scale),
            negative=None if negative is None else repeated(negative, num_images_per_prompt),
            on_level=on_level,
        )
        if output_type == "latent":
            return ImageOutput(drawn.latent_BDYX)
        generation = Generation(self.decode(drawn.latent_BDYX, strip_rows=None), drawn)
        if output_type == "pil":
            return ImageOutput(generation.pil)
        return ImageOutput(unit_images(generation.image_B3YX, output_type))

    @torch.inference_mode()
    def generate(
        self,
        prompts: Text,
        *,
        seed: int | Sequence[int],
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        negative: Text | None = None,
        aspect_ratio: float = 1.0,
        pixel_budget: str | None = None,
        text_encoder: Literal["keep", "release"] = "keep",
        forced_bits: Sequence[Tensor] = (),
        with_trace: bool = False,
        vae_strip_rows: int | None = None,
        on_level: OnLevel | None = None,
    ) -> Generation:
        """Draw one image per prompt.

        ``aspect_ratio`` is height / width. ``forced_bits`` replace what is sampled on the first
        levels (the noise is drawn all the same). ``on_level(level, latent)`` sees the latent after
        each level.
        """
        schedule = self.schedule_for(aspect_ratio, pixel_budget)
        text = self.encode(prompts)
        unconditional = None if negative is None else self.encode(negative)
        if text_encoder == "release" and self.text_encoder is not None:
            self.text_encoder.release()
        drawn = self.draw(
            text,
            schedule,
            seed=seed,
            sampling=sampling,
            negative=unconditional,
            forced_bits=forced_bits,
            with_trace=with_trace,
            on_level=on_level,
        )
        image = self.decode(drawn.latent_BDYX, strip_rows=vae_strip_rows)
        return Generation(image, drawn)

    @on_its_device
    @torch.inference_mode()
    def teacher_logits(
        self,
        prompts: Text,
        bits: Sequence[Tensor],
        *,
        cfg: float,
        negative: Text | None = None,
        aspect_ratio: float = 1.0,
        pixel_budget: str | None = None,
    ) -> list[Tensor]:
        """Guided logits of every level given all bits, in one forward: ``[B, L, Q, 2]`` each.

        Equal to generating with ``forced_bits=bits`` at tau 1.
        """
        schedule = self.schedule_for(aspect_ratio, pixel_budget)
        if len(bits) != len(schedule.levels):
            raise ValueError(f"{len(bits)} levels of bits, the schedule has {len(schedule.levels)}")
        unconditional = None if negative is None else self.encode(negative)
        context = self.embed_text(self.encode(prompts), unconditional, guided=cfg != 1)
        pyramid = self.new_pyramid(schedule, batch=context.num_images)
        tokens_BLQ = teacher_inputs([one.to(self.device) for one in bits], pyramid)
        x_RLC = torch.cat(
            [
                self.transformer.start_token(context),
                self.transformer.embed_bits(tokens_BLQ, context),
            ],
            dim=1,
        )
        cache = self.new_cache(schedule, rows=len(context.cond_RC))
        rope = self.transformer.rotary_table(schedule)
        h_RLC = self.transformer(x_RLC, schedule.levels, context, cache, rope)
        logits_BLQ2 = self.transformer.guided_logits(h_RLC, context, cfg)
        return list(logits_BLQ2.split([level.num_tokens for level in schedule.levels], dim=1))

    def encode(self, prompts: Text) -> TextFeatures:
        """Text features on the pipeline's device."""
        if isinstance(prompts, TextFeatures):
            return TextFeatures(prompts.packed_TE.to(self.device), prompts.lens)
        if self.text_encoder is None:
            raise ValueError("this pipeline has no text encoder; pass TextFeatures as prompts")
        encoder = self.text_encoder
        features = self._with_room(lambda: encoder.encode(prompts))
        return TextFeatures(features.packed_TE.to(self.device), features.lens)
