"""What a torch module is called with: its forward's signature, names of inputs, free axes. Imports torch."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from .graph import BridgeError


def forward_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The positional parameters of a module's forward."""
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY))


def signature_of(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> inspect.Signature:
    """Of the forward, with the names given for its `**kwargs` in their place: torch.export loses its way there."""
    signature = inspect.signature(module.forward)
    known = signature.parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [name for name in kwargs if name not in known or known[name].kind not in named]
    kept = [p for p in known.values() if p.kind is not p.VAR_KEYWORD]
    if not taken or len(kept) == len(known):
        return signature
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in taken]
    return signature.replace(parameters=[*kept, *more])


@contextlib.contextmanager
def called_as(module: torch.nn.Module, signature: inspect.Signature) -> Iterator[None]:
    """Meanwhile the module's forward shows this signature."""
    forward = module.forward
    if signature == inspect.signature(forward):
        yield
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = module.__dict__.get("forward")
    named.__signature__ = signature  # type: ignore[attr-defined]
    module.forward = named
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def two_examples(tree: Any) -> Any:
    """Inputs with a batch of 1 repeated: torch would take a dimension of 1 for a constant."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if not tensors or tensors[0].shape[0] != 1:
        return tree

    def twice(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == 1:
            return torch.cat([leaf, leaf])
        return leaf

    return pytree.tree_map(twice, tree)


def free_axes(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The axes of the example that may have any size, as torch.export takes them: the batch of each tensor."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    batch = tensors[0].shape[0] if tensors else None

    def of(leaf: Any) -> Any:
        free = isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == batch
        return {0: Dim.AUTO} if free else None

    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise BridgeError(f"{name}.forward does not take these example inputs: {error}") from error
    return {key: pytree.tree_map(of, value) for key, value in bound.items()}


def leaf_names(spec: Any, signature: inspect.Signature) -> list[str]:
    """What each leaf of the inputs is called, as torch's guards write it: `x`, `batch['ids']`, `xs[0]`."""
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    found: dict[int, str] = {}

    def walk(tree: Any, where: str) -> None:
        if isinstance(tree, int):
            found[tree] = where
        elif isinstance(tree, Mapping):
            for key, value in tree.items():
                walk(value, f"{where}[{key!r}]")
        else:
            for i, value in enumerate(tree):
                walk(value, f"{where}[{i}]")

    for key, value in signature.bind(*args, **kwargs).arguments.items():
        walk(value, key)
    return [found[i] for i in range(spec.num_leaves)]
