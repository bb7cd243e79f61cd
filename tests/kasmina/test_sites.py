"""Finding sites: from names and shapes alone, and from a trace of the model."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import esper_jax
from esper_jax import Stage

from .hosts import HOSTS, host, in_stage, noisy

X = jax.random.normal(jax.random.key(1), (2, 6, 4))


def kinds(morph):
    return {site.path: (site.kind, site.in_shape, site.out_shape) for site in morph.spec.sites}


class Many(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3,), feature_group_count=2)(x)
        x = nn.LayerNorm()(x)
        x = nn.DenseGeneral((2, 4))(x)
        x = nn.DenseGeneral(8, axis=(-2, -1))(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
        return nn.Dense(3)(x)


TRUTH = {
    "BatchNorm_0": ("batch_norm", (8,), (8,)),
    "Conv_0": ("conv", (4,), (8,)),
    "DenseGeneral_0": ("dense_general", (8,), (2, 4)),
    "DenseGeneral_1": ("dense_general", (2, 4), (8,)),
    "Dense_0": ("dense", (8,), (3,)),
    "LayerNorm_0": ("layer_norm", (8,), (8,)),
    "MultiHeadDotProductAttention_0": ("attention", (8,), (8,)),
}


def test_a_trace_reads_every_kind_and_shape_exactly():
    """Grouped convolutions, tuple features and tuple axes included."""
    model = Many()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    found = kinds(esper_jax.morph(variables, model=model, example=X))
    assert {path: found[path] for path in TRUTH} == TRUTH
    assert all(site.traced for site in esper_jax.morph(variables, model=model, example=X).spec.sites)
    by_apply = esper_jax.morph(variables, model=model.apply, example=(X,))
    assert kinds(by_apply) == found


def test_names_and_shapes_alone_give_the_same_but_for_grouped_convolutions():
    """The kernel of a grouped convolution does not tell its input features."""
    variables = jax.jit(Many().init)(jax.random.key(0), X)
    found = kinds(esper_jax.morph(variables))
    assert {p: s for p, s in found.items() if p in TRUTH and p != "Conv_0"} == {
        p: s for p, s in TRUTH.items() if p != "Conv_0"
    }
    assert found["Conv_0"][0] == "conv"


@pytest.mark.parametrize("name", HOSTS)
def test_inferred_and_traced_sites_agree_on_the_hosts(name):
    """With and without `model=`; a nested path is joined by `/`."""
    given = host(name)
    inferred = kinds(esper_jax.morph(given.variables))
    assert inferred == kinds(esper_jax.morph(given.variables, model=given.model, example=given.x))
    assert kinds(esper_jax.morph(given.variables["params"])).keys() == inferred.keys()
    assert tuple(inferred) == tuple(sorted(inferred))


def test_where_takes_a_regex_or_a_predicate_on_path_and_kind():
    """Both search the whole path."""
    variables = host("transformer").variables
    paths = lambda where: [s.path for s in esper_jax.sites(variables, where=where)]  # noqa: E731
    assert paths(r"Block_0/Dense") == ["CheckpointBlock_0/Dense_0", "CheckpointBlock_0/Dense_1"]
    assert paths(lambda path, kind: kind == "attention") == [
        f"CheckpointBlock_{i}/MultiHeadDotProductAttention_0" for i in (0, 1)
    ]
    assert esper_jax.sites(esper_jax.morph(variables, where="^Dense_0$")) == esper_jax.sites(
        variables, where="^Dense_0$"
    )


class Odd(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(5, 4)(ids)
        x = nn.ConvTranspose(4, (3,))(x)
        x = nn.GroupNorm(2)(nn.RMSNorm()(x))
        x = x + nn.Einsum((4, 4, 2), "...i,ijk->...jk")(x).sum(-1)
        x = nn.ConvLocal(4, (2,))(x)
        x = nn.Einsum((4, 4), "...i,ij->...i")(x)
        x = x * self.param("gain", nn.initializers.ones, (4,))
        return nn.Dense(3)(x)


FOUND = {
    "ConvTranspose_0": "conv_transpose",
    "Dense_0": "dense",
    "Einsum_0": "einsum",
    "Embed_0": "embed",
    "GroupNorm_0": "group_norm",
    "RMSNorm_0": "rms_norm",
}


@pytest.mark.parametrize("traced", [False, True])
def test_unsupported_layers_give_exactly_one_warning_that_names_them(traced):
    """They are skipped and work as before; `where` silences it. An einsum's equation is known from a trace only."""
    model, ids = Odd(), jnp.arange(5)[None]
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    how = {"model": model, "example": ids} if traced else {}
    with pytest.warns(UserWarning, match=r"skipped \d layer") as caught:
        morph = esper_jax.morph(variables, **how)
    assert len(caught) == 1 and caught[0].filename == __file__
    for name in ("ConvLocal_0", "Einsum_1"):
        assert name in str(caught[0].message)
    found = {path: kind for path, kind in FOUND.items() if traced or kind != "einsum"}
    assert {site.path: site.kind for site in morph.spec.sites} == found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        esper_jax.morph(variables, where="^Dense", **how)


def test_a_norm_over_another_axis_than_the_last_is_no_site():
    """Features are the last axis at a site; a square input would hide the mistake."""

    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, axis=1)(x)
            return nn.Dense(2)(nn.LayerNorm(reduction_axes=1, feature_axes=1)(x))

    model, square = Turned(), jnp.ones((2, 4, 4))
    variables = jax.jit(model.init)(jax.random.key(0), square)
    with pytest.warns(UserWarning, match="BatchNorm_0"):
        morph = esper_jax.morph(variables, model=model, example=square)
    assert [s.path for s in morph.spec.sites] == ["Dense_0"]
    guessed = esper_jax.germinate(esper_jax.morph(variables), "BatchNorm_0", "norm", key=jax.random.key(0))
    with pytest.raises(ValueError, match="BatchNorm_0"):
        esper_jax.graft(model)(guessed, square)


def test_a_layer_taken_for_another_kind_says_how_to_name_it():
    """A DenseGeneral with a plain name looks like a convolution; `model=` and `example=` settle it."""

    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral((2, 3), name="proj", use_bias=False)(x)

    model = Named()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    guessed = esper_jax.morph(variables)
    assert guessed.spec.sites[0].kind == "conv"
    guessed = esper_jax.germinate(guessed, "proj", "se", key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"'proj' was taken for conv.*DenseGeneral.*model= and example="):
        esper_jax.graft(model)(guessed, X)
    traced = esper_jax.morph(variables, model=model, example=X)
    assert traced.spec.sites[0].kind == "dense_general"
    grown = in_stage(noisy(esper_jax.germinate(traced, "proj", "lora", key=jax.random.key(0)), 0), Stage.HOLDING)
    assert esper_jax.graft(model)(grown, X).shape == (2, 6, 2, 3)


def test_the_model_itself_can_be_a_site():
    """Its path is `.`."""
    model = nn.Dense(3)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    morph = esper_jax.germinate(esper_jax.morph(variables), ".", "mlp", key=jax.random.key(0))
    assert esper_jax.graft(model)(in_stage(noisy(morph, 0), Stage.HOLDING), X).shape == (2, 6, 3)
