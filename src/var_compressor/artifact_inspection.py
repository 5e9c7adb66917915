"""Telling what an artifact is, by itself or as the transformer of a model directory."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from var_compressor.artifact import (
    FORMAT,
    KV_FILE,
    TRANSFORMER_FILE,
    ArtifactError,
    Manifest,
    artifact_folder,
    enclosing_model,
    read_manifest,
)
from var_compressor.models.inspection import (
    Inspection,
    Part,
    inspect_path,
    list_files,
    parts_of,
)
from var_compressor.models.tensor_files import open_tensors
from var_compressor.ops.primitives import FORMATS
from var_compressor.spec import QuantSpec

_PACKED = "packed weights"
_PARTS = {
    "smooth_factor": "smoothing factors",
    "wscales": "weight scales",
    "wtscale": "weight scales",
    "proj_down": "low-rank branches",
    "proj_up": "low-rank branches",
}


def artifact_parts(folder: str | Path, manifest: Manifest) -> tuple[Part, ...]:
    """Sizes of an artifact's tensors by part; a byte of packed weights counts as many weights."""
    spec, num_packed = QuantSpec.from_dict(manifest.spec), 0
    labels, infos = {}, {}
    for file in manifest.files:
        if not file.endswith(".safetensors"):
            continue
        source = open_tensors(artifact_folder(folder) / file)
        for name in source.names():
            label = f"{file}:{name}"
            infos[label] = source.info(name)
            labels[label] = _part_name(file, name, infos[label].dtype)
            if labels[label] == _PACKED:
                linear = spec.for_module(f"blocks.{int(Path(file).stem)}.{name.rpartition('.')[0]}")
                if linear is None:
                    raise ArtifactError(f"{folder}: {label} is packed, which no rule asks for")
                nbits = FORMATS[linear.weight.format].nbits
                num_packed += math.prod(infos[label].shape) * 8 // nbits
    return tuple(
        replace(part, num_parameters=num_packed) if part.name == _PACKED else part
        for part in parts_of(infos, labels.__getitem__)
    )


def inspect_artifact(folder: str | Path, *, with_hashes: bool) -> Inspection:
    """What an artifact holds, sized by part; only names, shapes and dtypes are read.

    Raises: ValueError when the manifest or a file cannot be used.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    parts = artifact_parts(folder, manifest)
    home = enclosing_model(folder)
    for beside in () if home is None else ("vae", "text_encoder"):
        if (path := Path(home or "", beside)).is_dir():
            inner = inspect_path(path, with_hashes=False).parts
            parts += tuple(replace(part, name=f"{beside}: {part.name}") for part in inner)
    kv = "16-bit" if manifest.kv is None else manifest.kv["format"].get("name", "unknown").upper()
    what = QuantSpec.from_dict(manifest.spec).summary()
    provenance = {
        "base": manifest.base["source"],
        "calibration": manifest.calibration,
        "kv calibration": None if manifest.kv is None else manifest.kv.get("calibration"),
        "created by": manifest.created_by,
    }
    return Inspection(
        str(folder),
        "artifact",
        f"compressed {manifest.base['source']}, format {FORMAT}: {what}; {kv} KV cache",
        parts,
        list_files(folder, with_hashes=with_hashes),
        provenance,
    )


def _part_name(file: str, name: str, dtype: str) -> str:
    if file == TRANSFORMER_FILE:
        return "outside the blocks"
    if file == KV_FILE:
        return "KV cache parameters"
    last = name.rsplit(".", 1)[-1]
    if last == "qweight":
        return _PACKED if dtype == "uint8" else "8-bit weights"
    return _PARTS.get(last, "biases, norms and unquantized weights")
