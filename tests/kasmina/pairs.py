"""The same five small models in Linen and in nnx, each with a batch and what a test needs to know of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import esper_jax


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(3)(nn.Conv(6, (3, 3), strides=2)(x).mean((1, 2)))


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.one, self.norm = nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.two, self.last = nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.two(nnx.relu(self.norm(self.one(x)))).mean((1, 2)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        h = nn.Dropout(0.3, deterministic=not train)(nn.gelu(nn.Dense(7)(nn.LayerNorm()(x))))
        return nn.Dense(3)((x + nn.Dense(4)(h)).mean(1))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(4, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(4, 7, rngs=rngs), nnx.Linear(7, 4, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.3, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return self.last((x + self.down(self.drop(nnx.gelu(self.up(self.norms[1](x)))))).mean(1))


class LinenLM(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.RMSNorm()(nn.Embed(7, 4)(ids))
        h = nn.Einsum((4, 2, 3), "...i,iho->...ho")(x)
        return nn.Dense(3)(nn.gelu(h).reshape(*ids.shape, 6)).mean(1)


class NnxLM(nnx.Module):
    def __init__(self, rngs):
        self.table, self.norm = nnx.Embed(7, 4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)
        self.heads = nnx.Einsum("...i,iho->...ho", (4, 2, 3), (2, 3), rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, ids):
        h = self.heads(self.norm(self.table(ids)))
        return self.last(nnx.gelu(h).reshape(*ids.shape, 6)).mean(1)


class LinenAutoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.GroupNorm(2)(nn.Conv(4, (3, 3), strides=2)(x)))
        return nn.Dense(3)(nn.ConvTranspose(2, (3, 3), strides=(2, 2))(h).mean((1, 2)))


class NnxAutoencoder(nnx.Module):
    def __init__(self, rngs):
        self.down, self.norm = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs), nnx.GroupNorm(4, 2, rngs=rngs)
        self.up, self.last = nnx.ConvTranspose(4, 2, (3, 3), strides=(2, 2), rngs=rngs), nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.up(nnx.gelu(self.norm(self.down(x)))).mean((1, 2)))


X = jax.random.normal(jax.random.key(1), (8, 4))
IMAGE = jax.random.normal(jax.random.key(2), (8, 6, 6, 2))
TEXT = jax.random.normal(jax.random.key(3), (8, 5, 4))
IDS = jax.random.randint(jax.random.key(4), (8, 5), 0, 7)
MODELS = {
    "mlp": (LinenMLP, NnxMLP, X),
    "cnn": (LinenCNN, NnxCNN, IMAGE),
    "block": (LinenBlock, NnxBlock, TEXT),
    "language model": (LinenLM, NnxLM, IDS),
    "autoencoder": (LinenAutoencoder, NnxAutoencoder, IMAGE),
}
PAIRS = [(name, api) for name in MODELS for api in ("linen", "nnx")]
LABELS = jnp.arange(8) % 3


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One model of a pair: what `graft` and `Tolaria` take, what `morph` takes, and a batch."""

    model: Any
    given: Any
    x: jax.Array
    api: str

    def morph(self, **options: Any) -> esper_jax.Morph:
        """Its morph; a Linen model is traced, an nnx module need not be."""
        traced = {"model": self.model, "example": self.x} if self.api == "linen" else {}
        return esper_jax.morph(self.given, **traced, **options)

    def run(self, forward: Any, morph: Any, train: bool) -> tuple[jax.Array, Any]:
        """The outputs in training or evaluation mode, and the collections that the call updated."""
        names = [name for name in morph.variables if name != "params"]
        kwargs = forward.mode(train)
        if self.api == "linen":
            kwargs["rngs"] = {"dropout": jax.random.key(5)}
        return forward(morph, self.x, **kwargs, mutable=names) if names else (forward(morph, self.x, **kwargs), {})

    def bare(self, morph: Any, train: bool) -> Any:
        """What the model alone gives, in evaluation mode or as it is built."""
        if self.api == "linen":
            kwargs = esper_jax.graft(self.model).mode(train)
            return self.model.apply(morph.variables, self.x, **kwargs, rngs={"dropout": jax.random.key(5)})
        copy = nnx.merge(nnx.graphdef(self.model), morph.form.state(morph.host))
        copy.train() if train else copy.eval()
        return copy(self.x)


@functools.cache
def member(name: str, api: str) -> Member:
    """A model of a pair, made once."""
    linen, other, x = MODELS[name]
    if api == "linen":
        model = linen()
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        return Member(model, jax.jit(model.init)(rngs, x), x, api)
    module = other(nnx.Rngs(0))
    return Member(module, module, x, api)
