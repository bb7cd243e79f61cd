"""What an imported PyTorch model costs in JAX: jitted forward and train step against torch eager on the same machine.

Both run the same weights on the same batches, interleaved in one process; each train step is SGD on a cross-entropy.
A sample takes a tenth of a second, after a call that is not timed, in which the other library's threads still spin.
Each model has several processes one after another, since where a process finds its memory moves convolutions by a
third: ratios are over the rounds of all of them. On a CPU both sides have the freed memory that
`esper_jax.keep_memory()` keeps; `--memory returned` leaves it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    Column,
    Report,
    Timing,
    begin,
    interleave,
    noise_floor,
    parser,
    ratio,
    ratio_columns,
    settle,
    time_columns,
)

import esper_jax

AIMS = {"mlp": 1.0, "transformer": 1.0, "encoder": 1.0, "cnn": 1.3, "resnet": 1.3, "depthwise": 1.0}
COLUMNS = (
    Column("model", "model"),
    Column("what", "what"),
    Column("variant", "variant"),
    Column("median", "median", "time"),
    Column("p95", "p95", "time"),
    Column("ratio", "over torch", "ratio"),
    Column("interval", "95% interval", "interval"),
    Column("spread", "spread", "ratio"),
    Column("processes", "processes", "interval"),
    Column("aim", "aim"),
)
RATE = 1e-2
AGAIN = "torch, the same once more"

Timed = dict[str, dict[str, Timing]]
"""Timings of variants, of the forward pass and of the train step."""


def main() -> None:
    """Measure and print."""
    made = parser(__doc__ or "", rounds=60, budget=2.0, models=tuple(AIMS))
    made.set_defaults(memory="kept")
    made.add_argument("--processes", type=int, default=5, help="of each model, one after another")
    made.add_argument("--batch", type=int, default=32, help="batch size")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a GPU, which this process leaves to the others
    args = begin(made)
    report = Report("bridge", __doc__ or "", args, "torch")
    rows, floors, device, threads = [], [], "", ""
    for name in args.models:
        processes: list[Timed] = []
        for _ in range(args.processes):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                try:
                    timed, device, threads = pool.submit(measured, args, name).result()
                except ModuleNotFoundError as error:
                    if error.name != "torch":
                        raise
                    raise SystemExit("this benchmark needs PyTorch: pip install 'esper_jax[torch]'") from None
            processes.append(timed)
        for what in processes[0]:
            each = [timed[what] for timed in processes]
            rows += compared(name, what, each, 1.0 if device == "cuda" else AIMS[name])
            floors.append(ratio(joined(each, AGAIN), joined(each, "torch")))
    report.table("Forward pass and train step of imported models", COLUMNS, rows, f"Base: {threads}.")
    report.note("processes: the least and the greatest median ratio of one process.")
    report.note(f"Noise floor, from a second copy of torch's: {noise_floor(floors):.3f}.")
    report.finish()


def compared(name: str, what: str, processes: list[dict[str, Timing]], aim: float) -> list[dict[str, Any]]:
    """The rows of one model's forward pass or train step."""
    rows = []
    for variant in processes[0]:
        row = {"model": name, "what": what, "variant": variant, **time_columns(joined(processes, variant))}
        if variant != "torch":
            found = ratio(joined(processes, variant), joined(processes, "torch"))
            medians = [ratio(timed[variant], timed["torch"]).median for timed in processes]
            row |= {**ratio_columns(found), "processes": [min(medians), max(medians)]}
        if variant == "jax":
            row["aim"] = f"{'met' if found.median <= aim else 'NOT met'} ({aim})"
        rows.append(row)
    return rows


def joined(processes: list[dict[str, Timing]], variant: str) -> Timing:
    """The rounds of all processes."""
    return Timing(variant, np.concatenate([timed[variant].samples for timed in processes]))


def measured(args: Any, name: str) -> tuple[Timed, str, str]:
    """One process: what one model's variants take, and what torch ran on, in a word and in words."""
    settle(args)
    import torch

    device = torch.device("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    module, example = MODELS[name](torch, args.scale, args.batch)
    options = {"rounds": args.rounds, "budget": args.budget, "seed": args.seed, "sets": 1, "min_sample": 0.1, "lead": 1}
    timed = {k: interleave(v, **options) for k, v in pairs(torch, module, example, device, args.seed).items()}
    ran = f"torch {torch.__version__} eager on {device} with {torch.get_num_threads()} threads"
    return timed, device.type, ran


def pairs(torch: Any, module: Any, example: Any, device: Any, seed: int) -> dict[str, dict[str, Callable[[int], Any]]]:
    """The variants of one model, for the forward pass and for the train step."""
    model, variables = esper_jax.from_torch(module, example)
    x = jnp.asarray(example.numpy())
    logits = jax.eval_shape(model.apply, variables, x).shape
    labels = jnp.asarray(np.random.default_rng(seed).integers(0, logits[-1], logits[:-1]))
    module, given = module.to(device), example.to(device)
    wanted = torch.from_numpy(np.array(labels)).long().to(device)
    apply = jax.jit(model.apply)
    still = model.clone(every_unit=False)

    def loss(params: Any, others: Any, x: Any, labels: Any) -> Any:
        mutable = list(others)
        out, changed = still.apply(
            {**others, "params": params}, x, train=True, mutable=mutable, rngs={"dropout": jax.random.key(0)}
        )
        return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean(), changed

    @functools.partial(jax.jit, donate_argnums=0)  # torch writes over its parameters too
    def train(variables: Any, x: Any, labels: Any) -> Any:
        others = {k: v for k, v in variables.items() if k != "params"}
        grads, changed = jax.grad(loss, has_aux=True)(variables["params"], others, x, labels)
        params = jax.tree.map(lambda p, g: p - RATE * g, variables["params"], grads)
        return {**others, **changed, "params": params}

    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    held = {"variables": jax.tree.map(jnp.array, variables)}

    def torch_forward(_: int) -> None:
        module.eval()
        with torch.no_grad():
            module(given)
        synchronise(torch, device)

    def torch_train(_: int) -> None:
        module.train()
        optimizer.zero_grad(set_to_none=True)
        out = module(given)
        torch.nn.functional.cross_entropy(out.flatten(0, -2), wanted.flatten()).backward()
        optimizer.step()
        synchronise(torch, device)

    def jax_train(_: int) -> Any:
        held["variables"] = train(held["variables"], x, labels)
        return held["variables"]

    return {
        "forward": {"torch": torch_forward, AGAIN: torch_forward, "jax": lambda _: apply(variables, x)},
        "train step": {"torch": torch_train, AGAIN: torch_train, "jax": jax_train},
    }


def synchronise(torch: Any, device: Any) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- the models ---


def mlp(torch: Any, scale: float, batch: int) -> tuple[Any, Any]:
    """784 to 10 over two hidden layers."""
    nn, width = torch.nn, int(512 * scale)
    layers = (nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return nn.Sequential(*layers), torch.randn(batch, 784)


def cnn(torch: Any, scale: float, batch: int) -> tuple[Any, Any]:
    """Plain convolutions with BatchNorm on 32 x 32 images."""
    nn, w = torch.nn, int(32 * scale)

    def block(a: int, b: int, stride: int) -> list[Any]:
        return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    layers = block(3, w, 1) + block(w, 2 * w, 2) + block(2 * w, 2 * w, 1) + block(2 * w, 4 * w, 2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10)), torch.randn(
        batch, 3, 32, 32
    )


def resnet(torch: Any, scale: float, batch: int) -> tuple[Any, Any]:
    """A small residual network."""
    nn, w = torch.nn, int(32 * scale)

    class Block(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self, a: int, b: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
            self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
            self.short = nn.Conv2d(a, b, 1, stride, bias=False)

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (y + self.short(x)).relu()

    layers = [nn.Conv2d(3, w, 3, 1, 1), Block(w, w, 1), Block(w, 2 * w, 2), Block(2 * w, 4 * w, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10)), torch.randn(
        batch, 3, 32, 32
    )


def depthwise(torch: Any, scale: float, batch: int) -> tuple[Any, Any]:
    """Depthwise separable convolutions."""
    nn, w = torch.nn, int(32 * scale)

    def block(a: int, b: int, stride: int) -> list[Any]:
        deep = [nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False), nn.BatchNorm2d(a), nn.ReLU6()]
        return [*deep, nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU6()]

    layers = [nn.Conv2d(3, w, 3, 1, 1), *block(w, 2 * w, 1), *block(2 * w, 4 * w, 2), *block(4 * w, 4 * w, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10)), torch.randn(
        batch, 3, 32, 32
    )


def encoder(torch: Any, scale: float, batch: int) -> tuple[Any, Any]:
    """nn.TransformerEncoder with its own attention layers."""
    nn, w = torch.nn, int(128 * scale)
    layer = nn.TransformerEncoderLayer(w, 4, 4 * w, 0.0, "gelu", batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(body, nn.Linear(w, 10)), torch.randn(batch, 64, w)


def transformer(torch: Any, scale: float, batch: int) -> tuple[Any, Any]:
    """A decoder as users write it: embeddings, fused projections, scaled_dot_product_attention."""
    nn, w = torch.nn, int(128 * scale)
    functional = nn.functional

    class Block(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(w), nn.LayerNorm(w)
            self.qkv, self.out = nn.Linear(w, 3 * w), nn.Linear(w, w)
            self.mlp = nn.Sequential(nn.Linear(w, 4 * w), nn.GELU(), nn.Linear(4 * w, w))

        def forward(self, x: Any) -> Any:
            q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
            a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(a.transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    class Decoder(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(96, w), nn.Parameter(torch.randn(64, w) * 0.02)
            self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(w, 96)

        def forward(self, ids: Any) -> Any:
            return self.head(self.blocks(self.tokens(ids) + self.places))

    return Decoder(), torch.randint(0, 96, (batch, 64))


MODELS: dict[str, Callable[[Any, float, int], tuple[Any, Any]]] = {
    "mlp": mlp,
    "transformer": transformer,
    "encoder": encoder,
    "cnn": cnn,
    "resnet": resnet,
    "depthwise": depthwise,
}


if __name__ == "__main__":
    main()
