"""Layers and hosts that are not quite what they look like."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import esper_jax
from esper_jax import Stage
from esper_jax.kasmina.summary import equal_bits

from .hosts import in_stage, noisy

X = jax.random.normal(jax.random.key(1), (2, 6, 4))


def test_a_trace_lets_the_model_update_its_statistics_and_draw_random_numbers():
    """`morph` is given neither `mutable=` nor `rngs=`; only shapes come of the call."""

    class Always(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))
            return nn.Dropout(0.5, deterministic=False)(x)

    model = Always()
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    morph = esper_jax.morph(variables, model=model, example=X)
    assert [(site.path, site.kind) for site in morph.spec.sites] == [
        ("BatchNorm_0", "batch_norm"),
        ("Dense_0", "dense"),
    ]


def test_an_error_under_a_site_guessed_wrongly_has_a_note_that_says_what_to_give():
    """A stack of stacks under a name of its own looks like a layer to heads, and only the transform can complain."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            many = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
            )
            return many(4, name="many")(x).mean(0), None

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return nn.Dense(2)(scanned(name="blocks")(x, None)[0])

    model, x = Outer(), X
    variables = model.init(jax.random.key(0), x)
    with pytest.warns(UserWarning, match=r"blocks/many \(Dense, stacked along more than one axis\)"):
        traced = esper_jax.morph(variables, model=model, example=x)
    assert [site.path for site in traced.spec.sites] == ["Dense_0"]
    morph = esper_jax.germinate(esper_jax.morph(variables), "blocks/many", "lora", key=jax.random.key(0))
    with pytest.raises(ValueError, match="vmap was requested") as caught:
        esper_jax.graft(model)(morph, x)
    assert any("morph() knows blocks/many by their parameters alone" in note for note in caught.value.__notes__)


class Doubled(nn.Dense):
    """A layer of the user's own on top of Flax's."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Shifted(nn.Module):
    """A norm of the user's own, whose scale is a difference from 1."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros_init(), x.shape[-1:])
        return nn.standardize(x) * (1 + scale)


@pytest.mark.parametrize(
    ("make", "blueprint", "why"),
    [
        (lambda: nn.WeightNorm(nn.Dense(3, name="layer")), "lora", "inside WeightNorm"),
        (lambda: Doubled(3, name="layer"), "lora", "a Doubled, not one of Flax's own"),
        (lambda: Shifted(name="layer"), "affine", "a Shifted, not one of Flax's own"),
        (lambda: nn.Conv(3, (3,), mask=jnp.ones((3, 4, 3)).at[0].set(0), name="layer"), "lora", "a Conv with a mask"),
    ],
    ids=["wrapped", "subclass", "own", "masked"],
)
def test_a_fossil_at_a_layer_that_uses_its_weights_in_a_way_of_its_own_is_not_folded(make, blueprint, why):
    """Folding into such a kernel would change the network; the seed lives there all the same."""

    class Host(nn.Module):
        @nn.compact
        def __call__(self, x):
            return make()(x) * 1

    model, x = Host(), X
    variables = model.init(jax.random.key(0), x)
    morph = esper_jax.morph(variables, where=r"^layer$", model=model, example=x)
    morph = esper_jax.germinate(morph, "layer", blueprint, key=jax.random.key(0))
    grown = in_stage(noisy(morph, 1), Stage.FOSSILIZED)
    with pytest.warns(UserWarning, match=f"layer slot 0: the layer layer is {why}"):
        folded = esper_jax.fold(grown)
    assert folded.spec == grown.spec and equal_bits(folded.host, grown.host)
