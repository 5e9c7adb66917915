"""Offline: weights and calibration statistics become what an artifact stores.

`smooth`, `lowrank`, `gptq` and `kv` are algorithms on plain tensors; they know no network.
"""
