"""Saved models that several files open; a test that changes one copies it first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tiny import COLLECTION, QUICK_SPEC, make_model
from var_compressor.artifact import put_kv
from var_compressor.layers.kv_params import params_to_tensors
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.kv_calibration import calibrate_kv
from var_compressor.quant.ptq import quantize_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def artifact_dir(model_dir: Path) -> Path:
    """The same model in 4 bits, without parameters for the KV cache."""
    out = model_dir.with_name("tiny-w4a4")
    pipeline = InfinityPipeline.from_pretrained(model_dir, dtype=torch.float32)
    quantize_model(pipeline, COLLECTION, QUICK_SPEC, base=str(model_dir), out=out)
    return out


@pytest.fixture(scope="session")
def kv_artifact_dir(artifact_dir: Path) -> Path:
    """The same with an int8 KV cache."""
    out = artifact_dir.with_name("tiny-w4a4-kv8")
    shutil.copytree(artifact_dir, out)
    pipeline = InfinityPipeline.from_pretrained(out, dtype=torch.float32)
    found = calibrate_kv(pipeline, COLLECTION, QUICK_SPEC.kv)
    put_kv(out, params_to_tensors(found.params), found.kv)
    return out
