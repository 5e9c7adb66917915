"""The networks in full precision: transformer, VAE, text encoder, schedules, checkpoints."""
