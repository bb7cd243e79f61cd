"""Time series: causal dilated convolutions with weight norm, then an LSTM, in a `setup` with named sublayers."""

import flax.linen as nn
import numpy as np
import optax


class CausalBlock(nn.Module):
    channels: int
    dilation: int

    def setup(self):
        self.conv = nn.Conv(self.channels, (3,), kernel_dilation=self.dilation, padding="CAUSAL")
        self.normed = nn.WeightNorm(nn.Conv(self.channels, (3,), padding="CAUSAL"))
        self.skip = nn.Conv(self.channels, (1,), use_bias=False)

    def __call__(self, x):
        return nn.relu(self.normed(nn.relu(self.conv(x)))) + self.skip(x)


class Forecaster(nn.Module):
    channels: int = 8

    def setup(self):
        self.blocks = tuple(CausalBlock(self.channels, 2**i) for i in range(2))
        self.memory = nn.RNN(nn.OptimizedLSTMCell(self.channels), name="memory")
        self.readout = nn.Dense(1)

    def __call__(self, series):
        x = series
        for block in self.blocks:
            x = block(x)
        return self.readout(self.memory(x))


def loss(prediction, target):
    return optax.l2_loss(prediction, target)


def build():
    return Forecaster()


def batch():
    rng = np.random.default_rng(0)
    t = np.arange(13) * 0.5 + rng.uniform(0, 6, (16, 1))
    wave = (np.sin(t) + 0.5 * np.sin(2.3 * t)).astype(np.float32)[..., None]
    return (wave[:, :-1],), wave[:, 1:]
