"""Vision transformer in the manner of the original code base: class token, position embeddings, dropout by `train`."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ._data import digits


class AddPositionEmbs(nn.Module):
    """Adds learned positional embeddings to the inputs."""

    posemb_init: Any = nn.initializers.normal(stddev=0.02)

    @nn.compact
    def __call__(self, inputs):
        pe = self.param("pos_embedding", self.posemb_init, (1, inputs.shape[1], inputs.shape[2]))
        return inputs + pe


class MlpBlock(nn.Module):
    """Transformer MLP / feed-forward block."""

    mlp_dim: int
    out_dim: int | None = None
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, inputs, *, deterministic):
        actual_out_dim = inputs.shape[-1] if self.out_dim is None else self.out_dim
        dense = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.normal(stddev=1e-6)}
        x = nn.Dense(features=self.mlp_dim, **dense)(inputs)
        x = nn.gelu(x)
        x = nn.Dropout(rate=self.dropout_rate)(x, deterministic=deterministic)
        x = nn.Dense(features=actual_out_dim, **dense)(x)
        return nn.Dropout(rate=self.dropout_rate)(x, deterministic=deterministic)


class Encoder1DBlock(nn.Module):
    """Transformer encoder layer."""

    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, inputs, *, deterministic):
        assert inputs.ndim == 3, f"Expected (batch, seq, hidden) got {inputs.shape}"
        x = nn.LayerNorm()(inputs)
        x = nn.MultiHeadDotProductAttention(
            kernel_init=nn.initializers.xavier_uniform(),
            broadcast_dropout=False,
            deterministic=deterministic,
            dropout_rate=self.attention_dropout_rate,
            num_heads=self.num_heads,
        )(x, x)
        x = nn.Dropout(rate=self.dropout_rate)(x, deterministic=deterministic)
        x = x + inputs
        y = nn.LayerNorm()(x)
        y = MlpBlock(mlp_dim=self.mlp_dim, dropout_rate=self.dropout_rate)(y, deterministic=deterministic)
        return x + y


class Encoder(nn.Module):
    """Transformer model encoder."""

    num_layers: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x, *, train):
        x = AddPositionEmbs(name="posembed_input")(x)
        x = nn.Dropout(rate=0.1)(x, deterministic=not train)
        for lyr in range(self.num_layers):
            x = Encoder1DBlock(self.mlp_dim, self.num_heads, name=f"encoderblock_{lyr}")(x, deterministic=not train)
        return nn.LayerNorm(name="encoder_norm")(x)


class VisionTransformer(nn.Module):
    """VisionTransformer."""

    num_classes: int
    patch: int
    hidden_size: int
    transformer: dict

    @nn.compact
    def __call__(self, inputs, *, train):
        x = nn.Conv(self.hidden_size, (self.patch,) * 2, (self.patch,) * 2, padding="VALID", name="embedding")(inputs)
        n, h, w, c = x.shape
        x = jnp.reshape(x, [n, h * w, c])
        cls = self.param("cls", nn.initializers.zeros, (1, 1, c))
        x = jnp.concatenate([jnp.tile(cls, [n, 1, 1]), x], axis=1)
        x = Encoder(name="Transformer", **self.transformer)(x, train=train)
        x = x[:, 0]
        return nn.Dense(self.num_classes, name="head", kernel_init=nn.initializers.zeros)(x)


def build():
    return VisionTransformer(10, patch=2, hidden_size=16, transformer={"num_layers": 1, "mlp_dim": 32, "num_heads": 2})


def batch():
    images, labels = digits()
    return (images,), labels
