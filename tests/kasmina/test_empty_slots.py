"""Empty slots do not exist in the program."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import esper_jax
from esper_jax.kasmina.summary import equal_bits, program

from .hosts import HOSTS, grown, host


def bare_and_morph(name):
    given = host(name)
    return given, esper_jax.graft(given.model), esper_jax.morph(given.variables)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", HOSTS)
def test_forward_with_empty_slots_is_the_hosts_own_program(name, train):
    """Contract 15."""
    given, forward, morph = bare_and_morph(name)
    kwargs = given.call_kwargs(train)
    bare = program(lambda v, x: given.model.apply(v, x, **kwargs), given.variables, given.x)
    assert program(lambda m, x: forward(m, x, **kwargs), morph, given.x) == bare


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", HOSTS)
def test_gradient_with_empty_slots_is_the_hosts_own_program(name, train):
    """Contract 15."""
    given, forward, morph = bare_and_morph(name)
    others = {k: v for k, v in given.variables.items() if k != "params"}

    def of_host(params, x):
        return given.loss(given.model.apply, {**others, "params": params}, x, train)

    def of_morph(params, x):
        return given.loss(forward, morph.with_params({"host": params, "seeds": {}}), x, train)

    params = given.variables["params"]
    bare, with_slots = (program(jax.value_and_grad(f, has_aux=True), params, given.x) for f in (of_host, of_morph))
    assert with_slots == bare
    assert "cond" not in with_slots


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", HOSTS)
def test_outputs_and_statistics_with_empty_slots_are_equal_to_the_bit(name, train):
    """Contract 15."""
    given, forward, morph = bare_and_morph(name)
    kwargs = given.call_kwargs(train)
    expected = jax.jit(lambda v: given.model.apply(v, given.x, **kwargs))(given.variables)
    assert equal_bits(jax.jit(lambda m: forward(m, given.x, **kwargs))(morph), expected)


def test_a_program_that_differs_is_told_apart():
    """The comparison that the tests of contract 15 rest on sees one added operation, also inside `nn.remat`."""
    given, forward, morph = bare_and_morph("transformer")
    morph = esper_jax.germinate(morph, "CheckpointBlock_0/Dense_1", "norm", key=jax.random.key(0))
    kwargs = given.call_kwargs(False)
    bare = program(lambda v, x: given.model.apply(v, x, **kwargs), given.variables, given.x)
    assert program(lambda m, x: forward(m, x, **kwargs), morph, given.x) != bare


def test_a_morph_with_empty_slots_has_the_hosts_leaves_and_no_others():
    """Contract 15."""
    given, _, morph = bare_and_morph("cnn")
    assert jax.tree.structure(jax.tree.leaves(morph)) == jax.tree.structure(jax.tree.leaves(given.variables))
    assert all(a is b for a, b in zip(jax.tree.leaves(morph), jax.tree.leaves(given.variables), strict=True))


def test_a_seed_that_was_shed_leaves_the_hosts_own_program_behind():
    """Contract 3, 15: lean seeds are removed when they are reset."""
    given, forward, morph = bare_and_morph("mlp")
    grown = esper_jax.germinate(morph, "Dense_1", "lora", key=jax.random.key(0))
    assert program(forward, grown, given.x) != program(forward, morph, given.x)
    pruned = esper_jax.prune(grown, "Dense_1", 0)
    for _ in range(7):
        pruned, _ = esper_jax.tick(pruned)
    shed = esper_jax.shed(pruned)
    assert shed.spec == morph.spec and shed.seeds == {} and shed.state == {}
    assert program(forward, shed, given.x) == program(forward, morph, given.x)


def test_a_method_other_than_call_is_passed_through_to_the_hosts_own_program():
    """Contract 15: `method`, `mutable` and `rngs` pass through."""

    class Two(nn.Module):
        def setup(self):
            self.first, self.second = nn.Dense(3), nn.Dense(2)

        def __call__(self, x):
            return self.second(self.first(x))

        def encode(self, x):
            self.sow("intermediates", "h", x)
            return self.first(x)

    model, x = Two(), jnp.ones((2, 4))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    morph, forward = esper_jax.morph(variables), esper_jax.graft(model.apply)
    kwargs = {"method": "encode", "mutable": ["intermediates"]}
    assert equal_bits(forward(morph, x, **kwargs), model.apply(variables, x, **kwargs))
    grown = esper_jax.germinate(morph, "first", "lora", key=jax.random.key(0))
    assert equal_bits(forward(grown, x, **kwargs), model.apply(variables, x, **kwargs))


@pytest.mark.parametrize("resident", [False, True])
def test_only_seeds_planted_ahead_sit_behind_a_branch(resident):
    """Forward rule: a lean program holds no control flow; a dormant planted seed's compute is skipped."""
    given = host("mlp")
    text = program(esper_jax.graft(given.model), grown("mlp", resident), given.x)
    assert text.count(" cond[") == (len(grown("mlp", True).spec.plants) if resident else 0)
