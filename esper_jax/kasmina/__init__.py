"""Kasmina, the body: sites, slots, seeds and their life, as pure functions on explicit pytrees."""

import importlib
from typing import Any

from . import lifecycle, seeds
from .blueprints import Blueprint, get_blueprint, register_blueprint
from .compact import compact
from .convolutions import conv_general_dilated
from .depth import Deepened, stack
from .fold import fold, foldable
from .gates import Gates
from .germination import germinate
from .graft import Graft, graft
from .lifecycle import Lifecycle
from .modules import KasminaAttention, KasminaBatchNorm, KasminaConv, KasminaDense, KasminaLayerNorm, with_seeds_of
from .morph import Morph, morph, sites, unmorph
from .observe import contributions, observe, silence
from .operate import advance, awake, fossilize, prune, set_alpha, shed, tick, unload
from .products import flat_products
from .scores import GrowthScores, growth_scores
from .spans import Span, spans
from .spec import Plant, Site, Spec
from .stages import Stage
from .state import SeedState
from .summary import Comparison, Table, blueprints, compare, summary
from .widen import sizes_changed, widened


def __getattr__(name: str) -> Any:
    """`kasmina.nnx`, which imports `flax.nnx`, when it is asked for."""
    if name == "nnx":
        return importlib.import_module(".nnx", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Blueprint",
    "Comparison",
    "Deepened",
    "Gates",
    "Graft",
    "GrowthScores",
    "KasminaAttention",
    "KasminaBatchNorm",
    "KasminaConv",
    "KasminaDense",
    "KasminaLayerNorm",
    "Lifecycle",
    "Morph",
    "Plant",
    "SeedState",
    "Site",
    "Span",
    "Spec",
    "Stage",
    "Table",
    "advance",
    "awake",
    "blueprints",
    "compact",
    "compare",
    "contributions",
    "conv_general_dilated",
    "flat_products",
    "fold",
    "foldable",
    "fossilize",
    "germinate",
    "get_blueprint",
    "graft",
    "growth_scores",
    "lifecycle",
    "morph",
    "observe",
    "prune",
    "register_blueprint",
    "seeds",
    "set_alpha",
    "shed",
    "silence",
    "sites",
    "sizes_changed",
    "spans",
    "stack",
    "summary",
    "tick",
    "unload",
    "unmorph",
    "widened",
    "with_seeds_of",
]
