"""Seeds in torch: every blueprint's twin, spans, blends, folding, and a process without JAX."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402
from esper_jax import Stage  # noqa: E402
from esper_jax.bridge import BridgeError, spec_of, torch_seeds  # noqa: E402
from esper_jax.kasmina.blueprints import make_plant, registered  # noqa: E402
from esper_jax.kasmina.morph import with_spec  # noqa: E402

from ..kasmina.hosts import in_stage, stirred  # noqa: E402
from .world import SMALL, case, close, fully_planted, grown, morphed, outputs_of  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:morph"), pytest.mark.filterwarnings("ignore:fold")]
QUICK = {"xla_backend_optimization_level": 0}
HOSTS = ("unet", "encoder", "masked_attention", "tied", "swiglu", "densenet", "superresolution", "cross_attention")
_KEY = jax.random.key(0)
OWN = {b.name for b in registered() if b.init.__module__.startswith("esper_jax.kasmina")}


def pairs():
    """Every blueprint at the first site of each kind that it fits, in a few hosts."""
    seen, found = set(), []
    for host in HOSTS:
        for site in morphed(case(host)).spec.sites:
            for blueprint in registered():
                if blueprint.name in OWN and blueprint.fits(site) and (blueprint.name, site.kind) not in seen:
                    seen.add((blueprint.name, site.kind))
                    found.append((host, site.path, blueprint.name))
    return found


@pytest.mark.slow
def test_every_blueprint_has_a_twin_with_its_parity():
    """At every kind of site that it fits, with every blend in turn: float32 within 1e-5."""
    covered = set()
    for i, (host, path, name) in enumerate(pairs()):
        given = case(host)
        morph = morphed(given)
        site = morph.spec.by_path[path]
        known = next(b for b in registered() if b.name == name).config
        config = {key: value for key, value in SMALL.items() if key in known}
        blend = ("add", "lerp", "gate", "multiply")[i % 4]
        morph = with_spec(morph, morph.spec.with_plant(make_plant(site, 0, name, config, blend, False)))
        morph = in_stage(morph.replace(seeds=stirred(morph.seeds, 0.2)), Stage.BLENDING, 0.37)
        run = jax.jit(lambda m, g=given: esper_jax.graft(g.model)(m, **g.arrays), compiler_options=QUICK)
        want = given.flat(run(morph))
        sent = esper_jax.to_torch(morph, given.module)
        close(outputs_of(sent, given.args, given.kwargs), want, 1e-5)
        bare = outputs_of(given.module, given.args, given.kwargs)
        assert any(not np.allclose(a, b) for a, b in zip(bare, want, strict=True)), (name, path)
        covered.add(name)
    assert covered == OWN - {"units"} == set(torch_seeds.TWINS) - {"units"}


def test_a_span_reads_the_earlier_layers_input_and_folds_into_wider_layers():
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    model, variables = esper_jax.from_torch(module, x)
    morph = esper_jax.morph(variables, model=model, example=x.numpy())
    morph = esper_jax.germinate(morph, span=("0", "2"), blueprint="units", units=2, key=jax.random.key(0))
    morph = in_stage(morph.replace(seeds=stirred(morph.seeds, 0.3)), Stage.FOSSILIZED)
    want = [np.asarray(esper_jax.graft(model)(morph, x.numpy()))]
    close(outputs_of(esper_jax.to_torch(morph, module), (x,), {}), want, 1e-5)
    folded = esper_jax.fold(morph)
    wide = esper_jax.to_torch(folded, module)
    assert wide[0].out_features == 9 and wide[2].in_features == 9
    assert list(wide.state_dict()) == list(module.state_dict())
    close(outputs_of(wide, (x,), {}), want, 1e-5)


def test_a_copy_of_a_regrown_module_reads_its_own_layers():
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    x, other = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    model, variables = esper_jax.from_torch(module, x)
    morph = esper_jax.morph(variables, model=model, example=x.numpy())
    morph = esper_jax.germinate(morph, span=("0", "2"), blueprint="units", units=2, key=jax.random.key(0))
    sent = esper_jax.to_torch(in_stage(morph.replace(seeds=stirred(morph.seeds, 0.3)), Stage.FOSSILIZED), module)
    copied = copy.deepcopy(sent)
    sent(x)
    assert torch.equal(copied(other), sent(other))


class Inside(torch.nn.Module):
    """Layers that are computed in forwards that do more: a norm over channels, a convolution and a product by hand."""

    class Norm(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu()

    class Weighed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(torch.randn(6, 3, 3, 3)), torch.nn.Parameter(torch.randn(6))
            self.fails = False

        def forward(self, x):
            y = torch.nn.functional.conv2d(input=x, weight=self.weight * 1 if self.fails else self.weight)
            return y.tanh() + self.bias[:, None, None]

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = self.Weighed(), self.Norm(6), torch.nn.Linear(6, 2)

    def forward(self, x):
        pooled = self.norm(self.conv(x)).mean((2, 3))
        return torch.nn.functional.linear(pooled, self.head.weight, self.head.bias).exp()


def test_seeds_go_back_to_layers_inside_forwards_that_do_more():
    torch.manual_seed(0)
    module, x = Inside(), torch.randn(3, 3, 5, 6)
    model, variables = esper_jax.from_torch(module, x)
    morph = esper_jax.morph(variables, model=model, example=x.numpy())
    assert {site.path for site in morph.spec.sites} == {"conv", "norm", "head"}
    for i, (site, name) in enumerate((("conv", "linear"), ("norm", "norm"), ("head", "mlp"))):
        morph = esper_jax.germinate(morph, site, name, key=jax.random.key(i))
    morph = in_stage(morph.replace(seeds=stirred(morph.seeds, 0.2)), Stage.FOSSILIZED)
    want = np.asarray(esper_jax.graft(model)(morph, x.numpy()))
    sent = esper_jax.to_torch(morph, module)
    close(outputs_of(sent, (x,), {}), [want], 1e-5)
    close(outputs_of(copy.deepcopy(sent), (x,), {}), [want], 1e-5)
    close([torch.export.export(sent, (x,)).module()(x).detach().numpy()], [want], 1e-5)
    assert not np.allclose(want, outputs_of(module, (x,), {})[0])
    with pytest.raises(RuntimeError, match="expected input"):
        sent(x[:, :2])
    assert torch.overrides._get_current_function_mode() is None
    close(outputs_of(sent, (x,), {}), [want], 1e-5)
    sent.conv.fails = True
    with pytest.warns(UserWarning, match="Weighed.forward called no torch.nn.functional.conv2d .* 'conv'"):
        sent(x)


def test_a_layer_that_is_called_here_and_computed_there_cannot_take_its_seeds_back():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x):
            return torch.nn.functional.linear(self.layer(x).relu(), self.layer.weight, self.layer.bias)

    module, x = Twice(), torch.randn(3, 4)
    model, variables = esper_jax.from_torch(module, x)
    morph = esper_jax.germinate(esper_jax.morph(variables, model=model, example=x.numpy()), "layer", "lora", key=_KEY)
    morph = in_stage(morph.replace(seeds=stirred(morph.seeds, 0.2)), Stage.FOSSILIZED)
    with pytest.raises(
        BridgeError, match=r"'layer' cannot go back .* inside the model \(Twice\), .* and by layer; fold"
    ):
        esper_jax.to_torch(morph, module)
    want = np.asarray(esper_jax.graft(model)(morph, x.numpy()))
    close(outputs_of(esper_jax.to_torch(esper_jax.fold(morph), module), (x,), {}), [want], 1e-5)


@pytest.mark.parametrize("name", ["mixer", "lenet", "unet", "gpt"])
def test_folded_models_go_back_as_plain_state_dicts(name):
    given = case(name)
    morph = grown(given, only="folding")
    want = given.flat(jax.jit(lambda m: esper_jax.graft(given.model)(m, **given.arrays))(morph))
    folded = esper_jax.fold(morph)
    assert not folded.spec.plants
    sent = esper_jax.to_torch(folded, given.module)
    assert list(sent.state_dict()) == list(given.module.state_dict())
    close(outputs_of(sent, given.args, given.kwargs), want, 1e-5)


def test_seeds_that_take_no_part_stay_behind_with_a_warning():
    given = case("mixer")
    morph = in_stage(fully_planted(given), Stage.TRAINING)
    with pytest.warns(UserWarning, match=r"seed\(s\) are not part of the output yet and stay behind: .*TRAINING"):
        sent = esper_jax.to_torch(morph, given.module)
    assert list(sent.state_dict()) == list(given.module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        esper_jax.to_torch(in_stage(morph, Stage.DORMANT), given.module)


def test_the_seeds_file_is_plain_torch_and_a_checkpoint_needs_no_jax(tmp_path):
    given = case("mlp")
    morph = grown(given)
    sent = esper_jax.to_torch(morph, given.module)
    torch.save(sent.state_dict(), tmp_path / "grown.pt")
    (tmp_path / "spec.json").write_text(json.dumps(spec_of(morph, given.model)))
    shutil.copy(torch_seeds.__file__, tmp_path / "regrow.py")
    x = given.args[0]
    torch.save({"x": x, "want": torch.from_numpy(outputs_of(sent, (x,), {})[0])}, tmp_path / "case.pt")
    script = """
import sys, json
for name in ("jax", "flax", "numpy_jax", "esper_jax"):
    sys.modules[name] = None
import torch
from torch import nn
from regrow import regrow
host = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
module = regrow(host, json.load(open("spec.json")))
module.load_state_dict(torch.load("grown.pt", weights_only=True))
case = torch.load("case.pt", weights_only=True)
assert torch.equal(module.eval()(case["x"]), case["want"])
assert "alpha=1" in repr(module)
module.train()(case["x"]).sum().backward()
assert all(p.grad is not None for p in module.parameters())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_grown_module_can_be_copied_scripted_by_export_and_taken_back(tmp_path):
    given = case("unet")
    sent = esper_jax.to_torch(grown(given), given.module).eval()
    again = copy.deepcopy(sent)
    with torch.no_grad():
        assert torch.equal(again(*given.args), sent(*given.args))
        program = torch.export.export(sent, given.args)
        np.testing.assert_allclose(program.module()(*given.args).numpy(), sent(*given.args).numpy(), atol=1e-6)


def test_what_cannot_go_back_says_why():
    given = case("encoder")
    with pytest.raises(BridgeError, match="module must be a torch.nn.Module, got int"):
        esper_jax.to_torch(given.variables, 3)
    with pytest.raises(BridgeError, match="no module like this Linear was imported in this process; give model="):
        esper_jax.to_torch(given.variables, torch.nn.Linear(97, 3))
    with pytest.raises(BridgeError, match="takes a Morph or a variables dict with 'params', got int"):
        esper_jax.to_torch(3, given.module)
    untraced = esper_jax.morph(given.variables)
    inner = esper_jax.germinate(untraced, "layers/0/self_attn/query", "mlp", key=jax.random.key(0), hidden=4)
    with pytest.raises(BridgeError, match="stands inside torch's MultiheadAttention"):
        esper_jax.to_torch(in_stage(inner, Stage.FOSSILIZED), given.module)
    esper_jax.register_blueprint(
        "doubling",
        init=lambda key, site: {"w": jnp.zeros((site.out_features,), site.dtype)},
        apply=lambda params, u: u * params["w"],
        about="a blueprint of one's own",
    )
    own = esper_jax.germinate(morphed(given), "layers/0/linear1", "doubling", key=jax.random.key(0))
    own = in_stage(own.replace(seeds=stirred(own.seeds, 0.3)), Stage.FOSSILIZED)
    with pytest.raises(BridgeError, match="'doubling' has no twin in torch"):
        esper_jax.to_torch(own, given.module)
    esper_jax.bridge.register_twin("doubling", lambda params, u, entry: u * params["w"])
    try:
        want = given.flat(esper_jax.graft(given.model)(own, **given.arrays))
        close(outputs_of(esper_jax.to_torch(own, given.module), given.args, given.kwargs), want, 1e-5)
        spec = spec_of(own, given.model)
    finally:
        del torch_seeds.TWINS["doubling"]
    spec["seeds"][0]["blueprint"] = "affine"
    with pytest.raises(KeyError, match="the module has no layer 'layers.0.linear1' for a seed"):
        torch_seeds.regrow(torch.nn.Sequential(), spec)
    with pytest.raises(ValueError, match="the spec is of format 1, this file reads 2"):
        torch_seeds.regrow(torch.nn.Sequential(), {**spec, "format": 1})


def test_an_attention_layer_is_one_site():
    sites = {site.path: site.kind for site in morphed(case("masked_attention")).spec.sites}
    assert sites == {"attention": "attention"}


class SelfAttention(torch.nn.MultiheadAttention):
    def forward(self, x):
        return x + super().forward(x, x, x, need_weights=False)[0]


def test_an_attention_layer_of_ones_own_class_is_one_site_too():
    module, x = torch.nn.Sequential(SelfAttention(4, 2, batch_first=True)), torch.randn(3, 5, 4)
    model, variables = found = esper_jax.from_torch(module, x)
    assert found.report.passed and not found.report.bare
    morph = esper_jax.morph(variables, model=model, example=x.numpy())
    assert {site.path: site.kind for site in morph.spec.sites} == {"0": "attention"}
    morph = esper_jax.germinate(morph, "0", "head_group", key=jax.random.key(0))
    with pytest.raises(BridgeError, match=r"a seed at '0' cannot go back to torch: it is computed inside 0 \(SelfAtt"):
        esper_jax.to_torch(in_stage(morph.replace(seeds=stirred(morph.seeds, 0.3)), Stage.FOSSILIZED), module)
    assert torch.nn.MultiheadAttention.forward.__module__.startswith("torch")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["unet", "encoder"])
def test_the_regrown_module_becomes_onnx(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    given = case(name)
    sent = esper_jax.to_torch(grown(given), given.module).eval()
    torch.onnx.export(sent, given.args, dynamo=True, verbose=False).save(tmp_path / "grown.onnx")
    model = onnx.load(tmp_path / "grown.onnx")
    feed = {model.graph.input[0].name: given.args[0].numpy()}
    close(ReferenceEvaluator(model).run(None, feed), outputs_of(sent, given.args, given.kwargs), 1e-5)
