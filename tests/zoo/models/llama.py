"""Llama-style decoder: RMSNorm, rotary embeddings, grouped-query attention, gated MLP, bf16 computation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ._data import tokens


@struct.dataclass
class LlamaConfig:
    vocab_size: int = 29
    hidden_size: int = 16
    intermediate_size: int = 40
    num_hidden_layers: int = 1
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    dtype: str = "bfloat16"

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


def apply_rotary(x, theta):
    half = x.shape[-1] // 2
    frequency = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


class LlamaAttention(nn.Module):
    config: LlamaConfig

    def setup(self):
        cfg = self.config
        heads = lambda n: nn.DenseGeneral((n, cfg.head_dim), use_bias=False, dtype=cfg.dtype)  # noqa: E731
        self.q_proj = heads(cfg.num_attention_heads)
        self.k_proj = heads(cfg.num_key_value_heads)
        self.v_proj = heads(cfg.num_key_value_heads)
        self.o_proj = nn.DenseGeneral(cfg.hidden_size, axis=(-2, -1), use_bias=False, dtype=cfg.dtype)

    def __call__(self, x):
        cfg = self.config
        q, k = apply_rotary(self.q_proj(x), cfg.rope_theta), apply_rotary(self.k_proj(x), cfg.rope_theta)
        v = self.v_proj(x)
        groups = cfg.num_attention_heads // cfg.num_key_value_heads
        k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
        return self.o_proj(jax.nn.dot_product_attention(q, k, v, is_causal=True))


class LlamaMLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        gate = nn.Dense(cfg.intermediate_size, use_bias=False, dtype=cfg.dtype, name="gate_proj")(x)
        up = nn.Dense(cfg.intermediate_size, use_bias=False, dtype=cfg.dtype, name="up_proj")(x)
        return nn.Dense(cfg.hidden_size, use_bias=False, dtype=cfg.dtype, name="down_proj")(nn.silu(gate) * up)


class LlamaDecoderLayer(nn.Module):
    config: LlamaConfig

    def setup(self):
        cfg = self.config
        self.input_layernorm = nn.RMSNorm(epsilon=cfg.rms_norm_eps, dtype=cfg.dtype)
        self.self_attn = LlamaAttention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(epsilon=cfg.rms_norm_eps, dtype=cfg.dtype)
        self.mlp = LlamaMLP(cfg)

    def __call__(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaForCausalLM(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, input_ids):
        cfg = self.config
        x = nn.Embed(cfg.vocab_size, cfg.hidden_size, dtype=cfg.dtype, name="embed_tokens")(input_ids)
        for i in range(cfg.num_hidden_layers):
            x = LlamaDecoderLayer(cfg, name=f"layers_{i}")(x)
        x = nn.RMSNorm(epsilon=cfg.rms_norm_eps, dtype=cfg.dtype, name="norm")(x)
        return nn.Dense(cfg.vocab_size, use_bias=False, dtype=cfg.dtype, name="lm_head")(x)


def loss(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def build():
    return LlamaForCausalLM(LlamaConfig())


def batch():
    text = tokens(8, 11, 29)
    return (text[:, :-1],), text[:, 1:]
