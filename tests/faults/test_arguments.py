"""Whatever is given for an argument of a public call, it is taken, or refused in a sentence that names it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

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
    Tamiyo,
    TamiyoClient,
    Tolaria,
    Urza,
)
from esper_jax.tolaria.dispatch import Dispatch
from tests.tolaria import growing

NAN, INF = float("nan"), float("inf")
VALUES = [None, False, True, -1, 0, 1, 2.5, -0.5, INF, NAN, 1 << 70, "", "4", "epoch", "x\ny", b"x", object()]
VALUES += [[], [1], (), {}, {"a": 1}, {1: 2}, int, print, jnp.ones(2), nn.Dense]
JUNK = {"nan": NAN, "inf": INF, "True": True, "x\\ny": "x\ny", "bytes": b"x", "object": object()}
JUNK |= {"{1: 2}": {1: 2}, "int": int}
"""Values that nothing takes but what `TAKEN` names, and flags True."""
OURS = (ValueError, TypeError, KeyError)
KEY = jax.random.key(0)
HOST = {"Dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
HOST |= {"Dense_1": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}
STACK = {"layers": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.zeros((3, 4))}}
MORPH = esper_jax.morph(HOST)
MODEL = {"loss": growing.LOSS, "tx": optax.sgd(0.1)}
GERMINATE = {"morph": MORPH, "key": KEY}


def holding(host: Any, site: str) -> Morph:
    """A morph with one seed, in HOLDING."""
    morph = esper_jax.germinate(esper_jax.morph(host), site, "lora", key=KEY)
    for _ in range(3):
        morph = esper_jax.advance(morph, site)
    return morph


HELD = {"morph": holding(HOST, "Dense_0"), "site": "Dense_0", "slot": 0}
HELD_STACK = {"morph": holding(STACK, "layers"), "site": "layers", "slot": 0}
TRAINER = Tolaria(nn.Dense(2), **MODEL, progress=False)
STATE = TRAINER.init({"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, key=KEY).replace(opt_state=())


def fit(epochs: Any) -> None:
    """`Tolaria.fit` as far as its look at `epochs`: what it looks at next is an optimizer state that is none."""
    try:
        TRAINER.fit(STATE, growing.TRAIN, growing.VALIDATION, epochs=epochs)
    except ValueError as error:
        if "optimizer state" not in str(error):
            raise


def restore_morph(directory: Any) -> None:
    """`esper_jax.restore_morph`, for which a directory without a checkpoint is none of these errors."""
    with contextlib.suppress(CheckpointError):
        esper_jax.restore_morph(directory)


GOOD: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Tolaria": (Tolaria, {"model": nn.Dense(2), **MODEL}),
    "Tolaria.fit": (fit, {"epochs": 1}),
    "make_train_step": (esper_jax.make_train_step, {"forward": nn.Dense(2), **MODEL}),
    "restore_morph": (restore_morph, {"directory": "nowhere"}),
    "morph": (esper_jax.morph, {"params": HOST}),
    "germinate": (esper_jax.germinate, {**GERMINATE, "site": "Dense_0", "blueprint": "lora"}),
    "germinate in a span": (
        esper_jax.germinate,
        {**GERMINATE, "span": ("Dense_0", "Dense_1"), "blueprint": "units"},
    ),
    "advance": (esper_jax.advance, HELD),
    "advance in a stack": (esper_jax.advance, HELD_STACK),
    "set_alpha": (esper_jax.set_alpha, {**HELD, "alpha": 0.5}),
    "prune": (esper_jax.prune, HELD),
    "fossilize": (esper_jax.fossilize, HELD),
    "unload": (esper_jax.unload, HELD),
    "tick": (esper_jax.tick, {"morph": HELD["morph"]}),
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
}
"""By name: a public call, and arguments that do."""
SAID = {
    ("Tolaria", "model"): "graft() needs a Flax module",
    ("make_train_step", "forward"): "graft() needs a Flax module",
    ("morph", "params"): "morph() ",
    ("Dispatch", "mode"): "dispatch must be one of",
    ("TamiyoClient", "url"): "http://host:port",
}
"""What is said of an argument where it is not called by its name: by what it becomes, or as `Tolaria` calls it."""
TAKEN = {
    ("Tolaria", "where"): {"x\\ny"},  # a regular expression, that only init() can try
    ("Tolaria", "urza"): {"{1: 2}"},  # whatever has a get()
    ("Tolaria", "checkpoint_dir"): {"x\\ny"},  # a path may hold any text
    ("Tolaria", "compile_cache"): {"x\\ny"},
    ("restore_morph", "directory"): {"x\\ny"},
    ("Urza", "url"): {"x\\ny"},
    **{(call, "score"): {"nan", "inf"} for call in GOOD if call != "Tolaria"},  # NaN is one that was not measured
}
"""By call and argument: junk that is taken nevertheless."""
CASES = [
    (call, name)
    for call, (function, _) in GOOD.items()
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
]


def refusal(call: str, name: str, value: object) -> Exception | None:
    """What a call says to that value; None where it is taken."""
    function, good = GOOD[call]
    try:
        function(**{**good, name: value})
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("call", GOOD)
def test_good_arguments_are_taken(call):
    function, good = GOOD[call]
    function(**good)


@pytest.mark.parametrize(("call", "name"), CASES)
def test_any_value_is_taken_or_refused_in_a_sentence(call, name):
    """Of the right kind of error, and with the argument's name in it, or what `SAID` has."""
    named = SAID.get((call, name), name.removesuffix("s"))
    said = {repr(value): refusal(call, name, value) for value in VALUES}
    wrong = {
        value: f"{type(error).__name__}: {error}"
        for value, error in said.items()
        if error is not None and not (isinstance(error, OURS) and named in str(error))
    }
    assert wrong == {}


@pytest.mark.parametrize(("call", "name"), CASES)
def test_junk_is_refused(call, name):
    flag = "bool" in str(inspect.signature(GOOD[call][0]).parameters[name].annotation)
    expected = TAKEN.get((call, name), set()) | ({"True"} if flag else set())
    assert {word for word, value in JUNK.items() if refusal(call, name, value) is None} == expected
