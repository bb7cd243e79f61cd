"""Convolutional autoencoder in the manner of Flax's VAE example: the key is an argument, `generate` is a method."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ._data import digits


class Encoder(nn.Module):
    latents: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv1")(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(16, name="fc1")(x))
        mean_x = nn.Dense(self.latents, name="fc2_mean")(x)
        logvar_x = nn.Dense(self.latents, name="fc2_logvar")(x)
        return mean_x, logvar_x


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        z = nn.relu(nn.Dense(2 * 2 * 8, name="fc1")(z))
        z = z.reshape(-1, 2, 2, 8)
        z = nn.relu(nn.ConvTranspose(8, (3, 3), strides=(2, 2), name="deconv1")(z))
        return nn.ConvTranspose(1, (3, 3), strides=(2, 2), name="deconv2")(z)


def reparameterize(rng, mean, logvar):
    std = jnp.exp(0.5 * logvar)
    return mean + jax.random.normal(rng, logvar.shape) * std


class VAE(nn.Module):
    latents: int = 4

    def setup(self):
        self.encoder = Encoder(self.latents)
        self.decoder = Decoder()

    def __call__(self, x, z_rng):
        mean, logvar = self.encoder(x)
        z = reparameterize(z_rng, mean, logvar)
        return self.decoder(z), mean, logvar

    def generate(self, z):
        return nn.sigmoid(self.decoder(z))


def loss(outputs, images):
    recon, mean, logvar = outputs
    bce = optax.sigmoid_binary_cross_entropy(recon, images).sum((1, 2, 3))
    kld = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), -1)
    return bce + kld


def build():
    return VAE()


def batch():
    images, _ = digits(8)
    return (images, jax.random.key(3)), images
