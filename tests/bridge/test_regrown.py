"""Regrown torch modules as their users treat them: hooks, errors, threads, copies, checkpoints, a second growth."""

from __future__ import annotations

import copy
import io
import sys
import threading

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import esper_jax  # noqa: E402
from esper_jax import Stage  # noqa: E402
from esper_jax.bridge import BridgeError, spec_of, torch_seeds  # noqa: E402

from ..kasmina.hosts import in_stage, stirred  # noqa: E402
from .world import close, outputs_of  # noqa: E402

F, nn = torch.nn.functional, torch.nn
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
LIMIT = 1e-5
LORAS = [("0", "lora"), ("1", "lora")]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grown(module, x, *plants):
    """The model and its morph with seeds in the output; plants are (site, blueprint), or (first, last) of a span."""
    model, variables = esper_jax.from_torch(module, x)
    morph = esper_jax.morph(variables, model=model, example=x.numpy())
    for i, (site, name) in enumerate(plants):
        key = jax.random.key(i)
        if name in {each.path for each in morph.spec.sites}:
            morph = esper_jax.germinate(morph, span=(site, name), blueprint="units", units=6, key=key)
        else:
            morph = esper_jax.germinate(morph, site, name, key=key)
    return model, in_stage(morph.replace(seeds=stirred(morph.seeds, 0.3)), Stage.FOSSILIZED)


def same(module, x, *plants, train=False):
    """Grow, send back, compare with JAX; the regrown module."""
    model, morph = grown(module, x, *plants)
    sent = esper_jax.to_torch(morph, module)
    want = np.asarray(esper_jax.graft(model)(morph, x.numpy()))
    close(outputs_of(sent, (x,), {}), [want], LIMIT)
    assert not np.allclose(want, outputs_of(module, (x,), {})[0]), "the seeds do something"
    return sent


class Product(nn.Module):
    """A linear layer that is computed in a forward that does more."""

    def __init__(self, wide=4):
        super().__init__()
        self.weight, self.bias = nn.Parameter(drawn(wide, 4) / 2), nn.Parameter(drawn(wide))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias).tanh()


def test_an_interrupted_forward_leaves_nothing_behind():
    class Interrupted(Product):
        fails = False

        def forward(self, x):
            if self.fails:
                raise KeyboardInterrupt
            return super().forward(x)

    x = drawn(3, 4)
    sent = same(nn.Sequential(Interrupted(), nn.ReLU()), x, ("0", "mlp"))
    before = sent(x)
    sent[0].fails = True
    with pytest.raises(KeyboardInterrupt):
        sent(x)
    sent[0].fails = False
    assert torch.overrides._get_current_function_mode() is None
    assert torch.equal(sent(x), before)


def test_a_users_hook_that_raises_keeps_the_users_own_modes():
    def fails(*_):
        raise ValueError("mine")

    x = drawn(3, 4)
    module = nn.Sequential(Product(), nn.ReLU())
    sent = same(module, x, ("0", "mlp"))
    handle = sent[0].register_forward_pre_hook(fails)
    with torch.device("meta"):
        with pytest.raises(ValueError, match="mine"):
            sent(x)
        assert torch.zeros(1).device.type == "meta"
    handle.remove()


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), Product()], ids=["layer", "inside"])
def test_a_users_own_hook_sees_the_layer_with_its_seeds(layer):
    module = nn.Sequential(layer, nn.ReLU())
    module[0].register_forward_hook(lambda _, args, output: output * 2)
    same(module, drawn(3, 4), ("0", "mlp"))


class Recursive(Product):
    def forward(self, x, depth=2):
        y = super().forward(x)
        return self(y, depth - 1) if depth else y


class TiedTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, ids):
        return F.linear(F.embedding(ids, self.table.weight).tanh(), self.table.weight)


class TiedConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return F.conv_transpose2d(F.conv2d(x, self.conv.weight).tanh(), self.conv.weight)


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, x):
        return F.layer_norm(self.norm(x).movedim(1, -1), (6,), self.norm.weight)


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x).relu())


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(Product())
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x).relu())


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(input=self.a(input=x).relu())


class Referred(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.a.weight, self.a.bias).tanh() + F.linear(self.a.weight, self.b.weight).sum(0)


@pytest.mark.parametrize(
    ("module", "x", "plants"),
    [
        (nn.Sequential(Recursive(), nn.ReLU()), drawn(3, 4), [("0", "mlp")]),
        (TiedTable(), torch.arange(6).reshape(2, 3), [("table", "lora")]),
        (TiedConvolution(), drawn(2, 3, 6, 5), [("conv", "lora")]),
        (SharedNorm(), drawn(2, 6, 5), [("norm", "affine")]),
        (TwoNames(), drawn(3, 4), [("a", "mlp")]),
        (Blocks(), drawn(3, 4), [("a/0", "lora")]),
        (ByKeyword(), drawn(3, 4), [("a", "b")]),
        (Referred(), drawn(3, 4), [("a", "lora")]),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 5, 3, 2)), drawn(2, 3, 9), LORAS),
        (nn.Sequential(nn.Conv3d(2, 4, 2), nn.ConvTranspose3d(4, 3, 2)), drawn(2, 2, 4, 4, 5), LORAS),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_seeds_take_the_place_in_torch_that_they_have_in_jax(module, x, plants):
    sent = same(module, x, *plants)
    written = io.BytesIO()
    torch.save(sent.state_dict(), written)
    close(outputs_of(copy.deepcopy(sent), (x,), {}), outputs_of(sent, (x,), {}), 0.0)
    if "Product" not in repr(sent):
        return
    torch._dynamo.reset()
    close(outputs_of(torch.compile(sent, backend="eager"), (x,), {}), outputs_of(sent, (x,), {}), LIMIT)


class Pooled(nn.Module):
    """Attention as some write it, by torch's own function."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        x = x[:, None]
        return F.multi_head_attention_forward(
            x, x, x, 4, 2, self.inner.weight, self.inner.bias, None, None, False, 0.0, self.out.weight, self.out.bias
        )[0]


class Optional(Product):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, 4)

    def forward(self, x, more=None):
        y = super().forward(x)
        return y if more is None else y + F.linear(more, self.other.weight)


class TwoProducts(Product):
    def forward(self, x):
        return F.linear(super().forward(x), self.weight)


class TwoReaches(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(drawn(3, 3, 3, 3) / 3)

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.weight, padding=1).tanh(), self.weight, padding=2, dilation=2)


class AnotherWayInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.a.weight, self.a.bias) if self.training else self.a(x)


@pytest.mark.parametrize(
    ("module", "x", "site"),
    [
        (nn.Sequential(TwoProducts(), nn.ReLU()), drawn(3, 4), "0"),
        (nn.Sequential(TwoReaches(), nn.ReLU()), drawn(2, 3, 6, 5), "0"),
        (AnotherWayInTraining(), drawn(3, 4), "a"),
        (nn.Sequential(Pooled(), nn.ReLU()), drawn(3, 4), "0/out"),
    ],
    ids=["products", "reaches", "training", "attention"],
)
def test_where_torch_shows_no_such_place_they_cannot_go_back(module, x, site):
    model, morph = grown(module, x, (site, "lora"))
    with pytest.raises(BridgeError, match=rf"a seed at .{site}. cannot go back to torch: it is computed inside"):
        esper_jax.to_torch(morph, module)
    want = np.asarray(esper_jax.graft(model)(morph, x.numpy()))
    if site == "a":  # folded into the weight, which is read in one way a mode
        close(outputs_of(esper_jax.to_torch(esper_jax.fold(morph), module), (x,), {}), [want], LIMIT)


def test_a_call_that_leaves_a_layer_out_leaves_its_seeds_out():
    module, x = Optional(), drawn(3, 4)
    model, variables = esper_jax.from_torch(module, (x, x))
    morph = esper_jax.morph(variables, model=model, example=(x.numpy(), x.numpy()))
    morph = esper_jax.germinate(morph, "other", "lora", key=jax.random.key(0))
    sent = esper_jax.to_torch(in_stage(morph.replace(seeds=stirred(morph.seeds, 0.3)), Stage.FOSSILIZED), module)
    assert not torch.equal(sent(x, x), module(x, x))
    with pytest.warns(UserWarning, match=r"Optional.forward called no torch.nn.functional.linear .* 'other'"):
        assert torch.equal(sent(x), module(x))


def test_a_layer_of_training_alone_keeps_its_seed_in_training():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.aux = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.aux(self.a(x)) if self.training else self.a(x)

    module, x = Auxiliary(), drawn(3, 4)
    model, variables = esper_jax.from_torch(module, x)
    morph = esper_jax.germinate(esper_jax.morph(variables), "aux", "lora", key=jax.random.key(0))
    morph = in_stage(morph.replace(seeds=stirred(morph.seeds, 0.3)), Stage.FOSSILIZED)
    sent = esper_jax.to_torch(morph, module).train()
    want = np.asarray(esper_jax.graft(model)(morph, x.numpy(), train=True))
    close([sent(x).detach().numpy()], [want], LIMIT)


def test_models_that_call_the_same_layers_differently_are_not_taken_for_each_other():
    class Either(nn.Module):
        def __init__(self, direct):
            super().__init__()
            self.layer, self.direct, self.drop = nn.Linear(4, 4), direct, nn.Dropout() if direct else nn.Identity()

        def forward(self, x):
            return (F.linear(x, self.layer.weight, self.layer.bias) if self.direct else self.layer(x)).tanh()

    first, x = Either(True), drawn(3, 4)
    model, morph = grown(first, x, ("layer", "lora"))
    want = np.asarray(esper_jax.graft(model)(morph, x.numpy()))
    esper_jax.from_torch(Either(True), drawn(5, 4))
    close(outputs_of(esper_jax.to_torch(morph, first), (x,), {}), [want], LIMIT)
    esper_jax.from_torch(Either(False), x)
    with pytest.raises(BridgeError, match="2 modules like this Either were imported .* give model="):
        esper_jax.to_torch(morph, first)
    close(outputs_of(esper_jax.to_torch(morph, first, model), (x,), {}), [want], LIMIT)


def test_models_of_one_layout_but_other_layers_are_told_apart():
    class Net(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x).relu()

    first, x = Net(nn.GroupNorm(2, 6)), drawn(4, 6)
    model, morph = grown(first, x, ("norm", "affine"))
    esper_jax.from_torch(Net(nn.LayerNorm(6)), x)
    want = np.asarray(esper_jax.graft(model)(morph, x.numpy()))
    close(outputs_of(esper_jax.to_torch(morph, first), (x,), {}), [want], LIMIT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_function_is_refused_and_one_around_the_module_trains(reentrant):
    class Checkpointed(Product):
        around = False

        def forward(self, x):
            inner = super().forward
            return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=reentrant) if self.around else inner(x)

    x = drawn(3, 4)
    sent = same(nn.Sequential(Checkpointed(), nn.ReLU()), x, ("0", "mlp")).train()
    given = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(sent, given, use_reentrant=reentrant).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in sent.parameters())
    sent[0].around = True
    with pytest.raises(RuntimeError, match="'0' is computed under torch.utils.checkpoint inside the forward"):
        sent(given)
    with torch.no_grad():
        assert torch.isfinite(sent(given)).all()


@pytest.mark.parametrize("inside", [True, False])
def test_threads_do_not_see_each_others_seeds(inside):
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Product() if inside else nn.Linear(4, 3))
    sent = same(module, drawn(3, 4), *([("2", "mlp")] if inside else [("0", "2")]))
    batches = [drawn(3, 4, seed=i) for i in range(4)]
    with torch.no_grad():
        want = [sent(x) for x in batches]
    wrong = []

    def call(i):
        with torch.no_grad():
            wrong.extend(i for _ in range(50) if not torch.equal(sent(batches[i]), want[i]))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_regrown_encoder_takes_padding_without_gradients():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    module, x = nn.TransformerEncoder(layer, 2).eval(), drawn(2, 5, 8)
    sent = same(module, x, ("layers/1/linear2", "mlp"))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    want = sent(x, src_key_padding_mask=padding)
    with torch.no_grad():
        close([sent(x, src_key_padding_mask=padding)[~padding].numpy()], [want[~padding].detach().numpy()], LIMIT)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), Product()], ids=["layer", "inside"])
def test_a_regrown_module_grows_again(layer):
    x = drawn(3, 4)
    once = same(nn.Sequential(layer, nn.ReLU()), x, ("0", "mlp"))
    twice = same(once, x, ("0", "lora"))
    assert {key.split(".")[1] for key in twice.state_dict() if "seeds" in key} == {"esper_seeds", "esper_seeds_1"}


def test_a_span_that_has_run_can_be_copied_and_sent_again():
    module = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
    x = drawn(4, 5)
    sent = same(module, x, ("2", "4"))
    want = sent(x)
    assert torch.equal(copy.deepcopy(sent)(x), want)
    _, variables = esper_jax.from_torch(sent, x)
    close(outputs_of(esper_jax.to_torch(variables, sent), (x,), {}), [want.detach().numpy()], LIMIT)


def test_a_spec_that_does_not_fit_changes_nothing():
    module, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), drawn(3, 4)
    model, morph = grown(module, x, ("0", "mlp"), ("2", "lora"))
    spec, keys = spec_of(morph, model), list(module.state_dict())
    with pytest.raises(KeyError, match="no layer '5'"):
        torch_seeds.regrow(module, {**spec, "seeds": [spec["seeds"][0], {**spec["seeds"][1], "module": "5"}]})
    assert list(module.state_dict()) == keys and not module[0]._forward_hooks
    torch_seeds.regrow(module, spec)
    assert len(module.state_dict()) > len(keys)
