"""The task `digits`: scikit-learn's handwritten digits, 1797 images of 8x8, with a very small CNN."""

from __future__ import annotations

import numpy as np

from .base import Task
from .models import DigitsCNN


def digits() -> Task:
    """Handwritten digits of 8x8 pixels (scikit-learn), a small CNN with BatchNorm."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = (images.reshape(-1, 8, 8, 1) / 16.0).astype(np.float32)
    y = labels.astype(np.int32)
    x, test_x, y, test_y = train_test_split(x, y, test_size=300, stratify=y, random_state=0)
    train_x, validation_x, train_y, validation_y = train_test_split(x, y, test_size=300, stratify=y, random_state=0)
    return Task(
        name="digits",
        description="Handwritten digits of 8x8 pixels (scikit-learn), a small CNN with BatchNorm.",
        inputs="an image [8, 8, 1] of grey values in 0 to 1, float32",
        model=DigitsCNN(),
        train=(train_x, train_y),
        validation=(validation_x, validation_y),
        test=(test_x, test_y),
        classes=10,
        batch_size=64,
        learning_rate=3e-3,
        epochs=90,
        blueprints=("conv_light", "mlp", "bottleneck", "depthwise", "se"),
    )
