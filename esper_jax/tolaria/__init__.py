"""Tolaria, training: the jitted train step, optimizers that grow, checkpoints, the governor and the whole loop."""

from .checkpoint import CheckpointError, Checkpoints
from .evaluate import Contributions, Evaluator
from .governor import Governor
from .optim import Growable, growable
from .persist import restore_morph
from .run import TrainingInterrupted
from .session import History
from .state import TrainState
from .step import make_train_step
from .ticker import TrainingDiverged
from .trainer import Tolaria
from .veto import Limits

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Contributions",
    "Evaluator",
    "Governor",
    "Growable",
    "History",
    "Limits",
    "Tolaria",
    "TrainState",
    "TrainingDiverged",
    "TrainingInterrupted",
    "growable",
    "make_train_step",
    "restore_morph",
]
