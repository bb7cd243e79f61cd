"""Imported as `esper_jax.bridge`: PyTorch models in and out. Nothing here yet; planned: `from_torch` and back."""
