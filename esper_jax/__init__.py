"""esper_jax: networks that grow while they train, for JAX and Flax.

Seeds (small modules) wait at a model's own layers, are germinated where it lacks capacity, learn in isolation, are
blended in, and are kept or pruned. Structure is static, life is data.
"""

from typing import Any

from ._memory import keep_memory
from .kasmina import (
    Blueprint,
    Comparison,
    Deepened,
    Gates,
    GrowthScores,
    KasminaAttention,
    KasminaBatchNorm,
    KasminaConv,
    KasminaDense,
    KasminaLayerNorm,
    Lifecycle,
    Morph,
    SeedState,
    Site,
    Span,
    Spec,
    Stage,
    Table,
    advance,
    awake,
    blueprints,
    compact,
    compare,
    contributions,
    fold,
    foldable,
    fossilize,
    germinate,
    graft,
    growth_scores,
    morph,
    observe,
    prune,
    register_blueprint,
    set_alpha,
    shed,
    silence,
    sites,
    sizes_changed,
    spans,
    stack,
    summary,
    tick,
    unload,
    unmorph,
    widened,
    with_seeds_of,
)
from .protocol import Controller, Decision, Feedback, HealthSignal, Report
from .tamiyo import FixedSchedule, RandomSchedule, ReplayController, Tamiyo, TamiyoClient
from .tolaria import (
    CheckpointError,
    Governor,
    History,
    Limits,
    Tolaria,
    TrainingDiverged,
    TrainingInterrupted,
    TrainState,
    growable,
    make_train_step,
    restore_morph,
)
from .urza import Urza, UrzaError, seed_of

_BRIDGE = ("from_torch", "load_imported", "to_torch")


def __getattr__(name: str) -> Any:
    if name in _BRIDGE:  # the bridge is imported when it is used
        from . import bridge

        return getattr(bridge, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "Blueprint",
    "CheckpointError",
    "Comparison",
    "Controller",
    "Decision",
    "Deepened",
    "Feedback",
    "FixedSchedule",
    "Gates",
    "Governor",
    "GrowthScores",
    "HealthSignal",
    "History",
    "KasminaAttention",
    "KasminaBatchNorm",
    "KasminaConv",
    "KasminaDense",
    "KasminaLayerNorm",
    "Lifecycle",
    "Limits",
    "Morph",
    "RandomSchedule",
    "ReplayController",
    "Report",
    "SeedState",
    "Site",
    "Span",
    "Spec",
    "Stage",
    "Table",
    "Tamiyo",
    "TamiyoClient",
    "Tolaria",
    "TrainState",
    "TrainingDiverged",
    "TrainingInterrupted",
    "Urza",
    "UrzaError",
    "advance",
    "awake",
    "blueprints",
    "compact",
    "compare",
    "contributions",
    "fold",
    "foldable",
    "fossilize",
    "germinate",
    "graft",
    "growable",
    "growth_scores",
    "keep_memory",
    "make_train_step",
    "morph",
    "observe",
    "prune",
    "register_blueprint",
    "restore_morph",
    "seed_of",
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
