"""Models of sequences: attention of every form, recurrence, causal convolutions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .entry import Entry, floats, ids


class Masked(nn.Module):
    """Self-attention with a padding mask and a causal float mask; weights of each head come out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.register_buffer("causal", torch.triu(torch.full((5, 5), float("-inf")), 1))

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=self.causal, average_attn_weights=False)


class Cross(nn.Module):
    """Cross-attention of other widths, sequence first, with an extra key, zeros and a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, kdim=6, vdim=10, add_bias_kv=True, add_zero_attn=True)
        self.register_buffer("hidden", torch.tensor([[False, True, False], [True, False, False]]))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out, weights = self.attention(q, k, v, attn_mask=self.hidden)
        return out.transpose(0, 1), weights


class GPT(nn.Module):
    """A decoder with fused projections and scaled_dot_product_attention."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.places = nn.Embedding(17, width), nn.Parameter(torch.randn(6, width) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 17)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places[: ids.shape[1]]
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(self.norm2(x)))


class Einsum(nn.Module):
    """Attention by einsum with relative places, and a rolled window."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(8, 2, 4) * 0.3) for _ in range(3))
        self.relative = nn.Parameter(torch.randn(2, 11) * 0.1)
        self.out = nn.Linear(8, 8)
        self.register_buffer("index", torch.arange(6)[:, None] - torch.arange(6) + 5, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.roll(x, shifts=-2, dims=1)
        q, k, v = (torch.einsum("bld,dhe->bhle", x, w) for w in (self.q, self.k, self.v))
        logits = torch.einsum("bhqe,bhke->bhqk", q, k) / math.sqrt(4) + self.relative[:, self.index]
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(dim=-1)
        return torch.roll(self.out((weights @ v).permute(0, 2, 1, 3).reshape(x.shape[0], 6, 8)), 2, 1)


class Rotary(nn.Module):
    """Rotary places with grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 16), nn.Linear(8, 8)
        inverse = 1.0 / (10000 ** (torch.arange(0, 4, 2).float() / 4))
        self.register_buffer("inverse", inverse)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float32), self.inverse)
        angles = torch.cat([angles, angles], -1)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(x.shape[0], -1, 4, 4).transpose(1, 2)
        k, v = (
            self.kv(x).view(x.shape[0], -1, 2, 1, 4).expand(-1, -1, -1, 2, -1).flatten(2, 3).transpose(1, 2).split(2, 1)
        )
        out = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, enable_gqa=True, scale=0.4)
        return out.transpose(1, 2).reshape(x.shape[0], -1, 16)


class Recurrent(nn.Module):
    """One recurrent layer and a head on its last output and state."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, state = self.layer(x)
        return self.head(out[:, -1]), *(state if isinstance(state, tuple) else (state,))


class Cells(nn.Module):
    """Cells stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 6), nn.GRUCell(6, 5), nn.RNNCell(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(x.shape[0], 6)
        g, r = x.new_zeros(x.shape[0], 5), x.new_zeros(x.shape[0], 4)
        for step in x.unbind(1):
            h, c = self.lstm(step, (h, c))
            g = self.gru(h, g)
            r = self.rnn(g, r)
        return self.head(r)


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv1d(4, 8, 2, dilation=d) for d in (1, 2, 4))
        self.mixes = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(3))
        self.head = nn.Conv1d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = 0
        for filters, mix in zip(self.filters, self.mixes, strict=True):
            a, b = filters(F.pad(x, (filters.dilation[0], 0))).chunk(2, 1)
            y = mix(a.tanh() * b.sigmoid())
            x, skips = x + y, skips + y
        return self.head(F.relu(skips))


class Seq2Seq(nn.Module):
    """nn.Transformer's encoder and decoder, with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(11, 8), nn.Embedding(11, 8)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True, norm_first=True)
        decoder = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder, 1, nn.LayerNorm(8), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, 1)
        self.head = nn.Linear(8, 11)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        padding = source == 0
        memory = self.encoder(self.source(source), src_key_padding_mask=padding)
        causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        out = self.decoder(self.target(target), memory, tgt_mask=causal, memory_key_padding_mask=padding)
        return self.head(out)


def _padded(batch: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(2, 6, (batch,), generator=g)
    return torch.randn(batch, 5, 8, generator=g), torch.arange(5)[None] >= lengths[:, None]


def _pair(batch: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randint(1, 11, (batch, 6), generator=g)
    source[:, 4:] = 0
    return source, torch.randint(1, 11, (batch, 5), generator=g)


MODELS = {
    "masked_attention": Entry(Masked, _padded),
    "cross_attention": Entry(
        Cross,
        lambda b, g: tuple(torch.randn(b, *s, generator=g) for s in ((2, 8), (3, 6), (3, 10))),
    ),
    "encoder": Entry(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), 2, enable_nested_tensor=False
        ),
        floats(5, 8),
    ),
    "seq2seq": Entry(Seq2Seq, _pair, slow=True),
    "gpt": Entry(GPT, ids(6, 17)),
    "einsum_attention": Entry(Einsum, floats(6, 8)),
    "rotary": Entry(Rotary, floats(5, 8)),
    "lstm": Entry(
        lambda: Recurrent(nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True, dropout=0.2), 12), floats(5, 4)
    ),
    "projected_lstm": Entry(lambda: Recurrent(nn.LSTM(4, 6, batch_first=True, proj_size=3), 3), floats(5, 4)),
    "gru": Entry(lambda: Recurrent(nn.GRU(4, 6, batch_first=True, bias=False), 6), floats(5, 4)),
    "rnn": Entry(lambda: Recurrent(nn.RNN(4, 6, nonlinearity="relu", batch_first=True), 6), floats(5, 4)),
    "cells": Entry(Cells, floats(3, 4)),
    "wavenet": Entry(WaveNet, floats(4, 12)),
}
