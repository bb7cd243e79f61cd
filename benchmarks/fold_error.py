"""What folding costs in exactness: logits of folded and of grown network, per kind of layer, seed and dtype; and FLOPs.

All dtypes are measured in one run; `--rounds` are the draws of weights, seeds and data, `--models` the cases.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from common import Column, Report, begin, parser

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.summary import flops

DTYPES = {
    "float32": ("float32", "float32"),
    "bfloat16 compute": ("bfloat16", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
}
"""Name: dtype to compute in, dtype of the weights."""
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], str]] = {
    "dense": (lambda n, **d: nn.Dense(n, **d), (), "layer$"),
    "dense_general": (lambda n, **d: nn.DenseGeneral((4, n // 4), **d), (8,), "layer$"),
    "einsum": (lambda n, **d: nn.Einsum((n, 4, n // 4), "...i,iho->...ho", **d), (8,), "layer$"),
    "conv": (lambda n, **d: nn.Conv(n, (3, 3), **d), (8, 8), "layer$"),
    "conv_transpose": (lambda n, **d: nn.ConvTranspose(n, (3, 3), strides=(2, 2), **d), (8, 8), "layer$"),
    "embed": (lambda n, **d: nn.Embed(1000, n, **d), (8,), "layer$"),
    "attention out": (lambda n, **d: nn.MultiHeadDotProductAttention(4, **d), (8,), "layer/out$"),
    "attention query": (lambda n, **d: nn.MultiHeadDotProductAttention(4, **d), (8,), "layer/query$"),
    "layer_norm": (lambda n, **d: nn.LayerNorm(**d), (8,), "layer$"),
    "rms_norm": (lambda n, **d: nn.RMSNorm(**d), (8,), "layer$"),
    "group_norm": (lambda n, **d: nn.GroupNorm(4, **d), (8, 8), "layer$"),
    "batch_norm": (lambda n, **d: nn.BatchNorm(use_running_average=True, **d), (8, 8), "layer$"),
}
CASES = {
    f"{name}, {blueprint}": (name, blueprint)
    for name in LAYERS
    for blueprint in ("lora", "affine")
    if not (name.endswith("norm") and blueprint == "lora")
} | {"dense, units": ("span", "units")}
COLUMNS = (
    Column("case", "layer, seed"),
    Column("dtype", "dtype"),
    Column("share", "seed's share", "percent"),
    Column("folded", "folded to grown", "number"),
    Column("grown", "grown to float32", "number"),
    Column("exact", "folded to float32", "number"),
    Column("same", "FLOPs of plain host", "yes"),
)


class Host(nn.Module):
    """A layer between two others; `features` wide."""

    make: Callable[..., nn.Module]
    features: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        forms = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = nn.tanh(nn.Dense(self.features, name="first", **forms)(x))
        x = nn.tanh(self.make(self.features, name="layer", **forms)(x))
        return nn.DenseGeneral(10, axis=tuple(range(1, x.ndim)), name="logits", **forms)(x)


class Wide(nn.Module):
    """Two dense layers whose width is a field, so that `widened` can change it."""

    hidden: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        forms = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(10, name="last", **forms)(nn.gelu(nn.Dense(self.hidden, name="layer", **forms)(x)))


def case(name: str, features: int, dtype: str, param_dtype: str) -> tuple[nn.Module, jax.Array]:
    """A model and its example input, `float32 [8, ..., features]` or ids."""
    if name == "span":
        return Wide(features, dtype, param_dtype), jnp.zeros((8, features))
    make, extra, _ = LAYERS[name]
    x = jnp.zeros((8, *extra), jnp.int32) if name == "embed" else jnp.zeros((8, *extra, features))
    return Host(make, features, dtype, param_dtype), x


def planted(model: nn.Module, name: str, blueprint: str, x: jax.Array, param_dtype: str) -> esper_jax.Morph:
    """The model's morph with one seed, statistics of a norm away from their start."""
    variables = dict(jax.jit(model.init)(jax.random.key(0), x))
    move = lambda leaf: leaf * (1 + jax.random.uniform(jax.random.key(1), leaf.shape))  # noqa: E731
    variables.update({part: jax.tree.map(move, variables[part]) for part in variables if part != "params"})
    if name == "span":
        morph = esper_jax.morph(variables, model=model, example=x)
        return esper_jax.germinate(
            morph, span=("layer", "last"), blueprint="units", units=8, activation="gelu", key=jax.random.key(0)
        )
    morph = esper_jax.morph(variables, where=LAYERS[name][2], model=model, example=x)
    (site,) = (site.path for site in morph.spec.sites)
    bias = "bias" in jax.tree.reduce(lambda a, b: a, _at(variables["params"], site), is_leaf=lambda n: n is not None)
    config = {"rank": 4} if blueprint == "lora" else {"bias": bias}
    return esper_jax.germinate(morph, site, blueprint, key=jax.random.key(0), **config)


def _at(params: Any, site: str) -> Any:
    for part in site.split("/"):
        params = params[part]
    return params


def in_stage(morph: esper_jax.Morph, stage: Stage) -> esper_jax.Morph:
    """The morph with its one seed in a stage; FOSSILIZED at alpha 1, else 0."""
    (plant,) = morph.spec.plants
    life = morph.state[plant.site]
    alpha = float(stage == Stage.FOSSILIZED)
    life = life.replace(stage=life.stage.at[plant.slot].set(stage), alpha=life.alpha.at[plant.slot].set(alpha))
    return morph.replace(state={**morph.state, plant.site: life})


@jax.jit
def drawn(morph: esper_jax.Morph, key: jax.Array) -> esper_jax.Morph:
    """The morph with other weights: the host's moved a little, the seed's about as strong as its layer."""

    def moved(leaf: jax.Array, key: jax.Array, size: float) -> jax.Array:
        return leaf + size * jax.random.normal(key, leaf.shape, leaf.dtype)

    host, seeds = jax.tree.flatten(morph.params["host"]), jax.tree.flatten(morph.seeds)
    keys = jax.random.split(key, len(host[0]) + len(seeds[0]))
    fans = [float(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 10.0 for leaf in seeds[0]]
    own = [moved(leaf, k, 0.02) for leaf, k in zip(host[0], keys, strict=False)]
    new = [moved(leaf, k, f**-0.5) for leaf, k, f in zip(seeds[0], keys[len(own) :], fans, strict=True)]
    return morph.with_params({"host": jax.tree.unflatten(host[1], own), "seeds": jax.tree.unflatten(seeds[1], new)})


def distance(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest magnitude of `b`."""
    a, b = np.float64(a), np.float64(b)
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def measure(title: str, dtype: str, features: int, draws: int, seed: int) -> dict[str, Any]:
    """One row: the worst of all draws."""
    name, blueprint = CASES[title]
    compute, weights = DTYPES[dtype]
    model, x = case(name, features, compute, weights)
    exact_model, _ = case(name, features, "float32", "float32")
    morph = planted(model, name, blueprint, x, weights)
    exact = planted(exact_model, name, blueprint, x, "float32")
    forward, reference = jax.jit(esper_jax.graft(model)), jax.jit(esper_jax.graft(exact_model))
    wide = lambda leaf: leaf.astype(jnp.float32)  # noqa: E731
    found: dict[str, list[float]] = {"share": [], "folded": [], "grown": [], "exact": []}
    program = None
    for draw in range(draws):
        key, other = jax.random.split(jax.random.fold_in(jax.random.key(seed), draw))
        one = in_stage(drawn(morph, key), Stage.FOSSILIZED)
        if x.dtype == jnp.int32:
            data = jax.random.randint(other, x.shape, 0, 1000)
        else:
            data = jax.random.normal(other, x.shape)
        alike = exact.with_params(jax.tree.map(wide, one.params)).replace(state=one.state)
        if "batch_stats" in one.variables:
            alike = alike.replace(host={**alike.host, "batch_stats": one.variables["batch_stats"]})
        grown, true = forward(one, data), reference(alike, data)
        host = forward(in_stage(one, Stage.DORMANT), data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a seed that is left in place is no measurement
            folded = esper_jax.fold(one)
        if program is None:
            run = esper_jax.widened(model, one, folded, x) if name == "span" else model
            program = jax.jit(run.apply).lower(esper_jax.unmorph(folded), x).compile()
            plain = jax.jit(run.apply).lower(jax.jit(run.init)(jax.random.key(0), x), x).compile()
            grafted = jax.jit(esper_jax.graft(run)).lower(folded, x).compile()
        after = program(esper_jax.unmorph(folded), data)
        found["share"].append(distance(host, grown))
        found["folded"].append(distance(after, grown))
        found["grown"].append(distance(grown, true))
        found["exact"].append(distance(after, true))
    same = flops(program) == flops(plain) == flops(grafted)
    worst = {key: max(values) for key, values in found.items() if key != "share"}
    return {"case": title, "dtype": dtype, "share": float(np.median(found["share"])), **worst, "same": same}


def main() -> None:
    """Measure every case in every dtype."""
    made = parser(__doc__ or "", rounds=16, models=tuple(CASES))
    args = begin(made)
    report = Report("fold_error", __doc__ or "", args)
    features = max(8, 4 * round(32 * args.scale))
    for dtype in DTYPES:
        rows = [measure(title, dtype, features, args.rounds, args.seed) for title in args.models]
        report.table(
            f"{dtype}, {features} features",
            COLUMNS,
            rows,
            "Errors are the largest of all draws and logits, relative to the largest logit; the share is the median.",
            f"Worst: {max(row['folded'] for row in rows):.3g} from folded to grown network.",
        )
    report.finish()


if __name__ == "__main__":
    main()
