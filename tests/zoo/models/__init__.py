"""Models as their users write them: nothing in this folder knows of seeds.

Each file has `build() -> model` and `batch() -> (inputs, targets)` (`inputs` a tuple of the model's arguments), and a
`loss(outputs, targets)` where it is not the cross entropy.
"""

from . import (
    autoencoder,
    convnext,
    deepsets,
    ensemble,
    gemma,
    gpt,
    gru,
    llama,
    mixer,
    resnet,
    seq2seq,
    siamese,
    tcn,
    unet,
    vit,
)

MODELS = {
    module.__name__.rsplit(".", 1)[1]: module
    for module in (
        autoencoder,
        convnext,
        deepsets,
        ensemble,
        gemma,
        gpt,
        gru,
        llama,
        mixer,
        resnet,
        seq2seq,
        siamese,
        tcn,
        unet,
        vit,
    )
}
