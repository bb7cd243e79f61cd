"""Between the library's own words and the wire's: packing questions and answers, and checking what comes.

Every value passes to the bit, NaN and infinities included; what has no place on the wire is a `WireError`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np

from ..kasmina.blueprints import make_plant, seed_shapes
from ..kasmina.spec import Site, Spec
from ..kasmina.stages import Stage
from ..protocol import Decision, Feedback, Report, SeedReport, SiteReport
from .wire import (
    Answer,
    DecisionLine,
    FeedbackLine,
    L,
    Leaf,
    Line,
    PairLine,
    Question,
    Real,
    ReportLine,
    SeedReportLine,
    SiteLine,
    SiteReportLine,
    WireError,
    decode,
    encode,
    printable,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A question in the library's own terms, for the service; `leaves` is the controller's state or None."""

    id: str
    spec: Spec
    key: np.ndarray
    leaves: list[Leaf] | None
    report: Report
    feedback: tuple[Feedback, ...]


def ask(
    spec: Spec, key: Any, leaves: list[Leaf] | None, report: Report, feedback: Sequence[FeedbackLine]
) -> tuple[str, bytes]:
    """A question's id and its bytes.

    Args:
      spec: the sites and slots; its plants are not sent, the report tells of seeds.
      key: uint32 words.
      leaves: the controller's state from its last answer; None where it has not begun.
      report: what `decide` was given.
      feedback: what is owed, as `feedback_lines` makes it.
    """
    question = Question(
        sites=[_site_line(site) for site in spec.sites],
        slots=spec.slots,
        key=[int(word) for word in np.asarray(key).reshape(-1)],
        state=leaves,
        report=_report_line(report),
        feedback=list(feedback),
    )
    name = hashlib.blake2b(encode(question), digest_size=16).hexdigest()
    return name, encode(msgspec.structs.replace(question, id=name))


def understand(question: Question) -> Task:
    """The question in the library's own terms. WireError where its parts do not fit each other."""
    sites = tuple(
        Site(**{**_fields(line), "in_shape": tuple(line.in_shape), "out_shape": tuple(line.out_shape)})
        for line in question.sites
    )
    if not sites or len({site.path for site in sites}) < len(sites):
        raise WireError("a question needs one site at least, and each site once")
    key = np.array(question.key, np.uint32)
    feedback = tuple(
        Feedback(**{**_fields(line), "decision": decision(line.decision), "seconds": math.nan})
        for line in question.feedback
    )
    return Task(question.id, Spec(sites, question.slots), key, question.state, _report(question.report), feedback)


def answer(task_id: str, decisions: Sequence[Decision], state: Any, controller: str, mock: bool) -> bytes:
    """An answer's bytes; WireError where a controller's decision or state has no place on the wire."""
    lines = [decision_line(each) for each in decisions]
    line = Answer(
        v=1, question=task_id, decisions=lines, state=leaves_of(state), controller=controller[:2000], mock=mock
    )
    return encode(_converted(line, Answer, "the hosted controller gave an answer that has no place on the wire"))


def verified(data: bytes, question: str, spec: Spec, max_parameters: int) -> Answer:
    """The answer in `data`, after every check that needs no model.

    Args:
      data: bytes from anywhere.
      question: the id that must be answered.
      spec: the run's sites and slots.
      max_parameters: the largest seed that may be germinated.

    Raises:
      WireError: not an answer, an answer to something else, a state whose arrays are not whole, or a decision about an
      unknown site, slot or blueprint, or one that could not be carried out.
    """
    found = decode(data, Answer)
    if found.question != question:
        raise WireError(f"it answers question {found.question}, asked was {question}")
    check_leaves(found.state)
    for index, line in enumerate(found.decisions):
        try:
            _check_decision(line, spec, max_parameters)
        except WireError as error:
            raise WireError(f"decision {index} ({line.action}): {error}") from None
    return found


def decision(line: DecisionLine) -> Decision:
    """The `Decision`, its reason without control characters."""
    values = _fields(line)
    return Decision(**{**values, "config": dict(line.config), "reason": printable(line.reason)})


def decision_line(decision: Decision) -> DecisionLine:
    """A `Decision` for the wire; WireError where one of its values has no place there."""
    values = {field.name: _plain(getattr(decision, field.name)) for field in dataclasses.fields(decision)}
    return _converted(
        {**values, "reason": printable(str(values["reason"]))[:2000]}, DecisionLine, f"decision {decision}"
    )


def feedback_lines(feedback: Sequence[Feedback]) -> list[FeedbackLine]:
    """What is posted back of each decision: outcome, reason and the measured scores."""
    return [
        FeedbackLine(
            decision=decision_line(each.decision),
            outcome="applied" if each.outcome == "applied" else "refused",
            reason=printable(each.reason)[:20_000],
            score_before=_real(each.score_before),
            score_after=_real(each.score_after),
            contribution=_real(each.contribution),
        )
        for each in feedback
    ]


def leaves_of(state: Any) -> list[Leaf]:
    """A pytree of numpy arrays as leaves. WireError for a leaf that is no array of numbers."""
    leaves = []
    for path, value in jax.tree_util.tree_flatten_with_path(state)[0]:
        array, place = np.asarray(value), jax.tree_util.keystr(path)
        line = {"path": place, "dtype": str(array.dtype), "shape": list(array.shape), "data": _bytes(array)}
        leaves.append(_converted(line, Leaf, f"the state's leaf {place or 'itself'}"))
    return leaves


def check_leaves(leaves: Sequence[Leaf]) -> None:
    """WireError where a leaf's bytes are not as many as its dtype and shape need."""
    for leaf in leaves:
        needed = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if len(leaf.data) != needed:
            raise WireError(f"the state's leaf {leaf.path} has {len(leaf.data)} bytes, its shape needs {needed}")


def state_of(leaves: Sequence[Leaf], template: Any) -> Any:
    """The leaves in the structure of `template`, a controller's first state. WireError where they do not fit it."""
    check_leaves(leaves)
    wanted, structure = jax.tree_util.tree_flatten_with_path(template)
    have = [(leaf.path, leaf.dtype, tuple(leaf.shape)) for leaf in leaves]
    need = [(jax.tree_util.keystr(path), str(np.asarray(v).dtype), np.shape(v)) for path, v in wanted]
    if have != need:
        odd = next((pair for pair in zip(have, need, strict=False) if pair[0] != pair[1]), (len(have), len(need)))
        raise WireError(f"the state is not this controller's: found {odd[0]}, expected {odd[1]}")
    arrays = [_array(leaf) for leaf in leaves]
    return jax.tree_util.tree_unflatten(structure, arrays)


def _check_decision(line: DecisionLine, spec: Spec, max_parameters: int) -> None:
    site = spec.by_path.get(line.site)
    if site is None:
        raise WireError(f"there is no site {printable(line.site)!r}")
    if line.slot is not None and line.slot >= spec.slots:
        raise WireError(f"site {line.site!r} has the slots 0 to {spec.slots - 1}, got {line.slot}")
    if line.action == "set_alpha" and line.alpha is None:
        raise WireError("it names no alpha")
    if line.action != "germinate":
        if line.slot is None:
            raise WireError("it names no slot")
        return
    if line.stored is not None and line.blueprint is None:
        return  # what it is, the run's own library knows
    config = dict(line.config)
    blend = config.pop("blend", None) or "add"
    try:  # a blueprint's own code meets settings from outside here: whatever it raises, the answer is refused
        plant = make_plant(site, line.slot or 0, str(line.blueprint), config, str(blend), False)
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(seed_shapes(plant, site))]
    except Exception as error:
        said = error.args[0] if error.args else error
        raise WireError(f"{type(error).__name__}: {printable(str(said))[:300]}") from None
    if sum(sizes) > max_parameters:
        raise WireError(f"a seed of {sum(sizes)} parameters is above max_parameters={max_parameters}")


def _report_line(report: Report) -> ReportLine:
    return ReportLine(
        epoch=report.epoch,
        step=report.step,
        train_loss=_real(report.train_loss),
        loss=_real(report.loss),
        score=_real(report.score),
        sites=[_line(site, SiteReportLine) for site in report.sites],
        seeds=[_line(seed, SeedReportLine) for seed in report.seeds],
        interactions=[
            PairLine(first=(first[0], int(first[1])), second=(second[0], int(second[1])), value=_real(value))
            for (first, second), value in report.interactions.items()
        ],
    )


def _report(line: ReportLine) -> Report:
    sites = tuple(
        SiteReport(**{**_fields(site), "free_slots": tuple(site.free_slots), "fitting": tuple(site.fitting)})
        for site in line.sites
    )
    seeds = tuple(SeedReport(**{**_fields(seed), "stage": Stage(seed.stage)}) for seed in line.seeds)
    pairs = {(pair.first, pair.second): float(pair.value) for pair in line.interactions}
    losses = (float(line.train_loss), float(line.loss), float(line.score))
    return Report(line.epoch, line.step, *losses, sites, seeds, pairs)


def _site_line(site: Site) -> SiteLine:
    return _line(site, SiteLine)


def _line(value: Any, kind: type[L]) -> L:
    """A dataclass as the line with those of its fields that travel."""
    reals = _reals(kind)
    fields = {
        field.name: _real(item) if field.name in reals else _plain(item)
        for field in dataclasses.fields(value)
        if field.name in kind.__struct_fields__
        for item in [getattr(value, field.name)]
    }
    return kind(**fields)


def _fields(line: Line) -> dict[str, Any]:
    reals = _reals(type(line))
    return {name: float(item) if name in reals else item for name, item in msgspec.structs.asdict(line).items()}


@functools.cache
def _reals(kind: type[Line]) -> frozenset[str]:
    return frozenset(field.name for field in msgspec.structs.fields(kind) if field.type == Real)


def _real(value: Any) -> Real:
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy and JAX scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, Stage) else value


def _converted(value: Any, kind: type[L], what: str) -> L:
    """`value` checked as `kind`; msgspec checks what it decodes or converts, not what a constructor is given."""
    try:
        return msgspec.convert(value, kind, from_attributes=True)
    except (msgspec.ValidationError, TypeError) as error:
        raise WireError(f"{what}: {error}") from None


def _bytes(array: np.ndarray) -> bytes:
    if sys.byteorder == "big":
        array = array.byteswap()
    return np.ascontiguousarray(array).tobytes()


def _array(leaf: Leaf) -> np.ndarray:
    array = np.frombuffer(leaf.data, np.dtype(leaf.dtype)).reshape(leaf.shape)
    return array.byteswap() if sys.byteorder == "big" else array.copy()
