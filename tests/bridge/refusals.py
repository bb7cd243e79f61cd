"""Modules that must be refused, and the words that tell why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

X = torch.ones(2, 4)


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Items(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * x.max().item()


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.clamp(-1, 1)


class Custom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Clipped.apply(x) * 2


class Overflow(nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (ids * 6364136223846793005) % 7


class BigBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hashes", torch.tensor([2**40, 1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :2] * self.hashes


class Nonzero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0].sum()[None] + torch.nonzero(x > 0).shape[0]


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x + 1


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randint_like(x, torch.tensor(3))


class Categories(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.binomial(x, x / 2)


class Cond(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))  # type: ignore[no-any-return]


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.layerdrop = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not self.training or torch.rand([]) > self.layerdrop:
                x = layer(x)
        return x


class Mentions(nn.Module):
    """Not what LayerDrop does, though it is spoken of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer_dropout(x)  # LayerDrop is another thing
        if self.training and x.sum() > 0:
            return x + 1
        return x


class Dirichlet(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch._sample_dirichlet(x)


class DirectCTC(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        targets, lengths = torch.ones(2, 1, dtype=torch.long), torch.ones(2, dtype=torch.long)
        return torch.ctc_loss(x[None].log_softmax(-1), targets, lengths, lengths)


class RawInstances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(3, track_running_stats=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        return torch.instance_norm(
            x, None, None, norm.running_mean, norm.running_var, self.training, 0.1, norm.eps, False
        )


class ComplexWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.w).abs()


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x * 2
        return self.last


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.head(x))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x[:, None], torch.tensor([2]), enforce_sorted=False)
        return self.rnn(packed)[1][0]


class SavedApply(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.clip, self.linear = Clipped.apply, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.clip(self.linear(x))


def hooked_module() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].register_full_backward_hook(lambda module, inputs, outputs: None)
    return module


def hooked_parameter() -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight.register_hook(lambda gradient: gradient / 2)
    return module


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x).float()


class TwoPlaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.again = self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.linear(self.norm(x)))


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, torch.qint8)


def meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 4)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True)


REFUSALS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "control flow on values": (Branches, X, "control flow or its shapes depend on the values of a tensor \\(line"),
    "item": (Items, X, "the values of a tensor|reads a tensor's value as a number"),
    "custom autograd function": (
        Custom,
        X,
        "Clipped, an autograd Function whose backward the captured graph would lose",
    ),
    "custom autograd function by a saved apply": (
        SavedApply,
        X,
        "Clipped, an autograd Function whose backward the captured graph would lose",
    ),
    "reentrant checkpoint": (
        Checkpointed,
        X,
        "use_reentrant=True, of which the captured graph would lose the gradients",
    ),
    "module hook on the way back": (hooked_module, X, "0 has a backward hook, which the captured graph would lose"),
    "parameter hook": (hooked_parameter, X, "parameter 'weight' has a hook on its gradient"),
    "autocast": (Autocast, X, "runs under autocast; give a module in the dtype it should compute in"),
    "one batch norm in two places": (
        TwoPlaces,
        X,
        "norm.running_mean and again.running_mean are one buffer.*give each place a module of its own",
    ),
    "integer constant": (Overflow, torch.ones(2, dtype=torch.long), "overflows the 32 bit integers.*jax_enable_x64"),
    "integer buffer": (BigBuffer, X, "hashes holds values beyond int32.*jax_enable_x64"),
    "shapes of values": (Nonzero, X, "the shape of aten.* depends on the values of a tensor"),
    "write to an input": (InPlace, X, "writes into its input 'x' in place; a pure function cannot: clone it first"),
    "random numbers": (Random, X, "draws random numbers by aten.randint_like.Tensor"),
    "no fake form": (Categories, X, "it calls aten.binomial.default \\(line .*which torch itself cannot export"),
    "branches of torch.cond": (Cond, X, "torch.cond computes one of two branches \\(line .*choose by torch.where"),
    "control flow where layers are dropped": (Mentions, X, "control flow or its shapes depend on the values"),
    "a distribution that torch cannot export": (Dirichlet, X, "_sample_dirichlet.default \\(line"),
    "ctc called directly": (DirectCTC, X, "it calls torch.ctc_loss \\(line .*call torch.nn.functional.ctc_loss"),
    "layers left out at random": (LayerDrop, X, "decides whether a layer is left out \\(line .*Set the rate to 0"),
    "complex parameters": (
        ComplexWeights,
        X,
        "parameter 'w' is complex; torch and JAX define its gradient differently",
    ),
    "gradients by counts": (
        lambda: nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True)),
        torch.ones(3, 2, dtype=torch.long),
        "scale_grad_by_freq=True divides its gradients by counts",
    ),
    "changed parameter": (
        lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)),
        torch.ones(2, 3, dtype=torch.long),
        "changes its parameter '0.weight' in its forward",
    ),
    "instance statistics": (
        RawInstances,
        torch.ones(2, 3, 4),
        "calls torch.instance_norm with running statistics",
    ),
    "memory": (Memory, X, "keeps tensors in self.last; a pure function has no such memory"),
    "unknown operator": (Unknown, X, "aten.special_bessel_j0.default, which the bridge does not know.*register_op"),
    "packed sequences": (Packed, X, "packed sequences have lengths of their own"),
    "quantised": (quantised, X, "quantised and scripted modules have no parameters to train"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))), X, "scripted modules"),
    "meta": (meta, X, "is on the meta device and has no values"),
    "float64": (lambda: nn.Linear(4, 4).double(), X.double(), "float64 tensors, and JAX runs in 32 bit"),
    "no module": (lambda: torch.tanh, X, "from_torch takes a torch.nn.Module, got builtin_function_or_method"),
    "no tensor": (lambda: nn.Linear(4, 4), (3,), "example_inputs hold no tensor"),
    "wrong example": (lambda: nn.Linear(4, 4), (X, X), "forward does not take these example inputs"),
    "misfit": (lambda: nn.Linear(5, 4), X, "Linear cannot be captured"),
}
