"""Urza, the library of stored seeds: put, get, find, on a directory or any fsspec URL."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from .._checks import one_of, place, seconds, whole, words
from ..kasmina.blend import check_blend
from ..kasmina.blueprints import registered
from ..kasmina.spec import Site
from .cache import Cache, CacheStats
from .checks import check_finite, fits, known, measured, versions
from .encode import rebuild, structure
from .errors import DamagedSeed, UnknownSeed, UrzaError, needed
from .measure import cost
from .program import (
    export_forward,
    pack_programs,
    register_program,
    stored_forward,
    unpack_programs,
)
from .record import Entry, File, Note, Program, StoredSeed, read_record, record_bytes, sha256, with_notes
from .store import Store
from .sweep import Swept, sweep
from .tensors import ArraySpec, describe, pack, unpack

ORDERS: dict[str, Callable[[Entry], float]] = {
    "contribution": lambda entry: -entry.contribution,
    "parameters": lambda entry: entry.parameters,
    "flops": lambda entry: entry.flops,
    "latency": lambda entry: entry.latency_ms,
    "newest": lambda entry: -entry.created,
}
SHORTEST_PREFIX = 4


class Urza:
    """A library of stored seeds, each under the hash of what it is.

    Arrays are safetensors files and all else is JSON; nothing is pickled. Every file is named by the sha256 of its
    bytes, so a changed or shortened one is noticed when it is read. Several processes may put, get and sweep at once.

    Args:
      url: a directory, or any URL that fsspec understands (`s3://bucket/seeds`, `memory://seeds`). It need not exist.
      cache_bytes: how much of the parameters and programs that were read is kept in memory.
      attempts: calls of a remote store in all, after transient errors.
      wait: seconds before the second one.
      storage_options: for fsspec, e.g. credentials.

    Raises:
      ImportError: fsspec or safetensors is not installed. UrzaError: the URL cannot be opened.

    >>> urza = Urza("seeds")   # doctest: +SKIP
    >>> morph = germinate(morph, "Dense_0", urza.get(urza.put(seed_of(grown, "Dense_0"))))   # doctest: +SKIP
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        cache_bytes: int = 256 * 2**20,
        attempts: int = 3,
        wait: float = 0.2,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        needed("safetensors")
        place("url", url)
        whole("cache_bytes", cache_bytes, 0)
        whole("attempts", attempts, 1)
        seconds("wait", wait, zero=True)
        if storage_options is not None:
            one_of("storage_options", storage_options, Mapping, '{"anon": True}')
            words("storage_options", list(storage_options), '{"anon": True}')
        self.store = Store(url, attempts, wait, dict(storage_options or {}))
        self._cache = Cache(cache_bytes)

    @property
    def cache(self) -> CacheStats:
        """Hits, misses and evictions of the cache so far, and what it holds."""
        return self._cache.stats

    def put(
        self,
        seed: StoredSeed,
        *,
        contribution: float | None = None,
        flops: float | None = None,
        latency_ms: float | None = None,
        provenance: Mapping[str, Any] | None = None,
        measure: bool = True,
        example: tuple[int, ...] | None = None,
        program: bool = False,
    ) -> str:
        """Store a seed; the same seed again is one entry, with what was measured last.

        Args:
          seed: from `seed_of(morph, site, slot)`, or from `get` of any library.
          contribution: points; None takes the seed's own, which is NaN where it was never measured.
          flops: operations of one forward pass; None has them counted.
          latency_ms: time of one forward pass; None has it measured.
          provenance: where it comes from, added to what the seed knows itself: JSON-able values.
          measure: count operations and take the time of a forward pass (compiles once); False leaves them out.
          example: the input's shape for that; None is one example, with 8 positions a spatial dimension.
          program: store the forward pass too, so that the seed runs where its blueprint is not registered.

        Returns:
          Its id: the hex sha256 of its record.

        Raises:
          TypeError: no stored seed, or a config or provenance that cannot be written. ValueError: parameters that are
          not finite, a wrong blend, a blueprint that cannot be measured or exported. UrzaError: it cannot be written.
        """
        if not isinstance(seed, StoredSeed):
            raise TypeError(f"put() takes a seed from seed_of(morph, site, slot), got {type(seed).__name__}")
        check_blend(seed.blend)
        layout, arrays = structure(seed.params)
        check_finite(seed.blueprint, arrays)
        programs = dict(seed.programs)
        blueprint = next((b for b in registered() if b.name == seed.blueprint), None)
        if program and not programs:
            if blueprint is None:
                raise ValueError(f"put(program=True): blueprint {seed.blueprint!r} is not registered here")
            programs = export_forward(blueprint, seed)
        counted, timed, on = seed.flops, seed.latency_ms, dict(seed.measured_on)
        if measure and blueprint is not None and math.isnan(timed) and (flops is None or latency_ms is None):
            counted, timed, on = cost(seed, example)
        gain = seed.contribution if contribution is None else contribution
        history = {**seed.provenance, **(provenance or {})}
        packed = pack(arrays)
        if blueprint is not None and (forward := stored_forward(blueprint.apply)) is not None:
            seed = dataclasses.replace(seed, blueprint=forward.blueprint)  # not the name it goes by in this process
        record = record_bytes(seed, layout, describe(arrays), File(sha256(packed), len(packed)))
        seed_id = sha256(record)
        files = {File(sha256(packed), len(packed)).name: packed}
        written = None
        if programs:
            as_arrays = pack_programs(programs)
            data = pack(as_arrays, owner=seed_id)
            written = Program(File(sha256(data), len(data)), describe(as_arrays), jax.__version__)
            files[written.file.name] = data
        note = Note(
            seed_id,
            time.time(),
            contribution=measured("contribution", gain),
            flops=measured("flops", counted if flops is None else flops, least=0),
            latency_ms=measured("latency_ms", timed if latency_ms is None else latency_ms, least=0),
            measured_on=on,
            provenance=history,
            versions=versions(),
            program=written,
        ).to_bytes()
        with self.store.locked(create=True):
            for name, data in files.items():
                self.store.write(name, data)
            self.store.write(f"notes/{seed_id}/{sha256(note)}.json", note)
            self.store.write(f"seeds/{seed_id}.json", record)  # last: from now on the seed exists
        return seed_id

    def get(self, seed: str | Entry, *, program: bool = False) -> StoredSeed:
        """A stored seed with its parameters, verified, ready for `germinate`.

        Where its blueprint is not registered and its program was stored, the program is registered as a blueprint of
        its own, `name@id`, and the seed that is returned names that one.

        Args:
          seed: an id, the start of one (4 digits or more), or an entry of `find`.
          program: use the stored program even where the blueprint is registered.

        Raises:
          UnknownSeed: no such seed, or several. DamagedSeed: a file was changed, cut short or lost. UrzaError: a later
          format, or no program where one is asked for.
        """
        with self.store.locked():
            seed_id = self.resolve(seed.id if isinstance(seed, Entry) else seed)
            entry = self._entry(seed_id)
            assert entry.file is not None
            arrays = self._arrays(entry.file, entry.arrays, seed_id)
            programs = {}
            if entry.program is not None:
                programs = unpack_programs(self._arrays(entry.program.file, entry.program.arrays, seed_id))
        fields = {f.name: getattr(entry, f.name) for f in dataclasses.fields(Entry)}
        stored = StoredSeed(**fields, params=rebuild(entry.layout, arrays), programs=programs)
        if program and not programs:
            raise UrzaError(f"seed {seed_id[:12]} has no stored program; it was put without program=True")
        if programs and (program or not known(entry.blueprint)):
            stored = dataclasses.replace(stored, blueprint=register_program(stored))
        return stored

    def find(
        self,
        *,
        compatible_with: Site | None = None,
        max_params: int | None = None,
        blueprint: str | None = None,
        order: str = "contribution",
        limit: int | None = None,
    ) -> list[Entry]:
        """The seeds that are asked for, best first, without their parameters.

        Seeds that cannot be read are left out with one warning that names them.

        Args:
          compatible_with: a `Site`, such as `morph.spec.by_path["Dense_0"]`: only seeds that germinate there.
          max_params: at most so many parameters.
          blueprint: only this blueprint's.
          order: contribution (highest first), parameters, flops, latency (lowest first) or newest; what was not
            measured comes last.
          limit: at most so many.
        """
        if order not in ORDERS:
            raise ValueError(f"unknown order {order!r}; choose one of {', '.join(ORDERS)}")
        for name, most in (("max_params", max_params), ("limit", limit)):
            if most is not None:
                whole(name, most, 0)
        if compatible_with is not None and not isinstance(compatible_with, Site):
            raise TypeError(
                f"compatible_with takes a Site such as morph.spec.by_path['Dense_0'], got {compatible_with!r}"
            )
        entries, broken = self.entries()
        if broken:
            why = "; ".join(map(str, broken.values()))
            warnings.warn(f"{len(broken)} stored seed(s) cannot be read: {why}", stacklevel=2)
        answers: dict[Any, bool] = {}
        chosen = [
            entry
            for entry in entries
            if (blueprint is None or entry.blueprint == blueprint)
            and (max_params is None or entry.parameters <= max_params)
            and (compatible_with is None or fits(entry, compatible_with, answers))
        ]
        value = ORDERS[order]
        measured_first = lambda v: (1, 0.0) if math.isnan(v) else (0, v)  # noqa: E731
        return sorted(chosen, key=lambda entry: (measured_first(value(entry)), entry.id))[:limit]

    def remove(self, seed: str | Entry) -> str:
        """Take a seed out of the library, and its id; `gc` frees what only it used. UnknownSeed where there is none."""
        with self.store.locked(alone=True):
            seed_id = self.resolve(seed.id if isinstance(seed, Entry) else seed)
            self.store.remove(f"seeds/{seed_id}.json")
            for name in self.store.names(f"notes/{seed_id}"):
                self.store.remove(name)
        return seed_id

    def gc(
        self, *, keep: int | None = None, damaged: bool = False, grace: float = 3600.0, dry_run: bool = False
    ) -> Swept:
        """Free what no seed uses: files of removed seeds, and what killed writers left behind.

        Args:
          keep: remove all seeds but so many, those with the highest contribution.
          damaged: remove seeds and notes that cannot be read.
          grace: seconds; nothing younger is freed, since it may belong to a `put` that is under way elsewhere.
          dry_run: say what would be removed, and remove nothing.
        """
        with self.store.locked(alone=True):
            swept = sweep(self, keep=keep, damaged=damaged, grace=grace, dry_run=dry_run)
        for name in () if dry_run else swept.files:
            self._cache.remove(name.removeprefix("files/").removesuffix(".safetensors"))
        return swept

    def resolve(self, prefix: str) -> str:
        """The whole id of the seed whose id begins with `prefix`; UnknownSeed where there is none, or several."""
        if not isinstance(prefix, str) or len(prefix) < SHORTEST_PREFIX:
            raise UnknownSeed(f"a seed's id has {SHORTEST_PREFIX} digits or more, got {prefix!r}")
        ids = [name for name in self.ids() if name.startswith(prefix)]
        if len(ids) == 1 or prefix in ids:
            return prefix if prefix in ids else ids[0]
        if ids:
            raise UnknownSeed(f"{prefix!r} begins {len(ids)} ids in {self.store.url}: give more digits")
        raise UnknownSeed(f"there is no seed {prefix!r} in {self.store.url}, which holds {len(self.ids())}")

    def ids(self) -> list[str]:
        """The ids of all seeds, in order."""
        names = (name.removeprefix("seeds/").removesuffix(".json") for name in self.store.names("seeds"))
        return [name for name in names if len(name) == 64 and "/" not in name]

    def entries(self, *, without: Collection[str] = ()) -> tuple[list[Entry], dict[str, UrzaError]]:
        """All seeds that can be read, the notes `without` left aside, and for each other id what is wrong with it."""
        notes: dict[str, list[str]] = {}
        for name in self.store.names("notes"):
            if name not in without:
                notes.setdefault(name.split("/")[1], []).append(name)
        entries: list[Entry] = []
        broken: dict[str, UrzaError] = {}
        for seed_id in self.ids():
            try:
                entries.append(self._entry(seed_id, notes.get(seed_id, [])))
            except UnknownSeed:
                continue  # removed since it was listed
            except UrzaError as error:
                broken[seed_id] = error
        return entries, broken

    def entry(self, seed: str | Entry) -> Entry:
        """What is known of one seed, without its parameters; errors as for `get`."""
        return self._entry(self.resolve(seed.id if isinstance(seed, Entry) else seed))

    def verify(self, seed: str | Entry) -> None:
        """Read every file of a seed anew, cache or not; DamagedSeed names the first that is not what was written."""
        self.verify_files(self.entry(seed))

    def verify_files(self, entry: Entry) -> None:
        """`verify` for an entry that was read already: its parameters and program only."""
        for file in entry.files:
            self._read(file, entry.id)

    def __repr__(self) -> str:
        return f"Urza({self.store.url!r})"

    def _entry(self, seed_id: str, notes: Iterable[str] | None = None) -> Entry:
        where = f"seeds/{seed_id}.json"
        try:
            data = self.store.read(where)
        except FileNotFoundError as error:
            raise UnknownSeed(f"seed {seed_id[:12]} is no longer in {self.store.url}") from error
        entry = read_record(data, seed_id, where)
        found = []
        for name in self.store.names(f"notes/{seed_id}") if notes is None else notes:
            try:
                found.append(Note.read(self.store.read(name), name.split("/")[-1].removesuffix(".json"), name))
            except FileNotFoundError:
                continue  # swept since it was listed
            if found[-1].seed != seed_id:
                raise DamagedSeed(f"{name} is a note of seed {found[-1].seed[:12]}, not of {seed_id[:12]}")
        return with_notes(entry, found)

    def programs(self, seed_id: str) -> set[str]:
        """The names of the files of all programs that the seed's notes tell of, older ones too."""
        told = set()
        for name in self.store.names(f"notes/{seed_id}"):
            with contextlib.suppress(FileNotFoundError, UrzaError):
                note = Note.read(self.store.read(name), name.split("/")[-1].removesuffix(".json"), name)
                told |= {note.program.file.name} if note.program is not None else set()
        return told

    def _arrays(self, file: File, specs: tuple[ArraySpec, ...], seed_id: str) -> dict[str, np.ndarray]:
        data = self._cache.get(file.digest)
        if data is None:
            data = self._read(file, seed_id)
            self._cache.add(file.digest, data)
        try:
            return unpack(data, specs)
        except ValueError as error:
            raise DamagedSeed(f"{file.name} of seed {seed_id[:12]}: {error}") from error

    def _read(self, file: File, seed_id: str) -> bytes:
        """A file as it was written, or DamagedSeed."""
        try:
            data = self.store.read(file.name)
        except FileNotFoundError as error:
            raise DamagedSeed(f"{file.name} of seed {seed_id[:12]} is missing, expected {file.bytes} bytes") from error
        if len(data) != file.bytes:
            short = "is cut short" if len(data) < file.bytes else "has grown"
            raise DamagedSeed(f"{file.name} of seed {seed_id[:12]} {short}: {len(data)} bytes, expected {file.bytes}")
        if (found := sha256(data)) != file.digest:
            raise DamagedSeed(
                f"{file.name} of seed {seed_id[:12]} is damaged: its bytes have the sha256 {found[:12]}..., expected "
                f"{file.digest[:12]}..."
            )
        return data
