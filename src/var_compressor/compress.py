"""The commands that make an artifact: from a resolved recipe to `quantize` and `calibrate-kv`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from var_compressor.artifact import (
    KV_FILE,
    Manifest,
    is_artifact,
    put_kv,
    read_editable,
    write_kv,
)
from var_compressor.layers.kv_params import params_to_tensors
from var_compressor.models.config import InfinityConfig
from var_compressor.models.convert import model_config
from var_compressor.models.directory import resolve
from var_compressor.models.sampling import Sampling
from var_compressor.pipeline import InfinityPipeline
from var_compressor.prompts import load_prompts, select_prompts
from var_compressor.quant.activations import MemoryBounds
from var_compressor.quant.calibration import Progress
from var_compressor.quant.kv_calibration import KVCalibration, calibrate_kv
from var_compressor.quant.ptq import quantize_model
from var_compressor.quant.recording import Collection
from var_compressor.quant.team import SOLO, Team, local_device
from var_compressor.recipe import CollectSpec, ModelSource, Recipe
from var_compressor.spec import KVSpec


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one.

    Raises: ValueError for a device that torch does not know or that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is unknown; use auto, cpu or cuda")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ValueError(f"device {name!r}: torch sees {num_gpus or 'no'} GPU here; use cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU, and float32 on a CPU, where bfloat16 is slower.

    Raises: ValueError for another name.
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise ValueError(f"dtype {name!r} is unknown; use auto, {' or '.join(known)}")
    return known[name]


def open_pipeline(source: ModelSource, *, stream_blocks: bool = False) -> InfinityPipeline:
    """The model of a recipe; ``stream_blocks`` leaves its blocks on disk, to be read one by one.

    Raises: ValueError for paths that do not go together.
    """
    device = local_device(choose_device(source.device))
    dtype = choose_dtype(source.dtype, device)
    if source.vae_path is not None:
        if source.path is None:
            raise ValueError("model.vae_path is set without model.path; give both, or convert them")
        return InfinityPipeline.from_official(
            source.name,
            transformer=source.path,
            vae=source.vae_path,
            text_encoder=source.text_encoder_path,
            dtype=dtype,
            device=device,
        )
    if source.text_encoder_path is not None:
        raise ValueError(
            "model.text_encoder_path goes with official files (model.vae_path); a model directory "
            "names its own"
        )
    return InfinityPipeline.from_pretrained(
        source.path or source.name,
        dtype=dtype,
        device=device,
        stream_blocks=stream_blocks,
        compute="reference",
    )


def transformer_config(source: ModelSource, *, may_be_absent: bool) -> InfinityConfig:
    """The shape of a recipe's model as its files say, or its name where it has none.

    Raises: ValueError for a model that is compressed already or, unless it may be absent, missing.
    """
    from var_compressor.models.directory import read_transformer_config

    if source.path is None or source.vae_path is not None:
        return model_config(source.name).transformer
    path = Path(source.path).expanduser()
    if may_be_absent and not path.exists():
        return model_config(source.name).transformer
    if is_artifact(path):
        raise ValueError(f"{path}: is compressed already; give the full-precision model")
    return read_transformer_config(resolve(source.path) / "transformer")


def sampling_of(collect: CollectSpec) -> Sampling:
    """How a recipe draws bits."""
    return Sampling(cfg=collect.cfg, tau=collect.tau, top_k=collect.top_k, top_p=collect.top_p)


def collection_of(collect: CollectSpec) -> Collection:
    """The calibration prompts and how their images are drawn."""
    prompts = select_prompts(
        load_prompts(collect.prompts), num_prompts=collect.num_prompts, seed=collect.seed
    )
    return Collection(
        prompts,
        collect.seed,
        sampling_of(collect),
        collect.aspect_ratio,
        collect.pixel_budget,
    )


def quantize(
    recipe: Recipe,
    out: Path,
    *,
    on_progress: Progress,
    memory: MemoryBounds = MemoryBounds(),  # noqa: B008 - frozen
    team: Team = SOLO,
) -> Manifest:
    """Compress the recipe's model into ``out``, one block in memory at a time.

    Raises: ValueError for official files, whose VAE an artifact could not refer to.
    """
    if recipe.model.vae_path is not None:
        raise ValueError(
            "model.vae_path: an artifact refers to a model directory; make one of these files "
            "with `varc convert` and set model.path to it"
        )
    return quantize_model(
        open_pipeline(recipe.model, stream_blocks=True),
        collection_of(recipe.collect),
        recipe.quant,
        base=recipe.model.path or recipe.model.name,
        out=out,
        on_progress=on_progress,
        memory=memory,
        team=team,
    )


def calibrate_cache(
    recipe: Recipe, artifact: Path | None, *, on_progress: Progress
) -> KVCalibration:
    """Find how to store the KV cache: of an artifact's model, or of the recipe's own."""
    spec = recipe.quant.kv
    check_kv(spec)
    source, streams = recipe.model, recipe.model.vae_path is None
    if artifact is not None:
        read_editable(artifact)
        source = replace(source, path=str(artifact), vae_path=None, text_encoder_path=None)
        streams = False
    collection = collection_of(recipe.collect)
    pipeline = open_pipeline(source, stream_blocks=streams)
    pipeline.kv_params = None
    seed = recipe.quant.calibration.seed
    found = calibrate_kv(pipeline, collection, spec, seed=seed, on_progress=on_progress)
    kv = {**found.kv, "calibration": collection.to_dict()}
    return replace(found, kv=kv)


def store_cache(found: KVCalibration, artifact: Path | None, out: Path | None) -> list[Path]:
    """Put a calibration into an artifact and into a directory of its own; the files of ranges."""
    tensors = params_to_tensors(found.params)
    if artifact is not None:
        put_kv(artifact, tensors, found.kv)
    if out is not None:
        write_kv(out, tensors, found.kv)
    return [folder / KV_FILE for folder in (artifact, out) if folder is not None]


def check_kv(spec: KVSpec) -> None:
    if spec.format == "bf16":
        raise ValueError(
            "quant.kv.format is bf16, which needs no calibration: a model has a 16-bit cache until "
            "`varc calibrate-kv` adds another; use int8, int4 or fp8"
        )
