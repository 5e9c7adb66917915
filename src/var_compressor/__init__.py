"""VAR-Compressor: 4-bit Infinity text-to-image models with an INT8 KV cache."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from var_compressor.opening import load_artifact
    from var_compressor.pipeline import InfinityPipeline
    from var_compressor.quant.ptq import quantize_model

__version__ = "0.1.0"

__all__ = ["InfinityPipeline", "__version__", "load_artifact", "quantize_model"]

# imported on first use, because `varc --help` must not wait for torch
_HOMES = {
    "InfinityPipeline": "var_compressor.pipeline",
    "load_artifact": "var_compressor.opening",
    "quantize_model": "var_compressor.quant.ptq",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
