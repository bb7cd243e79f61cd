"""Models that draw random numbers beside dropout: compared with torch by the same numbers, fresh ones in use."""

from __future__ import annotations

import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import optax  # noqa: E402

import esper_jax  # noqa: E402
from esper_jax.bridge import BridgeError  # noqa: E402
from esper_jax.bridge.ops import registry  # noqa: E402
from esper_jax.bridge.ops.random import NOISE, units  # noqa: E402
from esper_jax.bridge.ops.registry import find  # noqa: E402
from esper_jax.bridge.torch_random import _NOISE  # noqa: E402

nn, functional = torch.nn, torch.nn.functional
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:morph")]


class DropPath(nn.Module):
    """Stochastic depth, as vision models write it."""

    def __init__(self, inner, rate, floor):
        super().__init__()
        self.inner, self.rate, self.floor = inner, rate, floor

    def forward(self, x):
        y = self.inner(x)
        if not self.training:
            return x + y
        keep, shape = 1 - self.rate, (x.shape[0],) + (1,) * (x.ndim - 1)
        if self.floor:
            mask = (keep + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()
        else:
            mask = x.new_empty(shape).bernoulli_(keep)
        return x + y.div(keep) * mask


class Autoencoder(nn.Module):
    """A variational one, which draws in evaluation too."""

    def __init__(self, draw):
        super().__init__()
        self.encode, self.decode, self.draw = nn.Linear(6, 8), nn.Linear(4, 6), draw

    def forward(self, x):
        mean, spread = self.encode(x).chunk(2, -1)
        return self.decode(self.draw(mean, (0.5 * spread).exp())), mean, spread


class After(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(6, 5), function

    def forward(self, x):
        return self.function(self.layer(x), self.training)


MODELS = {
    "paths by floor": lambda: nn.Sequential(nn.Linear(6, 6), DropPath(nn.Linear(6, 6), 0.3, True)),
    "paths by bernoulli": lambda: nn.Sequential(nn.Linear(6, 6), DropPath(nn.Linear(6, 6), 0.3, False)),
    "noise like": lambda: Autoencoder(lambda mean, std: mean + std * torch.randn_like(std)),
    "noise of a size": lambda: Autoencoder(lambda mean, std: mean + std * torch.randn(std.shape)),
    "a distribution": lambda: Autoencoder(
        lambda mean, std: torch.distributions.Normal(mean, std, validate_args=False).rsample()
    ),
    "gumbel": lambda: After(lambda x, _: functional.gumbel_softmax(x, 0.7)),
    "hard gumbel": lambda: After(lambda x, _: functional.gumbel_softmax(x, 0.7, hard=True)),
    "slopes": lambda: After(lambda x, training: functional.rrelu(x, 0.1, 0.4, training)),
    "slopes always": lambda: After(lambda x, _: functional.rrelu(x, 0.1, 0.4, True)),
    "slopes in place": lambda: nn.Sequential(nn.Linear(6, 5), nn.RReLU(0.1, 0.4, inplace=True)),
    "spikes": lambda: After(lambda x, _: torch.bernoulli(torch.sigmoid(x)) + torch.sigmoid(x)),
    "categories": lambda: After(
        lambda x, _: torch.distributions.Categorical(logits=x, validate_args=False).sample()[:, None] * x
    ),
    "a permutation": lambda: After(lambda x, _: x + 0.1 * x[torch.randperm(x.shape[0])]),
    "dither": lambda: After(lambda x, training: x + torch.empty_like(x).uniform_(-0.5, 0.5) if training else x),
    "jitter": lambda: After(lambda x, _: x * torch.normal(1.0, 0.1, x.shape) + torch.empty_like(x).normal_(0, 0.1)),
    "places": lambda: After(lambda x, _: x * torch.randint(1, 4, (x.shape[0], 1)) + torch.randint_like(x, 3)),
    "heavy tails": lambda: After(lambda x, _: x * torch.empty_like(x).log_normal_(0, 0.3) + x.new_empty(5).cauchy_()),
    "trials": lambda: After(lambda x, _: x * torch.empty_like(x).geometric_(0.4)),
    "gammas": lambda: After(lambda x, _: x * torch.distributions.Gamma(x.exp() + 0.1, 2.0).rsample()),
    "chi squared": lambda: After(lambda x, _: torch.distributions.StudentT(x.exp() + 2).rsample()),
    "channels": lambda: After(lambda x, training: functional.feature_alpha_dropout(x[..., None], 0.3, training)),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_a_model_draws_comes_over(name):
    module, x = MODELS[name](), torch.randn(4, 6)
    given = esper_jax.from_torch(module, x)
    assert given.report.passed and given.report.checks
    limit = 1e-3 if name in ("gammas", "chi squared") else 1e-4  # torch's slope of a gamma distribution is a fit
    assert given.report.worst("forward") <= 1e-5 and given.report.worst("training: gradients") <= limit
    draw = lambda key: jax.tree.leaves(  # noqa: E731
        given.model.apply(given.variables, jnp.asarray(x.numpy()), train=True, rngs={"dropout": jax.random.key(key)})
    )[0]
    assert jnp.array_equal(draw(1), draw(1))
    assert any(not jnp.array_equal(draw(1), draw(key)) for key in range(2, 12))


class Blocks(nn.Module):
    """Noise in a block that torch computes again on the way back."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            noisy = lambda x, layer=layer: layer(x) * torch.rand_like(x)  # noqa: E731
            x = torch.utils.checkpoint.checkpoint(noisy, x, use_reentrant=False)
        return x


def test_noise_that_is_computed_again_on_the_way_back_is_the_same():
    assert esper_jax.from_torch(Blocks(), torch.randn(4, 6)).report.passed


def test_two_draws_of_one_shape_are_not_the_same_in_a_comparison(monkeypatch):
    """Where they are, their difference would hide a wrong operator behind them."""
    monkeypatch.setattr(registry, "_OPS", dict(registry._OPS))
    esper_jax.bridge.register_op("aten.special_bessel_j0.default", lambda x: 0 * x + 7)
    model = After(lambda x, _: x + (torch.randn_like(x) - torch.randn_like(x)) * torch.special.bessel_j0(x).detach())
    with pytest.raises(BridgeError, match="does not compute what torch computes"):
        esper_jax.from_torch(model, torch.randn(4, 6))


def test_an_import_leaves_the_generators_as_they_were():
    model = nn.Sequential(MODELS["paths by floor"](), MODELS["paths by bernoulli"](), nn.Dropout(), nn.RReLU())
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    esper_jax.from_torch(model, torch.randn(4, 6, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def seeded(x, _):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return x @ torch.randn(5, 5)


def seeded_by_the_generator(x, _):
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(3)
    noise = torch.rand(5)
    torch.set_rng_state(state)
    return x * noise


def forked(x, _):
    with torch.random.fork_rng(devices=()):
        once = torch.rand(5)
    return x * once + torch.rand(5)


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (seeded, "After seeds torch's generator in its forward and draws from it.*are a buffer"),
        (seeded_by_the_generator, "After seeds torch's generator"),
        (
            lambda x, training: x * (random.random() < 0.9999) if training else x,
            r"Python's or numpy's random module.*train=False\) imports evaluation",
        ),
        (lambda x, _: x * np.random.rand(), "Python's or numpy's random module"),  # noqa: NPY002
        (
            lambda x, _: x * torch.rand(5, generator=torch.Generator()),
            r"After draws by torch.rand from a torch.Generator of its own.*\(leave generator= away\)",
        ),
        (forked, "After draws the same numbers twice, by torch.random.fork_rng"),
        (lambda x, _: x + torch.empty_like(x).random_(0, 5), "After draws by Tensor.random_.*draw by torch.randint"),
    ],
)
def test_numbers_that_a_graph_would_hold_for_ever_are_refused(function, cause):
    with pytest.raises(BridgeError, match=cause):
        esper_jax.from_torch(After(function), torch.randn(4, 6))


def constant(x, _):
    np.random.seed(0)  # noqa: NPY002
    return x * torch.from_numpy(np.random.randn(5)).float()  # noqa: NPY002


def masked(x, training):
    torch.manual_seed(0)
    return functional.dropout(x, 0.5, training)


def shuffled(x, _):
    return x[:, torch.randperm(1)] + torch.rand(4, 1)  # of one number, no number is drawn


@pytest.mark.parametrize("function", [constant, masked, shuffled])
def test_seeded_constants_and_seeded_dropout_come_over(function):
    assert esper_jax.from_torch(After(function), torch.randn(4, 6)).report.passed


class Unread(nn.Module):
    """Draws that nothing reads, before one that is read; the mean alone in evaluation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        torch.empty(0).normal_()
        for _ in range(2):
            if torch.rand([]) is None:
                continue
            x = self.layer(x)
        torch.rand_like(x)
        return x * torch.rand_like(x) if self.training else x


def test_draws_that_nothing_reads_count_and_ask_for_no_key():
    given = esper_jax.from_torch(Unread(), torch.randn(4, 6))
    assert given.report.passed and given.report.noise == ("aten.rand_like.default",)
    given.model.apply(given.variables, jnp.ones((2, 6)))


@pytest.mark.parametrize("replacement", [False, True])
def test_units_are_sampled_uniformly(replacement):
    model = After(lambda x, _: x[:, torch.multinomial(torch.ones(5), 4, replacement)])
    assert esper_jax.from_torch(model, torch.randn(4, 6)).report.passed


def test_the_numbers_of_a_comparison_are_independent():
    first, second, fourth = (units((64, 64), number) - 0.5 for number in (0, 1, 3))
    assert len(np.unique(first)) > 4090 and np.linalg.matrix_rank(first) == 64
    for other in (second, fourth):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05
        assert abs(np.corrcoef(first.ravel()[1:], other.ravel()[:-1])[0, 1]) < 0.05
    assert np.array_equal(units((5,), 2), units((5,), 2)) and units((1000,)).min() > 0 and units((1000,)).max() < 1


def test_both_sides_know_the_same_operators():
    """What JAX has a form of is given to torch, too, in a comparison."""
    known = {name.removeprefix("aten.").split(".")[0] for name in NOISE}
    assert {name.removesuffix("_functional") for name in known - {"rrelu"}} == {
        name.removesuffix("_functional") for name in _NOISE
    }


@pytest.mark.parametrize(
    "name", ["Normal", "Categorical", "OneHotCategoricalStraightThrough", "RelaxedOneHotCategorical"]
)
def test_distributions_come_over_as_they_are_by_default(name):
    def drawn(x, _):
        kind = getattr(torch.distributions, name)
        if name == "Normal":
            return kind(x, x.exp()).rsample()
        if name == "Categorical":
            return kind(logits=x).sample()[:, None] * x
        return (kind(torch.tensor(0.7), logits=x) if "Relaxed" in name else kind(logits=x)).rsample()

    validates = torch.distributions.Distribution._validate_args
    assert esper_jax.from_torch(After(drawn), torch.randn(4, 6)).report.passed
    assert torch.distributions.Distribution._validate_args is validates


def test_a_model_that_draws_in_evaluation_is_morphed_and_trained():
    model, variables = esper_jax.from_torch(MODELS["noise like"](), torch.randn(8, 6))
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    morph = esper_jax.morph(variables, model=model, example=x[:8])
    assert [site.path for site in morph.spec.sites] == ["decode", "encode"]
    trainer = esper_jax.Tolaria(
        model,
        lambda output, y: jnp.mean((output[0] - y) ** 2, -1),
        optax.adam(1e-2),
        eval_kwargs={"rngs": {"dropout": jax.random.key(3)}},
        batch_size=16,
        score=lambda output, y: -jnp.mean((output[0] - y) ** 2, -1),
        progress=False,
    )
    state = trainer.init(morph, key=jax.random.key(0))
    _, history = trainer.fit(state, (x, x), (x, x), epochs=3)
    assert history.records[-1]["loss"] < history.records[0]["loss"]


def test_imports_in_several_threads_take_turns():
    failed = []

    def load():
        try:
            assert esper_jax.from_torch(MODELS["paths by floor"](), torch.randn(4, 6)).report.passed
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_a_size_has_torchs_default_dtype(dtype):
    model = After(lambda x, _: (torch.rand(x.shape), x.float() + torch.randn(x.shape)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        given = esper_jax.from_torch(model.float(), torch.randn(4, 6, dtype=torch.float32))
    finally:
        torch.set_default_dtype(before)
    drawn, _ = given.model.apply(given.variables, jnp.ones((2, 6)), rngs={"dropout": jax.random.key(0)})
    assert given.report.passed and drawn.dtype == str(dtype).removeprefix("torch.")


def test_the_report_names_what_is_drawn():
    report = esper_jax.from_torch(MODELS["noise like"](), torch.randn(4, 6)).report
    assert report.noise == ("aten.randn_like.default",)
    slopes = esper_jax.from_torch(nn.Sequential(nn.Linear(6, 6), nn.RReLU()), torch.randn(4, 6)).report
    assert slopes.noise == ("aten.rrelu.default",)
    assert "draws random numbers: aten.randn_like.default; torch and JAX were given the same" in str(report)
    assert not esper_jax.from_torch(nn.Sequential(nn.Linear(6, 6), nn.Dropout()), torch.randn(4, 6)).report.noise


def test_a_model_that_draws_in_evaluation_asks_for_a_key():
    model, variables = esper_jax.from_torch(MODELS["noise like"](), torch.randn(4, 6))
    with pytest.raises(BridgeError, match=r"Autoencoder draws random numbers in evaluation .*with rngs=\{'dropout'"):
        model.apply(variables, jnp.ones((2, 6)))
    noisy = model.apply(variables, jnp.ones((2, 6)), rngs={"dropout": jax.random.key(0)})
    assert not jnp.array_equal(noisy[0][0], noisy[0][1]) and jnp.array_equal(noisy[1][0], noisy[1][1])


def test_another_kind_of_noise_is_still_refused():
    with pytest.raises(
        BridgeError, match=r"(?s)draws random numbers by aten\.randint_like\.Tensor.*train=False\) imports"
    ):
        esper_jax.from_torch(
            After(lambda x, training: x + torch.randint_like(x, torch.tensor(3)) if training else x), torch.ones(4, 6)
        )


N = 40_000
LIKE = jnp.zeros(N)
MOMENTS = {
    "rand.default": (([N],), 0.5, 1 / 12),
    "rand_like.default": ((LIKE,), 0.5, 1 / 12),
    "uniform.default": ((LIKE, -1.0, 3.0), 1.0, 16 / 12),
    "randn.default": (([N],), 0.0, 1.0),
    "randn_like.default": ((LIKE,), 0.0, 1.0),
    "normal_functional.default": ((LIKE, 2.0, 0.5), 2.0, 0.25),
    "normal.float_float": ((2.0, 0.5, [N]), 2.0, 0.25),
    "normal.Tensor_float": ((LIKE + 2, 0.5), 2.0, 0.25),
    "normal.float_Tensor": ((2.0, LIKE + 0.5), 2.0, 0.25),
    "normal.Tensor_Tensor": ((LIKE + 2, LIKE + 0.5), 2.0, 0.25),
    "exponential.default": ((LIKE, 2.0), 0.5, 0.25),
    "log_normal.default": ((LIKE, 0.2, 0.3), np.exp(0.245), (np.exp(0.09) - 1) * np.exp(0.49)),
    "geometric.default": ((LIKE, 0.3), 1 / 0.3, 0.7 / 0.09),
    "_standard_gamma.default": ((LIKE + 2.5,), 2.5, 2.5),
    "bernoulli.default": ((LIKE + 0.3,), 0.3, 0.21),
    "bernoulli.Tensor": ((LIKE, LIKE + 0.3), 0.3, 0.21),
    "bernoulli.p": ((LIKE, 0.3), 0.3, 0.21),
    "poisson.default": ((LIKE + 3,), 3.0, 3.0),
    "randint.default": ((5, [N]), 2.0, 2.0),
    "randint.low": ((-2, 3, [N]), 0.0, 2.0),
    "randint_like.default": ((LIKE, 5), 2.0, 2.0),
    "randint_like.low_dtype": ((LIKE, -2, 3), 0.0, 2.0),
    "multinomial.default": ((jnp.array([0.2, 0.5, 0.3]), N, True), 1.1, 0.49),
    "rrelu.default": ((LIKE - 1, 0.1, 0.5, True), -0.3, 0.16 / 12),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_numbers_of_16_bits_are_drawn_wide(dtype):
    """In 8 bits an exponential number would be 0 once in 128 draws, and Gumbel noise beyond any logit."""
    like, draw = jnp.zeros(200_000, dtype), lambda: jax.random.key(1)
    exponential = np.asarray(find("aten.exponential.default").fn(like, draw=draw), np.float64)
    assert (exponential > 0).all() and exponential.max() > 9 and -np.log(exponential.min()) < 20
    normal = np.asarray(find("aten.randn_like.default").fn(like, draw=draw), np.float64)
    assert np.abs(normal).max() > 4 and len(np.unique(normal)) > 1000
    weights = jnp.asarray([1 - 1e-3, 1e-3], dtype)
    rare = np.asarray(find("aten.multinomial.default").fn(weights, 200_000, True, draw=draw))
    assert 100 < rare.sum() < 350


def test_poisson_numbers_are_drawn_whatever_the_kind_of_key():
    key = jax.random.key(0, impl="rbg")
    found = find("aten.poisson.default").fn(jnp.full(4000, 3.0), draw=lambda: key)
    assert abs(float(found.mean()) - 3) < 0.2


@pytest.mark.parametrize("name", sorted(MOMENTS))
def test_fresh_numbers_have_their_mean_and_variance(name):
    args, mean, variance = MOMENTS[name]
    found = np.asarray(find(f"aten.{name}").fn(*args, draw=lambda: jax.random.key(7)), np.float64)
    assert found.shape == (N,)
    error = 5 * np.sqrt(variance / N)
    assert abs(found.mean() - mean) < error
    assert abs(found.var() - variance) < 10 * variance / np.sqrt(N) + 1e-9


def test_small_gammas_are_never_zero():
    """Their logarithm is taken, as of torch's."""
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        found = find("aten._standard_gamma.default").fn((LIKE + 0.01).astype(dtype), draw=lambda: jax.random.key(7))
        assert found.dtype == dtype and jnp.isfinite(jnp.log(found)).all()


def test_numbers_of_a_cauchy_distribution_have_its_quartiles():
    """It has no mean."""
    found = find("aten.cauchy.default").fn(LIKE, 1.0, 2.0, draw=lambda: jax.random.key(7))
    np.testing.assert_allclose(np.quantile(np.asarray(found), [0.25, 0.5, 0.75]), [-1, 1, 3], atol=0.1)


def test_draws_without_replacement_are_distinct_and_follow_the_weights():
    multinomial = find("aten.multinomial.default").fn
    keys = jax.random.split(jax.random.key(0), 4000)
    weights = jnp.array([0.1, 0.0, 0.6, 0.3])
    found = np.asarray(jax.vmap(lambda key: multinomial(weights, 2, draw=lambda: key))(keys))
    assert (found[:, 0] != found[:, 1]).all() and (found != 1).all()
    first = np.bincount(found[:, 0], minlength=4) / len(keys)
    np.testing.assert_allclose(first, weights, atol=0.04)
    assert sorted(np.asarray(find("aten.randperm.default").fn(50, draw=lambda: jax.random.key(0)))) == list(range(50))
