"""Small models of many kinds: dense, gated, mixtures, graphs, tricks with parameters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from .entry import Entry, floats, ids


class Mixer(nn.Module):
    """An MLP-Mixer of two blocks."""

    def __init__(self, tokens: int = 9, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "tokens": nn.Sequential(nn.Linear(tokens, 18), nn.GELU(), nn.Linear(18, tokens)),
                    "norm2": nn.LayerNorm(width),
                    "channels": nn.Sequential(nn.Linear(width, 24), nn.GELU(approximate="tanh"), nn.Linear(24, width)),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block["tokens"](block["norm1"](x).transpose(1, 2)).transpose(1, 2)
            x = x + block["channels"](block["norm2"](x))
        return self.head(x.mean(dim=1))


class SwiGLU(nn.Module):
    """A gated feed-forward block with an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(10, eps=1e-6)
        self.gate, self.up, self.down = nn.Linear(10, 20, bias=False), nn.Linear(10, 20, bias=False), nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Experts(nn.Module):
    """A mixture of four experts, of which the two best are weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, index = self.router(x).topk(2, dim=-1)
        weights = torch.zeros(x.shape[0], 4, dtype=x.dtype).scatter(1, index, values.softmax(-1))
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return torch.einsum("be,bed->bd", weights, outputs)


class GraphConv(nn.Module):
    """Two graph convolutions over a given adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1)
        x = F.elu(self.first(adjacency @ x / degree))
        return self.second(adjacency.matmul(x) / degree).log_softmax(-1)


class Siamese(nn.Module):
    """One encoder called twice, in a dict of inputs and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(7, 14), nn.BatchNorm1d(14), nn.Tanh(), nn.Linear(14, 6))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b = self.encoder(left), self.encoder(right)
        return {"similar": self.scale * F.cosine_similarity(a, b), "codes": (F.normalize(a, dim=-1), b)}


class Fourier(nn.Module):
    """Random Fourier features as a buffer, then a filter in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(3, 16))
        self.filter = nn.Parameter(torch.randn(17) * 0.1 + 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = 2 * math.pi * x @ self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], -1)
        spectrum = torch.fft.rfft(features, dim=-1, norm="ortho") * self.filter
        return self.head(torch.fft.irfft(spectrum, n=32, dim=-1, norm="ortho"))


class Normed(nn.Module):
    """weight_norm and spectral_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(8, 12))
        self.second = parametrizations.spectral_norm(nn.Linear(12, 12))
        self.third = parametrizations.weight_norm(nn.Conv1d(3, 5, 3, padding=1))
        self.head = nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(F.softplus(self.first(x)))
        return self.head(self.third(y.view(-1, 3, 4)).flatten(1))


class Recommender(nn.Module):
    """Bags of ids, weighed, averaged without the padding, and at their largest."""

    def __init__(self) -> None:
        super().__init__()
        self.liked = nn.EmbeddingBag(20, 6, mode="sum")
        self.seen = nn.EmbeddingBag(20, 6, mode="mean", padding_idx=0)
        self.tags = nn.EmbeddingBag(20, 6, mode="max")
        self.head = nn.Sequential(nn.LayerNorm(18), nn.Linear(18, 5), nn.SiLU(), nn.Linear(5, 1))

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found = [self.liked(ids, per_sample_weights=weights), self.seen(ids), self.tags(ids)]
        return self.head(torch.cat(found, -1))


class Tied(nn.Module):
    """A language model whose head is its embedding, with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.mix = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Mish())
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.mix(x).cumsum(1) / 5)


class Lists(nn.Module):
    """ParameterList, ParameterDict, Bilinear and many activations."""

    def __init__(self) -> None:
        super().__init__()
        self.shifts = nn.ParameterList(torch.randn(6) for _ in range(3))
        self.scales = nn.ParameterDict({"a": torch.rand(6) + 0.5, "b": torch.rand(1, 6) + 0.5})
        self.pair, self.stem = nn.Bilinear(6, 6, 4), nn.Linear(6, 6)
        self.slope = nn.PReLU(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = x * self.scales["a"] + self.shifts[0]
        y = F.leaky_relu(y, 0.2) + F.hardswish(self.shifts[1] * y) + F.hardsigmoid(y) + F.relu6(y * 2) + F.selu(y)
        z = self.slope(x * self.scales["b"] - self.shifts[2]) + F.celu(y, 0.7) - F.softshrink(y, 0.3) + F.logsigmoid(x)
        return self.pair(y, z) + F.glu(torch.cat([y, z], -1))[..., :4] + F.hardtanh(y, -0.5, 0.5)[..., :4]


class Sorting(nn.Module):
    """Indexing of every kind: gather, index, roll, flip, sort, where, masked_fill, unfold."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(6, 6)
        self.register_buffer("order", torch.tensor([3, 1, 0, 5, 2, 4]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.keys(x)
        ranked, places = y.sort(-1, descending=True)
        picked = x.gather(1, places[:, :3])
        shuffled = y[:, self.order].roll(2, dims=1).flip(1)
        masked = torch.where(x > 0, y, x).masked_fill(y.abs() < 0.1, -1.0)
        windows = shuffled.unfold(1, 3, 2).amax(-1)
        best = y.max(dim=1, keepdim=True).values + y.min(1).values[:, None] + y.std(1, keepdim=True)
        kept = y.index_select(1, self.order[:2]).new_zeros(x.shape[0], 4).index_add(1, self.order[4:] - 1, y[:, :2])
        return ranked, picked, masked, windows, best, kept, places


class Autoencoder(nn.Module):
    """Encoder to mean and log-variance, and a decoder of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 12), nn.ELU(), nn.Dropout(0.2))
        self.mean, self.log_var = nn.Linear(12, 3), nn.Linear(12, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 12), nn.SiLU(), nn.Linear(12, 16), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h).clamp(-4, 4)
        divergence = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(-1)
        return {"output": self.decoder(mean), "divergence": divergence, "size": log_var.exp().sqrt().prod(1)}


def _adjacency(batch: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    edges = (torch.rand(batch, 5, 5, generator=g) > 0.5).float()
    return torch.randn(batch, 5, 6, generator=g), edges


MODELS = {
    "mlp": Entry(
        lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3)),
        floats(8),
    ),
    "recommender": Entry(
        Recommender, lambda batch, g: (torch.randint(0, 20, (batch, 7), generator=g), torch.rand(batch, 7, generator=g))
    ),
    "mixer": Entry(Mixer, floats(9, 16)),
    "swiglu": Entry(SwiGLU, floats(4, 10)),
    "experts": Entry(Experts, floats(8)),
    "graph": Entry(GraphConv, _adjacency),
    "siamese": Entry(
        Siamese,
        lambda b, g: {"left": torch.randn(b, 7, generator=g), "right": torch.randn(b, 7, generator=g)},
    ),
    "fourier": Entry(Fourier, floats(3)),
    "normed": Entry(Normed, floats(8)),
    "tied": Entry(Tied, ids(5, 20)),
    "lists": Entry(Lists, floats(6)),
    "sorting": Entry(Sorting, floats(6)),
    "autoencoder": Entry(Autoencoder, floats(16)),
}
