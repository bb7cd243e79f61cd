"""What torch's operators are in JAX, by topic."""

from . import attention, conv, fft, index, linear, loss, norm, pointwise, pool, random, recurrent, reduce, sample, shape
from .registry import register_op, supported_ops

__all__ = [
    "attention",
    "conv",
    "fft",
    "index",
    "linear",
    "loss",
    "norm",
    "pointwise",
    "pool",
    "random",
    "recurrent",
    "reduce",
    "register_op",
    "sample",
    "shape",
    "supported_ops",
]
