"""The train step: one jitted function over a TrainState, with host and seeds kept apart to the bit."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array, Bool, Float

from .._checks import INT32, flag, function, one_of, whole, words
from ..kasmina.graft import Graft, graft, zero_taps
from ..kasmina.morph import Morph
from ..kasmina.observe import norm_of, observed_states, squared_norms, tree_norm
from ..kasmina.operate import concrete
from ..kasmina.sites import split_path
from ..kasmina.spec import Site, Spec
from ..kasmina.state import SeedState, computes
from .branch import changed_if
from .optim import Growable, growable
from .state import Meters, TrainState

Loss = Callable[[Any, Any], Array]
METRICS = ("loss", "grad_norm", "skipped", "faults")
_PAIRS = (("x", "y"), ("inputs", "targets"), ("image", "label"), ("images", "labels"))


def unpack_batch(batch: Any) -> tuple[tuple[Any, ...], Any]:
    """A batch as `(arguments of the model, targets)`: a pair, or a mapping with x/y, inputs/targets or image/label.

    Raises:
      ValueError: another form; give `unpack=`.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return (batch[0],), batch[1]
    if isinstance(batch, Mapping):
        for x, y in _PAIRS:
            if x in batch and y in batch:
                return (batch[x],), batch[y]
        found = "a mapping with " + ", ".join(map(str, batch))
    else:
        found = f"{type(batch).__name__}" + (f" of {len(batch)}" if hasattr(batch, "__len__") else "")
    raise ValueError(
        f"a batch must be a pair (inputs, targets) or a mapping with x and y, got {found}; for another form give "
        "unpack=, a function batch -> (tuple of model arguments, targets)"
    )


def _checked(unpack: Callable[[Any], tuple[tuple[Any, ...], Any]]) -> Callable[[Any], tuple[tuple[Any, ...], Any]]:
    """The user's `unpack`, held to its form: a lone array of arguments would be taken apart along the batch."""

    def checked(batch: Any) -> tuple[tuple[Any, ...], Any]:
        args, targets = unpack(batch)
        if not isinstance(args, tuple | list):
            raise TypeError(f"unpack must give (tuple of model arguments, targets), its first is {type(args).__name__}")
        return tuple(args), targets

    return checked


class Calls:
    """How the model is called in training and evaluation: its mode keyword, rngs, collections and compute dtype."""

    def __init__(
        self,
        forward: Graft,
        loss: Loss,
        unpack: Callable[[Any], tuple[tuple[Any, ...], Any]] | None = None,
        train_kwargs: Mapping[str, Any] | None = None,
        eval_kwargs: Mapping[str, Any] | None = None,
        rngs: Sequence[str] | None = None,
        compute_dtype: Any = None,
    ) -> None:
        function("loss", loss, "optax.softmax_cross_entropy_with_integer_labels")
        if unpack is not None:
            function("unpack", unpack, "lambda batch: ((inputs,), targets)")
        for name, given in (("train_kwargs", train_kwargs), ("eval_kwargs", eval_kwargs)):
            if given is not None:
                one_of(name, given, Mapping, '{"train": True}')
                words(name, list(given), '{"train": True}')
        self.forward, self.loss = forward, loss
        self.dtype = None if compute_dtype is None else _floating(compute_dtype)
        self.unpack = _checked(unpack) if unpack else unpack_batch
        self.train_kwargs = dict(forward.mode(True) if train_kwargs is None else train_kwargs)
        self.eval_kwargs = dict(forward.mode(False) if eval_kwargs is None else eval_kwargs)
        self.rngs = (
            tuple(("dropout",) if forward.model is not None else ())
            if rngs is None
            else words("rngs", rngs, '("dropout",)')
        )

    def train(self, morph: Morph, taps: Any, sample: Any, batch: Any, key: jax.Array) -> tuple[Array, dict[str, Any]]:
        """The mean loss of a batch in training mode, and the host's updated collections."""
        args, targets = self.unpack(batch)
        morph, args = self.cast(morph, args)
        kwargs = dict(self.train_kwargs)
        if self.rngs:
            kwargs["rngs"] = {name: jax.random.fold_in(key, i) for i, name in enumerate(self.rngs)}
        collections = [name for name in morph.variables if name != "params"]
        if not collections:
            return self.mean_loss(self.forward.tapped(morph, taps, sample, *args, **kwargs), targets), {}
        outputs, updated = self.forward.tapped(morph, taps, sample, *args, **kwargs, mutable=collections)
        return self.mean_loss(outputs, targets), updated

    def evaluate(self, morph: Morph, batch: Any) -> tuple[Any, Any]:
        """Outputs and targets of a batch in evaluation mode."""
        args, targets = self.unpack(batch)
        morph, args = self.cast(morph, args)
        return self.forward(morph, *args, **self.eval_kwargs), targets

    def cast(self, morph: Morph, args: tuple[Any, ...]) -> tuple[Morph, tuple[Any, ...]]:
        """Parameters and inputs in the compute dtype; collections such as batch statistics stay as they are."""
        if self.dtype is None:
            return morph, args
        lower = lambda leaf: leaf.astype(self.dtype) if _is_float(leaf) else leaf  # noqa: E731
        return morph.with_params(jax.tree.map(lower, morph.params)), jax.tree.map(lower, args)

    def mean_loss(self, outputs: Any, targets: Any) -> Float[Array, ""]:
        """The loss function's result averaged to a float32 scalar; outputs in a compute dtype go in as float32."""
        if self.dtype is not None:
            outputs = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if _is_float(leaf) else leaf, outputs)
        return jnp.mean(self.loss(outputs, targets).astype(jnp.float32))


def _floating(dtype: Any) -> Any:
    """The dtype; ValueError unless it is a floating one."""
    try:
        found = None if isinstance(dtype, jax.Array | np.ndarray) else jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"compute_dtype must be a floating dtype such as jnp.bfloat16, got {found or repr(dtype)}")
    return found


def make_train_step(
    forward: Any,
    loss: Loss,
    tx: Any,
    *,
    probe_every: int = 50,
    steps: int = 1,
    unroll: bool | None = None,
    donate: bool = True,
    rest_alone: bool = False,
    unpack: Callable[[Any], tuple[tuple[Any, ...], Any]] | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
    rngs: Sequence[str] | None = None,
    compute_dtype: Any = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Build the jitted train step `step(state, batch) -> (state, metrics)`.

    Args:
      forward: from `graft` (or anything `graft` takes).
      loss: `loss(outputs, targets)`, an array that is averaged, e.g.
        `optax.softmax_cross_entropy_with_integer_labels`.
      tx: from `growable` (or an optax transformation, which is wrapped).
      probe_every: measure activations and growth gains on the first batch after a tick and every so many batches;
        0 never measures.
      steps: train steps per call; with more than 1 every leaf of `batch` has a leading axis of that size.
      unroll: whether several steps are unrolled instead of scanned; None unrolls convolutional hosts on CPU, where
        XLA is slow at convolutions inside loops.
      donate: give the old state's buffers to the new one; never use the old state again.
      rest_alone: while every planted seed rests, call the program of the host with empty slots, a second one; the seeds
        are then no arguments of it and cost nothing, and a host's bits may differ by rounding from those that it has
        beside seeds. Whether they rest is fetched when a state comes in whose seeds the step has neither seen nor made;
        one that it puts to rest itself, for faults, so counts as resting once somebody has operated on the morph. Not
        within other transformations: under `jit` or `vmap` of one's own the step knows of its seeds. Its two programs
        are those of `step.jitted`.
      unpack: `batch -> (model arguments, targets)`, for batches that are no pair.
      train_kwargs: keyword arguments of the model in training; None finds `train=True` and the like.
      rngs: names of the streams the model draws from; None gives "dropout".
      compute_dtype: cast parameters and floating inputs to this dtype, e.g. `jnp.bfloat16`, for the forward and
        backward pass; master weights, gradients, optimizer state and loss keep their own. None casts nothing.

    Returns:
      The step. `metrics` has float32 scalars (with a leading axis when `steps` > 1): `loss`, `grad_norm` (of the
      host), `skipped` (1 for a batch whose loss or gradient was not finite: it changed nothing), `faults`.
    """
    whole("probe_every", probe_every, 0, INT32)
    whole("steps", steps, 1)
    if unroll is not None:
        flag("unroll", unroll)
    flag("donate", donate)
    flag("rest_alone", rest_alone)
    forward, tx = graft(forward), growable(tx)
    calls = Calls(forward, loss, unpack, train_kwargs, None, rngs, compute_dtype)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        return one_step(calls, tx, sampled(state, probe_every), state, batch)

    def train_steps(state: TrainState, batches: Any) -> tuple[TrainState, dict[str, Array]]:
        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
        slow = jax.default_backend() == "cpu" and convolves(calls, state.morph, first)
        return jax.lax.scan(train_step, state, batches, unroll=steps if (slow if unroll is None else unroll) else 1)

    jitted = jax.jit(train_step if steps == 1 else train_steps, donate_argnums=0 if donate else ())
    return RestAlone(jitted) if rest_alone else jitted


class RestAlone:
    """A jitted train step that leaves the host alone while every planted seed rests; see `make_train_step`.

    `jitted` takes a state and whatever else, and returns the next state and metrics; it may be a `Program`.
    """

    KEPT = 4

    def __init__(self, jitted: Callable[..., tuple[TrainState, dict[str, Array]]]) -> None:
        self.jitted = jitted
        self._seen: tuple[tuple[tuple[SeedState, ...], bool], ...] = ()

    def __call__(self, state: TrainState, *rest: Any) -> tuple[TrainState, dict[str, Array]]:
        """The step, by the program that the seeds need."""
        lives = tuple(state.morph.state.values())
        if state.morph.spec.has_residents and all(concrete(life.stage) for life in lives):
            if self._rest(lives):
                after, metrics = self.jitted(state.alone(), *rest)
                return after.beside(state), metrics
            after, metrics = self.jitted(state, *rest)
            self._note(tuple(after.morph.state.values()), False)  # who asks whether one has faulted out would wait
            return after, metrics
        return self.jitted(state, *rest)

    def _rest(self, lives: tuple[SeedState, ...]) -> bool:
        """Whether none of these computes; fetched for those that no step of the last few has seen or made."""
        for known, rest in self._seen:
            if len(known) == len(lives) and all(map(operator.is_, known, lives)):
                return rest
        rest = not any(np.any(computes(stage)) for stage in jax.device_get([life.stage for life in lives]))
        self._note(lives, rest)
        return rest

    def _note(self, lives: tuple[SeedState, ...], rest: bool) -> None:
        if all(concrete(life.stage) for life in lives):
            self._seen = ((lives, rest), *self._seen[: self.KEPT - 1])

    def __repr__(self) -> str:
        return f"RestAlone({self.jitted!r})"


def sampled(state: TrainState, probe_every: int) -> bool | Bool[Array, ""]:
    """Whether the probes measure on the next batch: the first after a tick, and each so many after it; 0: never."""
    return probe_every > 0 and state.meters.batches % probe_every == 0


def one_step(
    calls: Calls, tx: Growable, sample: bool | Bool[Array, ""], state: TrainState, batch: Any
) -> tuple[TrainState, dict[str, Array]]:
    """One train step, pure: forward, backward, update, seed statistics; a bad batch changes nothing but the count.

    `sample` says whether the probes measure. Where it is False the step knows nothing of them, where it is True it
    measures without a branch, where it is an array the measurements sit in branches of the step.
    """
    morph = state.morph
    key = jax.random.fold_in(state.key, state.step)
    taps = zero_taps(morph)
    if sample is False:
        taps = {path: taps[path] for path in morph.spec.read_at}

    def loss_fn(params: Any, taps: Any) -> tuple[Array, Any]:
        return calls.train(morph.with_params(params), taps, sample, batch, key)

    (loss, collections), (grads, tapped) = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(morph.params, taps)
    squares = squared_norms(grads["host"])
    norm = norm_of(squares)
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)

    def learn(params: Any, others: Any, opt_state: Any, sums: Sums, grads: Any, collections: Any, new: Any) -> Any:
        learnt, after = tx.step(grads, opt_state, morph.with_params(params))
        changed = _collections(morph.with_collections(collections))
        # What was measured goes through this branch too: XLA then knows that the probes have read the parameters by
        # now, and lets the update write over them instead of over a copy.
        add, more = functools.partial(_added, morph.spec), (*new, grads["host"])
        if isinstance(sample, bool):
            sums = add(sums, *more) if sample else sums
        else:
            sums = jax.lax.cond(sample, add, lambda sums, *_: sums, sums, *more)
        return *_like((learnt, changed, after), (params, others, opt_state)), sums

    meters = state.meters
    old = morph.params, _collections(morph), tx.grow(state.opt_state, morph), (meters.stats, meters.gradients)
    measured = {path: tapped[path].stats for path in meters.stats if path in tapped}, squares
    params, others, opt_state, sums = changed_if(ok, learn, old, grads, collections, measured)
    kept = morph.with_params(params).with_collections(others)
    states, faults = observed_states(morph, grads, norm, tapped, ok)
    new = state.replace(
        step=state.step + 1,
        morph=kept.replace(state=states),
        opt_state=opt_state,
        meters=Meters(
            loss=meters.loss + jnp.where(ok, loss, 0),
            batches=meters.batches + 1,
            skipped=meters.skipped + (~ok).astype(jnp.int32),
            stats=sums[0],
            gradients=sums[1],
        ),
    )
    found = {"loss": loss, "grad_norm": norm, "skipped": ~ok, "faults": faults}
    return new, {name: value.astype(jnp.float32) for name, value in found.items()}


Sums = tuple[dict[str, Array], dict[str, Array]]
"""The probes' vectors and the gradients' norms, summed since the tick, by site."""


def _added(spec: Spec, sums: Sums, stats: dict[str, Array], squares: Any, grads: Any) -> Sums:
    def norm(site: Site) -> Array:
        if not site.layers:
            return norm_of(_at(squares, site.path))
        axis = dict(site.geometry)["stack"]
        return jax.vmap(tree_norm, axis)(_at(grads, site.path))

    return (
        {path: total + stats[path] for path, total in sums[0].items()},
        {path: total + norm(spec.by_path[path]) for path, total in sums[1].items()},
    )


def _at(tree: Any, path: str) -> Any:
    for part in split_path(path):
        tree = tree[part]
    return tree


def _collections(morph: Morph) -> dict[str, Any]:
    """The host's mutable collections."""
    return {name: part for name, part in morph.variables.items() if name != "params"}


def _like(new: Any, old: Any) -> Any:
    """The new leaves in the old ones' dtypes."""
    return jax.tree.map(lambda leaf, like: leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype), new, old)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def convolves(calls: Calls, morph: Morph, batch: Any) -> bool:
    """Whether the host's own forward pass holds a convolution, wherever it is."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (morph.alone(), batch))
    jaxpr = jax.make_jaxpr(lambda morph, batch: calls.evaluate(morph, batch)[0])(*shapes)
    return any(equation.primitive.name == "conv_general_dilated" for equation in _equations(jaxpr.jaxpr))


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)
