"""Blueprints: those of the library, and those that users register."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esper_jax
from esper_jax import Site, register_blueprint
from esper_jax.kasmina.blueprints import _REGISTRY, KINDS, get_blueprint, make_plant, seed_apply, seed_init, seed_shapes

from .hosts import fitting, host

SITES = [
    Site("a", "dense", (5,), (6,)),
    Site("b", "dense_general", (5,), (2, 4)),
    Site("c", "attention", (6,), (8,)),
    Site("d", "conv", (3,), (6,), spatial=1),
    Site("e", "conv", (3,), (6,), spatial=2),
    Site("f", "conv", (3,), (8,), spatial=3),
    Site("g", "layer_norm", (6,), (6,)),
    Site("h", "batch_norm", (6,), (6,)),
    Site("i", "conv", (3,), (6,), dtype="bfloat16", spatial=2),
    Site("j", "dense", (5,), (6,), dtype="bfloat16"),
]
PAIRS = [(name, site) for site in SITES for name in fitting(site)]
IDS = [f"{name}-{site.kind}-{site.spatial}-{site.dtype}" for name, site in PAIRS]
LEARNING = [(name, site) for name, site in PAIRS if site.dtype == "float32" and site.spatial < 3]


def seed_of(name, site):
    plant = make_plant(site, 0, name, {}, "add", False)
    features = site.in_features if get_blueprint(name).reads == "input" else site.out_features
    u = jax.random.normal(jax.random.key(1), (3, *(5, 4, 3)[: site.spatial], features), site.dtype)
    return plant, jax.jit(lambda key: seed_init(plant, site, key))(jax.random.key(0)), u


@pytest.mark.parametrize(("name", "site"), PAIRS, ids=IDS)
def test_every_blueprint_is_exactly_zero_at_birth_and_in_the_sites_dtype(name, site):
    """Identity at birth with the blend add."""
    plant, params, u = seed_of(name, site)
    f, _ = seed_apply(plant, site, params, u)
    assert not np.any(np.asarray(f, np.float32))
    assert f.shape == (*u.shape[:-1], site.out_features)
    assert all(leaf.dtype == site.dtype for leaf in jax.tree.leaves((params, f)))
    leaves = jax.tree.leaves(params)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves), "donation needs separate buffers"


@pytest.mark.parametrize(("name", "site"), LEARNING, ids=lambda v: v if isinstance(v, str) else f"{v.kind}{v.spatial}")
def test_every_blueprint_learns_and_all_its_parameters_move(name, site):
    """30 Adam steps towards a seed of the same kind halve the error at least; no parameter is dead."""
    plant, params, u = seed_of(name, site)
    noise = jax.random.key(9)
    moved = lambda v: v + 0.5 * jax.random.normal(jax.random.fold_in(noise, v.size), v.shape)  # noqa: E731
    target = jax.jit(lambda: seed_apply(plant, site, jax.tree.map(moved, params), u)[0])()
    tx = optax.adam(0.05)

    def loss(params):
        return jnp.mean(jnp.square(seed_apply(plant, site, params, u)[0] - target))

    @jax.jit
    def train(params):
        def step(carry, _):
            value, grads = jax.value_and_grad(loss)(carry[0])
            updates, state = tx.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=60)

    (after, _), losses = train(params)
    assert losses[-1] < 0.5 * losses[0]
    moved = jax.tree.map(lambda p, q: bool(jnp.any(p != q)), params, after)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize(("space", "width"), [((1, 1), 8), ((2, 1), 1)])
def test_convolution_seeds_work_at_any_size_of_image_and_width(space, width):
    """An image of one pixel and a single channel included: the last layer still gets a gradient."""
    site = Site("s", "conv", (3,), (width,), spatial=2)
    u = jax.random.normal(jax.random.key(1), (4, *space, width)) + 1.0
    for name in fitting(site):
        plant = make_plant(site, 0, name, {}, "add", False)
        params = jax.jit(lambda n=plant: jax.tree.map(lambda v: v + 0.1, seed_init(n, site, jax.random.key(0))))()
        grads = jax.jit(jax.grad(lambda p, n=plant: jnp.sum(jnp.cos(seed_apply(n, site, p, u)[0] + u))))(params)
        assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads)), name
        last = grads["excite_bias" if name == "se" else "up"]
        assert bool(jnp.any(last != 0)), name


def test_config_reaches_the_seed():
    """Shapes follow rank, hidden, reduction and kernel; activation and scale change the output."""
    dense, conv = SITES[0], SITES[4]

    def shapes(site, name, **config):
        plant = make_plant(site, 0, name, config, "add", False)
        return jax.tree.map(jnp.shape, seed_shapes(plant, site))

    assert shapes(dense, "lora", rank=3) == {"down": (5, 3), "up": (3, 6)}
    assert shapes(dense, "mlp", hidden=7)["up"] == (7, 6)
    assert shapes(conv, "bottleneck", reduction=3)["conv"] == (3, 3, 2, 2)
    assert shapes(conv, "conv_light", kernel=5)["conv"] == (5, 5, 6, 6)
    assert shapes(conv, "se", reduction=100)["squeeze"] == (6, 1)


@pytest.mark.parametrize(
    ("name", "config", "word"),
    [
        ("lora", {"rank": 0}, "rank must be 1 or more"),
        ("lora", {"rank": "eight"}, "cannot be built"),
        ("mlp", {"hidden": -2}, "hidden must be 1 or more"),
        ("mlp", {"activation": "swish"}, "gelu, relu"),
    ],
)
def test_a_wrong_config_value_is_refused_before_anything_changes(name, config, word):
    """Contract 5."""
    with pytest.raises(ValueError, match=word):
        make_plant(SITES[0], 0, name, config, "add", False)


def test_a_pair_of_functions_becomes_a_blueprint():
    """Config comes from `init`'s keyword defaults; `apply` gets `site` and config only where it names them."""

    def init(key, site, *, gain=2.0):
        return {"w": jnp.zeros((site.out_features,), site.dtype)}

    made = register_blueprint("scale", init=init, apply=lambda p, u, gain, site: u * p["w"] * gain, kinds="dense")
    assert dict(made.config) == {"gain": 2.0} and made.reads == "output" and made.kinds == ("dense",)
    assert set(register_blueprint("plain", init=init, apply=lambda p, u: u * p["w"]).kinds) == set(KINDS)
    given_host = host("mlp")
    morph = esper_jax.germinate(
        esper_jax.morph(given_host.variables), "Dense_0", "scale", key=jax.random.key(0), gain=3.0
    )
    assert dict(morph.spec.plants[0].config) == {"gain": 3.0}
    assert esper_jax.graft(given_host.model)(morph, given_host.x).shape == (8, 3)


def test_a_flax_module_becomes_a_blueprint():
    """`module(site, **config)` with parameters only."""

    def module(site, width=4):
        return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(site.out_features, kernel_init=nn.initializers.zeros)])

    register_blueprint("flaxy", module=module, reads="input", kinds=("dense",))
    given_host = host("mlp")
    morph = esper_jax.germinate(
        esper_jax.morph(given_host.variables), "Dense_1", "flaxy", key=jax.random.key(0), width=2
    )
    assert morph.seeds["Dense_1"]["slot_0"]["layers_0"]["kernel"].shape == (6, 2)
    for _ in range(3):
        morph = esper_jax.advance(morph, "Dense_1")
    forward = esper_jax.graft(given_host.model)
    np.testing.assert_allclose(forward(morph, given_host.x), given_host.model.apply(given_host.variables, given_host.x))


def test_a_module_with_more_than_parameters_is_refused():
    """Contract 5: the message names the collection."""
    register_blueprint("stateful", module=lambda site: nn.BatchNorm(use_running_average=False))
    with pytest.raises(ValueError, match="batch_stats"):
        make_plant(SITES[0], 0, "stateful", {}, "add", False)
    register_blueprint("no_module", module=lambda site: jnp.sin)
    with pytest.raises(ValueError, match=r"flax\.linen\.Module"):
        make_plant(SITES[0], 0, "no_module", {}, "add", False)


@pytest.mark.parametrize(
    ("init", "apply", "word"),
    [
        (lambda key, site: {"w": jnp.zeros(3)}, lambda p, u: u[..., :2], r"gives shape \(2, 2\)"),
        (lambda key, site: {"w": jnp.zeros(3, jnp.int32)}, lambda p, u: u, "floating arrays"),
        (lambda key, site: {"w": jnp.zeros(3)}, lambda p, u: u > 0, "gives dtype bool"),
        (lambda key, site: {"w": jnp.zeros(3)}, lambda p, u: u @ p["w"][:2], "cannot be built"),
        (lambda key, site: {"w": jnp.zeros(3)}, lambda p, u: u.sum(), r"gives shape \(\)"),
    ],
)
def test_germination_refuses_a_blueprint_that_does_not_fit_before_anything_changes(init, apply, word):
    """Contract 5: by shapes alone, and the morph is as it was."""
    register_blueprint("odd", init=init, apply=apply, kinds=("dense",))
    morph = esper_jax.morph(host("mlp").variables)
    with pytest.raises(ValueError, match=word):
        esper_jax.germinate(morph, "Dense_0", "odd", key=jax.random.key(0))
    assert morph.spec.plants == () and morph.seeds == {}


def test_registering_wrongly_says_what_is_wrong():
    """Rule 4 of the design."""
    pair = {"init": lambda key, site: {}, "apply": lambda p, u: u}
    with pytest.raises(ValueError, match="exists already"):
        register_blueprint("lora", **pair)
    with pytest.raises(ValueError, match="one of input, output, call"):
        register_blueprint("x", reads="both", **pair)
    with pytest.raises(ValueError, match="unknown site kind 'linear'; choose from dense"):
        register_blueprint("x", kinds=("linear",), **pair)
    with pytest.raises(ValueError, match="either init= and apply=, or module="):
        register_blueprint("x", init=pair["init"])
    with pytest.raises(ValueError, match="either init= and apply=, or module="):
        register_blueprint("x", module=lambda site: nn.Dense(1), **pair)
    assert "x" not in _REGISTRY
    assert register_blueprint("lora", replace=True, **pair) is get_blueprint("lora")
