"""Kasmina, the body: sites, slots, seeds and their life, as pure functions on explicit pytrees."""

from . import lifecycle, seeds
from .blueprints import Blueprint, get_blueprint, register_blueprint
from .compact import compact
from .depth import Deepened, stack
from .fold import fold, foldable
from .gates import Gates
from .germination import germinate
from .graft import Graft, graft
from .lifecycle import Lifecycle
from .modules import KasminaAttention, KasminaBatchNorm, KasminaConv, KasminaDense, KasminaLayerNorm, with_seeds_of
from .morph import Morph, morph, sites, unmorph
from .observe import contributions, observe, silence
from .operate import advance, fossilize, prune, set_alpha, shed, tick, unload
from .spec import Plant, Site, Spec
from .stages import Stage
from .state import SeedState
from .summary import Comparison, Table, blueprints, compare, summary

__all__ = [
    "Blueprint",
    "Comparison",
    "Deepened",
    "Gates",
    "Graft",
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
    "Spec",
    "Stage",
    "Table",
    "advance",
    "blueprints",
    "compact",
    "compare",
    "contributions",
    "fold",
    "foldable",
    "fossilize",
    "germinate",
    "get_blueprint",
    "graft",
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
    "stack",
    "summary",
    "tick",
    "unload",
    "unmorph",
    "with_seeds_of",
]
