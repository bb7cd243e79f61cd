"""A seed's forward pass as StableHLO: written with its gradient, run without the blueprint's source.

One module is written for each rank of the input, with every size but the features left open. Running one knows nothing
of the blueprint: parameters and input go in, the seed's output comes out, and gradients through it are the stored ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from ..kasmina.blueprints import Blueprint, register_blueprint
from ..kasmina.spec import Site, freeze_config
from .errors import UrzaError, needed
from .record import StoredSeed

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SIZES = ("b", "s", "t", "v", "w")


def own_params(seed: StoredSeed) -> Any:
    """The blueprint's own parameters: a "gate" blend keeps its gate beside them."""
    return seed.params["seed"] if seed.blend == "gate" else seed.params


def features(site: Site, reads: str) -> int:
    """The width of what a seed reads."""
    return site.in_features if reads == "input" else site.out_features


def ranks(site: Site) -> tuple[int, ...]:
    """The ranks of inputs that a seed at such a site can meet: batch and space at a convolution, else 2 to 4."""
    return (site.spatial + 2,) if site.spatial else (2, 3, 4)


def export_forward(blueprint: Blueprint, seed: StoredSeed) -> dict[int, bytes]:
    """The seed's forward pass and its gradient as serialised StableHLO modules, by the rank of the input.

    Raises:
      ValueError: the blueprint cannot be traced with open sizes; it names the rank and the reason.
    """
    needed("flatbuffers")
    leaves, tree = jax.tree.flatten(own_params(seed))
    config, site = dict(seed.config), seed.site

    def forward(leaves: list[Any], u: Any) -> Any:
        return blueprint.apply(jax.tree.unflatten(tree, leaves), u, site=site, **config)

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    found: dict[int, bytes] = {}
    for rank in ranks(site):
        sizes = export.symbolic_shape(f"{', '.join(SIZES[: rank - 1])}, {features(site, seed.reads)}")
        u = jax.ShapeDtypeStruct(sizes, jnp.dtype(site.dtype))
        try:
            made = export.export(jax.jit(forward), platforms=PLATFORMS)(shapes, u)
            found[rank] = bytes(made.serialize(vjp_order=1))
        except Exception as error:  # whatever the user's blueprint raises while it is traced
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the forward pass of {seed.blueprint!r} cannot be stored for an input of rank {rank} with open sizes "
                f"({type(error).__name__}: {reason}); put() without program= stores the seed without it"
            ) from error
    return found


class StoredForward:
    """A stored forward pass as a blueprint's `apply(params, u)`; it runs under jit, grad, vmap, scan and cond."""

    def __init__(self, seed: StoredSeed) -> None:
        needed("flatbuffers")
        self.blueprint, self.programs, self.id, self.site = seed.blueprint, dict(seed.programs), seed.id, seed.site
        self._runs: dict[int, Any] = {}

    def __call__(self, params: Any, u: Any, **_: Any) -> Any:
        """The seed's output for `u`, whose rank must be one of those that were stored.

        Raises:
          ValueError: another rank, other features, or a module that this JAX cannot read.
        """
        rank = jnp.ndim(u)
        if rank not in self.programs:
            have = ", ".join(map(str, sorted(self.programs)))
            raise ValueError(f"stored seed {self.id[:12]} runs inputs of rank {have}, got shape {jnp.shape(u)}")
        if rank not in self._runs:
            self._runs[rank] = _differentiable(self.programs[rank], self.id)
        return self._runs[rank](jax.tree.leaves(params), u)


def _differentiable(data: bytes, seed_id: str) -> Any:
    """`run(leaves, u)` with a gradient; both may be mapped, one member at a time, since exported calls cannot be."""
    try:
        forward = export.deserialize(bytearray(data))
        backward = forward.vjp()
    except Exception as error:  # flatbuffers and MLIR raise what they like
        raise ValueError(
            f"stored seed {seed_id[:12]}: JAX {jax.__version__} cannot read its program ({type(error).__name__}: "
            f"{error}); use a version nearer to the one it was stored with"
        ) from error
    one_at_a_time = jax.custom_batching.sequential_vmap
    call = one_at_a_time(lambda leaves, u: forward.call(leaves, u))
    pull = one_at_a_time(lambda leaves, u, cotangent: backward.call(*leaves, u, cotangent))

    @jax.custom_vjp
    def run(leaves: list[Any], u: Any) -> Any:
        return call(leaves, u)

    def run_fwd(leaves: list[Any], u: Any) -> tuple[Any, Any]:
        return call(leaves, u), (leaves, u)

    def run_bwd(residuals: Any, cotangent: Any) -> Any:
        *to_leaves, to_u = pull(*residuals, cotangent)
        return list(to_leaves), to_u

    run.defvjp(run_fwd, run_bwd)
    return run


def register_program(seed: StoredSeed) -> str:
    """Register the seed's stored forward pass as a blueprint of its own, and the name: `blueprint@id`.

    Its fresh parameters are the stored ones. It fits only sites in the shape of the one that it was stored from.
    """
    name = f"{seed.blueprint}@{seed.id[:12]}"
    frozen, params = freeze_config(seed.config), own_params(seed)

    def init(key: Any, site: Site, **config: Any) -> Any:
        if freeze_config(config) != frozen:
            raise ValueError(f"its program is that of the config {dict(frozen)}, got {config}")
        if signature(site) != signature(seed.site):
            raise ValueError(f"its program needs {_shape(seed.site)}, the site is {_shape(site)}")
        return jax.tree.map(jnp.asarray, params)

    register_blueprint(
        name,
        init=init,
        apply=StoredForward(seed),
        reads=seed.reads,
        kinds=(seed.site.kind,),
        config=dict(seed.config),
        about=f"the stored program of seed {seed.id[:12]}",
        replace=True,
    )
    return name


def signature(site: Site) -> tuple[Any, ...]:
    """What of a site a stored program depends on."""
    return site.kind, site.in_shape, site.out_shape, site.dtype, site.spatial


def pack_programs(programs: Mapping[int, bytes]) -> dict[str, Any]:
    """The modules as named arrays of bytes, to be written like parameters."""
    return {f"rank_{rank}": np.frombuffer(data, np.uint8) for rank, data in programs.items()}


def unpack_programs(arrays: Mapping[str, Any]) -> dict[int, bytes]:
    """The modules by rank again; UrzaError for another name."""
    try:
        return {int(name.removeprefix("rank_")): array.tobytes() for name, array in arrays.items()}
    except ValueError as error:
        raise UrzaError(f"a file of programs holds {sorted(arrays)}, expected rank_2 and so on") from error


def _shape(site: Site) -> str:
    shapes = " -> ".join(str(list(shape)) for shape in (site.in_shape, site.out_shape))
    return f"{site.kind} {shapes} {site.dtype}" + (f" in {site.spatial} dimensions" if site.spatial else "")


def stored_forward(apply: Any) -> StoredForward | None:
    """The stored forward pass behind a blueprint's `apply`, or None where it comes from source."""
    return apply if isinstance(apply, StoredForward) else None
