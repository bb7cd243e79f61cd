"""Deep ensemble: one network under `nn.vmap`, its members with parameters and statistics of their own."""

import flax.linen as nn

from ._data import digits


class Member(nn.Module):
    features: tuple[int, ...]
    train: bool

    @nn.compact
    def __call__(self, x):
        for size in self.features[:-1]:
            x = nn.Dense(size)(x)
            x = nn.BatchNorm(use_running_average=not self.train)(x)
            x = nn.relu(x)
        return nn.Dense(self.features[-1])(x)


class Ensemble(nn.Module):
    size: int
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train=True):
        members = nn.vmap(
            Member,
            in_axes=None,
            out_axes=0,
            axis_size=self.size,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
        )
        logits = members(self.features, train, name="members")(x.reshape(len(x), -1))
        return logits.mean(0)


def build():
    return Ensemble(3, (12, 10))


def batch():
    images, labels = digits()
    return (images,), labels
