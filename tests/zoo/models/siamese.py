"""Siamese network: one encoder for both images, a contrastive loss on the distance of their embeddings."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ._data import digits


class Embedder(nn.Module):
    dim: int

    @nn.compact
    def __call__(self, x, training):
        for features in (8, 16):
            x = nn.Conv(features, (3, 3), padding="CIRCULAR")(x)
            x = nn.BatchNorm(use_running_average=not training)(x)
            x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(self.dim)(x)


class Siamese(nn.Module):
    dim: int = 8

    def setup(self):
        self.embed = Embedder(self.dim)

    def __call__(self, left, right, training=False):
        a, b = self.embed(left, training), self.embed(right, training)
        return jnp.sqrt(jnp.sum((a - b) ** 2, axis=-1) + 1e-6)


def loss(distance, same):
    return jnp.where(same, distance**2, jnp.maximum(0.0, 4.0 - distance) ** 2)


def build():
    return Siamese()


def batch():
    images, labels = digits(64)
    order = np.argsort(labels, kind="stable")[:32]  # neighbours show one digit, the first half and the second do not
    left, right = np.r_[order[:16:2], order[:8]], np.r_[order[1:16:2], order[-8:]]
    return (images[left], images[right]), labels[left] == labels[right]
