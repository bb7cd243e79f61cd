"""Losses that read values or loop over time in torch: CTC, Gaussian likelihoods, adaptive softmax, sums of margins."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402
from esper_jax.bridge.ops.registry import find  # noqa: E402

nn, functional = torch.nn, torch.nn.functional
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:morph")]
STEPS, ROWS, CLASSES = 9, 4, 5


def speech(zero_infinity=False, reduction="mean", lengths=(9, 6, 7, 5), words=(3, 2, 0, 3)):
    """Log probabilities that sum to one, targets with repeats, and the lengths of both."""
    torch.manual_seed(len(reduction))
    log_probs = torch.randn(STEPS, ROWS, CLASSES).log_softmax(-1)
    targets = torch.tensor([[1, 1, 2], [3, 3, 4], [1, 2, 3], [4, 4, 4]])
    return log_probs, targets, torch.tensor(lengths), torch.tensor(words), 0, reduction, zero_infinity


def both(log_probs, targets, *options):
    """The loss and its gradient, by torch and by JAX."""
    leaf = log_probs.clone().requires_grad_()
    wanted = functional.ctc_loss(leaf, targets, *options)
    wanted.sum().backward()
    rest = [given.numpy() if isinstance(given, torch.Tensor) else given for given in (targets, *options)]
    rest = [jnp.asarray(given) if isinstance(given, np.ndarray) else given for given in rest]
    fn = find("esper_jax.ctc_loss.default").fn
    found, grad = jax.value_and_grad(lambda x: jnp.sum(fn(x, *rest)))(jnp.asarray(log_probs.numpy()))
    value = fn(jnp.asarray(log_probs.numpy()), *rest)
    assert value.shape == tuple(wanted.shape) and jnp.allclose(found, value.sum())
    return (value, grad), (wanted.detach().numpy(), leaf.grad.numpy())


def same(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ctc_is_torchs_with_repeats_empty_targets_and_rows_of_different_lengths(reduction):
    same(*both(*speech(reduction=reduction)))


def test_ctc_of_targets_one_after_another_of_one_row_and_of_another_blank():
    log_probs, targets, lengths, words, *rest = speech()
    flat = torch.cat([row[:n] for row, n in zip(targets, words, strict=True)])
    same(*both(log_probs, flat, lengths, words, *rest))
    same(*both(log_probs[:, 0], targets[0], lengths[0], words[0], *rest))
    same(*both(log_probs, targets - 1, lengths, words, 4, "sum", False))


def test_ctc_of_what_is_no_distribution_has_torchs_gradient_too():
    log_probs, *rest = speech()
    same(*both(log_probs + 0.3, *rest))


@pytest.mark.parametrize("zero", [True, False])
def test_a_target_that_does_not_fit_is_infinitely_far_or_left_out(zero):
    """4 4 4 needs two blanks between; so does no text in no time fit a word."""
    given = speech(zero, "none", lengths=(9, 6, 7, 4))
    found, wanted = both(*given)
    assert np.isinf(wanted[0][3]) != zero and not np.isinf(wanted[0][:3]).any()
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5)
    if zero:
        same(found, wanted)


def test_ctc_takes_long_inputs_and_impossible_classes():
    log_probs, *rest = speech()
    log_probs[:, :, 4] = -torch.inf
    found, wanted = both(log_probs, rest[0].clamp(max=3), *rest[1:])
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5)
    assert jnp.isfinite(found[1]).all()
    torch.manual_seed(0)
    long, words = torch.randn(3000, 2, CLASSES).log_softmax(-1), torch.randint(1, CLASSES, (2, 40))
    options = words, torch.tensor([3000, 2900]), torch.tensor([40, 30]), 0, "mean", False
    (value, grad), theirs = both(long, *options)
    exact = long.double().requires_grad_()
    functional.ctc_loss(exact, *options).backward()
    np.testing.assert_allclose(value, theirs[0], rtol=1e-5)
    ours, torchs = (np.abs(np.asarray(found) - exact.grad.numpy()).max() for found in (grad, theirs[1]))
    assert ours < 3e-4 and torchs < 3e-4  # both round in each of 3,000 steps


class Listener(nn.Module):
    def __init__(self, lengths):
        super().__init__()
        self.hear, self.loss, self.lengths = nn.Linear(6, CLASSES), nn.CTCLoss(), lengths

    def forward(self, sound, words, heard, said):
        log_probs = self.hear(sound).log_softmax(-1).transpose(0, 1)
        if self.lengths == "numbers":
            heard, said = (7,) * len(sound), [2] * len(sound)
        return self.loss(log_probs, words, heard, said)


class Likelihood(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.mean, self.spread, self.loss = nn.Linear(6, 5), nn.Linear(6, 5), nn.GaussianNLLLoss(**options)

    def forward(self, x, y):
        spread = self.spread(x).relu()  # 0 at places, which the loss lifts
        shared, fixed = self.loss(self.mean(x), y, spread.mean(1)), functional.gaussian_nll_loss(self.mean(x), y, 0.5)
        return self.loss(self.mean(x), y, spread), shared, self.loss(self.mean(x), y, spread[:, :1]), fixed


class Adaptive(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(6, 12, [4, 8], div_value=2.0, head_bias=bias)

    def forward(self, x, y):
        x = self.inner(x)
        one = self.softmax(x[0], y[0])
        return *self.softmax(x, y), self.softmax.log_prob(x), self.softmax.predict(x), one.output, one.loss


class Margins(nn.Module):
    def __init__(self, reduction):
        super().__init__()
        self.inner, self.reduction = nn.Linear(6, 6), reduction

    def forward(self, x, sign):
        x = self.inner(x)
        old = {"size_average": False} if self.reduction == "sum" else {"reduction": self.reduction}
        ranked = functional.margin_ranking_loss(x, x.flip(1), sign, 0.2, reduction=self.reduction)
        return ranked, functional.hinge_embedding_loss(x, sign, 0.7, **old)


def signs(*shape):
    return torch.where(torch.rand(shape) > 0.4, 1.0, -1.0)


MODELS = {
    "ctc": lambda: (Listener("tensors"), spoken()),
    "ctc, lengths as numbers": lambda: (Listener("numbers"), spoken()),
    "likelihood": lambda: (Likelihood(), (torch.randn(4, 6), torch.randn(4, 5))),
    "likelihood in full": lambda: (Likelihood(full=True, reduction="none"), (torch.randn(4, 6), torch.randn(4, 5))),
    "likelihood, summed": lambda: (
        Likelihood(eps=0.1, reduction="sum"),
        (torch.randn(4, 6), torch.randn(4, 5)),
    ),
    "adaptive softmax": lambda: (Adaptive(False), (torch.randn(5, 6), torch.tensor([0, 11, 5, 3, 7]))),
    "adaptive softmax with bias": lambda: (Adaptive(True), (torch.randn(3, 6), torch.tensor([1, 0, 2]))),
    **{f"margins, {way}": lambda way=way: (Margins(way), (torch.randn(4, 6), signs(4, 6))) for way in ("mean", "sum")},
    "margins, none": lambda: (Margins("none"), (torch.randn(4, 6), signs(4, 6))),
}


def spoken():
    return (
        torch.randn(4, 7, 6),
        torch.randint(1, CLASSES, (4, 3)),
        torch.tensor([7, 6, 7, 5]),
        torch.tensor([3, 1, 2, 2]),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_computes_it_is_imported(name):
    torch.manual_seed(0)
    module, example = MODELS[name]()
    report = esper_jax.from_torch(module, example).report
    assert report.passed and report.worst("forward") <= 1e-5 and report.worst("training: gradients") <= 1e-4


def test_torch_keeps_its_own_losses():
    names = ("ctc_loss", "gaussian_nll_loss", "margin_ranking_loss", "hinge_embedding_loss")
    before = [getattr(functional, name) for name in names], nn.AdaptiveLogSoftmaxWithLoss.forward
    esper_jax.from_torch(nn.Linear(3, 2), torch.randn(4, 3))
    assert before == ([getattr(functional, name) for name in names], nn.AdaptiveLogSoftmaxWithLoss.forward)


def test_an_empty_layer_is_no_site():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.some, self.none = nn.Linear(4, 3), nn.Linear(4, 0)

        def forward(self, x):
            return torch.cat([self.some(x), self.none(x)], 1)

    report = esper_jax.from_torch(Empty(), torch.randn(4, 4)).report
    assert report.passed and dict(report.bare) == {"none": "its weight is empty"}
