"""Tables for people: summary, blueprints, compare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_jax
from esper_jax import Stage, Table
from esper_jax.kasmina.summary import equal_bits, program

from .hosts import grown, host, in_stage, noisy

HEADS = ["site", "kind", "features", "slot", "blueprint", "stage", "alpha", "health", "contribution"]


@pytest.fixture(scope="module")
def morph():
    made = esper_jax.morph(host("cnn").variables, slots=2)
    made = esper_jax.germinate(made, "Conv_1", "se", key=jax.random.key(0))
    made = noisy(made, 0)
    state = made.state["Conv_1"].replace(health=jnp.asarray([0.875, jnp.nan]))
    return in_stage(made.replace(state={"Conv_1": state}), {("Conv_1", 0): (Stage.BLENDING, 0.5)})


def test_summary_shows_every_site_and_seed_and_the_totals(morph):
    """Aligned columns, `-` for what is not measured."""
    table = esper_jax.summary(morph)
    lines = table.splitlines()
    assert lines[0].split() == HEADS
    seed = next(line for line in lines if "se(" in line)
    assert seed.split() == ["Conv_1", "conv", "4", "->", "8", "0", "se(reduction=4)", "BLENDING", "0.5", "0.875", "-"]
    assert sum("2 empty" in line for line in lines) == 3 and "1 empty" in lines[lines.index(seed) + 1]
    column = lines[0].index("stage")
    assert seed[column:].startswith("BLENDING")
    assert all(path in table for path in ("BatchNorm_0", "Conv_0", "Dense_0"))
    assert lines[-1].startswith(f"{sum(v.size for v in jax.tree.leaves(morph.params['host']))} host parameters")
    assert lines[-1].endswith("4 sites x 2 slots; seeds: 1 BLENDING")


def test_a_table_is_a_string_that_shows_as_itself(morph):
    """So that a REPL and a notebook print it well."""
    table = esper_jax.summary(morph)
    assert isinstance(table, Table) and isinstance(table, str) and repr(table) == str(table) and "\n" in repr(table)


def test_summary_of_traced_shapes_and_populations_says_what_it_cannot_know(morph):
    """Never a made-up value."""
    seen = []
    jax.jit(lambda m: seen.append(esper_jax.summary(m)) or m.seeds)(morph)
    seen.append(esper_jax.summary(jax.eval_shape(lambda: morph)))
    for table in seen:
        assert "?" in table and "BLENDING" not in table
    population = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), morph)
    assert "*" in esper_jax.summary(population)
    with pytest.raises(TypeError, match="needs a Morph"):
        esper_jax.summary(morph.host)


def test_blueprints_lists_every_blueprint_with_its_size_at_a_64_site():
    """Counted, not typed in."""
    table = esper_jax.blueprints()
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert {"bottleneck", "conv_light", "depthwise", "lora", "mlp", "norm", "se"} <= set(rows)
    assert "1,024" in rows["lora"] and "rank=8" in rows["lora"] and "LoRA" in rows["lora"]
    assert f"{9 * 64 * 64 + 64 * 64 + 128:,}" in rows["conv_light"]


def test_compare_of_an_empty_morph_finds_the_same_program_and_bits():
    """Contract 15, measured on the compiled programs."""
    for name in ("cnn", "transformer"):
        given = host(name)
        result = esper_jax.compare(given.model, esper_jax.morph(given.variables), given.x, repeats=2)
        assert result.same_program and result.equal_bits and result.difference == 0.0
        assert result.host_flops == result.grown_flops > 0
        assert result.host_parameters == result.grown_parameters
        assert "the same program" in repr(result)


def test_compare_of_a_grown_model_measures_what_it_costs_and_changes(morph):
    """Evaluation mode by itself; keywords of the call win."""
    given = host("cnn")
    result = esper_jax.compare(given.model.apply, morph, given.x, repeats=2)
    seeds = sum(leaf.size for leaf in jax.tree.leaves(morph.seeds))
    assert result.grown_parameters - result.host_parameters == seeds
    assert result.grown_flops > result.host_flops
    assert not result.equal_bits and not result.same_program
    bare = given.model.apply(given.variables, given.x, train=False)
    changed = esper_jax.graft(given.model)(morph, given.x, train=False)
    assert result.difference == pytest.approx(float(np.abs(bare - changed).max()), rel=1e-3)
    assert result.host_milliseconds > 0 and result.grown_milliseconds > 0
    training = esper_jax.compare(given.model, morph, given.x, repeats=1, train=True, mutable=["batch_stats"])
    assert training.difference != result.difference


def test_compare_takes_bare_params_and_plain_functions():
    """The form that `morph` was given."""
    given = host("mlp")
    bare = esper_jax.morph(given.variables["params"])
    assert esper_jax.compare(given.model, bare, given.x, repeats=1).same_program
    function = lambda params, x: given.model.apply({"params": params}, x)  # noqa: E731
    assert esper_jax.compare(function, bare, (given.x,), repeats=1).equal_bits


def test_compare_refuses_what_it_cannot_measure(morph):
    """Rule 4 of the design."""
    given = host("cnn")
    with pytest.raises(TypeError, match="needs a Morph"):
        esper_jax.compare(given.model, given.variables, given.x)
    with pytest.raises(ValueError, match="inside jit"):
        jax.jit(lambda m: esper_jax.compare(given.model, m, given.x).difference)(morph)
    with pytest.raises(ValueError, match="repeats"):
        esper_jax.compare(given.model, morph, given.x, repeats=0)


def test_the_tools_of_comparison_see_small_differences():
    """Signed zeros, NaNs, dtypes, one operation more."""
    zero = jnp.zeros(2)
    assert equal_bits({"a": zero * jnp.nan}, {"a": zero * jnp.nan})
    assert not equal_bits(zero, -zero) and not equal_bits(zero, zero.astype(jnp.bfloat16))
    assert not equal_bits({"a": zero}, {"b": zero}) and not equal_bits(zero, zero[None])
    assert program(jnp.sin, 1.0) == program(lambda x: jnp.sin(x), 1.0) != program(lambda x: jnp.sin(x) + 1, 1.0)
    assert grown("mlp", True).spec.plants
