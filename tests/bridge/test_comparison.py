"""What `from_torch` compares with torch: what is refused, and what rounding alone does not hold against a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402
from esper_jax.bridge import BridgeError  # noqa: E402
from esper_jax.bridge.ops import registry  # noqa: E402

from .zoo import fresh, inputs  # noqa: E402

pytestmark = pytest.mark.torch

NORMS = {
    "batch": lambda: torch.nn.BatchNorm2d(8),
    "group": lambda: torch.nn.GroupNorm(8, 8),
    "instance": lambda: torch.nn.InstanceNorm2d(8),
}


def narrow(norm, seed, dtype):
    """A small network in 16 bits, in which the gradient of the first bias would be 0, and an input."""
    torch.manual_seed(seed)
    first, last = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(512, 5)
    module = torch.nn.Sequential(first, NORMS[norm](), torch.nn.ReLU(), torch.nn.Flatten(), last)
    return module.to(dtype), torch.randn(4, 3, 8, 8).to(dtype)


def test_a_report_says_what_was_compared_and_what_is_no_site():
    found = esper_jax.from_torch(fresh("lstm"), inputs("lstm", 3))
    text = str(found.report)
    assert "relative error" in text and "no site: layer (LSTM" in text
    assert "verified" in repr(found) and found.model is found[0] and found.variables is found[1]
    unverified = esper_jax.from_torch(fresh("lstm"), inputs("lstm", 3), verify=False)
    assert "not compared" in str(unverified.report)


def test_a_model_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setitem(registry._OPS, "aten.tanh.default", registry.Op(lambda self: self))
    with pytest.raises(BridgeError, match="(?s)does not compute what torch computes: .*TOO LARGE"):
        esper_jax.from_torch(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()), torch.randn(2, 3))


def test_a_gradient_that_is_wrong_is_refused_though_the_output_is_right(monkeypatch):
    twice = registry.Op(lambda self: 2 * jnp.tanh(self) - jax.lax.stop_gradient(jnp.tanh(self)))
    monkeypatch.setitem(registry._OPS, "aten.tanh.default", twice)
    with pytest.raises(BridgeError, match="does not compute what torch computes: training: gradients differs by"):
        esper_jax.from_torch(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()), torch.randn(2, 3))


class Largest(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = torch.nn.Parameter(torch.randn(64)), torch.nn.Parameter(torch.randn(64))

    def forward(self, x):
        return (x * self.scale - self.shift).amax(1)


def test_the_gradient_of_a_largest_value_survives_compilation():
    """XLA may compute the product twice, with other roundings; then nothing equals the largest, and 0/0 is left."""
    torch.manual_seed(0)
    assert esper_jax.from_torch(Largest(), torch.randn(32, 64)).report.passed


@pytest.mark.parametrize("seed", [4, 21])
def test_gradients_that_torch_itself_rounds_away_are_held_to_no_more(seed):
    """Through the batch statistics of two rows: torch's own in float32 are 1e-3 and more from those in float64."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    report = esper_jax.from_torch(torch.nn.Sequential(*layers), torch.randn(2, 4)).report
    (check, _) = [check for check in report.checks if check.what == "training: gradients"]
    assert report.passed and 1e-3 < check.error <= check.limit <= 5e-2


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("seed", "dtype"), [(0, torch.bfloat16), (1, torch.bfloat16), (1, torch.float16)])
def test_in_16_bits_what_rounding_alone_moves_is_not_held_against_a_model(norm, seed, dtype):
    """The gradient of a bias before a norm is rounding and nothing else, and some value is close to a ReLU's kink."""
    assert esper_jax.from_torch(*narrow(norm, seed, dtype)).report.passed


class Looked(torch.nn.Module):
    """A large embedding of which a batch reads a few rows."""

    def __init__(self):
        super().__init__()
        self.table, self.last = torch.nn.Embedding(4000, 16), torch.nn.Linear(16, 8)

    def forward(self, ids):
        return self.last(torch.tanh(self.table(ids)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_lost_gradient_of_a_few_rows_is_refused(monkeypatch, dtype):
    lost = registry.Op(lambda self: jax.lax.stop_gradient(jnp.tanh(self)))
    monkeypatch.setitem(registry._OPS, "aten.tanh.default", lost)
    torch.manual_seed(0)
    with pytest.raises(BridgeError, match="training: gradients differs by"):
        esper_jax.from_torch(Looked().to(dtype), torch.randint(0, 4000, (2, 8)))


class Rounded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(3 * torch.randn(4))

    def forward(self, x):
        return x + torch.round(self.weight)


def test_gradients_that_torch_has_none_of_are_refused(monkeypatch):
    straight = registry.Op(lambda self: self + jax.lax.stop_gradient(jnp.round(self) - self))
    monkeypatch.setitem(registry._OPS, "aten.round.default", straight)
    with pytest.raises(BridgeError, match="training: gradients differs by"):
        esper_jax.from_torch(Rounded(), torch.randn(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_a_gradient_that_is_wrong_is_refused_all_the_same(monkeypatch, dtype):
    half = registry.Op(lambda self: 0.5 * jax.nn.relu(self) + 0.5 * jax.lax.stop_gradient(jax.nn.relu(self)))
    monkeypatch.setitem(registry._OPS, "aten.relu.default", half)
    with pytest.raises(BridgeError, match="does not compute what torch computes: training: gradients differs by"):
        esper_jax.from_torch(*narrow("batch", 0, dtype))
