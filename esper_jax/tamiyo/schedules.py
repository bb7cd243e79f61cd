"""Controllers that do not look before they grow: a fixed plan, and chance. They are the baselines to beat.

Both keep or prune their seeds by the same rule as Tamiyo (see `Keeper`), so a comparison is about where and when to
grow alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._checks import real, whole
from ..kasmina._pytree import Struct, pytree
from ..kasmina.blueprints import get_blueprint
from ..kasmina.spec import Spec
from ..kasmina.stages import LIVE
from ..protocol import Decision, Feedback, Report
from .heuristic import BLUEPRINTS, check_blueprints, check_names
from .keeping import Keeper, Watch, positive

Germination = tuple[str, str, Mapping[str, Any]]


@pytree
class FixedState(Struct):
    """`watch` per slot, and which germinations of the plan have been proposed (bool, in the plan's order)."""

    watch: Watch
    done: Any


@pytree
class RandomState(Struct):
    """`watch` per slot, the key (uint32 words) and the count of ticks from which all random numbers follow."""

    watch: Watch
    key: Any
    ticks: Any


@dataclasses.dataclass(frozen=True)
class FixedSchedule(Keeper):
    """Germinates given blueprints at given sites and epochs.

    A germination is proposed once, at the first report whose epoch is at or past its own, with confidence and urgency
    1: the plan is an order, not a guess. One that is refused (no free slot, say) is not tried again.

    Args:
      plan: `{epoch: [(site, blueprint, config), ...]}`; the config may be left out.

    >>> FixedSchedule({10: [("Dense_0", "lora", {"rank": 4})]}, keep="always").keep
    'always'
    """

    plan: Mapping[int, Sequence[Any]] = dataclasses.field(hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.plan, Mapping):
            raise TypeError(f"plan must be {{epoch: [(site, blueprint, config), ...]}}, got {self.plan!r}")
        plan = {}
        for epoch, entries in self.plan.items():
            if isinstance(epoch, bool) or not isinstance(epoch, int | np.integer) or epoch < 0:
                raise ValueError(f"an epoch of the plan must be a whole number of 0 or more, got {epoch!r}")
            if not isinstance(entries, Iterable):
                raise ValueError(f"epoch {epoch} of the plan must be [(site, blueprint, config), ...], got {entries!r}")
            plan[int(epoch)] = tuple(_entry(epoch, entry) for entry in entries)
        object.__setattr__(self, "plan", plan)

    def init(self, spec: Spec, key: Any = None) -> FixedState:
        """The first state. `key` is not used.

        Raises:
          KeyError: an unknown site or blueprint. TypeError: an unknown config key. ValueError: one that does not fit.
        """
        entries = self._entries()
        for epoch, (site, name, config) in entries:
            place, blueprint = spec.by_path.get(site), get_blueprint(name)
            if place is None:
                raise KeyError(f"epoch {epoch} of the plan names site {site!r}; known: {', '.join(spec.by_path)}")
            blueprint.full_config({key: value for key, value in config.items() if key != "blend"})
            if not blueprint.fits(place):
                kinds = ", ".join(blueprint.kinds)
                raise ValueError(f"epoch {epoch} of the plan: {name!r} is made for {kinds}; {site!r} is {place.kind}")
        return FixedState(self.watch(spec), np.zeros(max(len(entries), 1), bool))

    def decide(
        self, state: FixedState, report: Report, feedback: tuple[Feedback, ...] = ()
    ) -> tuple[tuple[Decision, ...], FixedState]:
        """Decisions for this report, and the next state."""
        watch, _ = self.observe(state.watch, report)
        done, decisions = np.array(state.done), list(self.judge(watch, report))
        for index, (epoch, (site, name, config)) in enumerate(self._entries()):
            if report.epoch >= epoch and not done[index]:
                done[index] = True
                reason = f"the plan germinates {name} there at epoch {epoch}, this is epoch {report.epoch}"
                decisions.append(Decision("germinate", site, None, name, dict(config), reason=reason))
        return tuple(decisions), FixedState(watch, done)

    def _entries(self) -> list[tuple[int, Germination]]:
        return [(epoch, entry) for epoch in sorted(self.plan) for entry in self.plan[epoch]]


@dataclasses.dataclass(frozen=True)
class RandomSchedule(Keeper):
    """Germinates a random blueprint at a random site at random times: the honest baseline.

    From `min_epoch` to `last_epoch` (None: no end), at each tick with probability `rate`, as long as fewer than
    `max_live` seeds are on trial: a site is drawn evenly among those with a free slot and a blueprint that fits, then
    a blueprint evenly among those that fit there. Three numbers are drawn per tick from Philox, seeded by the key and
    the count of ticks, and used or not; so what happens to seeds does not shift later draws. Confidence and urgency
    are 1: chance has no doubt.

    Args:
      blueprints: names of blueprints.
      configs: config of a blueprint by its name.
      rate: probability of a germination at a tick.
      min_epoch: the first epoch at which one may happen.
      last_epoch: the last one.
      max_live: how many seeds may be on trial at once.

    >>> RandomSchedule(blueprints=("lora",), rate=0.2).rate
    0.2
    """

    blueprints: tuple[str, ...] = BLUEPRINTS
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    rate: float = 0.1
    min_epoch: int = 5
    last_epoch: int | None = None
    max_live: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blueprints", check_names(self.blueprints, self.configs))
        real("rate", self.rate, least=0, most=1)
        whole("min_epoch", self.min_epoch, 0)
        if self.last_epoch is not None:
            whole("last_epoch", self.last_epoch, None)
        positive(self, "max_live", whole=True)

    def init(self, spec: Spec, key: Any) -> RandomState:
        """The first state; `key` is a uint32 array (or one whole number), of which every draw is a function.

        Raises:
          KeyError: an unknown blueprint. TypeError: an unknown config key. ValueError: no blueprint fits any site.
        """
        check_blueprints(spec, self.blueprints, self.configs)
        return RandomState(self.watch(spec), np.array(key, np.uint32).reshape(-1), np.array(0, np.int32))

    def decide(
        self, state: RandomState, report: Report, feedback: tuple[Feedback, ...] = ()
    ) -> tuple[tuple[Decision, ...], RandomState]:
        """Decisions for this report, and the next state."""
        watch, _ = self.observe(state.watch, report)
        ticks = int(state.ticks)
        decisions = self.judge(watch, report)
        happens, where, what = _draws(np.asarray(state.key), ticks)
        fitting = {
            site.path: [name for name in self.blueprints if name in site.fitting]
            for site in report.sites
            if site.free_slots
        }
        sites = [path for path, names in fitting.items() if names]
        live = sum(seed.stage in LIVE for seed in report.seeds)
        in_time = self.min_epoch <= report.epoch <= (math.inf if self.last_epoch is None else self.last_epoch)
        if in_time and live < self.max_live and happens < self.rate and sites:
            site = sites[int(where * len(sites))]
            name = fitting[site][int(what * len(fitting[site]))]
            config = dict(self.configs.get(name, {}))
            reason = f"chance: {happens:.3f} was drawn at tick {ticks}, below the rate of {self.rate:g}"
            decisions += (Decision("germinate", site, None, name, config, reason=reason),)
        return decisions, RandomState(watch, np.array(state.key, np.uint32), np.array(ticks + 1, np.int32))


def _draws(key: np.ndarray, ticks: int) -> tuple[float, float, float]:
    """Three numbers in [0, 1) from raw Philox words, whose stream is the same in every version of NumPy."""
    words = np.random.Philox(np.random.SeedSequence([*map(int, key), ticks])).random_raw(3)
    first, second, third = (int(word >> np.uint64(11)) / 2.0**53 for word in words)
    return first, second, third


def _entry(epoch: int, entry: Any) -> Germination:
    """A plan's entry as (site, blueprint, config); ValueError for anything else."""
    parts = tuple(entry) if isinstance(entry, tuple | list) else ()
    site, name, config = (*parts, {}) if len(parts) == 2 else parts if len(parts) == 3 else (None, None, None)
    if not isinstance(site, str) or not isinstance(name, str) or not isinstance(config, Mapping):
        raise ValueError(f"epoch {epoch} of the plan: expected (site, blueprint[, config]), got {entry!r}")
    return site, name, dict(config)
