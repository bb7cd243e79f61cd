"""The blueprints that come with the library; importing this registers them."""

from . import affine, conv, dense, lora, norm

__all__ = ["affine", "conv", "dense", "lora", "norm"]
