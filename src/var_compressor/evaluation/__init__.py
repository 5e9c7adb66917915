"""How good a model's pictures are: procedural scenes with known truth, a reader of pictures, and
metrics.
"""
