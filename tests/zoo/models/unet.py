"""U-Net with lists of layers, GroupNorm and transposed convolutions, taught to draw the outline of a digit."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from ._data import digits


class DoubleConv(nn.Module):
    features: int

    def setup(self):
        self.layers = [
            nn.Conv(self.features, kernel_size=(3, 3), padding=1),
            nn.GroupNorm(num_groups=4),
            nn.silu,
            nn.Conv(self.features, kernel_size=(3, 3), padding=1),
            nn.GroupNorm(num_groups=None, group_size=2),
            nn.silu,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class UNet(nn.Module):
    widths: Sequence[int] = (8,)
    classes: int = 1

    def setup(self):
        self.downs = [DoubleConv(w) for w in self.widths]
        self.bottom = DoubleConv(2 * self.widths[-1])
        self.ups = [nn.ConvTranspose(w, (2, 2), strides=(2, 2)) for w in reversed(self.widths)]
        self.merges = [DoubleConv(w) for w in reversed(self.widths)]
        self.head = nn.Conv(self.classes, (1, 1))

    def __call__(self, x):
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = self.bottom(x)
        for up, merge, skip in zip(self.ups, self.merges, reversed(skips), strict=True):
            x = jnp.concatenate([up(x), skip], axis=-1)
            x = merge(x)
        return self.head(x)


def loss(logits, masks):
    return optax.sigmoid_binary_cross_entropy(logits, masks)


def build():
    return UNet()


def batch():
    images, _ = digits(8)
    inside = images > 0.5
    edge = inside & ~(np.roll(inside, 1, 1) & np.roll(inside, -1, 1))
    return (images,), edge.astype(np.float32)
