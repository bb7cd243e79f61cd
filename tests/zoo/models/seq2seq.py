"""Encoder-decoder transformer in the manner of Flax's WMT example: one config, masks made inside, one embedding."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from ._data import tokens


@struct.dataclass
class TransformerConfig:
    """Global hyperparameters used to minimize obnoxious kwarg plumbing."""

    vocab_size: int
    dtype: Any = jnp.float32
    emb_dim: int = 16
    num_heads: int = 2
    num_layers: int = 1
    qkv_dim: int = 16
    mlp_dim: int = 32
    dropout_rate: float = 0.1
    deterministic: bool = False


def shift_right(x):
    return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


def sinusoidal(max_len, d):
    position = np.arange(max_len)[:, None]
    rate = np.exp(np.arange(0, d, 2) * -(np.log(10000.0) / d))
    return np.concatenate([np.sin(position * rate), np.cos(position * rate)], -1).astype(np.float32)


class MlpBlock(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs):
        config = self.config
        x = nn.relu(nn.Dense(config.mlp_dim, dtype=config.dtype)(inputs))
        x = nn.Dropout(rate=config.dropout_rate)(x, deterministic=config.deterministic)
        return nn.Dense(inputs.shape[-1], dtype=config.dtype)(x)


def attention(config, **kwargs):
    return nn.MultiHeadAttention(
        num_heads=config.num_heads,
        dtype=config.dtype,
        qkv_features=config.qkv_dim,
        use_bias=False,
        dropout_rate=config.dropout_rate,
        deterministic=config.deterministic,
        **kwargs,
    )


class EncoderBlock(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs, encoder_mask=None):
        x = nn.LayerNorm(dtype=self.config.dtype)(inputs)
        x = attention(self.config)(x, mask=encoder_mask) + inputs
        return x + MlpBlock(self.config)(nn.LayerNorm(dtype=self.config.dtype)(x))


class EncoderDecoderBlock(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, targets, encoded, decoder_mask=None, encoder_decoder_mask=None):
        x = nn.LayerNorm(dtype=self.config.dtype)(targets)
        x = attention(self.config, name="self_attention")(inputs_q=x, mask=decoder_mask) + targets
        y = nn.LayerNorm(dtype=self.config.dtype)(x)
        y = attention(self.config, name="cross_attention")(y, encoded, mask=encoder_decoder_mask) + x
        return y + MlpBlock(self.config)(nn.LayerNorm(dtype=self.config.dtype)(y))


class Transformer(nn.Module):
    """Transformer Model for sequence to sequence translation."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.shared_embedding = nn.Embed(
            config.vocab_size, config.emb_dim, embedding_init=nn.initializers.normal(stddev=1.0)
        )
        self.encoder = [EncoderBlock(config) for _ in range(config.num_layers)]
        self.encoder_norm = nn.LayerNorm(dtype=config.dtype)
        self.decoder = [EncoderDecoderBlock(config) for _ in range(config.num_layers)]
        self.decoder_norm = nn.LayerNorm(dtype=config.dtype)

    def encode(self, inputs):
        mask = nn.make_attention_mask(inputs > 0, inputs > 0, dtype=self.config.dtype)
        x = self.shared_embedding(inputs) + sinusoidal(inputs.shape[1], self.config.emb_dim)
        for block in self.encoder:
            x = block(x, mask)
        return self.encoder_norm(x)

    def decode(self, encoded, inputs, targets):
        decoder_mask = nn.combine_masks(
            nn.make_attention_mask(targets > 0, targets > 0, dtype=self.config.dtype),
            nn.make_causal_mask(targets, dtype=self.config.dtype),
        )
        cross_mask = nn.make_attention_mask(targets > 0, inputs > 0, dtype=self.config.dtype)
        y = self.shared_embedding(shift_right(targets)) + sinusoidal(targets.shape[1], self.config.emb_dim)
        for block in self.decoder:
            y = block(y, encoded, decoder_mask, cross_mask)
        return self.shared_embedding.attend(self.decoder_norm(y)) / jnp.sqrt(y.shape[-1])

    def __call__(self, inputs, targets):
        return self.decode(self.encode(inputs), inputs, targets)


def loss(logits, targets):
    weights = targets > 0
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights


def build():
    return Transformer(TransformerConfig(vocab_size=19))


def batch():
    source = tokens(8, 9, 19)
    source[:, 7:] = 0
    target = source[:, 7::-1].copy()
    return (source, target), target
