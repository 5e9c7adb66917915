"""How to hold and run a model so that it fits a budget: the best setup whose predicted peak does.

Quality comes first: weights, then the KV cache, then the text encoder give up bits only where
nothing else fits; smaller steps of the feed-forward and the VAE cost time alone, and go first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from var_compressor.artifact import (
    KV_FILE,
    artifact_folder,
    companions,
    find_model,
    is_artifact,
    read_manifest,
    read_tensors,
)
from var_compressor.devices import CONTEXT_BYTES, FRAGMENTED, smallest_device, usable_bytes
from var_compressor.footprint import (
    KV_BITS,
    WEIGHTS,
    Footprint,
    ModelShape,
    Request,
    Setup,
    footprint,
    unpacked_bytes,
)
from var_compressor.layers.compute import has_room
from var_compressor.layers.kv_params import CacheFormat, params_from_tensors
from var_compressor.models import directory
from var_compressor.models.config import MODELS, InfinityConfig, config_from_dict
from var_compressor.models.hub import is_repo_id
from var_compressor.spec import QuantSpec

# bits of the text encoder, and whether it is released before drawing; None: cached features
TEXT_PLACES = ((16, False), (16, True), (8, False), (8, True), (4, False), (4, True), (None, False))
CHUNKS = (None, 4096, 2048, 1024)
STRIPS = (None, 256, 64, 32, 16)
# a cache may lose so much of its 4-bit size to a budget
MIN_BUDGET_SHARE = 0.5


@dataclass(frozen=True)
class MemoryPlan:
    """A setup and what it takes; the smallest one there is if none fits ``budget_bytes``."""

    model: str
    budget_bytes: int
    setup: Setup
    footprint: Footprint

    @property
    def missing_bytes(self) -> int:
        """0 where the plan fits."""
        return max(0, self.footprint.peak_bytes - usable_bytes(self.budget_bytes))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and scalars."""
        device = smallest_device(self.footprint.peak_bytes)
        return {
            "model": self.model,
            "fits": self.missing_bytes == 0,
            "missing_bytes": self.missing_bytes,
            "budget_bytes": self.budget_bytes,
            "margin_bytes": self.budget_bytes - usable_bytes(self.budget_bytes),
            "peak_bytes": self.footprint.peak_bytes,
            "peak_stage": self.footprint.peak_stage,
            "setup": asdict(self.setup),
            "stages": self.footprint.stages,
            "smallest_device": None if device is None else device.name,
        }


def plan_memory(model: ModelShape, request: Request, *, budget_bytes: int) -> MemoryPlan:
    """The first setup, best quality first, whose peak fits what the budget leaves for tensors."""
    limit = usable_bytes(budget_bytes)
    least: tuple[Setup, Footprint] | None = None
    for setup in setups(model, budget_bytes=budget_bytes):
        found = footprint(model, request, setup)
        if found.peak_bytes <= limit:
            return MemoryPlan(model.name, budget_bytes, setup, found)
        if least is None or found.peak_bytes < least[1].peak_bytes:
            least = setup, found
    assert least is not None
    chosen = _within_kv_budget(model, request, limit) or least
    return MemoryPlan(model.name, budget_bytes, *chosen)


def setups(model: ModelShape, *, budget_bytes: int) -> Iterator[Setup]:
    """All of them, those that lose less first.

    A GPU with fp8 unpacks weights where it has room; the smaller steps leave them packed.
    """
    weights = ("stored",) if model.spec is not None else tuple(WEIGHTS)
    kv = ("stored",) if model.kv is not None else ("bf16", *KV_BITS)
    text = ((None, False),) if model.text is None else TEXT_PLACES
    strips = (None,) if model.vae is None else STRIPS
    for one_weights, one_kv, place in product(weights, kv, text):
        # 16-bit linears run the network's own code, which takes all tokens at once
        is_plain = one_weights == "bf16"
        unpacked = (True, False) if _may_unpack(model, one_weights, budget_bytes) else (False,)
        steps: list[tuple[int | None, bool]] = [(None, one) for one in unpacked]
        steps += [] if is_plain else [(chunk, False) for chunk in CHUNKS if chunk is not None]
        for (chunk_tokens, unpacks), strip_rows in product(steps, strips):
            yield Setup(one_weights, one_kv, *place, chunk_tokens, strip_rows, unpacks=unpacks)


def _may_unpack(model: ModelShape, weights: str, budget_bytes: int) -> bool:
    """Whether `--compute auto` unpacks such weights on a GPU of that memory."""
    spec = model.spec if weights == "stored" else WEIGHTS[weights]
    return spec is not None and has_room(unpacked_bytes(model.transformer, spec), budget_bytes)


def _within_kv_budget(
    model: ModelShape, request: Request, limit: int
) -> tuple[Setup, Footprint] | None:
    """With the fewest bits, as much of an int4 cache as fits, if that is a fair share of it."""
    fitting = []
    for setup in setups(model, budget_bytes=0):
        if setup.kv != "int4" or setup.weights not in ("stored", tuple(WEIGHTS)[-1]):
            continue
        found = footprint(model, request, setup)
        whole = found.stages["draw"]["KV cache"]
        left = limit - (found.stage_bytes["draw"] - whole)
        if left >= MIN_BUDGET_SHARE * whole:
            setup = replace(setup, kv_budget=left // request.batch)
            found = footprint(model, request, setup)
            if found.peak_bytes <= limit:
                fitting.append((setup, found))
    return max(fitting, key=lambda one: one[0].kv_budget or 0, default=None)


# --- models by name -------------------------------------------------------------------------------


def model_shape(source: str) -> ModelShape:
    """Of a preset ("infinity-8b"), a model directory or an artifact; no weight is read.

    Raises: ValueError when it is none of them, or its text encoder is not here.
    """
    path = Path(source).expanduser()
    if source in MODELS and not path.exists():
        preset = MODELS[source]
        text = directory.text_encoder_shape(preset.text_encoder)
        return ModelShape(source, preset.transformer, preset.vae, text)
    if not path.exists() and not is_repo_id(source):
        raise ValueError(f"{source}: no such directory, and no preset ({', '.join(MODELS)})")
    path = find_model(source)
    if not is_artifact(path):
        return _of_directory(path, source, directory.read_transformer_config(path / "transformer"))
    manifest = read_manifest(path)
    config = config_from_dict(InfinityConfig, manifest.config, f"{path}: config")
    base = _of_directory(companions(path, manifest), source, config)
    shape = replace(base, spec=QuantSpec.from_dict(manifest.spec))
    if manifest.kv is None:
        return shape
    file, format = artifact_folder(path) / KV_FILE, CacheFormat.of(manifest.kv, f"{path}: ")
    return replace(
        shape, kv=params_from_tensors(read_tensors(file, "cpu"), format, config, str(file))
    )


def _of_directory(folder: Path, name: str, config: InfinityConfig) -> ModelShape:
    index = directory.read_index(folder)
    t5 = directory.text_encoder_folders(folder, index)
    return ModelShape(
        name,
        config,
        directory.read_vae_config(folder / "vae") if index.has_vae else None,
        None if t5 is None else directory.text_encoder_shape(t5[0]),
    )


# --- for people -----------------------------------------------------------------------------------

COLUMNS = ("MiB", "text", "draw", "VAE")


def table_rows(plan: MemoryPlan) -> list[tuple[str, ...]]:
    """A line of every part under `COLUMNS`, and the sums last."""
    stages = plan.footprint.stages
    parts = dict.fromkeys(part for stage in stages.values() for part in stage)
    rows = [
        (part, *(_mib(stage[part]) if part in stage else "" for stage in stages.values()))
        for part in parts
    ]
    return [*rows, ("all", *map(_mib, plan.footprint.stage_bytes.values()))]


def setup_rows(setup: Setup) -> list[tuple[str, str]]:
    """What is chosen, and what says so to the other commands."""
    kv = setup.kv if setup.kv_budget is None else f"int4 within {_mib(setup.kv_budget)} MiB"
    text, options = "cached features", ["--prompt-cache DIR"]
    if setup.text_bits is not None:
        text = f"{setup.text_bits} bits" + (", released" if setup.releases_text else "")
        options = [f"--text-encoder-bits {setup.text_bits}"]
        options += ["--release-text-encoder"] if setup.releases_text else []
    if setup.strip_rows is not None:
        options.append(f"--strip-rows {setup.strip_rows}")
    if setup.chunk_tokens is None and setup.weights != "bf16" and not setup.unpacks:
        options.append("--compute packed")
    if setup.chunk_tokens is not None:
        # runs the feed-forward for one row at a time
        options.append("--low-memory")
    chunks, strips = setup.chunk_tokens, setup.strip_rows
    rows = [
        ("weights", setup.weights + (", unpacked to 8 bits" if setup.unpacks else "")),
        ("KV cache", kv),
        ("text encoder", text),
        ("feed-forward", "all tokens" if chunks is None else f"{chunks} tokens at a time"),
        ("VAE", "whole images" if strips is None else f"strips of {strips} rows"),
        ("varc generate", " ".join(options)),
    ]
    if setup.kv_budget is not None:
        rows.append(("varc calibrate-kv", f"--kv-budget {setup.kv_budget}"))
    return rows


def verdict(plan: MemoryPlan) -> str:
    """Whether it fits, of what, with which margin."""
    usable = usable_bytes(plan.budget_bytes)
    margin = (
        f"margin {_mib(plan.budget_bytes - usable)} MiB: {_mib(CONTEXT_BYTES)} for the CUDA "
        f"context and libraries, then {FRAGMENTED:.0%} for fragmentation"
    )
    peak = f"peak {_mib(plan.footprint.peak_bytes)} MiB in stage {plan.footprint.peak_stage!r}"
    device = smallest_device(plan.footprint.peak_bytes)
    fits = "fits" if plan.missing_bytes == 0 else f"{plan.missing_bytes} bytes more than"
    where = "no listed device" if device is None else device.name
    return f"{peak}, {fits} the usable {_mib(usable)} MiB ({margin}); smallest device: {where}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}"
