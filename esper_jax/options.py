"""The options of `esper-jax train`: what each means, which values can work, and how a run directory keeps them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types
import typing
from collections.abc import Collection
from typing import Any, Literal

import numpy as np

from ._checks import INT32
from ._files import new_text
from .kasmina import get_blueprint
from .oona import Address
from .tolaria import peers
from .tolaria.swap import check_swap

CONFIG = "config.json"
ALWAYS = (
    *("task", "epochs", "seed", "controller", "growth", "swap", "slots", "blueprints", "where"),
    *("training_ticks", "tempo", "strict", "batch_size", "learning_rate", "schedule"),
)
"""Options that shape a run, and that every version has written; others may be newer than it, and have their default."""
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a growing network on a task, and its host alone equally long.

    Prints each event in a seed's life with its reason, ends with a table, and writes a run directory (events.jsonl,
    checkpoints, summary.json) and a figure.
    """

    task: str = "digits"
    """Which problem: digits, mnist1d, mnist1d-cnn or charlm."""
    run_dir: pathlib.Path | None = None
    """Where everything goes; by default runs/TASK-SEED (a new one beside it if that is taken)."""
    epochs: int | None = None
    """Passes over the training data; by default the task's own."""
    seed: int = 0
    """Shapes everything random: initial weights, data order, seeds' weights."""
    controller: Literal["tamiyo", "fixed", "random", "none"] = "tamiyo"
    """Who decides when and where to grow: the heuristic, one seed every ten epochs, chance, or nobody."""
    service: str | None = None
    """Ask the controller behind this URL instead (esper-jax tamiyo serve), with the token in ESPER_TAMIYO_TOKEN."""
    service_lag: int = 1
    """Epochs from a question to the use of its answer; where epochs are short, a service may need several."""
    growth: Literal["lean", "planted"] = "lean"
    """lean: an empty slot costs nothing and a germination compiles a new program; planted: nothing recompiles."""
    swap: str = "epoch"
    """When a grown program, compiled in the background, takes over: epoch, a number of steps, asap, or now."""
    sharding: Literal["dp", "fsdp"] | None = None
    """Train on all devices: dp keeps the parameters whole on each, fsdp divides them; by default one device."""
    seed_sharding: Literal["host", "replicated", "auto"] = "host"
    """How seeds are divided: as the host is at their site, not at all, or only those that are large."""
    distributed: bool = False
    """This is one of several processes of a job; SLURM, Open MPI, a TPU pod or Kubernetes say which, or the next
    three."""
    coordinator: str | None = None
    """host:port of the first process, where nothing else tells."""
    processes: int | None = None
    """How many processes the job has, where nothing else tells."""
    process: int | None = None
    """Which of them this is, from 0, where nothing else tells."""
    max_rollbacks: int = 10
    """More rollbacks than these to a last good state end the run, with exit status 1."""
    compile_cache: pathlib.Path | None = None
    """Keep compiled programs in this directory, so that a later run finds them there."""
    blueprints: tuple[str, ...] = ()
    """Which seeds may grow; by default those that suit the task."""
    where: str | None = None
    """Regular expression of the sites that may grow; by default the task's own."""
    slots: int = 2
    """Places for seeds at a site."""
    training_ticks: int = 10
    """Epochs a seed trains in isolation before it may be blended in (gate G2)."""
    tempo: int = 5
    """Epochs that blending takes."""
    strict: bool = False
    """Strict gates: a seed must improve the score by half a point while training and contribute a full point."""
    batch_size: int | None = None
    """Examples in a batch; by default the task's own."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; by default the task's own."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate of the host over the run; seeds always have the constant one on their own clock."""
    baseline: bool = True
    """Also train the host alone, equally long, and compare."""
    figure: bool = True
    """Draw figure.png (needs matplotlib)."""
    quiet: bool = False
    """No progress display."""
    oona: str | None = None
    """Publish the run's events on this Redis server as well, e.g. redis://localhost:6379/0 (watch it from anywhere)."""
    oona_optional: bool = False
    """Train without that server, with one warning, where it cannot be reached at the start."""
    tensorboard: bool = False
    """Write the run's numbers for TensorBoard too, into RUN_DIR/tensorboard."""
    prometheus: int | None = None
    """Serve the newest numbers for Prometheus at this port of the loopback interface."""
    wandb: str | None = None
    """Log to this project of Weights & Biases too."""
    resume: pathlib.Path | None = None
    """Go on with the run in that directory, with the options it was started with; those given now take the place of
    recorded ones where they say where events go (oona, oona-optional, tensorboard, prometheus, wandb), of quiet,
    figure, max-rollbacks, sharding and seed-sharding. With which processes it goes on is always said anew (distributed
    and what belongs to it). All others are ignored."""

    def check(self) -> None:
        """Raise ValueError or KeyError, in one sentence, for a value that cannot work."""
        for name in ("epochs", "batch_size", "slots", "training_ticks", "tempo"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= INT32:
                rule = "1 or more" if value < 1 else f"{INT32} or less"
                raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value}")
        swap_of(self.swap)
        if self.max_rollbacks < 0:
            raise ValueError(f"--max-rollbacks must be 0 or more, got {self.max_rollbacks}")
        if not self.distributed and any(v is not None for v in (self.coordinator, self.processes, self.process)):
            raise ValueError("--coordinator, --processes and --process need --distributed")
        if self.learning_rate is not None and not 0 < self.learning_rate < LARGEST:
            raise ValueError(f"--learning-rate must be above 0 and finite in float32, got {self.learning_rate}")
        if self.service_lag < 0:
            raise ValueError(f"--service-lag must be 0 or more, got {self.service_lag}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {self.seed}")
        for name in self.blueprints:
            get_blueprint(name)


def swap_of(text: str) -> str | int:
    """The boundary that `--swap` names; ValueError for another."""
    try:
        return check_swap(int(text) if text.lstrip("-").isdigit() else text)
    except ValueError as error:
        raise ValueError(f"--swap: {error}") from None


def read_config(run_dir: pathlib.Path) -> Train:
    """The options of the run in that directory.

    Raises:
      FileNotFoundError: there is none, in one sentence. ValueError: the file is not what `write_config` wrote.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} holds no run ({CONFIG} is missing); give the directory that train printed")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); restore it from a copy") from None
    hints = typing.get_type_hints(Train)
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__} and no options; restore it from a copy")
    for name, value in data.items():
        if name not in hints:
            raise ValueError(
                f"{path} has the option {name!r}, which this esper-jax does not know; a later one wrote it"
            )
        if not _fits(value, hints[name]):
            raise ValueError(f"{path} has {name} = {value!r}, which cannot be; restore it from a copy")
    if missing := [name for name in ALWAYS if name not in data]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; restore it from a copy")
    options = Train(**{**data, "run_dir": run_dir, "resume": run_dir, "blueprints": tuple(data.get("blueprints", ()))})
    cache = options.compile_cache
    return dataclasses.replace(options, compile_cache=None if cache is None else pathlib.Path(cache))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON can be an option of that type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, list) and all(isinstance(one, inner[0]) for one in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (int, str, bool):
        return type(value) is hint
    return isinstance(value, str) if hint is pathlib.Path else value is None


REPLACEABLE = (
    *("oona", "oona_optional", "tensorboard", "prometheus", "wandb"),
    *("quiet", "figure", "max_rollbacks", "sharding", "seed_sharding"),
)
"""Options of a run that a resume may give anew: none of them changes what is trained."""
JOB = ("distributed", "coordinator", "processes", "process")
"""Options that a resume gives anew in any case: it may go on with other processes."""


def resumed(options: Train, named: Collection[str] = ()) -> Train:
    """The options of the run that `options` resumes, with those of `REPLACEABLE` that `options` itself gives.

    Those are the ones that differ from their default, and those `named`: a default may be said too.

    Raises:
      FileNotFoundError: there is no run, in one sentence.
    """
    assert options.resume is not None
    defaults = Train()
    given = {name: getattr(options, name) for name in REPLACEABLE}
    given = {name: value for name, value in given.items() if name in named or value != getattr(defaults, name)}
    job = {name: getattr(options, name) for name in JOB}
    return dataclasses.replace(read_config(options.resume), **given, **job)


def write_config(options: Train, run_dir: pathlib.Path) -> None:
    """Keep the options of a new run in its directory; ValueError where there is a run, or it cannot be written."""
    if not peers.first():
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        data = {**dataclasses.asdict(options), "run_dir": str(run_dir)}
        data["compile_cache"] = None if options.compile_cache is None else str(options.compile_cache)
        data["oona"] = None if options.oona is None else Address.of(options.oona).bare
        del data["resume"]
        new_text(run_dir / CONFIG, json.dumps(data, indent=1) + "\n")
    except FileExistsError:
        raise ValueError(
            f"{run_dir} already holds a run; resume it with --resume {run_dir}, or give another --run-dir"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot write to the run directory {run_dir}: {error.strerror or error}") from None
