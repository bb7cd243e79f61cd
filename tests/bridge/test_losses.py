"""Losses that read values or loop over time in torch: CTC, Gaussian likelihoods, adaptive softmax, sums of margins."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402
from esper_jax.bridge import torch_losses  # noqa: E402
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


@pytest.mark.parametrize("padding", [-100, -1, CLASSES, 1000])
def test_what_stands_behind_a_targets_end_is_not_read(padding):
    log_probs, targets, lengths, words, *rest = speech()
    behind = torch.arange(targets.shape[1]) >= words[:, None]
    same(*both(log_probs, targets.masked_fill(behind, padding), lengths, words, *rest))


def test_ctc_is_summed_in_float32():
    log_probs, *rest = speech()
    fn = find("esper_jax.ctc_loss.default").fn
    rest = [jnp.asarray(given.numpy()) if isinstance(given, torch.Tensor) else given for given in rest]
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = jnp.asarray(log_probs.numpy()).astype(dtype)
        value, grad = jax.value_and_grad(lambda x: fn(x, *rest))(narrow)
        wide = fn(narrow.astype(jnp.float32), *rest)
        assert value.dtype == dtype and jnp.allclose(value, wide, rtol=1e-2) and jnp.isfinite(grad).all()


def test_targets_that_are_all_empty_and_lengths_of_any_whole_kind():
    log_probs, targets, lengths, _, *rest = speech()
    nothing = torch.zeros(ROWS, dtype=torch.long)
    same(*both(log_probs, targets[0, :0], lengths, nothing, *rest))
    same(*both(log_probs, targets[:, :0], lengths, nothing, *rest))
    fn = find("esper_jax.ctc_loss.default").fn
    long = jnp.log(jnp.full((400, 1, 2), 0.5))
    ones = jnp.tile(jnp.ones(150, jnp.int32), (1, 1))
    narrow = fn(long, ones, jnp.array([400]), jnp.array([150], jnp.uint8), 0, "sum", False)
    assert narrow == fn(long, ones, jnp.array([400]), jnp.array([150]), 0, "sum", False) and jnp.isfinite(narrow)


def test_concatenated_targets_that_are_longer_than_the_input_do_not_fit():
    log_probs = torch.randn(3, 2, CLASSES).log_softmax(-1)
    given = torch.tensor([1, 2, 1, 2, 1]), torch.tensor([3, 3]), torch.tensor([4, 1]), 0, "none", False
    (value, _), wanted = both(log_probs, *given)
    assert np.isinf(value[0]) and np.isinf(wanted[0][0])
    np.testing.assert_allclose(value[1], wanted[0][1], rtol=1e-5)


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


def test_a_negative_variance_counts_as_the_least():
    found = esper_jax.from_torch(Likelihood(), (torch.randn(4, 6), torch.randn(4, 5)))
    assert found.report.passed
    loss = torch_losses._gaussian(torch.ones(3), torch.ones(3), torch.tensor([-1.0, -50.0, 0.0]), reduction="none")
    torch.testing.assert_close(loss, torch.full((3,), 0.5 * float(np.log(1e-6))))


def test_adaptive_softmax_takes_any_batch():
    found = esper_jax.from_torch(Adaptive(False), (torch.randn(5, 6), torch.tensor([0, 11, 5, 3, 7])))
    assert found.model.apply(found.variables, jnp.ones((1, 6)), jnp.array([3]))[0].shape == (1,)


def test_other_threads_and_imports_in_turn_do_not_meet_torchs_replacements():
    """The operators that stand in have no gradient in torch."""
    given = speech()
    attention, x = nn.MultiheadAttention(4, 2), torch.randn(3, 2, 4)
    wrong, done = [], threading.Event()

    def trains():
        while not done.is_set():
            try:
                leaf = given[0].clone().requires_grad_()
                functional.ctc_loss(leaf, *given[1:]).backward()
                attention(x, x, x)[0].sum().backward()
            except Exception as error:
                wrong.append(error)

    names = ("ctc_loss", "gaussian_nll_loss", "margin_ranking_loss", "hinge_embedding_loss", "instance_norm")
    before = [getattr(functional, name) for name in names]
    imports = [
        threading.Thread(target=lambda: esper_jax.from_torch(nn.Linear(3, 2), torch.randn(4, 3))) for _ in range(2)
    ]
    trainer = threading.Thread(target=trains)
    for thread in (trainer, *imports):
        thread.start()
    for thread in imports:
        thread.join()
    done.set()
    trainer.join()
    assert not wrong and before == [getattr(functional, name) for name in names]


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
