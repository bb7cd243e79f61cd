"""The hosts of the built-in tasks: plain Linen modules that know nothing of seeds, each with a width to turn."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class DigitsCNN(nn.Module):
    """3x3 convolutions with BatchNorm and relu, halving the image between them, then one linear layer on the mean.

    Attributes:
      features: channels of each convolution.
      classes: number of classes C.
    """

    features: Sequence[int] = (4, 8)
    classes: int = 10

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 1"], train: bool = False) -> Float[Array, "B C"]:
        """Logits of each image; `train=True` uses the batch's own statistics and updates `batch_stats`."""
        for i, features in enumerate(self.features):
            if i:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


class MLP(nn.Module):
    """Fully connected layers with relu between them.

    Attributes:
      features: units of each hidden layer.
      classes: number of classes C.
    """

    features: Sequence[int] = (16, 16)
    classes: int = 10

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], train: bool = False) -> Float[Array, "B C"]:
        """Logits of each row; `train` changes nothing here."""
        for features in self.features:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.classes)(x)


class Conv1dNet(nn.Module):
    """Strided 1-d convolutions of width 5 with relu over a signal, then one linear layer on all that is left.

    Attributes:
      features: channels of each convolution; each halves the length.
      classes: number of classes C.
    """

    features: Sequence[int] = (4, 4)
    classes: int = 10

    @nn.compact
    def __call__(self, x: Float[Array, "B L"], train: bool = False) -> Float[Array, "B C"]:
        """Logits of each signal; `train` changes nothing here."""
        x = x[..., None]
        for features in self.features:
            x = nn.relu(nn.Conv(features, (5,), strides=(2,))(x))
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


class CharBlock(nn.Module):
    """One transformer block, normalised before each part: causal self-attention, then two linear layers with gelu.

    Attributes:
      heads: attention heads; they share the width of the input.
      hidden: units between the two linear layers.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The input plus what the block adds to it."""
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h)


class CharTransformer(nn.Module):
    """A causal transformer over characters whose blocks are recomputed in the backward pass (`nn.remat`).

    Attributes:
      vocabulary: number of different characters V.
      width: features D of each position.
      depth: number of blocks.
      heads: attention heads in each block.
      length: longest text it can read.
    """

    vocabulary: int
    width: int = 24
    depth: int = 2
    heads: int = 2
    length: int = 64

    @nn.compact
    def __call__(self, x: Int[Array, "B T"], train: bool = False) -> Float[Array, "B T V"]:
        """Logits of the character after each position; `train` changes nothing here.

        Raises:
          ValueError: the text is longer than `length`.
        """
        if x.shape[1] > self.length:
            raise ValueError(
                f"the text is {x.shape[1]} characters long and this CharTransformer reads {self.length} at most: "
                f"cut it, or build the model with length={x.shape[1]}"
            )
        places = self.param("places", nn.initializers.normal(0.02), (self.length, self.width))
        h = nn.Embed(self.vocabulary, self.width)(x) + places[: x.shape[1]]
        block = nn.remat(CharBlock)
        for i in range(self.depth):
            h = block(self.heads, 2 * self.width, name=f"block_{i}")(h)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(h))
