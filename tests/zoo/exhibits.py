"""Each model of the zoo with variables, a batch and its calls, made once."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import esper_jax
from esper_jax.kasmina.morph import Morph

from ..kasmina.hosts import stirred
from .models import MODELS

STREAMS = ("dropout", "droppath")


def key(seed: int) -> jax.Array:
    """A key whose random numbers are quick to compile."""
    return jax.random.key(seed, impl="rbg")


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A model with variables, the arguments of one call and the targets."""

    name: str
    model: nn.Module
    variables: Any
    args: tuple[Any, ...]
    targets: Any
    loss: Any

    def kwargs(self, train: bool) -> dict[str, Any]:
        """The keywords of a call in training or evaluation."""
        kwargs: dict[str, Any] = dict(esper_jax.graft(self.model).mode(train))
        if train or self.name == "seq2seq":  # whose dropout is decided when the model is built
            kwargs["rngs"] = {stream: key(i) for i, stream in enumerate(STREAMS)}
        if collections := [name for name in self.variables if name != "params"]:
            kwargs["mutable"] = collections if train else False
        return kwargs

    def run(self, apply: Any, given: Any, train: bool) -> tuple[jax.Array, Any]:
        """`(mean loss, (outputs, updated collections))` of `apply` on variables or a morph."""
        result = apply(given, *self.args, **self.kwargs(train))
        outputs, updated = result if train and len(self.variables) > 1 else (result, {})
        return jnp.mean(self.loss(outputs, self.targets)), (outputs, updated)


@functools.cache
def exhibit(name: str) -> Exhibit:
    """The model of that name."""
    module = MODELS[name]
    model, (args, targets) = module.build(), module.batch()
    loss = getattr(module, "loss", optax.softmax_cross_entropy_with_integer_labels)
    keys = {stream: key(5) for stream in ("params", *STREAMS)}
    mode = esper_jax.graft(model).mode(False)
    with unoptimised():
        variables = jax.jit(lambda *args: model.init(keys, *args, **mode))(*args)
    return Exhibit(name, model, {**variables, "params": stirred(variables["params"], 0.02)}, args, targets, loss)


@functools.cache
def morphed(name: str, traced: bool = True, where: str | None = None, slots: int = 1) -> Morph:
    """The model's morph, from its variables alone or traced; what is skipped is tested by a test of its own."""
    given = exhibit(name)
    known: dict[str, Any] = {"model": given.model, "example": given.args} if traced else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "morph.. skipped")
        return esper_jax.morph(given.variables, where=where, slots=slots, **known)


def kinds_of(morph: Morph) -> dict[str, int]:
    """How many sites of which kind a morph has."""
    return dict(collections.Counter(site.kind for site in morph.spec.sites))


@contextlib.contextmanager
def unoptimised() -> Iterator[None]:
    """Programs are compiled without most of XLA's optimisations inside this `with`: half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
