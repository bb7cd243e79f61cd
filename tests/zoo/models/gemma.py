"""Gemma-style block: its author writes their own `Einsum` and `RMSNorm` layers beside Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ._data import tokens


class Einsum(nn.Module):
    """Einsum is a convenience module for parameterized tensor multiplication."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, eqn, x):
        w = self.param("w", nn.initializers.normal(0.1), self.shape)
        return jnp.einsum(eqn, x, w)


class RMSNorm(nn.Module):
    """RMSNorm layer."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],))
        var = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(var + 1e-06) * (1 + scale)


class Attention(nn.Module):
    num_heads: int
    features: int
    head_dim: int

    def setup(self):
        self.attn_vec_einsum = nn.Einsum(
            (self.num_heads, self.head_dim, self.features), "BTNH,NHD->BTD", use_bias=False
        )
        self.qkv_einsum = Einsum((3, self.num_heads, self.features, self.head_dim))

    def __call__(self, x):
        q, k, v = self.qkv_einsum("BTD,SNDH->SBTNH", x)
        return self.attn_vec_einsum(jax.nn.dot_product_attention(q, k, v, is_causal=True))


class FeedForward(nn.Module):
    """Feed forward module: the gate and the way up are one array."""

    features: int
    hidden_dim: int

    @nn.compact
    def __call__(self, x):
        w_gating = self.param("gating_einsum", nn.initializers.normal(0.1), (2, self.features, self.hidden_dim))
        gate_value = nn.gelu(jnp.dot(x, w_gating[0]))
        activations = gate_value * jnp.dot(x, w_gating[1])
        w_linear = self.param("linear", nn.initializers.zeros_init(), (self.hidden_dim, self.features))
        return jnp.dot(activations, w_linear)


class Block(nn.Module):
    features: int

    def setup(self):
        self.pre_attention_norm = RMSNorm()
        self.attn = Attention(2, self.features, 8)
        self.pre_ffw_norm = RMSNorm()
        self.mlp = FeedForward(self.features, 2 * self.features)

    def __call__(self, x):
        x = x + self.attn(self.pre_attention_norm(x))
        return x + self.mlp(self.pre_ffw_norm(x))


class Gemma(nn.Module):
    vocab: int
    features: int = 16
    layers: int = 1

    @nn.compact
    def __call__(self, ids):
        embedder = nn.Embed(self.vocab, self.features, name="embedder")
        x = embedder(ids) * jnp.sqrt(self.features)
        for i in range(self.layers):
            x = Block(self.features, name=f"layer_{i}")(x)
        return embedder.attend(RMSNorm(name="final_norm")(x))


def loss(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def build():
    return Gemma(23)


def batch():
    text = tokens(8, 11, 23)
    return (text[:, :-1],), text[:, 1:]
