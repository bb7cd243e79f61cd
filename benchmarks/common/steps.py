"""Steps to time: a hand-written one of the bare host, the same of a morph, `make_train_step`'s, and the loop's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import esper_jax
from esper_jax.tolaria.dispatch import Dispatch, make_steps
from esper_jax.tolaria.step import Calls, RestAlone

from .models import Workload


def bare_step(work: Workload) -> tuple[Callable[..., Any], Any]:
    """`step((variables, opt_state), batch) -> (the next, loss)` of the host alone, not jitted, and its first state."""
    tx = work.optimizer()

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        variables, opt_state = state
        params = variables["params"]

        def loss(params: Any) -> Any:
            return work.mean_loss(work.model.apply, {**variables, "params": params}, batch)

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return ({**variables, **updated, "params": optax.apply_updates(params, updates)}, opt_state), value

    return step, own((work.variables, tx.init(work.variables["params"])))


def morph_step(work: Workload, morph: esper_jax.Morph) -> tuple[Callable[..., Any], Any]:
    """The same step, line by line, of a morph with a `growable` optimizer, and its first state."""
    tx, forward = esper_jax.growable(work.optimizer()), esper_jax.graft(work.model.apply)

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        morph, opt_state = state

        def loss(params: Any) -> Any:
            return work.mean_loss(forward, morph.with_params(params), batch)

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(morph.params)
        updates, opt_state = tx.update(grads, opt_state, morph)
        grown = morph.with_params(optax.apply_updates(morph.params, updates)).with_collections(updated)
        return (grown, opt_state), value

    return step, own((morph, tx.init(morph)))


def library_step(work: Workload, morph: esper_jax.Morph, **options: Any) -> tuple[Callable[..., Any], Any]:
    """`make_train_step`'s step, jitted, with `options`, and its first state."""
    tx = esper_jax.growable(work.optimizer())
    step = esper_jax.make_train_step(work.model, work.loss, tx, **options)
    return step, esper_jax.TrainState.create(morph, tx, key=jax.random.key(0))


class Stepper:
    """A step with the state it goes on from: a variant for `interleave`, called with the number of a batch."""

    def __init__(self, step: Callable[..., Any], state: Any, batches: Any, *, jitted: bool = False) -> None:
        self.step = step if jitted else jax.jit(step, donate_argnums=0)
        self.state, self.batches = state, batches

    def __call__(self, i: int) -> Any:
        """One step on batch `i`; returns what it measured."""
        self.state, found = self.step(self.state, self.batches[i])
        return found


class Looped:
    """`count` steps of Tolaria's loop: a variant that makes them in as many calls as its own way of dispatch takes.

    `alone` is Tolaria's `rest_alone`.
    """

    def __init__(
        self, work: Workload, morph: esper_jax.Morph, count: int, probe_every: int, alone: bool = False
    ) -> None:
        calls, tx = Calls(esper_jax.graft(work.model), work.loss), esper_jax.growable(work.optimizer())
        self.state = esper_jax.TrainState.create(morph, tx, key=jax.random.key(0))
        self.scans = Dispatch().chosen(calls, morph, work.batches[0]) == "scan"
        places = count if self.scans else 1
        rows = [work.batches[i % len(work.batches)] for i in range(count)]
        groups = [rows[i : i + places] for i in range(0, count, places)]
        self.batches = [jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *group) for group in groups]
        self.places = np.int32(places)
        dispatch = Dispatch("scan" if self.scans else "loop", None, alone)
        self.steps = make_steps(calls, tx, probe_every, dispatch)
        self.call = RestAlone(self.steps) if dispatch.parts(dispatch.mode) else self.steps

    def __call__(self, i: int = 0) -> Any:
        """All the steps, on batches in the same order each time; returns what the last measured."""
        for batches in self.batches:
            self.state, metrics = self.call(self.state, batches, self.places)
        return metrics["loss"]

    def compiled(self) -> Any:
        """The program of one call."""
        return self.steps.jitted.lower(self.state, self.batches[0], self.places).compile()


def own(tree: Any) -> Any:
    """A copy whose buffers may be donated."""
    return jax.tree.map(jax.numpy.array, tree)


def same_program(step: Callable[..., Any], state: Any, other: Callable[..., Any], others: Any, batch: Any) -> bool:
    """Whether two functions of differently named trees trace to the same jaxpr."""
    return str(jax.make_jaxpr(step)(state, batch)) == str(jax.make_jaxpr(other)(others, batch))
