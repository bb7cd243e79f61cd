"""The tasks `mnist1d` and `mnist1d-cnn`: digits drawn as noisy signals of 40 samples (Greydanus, 2020, MNIST-1D)."""

from __future__ import annotations

import random

import numpy as np

from .base import Split, Task
from .models import MLP, Conv1dNet

_EXAMPLES = 10_000
_SEED = 42


def mnist1d() -> Task:
    """Digits as noisy signals of 40 samples (MNIST-1D, made on this machine), a small MLP."""
    train, validation, test = _splits()
    return Task(
        name="mnist1d",
        description="Digits as noisy signals of 40 samples (MNIST-1D, made on this machine), a small MLP.",
        inputs="a signal [40] of mean 0 and deviation 1 over the training part, float32",
        model=MLP(),
        train=train,
        validation=validation,
        test=test,
        classes=10,
        batch_size=128,
        learning_rate=3e-3,
        epochs=60,
        blueprints=("mlp", "lora"),
    )


def mnist1d_cnn() -> Task:
    """Digits as noisy signals of 40 samples (MNIST-1D, made on this machine), a small 1-d CNN."""
    train, validation, test = _splits()
    return Task(
        name="mnist1d-cnn",
        description="Digits as noisy signals of 40 samples (MNIST-1D, made on this machine), a small 1-d CNN.",
        inputs="a signal [40] of mean 0 and deviation 1 over the training part, float32",
        model=Conv1dNet(),
        train=train,
        validation=validation,
        test=test,
        classes=10,
        batch_size=128,
        learning_rate=3e-3,
        epochs=60,
        blueprints=("conv_light", "bottleneck", "mlp", "lora", "depthwise", "se"),
    )


def _splits() -> tuple[Split, Split, Split]:
    """Train (7000), validation (1500) and test (1500). The package draws from the global generators: put them back."""
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.num_samples, arguments.seed, arguments.train_split = _EXAMPLES, _SEED, 0.85
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset(arguments)
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
    cut = 7 * _EXAMPLES // 10
    mean, deviation = made["x"][:cut].mean(), made["x"][:cut].std()
    x, test_x = (((made[part] - mean) / deviation).astype(np.float32) for part in ("x", "x_test"))
    y, test_y = (made[part].astype(np.int32) for part in ("y", "y_test"))
    return (x[:cut].copy(), y[:cut].copy()), (x[cut:].copy(), y[cut:].copy()), (test_x, test_y)
