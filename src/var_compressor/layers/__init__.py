"""Modules that own quantized state: linears and KV caches."""
