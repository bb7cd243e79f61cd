"""Everything a training run needs to go on, in one pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..kasmina._pytree import Struct, check_key, is_key, pytree
from ..kasmina.morph import Morph
from ..kasmina.probe import SIZE
from .optim import Growable, GrowState


@pytree
class Meters(Struct):
    """Sums since the last tick: training loss and batches, bad batches, and for each site its probes' sums.

    `stats` is `{site: [P]}` (see `kasmina.probe.Probe`) and `gradients` the summed norms of the site's parameter
    gradient on the sampled steps; at stacked layers both have a leading axis of them.
    """

    loss: Float[Array, ""]
    batches: Int[Array, ""]
    skipped: Int[Array, ""]
    stats: dict[str, Float[Array, " P"]]
    gradients: dict[str, Float[Array, ""]]

    @staticmethod
    def zero(morph: Morph) -> Meters:
        """Nothing measured yet."""
        rows = {site.path: (site.layers,) if site.layers else () for site in morph.spec.sites}
        return Meters(
            loss=jnp.zeros((), jnp.float32),
            batches=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            stats={path: jnp.zeros((*row, SIZE), jnp.float32) for path, row in rows.items()},
            gradients={path: jnp.zeros(row, jnp.float32) for path, row in rows.items()},
        )


@pytree
class TrainState(Struct):
    """A run between two steps.

    `step`, `epoch` and `batch` (batches done in this epoch) and `ticks` are int32 scalars. `morph` holds the host
    with its mutable collections, and the seeds; `opt_state` is a `GrowState`; `key` a typed PRNG key from which every
    random number of the run follows; `meters` what was measured since the last tick; `governor` and `control` the
    governor's and the controller's own states (None where there is none).
    """

    step: Int[Array, ""]
    epoch: Int[Array, ""]
    batch: Int[Array, ""]
    ticks: Int[Array, ""]
    morph: Morph
    opt_state: GrowState
    key: Any
    meters: Meters
    governor: Any = None
    control: Any = None

    @staticmethod
    def create(morph: Morph, tx: Growable, *, key: jax.Array) -> TrainState:
        """The state before the first step, with arrays of its own (a donated step never eats the caller's).

        Args:
          morph: the morph to train.
          tx: from `growable`.
          key: a PRNG key, typed or raw uint32.
        """
        own = jax.tree.map(jnp.array, morph)
        zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
        return TrainState(zero(), zero(), zero(), zero(), own, tx.init(own), typed_key(key), Meters.zero(morph))

    def alone(self) -> TrainState:
        """The state of the host with its sites and nothing planted, its optimizer's too; see `beside`."""
        return self.replace(morph=self.morph.alone(), opt_state=self.opt_state.replace(seeds={}))

    def beside(self, before: TrainState) -> TrainState:
        """What became of `before.alone()`, with the seeds that `before` has."""
        opt_state = before.opt_state.replace(host=self.opt_state.host)
        return self.replace(morph=before.morph.replace(host=self.morph.host), opt_state=opt_state)

    def __repr__(self) -> str:
        if isinstance(self.step, jax.core.Tracer) or not isinstance(self.step, jax.Array | np.ndarray):
            return f"TrainState(step={self.step}, morph={self.morph!r})"
        return f"TrainState(step={int(self.step)}, epoch={int(self.epoch)}, {self.morph!r})"


def typed_key(key: Any) -> jax.Array:
    """`key` as a typed PRNG key of its own buffer; raw uint32 keys are wrapped, other things raise TypeError."""
    check_key(key)
    return jax.random.clone(key) if is_key(key) else jax.random.wrap_key_data(jnp.array(key))
