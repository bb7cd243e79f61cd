"""Linen modules inside an nnx host (`nnx.bridge.ToNNX`): their sites, and their calls with seeds at their layers."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from . import linen
from .bank import Bank
from .sites import found_sites, join_path, split_path
from .spec import Site

Path = tuple[str, ...]
Layers = tuple[list[Site], list[tuple[str, str]]]


def lifted(host: Any) -> dict[Path, Any]:
    """The `nnx.bridge.ToNNX` modules of an nnx module by their paths."""
    found = nnx.iter_modules(host)
    return {tuple(map(str, path)): part for path, part in found if isinstance(part, nnx.bridge.ToNNX)}


def lifted_layers(host: Any, variables: Mapping[str, Any], example: Any, kwargs: Mapping[str, Any]) -> Layers:
    """The sites of all Linen modules inside an nnx module, and the layers that are none with the reason.

    They are known by shapes and names; exactly, where `example` is given (one input or a tuple of arguments): the host
    is traced on it once to see what each of them gets.
    """
    sites: list[Site] = []
    skipped: list[tuple[str, str]] = []
    modules = lifted(host)
    given = _arguments(host, modules, example, kwargs) if example is not None and modules else {}
    for path, module in modules.items():
        own = {name: _below(tree, path) for name, tree in variables.items()}
        own = {name: linen.unboxed(tree) for name, tree in own.items() if tree}
        if "params" not in own:
            continue
        if path in given:
            args, keywords = given[path]
            found, left = linen.traced_layers(module.to_nnx__module, own, args, keywords)
        else:
            found, left = found_sites(own["params"], own.get("batch_stats", {}))
        sites += [dataclasses.replace(site, path=_joined(path, site.path)) for site in found]
        skipped += [(_joined(path, name), why) for name, why in left]
    return sites, skipped


@contextlib.contextmanager
def lifted_calls(
    modules: Mapping[Path, Any], banks: Mapping[str, Bank], train: bool | None, collections: tuple[str, ...]
) -> Iterator[dict[str, Bank]]:
    """The Linen modules of an nnx module with banks at their layers, and told whether they train.

    Args:
      modules: as from `lifted`.
      banks: all banks of the host, by site.
      train: what their calls say that leave it open; with True the `collections` are mutable, and come back into the
        module. None changes nothing.
      collections: the host's, beside `params`.

    Yields:
      The banks that belong to none of them.
    """
    rest = dict(banks)
    classes = {path: type(module) for path, module in modules.items()}
    try:
        for path, module in modules.items():
            own = {}
            for site in [site for site in rest if split_path(site)[: len(path)] == path]:
                own["/".join(split_path(site)[len(path) :]) or "."] = rest.pop(site)
            if own or train is not None:
                module.__class__ = _seeded(type(module), path, _held(module), own, train, collections)
        yield rest
    finally:
        for path, module in modules.items():
            module.__class__ = classes[path]


def _seeded(
    cls: Any, path: Path, held: Any, banks: Mapping[str, Bank], train: bool | None, collections: tuple[str, ...]
) -> Any:
    """A class for one such module and one call. (A class of its own also keeps nnx's caches of traces apart.)"""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.to_nnx__module
        if banks and _held(self) != held:
            raise ValueError(
                f"{join_path(path)}: a {type(module).__name__} under nnx.scan or nnx.vmap cannot carry seeds, for they "
                "would not be divided as its variables are; lift it inside Linen (nn.scan), or use nnx layers"
            )
        if train is not None and kwargs.get("method") is None:
            taken = inspect.signature(type(module).__call__).bind_partial(module, *args).arguments
            said = linen.mode(module, train)
            kwargs = {**{name: value for name, value in said.items() if name not in taken}, **kwargs}
        if train and kwargs.get("mutable") is None:
            kwargs["mutable"] = list(collections)
        if not banks:
            return cls.__call__(self, *args, **kwargs)

        def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
            return linen.call(module.apply, variables, banks, *args, **kwargs)

        seeded = module.clone()
        object.__setattr__(seeded, "apply", apply)
        self.to_nnx__module = seeded
        try:
            return cls.__call__(self, *args, **kwargs)
        finally:
            self.to_nnx__module = module

    return with_call(cls, __call__)


def with_call(cls: Any, call: Any) -> Any:
    """A subclass that differs in its `__call__` alone, for an instance to have in the place of its class for a time."""
    return type(cls)(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _arguments(host: Any, modules: Mapping[Path, Any], example: Any, kwargs: Mapping[str, Any]) -> dict[Path, Any]:
    """What each Linen module is called with, as shapes, when the host is called on the example."""
    seen: dict[Path, Any] = {}
    inputs = example if isinstance(example, tuple) else (example,)

    def observed(cls: Any, path: Path) -> Any:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.setdefault(path, _as_given(self.to_nnx__module, args, kwargs))
            return cls.__call__(self, *args, **kwargs)

        return with_call(cls, __call__)

    def run(state: Any, args: Any) -> None:
        copy = nnx.merge(nnx.graphdef(host), state)
        copy.eval()
        parts = lifted(copy)
        for path, module in parts.items():
            module.__class__ = observed(type(module), path)
        with lifted_calls(parts, {}, False, ()):
            copy(*args, **kwargs)

    try:
        jax.eval_shape(run, nnx.state(host), inputs)
    except Exception as error:
        raise ValueError(
            f"{type(host).__name__} cannot be traced on example= ({linen.shapes_text(inputs)}): "
            f"{type(error).__name__}: {error}"
        ) from error
    return seen


def _as_given(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments without their values: leading arrays as shapes, all others by name, with zeros for arrays."""
    count = next((i for i, arg in enumerate(args) if not isinstance(arg, jax.Array)), len(args))
    names = list(inspect.signature(type(module).__call__).parameters)[1:]
    named = dict(zip(names[count:], args[count:], strict=False))
    named |= {name: value for name, value in kwargs.items() if name not in ("rngs", "mutable")}
    blank = jax.tree.map(lambda leaf: jnp.zeros_like(jax.typeof(leaf)) if isinstance(leaf, jax.Array) else leaf, named)
    return tuple(jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in args[:count]), blank


def _below(tree: Any, path: Path) -> Any:
    for part in path:
        tree = tree.get(part, {}) if isinstance(tree, Mapping) else {}
    return tree


def _held(module: Any) -> dict[Any, Any]:
    """The shapes of a module's variables."""
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {key: variable.get_value().shape for key, variable in state}


def _joined(path: Path, site: str) -> str:
    return join_path((*path, *split_path(site)))
