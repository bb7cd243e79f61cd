"""The imported model as a Flax model: inputs, dropout, statistics, dtypes, a process without torch, Tolaria."""

from __future__ import annotations

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402
from esper_jax import FixedSchedule, Gates, Lifecycle, Stage, Tolaria  # noqa: E402
from esper_jax.bridge import BridgeError, supported_ops, to_stablehlo  # noqa: E402

from .world import case, close, grown, outputs_of  # noqa: E402
from .zoo import fresh, inputs  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:morph")]


@pytest.fixture(scope="module")
def dropping():
    module = torch.nn.Sequential(
        torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Dropout(0.25), torch.nn.BatchNorm1d(64)
    )
    return module, *esper_jax.from_torch(module, torch.randn(4, 6))


def test_parameters_sit_at_torchs_paths_in_flax_layout():
    variables = case("encoder").variables
    layer = variables["params"]["layers"]["0"]
    module = case("encoder").module
    assert np.array_equal(layer["linear1"]["kernel"], module.layers[0].linear1.weight.detach().numpy().T)
    assert layer["self_attn"]["query"]["kernel"].shape == (8, 2, 4) and set(layer["norm1"]) == {"scale", "bias"}
    conv = case("lenet").variables["params"]["0"]["kernel"]
    assert np.array_equal(conv, case("lenet").module[0].weight.detach().numpy().transpose(2, 3, 1, 0))
    resnet = case("mobilenet").variables
    assert set(resnet["batch_stats"]["stem"]["1"]) == {"mean", "var"}
    assert resnet["buffers"]["stem"]["1"]["num_batches_tracked"].dtype == jnp.int32
    assert case("tied").variables["params"]["embed"]["embedding"].shape == (20, 8)
    assert "head" not in case("tied").variables["params"], "a tied weight is held once"


def test_dropout_draws_a_fresh_mask_each_call_also_under_jit(dropping):
    _, model, variables = dropping
    x = jnp.ones((512, 6))

    @jax.jit
    def run(key):
        return model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats", "buffers"])[0]

    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    assert jnp.array_equal(first, again) and not jnp.array_equal(first, other)
    with pytest.raises(BridgeError, match="draws random numbers in training: call it with rngs="):
        model.apply(variables, x, train=True, mutable=["batch_stats", "buffers"])


def test_dropout_keeps_the_share_that_torch_keeps_and_rescales_it():
    for layer in (torch.nn.Dropout(0.25), torch.nn.AlphaDropout(0.25), torch.nn.Dropout2d(0.25)):
        module = torch.nn.Sequential(layer, torch.nn.Flatten())
        x = torch.ones(64, 16, 3, 3)
        model, variables = esper_jax.from_torch(module, x)
        out = np.asarray(model.apply(variables, x.numpy(), train=True, rngs={"dropout": jax.random.key(0)}))
        kept = out != out.min()
        assert abs(kept.mean() - 0.75) < 0.05, type(layer).__name__
        if not isinstance(layer, torch.nn.AlphaDropout):
            assert np.allclose(out[kept], 1 / 0.75)
        if isinstance(layer, torch.nn.Dropout2d):
            channels = kept.reshape(64, 16, 9)
            assert np.array_equal(channels.all(-1), channels.any(-1)), "whole channels"


def test_a_training_call_returns_new_statistics_and_an_evaluating_one_none(dropping):
    _, model, variables = dropping
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    still = model.clone(every_unit=True)
    _, updated = still.apply(variables, x, train=True, mutable=["batch_stats", "buffers"])
    assert int(updated["buffers"]["3"]["num_batches_tracked"]) == 1
    assert not np.array_equal(updated["batch_stats"]["3"]["mean"], variables["batch_stats"]["3"]["mean"])
    _, unchanged = model.apply(variables, x, mutable=["batch_stats", "buffers"])
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(unchanged), jax.tree.leaves(
        {k: variables[k] for k in unchanged}), strict=True))  # fmt: skip


def test_any_batch_is_taken_and_one_of_another_size_than_the_graph_holds_for_is_refused():
    class Pairs(torch.nn.Module):
        def forward(self, x):
            return x.view(x.shape[0] // 2, 2, -1).sum(1)

    model, variables = esper_jax.from_torch(Pairs(), torch.randn(4, 3))
    assert model.apply(variables, jnp.ones((6, 3))).shape == (3, 3)
    with pytest.raises(BridgeError, match=r"the captured graph holds only where .*x\.shape\[0\].*; got x \(5, 3\)"):
        model.apply(variables, jnp.ones((5, 3)))
    with pytest.raises(BridgeError, match=r"input x must have 3 along axis 1, got shape \(4, 2\)"):
        model.apply(variables, jnp.ones((4, 2)))
    given = case("lenet")
    assert given.model.apply(given.variables, jnp.ones((1, 1, 14, 14))).shape == (1, 10)


class DropsLayers(torch.nn.Module):
    """Its training forward depends on a drawn value; its evaluation does not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        if self.training and torch.rand(()) < 0.5:
            return x
        return self.second(x).tanh()


def test_a_module_that_is_only_evaluated_needs_no_training_forward(tmp_path):
    module, x = DropsLayers(), torch.randn(4, 3)
    with pytest.raises(
        BridgeError, match=r"depend on the values of a tensor.*from_torch\(\.\.\., train=False\) imports"
    ):
        esper_jax.from_torch(module, x)
    found = model, variables = esper_jax.from_torch(module, x, train=False)
    assert module.training, "it is as it was"
    assert {check.what.split(":")[0] for check in found.report.checks} == {"forward"}
    assert found.report.worst("forward") < 1e-5
    assert "none in training" in repr(model.graph)
    with pytest.raises(BridgeError, match=r"DropsLayers was imported for evaluation alone.*train=True"):
        model.apply(variables, jnp.ones((2, 3)), train=True)
    model.save(tmp_path, variables)
    again, loaded = esper_jax.load_imported(tmp_path)
    assert again.graph == model.graph and again.graph.train is None
    wanted = module.eval()(torch.ones(2, 3)).detach().numpy()
    assert np.allclose(again.apply(loaded, jnp.ones((2, 3))), wanted, atol=1e-6)
    morph = esper_jax.morph(variables, model=model, example=jnp.ones((2, 3)))
    back = esper_jax.to_torch(morph, module)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in module.state_dict().items())


def test_an_example_of_one_row_gives_a_free_batch():
    model, variables = esper_jax.from_torch(torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.randn(1, 3))
    assert model.apply(variables, jnp.ones((7, 3))).shape == (7, 2)
    assert model.apply(variables, jnp.ones((1, 3))).shape == (1, 2)


def test_inputs_are_checked_by_name_dtype_and_nesting():
    given = case("siamese")
    left = jnp.ones((2, 7))
    named = given.model.apply(given.variables, left=left, right=left)
    assert jnp.array_equal(named["codes"][1], given.model.apply(given.variables, left, left)["codes"][1])
    with pytest.raises(BridgeError, match=r"Siamese takes left, right; got 1 positional"):
        given.model.apply(given.variables, left)
    with pytest.raises(BridgeError, match="input left must be float32, got int32"):
        given.model.apply(given.variables, jnp.ones((2, 7), jnp.int32), left)
    with pytest.raises(BridgeError, match="input ids must be int32, got float32"):
        case("tied").model.apply(case("tied").variables, jnp.ones((2, 5)))
    with pytest.raises(BridgeError, match="must have 2 axes"):
        given.model.apply(given.variables, jnp.ones((2, 7, 1)), left)


class Several(torch.nn.Module):
    """Its inputs have no names of their own."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, *arrays, **more):
        return self.layer(sum(arrays) + more["shift"] * more.get("scale", 1.0))


def test_inputs_of_a_forward_with_stars_are_told_by_number_and_keyword():
    x = torch.randn(4, 3)
    module = Several()
    model, variables = esper_jax.from_torch(module, {"shift": x, "scale": x})
    assert model.apply(variables, shift=jnp.ones((2, 3)), scale=jnp.ones((2, 3))).shape == (2, 2)
    with pytest.raises(BridgeError, match=r"Several takes shift, scale; got 0 positional input\(s\) and shift"):
        model.apply(variables, shift=jnp.ones((2, 3)))

    class Sum(torch.nn.Module):
        def forward(self, *arrays):
            return arrays[0] + arrays[1].sum(1, keepdim=True)

    model, variables = esper_jax.from_torch(Sum(), (x, x))
    with pytest.raises(BridgeError, match=r"input arrays\[1\] must have 3 along axis 1, got shape \(4, 2\)"):
        model.apply(variables, jnp.ones((4, 3)), jnp.ones((4, 2)))
    for wrong in (1, 3):
        with pytest.raises(BridgeError, match=rf"Sum takes arrays\[0\], arrays\[1\]; got {wrong} positional"):
            model.apply(variables, *[jnp.ones((4, 3))] * wrong)
    assert "forward" not in vars(module), "the user's module is as it was"


def test_frozen_parameters_are_reported_and_can_stay_as_they_are():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.MultiheadAttention(4, 2), torch.nn.Linear(4, 2))

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = module

        def forward(self, x):
            h = self.body[0](x)
            return self.body[2](self.body[1](h, h, h)[0])

    module[0].bias.requires_grad_(False)
    module[1].requires_grad_(False)
    model, variables = found = esper_jax.from_torch(Head(), torch.randn(2, 5, 3))
    assert found.report.frozen[:2] == ("body.0.bias", "body.1.in_proj_weight") and len(found.report.frozen) == 5
    assert "frozen in torch: 5 parameters (body.0.bias, body.1.in_proj_weight" in str(found.report)
    still = model.frozen(variables["params"])
    assert still["body"]["0"] == {"kernel": False, "bias": True} and all(jax.tree.leaves(still["body"]["1"]))
    assert not any(jax.tree.leaves(still["body"]["2"]))
    morph = esper_jax.morph(variables, model=model, example=np.ones((2, 5, 3), np.float32))
    assert model.frozen(esper_jax.germinate(morph, "body/0", "lora", key=jax.random.key(0)).params)["host"] == still
    tx = optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), still))
    params = variables["params"]
    grads = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, jnp.ones((2, 5, 3)))))(params)
    moved = optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params, moved)
    assert same["body"]["0"] == {"kernel": False, "bias": True} and all(jax.tree.leaves(same["body"]["1"]))
    assert same["body"]["2"]["bias"] is False


def test_with_x64_float64_modules_and_wide_integers_are_torchs(tmp_path):
    script = """
import numpy as np, jax, torch, esper_jax
jax.config.update("jax_enable_x64", True)
torch.manual_seed(0)
class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.GELU()).double()
        self.register_buffer("large", torch.tensor([2**40]))
    def forward(self, x, i):
        return self.layer(x), i * 3 + self.large
x, i = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) + 2**33
model, variables = found = esper_jax.from_torch(Wide(), (x, i))
assert found.report.worst("") < 1e-12, str(found.report)
y, j = model.apply(variables, x.numpy(), i.numpy())
assert y.dtype == "float64" and j.dtype == "int64" and int(j[0]) == 3 * 2**33 + 2**40
model.save("saved", variables)
again, loaded = esper_jax.load_imported("saved")
assert np.array_equal(again.apply(loaded, x.numpy(), i.numpy())[0], y)
jax.config.update("jax_enable_x64", False)
try:
    esper_jax.load_imported("saved")
except esper_jax.bridge.BridgeError as error:
    assert "float64 tensors, and JAX runs in 32 bit" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_constant_input_stays_what_it_was():
    class Scaled(torch.nn.Module):
        def forward(self, x, factor=2.0, flip=False):
            return -x * factor if flip else x * factor

    model, variables = esper_jax.from_torch(Scaled(), {"x": torch.ones(2, 3), "factor": 3.0, "flip": True})
    x = jnp.ones((4, 3))
    assert float(model.apply(variables, x).sum()) == -36.0
    assert float(model.apply(variables, x, factor=3.0, flip=True).sum()) == -36.0
    with pytest.raises(BridgeError, match="input flip was True when the model was captured, got False"):
        model.apply(variables, x, flip=False)
    with pytest.raises(BridgeError, match="cannot be traced: leave it out"):
        jax.jit(model.apply)(variables, x, factor=3.0)


def test_an_input_may_be_called_kwargs():
    class Taken(torch.nn.Module):
        def forward(self, x, **kwargs):
            return x * kwargs["kwargs"]

    model, variables = esper_jax.from_torch(Taken(), {"x": torch.ones(2, 3), "kwargs": torch.ones(2, 3)})
    assert float(model.apply(variables, jnp.ones((4, 3)), kwargs=3 * jnp.ones((4, 3))).sum()) == 36.0


def test_masked_logits_are_compared_where_they_are_finite():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x).masked_fill(torch.tensor([False, True, False, True]), -torch.inf)

    model, variables = found = esper_jax.from_torch(Masked(), torch.randn(5, 3))
    assert found.report.worst("") < 1e-5
    assert np.isneginf(model.apply(variables, np.ones((2, 3), np.float32))).tolist() == [[False, True, False, True]] * 2


def test_the_users_gradients_stay_also_of_a_module_that_cannot_be_copied():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Linear(3, 4)), torch.nn.ReLU())
    module(torch.ones(2, 3)).sum().backward()
    before = [p.grad.clone() for p in module.parameters()]
    esper_jax.from_torch(module, torch.randn(5, 3))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(module.parameters(), before, strict=True))


def test_init_says_where_the_variables_come_from():
    model, _ = esper_jax.from_torch(torch.nn.Sequential(torch.nn.LSTM(3, 4, batch_first=True)), torch.randn(2, 5, 3))
    with pytest.raises(BridgeError, match="an imported model has no initialisers"):
        model.init(jax.random.key(0), jnp.ones((2, 5, 3)))


def test_models_are_equal_where_their_graphs_are_and_can_be_static_arguments():
    a, _ = esper_jax.from_torch(fresh("mlp", 0), inputs("mlp", 2), verify=False)
    b, _ = esper_jax.from_torch(fresh("mlp", 1), inputs("mlp", 2), verify=False)
    assert a == b and hash(a) == hash(b) and a != case("mixer").model
    assert "parameters" in repr(a) and "3 layers" in repr(a)


@pytest.mark.parametrize("name", ["mixer", "gpt", "unet"])
def test_in_bfloat16_it_stays_as_near_to_torch_as_one_rounding_a_layer(name):
    """The bound: 3 % of the largest output (8 bits of mantissa, a few roundings deep)."""
    module = fresh(name).bfloat16()
    given = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs(name, 4))
    model, variables = esper_jax.from_torch(module, given, verify=False)
    arrays = [jnp.asarray(x.float().numpy(), jnp.bfloat16) if x.is_floating_point() else x.numpy() for x in given]
    got = model.apply(variables, *arrays)
    assert got.dtype == jnp.bfloat16
    want = [w.astype(np.float32) for w in outputs_of(module, given, {})]
    close([np.asarray(got.astype(jnp.float32))], want, 3e-2)


def test_it_runs_and_trains_in_a_process_without_torch(tmp_path):
    given = case("mlp")
    given.model.save(tmp_path, given.variables)
    want = np.asarray(given.model.apply(given.variables, **given.arrays))
    np.save(tmp_path / "x.npy", np.asarray(next(iter(given.arrays.values()))))
    np.save(tmp_path / "want.npy", want)
    script = f"""
import sys
sys.modules["torch"] = None
import numpy as np, jax, jax.numpy as jnp, esper_jax
model, variables = esper_jax.load_imported({str(tmp_path)!r})
x = np.load({str(tmp_path / "x.npy")!r})
assert np.array_equal(model.apply(variables, x), np.load({str(tmp_path / "want.npy")!r}))
def loss(p):
    out, _ = model.apply({{**variables, "params": p}}, x, train=True, rngs={{"dropout": jax.random.key(0)}},
                         mutable=["batch_stats", "buffers"])
    return jnp.mean(out ** 2)
grads = jax.jit(jax.grad(loss))(variables["params"])
assert all(bool(jnp.any(g)) for g in jax.tree.leaves(grads["4"]))
try:
    esper_jax.from_torch
except ImportError as error:
    assert "pip install" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_flax_uses_itself_gets_an_underscore():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.name, self.scope = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.path = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.scope(self.name(x)) * self.path

    module = Odd()
    _, variables = esper_jax.from_torch(module, torch.randn(2, 3))
    assert set(variables["params"]) == {"name_", "scope_", "path_"}
    assert list(esper_jax.to_torch(variables, module).state_dict()) == list(module.state_dict())


class Twice(torch.nn.Module):
    """A checkpoint within a checkpoint, with dropout in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.drop = torch.nn.Dropout(0.5)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.tanh(self.second(x)))

    def outer(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.utils.checkpoint.checkpoint(self.inner, torch.tanh(self.first(x)), use_reentrant=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.outer, x, use_reentrant=False)


def test_checkpoints_within_checkpoints_keep_their_gradients():
    model, variables = esper_jax.from_torch(Twice(), torch.randn(3, 4))
    x = jnp.ones((3, 4))
    loss = lambda params: model.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(0)}).sum()  # noqa: E731
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(jax.grad(loss)(variables["params"])))


class Halted(torch.nn.Module):
    """One way with a gradient, one without, and a buffer that moves in training."""

    def __init__(self) -> None:
        super().__init__()
        self.taught, self.teacher = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            aim = torch.tanh(self.teacher(x))
            if self.training:
                self.seen.add_(aim.mean(0))
        return self.taught(x) * aim + self.seen


def test_what_runs_under_no_grad_has_no_gradient():
    model, variables = found = esper_jax.from_torch(Halted(), torch.randn(3, 4))
    assert found.report.passed
    grads = jax.grad(lambda params: jnp.sum(model.apply({**variables, "params": params}, jnp.ones((2, 4)))))(
        variables["params"]
    )
    assert np.abs(grads["taught"]["kernel"]).max() > 0 and not np.any(grads["teacher"]["kernel"])
    old = torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(4, 3)))
    assert esper_jax.from_torch(old, torch.randn(3, 4)).report.passed


class Sequence(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(torch.nn, kind)(4, 3, num_layers=2, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers_take_time_first_and_single_sequences(kind):
    for shape in ((5, 2, 4), (5, 4)):
        report = esper_jax.from_torch(Sequence(kind), torch.randn(shape)).report
        assert report.passed
        assert dict(report.bare)["rnn"] == f"{kind}: Flax has no layer of this kind that can be a site"


def test_an_encoder_whose_keys_are_masked_is_held_to_torchs_plain_attention():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.TransformerEncoder(layer, 1)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.body(x, src_key_padding_mask=mask)

    mask = torch.tensor([[False, False, True], [False, True, True]])
    assert esper_jax.from_torch(Masked(), (torch.randn(2, 3, 8), mask)).report.passed
    assert torch.backends.mha.get_fastpath_enabled()


def test_integers_that_jax_would_wrap_are_refused():
    class Low(torch.nn.Module):
        def forward(self, i: torch.Tensor) -> torch.Tensor:
            return torch.remainder(i, 7).float()

    model, variables = esper_jax.from_torch(Low(), torch.arange(4))
    assert np.array_equal(model.apply(variables, np.arange(9, 12)), [2, 3, 4])
    with pytest.raises(BridgeError, match="input i holds values beyond int32; run jax.config.update"):
        model.apply(variables, np.array([2**40, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norm_in_16_bits_trains_and_keeps_its_statistics(dtype):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4)).to(dtype)
    model, variables = found = esper_jax.from_torch(module, torch.randn(3, 2, 6, 6, dtype=dtype))
    assert found.report.passed
    _, changed = model.apply(variables, jnp.ones((2, 2, 6, 6)), train=True, mutable=["batch_stats", "buffers"])
    before, after = (tree["batch_stats"]["1"]["mean"] for tree in (variables, changed))
    assert np.any(np.asarray(before, np.float32) != np.asarray(after, np.float32))


@pytest.mark.parametrize("name", ["lenet", "gpt", "lstm", "sorting"])
def test_it_is_exported_with_a_free_batch(name):
    given = case(name)
    exported = to_stablehlo(given.model.apply, given.variables, *given.arrays.values())
    more = [jnp.concatenate([array, array[:1]]) for array in given.arrays.values()]
    want = given.flat(given.model.apply(given.variables, *more))
    close(given.flat(exported.call(given.variables, *more)), want, 1e-5)
    assert "stablehlo" in exported.mlir_module() and len(exported.serialize()) > 0


@pytest.mark.parametrize("name", ["lenet", "gpt"])
def test_a_grown_model_is_exported_with_a_free_batch(name):
    given = case(name)
    morph, forward = grown(given), esper_jax.graft(given.model)
    exported = to_stablehlo(forward, morph, *given.arrays.values())
    more = [jnp.concatenate([array, array[:1]]) for array in given.arrays.values()]
    close(given.flat(exported.call(morph, *more)), given.flat(forward(morph, *more)), 1e-5)
    plain = given.flat(given.model.apply(given.variables, *more))
    assert not np.allclose(given.flat(forward(morph, *more))[0], plain[0])


def test_it_grows_in_tolaria_with_its_statistics():
    given, gates = case("mlp"), Gates(min_training_ticks=1, min_health=0.0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int32) + (x[:, 2] > 0)
    trainer = Tolaria(
        given.model,
        optax.softmax_cross_entropy_with_integer_labels,
        optax.adam(3e-3),
        controller=FixedSchedule({1: [("4", "mlp", {"hidden": 8})]}, gates=gates, keep="always"),
        lifecycle=Lifecycle(gates, tempo=2),
        batch_size=32,
        progress=False,
        compile_in="thread",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = trainer.init(given.variables, key=jax.random.key(0), model=given.model, example=x[:2])
    state, history = trainer.fit(state, (x[:192], y[:192]), (x[192:], y[192:]), epochs=9)
    assert np.asarray(state.morph.state["4"].stage)[0] >= Stage.HOLDING
    assert history.records[-1]["train_loss"] < history.records[0]["train_loss"]
    host = state.morph.variables
    assert int(host["buffers"]["1"]["num_batches_tracked"]) == 9 * 6
    sent = esper_jax.to_torch(state.morph, given.module)
    want = esper_jax.graft(given.model)(state.morph, x[:8])
    close(outputs_of(sent, (torch.from_numpy(x[:8]),), {}), [want], 1e-5)


def test_about_a_hundred_and_fifty_operators_are_there_and_more():
    assert len(supported_ops()) > 400 and "aten.conv2d.default" in supported_ops()


class Counting(torch.nn.Module):
    """A buffer that every call changes, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.calls


def test_buffers_that_evaluation_changes_are_given_to_whom_asks():
    model, variables = esper_jax.from_torch(Counting(), torch.randn(4, 6))
    x = jnp.ones((2, 6))
    once = model.apply(variables, x)
    same, updated = model.apply(variables, x, mutable=["buffers"])
    assert jnp.array_equal(once, same) and float(updated["buffers"]["calls"]) == 1
    twice = model.apply({**variables, **updated}, x)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.Linear(6, 3), (4, 6)),
        (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), (3, 8, 8)),
        (torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Linear(6, 3))), (4, 6)),
        (torch.nn.Sequential(torch.nn.BatchNorm1d(6, affine=False)), (4, 6)),
        (torch.nn.MultiheadAttention(6, 2), None),
        (torch.nn.MultiheadAttention(6, 3, add_bias_kv=True, add_zero_attn=True, bias=False), (5, 4, 6)),
    ],
    ids=[
        "a layer itself",
        "without a batch",
        "the old weight_norm",
        "without parameters",
        "unbatched attention",
        "attention",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_less_usual_modules_compute_what_torch_computes(module, shape):
    module.train()
    example = torch.randn(*shape) if shape else (torch.randn(3, 6),) * 3
    example = (example,) * 3 if isinstance(module, torch.nn.MultiheadAttention) and shape else example
    found = esper_jax.from_torch(module, example)
    assert found.report.passed and found.report.worst("forward") <= 1e-5
    assert module.training and all(p.grad is None for p in module.parameters())


class AfterConvolution(torch.nn.Module):
    """Everything that may follow a convolution, whose output has its channels last inside."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Conv2d(3, 5, 1)
        self.scale, self.row = torch.nn.Parameter(torch.rand(5, 1, 1)), torch.nn.Parameter(torch.rand(4))
        self.bn, self.group = torch.nn.BatchNorm2d(5), torch.nn.GroupNorm(5, 5)

    def forward(self, x):
        y, z, f = self.conv(x), self.other(x), torch.nn.functional
        return [
            y * self.scale + self.row,
            torch.where(y > z, y, z.mean()),
            y.mean([2, 3]),
            y.mean([2, 3], keepdim=True) + y,
            y.mean(1),
            y.mean([0, 2, 3]),
            y.mean([0, 1]),
            y.mean(-1, keepdim=True) * z,
            torch.cat([y, z, x], 1),
            torch.cat([y, z], -1),
            torch.cat([y, x[:, :1].expand(-1, 5, -1, -1)], 0),
            f.pad(y, (1, 0, 2, 1), value=0.3),
            f.pad(y, (0, 0, 0, 0, 1, 1)),
            f.max_pool2d(y, 2) + f.avg_pool2d(z, 2),
            f.interpolate(y, scale_factor=2),
            self.group(self.bn(y)).flatten(1),
            y.permute(0, 2, 3, 1),
            y.reshape(y.shape[0], -1).softmax(-1),
            y.transpose(1, 2) @ z.transpose(1, 2).transpose(-1, -2),
            y[:, 1:3, ::2],
            y.sum(1, keepdim=True) * z,
            f.glu(torch.cat([y, z[:, :1]], 1), 1),
            y.clamp(-0.5, 0.5).amax((2, 3)),
            y.add(z, alpha=0.5).div(z.abs() + 1).pow(2).lerp(z, 0.3),
            torch.stack([y, z], 2).flatten(1, 2),
            f.adaptive_avg_pool2d(y, (2, 3)) * f.adaptive_avg_pool2d(z, 1),
            f.cosine_similarity(y, z, dim=1),
            y.chunk(2, 1)[0] + z.split([3, 2], 1)[0],
            y.masked_fill(z > 0, -1.0).roll(1, 1).flip(1),
            y.var((1, 2)) + z.std(3).mean(1),
            y.squeeze() * z.unsqueeze(0).squeeze(0),
            self.conv(f.silu(y)[:, :3]) - self.other(x.relu()),
        ]


def test_what_follows_a_convolution_means_what_it_means_in_torch():
    found = esper_jax.from_torch(AfterConvolution(), torch.randn(3, 3, 4, 4))
    assert found.report.worst("forward") <= 1e-5 and found.report.worst("training: gradients") <= 1e-4, str(
        found.report
    )
