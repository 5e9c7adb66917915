"""Making an artifact as the first step of a longer command: what is finished is not made again."""

from __future__ import annotations

from pathlib import Path

from var_compressor.artifact import ArtifactError, Manifest, is_artifact, read_manifest
from var_compressor.compress import (
    calibrate_cache,
    check_kv,
    collection_of,
    quantize,
    store_cache,
)
from var_compressor.quant.calibration import Progress
from var_compressor.recipe import Recipe


def make_artifact(recipe: Recipe, folder: Path, *, on_progress: Progress) -> Manifest:
    """The artifact of a recipe in ``folder``, with parameters for its KV cache.

    Goes on where a killed run stopped.
    Raises: ArtifactError when another recipe's artifact is there, ValueError for a recipe whose
    cache is not quantized.
    """
    check_kv(recipe.quant.kv)
    if not is_artifact(folder):
        quantize(recipe, folder, on_progress=on_progress)
    manifest = read_manifest(folder)
    _check_made_with(recipe, folder, manifest)
    if manifest.kv is None:
        found = calibrate_cache(recipe, folder, on_progress=on_progress)
        store_cache(found, folder, None)
    return read_manifest(folder)


def _check_made_with(recipe: Recipe, folder: Path, manifest: Manifest) -> None:
    asked = {
        "model": recipe.model.path or recipe.model.name,
        **recipe.to_dict()["quant"],
        **collection_of(recipe.collect).to_dict(),
    }
    made = {"model": manifest.base["source"], **manifest.spec, **manifest.calibration}
    for key, wanted in asked.items():
        if made.get(key) != wanted:
            raise ArtifactError(
                f"{folder}: was made with {key} {made.get(key)}, now it is {wanted}; give another "
                "--out, or delete it"
            )
