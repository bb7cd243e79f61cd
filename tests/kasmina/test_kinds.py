"""Every kind of layer in every form: the host is preserved to the bit, a seed learns there, one that cannot is refused.

The forms of a family stand side by side in one model, each with an output and a loss of its own, so that one program
tests them all.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.blueprints import KINDS, get_blueprint, make_plant, registered
from esper_jax.kasmina.morph import with_spec
from esper_jax.kasmina.summary import equal_bits

from .hosts import BLENDS, born, in_stage, noisy

NORMAL = partial(jax.random.normal, dtype=jnp.float32)
X = {
    "row": NORMAL(jax.random.key(0), (4,)),
    "seq": NORMAL(jax.random.key(1), (2, 6, 4)),
    "lead": NORMAL(jax.random.key(2), (3, 2, 6, 4)),
    "image": NORMAL(jax.random.key(3), (2, 5, 6, 4)),
    "volume": NORMAL(jax.random.key(4), (1, 3, 4, 4, 2)),
    "memory": NORMAL(jax.random.key(5), (2, 3, 5)),
    "ids": jnp.asarray([[1, 0, 2, 4], [3, 3, 1, 0]]),
    "bf16": NORMAL(jax.random.key(6), (2, 6, 4)).astype(jnp.bfloat16),
}
MASK = jnp.asarray([True, True, False])[None, None, None]


@dataclasses.dataclass(frozen=True)
class Form:
    """One layer: how it is made, the kind of its site, its input, its call, sites below it, blueprints it refuses."""

    make: Callable[..., nn.Module]
    kind: str
    x: str = "seq"
    call: Callable[..., Any] = lambda layer, xs, x, train: layer(x)
    below: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()


def trains(layer, xs, x, train):
    return layer(x, use_running_average=not train)


def carried(layer, xs, x, train):
    carry = layer.initialize_carry(jax.random.key(0), x[:, 0].shape)
    return layer(jax.tree.map(lambda c: c + 0.1, carry), x[:, 0])[1]


def tied(layer, xs, x, train):
    return layer.attend(layer(x))


def twice(layer, xs, x, train):
    return layer(nn.relu(layer(x)))


def conv(size, *args, **kwargs):
    return partial(nn.Conv, size, *args, **kwargs)


ATTENTION = partial(nn.MultiHeadDotProductAttention, num_heads=2)
HEADS = ("query", "key", "value", "out")
FAMILIES = {
    "conv 1d": {
        "same": Form(conv(3, (3,)), "conv"),
        "valid, strided": Form(conv(3, (3,), strides=2, padding="VALID"), "conv"),
        "circular, dilated": Form(conv(3, (3,), kernel_dilation=2, padding="CIRCULAR"), "conv"),
        "causal, grouped": Form(conv(4, (3,), feature_group_count=2, padding="CAUSAL"), "conv"),
        "reflect, depthwise": Form(conv(4, (3,), feature_group_count=4, padding="REFLECT"), "conv"),
        "explicit, no bias": Form(conv(3, (2,), padding=[(1, 2)], use_bias=False), "conv"),
        "a number of pads": Form(conv(3, (3,), padding=2), "conv"),
        "dilated input": Form(conv(3, (3,), padding=1, input_dilation=2), "conv"),
        "unbatched": Form(conv(3, (3,)), "conv", call=lambda layer, xs, x, train: layer(x[0])),
        "more leading axes": Form(conv(3, (3,)), "conv", "lead"),
        "a number for a size": Form(conv(3, 3), "conv"),
    },
    "conv 2d and 3d": {
        "strided, dilated, circular": Form(conv(4, (3, 3), 2, "CIRCULAR", kernel_dilation=(1, 2)), "conv", "image"),
        "reflect": Form(conv(3, (3, 3), padding="REFLECT"), "conv", "image"),
        "valid, grouped": Form(conv(4, (3, 2), padding="VALID", feature_group_count=2), "conv", "image"),
        "explicit": Form(conv(3, (3, 3), padding=((1, 0), (2, 1))), "conv", "image"),
        "unbatched": Form(conv(3, (1, 1)), "conv", "image", lambda layer, xs, x, train: layer(x[0])),
        "volume": Form(conv(3, (2, 2, 2), (1, 2, 1)), "conv", "volume"),
        "masked": Form(conv(3, (3, 3), mask=jnp.ones((3, 3, 4, 3)).at[0].set(0)), "conv", "image"),
    },
    "conv_transpose": {
        "same": Form(partial(nn.ConvTranspose, 3, (3,), (2,)), "conv_transpose"),
        "valid, dilated": Form(
            partial(nn.ConvTranspose, 3, (2,), padding="VALID", kernel_dilation=(2,)), "conv_transpose"
        ),
        "image": Form(partial(nn.ConvTranspose, 3, (2, 2), (2, 2)), "conv_transpose", "image"),
        "transposed kernel": Form(
            partial(nn.ConvTranspose, 4, (3,), transpose_kernel=True), "conv_transpose", refuses=("linear", "lora")
        ),
        "circular": Form(
            partial(nn.ConvTranspose, 3, (4,), (2,), "CIRCULAR"), "conv_transpose", refuses=("linear", "lora")
        ),
        "explicit": Form(partial(nn.ConvTranspose, 3, (3,), padding=((2, 2),)), "conv_transpose"),
        "unbatched": Form(
            partial(nn.ConvTranspose, 3, (3,), (2,)), "conv_transpose", call=lambda layer, xs, x, train: layer(x[0])
        ),
    },
    "dense": {
        "dense": Form(partial(nn.Dense, 3), "dense"),
        "no bias, one row": Form(partial(nn.Dense, 3, use_bias=False), "dense", "row"),
        "more leading axes": Form(partial(nn.Dense, 3), "dense", "lead"),
        "to heads": Form(partial(nn.DenseGeneral, (2, 3)), "dense_general"),
        "over two axes": Form(partial(nn.DenseGeneral, 5, axis=(-2, -1)), "dense_general"),
        "over axes apart": Form(partial(nn.DenseGeneral, (2, 2), axis=(1, 3)), "dense_general", "image"),
        "over one axis, inner": Form(partial(nn.DenseGeneral, 3, axis=1, use_bias=False), "dense_general"),
        "called twice": Form(partial(nn.Dense, 4), "dense", call=twice),
        "einsum": Form(partial(nn.Einsum, (4, 3), "btd,df->btf"), "einsum"),
        "einsum of heads, ellipsis": Form(partial(nn.Einsum, (2, 4, 3), "...d,hdf->...hf", use_bias=False), "einsum"),
        "einsum over two axes": Form(partial(nn.Einsum, (6, 4, 3), "btd,tdf->bf"), "einsum"),
        "einsum to the front": Form(partial(nn.Einsum, (2, 4, 3), "btd,kdf->kbtf", use_bias=False), "einsum"),
        "embed": Form(partial(nn.Embed, 5, 3), "embed", "ids"),
        "embed of one id": Form(partial(nn.Embed, 5, 3), "embed", "ids", lambda layer, xs, x, train: layer(x[0, 0])),
        "embed, tied": Form(partial(nn.Embed, 5, 3), "embed", "ids", tied),
    },
    "norms": {
        "layer_norm": Form(nn.LayerNorm, "layer_norm"),
        "layer_norm, one row, no bias": Form(partial(nn.LayerNorm, use_bias=False), "layer_norm", "row"),
        "layer_norm, no scale": Form(partial(nn.LayerNorm, use_scale=False), "layer_norm", "image"),
        "rms_norm": Form(nn.RMSNorm, "rms_norm"),
        "rms_norm, more leading axes": Form(partial(nn.RMSNorm, epsilon=1e-3), "rms_norm", "lead"),
        "group_norm": Form(partial(nn.GroupNorm, num_groups=2), "group_norm", "image"),
        "group_norm by size": Form(partial(nn.GroupNorm, None, 2), "group_norm"),
        "instance_norm": Form(nn.InstanceNorm, "group_norm", "image"),
        "batch_norm": Form(nn.BatchNorm, "batch_norm", "image", trains),
        "batch_norm of rows, no scale": Form(partial(nn.BatchNorm, use_scale=False), "batch_norm", call=trains),
    },
    "attention": {
        "self": Form(partial(ATTENTION, out_features=6), "attention", below=HEADS),
        "cross, masked": Form(
            ATTENTION, "attention", call=lambda layer, xs, x, train: layer(x, xs["memory"], mask=MASK), below=HEADS
        ),
        "by name": Form(
            partial(ATTENTION, use_bias=False),
            "attention",
            call=lambda layer, xs, x, train: layer(inputs_q=x, inputs_k=xs["memory"], inputs_v=xs["memory"]),
            below=HEADS,
        ),
        "alias, normalised": Form(
            partial(nn.MultiHeadAttention, 2, normalize_qk=True, qkv_features=8),
            "attention",
            below=(*HEADS, "query_ln", "key_ln"),
        ),
        "unbatched": Form(ATTENTION, "attention", call=lambda layer, xs, x, train: layer(x[0]), below=HEADS),
    },
    "cells": {
        "gru": Form(partial(nn.GRUCell, 3), "dense", call=carried, below=("hn", "hr", "hz", "in", "ir", "iz")),
        "lstm": Form(
            partial(nn.LSTMCell, 3), "dense", call=carried, below=("hf", "hg", "hi", "ho", "if", "ig", "ii", "io")
        ),
        "simple": Form(partial(nn.SimpleCell, 3), "dense", call=carried, below=("h", "i")),
    },
    "wrapped": {
        "weight_norm": Form(lambda name: nn.WeightNorm(nn.Conv(3, (3,), name=name)), "conv"),
        "spectral_norm": Form(
            lambda name: nn.SpectralNorm(nn.Dense(3, name=name)),
            "dense",
            call=lambda layer, xs, x, train: layer(x, update_stats=train),
        ),
    },
    "precision": {
        "bf16": Form(partial(nn.Dense, 3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), "dense", "bf16"),
        "bf16 computation": Form(conv(3, (3,), dtype=jnp.bfloat16), "conv"),
        "bf16 input": Form(partial(nn.DenseGeneral, (2, 2)), "dense_general", "bf16"),
        "bf16 norm": Form(partial(nn.LayerNorm, dtype=jnp.bfloat16), "layer_norm", "bf16"),
        "bf16 attention": Form(partial(ATTENTION, dtype=jnp.bfloat16), "attention", below=HEADS),
        "bf16 embedding": Form(partial(nn.Embed, 5, 3, dtype=jnp.bfloat16), "embed", "ids"),
        "f16": Form(partial(nn.Dense, 3, dtype=jnp.float16), "dense"),
        "whole numbers": Form(partial(nn.Dense, 3), "dense", "ids"),
    },
}


class Side(nn.Module):
    """The forms of a family side by side."""

    family: str

    @nn.compact
    def __call__(self, xs, train=True):
        found = {}
        for name, form in FAMILIES[self.family].items():
            found[name] = form.call(form.make(name=name), xs, xs[form.x], train)
        return found


esper_jax.register_blueprint(
    "behind",
    init=lambda key, site: {"kernel": 0.1 * jax.random.normal(key, (site.out_features,) * 2, site.dtype)},
    apply=lambda params, u: u @ params["kernel"],
    about="for kinds of layer that no blueprint of the library fits yet",
    replace=True,
)
SMALL = {"hidden": 4, "rank": 2}


def fitting(kind):
    """The library's blueprints for a kind of site."""
    own = [b.name for b in registered() if kind in b.kinds and b.init.__module__.startswith("esper_jax.")]
    return own or ["behind"]


@functools.cache
def family(name):
    """The model, its variables, a morph with one seed at each form, and the compiled step and forward pass."""
    model = Side(name)
    variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), X)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"morph\(\) skipped 1 layer\(s\).*WeightNorm_0 ")  # its own scale
        morph = esper_jax.morph(variables, model=model, example=(X,), slots=1)
    spec = morph.spec
    for i, (path, form) in enumerate(FAMILIES[name].items()):
        site = f"{path}/{form.below[i % len(form.below)]}" if form.kind == "dense" and form.below else path
        names = [blueprint for blueprint in fitting(form.kind) if blueprint not in form.refuses]
        blueprint = names[i % len(names)]
        config = {key: value for key, value in SMALL.items() if key in get_blueprint(blueprint).config}
        spec = spec.with_plant(make_plant(spec.by_path[site], 0, blueprint, config, "add", False))
    morph = born(with_spec(morph, spec), 0)
    forward = esper_jax.graft(model)
    bare = model.apply(variables, X, train=False)
    targets = jax.tree.map(lambda h: 1.3 * h.astype(jnp.float32) + 0.2, bare)
    collections = [name for name in variables if name != "params"]

    @jax.jit
    def step(morph):
        def loss(params):
            out = forward(morph.with_params(params), X, mutable=collections)
            losses = jax.tree.map(lambda y, t: jnp.mean(jnp.square(y.astype(jnp.float32) - t)), out[0], targets)
            return sum(losses.values()), (losses, out)

        (_, (losses, out)), grads = jax.value_and_grad(loss, has_aux=True)(morph.params)
        return (losses, out, grads["host"]), grads["seeds"]

    evaluate = jax.jit(lambda morph: forward(morph, X, train=False))
    return model, variables, morph, step, evaluate, bare


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_finds_each_form_with_its_kind_and_keeps_its_dtype(name):
    _, variables, morph, *_ = family(name)
    assert {site.path for site in morph.spec.sites} == {
        path + below for path, form in FAMILIES[name].items() for below in _paths(form)
    }
    for path, form in FAMILIES[name].items():
        if form.kind != "dense" or not form.below:
            site = morph.spec.by_path[path]
            assert (site.kind, site.traced) == (form.kind, True)
            assert site.dtype == str(jax.tree.leaves(variables["params"][path])[0].dtype)


def _paths(form):
    if not form.below:
        return ("",)
    return (*(() if form.kind == "dense" else ("",)), *(f"/{name}" for name in form.below))


LIGHT = list(FAMILIES)[-3:]
SOME = [name if name in LIGHT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
"""The largest families are tested on one Python only."""


@pytest.mark.parametrize("name", SOME)
def test_isolated_seeds_leave_outputs_statistics_and_gradients_of_every_form_to_the_bit(name):
    """In training and in evaluation, NaN and all; the bare host gives the same but for rounding."""
    _, _, morph, step, evaluate, bare = family(name)
    rng = np.random.default_rng(0)
    noise = lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    morph = morph.replace(seeds=jax.tree.map(noise, morph.seeds))
    expected, nothing = step(in_stage(morph, Stage.DORMANT))
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(nothing))
    broken = morph.replace(seeds=jax.tree.map(lambda leaf: leaf * jnp.nan, morph.seeds))
    still = evaluate(in_stage(morph, Stage.DORMANT))
    for stage, seeds in ((Stage.GERMINATED, morph), (Stage.TRAINING, morph), (Stage.TRAINING, broken)):
        assert equal_bits(step(in_stage(seeds, stage))[0], expected)
        assert equal_bits(evaluate(in_stage(seeds, stage)), still)
    for path, output in still.items():
        assert (output.shape, output.dtype) == (bare[path].shape, bare[path].dtype)
        tolerance = 1e-5 if output.dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(np.float32(output), np.float32(bare[path]), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SOME)
def test_a_seed_at_every_form_learns_by_itself_what_its_layer_lacks(name):
    """Each form's own loss falls while only its seed is trained; in TRAINING it gets a gradient from birth."""
    _, _, morph, step, _, _ = family(name)
    _, grads = step(in_stage(morph, Stage.TRAINING))
    for plant in morph.spec.plants:
        found = grads[plant.site][plant.key]
        assert any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(found)), plant
    tx = optax.adam(1e-2)
    grown, opt = in_stage(morph, Stage.HOLDING), tx.init(morph.seeds)
    update = jax.jit(lambda seeds, opt, grads: _updated(tx, seeds, opt, grads))
    history = []
    for _ in range(25):
        (losses, *_), grads = step(grown)
        history.append(losses)
        seeds, opt = update(grown.seeds, opt, grads)
        grown = grown.replace(seeds=seeds)
    for path, first in history[0].items():
        assert history[-1][path] < 0.98 * first, (path, float(first), float(history[-1][path]))


def _updated(tx, seeds, opt, grads):
    updates, opt = tx.update(grads, opt, seeds)
    return optax.apply_updates(seeds, updates), opt


@pytest.mark.parametrize("kind", KINDS)
def test_a_blueprint_made_for_other_kinds_is_refused_and_those_that_fit_are_named(kind):
    """Contract 4: the sentence says what to take instead."""
    name, path = next((n, p) for n, forms in FAMILIES.items() for p, f in forms.items() if f.kind == kind)
    morph = esper_jax.morph(family(name)[2].host, model=family(name)[0], example=(X,), where=f"^{path}$")
    others = [b.name for b in registered() if kind not in b.kinds and b.init.__module__.startswith("esper_jax.")]
    assert others
    for other in others:
        with pytest.raises(ValueError, match=rf"blueprint '{other}' is made for .*is {kind}. Blueprints for it: \w+"):
            esper_jax.germinate(morph, path, other, key=jax.random.key(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_blueprint_that_cannot_be_built_for_a_form_says_so_before_anything_changes(name):
    morph = family(name)[2]
    for path, form in FAMILIES[name].items():
        for refused in form.refuses:
            with pytest.raises(ValueError, match=f"blueprint '{refused}' .* at site '{path}' cannot be built: "):
                make_plant(morph.spec.by_path[path], 0, refused, {}, "add", False)
        for fits in sorted({*fitting(form.kind)} - {*form.refuses}) if not form.below else ():
            make_plant(morph.spec.by_path[path], 0, fits, {}, "add", False)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize(("name", "path"), [("conv 1d", "valid, strided"), ("dense", "embed")])
def test_a_seed_that_reads_another_form_than_its_output_blends_in_every_way(name, path, blend):
    """A strided convolution's places are not its output's, an embedding reads ids; the gate of "gate" must fit both."""
    model, variables, _, _, _, bare = family(name)
    morph = esper_jax.morph(variables, model=model, example=(X,), where=f"^{path}$")
    morph = esper_jax.germinate(morph, path, "lora", key=jax.random.key(0), blend=blend, rank=2)
    forward, grown = esper_jax.graft(model), noisy(morph, 1)
    still, blended = (forward(in_stage(grown, stage), X, train=False) for stage in (Stage.TRAINING, Stage.HOLDING))
    assert equal_bits(still, bare)
    assert not equal_bits(blended[path], bare[path])


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.HOLDING], ids=lambda stage: stage.name)
def test_the_cache_of_a_decoding_attention_is_its_own(stage):
    """Token by token: a seed beside the layer neither reads nor writes the cache, before and after it is blended."""
    model, x = nn.MultiHeadAttention(num_heads=2, decode=True), X["seq"]
    variables = model.init(jax.random.key(0), x)
    morph = esper_jax.germinate(esper_jax.morph(variables, where=r"^\.$"), ".", "lora", key=jax.random.key(1), rank=2)
    grown, forward = in_stage(noisy(morph, 2), stage), esper_jax.graft(model)
    host = variables
    for t in range(3):
        token = x[:, t : t + 1]
        expected, mine = model.apply(host, token, mutable=["cache"])
        output, cache = forward(grown, token, mutable=["cache"])
        assert equal_bits(output, expected) == (stage == Stage.TRAINING)
        assert equal_bits(cache, mine)
        host, grown = {**host, **mine}, grown.with_collections(cache)
    assert int(host["cache"]["cache_index"]) == 3


def test_a_seed_at_a_tied_embedding_reads_ids_and_leaves_the_logits_to_the_table():
    """`attend` is the other use of the weights: no seed stands there, in any stage."""

    class Tied(nn.Module):
        def setup(self):
            self.table = nn.Embed(5, 3)

        def __call__(self, ids):
            return self.table(ids)

        def logits(self, h):
            return self.table.attend(h)

    model, h = Tied(), X["seq"][..., :3]
    variables = model.init(jax.random.key(0), X["ids"])
    morph = esper_jax.morph(variables, model=model, example=X["ids"])
    (name, *_) = fitting("embed")
    morph = in_stage(noisy(esper_jax.germinate(morph, "table", name, key=jax.random.key(1)), 2), Stage.HOLDING)
    forward = esper_jax.graft(model)
    assert not equal_bits(forward(morph, X["ids"]), model.apply(variables, X["ids"]))
    assert equal_bits(forward(morph, h, method="logits"), model.apply(variables, h, method="logits"))
