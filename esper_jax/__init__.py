"""esper_jax: networks that grow while they train, for JAX and Flax.

Seeds (small modules) wait at a model's own layers, are germinated where it lacks capacity, learn in isolation, are
blended in, and are kept or pruned. Structure is static, life is data.
"""

from .kasmina import (
    Blueprint,
    Gates,
    KasminaAttention,
    KasminaBatchNorm,
    KasminaConv,
    KasminaDense,
    KasminaLayerNorm,
    Lifecycle,
    Morph,
    SeedState,
    Site,
    Spec,
    Stage,
    advance,
    blueprints,
    compare,
    fossilize,
    germinate,
    graft,
    morph,
    prune,
    register_blueprint,
    set_alpha,
    shed,
    sites,
    summary,
    tick,
    unmorph,
    with_seeds_of,
)
from .protocol import Controller, Decision, Feedback, Report
from .tamiyo import FixedSchedule, RandomSchedule, Tamiyo
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

__version__ = "0.1.0"

__all__ = [name for name in dir() if not name.startswith("_") and name not in ("annotations",)]
