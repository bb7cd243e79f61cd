"""Every public call refuses what it cannot take in its own words, naming what was given, before anything is done."""

from __future__ import annotations

import inspect
import pathlib
import traceback
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import esper_jax as ej

PATHS = ("checkpoint_dir", "compile_cache")
JUNK = (object(), -1, "junk", b"junk")
OURS = pathlib.Path(ej.__file__).parent
LOSS = optax.softmax_cross_entropy_with_integer_labels
X, Y = jnp.ones((4, 5)), jnp.zeros(4, jnp.int32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


NET = Net()
V = NET.init(jax.random.key(0), X)
M = ej.morph(V, model=NET, example=X)
G = ej.germinate(M, "Dense_0", "lora", key=jax.random.key(1))
AT: dict[str, Any] = {"morph": G, "site": "Dense_0", "slot": 0}


def defaults(call: Any, *without: str) -> dict[str, Any]:
    """The arguments of a call that have a default, with it."""
    known = inspect.signature(call).parameters.items()
    return {name: p.default for name, p in known if p.default is not p.empty and name not in without}


def register(**given: Any) -> None:
    ej.register_blueprint(**{"kinds": ("dense",), "reads": "input", **given})


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    """By name, a call and arguments that it takes."""
    made = ej.Tolaria(NET, LOSS, optax.sgd(0.1), progress=False)
    key = jax.random.key(0)
    found: dict[str, tuple[Any, dict[str, Any]]] = {
        "germinate": (
            ej.germinate,
            {"morph": M, "site": "Dense_0", "blueprint": "lora", "key": key, "slot": 0, "score": 1.0},
        ),
        "advance": (ej.advance, {**AT, "score": 1.0}),
        "fossilize": (ej.fossilize, {**AT, "score": 1.0}),
        "prune": (ej.prune, {**AT, "steps": 3, "score": 1.0}),
        "set_alpha": (ej.set_alpha, {**AT, "alpha": 0.5, "steps": 3, "curve": "linear"}),
        "silence": (ej.silence, AT),
        "unload": (ej.unload, AT),
        "seed_of": (ej.seed_of, AT),
        "fold": (ej.fold, {**AT, "strict": False}),
        "foldable": (ej.foldable, {"morph": G}),
        "shed": (ej.shed, {"morph": G}),
        "awake": (ej.awake, {"morph": G}),
        "unmorph": (ej.unmorph, {"morph": M}),
        "summary": (ej.summary, {"morph": G, "health": {"Dense_0": 0.5}}),
        "sites": (ej.sites, {"params": V, "where": "Dense"}),
        "contributions": (ej.contributions, {"morph": G, "score": lambda m: jnp.float32(1)}),
        "graft": (ej.graft, {"apply": NET, "updates": False}),
        "growable": (ej.growable, {"tx": optax.sgd(0.1), "seeds": optax.sgd(0.1)}),
        "observe": (ej.observe, {"morph": M, "grads": V["params"]}),
        "sizes_changed": (ej.sizes_changed, {"before": M, "after": M}),
        "tick": (ej.tick, {"morph": G, "score": 1.0, "config": ej.Lifecycle()}),
        "with_seeds_of": (ej.with_seeds_of, {"morph": G}),
        "register_blueprint": (register, {"name": "one of tests", "init": print, "apply": print, "replace": True}),
        "restore_morph": (ej.restore_morph, {"directory": "nowhere", "step": 1}),
        "morph": (ej.morph, {"params": V, "where": "Dense", "slots": 2, "blend": "add", "model": NET, "example": X}),
        "make_train_step": (
            ej.make_train_step,
            {"forward": NET, "loss": LOSS, "tx": optax.sgd(0.1), **defaults(ej.make_train_step)},
        ),
        "Decision": (ej.Decision, {"action": "germinate", "site": "Dense_0", **defaults(ej.Decision, "config")}),
        "FixedSchedule": (ej.FixedSchedule, {"plan": {1: [("Dense_0", "lora", {})]}, **defaults(ej.FixedSchedule)}),
        "ReplayController": (ej.ReplayController, {"events": []}),
        "TamiyoClient": (ej.TamiyoClient, {"url": "http://127.0.0.1:1", **defaults(ej.TamiyoClient)}),
        "Tolaria": (
            ej.Tolaria,
            {
                "model": NET,
                "loss": LOSS,
                "tx": optax.sgd(0.1),
                **defaults(ej.Tolaria, "checkpoint_dir", "compile_cache"),
            },
        ),
        "Tolaria.init": (made.init, {"params": V, "key": key, "model": NET, "example": X}),
        "Tolaria.restore": (made.restore, {"directory": "nowhere", "step": 1}),
    }
    for kind in (ej.Gates, ej.Governor, ej.Lifecycle, ej.Limits, ej.Tamiyo, ej.RandomSchedule):
        found[kind.__name__] = (kind, defaults(kind, "configs"))
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def refusal(call: Any, given: dict[str, Any]) -> Exception | None:
    """The error of a call, None where it takes what it is given."""
    try:
        call(**given)
    except (ValueError, TypeError, KeyError, OSError, ej.CheckpointError) as error:
        return error
    return None


@pytest.mark.parametrize("name", CASES)
def test_junk_in_any_argument_is_refused_by_us_or_taken_and_never_an_error_of_the_inside(name):
    call, good = CASES[name]
    for argument in good:
        for junk in JUNK:
            if (error := refusal(call, {**good, argument: junk})) is not None:
                last = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
                said = f"{name}({argument}={junk!r}): {type(error).__name__}: {error}"
                assert OURS in last.parents and len(str(error)) > 15, said


def test_every_public_function_is_looked_at():
    """Those that take a whole model or data, or nothing, are tested where they are."""
    elsewhere = {"blueprints", "compact", "compare", "growth_scores", "keep_memory", "spans", "stack", "widened"}
    functions = {name for name in ej.__all__ if inspect.isfunction(getattr(ej, name))}
    assert functions - set(CASES) <= elsewhere | {name for name in functions if "torch" in name or "imported" in name}
