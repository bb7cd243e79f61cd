"""compact: a finished network without lifecycle machinery."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.blueprints import make_plant, seed_apply
from esper_jax.kasmina.summary import flops

from .hosts import HOSTS, host, in_stage, noisy

CHOICES = {"mlp": ("mlp", "norm"), "cnn": ("bottleneck", "se"), "transformer": ("mlp", "norm")}
SMALL = {"mlp": {"hidden": 4}}


def grown(name, blend="add", resident=False):
    """Two non-linear seeds at the first sites that take them, one lora where it fits; all FOSSILIZED with noise."""
    given = host(name)
    morph = esper_jax.morph(given.variables, where=given.where, model=given.model, example=given.x)
    if resident:
        planted = {name: SMALL.get(name, {}) for name in CHOICES[name]}
        morph = esper_jax.morph(
            given.variables, where=given.where, model=given.model, example=given.x, planted=planted, blend=blend
        )
    else:
        for blueprint in ("lora", *CHOICES[name]):
            site = next(s for s in morph.spec.sites if esper_jax.kasmina.get_blueprint(blueprint).fits(s))
            config = SMALL.get(blueprint, {})
            morph = esper_jax.germinate(morph, site.path, blueprint, key=jax.random.key(0), blend=blend, **config)
    return given, in_stage(noisy(morph, 2), Stage.FOSSILIZED)


def primitives(jaxpr):
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    found |= primitives(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    found |= primitives(inner)
    return found


@pytest.mark.parametrize(
    "resident", [pytest.param(False, id="lean"), pytest.param(True, id="planted", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", HOSTS)
def test_a_compact_network_computes_what_was_grown_without_branches_or_rules(name, resident):
    """Training and evaluation mode, updated collections included; plain dicts of arrays."""
    given, morph = grown(name, resident=resident)
    apply, variables = esper_jax.compact(given.model, morph)
    forward = esper_jax.graft(given.model)
    for train in (True, False):
        kwargs = given.call_kwargs(train)
        expected = jax.jit(lambda m, x, kwargs=kwargs: forward(m, x, **kwargs))(morph, given.x)
        found = jax.jit(lambda v, x, kwargs=kwargs: apply(v, x, **kwargs))(variables, given.x)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5)
    kwargs = given.call_kwargs(False)
    names = primitives(jax.make_jaxpr(lambda v, x: apply(v, x, **kwargs))(variables, given.x).jaxpr)
    host_names = primitives(
        jax.make_jaxpr(lambda v, x: given.model.apply(v, x, **kwargs))(given.variables, given.x).jaxpr
    )
    ours = {"custom_vjp_call", "platform_index", "cond"} if name == "cnn" else set()  # of the seeds' convolution
    assert not (names - host_names - ours) & {"cond", "custom_vjp_call", "while", "platform_index"}
    assert "seeds" in variables and all(type(v) is dict for v in variables.values())
    assert not any(p.blueprint == "lora" for p in morph.spec.plants if p.key in variables["seeds"].get(p.site, {}))


def test_its_price_is_the_hosts_and_the_seeds_own():
    """FLOPs of the compiled call."""
    given, _ = grown("mlp")
    morph = esper_jax.morph(given.variables, where="Dense_1", model=given.model, example=given.x)
    morph = esper_jax.germinate(morph, "Dense_1", "mlp", key=jax.random.key(0), hidden=4)
    morph = in_stage(noisy(morph, 2), Stage.FOSSILIZED)
    apply, variables = esper_jax.compact(given.model, morph)
    whole = flops(jax.jit(apply).lower(variables, given.x).compile())
    bare = flops(jax.jit(given.model.apply).lower(given.variables, given.x).compile())
    site = morph.spec.by_path["Dense_1"]
    plant = make_plant(site, 0, "mlp", {"hidden": 4}, "add", False)
    seed = jax.jit(lambda v, u, h: h + seed_apply(plant, site, v, u)[0])
    u, h = jnp.ones((8, 6)), jnp.ones((8, 5))
    own = flops(seed.lower(morph.seeds["Dense_1"]["slot_0"], u, h).compile())
    assert whole == pytest.approx(bare + own, rel=0.02)


def test_seeds_that_are_no_part_of_the_output_are_dropped_and_alpha_is_a_constant():
    """Dormant, training and pruned seeds leave; one at alpha 0.4 stays at 0.4."""
    given, morph = grown("mlp", blend="gate")
    first, second, *_ = morph.spec.plants
    stages = {(p.site, p.slot): (Stage.TRAINING, 0.0) for p in morph.spec.plants}
    stages[first.site, first.slot] = (Stage.BLENDING, 0.4)
    morph = in_stage(morph, stages)
    apply, variables = esper_jax.compact(given.model, morph)
    assert variables["seeds"].keys() == {first.site} and list(variables["seeds"][first.site]) == [first.key]
    np.testing.assert_allclose(apply(variables, given.x), esper_jax.graft(given.model)(morph, given.x), atol=1e-5)
    assert first.blueprint in repr(apply) and second.blueprint not in repr(apply)
    apply, variables = esper_jax.compact(given.model, in_stage(morph, Stage.DORMANT))
    assert set(variables) == {"params"}
    assert str(jax.make_jaxpr(apply)(variables, given.x)) == str(
        jax.make_jaxpr(given.model.apply)(given.variables, given.x)
    )


def test_a_stacks_layers_keep_their_own_alphas():
    """And a compact network can be trained further, and exported."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(4)(jnp.sin(x)), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return blocks(name="blocks")(x, None)[0]

    x = jax.random.normal(jax.random.key(0), (2, 4))
    variables = jax.jit(Deep().init)(jax.random.key(0), x)
    morph = esper_jax.morph(variables, model=Deep(), example=x)
    morph = noisy(esper_jax.germinate(morph, "blocks/Dense_0", "mlp", key=jax.random.key(0), hidden=3), 1)
    life = morph.state["blocks/Dense_0"]
    stages = jnp.array([Stage.TRAINING, Stage.FOSSILIZED, Stage.BLENDING])
    life = life.replace(
        stage=life.stage.at[:, 0].set(stages), alpha=life.alpha.at[:, 0].set(jnp.array([0.0, 1.0, 0.4]))
    )
    morph = morph.replace(state={"blocks/Dense_0": life})
    apply, variables = esper_jax.compact(Deep(), morph)
    np.testing.assert_allclose(apply(variables, x), esper_jax.graft(Deep())(morph, x), rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda v: jnp.sum(jnp.sin(apply(v, x))))(variables)
    assert [bool(jnp.any(row)) for row in grads["seeds"]["blocks/Dense_0"]["slot_0"]["up"]] == [False, True, True]
    exported = jax.export.export(jax.jit(apply))(variables, x)
    np.testing.assert_allclose(exported.call(variables, x), apply(variables, x), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_baked_is_refused():
    """A broken seed, and a collection of the same name."""
    given, morph = grown("mlp")
    broken = morph.replace(seeds=jax.tree.map(lambda leaf: leaf * jnp.nan, morph.seeds))
    with pytest.raises(ValueError, match="its parameters are not finite"):
        esper_jax.compact(given.model, broken)
    with pytest.raises(TypeError, match="needs a Morph"):
        esper_jax.compact(given.model, given.variables)
