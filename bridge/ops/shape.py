"""Operators that give arrays another shape or order."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..graph import BridgeError
from .registry import Last, axes_of, op


@op("view.default", "reshape.default", "_unsafe_view.default", "view_copy.default", "_reshape_alias.default")
def view(self: Any, size: Any, *strides: Any) -> Any:
    return jnp.reshape(self, tuple(size))


@op("view_as.default", "reshape_as.default")
def view_as(self: Any, other: Any) -> Any:
    return jnp.reshape(self, other.shape)


@op("expand.default", "expand_copy.default")
def expand(self: Any, size: Any, implicit: bool = False) -> Any:
    lead = len(size) - self.ndim
    return jnp.broadcast_to(self, tuple(self.shape[i - lead] if n == -1 else n for i, n in enumerate(size)))


@op("expand_as.default")
def expand_as(self: Any, other: Any) -> Any:
    return jnp.broadcast_to(self, other.shape)


@op("broadcast_tensors.default")
def broadcast_tensors(tensors: Any) -> Any:
    return tuple(jnp.broadcast_arrays(*tensors))


@op("broadcast_to.default")
def broadcast_to(self: Any, size: Any) -> Any:
    return expand(self, size)


@op("permute.default", "permute_copy.default")
def permute(self: Any, dims: Any) -> Any:
    return jnp.transpose(self, axes_of(dims, self.ndim))


@op("transpose.int", "transpose_copy.int", "swapaxes.default", "swapdims.default")
def transpose(self: Any, dim0: int, dim1: int) -> Any:
    return jnp.swapaxes(self, dim0, dim1) if self.ndim else self


@op("t.default", "numpy_T.default", "t_copy.default")
def t(self: Any) -> Any:
    return jnp.transpose(self)


@op("mT.default", "adjoint.default")
def m_t(self: Any) -> Any:
    return jnp.swapaxes(self, -1, -2)


@op("movedim.intlist", "movedim.int", "moveaxis.intlist", "moveaxis.int")
def movedim(self: Any, source: Any, destination: Any) -> Any:
    return jnp.moveaxis(self, source, destination)


@op("unsqueeze.default", "unsqueeze_copy.default")
def unsqueeze(self: Any, dim: int) -> Any:
    return jnp.expand_dims(self, dim)


@op("squeeze.default", "squeeze.dim", "squeeze.dims", "squeeze_copy.dims")
def squeeze(self: Any, dim: Any = None) -> Any:
    axes = axes_of(dim, self.ndim) if dim != () else ()
    return jnp.squeeze(self, tuple(a for a in axes if self.shape[a] == 1))


@op("flatten.using_ints")
def flatten(self: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not self.ndim:
        return self.reshape(1)
    a, b = start_dim % self.ndim, end_dim % self.ndim
    return self.reshape(*self.shape[:a], math.prod(self.shape[a : b + 1]), *self.shape[b + 1 :])


@op("unflatten.int")
def unflatten(self: Any, dim: int, sizes: Any) -> Any:
    a = dim % self.ndim
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes = tuple(self.shape[a] // known if n == -1 else n for n in sizes)
    return self.reshape(*self.shape[:a], *sizes, *self.shape[a + 1 :])


@op("cat.default", "concat.default", channels=True)
def cat(tensors: Any, dim: int = 0, last: bool = False) -> Any:
    full = [x for x in tensors if x.shape != (0,)] or list(tensors)  # torch lets empty vectors pass
    dtype = full[0].dtype
    for x in full[1:]:
        dtype = jnp.promote_types(dtype, x.dtype)
    axis = dim % full[0].ndim
    if last:
        axis = axis if axis == 0 else full[0].ndim - 1 if axis == 1 else axis - 1
    result = jnp.concatenate([x.astype(dtype) for x in full], axis=axis)
    return Last(result) if last else result


@op("stack.default")
def stack(tensors: Any, dim: int = 0) -> Any:
    return jnp.stack(tensors, axis=dim)


@op("hstack.default")
def hstack(tensors: Any) -> Any:
    return jnp.hstack(tensors)


@op("vstack.default")
def vstack(tensors: Any) -> Any:
    return jnp.vstack(tensors)


def _pieces(x: Any, dim: int, sizes: Any) -> tuple[Any, ...]:
    return tuple(lax.split(x, tuple(sizes), dim % x.ndim))


@op("split.Tensor", "split_copy.Tensor")
def split(self: Any, split_size: int, dim: int = 0) -> Any:
    length = self.shape[dim]
    sizes = [min(split_size, length - start) for start in range(0, length, split_size)] or [0]
    return _pieces(self, dim, sizes)


@op("split.sizes", "split_with_sizes.default", "split_with_sizes_copy.default")
def split_with_sizes(self: Any, split_sizes: Any, dim: int = 0) -> Any:
    return _pieces(self, dim, split_sizes)


@op("chunk.default")
def chunk(self: Any, chunks: int, dim: int = 0) -> Any:
    return split(self, -(-self.shape[dim] // chunks), dim)


@op("tensor_split.sections")
def tensor_split(self: Any, sections: int, dim: int = 0) -> Any:
    each, more = divmod(self.shape[dim], sections)
    return _pieces(self, dim, [each + (i < more) for i in range(sections)])


@op("unbind.int", "unbind_copy.int")
def unbind(self: Any, dim: int = 0) -> Any:
    return tuple(jnp.take(self, i, axis=dim) for i in range(self.shape[dim]))


@op("repeat.default")
def repeat(self: Any, repeats: Any) -> Any:
    return jnp.tile(self, tuple(repeats))


@op("tile.default")
def tile(self: Any, dims: Any) -> Any:
    return jnp.tile(self, tuple(dims))


@op("repeat_interleave.self_int")
def repeat_interleave(self: Any, repeats: int, dim: Any = None, output_size: Any = None) -> Any:
    return jnp.repeat(self, repeats, axis=dim)


@op("flip.default")
def flip(self: Any, dims: Any) -> Any:
    return jnp.flip(self, axes_of(dims, self.ndim))


@op("roll.default")
def roll(self: Any, shifts: Any, dims: Any = ()) -> Any:
    if dims == ():
        return jnp.roll(self, shifts[0] if isinstance(shifts, tuple) else shifts)
    return jnp.roll(self, shifts, axis=dims)


@op("rot90.default")
def rot90(self: Any, k: int = 1, dims: Any = (0, 1)) -> Any:
    return jnp.rot90(self, k, dims)


@op("tril.default")
def tril(self: Any, diagonal: int = 0) -> Any:
    return jnp.tril(self, diagonal)


@op("triu.default")
def triu(self: Any, diagonal: int = 0) -> Any:
    return jnp.triu(self, diagonal)


@op("diagonal.default", "diagonal_copy.default")
def diagonal(self: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    return jnp.diagonal(self, offset, dim1, dim2)


@op("diag.default")
def diag(self: Any, diagonal: int = 0) -> Any:
    return jnp.diag(self, diagonal)


@op("diag_embed.default")
def diag_embed(self: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    side = self.shape[-1] + abs(offset)
    rows = jnp.arange(self.shape[-1]) + max(-offset, 0)
    columns = jnp.arange(self.shape[-1]) + max(offset, 0)
    result = jnp.zeros((*self.shape[:-1], side, side), self.dtype).at[..., rows, columns].set(self)
    return jnp.moveaxis(result, (-2, -1), (dim1, dim2))


@op("pixel_shuffle.default")
def pixel_shuffle(self: Any, upscale_factor: int) -> Any:
    r, (c, h, w) = upscale_factor, self.shape[-3:]
    lead, n = self.shape[:-3], self.ndim
    x = self.reshape(*lead, c // r**2, r, r, h, w)
    x = jnp.transpose(x, (*range(n - 3), n - 3, n, n - 2, n + 1, n - 1))
    return x.reshape(*lead, c // r**2, h * r, w * r)


@op("pixel_unshuffle.default")
def pixel_unshuffle(self: Any, downscale_factor: int) -> Any:
    r, (c, h, w) = downscale_factor, self.shape[-3:]
    lead, n = self.shape[:-3], self.ndim
    x = self.reshape(*lead, c, h // r, r, w // r, r)
    x = jnp.transpose(x, (*range(n - 3), n - 3, n - 1, n + 1, n - 2, n))
    return x.reshape(*lead, c * r**2, h // r, w // r)


@op("channel_shuffle.default", "native_channel_shuffle.default")
def channel_shuffle(self: Any, groups: int) -> Any:
    n, c, *rest = self.shape
    return jnp.swapaxes(self.reshape(n, groups, c // groups, *rest), 1, 2).reshape(self.shape)


@op("unfold.default")
def unfold(self: Any, dimension: int, size: int, step: int) -> Any:
    axis = dimension % self.ndim
    starts = jnp.arange(0, self.shape[axis] - size + 1, step)
    places = starts[:, None] + jnp.arange(size)
    taken = jnp.take(self, places.reshape(-1), axis=axis)
    taken = taken.reshape(*self.shape[:axis], *places.shape, *self.shape[axis + 1 :])
    return jnp.moveaxis(taken, axis + 1, -1)


@op("as_strided.default")
def as_strided(self: Any, size: Any, stride: Any, storage_offset: Any = None) -> Any:
    raise BridgeError(
        "as_strided reads memory as torch lays it out; JAX arrays have no strides: use view, unfold or expand"
    )


@op("meshgrid.default", "meshgrid.indexing")
def meshgrid(tensors: Any, indexing: str = "ij") -> Any:
    return tuple(jnp.meshgrid(*tensors, indexing=indexing))


@op("view_as_real.default")
def view_as_real(self: Any) -> Any:
    return jnp.stack([jnp.real(self), jnp.imag(self)], -1)


@op("view_as_complex.default")
def view_as_complex(self: Any) -> Any:
    return lax.complex(self[..., 0], self[..., 1])


@op("complex.default")
def complex_of(real: Any, imag: Any) -> Any:
    return lax.complex(real, imag)


@op("polar.default")
def polar(abs: Any, angle: Any) -> Any:
    return lax.complex(abs * jnp.cos(angle), abs * jnp.sin(angle))


@op("angle.default")
def angle(self: Any) -> Any:
    return jnp.angle(self)
