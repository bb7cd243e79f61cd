"""What a sampled step measures at a site, against the same quantities in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_jax
from esper_jax.kasmina.graft import zero_taps
from esper_jax.kasmina.probe import Probe

from .hosts import MLP

X = jax.random.normal(jax.random.key(3), (16, 4))


@pytest.fixture(scope="module")
def measured():
    """The probes of an MLP with one dead unit, with its activations and output gradients from plain autodiff."""
    model = MLP()
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].at[:, 0].set(0.0)
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"].at[0].set(-1.0)
    forward, morph = esper_jax.graft(model), esper_jax.morph(params)

    def loss(taps, sample):
        return jnp.mean(jnp.square(forward.tapped(morph, taps, sample, X)))

    taps = jax.jit(jax.grad(loss))(zero_taps(morph), True)

    def by_hand(outputs):
        u, pairs = X, []
        for i in range(3):
            h = u @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"] + outputs[i]
            pairs.append((u, h))
            u = jax.nn.relu(h)
        return jnp.mean(jnp.square(h)), pairs

    gradients, pairs = jax.grad(by_hand, has_aux=True)([jnp.zeros((16, n)) for n in (6, 5, 3)])
    return {path: Probe(*tap.stats) for path, tap in taps.items()}, pairs, gradients


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_activations_and_gradients_are_measured_not_invented(measured, layer):
    """Rule 3 of the design: to float32 rounding."""
    probes, pairs, gradients = measured
    probe, (u, h), g = probes[f"Dense_{layer}"], pairs[layer], gradients[layer]
    u, h, g = (np.asarray(v, np.float64) for v in (u, h, g))
    assert float(probe.calls) == 1.0
    np.testing.assert_allclose(probe.variance, h.var(axis=0).mean(), rtol=1e-4)
    np.testing.assert_allclose(probe.dead, np.mean(h.var(axis=0) <= 1e-12), atol=1e-6)
    np.testing.assert_allclose(probe.silent, np.mean((h <= 0).all(axis=0)), atol=1e-6)
    np.testing.assert_allclose(probe.gradient, np.linalg.norm(g), rtol=1e-4)
    np.testing.assert_allclose(probe.gain, np.square(u.T @ g).sum(), rtol=1e-3)
    moving = h.std(axis=0) > 0
    corr = np.zeros((h.shape[1],) * 2)
    corr[np.ix_(moving, moving)] = np.corrcoef(h[:, moving].T)
    n = h.shape[1]
    np.testing.assert_allclose(probe.correlation, (np.abs(corr).sum() - np.trace(corr)) / (n * (n - 1)), atol=1e-3)


def test_the_dead_unit_is_found(measured):
    """One of six units never changes."""
    assert float(measured[0]["Dense_0"].dead) == pytest.approx(1 / 6)
    assert float(measured[0]["Dense_0"].silent) >= 1 / 6


def test_the_gain_predicts_the_decrease_of_the_loss_by_a_small_step(measured):
    """First order: a new linear layer moved by a small step against its gradient lowers the loss by gain x step."""
    probes, pairs, gradients = measured
    u, h = pairs[2]
    step = 1e-4
    new = -step * u.T @ gradients[2]
    before, after = jnp.mean(jnp.square(h)), jnp.mean(jnp.square(h + u @ new))
    assert float(before - after) == pytest.approx(step * float(probes["Dense_2"].gain), rel=0.05)


class Grouped(nn.Module):
    """A convolution in groups, of which nothing but a group's inputs is known where it was not traced."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Conv(8, (3, 3), feature_group_count=4)(x)).mean((1, 2)))


class Heads(nn.Module):
    """Linear layers of several axes, under `nn.remat`."""

    @nn.compact
    def __call__(self, x):
        h = nn.remat(nn.DenseGeneral)((2, 3))(x)
        return nn.remat(nn.DenseGeneral)(5, axis=(-2, -1))(jnp.tanh(h))


@pytest.mark.parametrize(
    ("model", "shape", "traced"),
    [(Grouped(), (4, 6, 6, 4), True), (Grouped(), (4, 6, 6, 4), False), (Heads(), (4, 7, 6), True)],
)
def test_a_step_that_always_measures_measures_what_one_that_asks_does(model, shape, traced):
    x = jax.random.normal(jax.random.key(2), shape)
    variables = model.init(jax.random.key(0), x)
    forward = esper_jax.graft(model)
    morph = esper_jax.morph(variables, **({"model": model, "example": x} if traced else {}))

    def loss(taps, sample):
        return jnp.mean(jnp.square(forward.tapped(morph, taps, sample, x)))

    always = jax.jit(jax.grad(lambda taps: loss(taps, True)))(zero_taps(morph))
    asked = jax.jit(jax.grad(loss))(zero_taps(morph), jnp.array(True))
    assert always and all(float(tap.stats[0]) == 1 for tap in always.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), always, asked)
