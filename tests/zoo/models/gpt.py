"""GPT-2 with its layers under `nn.scan` and `nn.remat`, a frozen config, and the embedding tied to the head."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ._data import tokens


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 23
    block_size: int = 12
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 16
    dropout: float = 0.1
    remat: bool = True


class CausalSelfAttention(nn.Module):
    config: GPTConfig

    @nn.compact
    def __call__(self, x, mask, deterministic):
        B, T, C = x.shape
        heads = self.config.n_head
        q, k, v = jnp.split(nn.Dense(3 * C, name="c_attn")(x), 3, axis=-1)
        q, k, v = (t.reshape(B, T, heads, C // heads) for t in (q, k, v))
        att = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(C // heads)
        att = jax.nn.softmax(jnp.where(mask, att, jnp.finfo(att.dtype).min), axis=-1)
        att = nn.Dropout(self.config.dropout, deterministic=deterministic)(att)
        y = jnp.einsum("bhqk,bkhd->bqhd", att, v).reshape(B, T, C)
        return nn.Dense(C, name="c_proj")(y)


class Block(nn.Module):
    config: GPTConfig

    def setup(self):
        self.ln_1 = nn.LayerNorm(epsilon=1e-5)
        self.attn = CausalSelfAttention(self.config)
        self.ln_2 = nn.LayerNorm(epsilon=1e-5)
        self.c_fc = nn.Dense(4 * self.config.n_embd)
        self.c_proj = nn.Dense(self.config.n_embd)
        self.drop = nn.Dropout(self.config.dropout)

    def __call__(self, x, mask, deterministic):
        x = x + self.attn(self.ln_1(x), mask, deterministic)
        h = self.c_proj(nn.gelu(self.c_fc(self.ln_2(x))))
        return x + self.drop(h, deterministic=deterministic), None


class GPT(nn.Module):
    config: GPTConfig

    @nn.compact
    def __call__(self, idx, deterministic=True):
        cfg = self.config
        wte = nn.Embed(cfg.vocab_size, cfg.n_embd, name="wte")
        pos = nn.Embed(cfg.block_size, cfg.n_embd, name="wpe")(jnp.arange(idx.shape[1])[None])
        x = nn.Dropout(cfg.dropout)(wte(idx) + pos, deterministic=deterministic)
        block = nn.remat(Block, prevent_cse=False, static_argnums=(3,)) if cfg.remat else Block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=cfg.n_layer,
        )
        mask = nn.make_causal_mask(idx)
        x, _ = blocks(cfg, name="h")(x, mask, deterministic)
        x = nn.LayerNorm(name="ln_f")(x)
        return wte.attend(x)


def loss(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def build():
    return GPT(GPTConfig())


def batch():
    text = tokens(8, 13, 23)
    return (text[:, :-1],), text[:, 1:]
