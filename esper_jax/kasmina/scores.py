"""Growth scores: where the loss falls fastest to first order if something grows, and in which direction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import function, inputs, pairs, whole
from ._pytree import Struct, pytree
from .bank import Bank
from .blueprints import CONVS, DENSE, make_plant, seed_shapes
from .graft import Graft, graft
from .layout import host_arrays
from .morph import Morph, check_morph
from .seeds.units import UNIT_ACTIVATIONS
from .spec import Plant, Site
from .state import blends
from .summary import Table, align

INITS = ("gradmax", "tiny", "best")
RANK, EXTRA, POWERS = 4, 8, 2
SMALL = 512
CANDIDATES, ASCENT, RATE = 64, 40, 0.3
RIDGE = 1e-3


@pytree
class Score(Struct):
    """What one place gains, of M = (layer input)^T (gradient at the layer's output), mean over the batch.

    `gain` is |M|^2, the first-order decrease of the loss per unit of learning rate of a new zero linear layer there;
    `values` [r] the largest singular values of M, `enter` [I, r] and `leave` [r, O] the vectors that go with them.
    A span also has `inputs` [N, I] and `gradients` [N, O] of a sample of rows, for its inits, and `length`, the root
    mean square length of the first layer's weights into a unit.
    """

    gain: Any
    values: Any
    enter: Any
    leave: Any
    inputs: Any = None
    gradients: Any = None
    length: Any = None


class GrowthScores(dict[Any, Score]):
    """`{site or (first, second): Score}`, best first. Its repr is a table."""

    def __repr__(self) -> str:
        name = lambda place: place if isinstance(place, str) else " -> ".join(place)  # noqa: E731
        rows = [
            (name(place), f"{float(score.gain):.4g}", ", ".join(f"{value:.3g}" for value in np.asarray(score.values)))
            for place, score in self.items()
        ]
        return str(Table(align(("place", "gain", "singular values"), rows)))


def growth_scores(
    morph: Morph,
    batch: tuple[Any, Any],
    loss: Callable[[Any, Any], Array],
    *,
    forward: Any,
    spans: Sequence[tuple[str, str]] = (),
    rank: int = RANK,
    **kwargs: Any,
) -> GrowthScores:
    """Score every place where something can grow, in one compiled pass over a batch.

    At each dense layer, convolution and embedding an imaginary zero linear layer stands beside the host's own; the
    gradient of the loss with respect to it is M. Seeds that are part of the output are. Singular values of matrices
    larger than 512 come from a randomised power iteration (Halko et al., SIAM Review 2011).

    Args:
      morph: the morph.
      batch: `(inputs, targets)`; inputs an array or a tuple of arguments.
      loss: `loss(outputs, targets)`, an array that is averaged.
      forward: the graft, or what `graft` takes.
      spans: pairs of dense layers to score as well, as `Span.ends` gives them.
      rank: how many singular values and vectors to give.
      **kwargs: keyword arguments of the call; none calls the model in evaluation mode.

    Returns:
      A `GrowthScores`, the highest gain first (under a trace, in order of path). Stacked layers are not scored.

    Raises:
      TypeError: `morph` is no `Morph`, or an argument of another kind than the above. KeyError: a span between unknown
      sites.
    """
    check_morph(morph, "growth_scores")
    forward = graft(forward)
    function("loss", loss, "optax.softmax_cross_entropy_with_integer_labels")
    spans = pairs("spans", spans, '[("Dense_0", "Dense_1")]')
    whole("rank", rank, 1)
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"growth_scores() needs a batch (inputs, targets), got {type(batch).__name__}")
    args = inputs("the inputs of batch", batch[0])
    options = tuple(sorted({**forward.mode(False), **kwargs}.items()))
    probes = _probes(morph, spans)
    found = _scored(forward, loss, probes, rank, options, morph, args, batch[1])
    places = [(plant.source, plant.site) if plant.source else plant.site for plant in probes]
    ranked = list(zip(places, found, strict=True))
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(found)):
        ranked.sort(key=lambda entry: -float(entry[1].gain))
    return GrowthScores(ranked)


def _probes(morph: Morph, spans: Sequence[tuple[str, str]]) -> tuple[Plant, ...]:
    spec, plants = morph.spec, []
    for site in spec.sites:
        known = site.kind in (*DENSE, "embed") or (site.kind in CONVS and "kernel_size" in dict(site.geometry))
        if known and not site.layers and not dict(site.geometry).get("transpose_kernel"):
            plants.append(make_plant(site, spec.slots, "linear", {}, "add", False))
    for index, (first, second) in enumerate(spans):
        ends = [path for path in (first, second) if path not in spec.by_path]
        if ends:
            raise KeyError(f"unknown site {ends[0]!r} in spans; this morph has: {', '.join(spec.by_path)}")
        place = spec.place(Plant(second, 0, "", source=first))
        plants.append(make_plant(place, spec.slots + 1 + index, "linear", {}, "add", False, first))
    return tuple(plants)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _scored(
    forward: Graft,
    loss: Callable[[Any, Any], Array],
    probes: tuple[Plant, ...],
    rank: int,
    options: tuple[Any, ...],
    morph: Morph,
    inputs: tuple[Any, ...],
    targets: Any,
) -> list[Score]:
    spec = morph.spec
    zeros = {f"{plant.site} {plant.key}": _zeros(plant, spec.place(plant)) for plant in probes}
    sources = {plant.source for plant in probes if plant.source}
    ends = {plant.site for plant in probes if plant.source}
    given: dict[str, Any] = {}
    made: dict[str, Any] = {}

    def value(zeros: Mapping[str, Any], spies: Mapping[str, Array], shifts: Mapping[str, Array]) -> Array:
        def note(path: str, u: Array, h: Array) -> Array:
            given.setdefault(path, jax.ShapeDtypeStruct(u.shape, u.dtype))
            made.setdefault(path, jax.ShapeDtypeStruct(h.shape, h.dtype))
            h = _spied(h, u, spies[path]) if path in spies else h
            return h + shifts[path] if path in shifts else h

        banks = {site.path: _bank(morph, site, probes, zeros, sources, note) for site in spec.sites}
        found = {path: bank for path, bank in banks.items() if bank.plants or path in sources}
        outputs = forward.baked(morph.variables, found, *inputs, **dict(options))
        if outputs is None:
            raise TypeError(f"forward must give outputs for the loss, {forward} gave None")
        lost = loss(outputs, targets)
        if not hasattr(lost, "astype"):
            raise TypeError(f"loss must give an array, it gave {lost!r}")
        return jnp.mean(lost.astype(jnp.float32))

    jax.eval_shape(value, zeros, {}, {})
    blank = lambda known, paths: {path: jnp.zeros(known[path].shape, known[path].dtype) for path in paths}  # noqa: E731
    grads, seen, signal = jax.grad(value, (0, 1, 2))(zeros, blank(given, sources), blank(made, ends))
    scores = []
    for plant in probes:
        (kernel,) = jax.tree.leaves(grads[f"{plant.site} {plant.key}"])
        score = _decomposed(kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32), rank)
        if plant.source:
            rows = lambda x: x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # noqa: E731
            length = _length(morph, spec.by_path[plant.source])
            score = score.replace(inputs=rows(seen[plant.source]), gradients=rows(signal[plant.site]), length=length)
        scores.append(score)
    return scores


@jax.custom_vjp
def _spied(h: Array, u: Array, zero: Array) -> Array:
    """`h` itself; the gradient of `zero` is `u`, from inside of whatever transform."""
    return h


_spied.defvjp(lambda h, u, zero: (h, u), lambda u, cotangent: (cotangent, jnp.zeros_like(u), u))


def _bank(
    morph: Morph, site: Site, probes: tuple[Plant, ...], zeros: Mapping[str, Any], sources: set[str], note: Any
) -> Bank:
    """A site's seeds as they are in the output, and the zero layers that are asked for there."""
    spec, path = morph.spec, site.path
    own = spec.planted_at.get(path, ())
    asked = tuple(plant for plant in probes if plant.site == path)
    seeds = {plant.key: morph.seeds[path][plant.key] for plant in own}
    alphas: dict[str, Any] = {}
    for plant in own:
        state = morph.state[path]
        alphas[plant.key] = jnp.where(blends(state.stage), state.alpha, 0.0)[..., plant.slot]
    for plant in asked:
        seeds[plant.key], alphas[plant.key] = zeros[f"{path} {plant.key}"], jnp.ones(())
    plants = (*own, *asked)
    read = path in sources or any(plant.source == path for plant in spec.plants)
    places = tuple(map(spec.place, plants))
    return Bank(seeds, None, None, None, site, plants, alphas, (), places, read, None if site.layers else note)


def _zeros(plant: Plant, place: Site) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), seed_shapes(plant, place))


def _length(morph: Morph, site: Site) -> Array:
    kernel = host_arrays(morph.params["host"], site)["kernel"].astype(jnp.float32)
    return jnp.sqrt(jnp.mean(jnp.sum(jnp.square(kernel.reshape(-1, site.out_features)), 0)))


def _decomposed(matrix: Float[Array, "I O"], rank: int) -> Score:
    """The gain and the leading singular values and vectors of a matrix."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) > SMALL:
        block = jax.random.normal(jax.random.key(0), (matrix.shape[1], rank + EXTRA))
        for _ in range(POWERS + 1):
            basis, _ = jnp.linalg.qr(matrix @ block)
            block = matrix.T @ basis
        enter, values, leave = jnp.linalg.svd(block.T, full_matrices=False)
        enter = basis @ enter
    else:
        enter, values, leave = jnp.linalg.svd(matrix, full_matrices=False)
    return Score(jnp.sum(jnp.square(matrix)), values[:rank], enter[:, :rank], leave[:rank])


def unit_params(score: Score, plant: Plant, place: Site, init: str, key: Array) -> dict[str, Array]:
    """Parameters of a `units` seed of a dense span by one of `INITS`; what leaves the units is zero.

    "gradmax": the directions of M's singular vectors, each with both signs (its dual form: a relu has no gradient at 0,
    so what enters a unit may not be zero where what leaves it is). "tiny": those of M whitened by the inputs'
    covariance (Verbockhaven et al., TMLR 2024), the ones whose best response decreases the loss most. "best": what
    the activation itself makes of a direction is climbed from these and from random ones, each unit on the part of
    the gradient that those before it have left.

    Raises:
      ValueError: an unknown init, or a place that no dense span's score tells of.
    """
    config = dict(plant.config)
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}; choose one of {', '.join(INITS)}")
    if plant.blueprint != "units" or score.inputs is None or place.spatial:
        raise ValueError(
            f"init={init!r} is for units in a span of dense layers that growth_scores(spans=...) has scored"
        )
    directions = _directions(init, config["units"], config["activation"], score, key)
    enter = directions * score.length
    params = {"enter": enter.astype(place.dtype)}
    params["leave"] = jnp.zeros((config["units"], place.out_features), place.dtype)
    return {**params, "bias": jnp.zeros((config["units"],), place.dtype)} if config["bias"] else params


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _directions(init: str, units: int, activation: str, score: Score, key: Array) -> Float[Array, "I K"]:
    """Unit directions, a column each."""
    inputs, gradients = score.inputs, score.gradients
    function = UNIT_ACTIVATIONS[activation]
    matrix = inputs.T @ gradients
    if init == "gradmax":
        return _signed(jnp.linalg.svd(matrix, full_matrices=False)[0], units)
    covariance = inputs.T @ inputs / inputs.shape[0]
    spectrum, vectors = jnp.linalg.eigh(covariance)
    root = vectors * jax.lax.rsqrt(jnp.maximum(spectrum, RIDGE * spectrum[-1])) @ vectors.T
    white = root @ jnp.linalg.svd(root @ matrix, full_matrices=False)[0]
    white = white / jnp.linalg.norm(white, axis=0)
    if init == "tiny":
        return _signed(white, units)

    def gain(direction: Array, left: Array) -> Array:
        """The decrease of the loss that the unit's best response gives, to second order in it."""
        hidden = function(inputs @ (direction / jnp.linalg.norm(direction)))
        response = hidden @ left
        return jnp.sum(jnp.square(response)) / (jnp.sum(jnp.square(hidden)) + 1e-12)

    def climb(direction: Array, left: Array) -> Array:
        def step(_: int, v: Array) -> Array:
            slope = jax.grad(gain)(v, left)
            v = v + RATE * slope / (jnp.linalg.norm(slope) + 1e-12)
            return v / jnp.linalg.norm(v)

        return jax.lax.fori_loop(0, ASCENT, step, direction / jnp.linalg.norm(direction))

    chosen, left = [], gradients
    for unit in range(units):
        random = jax.random.normal(jax.random.fold_in(key, unit), (CANDIDATES, inputs.shape[1]))
        first = root @ jnp.linalg.svd(root @ inputs.T @ left, full_matrices=False)[0][:, :RANK]
        starts = jnp.concatenate([first.T, -first.T, random])
        climbed = jax.vmap(climb, (0, None))(starts, left)
        best = climbed[jnp.argmax(jax.vmap(gain, (0, None))(climbed, left))]
        hidden = function(inputs @ best)
        left = left - jnp.outer(hidden, hidden @ left) / (jnp.sum(jnp.square(hidden)) + 1e-12)
        chosen.append(best)
    return jnp.stack(chosen, 1)


def _signed(vectors: Float[Array, "I R"], units: int) -> Float[Array, "I K"]:
    """The first vectors with both signs in turn, over again where there are more units than those."""
    both = jnp.stack([vectors, -vectors], 2).reshape(vectors.shape[0], -1)
    return both[:, jnp.arange(units) % both.shape[1]]
