"""The blueprints that come with the library; importing this registers them."""

from . import affine, conv, dense, linear, lora, norm, units

__all__ = ["affine", "conv", "dense", "linear", "lora", "norm", "units"]
