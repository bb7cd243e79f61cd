"""Running statistics that torch's export would lose: compared with torch's over several batches."""

from __future__ import annotations

import copy

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402

nn = torch.nn
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:morph")]


class Functional(nn.Module):
    """An instance norm by its function."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        return nn.functional.instance_norm(x, self.mean, self.var, use_input_stats=self.training, momentum=0.3)


def untracked():
    """Made to track, then told not to."""
    norm = nn.BatchNorm1d(4, momentum=None)
    norm.track_running_stats = False
    return norm


NORMS = {
    "an average that is not tracked any more": (untracked, ()),
    "average of rows": (lambda: nn.BatchNorm1d(4, momentum=None), ()),
    "average over devices": (lambda: nn.SyncBatchNorm(4, momentum=None), (5,)),
    "over devices": (lambda: nn.SyncBatchNorm(4, momentum=0.3), (5, 3)),
    "average of images": (lambda: nn.BatchNorm2d(4, momentum=None, affine=False), (5, 3)),
    "instances": (lambda: nn.InstanceNorm2d(4, track_running_stats=True, affine=True), (5, 3)),
    "instances without scale": (lambda: nn.InstanceNorm1d(4, track_running_stats=True, momentum=0.4), (7,)),
    "instances that never learn": (lambda: nn.InstanceNorm1d(4, track_running_stats=True, momentum=None), (7,)),
    "instances by function": (Functional, (5, 3)),
    "volumes": (lambda: nn.InstanceNorm3d(4, track_running_stats=True), (2, 3, 3)),
}


@pytest.mark.parametrize("name", sorted(NORMS))
def test_running_statistics_follow_torchs_and_serve_evaluation(name):
    make, space = NORMS[name]
    module = nn.Sequential(nn.Identity(), make())
    example = torch.randn(3, 4, *space)
    model, variables = esper_jax.from_torch(module, example)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for step in range(3):
        x = torch.randn(3 + step, 4, *space) * (1 + step) + step
        module.train()
        wanted = module(x)
        kept = [collection for collection in variables if collection != "params"]
        found, changed = model.apply(variables, x.numpy(), train=True, mutable=kept)
        variables = {**variables, **changed}
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)
    x = torch.randn(5, 4, *space)
    np.testing.assert_allclose(
        model.apply(variables, x.numpy()), module.eval()(x).detach().numpy(), rtol=1e-4, atol=1e-5
    )
    sent = esper_jax.to_torch(variables, copy.deepcopy(module), model=model).state_dict()
    for key, value in module.state_dict().items():
        np.testing.assert_allclose(sent[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
        kept = "never" in name or "not tracked" in name or key.endswith(("weight", "bias", "num_batches_tracked"))
        assert kept or not value.equal(before[key])


def test_such_norms_say_why_they_are_no_sites():
    def reasons(norm):
        return dict(esper_jax.from_torch(nn.Sequential(nn.Linear(4, 4), norm), torch.randn(3, 4)).report.bare)

    assert reasons(nn.BatchNorm1d(4, momentum=None)) == {
        "1": "a batch norm that averages over all batches (momentum=None)"
    }
    assert not reasons(nn.BatchNorm1d(4))
    averaging = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
    assert not esper_jax.from_torch(averaging, torch.randn(3, 4), train=False).report.bare  # frozen, it is a layer
    images = nn.Sequential(nn.Conv2d(1, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True, affine=True))
    assert dict(esper_jax.from_torch(images, torch.randn(2, 1, 3, 3)).report.bare) == {
        "1": "an instance norm with running statistics"
    }


def test_torchs_own_classes_are_as_they_were():
    norm = nn.BatchNorm1d(4, momentum=None)
    forward, function = nn.modules.batchnorm._BatchNorm.forward, nn.functional.instance_norm
    esper_jax.from_torch(nn.Sequential(nn.Linear(4, 4), norm), torch.randn(3, 4))
    assert nn.modules.batchnorm._BatchNorm.forward is forward and nn.functional.instance_norm is function
    assert int(norm.num_batches_tracked) == 0 and jnp.isfinite(jnp.asarray(norm.running_mean.numpy())).all()
