"""Opening what was compressed."""

from __future__ import annotations

from pathlib import Path

import torch

from var_compressor.artifact import ArtifactError
from var_compressor.pipeline import InfinityPipeline


def load_artifact(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    compute: str = "auto",
    low_memory: bool = False,
) -> InfinityPipeline:
    """Open a compressed model, ready to draw: `quantize_model`'s counterpart.

    ``path``: what `quantize_model`, ``varc quantize`` or ``varc import-artifact`` wrote, a
    directory that `InfinityPipeline.save_pretrained` wrote, or a hub id of one. Block tensors that
    are not packed weights, the VAE and the text encoder run in ``dtype``. An artifact has VAE and
    text encoder of its base model, which must still be where it says; a directory has its own. The
    KV cache is stored as the artifact says. ``device``, ``compute`` and ``low_memory`` as for
    `InfinityPipeline.from_pretrained`, which opens artifacts too, and has more choices; this one
    refuses what is not compressed. The network alone is the pipeline's ``transformer``.
    Raises: ArtifactError or CheckpointError (ValueErrors) when there is no finished artifact, its
    files are damaged, or its base model is another one or gone.
    """
    pipeline = InfinityPipeline.from_pretrained(
        path, dtype=dtype, device=device, compute=compute, low_memory=low_memory
    )
    if pipeline.origin is None:
        raise ArtifactError(
            f"{path}: is a full-precision model; make an artifact of it with quantize_model or "
            "`varc quantize`, or open it with InfinityPipeline.from_pretrained"
        )
    return pipeline
