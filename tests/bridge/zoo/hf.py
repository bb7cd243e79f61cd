"""Models of the transformers library, made from tiny configurations (nothing is downloaded)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .entry import Entry


def _make(name: str, config: str, **options: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        import transformers

        made = getattr(transformers, config)(**options)
        return getattr(transformers, name)._from_config(made, attn_implementation="sdpa")

    return make


def _plain(name: str, config: str, **options: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return make


def _ids(vocabulary: int, length: int = 6, mask: bool = True, **more: Any) -> Callable[[int, torch.Generator], Any]:
    def draw(batch: int, g: torch.Generator) -> dict[str, Any]:
        found = {"input_ids": torch.randint(2, vocabulary, (batch, length), generator=g)}
        if mask:
            found["attention_mask"] = (
                torch.arange(length)[None] < torch.tensor([length, length - 2] * batch)[:batch, None]
            ).long()
        return {**found, **more}

    return draw


def _pixels(size: int, channels: int = 3) -> Callable[[int, torch.Generator], Any]:
    return lambda batch, g: {"pixel_values": torch.randn(batch, channels, size, size, generator=g)}


def _t5(batch: int, g: torch.Generator) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(2, 30, (batch, 6), generator=g),
        "decoder_input_ids": torch.randint(2, 30, (batch, 4), generator=g),
        "use_cache": False,
    }


def _whisper(batch: int, g: torch.Generator) -> dict[str, Any]:
    return {
        "input_features": torch.randn(batch, 8, 20, generator=g),
        "decoder_input_ids": torch.randint(2, 30, (batch, 4), generator=g),
        "use_cache": False,
    }


def _clip(batch: int, g: torch.Generator) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(2, 30, (batch, 6), generator=g),
        "pixel_values": torch.randn(batch, 3, 16, 16, generator=g),
    }


TEXT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "hf_bert": Entry(_make("BertModel", "BertConfig", **TEXT), _ids(30), slow=True),
    "hf_distilbert": Entry(
        _make("DistilBertModel", "DistilBertConfig", vocab_size=30, dim=16, n_layers=1, n_heads=2, hidden_dim=24),
        _ids(30),
        slow=True,
    ),
    "hf_gpt2": Entry(
        _make("GPT2LMHeadModel", "GPT2Config", vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16),
        _ids(30, mask=False, use_cache=False),
        slow=True,
    ),
    "hf_llama": Entry(
        _make("LlamaForCausalLM", "LlamaConfig", **TEXT, num_key_value_heads=1, max_position_embeddings=32),
        _ids(30, mask=False, use_cache=False),
        slow=True,
    ),
    "hf_vit": Entry(_make("ViTModel", "ViTConfig", **VISION, image_size=16, patch_size=4), _pixels(16), slow=True),
    "hf_swin": Entry(
        _plain(
            "SwinModel",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=4,
            drop_path_rate=0.1,
        ),
        _pixels(16),
        slow=True,
    ),
    "hf_convnext": Entry(
        _plain(
            "ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, drop_path_rate=0.1
        ),
        _pixels(32),
        slow=True,
    ),
    "hf_resnet": Entry(
        _plain(
            "ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
        ),
        _pixels(32),
        slow=True,
    ),
    "hf_t5": Entry(
        _plain(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=30,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
        ),
        _t5,
        slow=True,
    ),
    "hf_clip": Entry(
        _plain(
            "CLIPModel",
            "CLIPConfig",
            text_config={**TEXT, "max_position_embeddings": 16, "eos_token_id": 29},
            vision_config={**VISION, "image_size": 16, "patch_size": 8},
            projection_dim=12,
        ),
        _clip,
        slow=True,
        rate=1e-4,
    ),
    "hf_whisper": Entry(
        _plain(
            "WhisperModel",
            "WhisperConfig",
            vocab_size=30,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
        ),
        _whisper,
        slow=True,
    ),
}
