"""What cannot become one pure program is refused before anything is computed, with its cause."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402
from esper_jax.bridge import BridgeError  # noqa: E402

from .refusals import REFUSALS  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.filterwarnings("ignore")
def test_a_module_is_refused_for_its_cause(name):
    make, example, words = REFUSALS[name]
    with pytest.raises(BridgeError, match=f"(?s){words}"):
        esper_jax.from_torch(make(), example)


def test_the_users_module_is_as_it_was_after_import_and_after_a_refusal():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    module.train()
    module[1].eval()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    esper_jax.from_torch(module, torch.randn(4, 3))
    with pytest.raises(BridgeError):
        esper_jax.from_torch(module, torch.randn(4, 5))
    assert module.training and not module[1].training and module[0].training
    assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())
    assert all(parameter.grad is None for parameter in module.parameters())
