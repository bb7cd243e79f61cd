"""torch.nn.MultiheadAttention as one operator of a captured graph. Imports torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .torch_patches import instead

OP = "esper_jax.attention.default"


def _compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    in_weight: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    add_zero_attn: bool,
    dropout: float,
    training: bool,
    need_weights: bool,
    average: bool,
    is_causal: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    turned = batch_first and query.dim() == 3
    q, k, v = (t.transpose(0, 1) if turned else t for t in (query, key, value))
    output, weights = torch.nn.functional.multi_head_attention_forward(
        q,
        k,
        v,
        query.shape[-1],
        heads,
        in_weight,  # type: ignore[arg-type]
        in_bias,
        bias_k,
        bias_v,
        add_zero_attn,
        dropout,
        out_weight,
        out_bias,  # type: ignore[arg-type]
        training=training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        use_separate_proj_weight=in_weight is None,
        q_proj_weight=q_weight,
        k_proj_weight=k_weight,
        v_proj_weight=v_weight,
        average_attn_weights=average,
        is_causal=is_causal,
    )
    output = output.transpose(0, 1) if turned else output
    return output.clone(), query.new_empty(0) if weights is None else weights.clone()


_op: Any = torch.library.custom_op("esper_jax::attention", _compute, mutates_args=())
_op.register_fake(_compute)


def attention_as_one_op() -> AbstractContextManager[None]:
    """Meanwhile each `nn.MultiheadAttention` is one node, its masks and shapes checked by torch."""
    from torch.nn.modules import transformer

    def detect(mask: Any, is_causal: Any = None, size: Any = None) -> bool:
        return bool(is_causal)

    # it reads a mask's values to choose a fast kernel; the mask itself is given on, so that nothing hangs on it
    return instead(
        (transformer, "_detect_is_causal_mask", detect),
        (torch.nn.MultiheadAttention, "forward", _forward),
    )


def _forward(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    same = attention._qkv_same_embed_dim
    output, weights = _op(
        query,
        key,
        value,
        attention.num_heads,
        attention.in_proj_weight if same else None,
        None if same else attention.q_proj_weight,
        None if same else attention.k_proj_weight,
        None if same else attention.v_proj_weight,
        attention.in_proj_bias,
        attention.bias_k,
        attention.bias_v,
        attention.out_proj.weight,
        attention.out_proj.bias,
        key_padding_mask,
        attn_mask,
        attention.add_zero_attn,
        float(attention.dropout),
        attention.training,
        need_weights,
        average_attn_weights,
        is_causal,
        attention.batch_first,
    )
    return output, weights if need_weights else None
