"""How a hot operation runs: torch (and kernels), nothing of the model or of the compressor.

`primitives` holds the number formats, `packing` the bytes, `reference` the executable specification
that every kernel is tested against.
"""
