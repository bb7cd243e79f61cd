"""Every model of the zoo: imported, compared with torch, grown, sent back."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402
from esper_jax import Stage  # noqa: E402
from esper_jax.bridge.comparison import EveryUnit, jax_loss, torch_step  # noqa: E402
from esper_jax.bridge.convert import numpy_of, to_state  # noqa: E402
from esper_jax.bridge.layout import module_path  # noqa: E402
from esper_jax.kasmina.summary import equal_bits  # noqa: E402

from ..kasmina.hosts import in_stage, slot_norm  # noqa: E402
from .world import BATCH, Case, case, close, fully_planted, grown, morphed, outputs_of  # noqa: E402
from .zoo import MODELS, inputs  # noqa: E402

pytestmark = pytest.mark.torch
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ALL = [pytest.param(n, marks=[pytest.mark.slow] if entry.slow else []) for n, entry in MODELS.items()]


@pytest.fixture(params=ALL, scope="module")
def given(request: pytest.FixtureRequest) -> Case:
    if request.param.startswith("hf_"):
        pytest.importorskip("transformers")
    return case(request.param)


def test_outputs_gradients_and_statistics_are_torchs(given):
    """At the example's batch and at one two larger; relative errors in float32."""
    report = given.report
    assert {check.batch for check in report.checks} == {BATCH, BATCH + 2}, "the batch is free"
    assert report.worst("forward") <= 1e-5, str(report)
    assert report.worst("training: loss") <= 1e-5, str(report)
    assert report.worst("training: gradients") <= 1e-4, str(report)
    assert report.worst("training: buffers") <= 1e-5, str(report)


def test_every_layer_of_torchs_is_a_site_or_told_why_it_is_none(given):
    sites = {site.path for site in morphed(given).spec.sites}
    told = {path for path, _ in given.report.bare}
    assert len(sites) == given.report.layers
    for path, child in given.module.named_modules():
        flax = "/".join(module_path(path))
        attention = any(
            isinstance(given.module.get_submodule(path[:n]), torch.nn.MultiheadAttention) for n in _dots(path)
        )
        if list(child.parameters(recurse=False)) and not attention:
            assert (flax in sites) != ((path or ".") in told), path


def _dots(path):
    return [n for n, letter in enumerate(path) if letter == "."]


def test_every_parameter_and_buffer_comes_back_to_the_bit_under_its_key(given):
    back = esper_jax.to_torch(given.variables, given.module).state_dict()
    own = given.module.state_dict()
    assert list(back) == list(own)
    for key, value in own.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key], value), key


def test_a_seed_at_every_site_leaves_the_host_to_the_bit_until_it_is_blended(given):
    """Outputs, new statistics and the host's gradients, in one compiled program; each seed learns."""
    morph = fully_planted(given)
    still = given.model.clone(every_unit=True)
    forward = esper_jax.graft(still)
    mutable = [name for name in ("batch_stats", "buffers") if name in given.variables]

    def loss(params, morph):
        output = forward(morph.with_params(params), train=True, mutable=mutable, **given.arrays)
        leaves = [x for x in jax.tree.leaves(output[0]) if jnp.issubdtype(x.dtype, jnp.floating)]
        rng = np.random.default_rng(0)
        return sum(jnp.sum(x * rng.uniform(0.5, 1.5, x.shape).astype(np.float32)) / x.size for x in leaves), output

    @quick
    def step(morph):
        (value, output), grads = jax.value_and_grad(loss, has_aux=True)(morph.params, morph)
        return (value, output, grads["host"]), grads["seeds"]

    expected, nothing = step(in_stage(morph, Stage.DORMANT))
    training, learns = step(in_stage(morph, Stage.TRAINING))
    assert equal_bits(training, expected)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(nothing))
    reached = [plant for plant in morph.spec.plants if slot_norm(learns, plant.site, plant.slot) > 0]
    assert len(reached) == len(morph.spec.plants), "every seed learns"
    blended, _ = step(in_stage(morph, Stage.FOSSILIZED))
    assert not equal_bits(blended[1], expected[1])


def test_the_grown_model_computes_the_same_in_torch_and_back_again_in_jax(given):
    morph = grown(given)
    want = given.flat(quick(lambda m: esper_jax.graft(given.model)(m, **given.arrays))(morph))
    sent = esper_jax.to_torch(morph, given.module)
    assert len([k for k in sent.state_dict() if k.endswith("esper_seeds.0.alpha")]) == len(morph.spec.plants)
    close(outputs_of(sent, given.args, given.kwargs), want, 1e-5)
    example = given.kwargs or given.args
    model, variables = esper_jax.from_torch(sent, example, verify=False, train=False)
    close(given.flat(quick(lambda v: model.apply(v, **given.arrays))(variables)), want, 1e-5)


def test_twenty_steps_of_sgd_stay_with_torchs(given):
    """Both begin at the same weights and see the same batches; the drift is relative to each tensor's largest value."""
    module = esper_jax.to_torch(given.variables, given.module)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=given.rate)
    module.train()
    with EveryUnit():
        flags = [
            o.requires_grad
            for o in torch.utils._pytree.tree_leaves(module(*given.args, **given.kwargs))
            if o is not None
        ]
    module.load_state_dict(given.module.state_dict())
    loss = jax_loss(given.model, lambda at: flags[at])
    frozen = given.model.frozen(given.variables["params"])

    @quick
    def step(variables):
        others = {k: v for k, v in variables.items() if k != "params"}
        grads, others = jax.grad(loss, has_aux=True)(variables["params"], others, (), given.arrays)
        params = jax.tree.map(
            lambda p, g, still: p if still else p - given.rate * g, variables["params"], grads, frozen
        )
        return {**others, "params": params}

    variables = given.variables
    for _ in range(20):
        torch_step(module, given.args, given.kwargs)
        optimizer.step()
        variables = step(variables)
    found = to_state(given.model.graph, variables)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    names = [name for name in found if name in state and state[name].is_floating_point()]
    largest = max(float(state[n][state[n].isfinite()].abs().max()) for n in names)
    for name in names:
        want = numpy_of(state[name])
        finite = np.isfinite(want)
        assert np.array_equal(found[name][~finite], want[~finite]), name
        scale = max(float(np.abs(want[finite]).max(initial=0.0)), 1e-2 * largest)
        assert float(np.abs(found[name] - want)[finite].max(initial=0.0)) <= 1e-5 * scale, name


def test_the_inputs_of_the_zoo_are_drawn_anew_for_every_batch():
    first, second = inputs("mlp", 2), inputs("mlp", 3)
    assert first[0].shape[0] == 2 and second[0].shape[0] == 3
