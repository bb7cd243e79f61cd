"""The blueprints that come with the library; importing this registers them."""

from . import affine, conv, dense, gated, heads, linear, lora, norm, sequence, units

__all__ = ["affine", "conv", "dense", "gated", "heads", "linear", "lora", "norm", "sequence", "units"]
