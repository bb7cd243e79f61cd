"""Imported models as nnx modules."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402
from esper_jax import FixedSchedule, Gates, Lifecycle, Stage, Tolaria  # noqa: E402
from esper_jax.bridge import BridgeError, to_nnx  # noqa: E402
from esper_jax.kasmina.summary import equal_bits  # noqa: E402

from .zoo import redrawn  # noqa: E402

pytestmark = pytest.mark.torch


class Small(torch.nn.Module):
    """Convolution with statistics, attention, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(1, 8, 3, stride=2), torch.nn.BatchNorm2d(8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop, self.head = torch.nn.Dropout(0.2), torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.drop(x.mean(1)))


@pytest.fixture(scope="module")
def small():
    client = redrawn(Small())
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model, variables = esper_jax.from_torch(client, x)
    return client, x, model, variables


def test_it_computes_the_same_and_has_the_same_sites(small):
    _, x, model, variables = small
    module = to_nnx(model, variables)
    assert equal_bits(module(x.numpy()), model.apply(variables, x.numpy()))
    linen = esper_jax.morph(variables, model=model, example=x.numpy())
    morph = esper_jax.morph(module, example=x.numpy())
    assert morph.spec == linen.spec
    assert {site.kind for site in morph.spec.sites} == {"conv", "batch_norm", "attention", "dense"}


def test_it_grows_in_training_and_goes_back_to_torch(small):
    client, x, model, variables = small
    module = to_nnx(model, variables, rngs=nnx.Rngs(dropout=1))
    gates = Gates(min_training_ticks=1, min_health=0.0)
    labels = np.arange(len(x), dtype=np.int32) % 10
    run = Tolaria(
        module,
        optax.softmax_cross_entropy_with_integer_labels,
        optax.adam(3e-3),
        controller=FixedSchedule(
            {1: [("head", "lora", {"rank": 2}), ("conv", "conv_small", {})]}, gates=gates, keep="always"
        ),
        lifecycle=Lifecycle(gates, tempo=2),
        batch_size=8,
        compile_in="thread",
    )
    state = run.init(module, key=jax.random.key(0), example=x.numpy())
    state, history = run.fit(state, (x.numpy(), labels), (x.numpy(), labels), epochs=6)
    assert history["train_loss"][-1] < history["train_loss"][0]
    for site in ("head", "conv"):
        assert np.asarray(state.morph.state[site].stage)[0] >= Stage.BLENDING
    moved = np.abs(
        np.asarray(state.morph.host["batch_stats"]["norm"]["mean"] - variables["batch_stats"]["norm"]["mean"])
    )
    assert moved.max() > 0
    assert int(state.morph.host["buffers"]["norm"]["num_batches_tracked"]) > 0
    forward = esper_jax.graft(module)
    want = np.asarray(forward(state.morph, x.numpy(), **forward.mode(False)))
    back = esper_jax.to_torch(state.morph, client).eval()
    with torch.no_grad():
        np.testing.assert_allclose(back(x).numpy(), want, atol=1e-5 * np.abs(want).max())


def test_what_is_no_imported_model_is_refused(small):
    _, _, model, variables = small
    with pytest.raises(BridgeError, match=r"model must be what from_torch\(\) gave, got dict"):
        to_nnx(variables, model)
    with pytest.raises(BridgeError, match="variables must be those that came with the model"):
        to_nnx(model, variables["params"])
    named = torch.nn.Sequential()
    named.add_module("rngs", torch.nn.Linear(2, 2))
    odd, own = esper_jax.from_torch(named, torch.ones(2, 2), verify=False)
    with pytest.raises(BridgeError, match="a part named 'rngs'"):
        to_nnx(odd, own)
