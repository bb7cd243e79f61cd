"""Tamiyo's heuristic controller (contract 25 and 26): grow where the gradient asks for it when the host stalls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .._checks import INT32, one_of, real, whole
from ..kasmina._pytree import Struct, pytree
from ..kasmina.blueprints import get_blueprint
from ..kasmina.spec import Spec
from ..kasmina.stages import LIVE
from ..protocol import Decision, Feedback, Report, SiteReport
from .keeping import Changes, Keeper, Watch, code, positive, pressing, sure

LONG_AGO = 1_000_000
UNMEASURED = 0.8
# In rotation; a blueprint that does not fit a site is passed over there.
BLUEPRINTS = ("lora", "conv_light", "mlp", "depthwise", "bottleneck", "se", "norm")


@pytree
class TamiyoState(Struct):
    """What Tamiyo remembers: numpy arrays over `S` sites, `L` slots and `B` blueprints; counts are in ticks.

    `watch`: per slot. `penalty` [B]; `blocked` [S, B] ticks for which a refused germination is not proposed again.
    `since_prune`, `since_growth`, `plateau`, `stable` (ticks in a row in the stable band) and `rotation` are int32
    scalars, `stabilised` a bool, `best` the score to beat and `loss` the last validation loss.
    """

    watch: Watch
    penalty: Any
    blocked: Any
    since_prune: Any
    since_growth: Any
    plateau: Any
    stable: Any
    stabilised: Any
    rotation: Any
    best: Any
    loss: Any


@dataclasses.dataclass(frozen=True)
class Tamiyo(Keeper):
    """Grows a seed when training has settled and stalls; keeps what contributes. No randomness.

    A tick is one call of `decide`. A germination is proposed when all of this holds: `after_prune` ticks since the
    last prune, none under way and nothing decided about another seed at this tick; the host has stabilised once
    (validation loss improving by `stable_low` to `stable_high` of itself for `stable_ticks` ticks in a row);
    `min_epoch <= report.epoch <= last_epoch`; a plateau of `plateau` ticks; `cooldown` ticks since the last
    germination; fewer than `max_live` seeds on trial; a free slot.

    A plateau counts the ticks since the score last beat the score to beat by more than `min_delta` points, which
    then becomes the score to beat: slow progress adds up, and a score near its ceiling stands still. It starts anew
    when a seed germinates, is fossilised or is pruned, and does not count ticks without a score.

    The site is that of the highest `gain`, among sites without a seed on trial where there are any: the decrease of
    the loss to first order, per unit of learning rate, if a zero linear layer grew there. It is in units of the loss
    at every site, hence compared as it is, not per parameter. Sites whose gain was not measured come last.

    Blueprints take turns. A prune costs its blueprint `penalty`, which halves at each tick; at `max_penalty` the
    blueprint is passed over. A refused germination is not proposed again at that site for `refusal_ticks`.

    Confidence is `(1 - 4**-x) * (1 - p / (3 * max_penalty))`, with `x` plateau ticks over `plateau` and `p` the
    penalty left, times 0.8 where the gain was not measured; urgency is `x / (x + 0.5)`. Of seeds that live, see
    `Keeper`.

    Args:
      blueprints: names of blueprints, in the order of their turns.
      configs: config of a blueprint by its name, e.g. `{"lora": {"rank": 4}}`.
      min_epoch, after_prune, plateau, min_delta, stable_ticks, stable_low, stable_high, cooldown, max_live,
        penalty, max_penalty, refusal_ticks: as above.
      last_epoch: nothing is germinated after it, so that every seed can end its trial within the run; None: no end.

    >>> Tamiyo(blueprints=("lora", "mlp"), max_live=1).plateau
    3
    """

    blueprints: tuple[str, ...] = BLUEPRINTS
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    min_epoch: int = 5
    after_prune: int = 5
    plateau: int = 3
    min_delta: float = 0.1
    stable_ticks: int = 3
    stable_low: float = -0.05
    stable_high: float = 0.03
    cooldown: int = 5
    max_live: int = 2
    penalty: float = 2.0
    max_penalty: float = 3.0
    refusal_ticks: int = 5
    last_epoch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blueprints", check_names(self.blueprints, self.configs))
        positive(self, "plateau", "stable_ticks", "max_live", whole=True)
        positive(self, "max_penalty")
        for name in ("min_epoch", "after_prune", "min_delta", "cooldown", "penalty", "refusal_ticks"):
            real(name, getattr(self, name), least=0)
        for name in ("min_epoch", "after_prune", "cooldown"):
            whole(name, getattr(self, name), 0)
        whole("refusal_ticks", self.refusal_ticks, 0, INT32)
        if self.last_epoch is not None:
            whole("last_epoch", self.last_epoch, None)
        for name in ("stable_low", "stable_high"):
            real(name, getattr(self, name))
        if not self.stable_low < self.stable_high:
            raise ValueError(f"stable_low={self.stable_low} must be below stable_high={self.stable_high}")

    def init(self, spec: Spec, key: Any = None) -> TamiyoState:
        """The first state. `key` is not used: the heuristic draws no random numbers.

        Raises:
          KeyError: an unknown blueprint. TypeError: an unknown config key. ValueError: no blueprint fits any site.
        """
        check_blueprints(spec, self.blueprints, self.configs)
        blueprints = len(self.blueprints)
        count = lambda value: np.array(value, np.int32)  # noqa: E731
        return TamiyoState(
            watch=self.watch(spec),
            penalty=np.zeros(blueprints, np.float32),
            blocked=np.zeros((len(spec.sites), blueprints), np.int32),
            since_prune=count(LONG_AGO),
            since_growth=count(LONG_AGO),
            plateau=count(0),
            stable=count(0),
            stabilised=np.array(False),
            rotation=count(0),
            best=np.array(-np.inf, np.float32),
            loss=np.array(np.nan, np.float32),
        )

    def decide(
        self, state: TamiyoState, report: Report, feedback: tuple[Feedback, ...] = ()
    ) -> tuple[tuple[Decision, ...], TamiyoState]:
        """Decisions for this report, and the next state. Same inputs, same answer; nothing given is changed."""
        watch, changes = self.observe(state.watch, report)
        state = self._follow(dataclasses.replace(state, watch=watch), report, changes)
        state = self._learn(state, feedback)
        decisions = self.judge(watch, report)
        if decisions or not self._may_grow(state, report):
            return decisions, state
        chosen = self._choose(state, report)
        if chosen is None:
            return (), state
        decision, turn = chosen
        turn = (turn + 1) % len(self.blueprints)
        return (decision,), _replace(state, rotation=turn, since_growth=0)

    def candidates(self, state: TamiyoState, report: Report) -> tuple[Decision, ...]:
        """What may be germinated next, likeliest first, whether or not its time has come: to be compiled ahead."""
        ranked = sorted(self._usable(state, report), key=lambda entry: entry[0])
        names = [(site.path, self.blueprints[turn]) for _, site, turn in ranked]
        return tuple(Decision("germinate", path, None, name, dict(self.configs.get(name, {}))) for path, name in names)

    def _follow(self, state: TamiyoState, report: Report, changes: Changes) -> TamiyoState:
        """Counters, plateau, stability and penalties, brought up to this report."""
        changed = bool(changes.germinated or changes.fossilised or changes.pruned)
        measured = math.isfinite(report.score)
        better = measured and report.score > float(state.best) + self.min_delta
        plateau = 0 if changed or better else int(state.plateau) + measured
        loss, last = float(np.float32(report.loss)), float(state.loss)
        gain = (last - loss) / abs(last) if math.isfinite(last - loss) and last != 0 else math.nan
        stable = int(state.stable) + 1 if self.stable_low <= gain <= self.stable_high else 0
        penalty = np.array(state.penalty) / 2
        for name in changes.pruned:
            penalty[[code(blueprint) == name for blueprint in self.blueprints]] += self.penalty
        return _replace(
            state,
            penalty=penalty,
            blocked=np.maximum(np.asarray(state.blocked) - 1, 0),
            since_prune=0 if changes.pruned else min(int(state.since_prune) + 1, LONG_AGO),
            since_growth=0 if changes.germinated else min(int(state.since_growth) + 1, LONG_AGO),
            plateau=plateau,
            stable=stable,
            stabilised=bool(state.stabilised) or stable >= self.stable_ticks,
            best=report.score if better else state.best,
            loss=report.loss,
        )

    def _learn(self, state: TamiyoState, feedback: tuple[Feedback, ...]) -> TamiyoState:
        """A refused germination is not proposed again there for a while, and another may be proposed at once."""
        rows = {int(name): row for row, name in enumerate(np.asarray(state.watch.sites))}
        blocked, refused = np.array(state.blocked), False
        for answer in feedback:
            decision = answer.decision
            row = rows.get(code(decision.site))
            if decision.action != "germinate" or answer.outcome != "refused":
                continue
            refused = True
            if row is not None and decision.blueprint in self.blueprints:
                blocked[row, self.blueprints.index(decision.blueprint)] = self.refusal_ticks
        return _replace(state, blocked=blocked, since_growth=LONG_AGO if refused else state.since_growth)

    def _may_grow(self, state: TamiyoState, report: Report) -> bool:
        live = [seed for seed in report.seeds if seed.stage in LIVE]
        return (
            math.isfinite(report.score)
            and self.min_epoch <= report.epoch <= (math.inf if self.last_epoch is None else self.last_epoch)
            and bool(state.stabilised)
            and int(state.plateau) >= self.plateau
            and int(state.since_prune) >= self.after_prune
            and int(state.since_growth) >= self.cooldown
            and len(live) < self.max_live
            and not any(seed.pruning for seed in live)
        )

    def _choose(self, state: TamiyoState, report: Report) -> tuple[Decision, int] | None:
        """The germination to propose and the index of its blueprint; None where nothing can grow."""
        usable = self._usable(state, report)
        live = {seed.site for seed in report.seeds if seed.stage in LIVE}
        if not usable:
            return None
        _, site, turn = min(usable, key=lambda entry: entry[0])
        name, penalty = self.blueprints[turn], float(state.penalty[turn])
        known = math.isfinite(site.gain)
        x = int(state.plateau) / self.plateau
        confidence = sure(x) * (1 - penalty / (3 * self.max_penalty)) * (1.0 if known else UNMEASURED)
        gain = f"gain {site.gain:.3g} is the highest" if known else "its gain was not measured, nor that of any other"
        others = sum((other.path in live) == (site.path in live) for _, other, _ in usable)
        kind = "with" if site.path in live else "without"
        reason = (
            f"plateau of {int(state.plateau)} ticks at {float(state.best):.2f}, {gain} of {others} free site(s) {kind} "
            f"a seed on trial, {name} is next (penalty {penalty:.2g})"
        )
        config = dict(self.configs.get(name, {}))
        urgency = pressing(x)
        decision = Decision(
            "germinate", site.path, None, name, config, confidence=confidence, urgency=urgency, reason=reason
        )
        return decision, turn

    def _usable(self, state: TamiyoState, report: Report) -> list[tuple[Any, SiteReport, int]]:
        """Sites that can take a seed, each with its rank and the index of the blueprint whose turn it is there."""
        rows = {int(name): row for row, name in enumerate(np.asarray(state.watch.sites))}
        live = {seed.site for seed in report.seeds if seed.stage in LIVE}
        usable = []
        for order, site in enumerate(report.sites):
            row = rows.get(code(site.path))
            turn = None if row is None else next(self._turns(state, site, row), None)
            if turn is not None and site.free_slots:
                usable.append((_rank(site, site.path in live, order), site, turn))
        return usable

    def _turns(self, state: TamiyoState, site: SiteReport, row: int) -> Iterator[int]:
        """Blueprints that may grow at the site, the one whose turn it is first."""
        for step in range(len(self.blueprints)):
            index = (int(state.rotation) + step) % len(self.blueprints)
            fits = self.blueprints[index] in site.fitting
            if fits and state.penalty[index] < self.max_penalty and not state.blocked[row, index]:
                yield index


def check_names(blueprints: Any, configs: Mapping[str, Any]) -> tuple[str, ...]:
    """Blueprint names as a tuple. ValueError: none, one twice, a config for another. KeyError: an unknown one.

    TypeError: configs that are no mappings.
    """
    several = not isinstance(blueprints, str) and isinstance(blueprints, Iterable)
    names = tuple(blueprints) if several else (blueprints,)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"blueprints must be one or more different names, got {blueprints!r}")
    one_of("configs", configs, Mapping, '{"lora": {"rank": 4}}')
    if extra := [name for name in configs if name not in names]:
        raise ValueError(f"configs has {extra[0]!r}, which is not among the blueprints {', '.join(names)}")
    for name in names:
        get_blueprint(name)
        one_of(f"configs[{name!r}]", configs.get(name, {}), Mapping, '{"rank": 4}')
    return names


def check_blueprints(spec: Spec, names: tuple[str, ...], configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise before a run starts if a name or config key is unknown, or none of the blueprints fits any site."""
    found = [get_blueprint(name) for name in names]
    for blueprint in found:
        blueprint.full_config(configs.get(blueprint.name, {}))
    if spec.sites and not any(blueprint.fits(site) for blueprint in found for site in spec.sites):
        kinds = ", ".join(sorted({site.kind for site in spec.sites}))
        raise ValueError(f"none of the blueprints {', '.join(names)} fits any site of this model (kinds: {kinds})")


def _rank(site: SiteReport, taken: bool, order: int) -> tuple[bool, bool, float, int]:
    """Sort key: measured sites first, then those without a seed on trial, then by gain, then in the model's order."""
    known = math.isfinite(site.gain)
    return not known, taken, -site.gain if known else 0.0, order


def _replace(state: TamiyoState, **values: Any) -> TamiyoState:
    """The state with new values, each in the dtype of the old one."""
    arrays: dict[str, Any] = {
        name: np.array(value, np.asarray(getattr(state, name)).dtype) for name, value in values.items()
    }
    return dataclasses.replace(state, **arrays)
