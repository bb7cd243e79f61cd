"""Grown models in plain PyTorch: `regrow(module, spec)` attaches seeds to a module's own layers.

This file needs torch and nothing else: ship it with a checkpoint (the module's state_dict with the seeds' keys in it,
and the spec as JSON), and whoever loads them needs no JAX:

    module = regrow(Model(), json.load(open("spec.json")))
    module.load_state_dict(torch.load("grown.pt", weights_only=True))

A seed is a child of its host layer (`layer.esper_seeds.0`), so that no key of the host changes, and enters the layer's
output by a forward hook; where a forward computes the layer and does more, right behind torch's function.
Parameters have the shapes that they have in JAX; channels are last inside.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CHILD = "esper_seeds"
FORMAT = 2
EPSILON = 1e-5
_CHANNELS_FIRST = ("conv", "batch_norm", "group_norm", "instance_norm")
Twin = Callable[[dict[str, Tensor], Any, dict[str, Any]], Tensor]


class Seed(nn.Module):
    """One seed: its parameters by name, alpha as a buffer, and what it adds to its layer.

    Args:
      entry: one of the spec's `seeds`: blueprint, config, blend, alpha, kind, reads, form, shapes, dtype.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        super().__init__()
        if entry["blueprint"] not in TWINS:
            raise ValueError(
                f"blueprint {entry['blueprint']!r} has no twin in torch (known: {', '.join(sorted(TWINS))}); "
                "give it with "
                "register_twin(name, fn)"
            )
        self.entry = entry
        dtype = getattr(torch, entry.get("dtype", "float32"))
        for name, shape in entry["shapes"].items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
        self.register_buffer("alpha", torch.tensor(float(entry["alpha"])))

    def forward(self, u: Any, h: Tensor) -> Tensor:
        """The layer's output with the seed in it; `u` is what the seed reads, features last."""
        entry, params = self.entry, dict(self.named_parameters())
        gate = None
        if entry["blend"] == "gate":
            gate = self._gate(u, params.pop("gate_kernel"), params.pop("gate_bias"))
        f = TWINS[entry["blueprint"]](params, u, entry).to(h.dtype)
        alpha = self.alpha.to(h.dtype)
        if entry["blend"] == "add":
            return h + alpha * f
        if entry["blend"] == "lerp":
            return torch.where(self.alpha == 1, f, h + alpha * (f - h))
        if entry["blend"] == "multiply":
            return h * (1 + alpha * torch.tanh(f))
        return h + alpha * gate.to(h.dtype) * f  # type: ignore[union-attr]

    def _gate(self, u: Any, kernel: Tensor, bias: Tensor) -> Tensor:
        read = u[0] if isinstance(u, tuple) else u
        if self.entry["reads"] == "input" and self.entry["kind"] == "embed":
            return torch.sigmoid(kernel[read] + bias)
        if self.entry["reads"] == "input" and self.entry["form"].get("kernel_size"):
            read = read.mean(dim=tuple(range(1, read.dim() - 1)), keepdim=True)
        return torch.sigmoid(read @ kernel + bias)

    def extra_repr(self) -> str:
        """What `print(module)` shows of it."""
        entry = self.entry
        return f"{entry['blueprint']}, {entry['blend']}, alpha={float(self.alpha):g}"


def regrow(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """Attach a grown model's seeds to a fresh host module, in place; their parameters are loaded by `load_state_dict`.

    Activations may be checkpointed (torch.utils.checkpoint) a module at a time, and both layers of a span together.

    Args:
      module: the host, of the class and sizes that were grown.
      spec: `{"seeds": [...], "sizes": {...}}` as `esper_jax.bridge.spec_of` gives it; plain JSON.

    Returns:
      The module itself.

    Raises:
      KeyError: a seed's layer is not in the module. ValueError: a blueprint without a twin, or another format.
    """
    attach(module, spec)
    return module


def attach(module: nn.Module, spec: dict[str, Any]) -> list[Seed]:
    """What `regrow` does; the seeds, in the spec's order. Nothing is changed where it raises."""
    if spec.get("format") != FORMAT:
        raise ValueError(f"the spec is of format {spec.get('format')}, this file reads {FORMAT}: make it anew")
    sizes, seeds = spec.get("sizes", {}), [Seed(entry) for entry in spec["seeds"]]
    for entry in spec["seeds"]:
        for path in (entry["module"], entry["source"] or entry["module"], *entry["hooks"], *entry["inside"]):
            _layer(module, path)
    for name in sizes:
        if not hasattr(_layer(module, name.rpartition(".")[0]), name.rpartition(".")[2]):
            raise KeyError(f"the module has no tensor {name!r}, which grew")
    for name, shape in sizes.items():
        _resize(module, name, tuple(shape))
    banks: dict[str, nn.ModuleDict] = {}
    for seed in seeds:
        entry = seed.entry
        if entry["module"] not in banks:
            banks[entry["module"]] = _bank(module, entry)
        banks[entry["module"]][str(entry["slot"])] = seed
        if entry["source"]:
            seed.given = _watch(_layer(module, entry["source"]))
    for child in module.modules() if seeds else ():
        if isinstance(child, nn.TransformerEncoder):  # its nested tensors know nothing of hooks
            child.enable_nested_tensor = child.use_nested_tensor = False
    return seeds


def _bank(module: nn.Module, entry: dict[str, Any]) -> nn.ModuleDict:
    """Where a layer has the seeds of one growth. The last growth comes first, right behind the layer."""
    layer, bank = _layer(module, entry["module"]), nn.ModuleDict()
    names = (f"{CHILD}_{n}" if n else CHILD for n in itertools.count())
    setattr(layer, next(name for name in names if not hasattr(layer, name)), bank)
    for path in entry["hooks"]:
        _layer(module, path).register_forward_hook(functools.partial(_hook, bank), with_kwargs=True, prepend=True)
    for path in entry["inside"]:
        _within(_layer(module, path)).banks.insert(0, (layer, bank))
    return bank


def _layer(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        close = ", ".join([name for name, _ in module.named_modules()][1:9])
        raise KeyError(f"the module has no layer {path!r} for a seed; it has {close}, ...") from None


class _Within:
    """A module whose forward computes layers and does more: its own forward, and the layers with their seeds."""

    def __init__(self, home: nn.Module) -> None:
        self.home, self.own = home, vars(home).get("forward")
        self.banks: list[tuple[Any, nn.ModuleDict]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward gives without seeds."""
        return (self.own or functools.partial(type(self.home).forward, self.home))(*args, **kwargs)


def _within(home: nn.Module) -> _Within:
    """The module with a forward that has seeds where it computes layers."""
    forward = vars(home).get("forward")
    if getattr(forward, "func", None) is _seeded:
        return forward.args[0]  # type: ignore[no-any-return, union-attr]
    within, signature = _Within(home), inspect.signature(home.forward)
    home.forward = functools.partial(_seeded, within)
    home.forward.__signature__ = signature  # type: ignore[attr-defined]
    return within


@torch.compiler.disable  # some backends would run what was traced under the mode under it once more
def _seeded(within: _Within, *args: Any, **kwargs: Any) -> Any:
    active = _ACTIVE.__dict__.setdefault("homes", [])
    if any(other is within for other in active):  # it calls itself
        return within.forward(*args, **kwargs)
    active.append(within)
    try:
        with _Inside(within.banks) as inside:
            output = within.forward(*args, **kwargs)
    finally:
        active.pop()
    mode = "train" if within.home.training else "eval"
    for _, bank in within.banks:
        entry = _entry(bank)
        if not any(bank is met for met in inside.met) and mode in entry["called"]:
            warnings.warn(
                f"{type(within.home).__name__}.forward called no torch.nn.functional.{entry['function']} that could be "
                f"seen with the weight of {entry['module']!r}: the seeds there had no part in what it gave",
                stacklevel=2,
            )
    return output


_ACTIVE = threading.local()


class _Inside(TorchFunctionMode):
    """Meanwhile a function of torch's that is called with a layer's weight gives the layer's output with its seeds."""

    def __init__(self, banks: list[tuple[Any, nn.ModuleDict]]) -> None:
        super().__init__()
        self.banks, self.learns = banks, torch.is_grad_enabled()
        self.met: list[nn.ModuleDict] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What the function gives."""
        output, name = func(*args, **(kwargs or {})), getattr(getattr(func, "overloadpacket", func), "__name__", "")
        given = {**dict(enumerate(args)), **(kwargs or {})}
        u = given.pop("input" if "input" in given else 1 if func is torch.embedding else 0, None)
        for layer, bank in self.banks:
            if name != _entry(bank)["function"] or not any(value is layer.weight for value in given.values()):
                continue
            if self.learns and _is_checkpointed():
                raise RuntimeError(
                    f"{_entry(bank)['module']!r} is computed under torch.utils.checkpoint inside the forward of its "
                    "module, and computed again without its seeds; checkpoint that module as a whole"
                )
            self.met.append(bank)
            output = _grown(bank, layer, u, output)
        return output


def _is_checkpointed() -> bool:
    """Whether torch.utils.checkpoint has been called since the forward with seeds was."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != _seeded.__name__:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


class _Given(threading.local):
    """What a span's first layer was called with last, in each thread; a copy has seen nothing yet."""

    value: Tensor

    def __deepcopy__(self, memo: Any) -> _Given:
        return _Given()

    def __reduce__(self) -> Any:
        return _Given, ()


def _watch(layer: nn.Module) -> _Given:
    given = _Given()
    layer.register_forward_pre_hook(functools.partial(_note, given), with_kwargs=True)
    return given


def _note(given: _Given, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given.value = _first(args, kwargs)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is called with."""
    return args[0] if args else next(iter(kwargs.values()))


def _hook(bank: nn.ModuleDict, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if isinstance(layer, nn.MultiheadAttention):
        call, h, back = _attended(layer, args, kwargs, output[0])
        for seed in bank.values():
            h = seed({"input": call[0], "output": h, "call": call}[seed.entry["reads"]], h)
        return back(h), *output[1:]
    return _grown(bank, layer, _first(args, kwargs), output)


def _grown(bank: nn.ModuleDict, layer: Any, u: Tensor, output: Tensor) -> Tensor:
    """A layer's output with its seeds in it."""
    function = _entry(bank)["function"]
    h, back = _last(function, layer, output)
    for seed in bank.values():
        if seed.entry["source"]:
            read = _last(function, layer, seed.given.value)[0]
        elif seed.entry["reads"] == "output":
            read = h
        else:
            read = u if seed.entry["kind"] == "embed" else _last(function, layer, u)[0]
        h = seed(read, h)
    return back(h)


def _last(function: str, layer: Any, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """An array of the layer's with its channels last, batch first, and the way back."""
    if not function.startswith(_CHANNELS_FIRST):
        return x, lambda y: y
    if function.startswith("conv") and x.dim() == layer.weight.dim() - 1:
        return x.movedim(0, -1)[None], lambda y: y[0].movedim(-1, 0)
    return x.movedim(1, -1), lambda y: y.movedim(-1, 1)


def _entry(bank: nn.ModuleDict) -> dict[str, Any]:
    """The spec of a layer's first seed; what it says of the layer holds for all of them."""
    return next(iter(bank.values())).entry  # type: ignore[return-value, union-attr]


def _attended(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], h: Tensor) -> tuple[Any, Tensor, Any]:
    """Queries, keys, values and what is allowed `[N, heads or 1, L, S]`, batch first."""
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")

    def back(y: Tensor) -> Tensor:
        return y

    if q.dim() == 2:
        q, k, v, h = q[None], k[None], v[None], h[None]
        padding = None if padding is None else padding[None]
        back = lambda y: y[0]  # noqa: E731
    elif not layer.batch_first:
        q, k, v, h = (x.transpose(0, 1) for x in (q, k, v, h))
        back = lambda y: y.transpose(0, 1)  # noqa: E731
    allowed = None
    if padding is not None:
        allowed = _allows(padding)[:, None, None, :]
    if mask is not None:
        pairs = _allows(mask)
        pairs = pairs.view(q.shape[0], -1, *pairs.shape[-2:]) if pairs.dim() == 3 else pairs[None, None]
        allowed = pairs if allowed is None else allowed & pairs
    return (q, k, v, allowed), h, back


def _allows(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask > -math.inf


def _resize(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Give a tensor of a layer another shape (a folded span makes layers wider)."""
    path, _, leaf = name.rpartition(".")
    layer: Any = _layer(module, path)
    old = getattr(layer, leaf)
    if tuple(old.shape) == shape:
        return
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    if isinstance(old, nn.Parameter):
        setattr(layer, leaf, nn.Parameter(new, old.requires_grad))
    else:
        layer.register_buffer(leaf, new)
    if leaf != "weight":
        return
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed:
        layer.out_channels, layer.in_channels = shape[0], shape[1] * layer.groups
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.num_features = shape[0]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = shape


# --- twins: what each blueprint computes, channels last ---


def register_twin(name: str, fn: Twin) -> None:
    """Give a blueprint of your own its form in torch: `fn(params, u, entry) -> f`, as its `apply` in JAX."""
    TWINS[name] = fn


def _normalise(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dim=dims, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(dim=dims, keepdim=True) + EPSILON)).to(x.dtype)


def _group_norm(scale: Tensor, bias: Tensor, x: Tensor, most: int) -> Tensor:
    features = x.shape[-1]
    groups = next((g for g in range(most, 0, -1) if features % g == 0 and features // g >= 4), 1)
    split = x.reshape(*x.shape[:-1], groups, features // groups)
    dims = (*range(1, x.dim() - 1), x.dim())
    return _normalise(split, dims).reshape(x.shape) * scale + bias


def _conv(x: Tensor, kernel: Tensor, pads: Any, strides: Any, dilation: Any, groups: int) -> Tensor:
    """A convolution of channels last with a kernel `[*taps, in / groups, out]`."""
    spatial = kernel.dim() - 2
    flat = [p for pair in reversed(list(pads)) for p in pair]
    padded = F.pad(x.movedim(-1, 1), flat)
    weight = kernel.permute(spatial + 1, spatial, *range(spatial))
    run = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return run(padded, weight, None, tuple(strides), 0, tuple(dilation), groups).movedim(1, -1)


def _same(x: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:
    sizes = kernel.shape[:-2]
    pads = [((n - 1) // 2, n - 1 - (n - 1) // 2) for n in sizes]
    ones = (1,) * len(sizes)
    return _conv(x, kernel, pads, ones, ones, groups)


def _like_layer(entry: dict[str, Any], form: dict[str, Any], x: Tensor, kernel: Tensor) -> Tensor:
    """As the layer itself moves, with another kernel."""
    if entry["kind"] != "conv_transpose":
        return _conv(x, kernel, form["padding"], form["strides"], form["kernel_dilation"], form.get("groups", 1))
    spatial = kernel.dim() - 2
    stretched = x.movedim(-1, 1)
    for axis, stride in enumerate(form["strides"], start=2):
        if stride > 1:
            size = stretched.shape[axis]
            spread = torch.zeros_like(stretched).unsqueeze(axis + 1)
            parts = [stretched.unsqueeze(axis + 1)] + [spread] * (stride - 1)
            stretched = torch.cat(parts, axis + 1).flatten(axis, axis + 1).narrow(axis, 0, (size - 1) * stride + 1)
    ones = (1,) * spatial
    return _conv(stretched.movedim(1, -1), kernel, form["padding"], ones, form["kernel_dilation"], 1)


def _affine(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    return u * p["scale"] + p["bias"] if "bias" in p else u * p["scale"]


def _glu(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    gates = {"silu": F.silu, "gelu": _tanh_gelu, "sigmoid": torch.sigmoid}
    return (gates[entry["config"]["activation"]](u @ p["gate"]) * (u @ p["value"])) @ p["up"]


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _linear(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    scale = entry["config"]["scale"]
    if entry["kind"] == "embed":
        return p["kernel"][u] * scale
    if entry["form"].get("kernel_size"):
        return _like_layer(entry, entry["form"], u, p["kernel"]) * scale
    return u @ p["kernel"] * scale


def _lora(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    down, up, scale = p["down"], p["up"], entry["config"]["scale"]
    if entry["kind"] == "embed":
        return down[u] @ up * scale
    if not entry["form"].get("kernel_size"):
        return (u @ down) @ up * scale
    inner = _like_layer(entry, entry["form"], u, down)
    grouped = inner.reshape(*inner.shape[:-1], up.shape[0], -1)
    return torch.einsum("...gr,gro->...go", grouped, up).flatten(-2) * scale


def _mlp(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    act = {"gelu": _tanh_gelu, "relu": F.relu}[entry["config"]["activation"]]
    return act(u @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"]


def _norm(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    return _normalise(u, (u.dim() - 1,)) * p["scale"] + p["bias"]


def _head_group(p: dict[str, Tensor], u: Any, entry: dict[str, Any]) -> Tensor:
    queries, keys, values, mask = u
    q, k, v = (
        torch.einsum("...ti,ihw->...thw", given, p[name])
        for name, given in (("query", queries), ("key", keys), ("value", values))
    )
    weights = torch.einsum("...qhw,...khw->...hqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        shared = mask if mask.shape[-3] == p["query"].shape[1] else mask.all(dim=-3, keepdim=True)
        weights = torch.where(shared, weights, torch.finfo(weights.dtype).min)
    seen = torch.einsum("...hqk,...khw->...qhw", weights.softmax(-1), v)
    return torch.einsum("...qhw,hwo->...qo", seen, p["out"])


def _causal_conv(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    if u.dim() < 2:
        return u * p["filter"][-1] * p["gain"]
    taps, length = p["filter"].shape[0], u.shape[-2]
    padded = F.pad(u, (0, 0, taps - 1, 0))
    total = sum(padded.narrow(-2, tap, length) * p["filter"][tap] for tap in range(taps))
    return total * p["gain"]  # type: ignore[no-any-return]


def _conv_small(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    return F.relu(_group_norm(p["scale"], p["bias"], u @ p["mix"], entry["config"]["groups"])) @ p["up"]


def _conv_light(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    return F.relu(_group_norm(p["scale"], p["bias"], _same(u, p["conv"]), entry["config"]["groups"])) @ p["up"]


def _conv_heavy(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    groups = entry["config"]["groups"]
    inner = F.relu(_group_norm(p["scale"], p["bias"], _same(u, p["conv"]), groups))
    return F.relu(_group_norm(p["scale2"], p["bias2"], _same(inner, p["conv2"]), groups)) @ p["up"]


def _depthwise(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    filtered = _same(u, p["conv"], groups=u.shape[-1])
    return F.relu(_group_norm(p["scale"], p["bias"], filtered, entry["config"]["groups"])) @ p["up"]


def _bottleneck(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    inner = _same(u @ p["down"], p["conv"])
    return F.relu(_group_norm(p["scale"], p["bias"], inner, entry["config"]["groups"])) @ p["up"]


def _se(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    mean = u.mean(dim=tuple(range(1, u.dim() - 1)), keepdim=True)
    hidden = F.relu(mean @ p["squeeze"] + p["squeeze_bias"])
    return u * torch.tanh(hidden @ p["excite"] + p["excite_bias"])


UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": _tanh_gelu,
    "gelu_exact": F.gelu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
    "identity": lambda x: x,
}


def _units(p: dict[str, Tensor], u: Tensor, entry: dict[str, Any]) -> Tensor:
    act = UNITS[entry["config"]["activation"]]
    form = entry["form"]
    plain = not form.get("first", {}).get("kernel_size")
    hidden = u @ p["enter"] if plain else _like_layer({"kind": "conv"}, form["first"], u, p["enter"])
    hidden = act(hidden + p["bias"] if "bias" in p else hidden)
    return hidden @ p["leave"] if plain else _like_layer({"kind": "conv"}, form["second"], hidden, p["leave"])


TWINS: dict[str, Twin] = {
    "affine": _affine,
    "bottleneck": _bottleneck,
    "causal_conv": _causal_conv,
    "conv_heavy": _conv_heavy,
    "conv_light": _conv_light,
    "conv_small": _conv_small,
    "depthwise": _depthwise,
    "glu": _glu,
    "head_group": _head_group,
    "linear": _linear,
    "lora": _lora,
    "mlp": _mlp,
    "norm": _norm,
    "se": _se,
    "units": _units,
}
