"""For users of `flax.nnx`: a morph beside their own model and optimizer, and layers that carry their own seeds."""

from __future__ import annotations

from typing import Any

from flax import nnx

from .bank import Bank
from .blend import check_blend
from .blueprints import make_plant, seed_init
from .morph import Morph, check_morph
from .nnx_hosts import BANK, LifeVariable, SeedVariable, site_of_layer, take, with_seeds
from .spec import Site
from .state import SeedState


def with_model(morph: Morph, model: Any) -> Morph:
    """The morph on the variables that an nnx module (or its `nnx.State`) has now.

    Raises:
      ValueError: the module has other variables than the morph was made of.
    """
    host, form = take(model)
    if form != check_nnx(morph, "with_model").form:
        raise ValueError("with_model() got a module with other variables than the morph was made of")
    return morph.replace(host=host)


def as_state(morph: Morph, tree: Any, collection: str = "params") -> Any:
    """A tree in the form of one of the host's collections as an `nnx.State`.

    Args:
      morph: a morph of an nnx host.
      tree: e.g. `grads["host"]`, for `nnx.Optimizer.update(model, ...)`; or an updated collection for `nnx.update`.
      collection: which collection the tree has the form of: `params`, `batch_stats`, ...

    Raises:
      TypeError: the morph's host is no nnx module's.
    """
    return check_nnx(morph, "as_state").form.only(collection, tree)


def check_nnx(morph: Any, call: str) -> Morph:
    """The morph itself; TypeError where it is none, or not of an nnx host."""
    check_morph(morph, call)
    if morph.form is None:
        raise TypeError(f"{call}() needs a morph of an nnx module or state, this one is of a Linen host")
    checked: Morph = morph
    return checked


def _plant(layer: Any, slots: int, planted: Any, blend: str, rngs: nnx.Rngs) -> None:
    """Put dormant seeds into a layer that was just made."""
    check_blend(blend)
    if not planted:
        return
    site = site_of_layer((), layer)
    if not isinstance(site, Site):
        raise ValueError(f"{type(layer).__name__} cannot carry seeds: {site}")
    wanted = {planted: {}} if isinstance(planted, str) else dict(planted)
    if len(wanted) > slots:
        raise ValueError(f"{len(wanted)} blueprints planted in {slots} slots; raise slots=")
    plants = tuple(
        make_plant(site, slot, name, config, blend, resident=True) for slot, (name, config) in enumerate(wanted.items())
    )
    layer.kasmina_site, layer.kasmina_plants = site, plants
    layer.kasmina_seeds = SeedVariable({plant.key: seed_init(plant, site, rngs.params()) for plant in plants})
    layer.kasmina_life = LifeVariable(SeedState.empty(slots))


def _seeded(layer: Any, cls: type, args: Any, kwargs: Any, h: Any) -> Any:
    """The layer's output with its own seeds applied; under `graft` the graft applies them instead."""
    if not hasattr(layer, "kasmina_seeds") or hasattr(layer, BANK):
        return h
    life, seeds = layer.kasmina_life.get_value(), layer.kasmina_seeds.get_value()
    bank = Bank(seeds, life, None, None, layer.kasmina_site, layer.kasmina_plants)
    return with_seeds(layer, cls, bank, args, kwargs, h)


def _kasmina(cls: Any, about: str) -> Any:
    """An nnx layer with a seed bank: the layer's own arguments, and `slots`, `planted` and `blend`."""

    class Layer(cls):  # type: ignore[misc]
        def __init__(
            self, *args: Any, slots: int = 4, planted: Any = None, blend: str = "add", rngs: nnx.Rngs, **kwargs: Any
        ) -> None:
            super().__init__(*args, rngs=rngs, **kwargs)
            _plant(self, slots, planted, blend, rngs)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _seeded(self, cls, args, kwargs, super().__call__(*args, **kwargs))

    Layer.__doc__ = (
        f"{about} with a seed bank. `planted` is a blueprint's name or `{{name: config}}`; `slots` places for seeds; "
        "`blend` how they meet the output. Exactly the plain layer while its seeds are dormant or training."
    )
    return Layer


KasminaDense = _kasmina(nnx.Linear, "`nnx.Linear`")
KasminaConv = _kasmina(nnx.Conv, "`nnx.Conv`")
KasminaAttention = _kasmina(nnx.MultiHeadAttention, "`nnx.MultiHeadAttention`")
KasminaLayerNorm = _kasmina(nnx.LayerNorm, "`nnx.LayerNorm`")
KasminaBatchNorm = _kasmina(nnx.BatchNorm, "`nnx.BatchNorm`")
for _name, _layer in list(globals().items()):
    if _name.startswith("Kasmina"):
        _layer.__name__ = _layer.__qualname__ = _name
        _layer.__module__ = __name__
