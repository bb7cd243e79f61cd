"""Weights from files: safetensors, torch's own without pickle, and what is wrong with the others."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from safetensors.torch import save_file  # noqa: E402

import esper_jax  # noqa: E402
from esper_jax.bridge import BridgeError, load_imported, load_weights  # noqa: E402
from esper_jax.bridge.convert import to_state  # noqa: E402

from .world import case, close  # noqa: E402
from .zoo import fresh  # noqa: E402

pytestmark = pytest.mark.torch


def arrive(name, path):
    """Load a file into a model of other weights and compare it with torch's own module."""
    given, other = case(name), fresh(name, 7)
    variables = load_weights(given.variables, path)
    state = to_state(given.model.graph, variables)
    for key, value in [*other.named_parameters(), *other.named_buffers()]:
        np.testing.assert_array_equal(state[key], value.detach().numpy())


@pytest.mark.parametrize("name", ["tied", "encoder", "mobilenet", "lstm"])
def test_safetensors_and_pt_files_arrive_whole(name, tmp_path):
    """Also tied ones, of which safetensors keeps one name, whichever."""
    state = fresh(name, 7).state_dict()
    torch.save(state, tmp_path / "a.pt")
    arrive(name, tmp_path / "a.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "b.pth")
    arrive(name, tmp_path / "b.pth")
    seen: set[int] = set()
    kept = {k: v.clone() for k, v in reversed(state.items()) if not (v.data_ptr() in seen or seen.add(v.data_ptr()))}
    save_file(kept, tmp_path / "c.safetensors")
    arrive(name, tmp_path / "c.safetensors")


def test_a_file_in_parts_is_read_by_its_index(tmp_path):
    state = fresh("mlp", 7).state_dict()
    names = list(state)
    save_file({n: state[n] for n in names[:3]}, tmp_path / "one.safetensors")
    save_file({n: state[n] for n in names[3:]}, tmp_path / "two.safetensors")
    weights = {n: "one.safetensors" if n in names[:3] else "two.safetensors" for n in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(__import__("json").dumps({"weight_map": weights}))
    arrive("mlp", index)
    index.write_text(__import__("json").dumps({"weight_map": {"a": "../two.safetensors"}}))
    with pytest.raises(BridgeError, match="names a file outside its directory"):
        arrive("mlp", index)


def test_bfloat16_arrives_as_the_models_dtype(tmp_path):
    given = case("mlp")
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.module.state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    variables = load_weights(given.variables, tmp_path / "half.safetensors", given.model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
    close(jax.tree.leaves(variables["params"]), jax.tree.leaves(given.variables["params"]), 1e-2)


def test_every_missing_unexpected_and_misshapen_key_is_listed(tmp_path):
    given = case("mlp")
    state = dict(given.module.state_dict())
    state["more"] = torch.ones(2)
    del state["0.bias"]
    state["4.weight"] = torch.ones(3, 5)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(
        BridgeError,
        match=r"1 missing: 0\.bias; 1 unexpected: more; 1 misshapen: 4\.weight \(3, 5\) instead of \(3, 16\)",
    ):
        load_weights(given.variables, tmp_path / "odd.safetensors", given.model)
    state["4.weight"] = given.module.state_dict()["4.weight"] + 1
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "odd.safetensors")
    loose = load_weights(given.variables, tmp_path / "odd.safetensors", given.model, strict=False)
    assert jnp.array_equal(loose["params"]["0"]["bias"], given.variables["params"]["0"]["bias"])
    assert not jnp.array_equal(loose["params"]["4"]["kernel"], given.variables["params"]["4"]["kernel"])


class Danger:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_needs_pickle_is_refused_and_runs_nothing(tmp_path):
    given, mark = case("mlp"), tmp_path / "ran"
    torch.save({"state_dict": given.module.state_dict(), "extra": Danger(str(mark))}, tmp_path / "bad.pt")
    with pytest.raises(BridgeError, match="holds more than tensors, and is refused"):
        load_weights(given.variables, tmp_path / "bad.pt", given.model)
    torch.save(given.module, tmp_path / "whole.pt")
    with pytest.raises(BridgeError, match="holds more than tensors"):
        load_weights(given.variables, tmp_path / "whole.pt", given.model)
    assert not mark.exists()


def test_variables_of_no_known_model_ask_for_it(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(BridgeError, match="no model with such variables was imported in this process; give model="):
        load_weights({"params": {"w": jnp.ones(2)}}, tmp_path / "a.safetensors")


def test_an_old_torch_reads_no_pickle_at_all(tmp_path, monkeypatch):
    torch.save(case("mlp").module.state_dict(), tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(BridgeError, match=r"torch 2\.10 or newer only, this is 2\.9\.1"):
        load_weights(case("mlp").variables, tmp_path / "a.pt", case("mlp").model)


def test_files_that_are_none_say_so(tmp_path):
    given = case("mlp")
    with pytest.raises(BridgeError, match="there is no file"):
        load_weights(given.variables, tmp_path / "none.safetensors", given.model)
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(BridgeError, match="cannot be read as safetensors"):
        load_weights(given.variables, tmp_path / "x.safetensors", given.model)
    torch.save({"a": 3}, tmp_path / "y.pt")
    with pytest.raises(BridgeError, match="holds no state_dict but a"):
        load_weights(given.variables, tmp_path / "y.pt", given.model)


@pytest.mark.parametrize("name", ["gpt", "mobilenet", "cross_attention", "fourier", "einsum_attention"])
def test_a_saved_model_comes_back_with_its_outputs_to_the_bit(name, tmp_path):
    given = case(name)
    given.model.save(tmp_path, given.variables)
    model, variables = load_imported(tmp_path)
    assert model == given.model
    run = jax.jit(lambda v: given.model.apply(v, **given.arrays))
    again = jax.jit(lambda v: model.apply(v, **given.arrays))
    for a, b in zip(jax.tree.leaves(run(given.variables)), jax.tree.leaves(again(variables)), strict=True):
        assert jnp.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.floating))
    assert list(esper_jax.to_torch(variables, given.module, model).state_dict()) == list(given.module.state_dict())


def test_weights_in_bfloat16_and_an_operator_of_ones_own_are_read_without_torch(tmp_path):
    given = case("mlp")
    halves = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.module.state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    given.model.save(tmp_path / "saved", given.variables)
    graph = tmp_path / "saved" / "graph.json"
    graph.write_text(graph.read_text().replace("aten.relu.default", "mylib.my_relu.default"))
    np.save(tmp_path / "want.npy", halves["4.weight"].float().numpy())
    script = """
import sys
sys.modules["torch"] = None
import numpy as np, jax, esper_jax
try:
    esper_jax.load_imported("saved")
except esper_jax.bridge.BridgeError as error:
    assert "mylib.my_relu.default, which the bridge does not know" in str(error) and "register_op" in str(error)
else:
    raise AssertionError
esper_jax.bridge.register_op("mylib.my_relu.default", jax.nn.relu)
model, variables = esper_jax.load_imported("saved")
variables = esper_jax.bridge.load_weights(variables, "half.safetensors")
assert variables["params"]["4"]["kernel"].dtype == "float32"
assert np.array_equal(variables["params"]["4"]["kernel"], np.load("want.npy").T)
assert np.isfinite(model.apply(variables, np.ones((2, 8), "float32"))).all()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_damaged_directory_is_told_by_file(tmp_path):
    with pytest.raises(BridgeError, match=r"there is no graph\.json"):
        load_imported(tmp_path)
    given = case("mlp")
    given.model.save(tmp_path, given.variables)
    whole = (tmp_path / "graph.json").read_text()
    (tmp_path / "graph.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(BridgeError, match=r"graph\.json holds no graph of this library"):
        load_imported(tmp_path)
    (tmp_path / "graph.json").write_text(whole.replace('"format":1', '"format":99'))
    with pytest.raises(BridgeError, match="saved in another format"):
        load_imported(tmp_path)


def test_conditions_of_a_file_compute_and_run_nothing():
    from esper_jax.bridge.graph import evaluate

    assert evaluate("(3*d0_0) % 2 == 0 and Max(d0_0, 5) >= 5", {"d0_0": 4})
    for text in ("__import__('os').getcwd()", "[].__class__", "d0_0.real", "(lambda: 1)()"):
        with pytest.raises((BridgeError, KeyError)):
            evaluate(text, {"d0_0": 4})
