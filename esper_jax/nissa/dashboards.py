"""Sinks for other people's dashboards: TensorBoard, Prometheus, Weights & Biases. Each needs its package installed.

All show the same numbers, those of `metrics.METRICS`. They are slow by nature: `Tolaria(sinks=[...])` puts a thread and
a bounded queue before each.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

from .._checks import line, place, whole
from .event import DROPPABLE, Event, Kind
from .metrics import METRICS, samples
from .sinks import _Closing

MODES = ("online", "offline", "disabled", "shared")
"""The modes of `wandb.init`."""


def _needed(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'this sink needs the package {package}, which is not installed: pip install "esper_jax[{extra}]"'
        ) from error


class TensorBoardSink(_Closing):
    """Writes scalars and texts for TensorBoard with `tensorboardX`, by train step.

    A resumed run hides the points after the checkpoint it went on from.

    Args:
      directory: the log directory, e.g. `run/tensorboard`.
    """

    slow = True

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        place("directory", directory)
        self.path = pathlib.Path(directory)
        self._module = _needed("tensorboardX", "tensorboardX", "sinks")
        self._writer: Any = None

    def open(self) -> None:
        """Make the directory and a file in it."""
        self._open(None)

    def emit(self, event: Event) -> None:
        """Write the event's numbers, or its sentence."""
        if event.kind == Kind.RESUMED:
            self.close()
            self._open(event.step + 1)
        elif self._writer is None:
            self._open(None)
        for sample in samples(event):
            self._writer.add_scalar(sample.path, sample.value, event.step, walltime=event.time)
        if event.kind not in DROPPABLE:
            self._writer.add_text(str(event.kind), event.message or str(event.kind), event.step, walltime=event.time)

    def close(self) -> None:
        """Write out and close the file; a later event opens another one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _open(self, purge_step: int | None) -> None:
        if self._writer is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._writer = self._module.SummaryWriter(str(self.path), purge_step=purge_step)


class PrometheusSink(_Closing):
    """Serves the newest numbers at `http://HOST:PORT/metrics` for Prometheus to fetch, and counts of events.

    Gauges are named `esper_<metric>`; a seed's disappear with it. Counters: `esper_events_total{kind}`,
    `esper_transitions_total{stage}` and `esper_decisions_total{action,outcome}`.

    Args:
      port: 0 takes any free one; `url` says which.
      host: the loopback interface unless you say otherwise: there is no password on it.
    """

    slow = True

    def __init__(self, port: int = 9464, *, host: str = "127.0.0.1") -> None:
        whole("port", port, 0, 65535)
        line("host", host)
        prometheus = self._module = _needed("prometheus_client", "prometheus-client", "sinks")
        self.host, self.port = host, port
        self.registry = prometheus.CollectorRegistry()
        options = {"registry": self.registry}
        self._gauges = {
            metric: prometheus.Gauge(
                f"esper_{metric.name}", f"{metric.about} [{metric.unit or 'no unit'}]", metric.labels, **options
            )
            for metric in METRICS
        }
        self._events = prometheus.Counter("esper_events", "events by kind", ["kind"], **options)
        self._moves = prometheus.Counter("esper_transitions", "seeds that entered a stage", ["stage"], **options)
        self._decisions = prometheus.Counter("esper_decisions", "decisions", ["action", "outcome"], **options)
        self._shown: set[tuple[Any, tuple[str, ...]]] = set()
        self._server: tuple[Any, threading.Thread] | None = None

    @property
    def url(self) -> str:
        """Where the numbers are served."""
        return f"http://{self.host}:{self.port}/metrics"

    def open(self) -> None:
        """Begin to serve.

        Raises:
          OSError: the port is taken.
        """
        if self._server is not None:
            return
        try:
            server, thread = self._module.start_http_server(self.port, self.host, registry=self.registry)
        except OSError as error:
            raise OSError(
                f"cannot serve metrics at {self.host}:{self.port} ({error.strerror or error}); give PrometheusSink "
                "another port, or 0 for any free one"
            ) from error
        self._server, self.port = (server, thread), server.server_port

    def emit(self, event: Event) -> None:
        """Set the gauges and count the event."""
        self.open()
        self._events.labels(event.kind).inc()
        if event.kind == Kind.STAGE:
            self._moves.labels(str(event.data.get("after"))).inc()
        if event.kind == Kind.DECISION:
            self._decisions.labels(str(event.data.get("action")), str(event.data.get("outcome"))).inc()
        if event.kind != Kind.EPOCH:
            return
        found = samples(event)
        for metric, labels, value in found:
            gauge = self._gauges[metric]
            (gauge.labels(*labels) if labels else gauge).set(value)
        now = {(metric, labels) for metric, labels, _ in found if labels}
        for metric, labels in self._shown - now:
            self._gauges[metric].remove(*labels)
        self._shown = now

    def close(self) -> None:
        """Stop serving; a later event begins again, on the same port."""
        server, self._server = self._server, None
        if server is not None:
            server[0].shutdown()
            server[0].server_close()
            server[1].join(5.0)


class WandbSink(_Closing):
    """Logs to Weights & Biases: the run's configuration, its numbers by train step, and a table of its events.

    Args:
      project: the project's name.
      directory: where `wandb` keeps its files, e.g. the run directory.
      mode: "online", "offline" (nothing leaves the machine) or "disabled"; None leaves it to `WANDB_MODE`.
      options: further arguments of `wandb.init`, e.g. `name`, `id`, `group`, `tags`.
    """

    slow = True

    def __init__(
        self,
        project: str,
        *,
        directory: str | os.PathLike[str] | None = None,
        mode: str | None = None,
        **options: Any,
    ) -> None:
        line("project", project)
        if directory is not None:
            place("directory", directory)
        if mode is not None and (not isinstance(mode, str) or mode not in MODES):
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self._module = _needed("wandb", "wandb", "wandb")
        self._options: Mapping[str, Any] = {"project": project, "dir": directory and os.fspath(directory), **options}
        if mode is not None:
            self._options = {**self._options, "mode": mode}
        self._run: Any = None
        self._rows: list[list[Any]] = []

    def open(self) -> None:
        """`wandb.init`: errors of log-in and settings come here."""
        if self._run is None:
            self._run = self._module.init(**self._options)
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

    def emit(self, event: Event) -> None:
        """Log the event."""
        self.open()
        if event.kind == Kind.RUN_STARTED:
            self._run.config.update(event.data, allow_val_change=True)
        numbers = {sample.path: sample.value for sample in samples(event)}
        if numbers:
            self._run.log({**numbers, "epoch": event.epoch, "step": event.step})
        if event.kind not in DROPPABLE:
            self._rows.append([event.epoch, event.step, str(event.kind), event.message])
        if event.kind == Kind.RUN_ENDED:
            self._run.summary.update({name: event.data.get(name) for name in ("outcome", "score")})

    def close(self) -> None:
        """Log the table of events and finish the run; a later event begins another."""
        run, self._run = self._run, None
        if run is not None:
            table = self._module.Table(columns=["epoch", "step", "kind", "message"], data=self._rows)
            run.log({"events": table})
            run.finish()
            self._rows = []
