"""Three small hosts and what tests do to them: an MLP, a CNN with BatchNorm, a transformer with `nn.remat`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.blueprints import make_plant, registered, seed_init
from esper_jax.kasmina.morph import Morph, with_spec

BLENDS = ("add", "lerp", "multiply", "gate")
SMALL = {"lora": {"rank": 2}, "mlp": {"hidden": 4}}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(3)(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class Block(nn.Module):
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, deterministic=self.deterministic)(h)
        h = nn.gelu(nn.Dense(8)(nn.LayerNorm()(x)))
        return x + nn.Dropout(0.3, deterministic=self.deterministic)(nn.Dense(4)(h))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4)(x)
        for _ in range(2):
            x = nn.remat(Block)(deterministic=not train)(x)
        return nn.Dense(3)(x.mean(1))


@dataclasses.dataclass(frozen=True)
class Host:
    """A model with variables, a batch and labels. `where` names the sites that tests plant."""

    model: nn.Module
    variables: Any
    x: jax.Array
    y: jax.Array
    where: str

    def call_kwargs(self, train: bool) -> dict[str, Any]:
        known = {} if isinstance(self.model, MLP) else {"train": train}
        return {**known, "rngs": {"dropout": jax.random.key(7)}, "mutable": ["batch_stats"] if train else False}

    def loss(self, apply: Any, variables: Any, x: jax.Array, train: bool = True) -> tuple[jax.Array, Any]:
        """Cross entropy and `(logits, new batch_stats)`, by whichever `apply` on whichever variables."""
        out = apply(variables, x, **self.call_kwargs(train))
        logits, updated = out if train else (out, {})
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), self.y[:, None], 1)), (logits, updated)


@functools.cache
def host(name: str) -> Host:
    """One of `mlp`, `cnn`, `transformer`, made once."""
    model, shape, where = {
        "mlp": (MLP(), (8, 4), "Dense"),
        "cnn": (CNN(), (4, 6, 6, 2), "Conv_1|BatchNorm"),
        "transformer": (Transformer(), (4, 5, 3), r"Block_0/(Dense_0|LayerNorm_1|MultiHead\w+)$"),
    }[name]
    x = jax.random.normal(jax.random.key(1), shape)
    variables = jax.jit(model.init)({"params": jax.random.key(0), "dropout": jax.random.key(2)}, x)
    return Host(model, variables, x, jnp.arange(shape[0]) % 3, where)


HOSTS = ("mlp", "cnn", "transformer")


def fitting(site: esper_jax.Site) -> list[str]:
    """The library's own blueprints for a site."""
    own = ("bottleneck", "conv_light", "depthwise", "lora", "mlp", "norm", "se")
    return [b.name for b in registered() if b.name in own and b.fits(site)]


@functools.cache
def grown(name: str, resident: bool, slots: int = 2) -> Morph:
    """The host with `slots` seeds at each chosen site, of all blueprints and blends in turn, GERMINATED with noise."""
    given = host(name)
    morph = esper_jax.morph(given.variables, where=given.where, slots=slots, model=given.model, example=given.x)
    spec = morph.spec
    for i, site in enumerate(spec.sites):
        names = fitting(site)
        for slot in range(slots):
            blueprint, blend = names[(i + slot) % len(names)], BLENDS[(i + slot * 2 + i // 2) % 4]
            spec = spec.with_plant(make_plant(site, slot, blueprint, SMALL.get(blueprint, {}), blend, resident))
    return noisy(with_spec(morph, spec), 5)


def noisy(morph: Morph, seed: int) -> Morph:
    """The morph with noise for seed parameters, so that no seed is zero."""
    return morph.replace(seeds=stirred(jax.tree.map(np.zeros_like, morph.seeds), 0.4, seed))


def stirred(tree: Any, size: float, seed: int = 0) -> Any:
    """The arrays with noise on them, as if they had been trained: none of them is zero. (Nothing is compiled.)"""
    rng = np.random.default_rng(seed)
    moved = lambda leaf: np.asarray(leaf, np.float32) + size * rng.normal(size=leaf.shape)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.asarray(moved(leaf).astype(leaf.dtype)), tree)


@jax.jit
def born(morph: Morph, seed: int) -> Morph:
    """The morph with all its seeds as they are at germination."""
    plants = enumerate(morph.spec.plants)
    keys = {(p.site, p.key): jax.random.fold_in(jax.random.key(seed), i) for i, p in plants}
    fresh = {
        path: {p.key: seed_init(p, morph.spec.place(p), keys[path, p.key]) for p in planted}
        for path, planted in morph.spec.planted_at.items()
    }
    return morph.replace(seeds=fresh)


def in_stage(morph: Morph, stage: Any, alpha: Any = None) -> Morph:
    """All seeds in a stage, or those of `{(site, slot): (stage, alpha)}`; alpha defaults to what the stage implies."""
    state = {}
    for path, plants in morph.spec.planted_at.items():
        stages, alphas = np.array(morph.state[path].stage), np.array(morph.state[path].alpha)
        for plant in plants:
            default = 1.0 if stage in (Stage.HOLDING, Stage.FOSSILIZED) else 0.0
            wanted = (
                (stage, default if alpha is None else alpha)
                if not isinstance(stage, dict)
                else (stage.get((path, plant.slot)))
            )
            if wanted is not None:
                stages[..., plant.slot], alphas[..., plant.slot] = wanted
        state[path] = morph.state[path].replace(stage=jnp.asarray(stages), alpha=jnp.asarray(alphas))
    return morph.replace(state=state)


def poisoned(morph: Morph, value: float, only: Any = None) -> Morph:
    """All seed parameters (or those of the slots in `only`) replaced by `value`."""
    seeds = {
        path: {
            key: tree
            if only is not None and (path, int(key[-1])) not in only
            else jax.tree.map(lambda v: v * 0 + value, tree)
            for key, tree in slots.items()
        }
        for path, slots in morph.seeds.items()
    }
    return morph.replace(seeds=seeds)


@functools.cache
def compiled_step(name: str) -> Any:
    """`step(morph) -> (host side, seed gradients)`, jitted once: loss, logits, batch_stats and host gradients."""
    given = host(name)
    forward = esper_jax.graft(given.model)

    @jax.jit
    def step(morph: Morph) -> tuple[Any, Any]:
        (loss, (logits, updated)), grads = jax.value_and_grad(
            lambda params: given.loss(forward, morph.with_params(params), given.x), has_aux=True
        )(morph.params)
        return (loss, logits, updated, grads["host"]), grads["seeds"]

    return step


def slot_norm(grads: Any, path: str, slot: int) -> float:
    """The norm of one seed's gradient."""
    return float(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads[path][f"slot_{slot}"]))) ** 0.5


def all_finite(tree: Any) -> bool:
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))
