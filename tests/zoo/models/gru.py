"""Text classifier: embedding, a bidirectional GRU over padded sequences (`nn.RNN`), and a dense head."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ._data import tokens


class Attention(nn.Module):
    """Keys-only attention over time."""

    hidden_size: int

    @nn.compact
    def __call__(self, states, mask):
        scores = nn.Dense(1, use_bias=False, name="energy")(nn.tanh(nn.Dense(self.hidden_size, name="keys")(states)))
        weights = nn.softmax(jnp.where(mask[..., None], scores, -1e9), axis=1)
        return jnp.sum(weights * states, axis=1)


class TextClassifier(nn.Module):
    vocab_size: int
    embedding_size: int = 12
    hidden_size: int = 8
    output_size: int = 2

    def setup(self):
        self.embedder = nn.Embed(self.vocab_size, self.embedding_size)
        self.encoder = nn.Bidirectional(nn.RNN(nn.GRUCell(self.hidden_size)), nn.RNN(nn.GRUCell(self.hidden_size)))
        self.attention = Attention(self.hidden_size)
        self.classifier = nn.Sequential([nn.Dense(self.hidden_size), nn.tanh, nn.Dense(self.output_size)])

    def __call__(self, token_ids, lengths):
        embedded = self.embedder(token_ids)
        states = self.encoder(embedded, seq_lengths=lengths)
        mask = jnp.arange(token_ids.shape[1]) < lengths[:, None]
        return self.classifier(self.attention(states, mask))


def build():
    return TextClassifier(vocab_size=17)


def batch():
    text = tokens(16, 7, 17)
    lengths = np.random.default_rng(1).integers(3, 8, 16).astype(np.int32)
    text *= np.arange(7) < lengths[:, None]
    return (text, lengths), (text[:, 0] > 8).astype(np.int32)
