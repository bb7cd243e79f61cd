"""ConvNeXt: depthwise 7x7, LayerNorm, inverted bottleneck, layer scale as a bare parameter, stochastic depth."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._data import digits


class DropPath(nn.Module):
    rate: float
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic=None):
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        if deterministic or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = jax.random.bernoulli(self.make_rng("droppath"), keep, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(mask, x / keep, 0.0)


class ConvNeXtBlock(nn.Module):
    dim: int
    drop_path: float = 0.0
    layer_scale_init: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, deterministic):
        shortcut = x
        x = nn.Conv(self.dim, (7, 7), feature_group_count=self.dim, padding=3, dtype=self.dtype, name="dwconv")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
        x = nn.Dense(4 * self.dim, name="pwconv1")(x)
        x = nn.gelu(x)
        x = nn.Dense(self.dim, name="pwconv2")(x)
        gamma = self.param("gamma", nn.initializers.constant(self.layer_scale_init), (self.dim,))
        return shortcut + DropPath(self.drop_path)(gamma * x, deterministic=deterministic)


class ConvNeXt(nn.Module):
    depths: tuple[int, ...] = (1, 1)
    dims: tuple[int, ...] = (8, 16)
    num_classes: int = 10
    drop_path_rate: float = 0.1

    @nn.compact
    def __call__(self, x, deterministic: bool = True):
        rates = [self.drop_path_rate * i / max(1, sum(self.depths) - 1) for i in range(sum(self.depths))]
        for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            if i == 0:
                x = nn.Conv(dim, (2, 2), strides=(2, 2), padding="VALID", name="stem_conv")(x)
                x = nn.LayerNorm(epsilon=1e-6, name="stem_norm")(x)
            else:
                x = nn.LayerNorm(epsilon=1e-6, name=f"downsample_{i}_norm")(x)
                x = nn.Conv(dim, (2, 2), strides=(2, 2), padding="VALID", name=f"downsample_{i}_conv")(x)
            for j in range(depth):
                x = ConvNeXtBlock(dim, rates[sum(self.depths[:i]) + j], name=f"stage_{i}_block_{j}")(x, deterministic)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x.mean((1, 2)))
        return nn.Dense(self.num_classes, name="head")(x)


def build():
    return ConvNeXt()


def batch():
    images, labels = digits()
    return (images,), labels
