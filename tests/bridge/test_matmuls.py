"""Weights are stored as matrix products want them: nothing is transposed around a product."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import esper_jax

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def imported(module: Any, *inputs: Any) -> Any:
    """The imported model as a function of its variables and inputs, and arguments for it."""
    model, variables = esper_jax.from_torch(module.eval(), inputs, verify=False)
    return model.apply, (variables, *(jnp.asarray(x.numpy()) for x in inputs))


def transposes(function: Any, *arguments: Any) -> int:
    return str(jax.make_jaxpr(function)(*arguments)).count("transpose[")


def test_dense_layers_are_products_and_nothing_else_forward_and_backward():
    layers = [torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)]
    apply, arguments = imported(torch.nn.Sequential(*layers), torch.randn(8, 64))
    assert transposes(apply, *arguments) == 0
    compiled = jax.jit(apply).lower(*arguments).compile().as_text()
    assert not re.findall(r"= \S+ transpose\(", compiled) and len(re.findall(r"= \S+ dot\(", compiled)) == 2
    loss = jax.grad(lambda variables, x: jnp.sum(apply(variables, x) ** 2))
    plain = jax.grad(lambda v, x: jnp.sum((jnp.maximum(x @ v[0] + v[1], 0) @ v[2] + v[3]) ** 2))
    kernels = (jnp.ones((64, 128)), jnp.ones(128), jnp.ones((128, 10)), jnp.ones(10))
    assert transposes(loss, *arguments) <= transposes(plain, kernels, arguments[1])


def test_attention_transposes_what_jaxs_own_attention_does_and_no_more():
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    module = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    apply, arguments = imported(module, torch.randn(4, 10, 64))
    heads = jnp.ones((4, 10, 4, 16))
    own = transposes(jax.nn.dot_product_attention, heads, heads, heads)
    assert transposes(apply, *arguments) <= 2 * own
