"""Public calls with arguments that do, for `test_arguments`."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import esper_jax
from esper_jax import (
    CheckpointError,
    FixedSchedule,
    Gates,
    Governor,
    Lifecycle,
    Limits,
    Morph,
    RandomSchedule,
    ReplayController,
    Stage,
    Tamiyo,
    TamiyoClient,
    Tolaria,
    Urza,
    nissa,
)
from esper_jax.kasmina.blueprints import _REGISTRY
from esper_jax.tolaria.dispatch import Dispatch
from tests.kasmina.hosts import in_stage
from tests.tolaria import growing

KEY = jax.random.key(0)


class Net(nn.Module):
    """A host with a span, for inputs of two features, so that `jnp.ones(2)` will do for one."""

    width: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., 2] -> [..., 2]`."""
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(2)(x)


class Block(nn.Module):
    """A residual layer."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        """`[..., 2] -> [..., 2]`."""
        return x + nn.Dense(2, name="out")(x), None


class Deep(nn.Module):
    """Two such layers under `nn.scan`."""

    depth: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., 2] -> [..., 2]`."""
        over = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        found: jax.Array = over(name="blocks")(x, None)[0]
        return found


X, Y = jax.random.normal(KEY, (4, 2)), jnp.arange(4) % 2
HOST = {"Dense_0": {"kernel": jnp.ones((2, 4)), "bias": jnp.zeros(4)}}
HOST |= {"Dense_1": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}
STACK = {"layers": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.zeros((3, 4))}}
MORPH = esper_jax.morph(HOST)
MODEL = {"loss": growing.LOSS, "tx": optax.sgd(0.1)}
GERMINATE = {"morph": MORPH, "key": KEY}
SPAN = ("Dense_0", "Dense_1")
DEEP = esper_jax.morph(Deep().init(KEY, X), model=Deep(), example=X)


def holding(host: Any, site: str) -> Morph:
    """A morph with one seed, in HOLDING."""
    morph = esper_jax.germinate(esper_jax.morph(host), site, "lora", key=KEY)
    for _ in range(3):
        morph = esper_jax.advance(morph, site)
    return morph


HELD = {"morph": holding(HOST, "Dense_0"), "site": "Dense_0", "slot": 0}
HELD_STACK = {"morph": holding(STACK, "layers"), "site": "layers", "slot": 0}
FOSSIL = {**HELD, "morph": in_stage(HELD["morph"], Stage.FOSSILIZED)}
UNITS = in_stage(esper_jax.germinate(**GERMINATE, span=SPAN, blueprint="units"), Stage.FOSSILIZED)
WIDER = {"before": UNITS, "after": esper_jax.fold(UNITS)}
TRAINER = Tolaria(nn.Dense(2), **MODEL, progress=False)
STATE = TRAINER.init({"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, key=KEY).replace(opt_state=())


def fit(epochs: Any) -> None:
    """`Tolaria.fit` as far as its look at `epochs`: what it looks at next is an optimizer state that is none."""
    try:
        TRAINER.fit(STATE, growing.TRAIN, growing.VALIDATION, epochs=epochs)
    except ValueError as error:
        if "optimizer state" not in str(error):
            raise


@functools.wraps(esper_jax.restore_morph)
def restore_morph(*args: Any, **kwargs: Any) -> None:
    """`esper_jax.restore_morph`, for which a directory without a checkpoint is none of these errors."""
    with contextlib.suppress(CheckpointError):
        esper_jax.restore_morph(*args, **kwargs)


@functools.wraps(TRAINER.restore)
def restore(*args: Any, **kwargs: Any) -> None:
    """`Tolaria.restore`, for which a directory without a checkpoint is none of these errors."""
    with contextlib.suppress(CheckpointError):
        TRAINER.restore(*args, **kwargs)


@functools.wraps(esper_jax.register_blueprint)
def register_blueprint(*args: Any, **kwargs: Any) -> None:
    """`esper_jax.register_blueprint`, forgotten again."""
    with mock.patch.dict(_REGISTRY):
        esper_jax.register_blueprint(*args, **kwargs)


RECIPE = {"init": lambda key, site: {"w": jnp.zeros(site.out_shape)}, "apply": lambda params, u: params["w"] * u}
EPOCH = nissa.events.epoch(1, 2, train_loss=1.0, loss=1.0, score=50.0, seconds=0.1)
GOOD: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Tolaria": (Tolaria, {"model": nn.Dense(2), **MODEL}),
    "Tolaria.fit": (fit, {"epochs": 1}),
    "Tolaria.init": (TRAINER.init, {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, "key": KEY}),
    "Tolaria.evaluate": (TRAINER.evaluate, {"state": STATE, "data": growing.VALIDATION}),
    "Tolaria.restore": (restore, {"directory": "nowhere"}),
    "make_train_step": (esper_jax.make_train_step, {"forward": nn.Dense(2), **MODEL}),
    "restore_morph": (restore_morph, {"directory": "nowhere"}),
    "morph": (esper_jax.morph, {"params": HOST}),
    "sites": (esper_jax.sites, {"params": HOST}),
    "unmorph": (esper_jax.unmorph, {"morph": MORPH}),
    "with_seeds_of": (esper_jax.with_seeds_of, {"morph": MORPH}),
    "graft": (esper_jax.graft, {"apply": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}),
    "germinate": (esper_jax.germinate, {**GERMINATE, "site": "Dense_0", "blueprint": "lora"}),
    "germinate in a span": (esper_jax.germinate, {**GERMINATE, "span": SPAN, "blueprint": "units"}),
    "advance": (esper_jax.advance, HELD),
    "advance in a stack": (esper_jax.advance, HELD_STACK),
    "set_alpha": (esper_jax.set_alpha, {**HELD, "alpha": 0.5}),
    "prune": (esper_jax.prune, HELD),
    "fossilize": (esper_jax.fossilize, HELD),
    "unload": (esper_jax.unload, HELD),
    "silence": (esper_jax.silence, HELD),
    "silence in a stack": (esper_jax.silence, HELD_STACK),
    "seed_of": (esper_jax.seed_of, HELD),
    "tick": (esper_jax.tick, {"morph": HELD["morph"]}),
    "shed": (esper_jax.shed, {"morph": HELD["morph"]}),
    "observe": (esper_jax.observe, {"morph": HELD["morph"], "grads": HELD["morph"].params}),
    "contributions": (esper_jax.contributions, {"morph": HELD["morph"], "score": lambda morph: 0.5}),
    "fold": (esper_jax.fold, {**FOSSIL, "model": Net(), "example": X}),
    "foldable": (esper_jax.foldable, {"morph": FOSSIL["morph"]}),
    "compact": (esper_jax.compact, {"model": Net(), "morph": FOSSIL["morph"]}),
    "sizes_changed": (esper_jax.sizes_changed, WIDER),
    "widened": (esper_jax.widened, {"model": Net(), **WIDER, "example": X}),
    "stack": (esper_jax.stack, {"morph": HELD_STACK["morph"], "zero": "layers"}),
    "stack with a model": (esper_jax.stack, {"morph": DEEP, "model": Deep(), "example": X}),
    "spans": (esper_jax.spans, {"model": Net(), "morph": MORPH, "example": X}),
    "growth_scores": (
        esper_jax.growth_scores,
        {"morph": MORPH, "batch": (X, Y), "loss": growing.LOSS, "forward": Net(), "spans": [SPAN]},
    ),
    "summary": (esper_jax.summary, {"morph": MORPH, "health": {"Dense_0": 0.5}}),
    "blueprints": (esper_jax.blueprints, {"site": MORPH.spec.sites[0]}),
    "compare": (esper_jax.compare, {"model": Net(), "morph": MORPH, "x": X, "repeats": 1}),
    "register_blueprint": (register_blueprint, {"name": "of a test", **RECIPE}),
    "register_blueprint of a module": (
        register_blueprint,
        {"name": "of a test", "module": lambda site: nn.Dense(site.out_features), "reads": "input", "kinds": "dense"},
    ),
    "growable": (esper_jax.growable, {"tx": optax.sgd(0.1)}),
    "Gates": (Gates, {}),
    "Lifecycle": (Lifecycle, {}),
    "Governor": (Governor, {}),
    "Limits": (Limits, {}),
    "Dispatch": (Dispatch, {}),
    "Tamiyo": (Tamiyo, {}),
    "Urza": (Urza, {"url": "memory://arguments"}),
    "TamiyoClient": (TamiyoClient, {"url": "http://127.0.0.1:9"}),
    "RandomSchedule": (RandomSchedule, {}),
    "FixedSchedule": (FixedSchedule, {"plan": {}}),
    "ReplayController": (ReplayController, {"events": [EPOCH]}),
    "JsonlSink": (nissa.JsonlSink, {"path": "events.jsonl"}),
    "Fanout": (nissa.Fanout, {"sinks": [nissa.ListSink()]}),
    "Console": (nissa.Console, {"epochs": 1}),
    "Background": (nissa.Background, {"sink": nissa.ListSink()}),
}
"""By name: a public call, and arguments that do."""
OPTIONAL: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "TensorBoardSink": ("tensorboardX", nissa.TensorBoardSink, {"directory": "board"}),
    "PrometheusSink": ("prometheus_client", nissa.PrometheusSink, {}),
    "WandbSink": ("wandb", nissa.WandbSink, {"project": "growing"}),
}
"""Likewise, with the module that each needs."""
GOOD |= {name: tuple(call) for name, (module, *call) in OPTIONAL.items() if importlib.util.find_spec(module)}
CASES = [
    (call, name)
    for call, (function, _) in GOOD.items()
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
]
