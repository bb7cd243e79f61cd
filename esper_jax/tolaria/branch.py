"""Changes that are made or not made, as one branch of a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import Array


def changed_if(ok: Array, change: Callable[..., Any], old: Any, *given: Any) -> Any:
    """`change(*old, *given)` if `ok`, else `old`.

    On the CPU a branch: a select beside the update makes XLA copy the whole optimizer state in each step. On other
    platforms a select: there a branch waits for the host.

    Args:
      ok: a boolean scalar.
      change: pure; gives what has the structure, shapes and dtypes of `old`.
      old: a tuple of pytrees, written over.
      given: pytrees that the change only reads, such as gradients. Scalars that follow from them alone by elementwise
        operations and sums, such as the norm by which an optimizer clips them, are computed outside the branch, where
        XLA finds that they are there already: it does not look into a branch for what is computed outside.

    Raises:
      TypeError: a change that gives another structure.
    """
    if jax.default_backend() != "cpu":
        return jax.tree.map(lambda new, old: jnp.where(ok, new, old), change(*old, *given), old)
    olds, structure = jax.tree.flatten(old)
    givens, rest = jax.tree.flatten(given)

    def flat(*leaves: Any) -> list[Any]:
        before = jax.tree.unflatten(structure, leaves[: len(olds)])
        new, found = jax.tree.flatten(change(*before, *jax.tree.unflatten(rest, leaves[len(olds) :])))
        if found != structure:
            raise TypeError(f"a change must give the structure of what it changes, {structure}, got {found}")
        return new

    closed = jax.make_jaxpr(flat)(*olds, *givens)
    inputs, outputs = closed.jaxpr.invars, closed.jaxpr.outvars
    scalars = _scalars(closed.jaxpr, inputs[len(olds) :])
    found = _function(closed, inputs[len(olds) :], scalars)(*givens)
    changed = _function(closed, [*inputs, *scalars], outputs)
    new = jax.lax.cond(ok, lambda old, *more: changed(*old, *more), lambda old, *_: old, olds, *givens, *found)
    return jax.tree.unflatten(structure, new)


def _scalars(jaxpr: Jaxpr, given: Sequence[Var]) -> list[Var]:
    """The scalars that arrays are computed with and that follow from `given` alone, by what costs little."""
    known, follow, found = {*jaxpr.constvars, *given}, set(given), []
    for equation in jaxpr.eqns:
        inputs = _variables(equation.invars)
        if not _is_cheap(equation) or not inputs <= known:
            continue
        known.update(equation.outvars)
        if inputs & follow:
            follow.update(equation.outvars)
            found += [var for var in equation.outvars if _is_scalar(var)]
    larger = [equation for equation in jaxpr.eqns if not all(map(_is_scalar, equation.outvars))]
    read = {var for equation in larger for var in _variables(equation.invars)}
    return [var for var in found if var in read]


_CHEAP = {
    "abs", "add", "clamp", "div", "imag", "integer_pow", "max", "min", "mul", "neg", "pow", "real", "rsqrt", "sign",
    "sqrt", "square", "sub", "and", "eq", "ge", "gt", "is_finite", "le", "lt", "ne", "not", "or", "select_n",
    "broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "reduce_max", "reduce_min", "reduce_sum",
}  # fmt: skip


def _is_cheap(equation: JaxprEqn) -> bool:
    """Whether nothing is lost where a bad batch computes it, or a branch computes it once more."""
    name = equation.primitive.name
    return name in _CHEAP or (name == "dot_general" and _is_scalar(equation.outvars[0]))


def _is_scalar(var: Var) -> bool:
    return getattr(var.aval, "shape", None) == ()


def _variables(atoms: Sequence[Any]) -> set[Var]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def _function(closed: ClosedJaxpr, inputs: Sequence[Var], outputs: Sequence[Any]) -> Callable[..., list[Any]]:
    """The part of a jaxpr that leads from inputs, which may be its intermediate values, to outputs, as a function."""
    jaxpr, there = closed.jaxpr, set(inputs)
    needed, equations = _variables(outputs) - there, []
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars) or (equation.effects and outputs is jaxpr.outvars):
            equations.append(equation)
            needed |= _variables(equation.invars) - there
    unnamed = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    part = jaxpr.replace(invars=list(inputs), eqns=equations[::-1], outvars=list(outputs), debug_info=unnamed)
    return jaxpr_as_fun(ClosedJaxpr(part, closed.consts))  # type: ignore[no-any-return]
