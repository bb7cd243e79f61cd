"""A zoo of models that nobody wrote for this library: sites are found, the host is untouched, and seeds grow.

The models in `models/` know nothing of seeds. What a parameter tree alone cannot tell is written down in `UNTOLD`.
"""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import FixedSchedule, Gates, Lifecycle, Stage, Tolaria
from esper_jax.kasmina import lifecycle
from esper_jax.kasmina.blueprints import get_blueprint, make_plant, registered
from esper_jax.kasmina.morph import with_spec
from esper_jax.kasmina.summary import equal_bits, program
from esper_jax.tolaria import TrainState

from ..kasmina.hosts import in_stage, slot_norm, stirred
from .exhibits import STREAMS, exhibit, key, kinds_of, morphed, unoptimised
from .models import MODELS

KINDS = {
    "autoencoder": {"conv": 2, "conv_transpose": 2, "dense": 4},
    "convnext": {"conv": 4, "dense": 5, "layer_norm": 5},
    "deepsets": {"dense": 4},
    "ensemble": {"batch_norm": 1, "dense": 2},
    "gemma": {"einsum": 1, "embed": 1, "rms_norm": 3},
    "gpt": {"dense": 4, "embed": 2, "layer_norm": 3},
    "gru": {"dense": 16, "embed": 1},
    "llama": {"dense": 4, "dense_general": 4, "embed": 1, "rms_norm": 3},
    "mixer": {"conv": 1, "dense": 5, "layer_norm": 3},
    "resnet": {"batch_norm": 6, "conv": 6, "dense": 1},
    "seq2seq": {"attention": 3, "dense": 4, "dense_general": 12, "embed": 1, "layer_norm": 7},
    "siamese": {"batch_norm": 2, "conv": 2, "dense": 1},
    "tcn": {"conv": 6, "dense": 1},
    "unet": {"conv": 7, "conv_transpose": 1, "group_norm": 6},
    "vit": {"attention": 1, "conv": 1, "dense": 3, "dense_general": 4, "layer_norm": 3},
}
"""The sites of each model, as a trace finds them."""

UNTOLD = {
    "autoencoder": {"conv": 4, "dense": 4},  # a ConvTranspose called `deconv1` looks like a Conv
    "gemma": {"conv": 1, "embed": 1, "rms_norm": 3},  # an Einsum's kernel [N, H, D] looks like a 1-d Conv's
    "llama": {"conv": 4, "dense": 4, "embed": 1, "rms_norm": 3},  # as does a DenseGeneral's without bias
    "unet": {"conv": 8, "layer_norm": 6},  # a GroupNorm called `layers_1` looks like a LayerNorm
}
"""What the shapes and names of the parameters alone suggest instead: a seed planted there is refused (tested below)."""

STACKED = {
    "ensemble": {"members/BatchNorm_0": 3, "members/Dense_0": 3, "members/Dense_1": 3},
    "gpt": {f"h/{name}": 4 for name in ("attn/c_attn", "attn/c_proj", "c_fc", "c_proj", "ln_1", "ln_2")},
}
"""Sites whose layers a lifted transform stacked, and how many layers."""

SKIPPED = {
    "convnext": ["stage_0_block_0", "stage_1_block_0"],  # layer scale, a bare parameter
    "gemma": ["layer_0/attn/qkv_einsum", "layer_0/mlp"],
    "tcn": ["blocks_0/normed", "blocks_1/normed", *(f"memory/cell/{g}{i}" for g in "hi" for i in "figo")],
    "vit": [".", "Transformer/posembed_input"],
}
"""What one warning names as no layer that can carry seeds."""

LIGHT = ("autoencoder", "deepsets", "siamese")
ALL = [name if name in LIGHT else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]

GROWTH = {
    "autoencoder": ("decoder/fc1", "mlp", {"hidden": 8}),
    "convnext": ("stage_1_block_0/dwconv", "se", {}),
    "deepsets": ("phi/layers_0", "mlp", {"hidden": 8}),
    "ensemble": ("members/Dense_0", "lora", {"rank": 2}),
    "gemma": ("layer_0/attn/attn_vec_einsum", "mlp", {"hidden": 8}),
    "gpt": ("h/attn/c_attn", "lora", {"rank": 2}),
    "gru": ("encoder/forward_rnn/cell/hn", "lora", {"rank": 2}),
    "llama": ("layers_0/self_attn/o_proj", "lora", {"rank": 2}),
    "mixer": ("MixerBlock_0/token_mixing/Dense_0", "mlp", {"hidden": 8}),
    "resnet": ("ResNetBlock_1/Conv_0", "conv_light", {}),
    "seq2seq": ("decoder_0/cross_attention", "mlp", {"hidden": 8}),
    "siamese": ("embed/Conv_1", "depthwise", {}),
    "tcn": ("blocks_1/conv", "bottleneck", {}),
    "unet": ("bottom/layers_3", "se", {}),
    "vit": ("Transformer/encoderblock_0/MultiHeadDotProductAttention_0", "lora", {"rank": 2}),
}
"""Where each model grows in its epoch, and what."""


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_finds_every_layer_of_the_model(name):
    assert kinds_of(morphed(name)) == KINDS[name]
    assert {site.path: site.layers for site in morphed(name).spec.sites if site.layers} == STACKED.get(name, {})
    assert all(site.traced or "norm" in site.path and name == "gemma" for site in morphed(name).spec.sites)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_alone_tell_the_same_layers_but_for_those_that_look_alike(name):
    alone, traced = morphed(name, traced=False), morphed(name)
    assert kinds_of(alone) == UNTOLD.get(name, KINDS[name])
    for site in alone.spec.sites:
        known = traced.spec.by_path[site.path]
        if site.kind == known.kind:
            assert (site.out_shape, site.layers, site.dtype) == (known.out_shape, known.layers, known.dtype)
            assert site.in_shape == known.in_shape or dict(known.geometry)["groups"] > 1  # a kernel holds one group's


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_one_warning_names_what_is_no_layer_and_only_that(name, traced):
    given = exhibit(name)
    known = {"model": given.model, "example": given.args} if traced else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        esper_jax.morph(given.variables, **known)
    expected = SKIPPED.get(name, [])
    assert len(caught) == bool(expected)
    if expected:
        message = str(caught[0].message)
        assert f"skipped {len(expected)} layer(s)" in message
        for path in sorted(expected)[:8]:
            assert f"{path} (" in message
        assert caught[0].filename == __file__


@pytest.mark.parametrize("name", UNTOLD)
def test_a_seed_at_a_layer_taken_for_another_kind_works_where_the_kinds_are_alike_or_is_refused(name):
    """A seed may take a GroupNorm for a LayerNorm, but not a DenseGeneral for a convolution."""
    given, alone, traced = exhibit(name), morphed(name, traced=False), morphed(name)
    wrong = next(s for s in alone.spec.sites if s.kind != traced.spec.by_path[s.path].kind)
    morph = esper_jax.germinate(alone, wrong.path, fitting(wrong)[0], key=jax.random.key(0))
    call = functools.partial(given.run, esper_jax.graft(given.model), train=False)
    if name in ("autoencoder", "unet"):
        assert equal_bits(call(morph), given.run(given.model.apply, given.variables, False))
        return
    with pytest.raises(
        ValueError, match=rf"site '{wrong.path}' was taken for conv .*Give morph\(\) model= and example="
    ):
        jax.eval_shape(call, morph)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_empty_slots_leave_the_models_own_program_forward_and_backward(name, train):
    given, morph = exhibit(name), morphed(name)
    forward, others = esper_jax.graft(given.model), {k: v for k, v in given.variables.items() if k != "params"}

    def of_host(params):
        return given.run(given.model.apply, {**others, "params": params}, train)

    def of_morph(params):
        return given.run(forward, morph.with_params({"host": params, "seeds": {}}), train)

    bare, with_slots = (
        program(jax.value_and_grad(f, has_aux=True), given.variables["params"]) for f in (of_host, of_morph)
    )
    assert with_slots == bare


def fitting(site):
    """The names of the library's blueprints for a site; one feature normalised over itself is nothing."""
    own = [b.name for b in registered() if b.fits(site) and b.init.__module__.startswith("esper_jax.")]
    return [name for name in own if name != "norm" or site.out_features > 1]


esper_jax.register_blueprint(
    "after",
    init=lambda key, site: {"kernel": jnp.zeros((site.out_features,) * 2, site.dtype)},
    apply=lambda params, u: u @ params["kernel"],
    about="for kinds of layer that no blueprint of the library fits yet",
    replace=True,
)
SMALL = {"hidden": 4, "rank": 2}


@functools.cache
def planted(name):
    """The morph with one seed at the first site of each kind (stacked or not), blueprints and blends in turn."""
    morph, chosen = morphed(name), {}
    for site in morph.spec.sites:
        chosen.setdefault((site.kind, bool(site.layers)), site)
    for i, site in enumerate(chosen.values()):
        names = fitting(site) or ["after"]
        blueprint = names[(i + list(MODELS).index(name)) % len(names)]
        known = get_blueprint(blueprint).config
        config = {key: value for key, value in SMALL.items() if key in known}
        blend = ("add", "lerp", "gate", "multiply")[i % 4]
        morph = esper_jax.germinate(morph, site.path, blueprint, key=jax.random.key(i), blend=blend, **config)
    return morph.replace(seeds=stirred(morph.seeds, 0.2))


@pytest.mark.parametrize("name", ALL)
def test_a_seed_at_each_kind_of_site_leaves_the_model_to_the_bit_until_it_is_blended(name):
    """Loss, outputs, statistics and host gradients, in one compiled program; each seed learns, and then takes part."""
    given, morph = exhibit(name), planted(name)
    forward = esper_jax.graft(given.model)

    @jax.jit
    def step(morph):
        (loss, aux), grads = jax.value_and_grad(
            lambda params: given.run(forward, morph.with_params(params), True), has_aux=True
        )(morph.params)
        return (loss, aux, grads["host"]), grads["seeds"]

    expected, nothing = step(in_stage(morph, Stage.DORMANT))
    germinated, _ = step(in_stage(morph, Stage.GERMINATED))
    training, learns = step(in_stage(morph, Stage.TRAINING))
    assert equal_bits(germinated, expected)
    assert equal_bits(training, expected)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(nothing))
    for plant in morph.spec.plants:
        assert slot_norm(learns, plant.site, plant.slot) > 0, plant
        one = in_stage(morph, {(plant.site, plant.slot): (Stage.HOLDING, 1.0)})
        assert not equal_bits(step(one)[0][1][0], expected[1][0]), plant
    assert step._cache_size() == 1


@jax.jit
def tick(life):
    """One tick of a site's seeds, compiled once for all models (`esper_jax.tick` is one program a morph)."""
    config = Lifecycle(Gates(min_training_ticks=2, min_health=0.0), tempo=2)
    return lifecycle.tick(life, score=jnp.nan, config=config)[0]


@pytest.mark.parametrize("name", ALL)
def test_a_short_epoch_with_growth_ends_with_a_fossil_in_the_output(name):
    """Two steps of the host alone, then germinate, train, blend, hold and fossilise, in one program."""
    given = exhibit(name)
    path, blueprint, config = GROWTH[name]
    with unoptimised():
        morph = esper_jax.morph(
            given.variables,
            where=rf"^{re.escape(path)}$",
            slots=1,
            planted={blueprint: config},
            model=given.model,
            example=given.args,
        )
        forward = esper_jax.graft(given.model)
        tx = esper_jax.growable(optax.adam(3e-3))
        step = esper_jax.make_train_step(
            forward, given.loss, tx, probe_every=4, rngs=STREAMS, unpack=lambda batch: batch, donate=False
        )
        state = TrainState.create(morph, tx, key=key(1))
        losses, stages = [], []
        for i in range(10):
            if i == 2:
                state = state.replace(morph=esper_jax.germinate(state.morph, path, blueprint, key=jax.random.key(2)))
            state, metrics = step(state, (given.args, given.targets))
            losses.append(float(metrics["loss"]))
            life = tick(state.morph.state[path])
            state = state.replace(morph=state.morph.replace(state={path: life}))
            stages.append(Stage(int(np.max(state.morph.state[path].stage))).name)
        grown = esper_jax.fossilize(state.morph, path)
        with_seed, without = (
            step(state.replace(morph=morph), (given.args, given.targets))[1]["loss"]
            for morph in (grown, esper_jax.silence(grown, path))
        )
    assert [s for i, s in enumerate(stages) if i == 0 or stages[i - 1] != s] == [
        "DORMANT",
        "TRAINING",
        "BLENDING",
        "HOLDING",
    ]
    assert step._cache_size() == 1
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert np.all(np.asarray(grown.state[path].stage) == Stage.FOSSILIZED)
    assert jnp.isfinite(with_seed) and with_seed != without


@pytest.mark.slow
def test_one_layer_of_a_scanned_and_rematerialised_stack_grows_through_tolaria():
    """The seed is germinated on the way, in an empty slot, and its program takes over; the other layers stay bare."""
    given, gates = exhibit("gpt"), Gates(min_training_ticks=1, min_health=0.0)
    with unoptimised():
        trainer = Tolaria(
            given.model,
            given.loss,
            optax.adam(3e-3),
            controller=FixedSchedule({1: [("h/attn/c_attn[2]", "lora", {"rank": 2})]}, gates=gates, keep="always"),
            lifecycle=Lifecycle(gates, tempo=2),
            score=lambda outputs, targets: -given.loss(outputs, targets),
            batch_size=4,
            progress=False,
            compile_in="thread",
        )
        state = trainer.init(given.variables, key=key(1), model=given.model, example=given.args)
        state, history = trainer.fit(state, (*given.args, given.targets), (*given.args, given.targets), epochs=7)
    stages = np.asarray(state.morph.state["h/attn/c_attn"].stage)[:, 0]
    assert [Stage(stage).name for stage in stages] == ["DORMANT", "DORMANT", "FOSSILIZED", "DORMANT"]
    assert all(np.isfinite(record["train_loss"]) for record in history.records)
    up = state.morph.seeds["h/attn/c_attn"]["slot_0"]["up"]
    assert [bool(jnp.any(layer)) for layer in up] == [False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("resident", [False, True], ids=["lean", "planted"])
def test_under_vmap_too_the_members_gradients_are_equal_to_the_bit(resident):
    """A batch makes a select of every branch; the compiler must not fuse it into the host's sums."""
    given, morph = exhibit("ensemble"), morphed("ensemble")
    seeds = (("BatchNorm_0", "norm", "add"), ("Dense_0", "norm", "gate"), ("Dense_1", "lora", "gate"))
    for site, blueprint, blend in seeds:
        site = morph.spec.by_path[f"members/{site}"]
        morph = with_spec(morph, morph.spec.with_plant(make_plant(site, 0, blueprint, {}, blend, resident)))
    morph = morph.replace(seeds=stirred(morph.seeds, 0.2))
    forward = esper_jax.graft(given.model)
    step = jax.jit(jax.grad(lambda host, m: given.run(forward, m.with_params({**m.params, "host": host}), True)[0]))
    expected = step(morph.params["host"], in_stage(morph, Stage.DORMANT))
    assert equal_bits(step(morph.params["host"], in_stage(morph, Stage.TRAINING)), expected)
    second = {
        path: state.replace(stage=state.stage.at[1, 0].set(int(Stage.TRAINING)))
        for path, state in in_stage(morph, Stage.DORMANT).state.items()
    }
    assert equal_bits(step(morph.params["host"], morph.replace(state=second)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoencoder", "convnext", "gpt", "siamese"])
def test_fossils_at_all_sites_fold_into_the_model_and_leave_its_outputs(name):
    """Contract 20: within 1e-6 relative in float32; only a table that is read twice keeps its seed."""
    given, morph = exhibit(name), morphed(name)
    spec = morph.spec
    for i, site in enumerate(spec.sites):
        names = [blueprint for blueprint in fitting(site) if get_blueprint(blueprint).merge is not None]
        config = {"rank": 2} if names[i % len(names)] == "lora" else {}
        spec = spec.with_plant(make_plant(site, 0, names[i % len(names)], config, "add", False))
    grown = with_spec(morph, spec)
    grown = in_stage(grown.replace(seeds=stirred(grown.seeds, 0.1)), Stage.FOSSILIZED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"fold\(\) left 1 .*wte slot 0: the table is also read")
        folded = esper_jax.fold(grown)
    assert [plant.site for plant in folded.spec.plants] == (["wte"] if name == "gpt" else [])
    forward = esper_jax.graft(given.model)
    with unoptimised():
        outputs = jax.jit(lambda morph: given.run(forward, morph, False)[1][0])
        before, after, host = (jax.tree.leaves(outputs(m)) for m in (grown, folded, morph))
    for p, q, bare in zip(before, after, host, strict=True):
        assert jnp.max(jnp.abs(p - q)) <= 1e-6 * jnp.max(jnp.abs(p)) < jnp.max(jnp.abs(p - bare))
