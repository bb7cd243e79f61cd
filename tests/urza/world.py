"""Seeds to store, made without training, for tests of the library."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import esper_jax
from esper_jax import Morph, Site, Stage
from esper_jax.kasmina.blueprints import get_blueprint, make_plant, registered, seed_shapes
from esper_jax.urza import StoredSeed

SITES = {
    "dense": Site("block/Dense_0", "dense", (6,), (5,)),
    "conv": Site("Conv_0", "conv", (3,), (8,), spatial=2),
    "norm": Site("LayerNorm_0", "layer_norm", (6,), (6,)),
    "attention": Site("Attention_0", "attention", (8,), (8,)),
}


def stored(
    blueprint: str = "lora", site: Site = SITES["dense"], *, seed: int = 0, blend: str = "add", **config: Any
) -> StoredSeed:
    """A seed of a blueprint whose parameters are all different from zero."""
    plant = make_plant(site, 0, blueprint, config, blend, resident=False)
    noise = np.random.default_rng(seed)
    made = lambda leaf: noise.normal(size=leaf.shape).astype(leaf.dtype)  # noqa: E731
    params = jax.tree.map(made, seed_shapes(plant, site))
    reads = get_blueprint(blueprint).reads
    return StoredSeed(blueprint, dict(plant.config), blend, reads, site, (), params=params)


def by_hand(number: int, **fields: Any) -> StoredSeed:
    """A seed of a blueprint that nobody knows, made of numpy alone."""
    params = {"down": np.full((3, 4), number, np.float32), "up": [np.arange(4, dtype=np.float32) + number]}
    made = {"blueprint": "nobody's", "config": {"number": number}, "blend": "add", "reads": "input"}
    return StoredSeed(**{**made, "site": SITES["dense"], "arrays": (), "params": params, **fields})


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure, dtypes, shapes and bytes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True)
    return all(p.shape == q.shape and p.dtype == q.dtype and p.tobytes() == q.tobytes() for p, q in pairs)


def host_params(width: int = 6) -> dict[str, Any]:
    """Two dense layers, 4 > width > 3."""
    kernel = lambda i, o: np.random.default_rng(i).normal(size=(i, o)).astype(np.float32)  # noqa: E731
    return {
        "Dense_0": {"kernel": jnp.asarray(kernel(4, width)), "bias": jnp.zeros(width)},
        "Dense_1": {"kernel": jnp.asarray(kernel(width, 3)), "bias": jnp.zeros(3)},
    }


@functools.cache
def holding(blueprint: str = "lora", stage: Stage = Stage.HOLDING, contribution: float = 2.5) -> Morph:
    """A morph with one seed at Dense_0 in some stage, its parameters not zero."""
    morph = esper_jax.morph(host_params(), slots=2)
    morph = esper_jax.germinate(morph, "Dense_0", blueprint, key=jax.random.key(1))
    seeds = jax.tree.map(lambda leaf: leaf + 0.25, morph.seeds)
    life = morph.state["Dense_0"]
    one = lambda field, value: field.at[0].set(value)  # noqa: E731
    life = life.replace(
        stage=one(life.stage, int(stage)), alpha=one(life.alpha, 1.0), contribution=one(life.contribution, contribution)
    )
    return morph.replace(seeds=seeds, state={"Dense_0": life})


OWN = tuple(b for b in registered() if b.init.__module__.startswith("esper_jax."))
"""The library's own blueprints, whatever other tests have registered."""

FITTING = [(b.name, kind) for b in OWN for kind, site in SITES.items() if b.fits(site)]
