"""Whether an imported model computes what torch computes: forward, gradients, buffers. Imports torch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import _pytree as pytree

from .capture import copy_of, modes_kept, plain_attention
from .convert import numpy_of, to_state
from .graph import BridgeError, Graph, flatten, nest
from .module import Imported
from .ops.random import NOISE
from .plan import plan_of
from .torch_random import EveryUnit

GRADIENTS = "training: gradients"
LIMITS = {"float32": (1e-4, 1e-3), "float64": (1e-4, 1e-3), "bfloat16": (5e-2, 2e-1), "float16": (1e-2, 1e-1)}
FLOORS = {"float32": 1e-2, "float64": 1e-2, "bfloat16": 5e-2, "float16": 2e-2}
"""A gradient smaller than this share of the largest of all is compared as one of that size: it may be all rounding."""
ROUNDED = 5e-2
"""The most that gradients may differ where torch's own do from float64's (as through batch statistics of two rows)."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: the largest relative error of `what` with a batch."""

    what: str
    batch: int
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it is within its limit (a NaN is not)."""
        return self.error <= self.limit


@dataclasses.dataclass(frozen=True)
class Report:
    """What `from_torch` compared and found; print it.

    Attributes:
      name: the torch class.
      checks: largest relative errors; of a gradient relative to its largest value, at least a hundredth of the
        largest of all (in bfloat16 a twentieth, in float16 a fiftieth). In 16 bits gradients are compared by the root
        mean squares of what is not 0 in them.
      layers: how many layers can be sites.
      bare: `(torch module, why it is no site)`.
      frozen: the parameters with `requires_grad=False`, which JAX differentiates all the same (`Imported.frozen`).
      noise: the operators that draw other random numbers than dropout's; both sides were compared with the same ones.
    """

    name: str
    checks: tuple[Check, ...]
    layers: int
    bare: tuple[tuple[str, str], ...]
    frozen: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all comparisons are within their limits (see `failed`)."""
        return not self.failed()

    def failed(self) -> list[Check]:
        """The comparisons that are not.

        Gradients fail where they do so at every batch: a value within rounding of a kink (a ReLU's 0) may take the
        other side at one of them, and with it a gradient, where an operation that is wrong is wrong at all.
        """
        gradients = [check for check in self.checks if check.what == GRADIENTS]
        kink = any(check.passed for check in gradients)
        return [check for check in self.checks if not check.passed and not (kink and check.what == GRADIENTS)]

    def worst(self, what: str) -> float:
        """The largest error of all checks whose name begins with `what`; 0 if there are none."""
        return max((check.error for check in self.checks if check.what.startswith(what)), default=0.0)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.layers} layers are Flax layers, which morph() makes sites"]
        if self.checks:
            width = max(len(check.what) for check in self.checks)
            lines.append(f"  {'compared with torch':<{width}}  batch  relative error   limit")
            for check in self.checks:
                mark = "" if check.passed else "  TOO LARGE"
                lines.append(f"  {check.what:<{width}}  {check.batch:5d}  {check.error:14.1e} {check.limit:7.0e}{mark}")
        else:
            lines.append("  not compared with torch (verify=False)")
        lines += [f"  no site: {path} ({reason})" for path, reason in self.bare]
        if self.frozen:
            first = f"{', '.join(self.frozen[:3])}{', ...' if len(self.frozen) > 3 else ''}"
            lines.append(f"  frozen in torch: {len(self.frozen)} parameters ({first}); see model.frozen(params)")
        if self.noise:
            both = "; torch and JAX were given the same" if self.checks else ""
            lines.append(f"  draws random numbers: {', '.join(self.noise)}{both}")
        return "\n".join(lines)


def verify(
    model: Imported,
    variables: Mapping[str, Any],
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Report:
    """Compare with torch on the example and on a batch two larger; nothing is raised for what differs."""
    with modes_kept(module), _gradients_kept(module), plain_attention():
        return _verified(model, variables, copy_of(module), args, kwargs)


@contextlib.contextmanager
def _gradients_kept(module: torch.nn.Module) -> Iterator[None]:
    """Meanwhile gradients may be computed anew (in the user's own module, where it cannot be copied)."""
    held = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, grad in held:
            parameter.grad = grad


def _verified(
    model: Imported,
    variables: Mapping[str, Any],
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Report:
    graph, still = model.graph, model.clone(every_unit=True)
    dtype = next((t.dtype for t in graph.tensors if t.dtype in LIMITS), "float32")
    forward_limit = LIMITS[dtype][0]
    checks: list[Check] = []
    for given_args, given_kwargs, batch in _batches(graph, args, dict(kwargs)):
        arrays = _arrays(graph, given_args, given_kwargs)
        module.eval()
        before = _state(module)
        try:
            with torch.no_grad(), EveryUnit():
                wanted = pytree.tree_leaves(module(*_cloned(given_args), **_cloned(given_kwargs)))
        except Exception:
            if not checks:
                raise
            continue  # torch itself takes no other size: the first axis is no batch
        _restore(module, before)
        found = _jit(lambda v, a, k: still.apply(v, *a, **k))(variables, *arrays)
        for name, want, got in _pairs(graph, wanted, found):
            checks.append(Check(f"forward: {name}", batch, _error(got, want), forward_limit))
        if graph.train is not None:
            checks += _step(model, variables, module, given_args, given_kwargs, arrays, batch, dtype)
    return report_of(graph, checks)


def report_of(graph: Graph, checks: Sequence[Check] = ()) -> Report:
    """What is known of a graph, with what was compared."""
    plan, frozen = plan_of(graph), tuple(tensor.name for tensor in graph.tensors if tensor.frozen)
    noise = {node.op for program in graph.programs() for node in program.nodes if "number" in dict(node.kwargs)}
    return Report(graph.name, tuple(checks), len(plan.layers), plan.bare, frozen, tuple(sorted(noise & NOISE)))


def _jit(function: Callable[..., Any]) -> Any:
    """Compiled quickly rather than well: what is run twice is not worth the compiler's time."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=quick)


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in [*module.named_parameters(), *module.named_buffers()]}


def _restore(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            value.copy_(state[name])


def _batches(graph: Graph, args: Any, kwargs: Any) -> list[tuple[Any, Any, int]]:
    """The example, and one with two more rows where the batch is free."""
    program = graph.evaluate
    leaves = flatten(graph.takes, (tuple(args), dict(kwargs)))
    first = next((leaves[i][1] for i, spec in enumerate(program.inputs) if spec.dims), None)
    if first is None:
        return [(args, kwargs, 0)]
    size = first.shape[0]
    free = {
        i
        for i, s in enumerate(program.inputs)
        if s.dims and isinstance(s.dims[0], str) and leaves[i][1].shape[0] == size
    }
    found = [(args, kwargs, size)]
    if free:
        more = torch.arange(size + 2) % size
        changed = [leaves[i][1][more] if i in free else leaves[i][1] for i in range(len(leaves))]
        a, k = nest(graph.takes, changed)
        found.append((a, k, size + 2))
    return found


def _arrays(graph: Graph, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs for JAX: positional ones as they are, constants left out (the model knows them)."""

    def array(leaf: Any) -> Any:
        return jnp.asarray(numpy_of(leaf)) if isinstance(leaf, torch.Tensor) else leaf

    named = {**dict(zip(graph.names, args, strict=False)), **kwargs}
    if len(args) > len(graph.names):
        return pytree.tree_map(array, tuple(args)), {}
    kept = {k: v for k, v in named.items() if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(v))}
    return (), pytree.tree_map(array, kept)


def _cloned(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _pairs(graph: Graph, wanted: list[Any], found: Any) -> list[tuple[str, Any, Any]]:
    leaves = flatten(graph.evaluate.structure, found)
    named = [leaves[i] for i in sorted(leaves)]
    named = [(name, value) for name, value in named if value is not None]
    tensors = [value for value in wanted if value is not None]
    return [
        (name, numpy_of(want), np.asarray(got))
        for (name, got), want in zip(named, tensors, strict=True)
        if isinstance(want, torch.Tensor)
    ]


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0.0))


def _rms(x: np.ndarray) -> float:
    """Over the entries that are not 0: most rows of an embedding have no gradient."""
    return float(np.sqrt(np.mean(np.square(np.abs(x[x != 0]))))) if np.any(x) else 0.0


def _error(got: Any, want: Any, floor: float = 0.0, size: Callable[[np.ndarray], float] = _largest) -> float:
    """Size of the difference over that of the wanted values; infinite where shapes or non-finite places differ."""
    got, want = (np.asarray(x) for x in (got, want))
    if got.shape != want.shape:
        return float("inf")
    if not want.size:
        return 0.0
    wide = np.complex128 if np.iscomplexobj(want) else np.float64
    got, want = got.astype(wide), want.astype(wide)
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)) or not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return float("inf")
    scale, difference = max(size(want[finite]), floor), size(got[finite] - want[finite])
    return difference / scale if scale else difference


def _weights(shape: tuple[int, ...], at: int) -> np.ndarray:
    """Fixed random cotangents, so that no gradient cancels by symmetry."""
    return np.random.default_rng(at).uniform(0.5, 1.5, shape).astype(np.float32)


def torch_step(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[float, float, dict[str, np.ndarray]]:
    """A weighted sum of all outputs in training mode, that of its terms without sign, and gradients; buffers change."""
    module.train()
    module.zero_grad()
    with EveryUnit():
        outputs = pytree.tree_leaves(module(*_cloned(args), **_cloned(kwargs)))
        loss, size = torch.zeros((), dtype=torch.float32), 0.0
        outputs = [o for o in outputs if o is not None]
        for at, output in enumerate(outputs):
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.requires_grad:
                weights = torch.from_numpy(_weights(tuple(output.shape), at))
                finite = torch.where(output.isfinite(), output, torch.zeros_like(output))  # masked logits may be -inf
                terms = finite.float() * weights / output.numel()
                strange = int((~output.isfinite()).sum())
                loss, size = loss + terms.sum() + strange, size + float(terms.detach().abs().sum()) + strange
        if loss.requires_grad:
            loss.backward()
    grads = {
        name: numpy_of(p.grad) if p.grad is not None else np.zeros(tuple(p.shape), np.float32)
        for name, p in module.named_parameters()
    }
    return float(loss.detach()), size, grads


def jax_loss(model: Imported, differentiable: Callable[[int], bool]) -> Callable[..., Any]:
    """The same loss in JAX: `(params, others, args, kwargs) -> (loss, others after)`."""
    still, program = model.clone(every_unit=True), model.graph.train
    assert program is not None, "captured in training mode"

    def loss(params: Any, others: Any, args: Any, kwargs: Any) -> Any:
        mutable = [name for name in ("batch_stats", "buffers") if name in others]
        output, changed = still.apply({**others, "params": params}, *args, train=True, mutable=mutable, **kwargs)
        leaves = flatten(program.structure, output)
        values = [leaves[i][1] for i in sorted(leaves)]
        values = [v for v in values if v is not None]
        total = jnp.zeros((), jnp.float32)
        for at, value in enumerate(values):
            if jnp.issubdtype(jnp.asarray(value).dtype, jnp.floating) and differentiable(at):
                finite = jnp.where(jnp.isfinite(value), value, 0).astype(jnp.float32)
                total += (finite * _weights(value.shape, at)).sum() / value.size + jnp.sum(~jnp.isfinite(value))
        return total, {**others, **changed}

    return loss


def differentiable_outputs(module: torch.nn.Module, args: Any, kwargs: Any) -> Callable[[int], bool]:
    """Which of torch's outputs carry a gradient."""
    before = _state(module)
    module.train()
    with EveryUnit():
        outputs = [o for o in pytree.tree_leaves(module(*_cloned(args), **_cloned(kwargs))) if o is not None]
    _restore(module, before)
    flags = [isinstance(o, torch.Tensor) and o.requires_grad for o in outputs]
    return lambda at: flags[at]


def _step(
    model: Imported,
    variables: Mapping[str, Any],
    module: torch.nn.Module,
    args: Any,
    kwargs: Any,
    arrays: Any,
    batch: int,
    dtype: str,
) -> list[Check]:
    forward_limit, gradient_limit = LIMITS[dtype]
    before = _state(module)
    carries = differentiable_outputs(module, args, kwargs)
    loss, size, grads = torch_step(module, args, kwargs)
    after = {name: numpy_of(value) for name, value in module.named_buffers()}
    module.zero_grad()
    _restore(module, before)
    others = {name: value for name, value in variables.items() if name != "params"}
    compute = _jit(jax.value_and_grad(jax_loss(model, carries), has_aux=True))
    (got_loss, changed), got = compute(variables["params"], others, *arrays)
    found = to_state(model.graph, {**others, **changed, "params": got})
    frozen = report_of(model.graph).frozen
    grads = {name: grad for name, grad in grads.items() if name not in frozen}  # torch gives them none
    # in 16 bits some value is always within rounding of a kink, and single entries take the other side
    size_of = _rms if dtype in ("bfloat16", "float16") else _largest
    floor = FLOORS[dtype] * max((size_of(grad.astype(np.float64)) for grad in grads.values()), default=0.0)
    error = max((_error(found[n], g, floor, size_of) for n, g in grads.items() if n in found), default=0.0)
    if error > gradient_limit:
        own = _rounding(module, args, kwargs, grads, floor, size_of)
        gradient_limit = max(gradient_limit, min(4 * own, ROUNDED))
    buffers = max((_error(found[n], v) for n, v in after.items() if n in found), default=0.0)
    return [
        Check("training: loss", batch, abs(float(got_loss) - loss) / (size or 1.0), forward_limit),
        Check(GRADIENTS, batch, error, gradient_limit),
        Check("training: buffers after a step", batch, buffers, forward_limit),
    ]


def _rounding(
    module: torch.nn.Module,
    args: Any,
    kwargs: Any,
    grads: Mapping[str, np.ndarray],
    floor: float,
    size: Callable[[np.ndarray], float],
) -> float:
    """How far torch's own gradients are from those it computes in float64; 0 where it computes none."""
    wider = lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf  # noqa: E731
    wide = copy_of(module)
    if wide is module:
        return 0.0
    try:
        _, _, exact = torch_step(wide.double(), pytree.tree_map(wider, args), pytree.tree_map(wider, kwargs))
    except Exception:  # an operation or a buffer that is float32 alone
        return 0.0
    return max((_error(grad, exact[name], floor, size) for name, grad in grads.items()), default=0.0)


def refuse(report: Report) -> None:
    """Raise for a report that failed, naming what differs most."""
    if failed := report.failed():
        worst = max(failed, key=lambda check: check.error / check.limit if np.isfinite(check.error) else np.inf)
        raise BridgeError(
            f"{report.name} does not compute what torch computes: {worst.what} differs by {worst.error:.1e} (relative, "
            f"batch {worst.batch}; at most {worst.limit:.0e}). verify=False takes it as it is, to find the operation:\n"
            f"{report}"
        )


__all__ = ["Check", "EveryUnit", "Report", "jax_loss", "refuse", "torch_step", "verify"]
