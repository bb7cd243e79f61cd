"""DeepSets: an element-wise network, a masked sum, a network of the sum; learns the maximum of a set."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax


def mlp(*sizes):
    layers = []
    for size in sizes[:-1]:
        layers += [nn.Dense(size), nn.elu]
    return nn.Sequential([*layers, nn.Dense(sizes[-1])])


class DeepSets(nn.Module):
    hidden: int = 12

    def setup(self):
        self.phi = mlp(self.hidden, self.hidden)
        self.rho = mlp(self.hidden, 1)

    @functools.partial(nn.remat, prevent_cse=False)
    def embed(self, sets):
        return self.phi(sets)

    def __call__(self, sets, mask):
        pooled = jnp.sum(self.embed(sets) * mask[..., None], axis=-2)
        return self.rho(pooled)[..., 0]


def loss(prediction, target):
    return optax.huber_loss(prediction, target)


def build():
    return DeepSets()


def batch():
    rng = np.random.default_rng(0)
    sets = rng.normal(size=(16, 5, 2)).astype(np.float32)
    mask = np.arange(5) < rng.integers(1, 6, 16)[:, None]
    target = np.where(mask, sets.sum(-1), -9).max(-1)
    return (sets, mask), target.astype(np.float32)
