"""Fourier transforms."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from .registry import axes_of, op


def _one(name: str, fn: Any) -> None:
    def transform(self: Any, n: Any = None, dim: int = -1, norm: Any = None) -> Any:
        return fn(self, n, dim, norm)

    op(f"fft_{name}.default")(transform)


def _many(name: str, fn: Any, dims: Any) -> None:
    def transform(self: Any, s: Any = None, dim: Any = dims, norm: Any = None) -> Any:
        return fn(self, s, dim, norm)

    op(f"fft_{name}.default")(transform)


for _name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    _one(_name, getattr(jnp.fft, _name))
for _name in ("fft2", "ifft2", "rfft2", "irfft2"):
    _many(_name, getattr(jnp.fft, _name), (-2, -1))
for _name in ("fftn", "ifftn", "rfftn", "irfftn"):
    _many(_name, getattr(jnp.fft, _name), None)

_NORMS = ("backward", "ortho", "forward")


@op("_fft_r2c.default")
def real_to_complex(self: Any, dim: Any, normalization: int, onesided: bool) -> Any:
    transform = jnp.fft.rfftn if onesided else jnp.fft.fftn
    return transform(self, axes=dim, norm=_NORMS[normalization])


@op("_fft_c2c.default")
def complex_to_complex(self: Any, dim: Any, normalization: int, forward: bool) -> Any:
    # torch numbers: 0 none, 1 by sqrt(n), 2 by n
    norm = ("backward" if forward else "forward", "ortho", "forward" if forward else "backward")[normalization]
    return (jnp.fft.fftn if forward else jnp.fft.ifftn)(self, axes=dim, norm=norm)


@op("_fft_c2r.default")
def complex_to_real(self: Any, dim: Any, normalization: int, last_dim_size: int) -> Any:
    sizes = [self.shape[d] for d in dim[:-1]] + [last_dim_size]
    return jnp.fft.irfftn(self, s=sizes, axes=dim, norm=("forward", "ortho", "backward")[normalization])


@op("fft_fftshift.default")
def fftshift(self: Any, dim: Any = None) -> Any:
    return jnp.fft.fftshift(self, axes_of(dim, self.ndim))


@op("fft_ifftshift.default")
def ifftshift(self: Any, dim: Any = None) -> Any:
    return jnp.fft.ifftshift(self, axes_of(dim, self.ndim))


@op("fft_fftfreq.default")
def fftfreq(n: int, d: float = 1.0, dtype: Any = None) -> Any:
    return jnp.fft.fftfreq(n, d)


@op("hann_window.default")
def hann_window(window_length: int, dtype: Any = None) -> Any:
    return 0.5 - 0.5 * jnp.cos(2 * jnp.pi * jnp.arange(window_length) / window_length)
