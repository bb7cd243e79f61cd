"""Small batches: scikit-learn's digits, and tokens drawn from a fixed seed."""

import functools

import numpy as np
from sklearn.datasets import load_digits


@functools.cache
def digits(size=16):
    """`size` digits: images [N, 8, 8, 1] between 0 and 1, and their labels [N]."""
    data = load_digits()
    images = (data.images[:size, :, :, None] / 16).astype(np.float32)
    return images, data.target[:size].astype(np.int32)


def tokens(rows, length, vocabulary, seed=0):
    """Random tokens [rows, length] from 1 on; 0 is left for padding."""
    return np.random.default_rng(seed).integers(1, vocabulary, (rows, length)).astype(np.int32)
