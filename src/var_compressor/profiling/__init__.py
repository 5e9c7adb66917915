"""What a model's activations, caches and weights look like, and what rounding does to them."""
