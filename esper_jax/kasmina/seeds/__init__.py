"""The blueprints that come with the library; importing this registers them."""

from . import conv, dense, norm

__all__ = ["conv", "dense", "norm"]
