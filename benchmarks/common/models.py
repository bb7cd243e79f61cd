"""The models that are measured, at any width: an MLP, a CNN with BatchNorm, a transformer under `nn.remat`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_jax

MODELS = ("mlp", "cnn", "transformer")
CLASSES = 10
VOCABULARY = 64


class MLP(nn.Module):
    """Three linear layers with relu between them."""

    width: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(CLASSES, dtype=self.dtype)(x)


class CNN(nn.Module):
    """Two convolutions with BatchNorm and relu, the second at half the size, then a linear layer on the mean."""

    width: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        for i in range(2):
            x = nn.Conv(self.width * 2**i, (3, 3), strides=1 + i, use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x))
        return nn.Dense(CLASSES, dtype=self.dtype)(x.mean((1, 2)))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        h = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(h, mask=mask)
        h = nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        return x + nn.Dense(width, dtype=self.dtype)(h)


class Transformer(nn.Module):
    """A causal transformer whose blocks are recomputed in the backward pass."""

    width: int = 64
    depth: int = 2
    length: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        places = self.param("places", nn.initializers.normal(0.02), (self.length, self.width))
        h = nn.Embed(VOCABULARY, self.width, dtype=self.dtype)(x) + places.astype(self.dtype)
        block = nn.remat(Block)
        for i in range(self.depth):
            h = block(4, self.dtype, name=f"block_{i}")(h)
        return nn.Dense(VOCABULARY, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(h))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model with variables, several batches of data, and where its seeds go.

    `batches` are pairs `(x, y)` already on the device. `where` names the sites that are planted, `blueprint` and
    `config` what is planted there.
    """

    name: str
    model: nn.Module
    variables: Any
    batches: tuple[tuple[jax.Array, jax.Array], ...]
    where: str
    blueprint: str
    config: dict[str, Any]
    batch: int

    @property
    def collections(self) -> list[str]:
        """The model's mutable collections."""
        return [name for name in self.variables if name != "params"]

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """Cross entropy of each prediction, float32."""
        return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), targets)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW behind clipping by global norm, as such models are trained."""
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def morph(self, planted: bool = False, *, slots: int = 4, **options: Any) -> esper_jax.Morph:
        """A morph of the model: all slots empty, or a dormant seed of the blueprint planted at each site of `where`."""
        if planted:
            options = {"where": self.where, "planted": {self.blueprint: self.config}, **options}
        return esper_jax.morph(self.variables, slots=slots, model=self.model, example=self.batches[0][0], **options)

    def mean_loss(self, apply: Callable[..., Any], variables: Any, batch: Any) -> tuple[jax.Array, Any]:
        """The batch's mean loss in training mode and the updated collections, by `model.apply` or a grafted forward."""
        x, y = batch
        if not self.collections:
            return jnp.mean(self.loss(apply(variables, x, train=True), y)), {}
        outputs, updated = apply(variables, x, train=True, mutable=self.collections)
        return jnp.mean(self.loss(outputs, y)), updated


def workload(
    name: str, *, scale: float = 1.0, dtype: str = "float32", batch: int = 64, sets: int = 4, seed: int = 0
) -> Workload:
    """One of `mlp`, `cnn`, `transformer`.

    Args:
      name: which.
      scale: factor of the width; 1 suits two processor cores, an accelerator takes 8 and more.
      dtype: what is computed in; weights stay float32.
      batch: examples in a batch.
      sets: different batches.
      seed: of weights and data.

    Raises:
      ValueError: another name.
    """
    model, shape, grows = build(name, scale, dtype)
    made = np.random.default_rng(seed)
    batches = []
    for _ in range(sets):
        if name == "transformer":
            tokens = made.integers(0, VOCABULARY, (batch, shape[0] + 1))
            batches.append((jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])))
        else:
            x = made.normal(size=(batch, *shape)).astype(np.float32)
            batches.append((jnp.asarray(x), jnp.asarray(made.integers(0, CLASSES, batch))))
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(seed), batches[0][0])
    return Workload(name, model, variables, tuple(batches), *grows, batch)


def build(name: str, scale: float, dtype: str) -> tuple[nn.Module, tuple[int, ...], tuple[str, str, dict[str, Any]]]:
    """The model, the shape of one example, and `(where, blueprint, config)` of its seeds."""
    compute = jnp.dtype(dtype)
    if name == "mlp":
        model: nn.Module = MLP(_width(256, scale), compute)
        shape: tuple[int, ...] = (64,)
        grows: tuple[str, str, dict[str, Any]] = ("Dense_[01]$", "mlp", {"hidden": _width(64, scale)})
    elif name == "cnn":
        model, shape = CNN(_width(16, scale), compute), (16, 16, 3)
        grows = ("Conv_", "conv_light", {})
    elif name == "transformer":
        width = _width(64, scale, of=8)
        model, shape = Transformer(width, dtype=compute), (32,)
        grows = (r"block_\d+/Dense_[01]$", "lora", {"rank": max(1, width // 8)})
    else:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    return model, shape, grows


def _width(base: int, scale: float, of: int = 1) -> int:
    """`base * scale` as a whole number, a multiple of `of`."""
    return max(1, round(base * scale / of)) * of
