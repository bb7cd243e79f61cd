"""What the library writes of a seed: the record (what it is; its hash is the id) and notes (what was measured)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ..kasmina.spec import Site
from .encode import decode, encode, from_bytes, rebuild, to_bytes
from .errors import DamagedSeed, UrzaError
from .tensors import ArraySpec

FORMAT = 1
"""Raised when an older reader could no longer read what is written."""
NAN = float("nan")
_NOTHING: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class File:
    """A file of the library: the hex sha256 of its bytes, which names it, and how many there are."""

    digest: str
    bytes: int

    @property
    def name(self) -> str:
        """Where it lies below the root."""
        return f"files/{self.digest}.safetensors"


@dataclasses.dataclass(frozen=True)
class Program:
    """The stored forward pass: its file, which holds one StableHLO module for each rank of the input."""

    file: File
    arrays: tuple[ArraySpec, ...]
    jax: str


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Entry:
    """What the library knows of a seed without reading its parameters.

    `id` is the hex sha256 of the seed's record, empty for a seed that was not stored yet. `blueprint`, `config`,
    `blend` and `reads` are its recipe; `site` is the layer it grew at (its path is in the provenance). `arrays` names
    its parameters with dtype and shape. `contribution` is in points, `flops` XLA's count and `latency_ms` the median
    time of one forward pass, both on `measured_on`; NaN where they were not measured. `provenance` says where it comes
    from, `created` when it was last put (seconds since 1970), `program` whether a forward pass is stored.
    """

    blueprint: str
    config: Mapping[str, Any]
    blend: str
    reads: str
    site: Site
    arrays: tuple[ArraySpec, ...]
    id: str = ""
    contribution: float = NAN
    flops: float = NAN
    latency_ms: float = NAN
    measured_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    created: float = NAN
    program: Program | None = None
    layout: Any = None
    file: File | None = None

    @property
    def parameters(self) -> int:
        """How many numbers its parameters hold."""
        return sum(math.prod(spec.shape) for spec in self.arrays)

    @property
    def files(self) -> tuple[File, ...]:
        """The files it is made of, its record and notes aside; none before it is stored."""
        found = (self.file, None if self.program is None else self.program.file)
        return tuple(file for file in found if file is not None)

    def __str__(self) -> str:
        known = "contribution not measured" if math.isnan(self.contribution) else f"{self.contribution:+.2f} points"
        name = f"{self.id[:12] or 'not stored'}: {self.blueprint} {dict(self.config)}"
        return f"{name}, {self.parameters:,} parameters, {known}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StoredSeed(Entry):
    """A seed at rest with its parameters, a pytree of numpy arrays; `germinate(morph, site, it)` loads it in a slot.

    `programs` holds the serialised StableHLO modules of its forward pass by the rank of their input.
    """

    params: Any = None
    programs: Mapping[int, bytes] = dataclasses.field(default_factory=dict)


def sha256(data: bytes) -> str:
    """The hex sha256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def record_bytes(seed: StoredSeed, layout: Any, arrays: Sequence[ArraySpec], file: File) -> bytes:
    """The record of a seed as it is written; its sha256 is the seed's id."""
    site = seed.site
    body = {
        "format": FORMAT,
        "what": "a stored seed of esper_jax",
        "blueprint": seed.blueprint,
        "config": encode(dict(seed.config), "config"),
        "blend": seed.blend,
        "reads": seed.reads,
        "site": {
            "kind": site.kind,
            "in_shape": list(site.in_shape),
            "out_shape": list(site.out_shape),
            "dtype": site.dtype,
            "spatial": site.spatial,
        },
        "layout": layout,
        "arrays": [dataclasses.asdict(spec) for spec in arrays],
        "file": dataclasses.asdict(file),
    }
    return to_bytes(body)


def read_record(data: bytes, seed_id: str, where: str) -> Entry:
    """The entry of a record file, without notes.

    Raises:
      DamagedSeed: its bytes are not those that the id names. UrzaError: it is whole but of a later format.
    """
    body = _checked(data, seed_id, where)
    try:
        site = body["site"]
        arrays = _specs(body["arrays"])
        entry = Entry(
            blueprint=str(body["blueprint"]),
            config=decode(body["config"]),
            blend=str(body["blend"]),
            reads=str(body["reads"]),
            site=Site(
                "",
                str(site["kind"]),
                tuple(site["in_shape"]),
                tuple(site["out_shape"]),
                str(site["dtype"]),
                int(site["spatial"]),
            ),
            arrays=arrays,
            id=seed_id,
            layout=body["layout"],
            file=_file(body["file"]),
        )
        rebuild(entry.layout, {spec.name: spec for spec in arrays})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UrzaError(f"{where} is no record of a seed ({type(error).__name__}: {error})") from error
    return entry


@dataclasses.dataclass(frozen=True)
class Note:
    """What one `put` said of a seed. None stands for "not measured then"."""

    seed: str
    time: float
    contribution: float | None = None
    flops: float | None = None
    latency_ms: float | None = None
    measured_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    program: Program | None = None

    def to_bytes(self) -> bytes:
        """The note as it is written."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "program"}
        body = encode(fields, "note")
        program = None if self.program is None else dataclasses.asdict(self.program)
        return to_bytes({"format": FORMAT, **body, "program": program})

    @staticmethod
    def read(data: bytes, digest: str, where: str) -> Note:
        """The note of a file. DamagedSeed and UrzaError as for `read_record`."""
        body = _checked(data, digest, where)
        try:
            program = body["program"]
            fields = {f.name: decode(body[f.name]) for f in dataclasses.fields(Note) if f.name != "program"}
            made = None
            if program is not None:
                made = Program(_file(program["file"]), _specs(program["arrays"]), str(program["jax"]))
            return Note(**fields, program=made)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UrzaError(f"{where} is no note of a seed ({type(error).__name__}: {error})") from error


def with_notes(entry: Entry, notes: Sequence[Note]) -> Entry:
    """The entry with what its notes say; of several that measured the same thing, the newest counts."""
    found: dict[str, Any] = {}
    for note in sorted(notes, key=lambda note: note.time):
        found["created"] = note.time
        if note.contribution is not None:
            found["contribution"] = note.contribution
        if note.flops is not None or note.latency_ms is not None:
            found["flops"] = NAN if note.flops is None else note.flops
            found["latency_ms"] = NAN if note.latency_ms is None else note.latency_ms
            found["measured_on"] = note.measured_on
        if note.provenance:
            found["provenance"] = note.provenance
        if note.program is not None:
            found["program"] = note.program
    return dataclasses.replace(entry, **found)


def _checked(data: bytes, digest: str, where: str) -> dict[str, Any]:
    """The JSON object of a file whose name is its sha256."""
    if (found := sha256(data)) != digest:
        raise DamagedSeed(
            f"{where} is damaged: its {len(data)} bytes have the sha256 {found[:12]}..., written with {digest[:12]}..."
        )
    try:
        body = from_bytes(data)
        version = body["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UrzaError(f"{where} was not written by a library of seeds ({type(error).__name__}: {error})") from error
    if version != FORMAT:
        raise UrzaError(
            f"{where} has format {version!r}, this esper_jax reads format {FORMAT}: use the version that wrote it, or "
            "a later one"
        )
    return dict(body)


def _file(value: Mapping[str, Any]) -> File:
    digest, size = value["digest"], value["bytes"]
    if not (isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
        raise ValueError(f"{digest!r} is no sha256")
    return File(digest, int(size))


def _specs(values: Sequence[Mapping[str, Any]]) -> tuple[ArraySpec, ...]:
    specs = tuple(ArraySpec(str(v["name"]), str(v["dtype"]), tuple(int(n) for n in v["shape"])) for v in values)
    for spec in specs:
        if min(spec.shape, default=0) < 0 or jnp.dtype(spec.dtype).kind in "OSUMm":
            raise ValueError(f"{spec} is no array of numbers")
    return specs
