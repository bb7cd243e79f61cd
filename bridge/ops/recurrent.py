"""LSTM, GRU and plain recurrent layers, by scan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .random import dropped
from .registry import op


def _lstm_cell(x: Any, carry: Any, w_hh: Any, b_hh: Any, w_hr: Any) -> tuple[Any, Any]:
    h, c = carry
    gates = x + h @ w_hh.T + b_hh
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    h = h if w_hr is None else h @ w_hr.T
    return (h, c), h


def _gru_cell(x: Any, carry: Any, w_hh: Any, b_hh: Any, w_hr: Any) -> tuple[Any, Any]:
    (h,) = carry
    xr, xz, xn = jnp.split(x, 3, axis=-1)
    hr, hz, hn = jnp.split(h @ w_hh.T + b_hh, 3, axis=-1)
    r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
    n = jnp.tanh(xn + r * hn)
    h = (1 - z) * n + z * h
    return (h,), h


def _plain_cell(act: Any) -> Any:
    def cell(x: Any, carry: Any, w_hh: Any, b_hh: Any, w_hr: Any) -> tuple[Any, Any]:
        h = act(x + carry[0] @ w_hh.T + b_hh)
        return (h,), h

    return cell


def _layers(
    cell: Any,
    x: Any,
    states: tuple[Any, ...],
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    draw: Any,
    projected: bool = False,
) -> tuple[Any, tuple[Any, ...]]:
    batched = x.ndim == 3
    if not batched:
        x, states = x[:, None], tuple(s[:, None] for s in states)
    elif batch_first:
        x = jnp.swapaxes(x, 0, 1)
    each = 2 + 2 * has_biases + projected
    directions = 2 if bidirectional else 1
    finals: list[Any] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            w_ih, w_hh, *rest = params[number * each : (number + 1) * each]
            b_ih, b_hh = rest[:2] if has_biases else (jnp.zeros((), x.dtype),) * 2
            w_hr = rest[-1] if projected else None
            given = x @ w_ih.T + b_ih  # all steps at once; the scan has only what depends on the step before

            def step(carry: Any, at: Any, w_hh: Any = w_hh, b_hh: Any = b_hh, w_hr: Any = w_hr) -> Any:
                return cell(at, carry, w_hh, b_hh, w_hr)

            carry, out = lax.scan(step, tuple(s[number] for s in states), given, reverse=direction == 1)
            outputs.append(out)
            finals.append(carry)
        x = outputs[0] if directions == 1 else jnp.concatenate(outputs, axis=-1)
        if dropout and train and layer < num_layers - 1:
            x = dropped(x, dropout, draw)
    last = tuple(jnp.stack([carry[i] for carry in finals]) for i in range(len(states)))
    if not batched:
        return x[:, 0], tuple(s[:, 0] for s in last)
    return (jnp.swapaxes(x, 0, 1) if batch_first else x), last


@op("lstm.input", random=True)
def lstm(
    input: Any,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    draw: Any = None,
) -> Any:
    projected = hx[0].shape[-1] != hx[1].shape[-1]
    out, (h, c) = _layers(
        _lstm_cell,
        input,
        tuple(hx),
        params,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
        draw,
        projected,
    )
    return out, h, c


def _simple(name: str, cell: Any) -> None:
    def recurrent(
        input: Any,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        *,
        draw: Any = None,
    ) -> Any:
        options = (has_biases, num_layers, dropout, train, bidirectional, batch_first, draw)
        out, (h,) = _layers(cell, input, (hx,), params, *options)
        return out, h

    op(f"{name}.input", random=True)(recurrent)


_simple("gru", _gru_cell)
_simple("rnn_tanh", _plain_cell(jnp.tanh))
_simple("rnn_relu", _plain_cell(jax.nn.relu))


def _one_step(cell: Any, states: tuple[Any, ...], x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    zero = jnp.zeros((), x.dtype)
    given = x @ w_ih.T + (zero if b_ih is None else b_ih)
    return cell(given, states, w_hh, zero if b_hh is None else b_hh, None)[0]


@op("lstm_cell.default")
def lstm_cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    return _one_step(_lstm_cell, tuple(hx), input, w_ih, w_hh, b_ih, b_hh)


@op("gru_cell.default")
def gru_cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    return _one_step(_gru_cell, (hx,), input, w_ih, w_hh, b_ih, b_hh)[0]


@op("rnn_tanh_cell.default")
def rnn_tanh_cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    return _one_step(_plain_cell(jnp.tanh), (hx,), input, w_ih, w_hh, b_ih, b_hh)[0]


@op("rnn_relu_cell.default")
def rnn_relu_cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    return _one_step(_plain_cell(jax.nn.relu), (hx,), input, w_ih, w_hh, b_ih, b_hh)[0]
