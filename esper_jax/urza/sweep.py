"""What the sweeper takes away: seeds beyond those to keep, files that no seed names, leavings of killed writers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from typing import TYPE_CHECKING

from .._checks import seconds, whole
from .errors import DamagedSeed, UrzaError
from .record import Entry, Note
from .store import TEMPORARY
from .tensors import owner_of

if TYPE_CHECKING:
    from .library import Urza


_OURS = re.compile(
    r"files/[0-9a-f]{64}\.safetensors|notes/[0-9a-f]{64}/[0-9a-f]{64}\.json|" + TEMPORARY + r"/[0-9a-f]{32}"
)
"""Names that a library gives to its files. Nothing else is ever swept, whatever directory was named."""


@dataclasses.dataclass(frozen=True)
class Swept:
    """What was removed (or, on a dry run, would be): ids of seeds, names of files.

    `unread` says of each seed that stays and cannot be read, or has lost a note, why; while a record cannot be read,
    files of parameters are not freed, and the program that only a lost note named never is.
    `young` counts unused files that are younger than the grace and stay for now.
    """

    seeds: tuple[str, ...]
    files: tuple[str, ...]
    unread: dict[str, str]
    young: int = 0


def sweep(urza: Urza, *, keep: int | None, damaged: bool, grace: float, dry_run: bool) -> Swept:
    """See `Urza.gc`; the caller holds the lock.

    While a seed's record cannot be read and is kept, no file is freed: it might be that seed's.
    """
    if keep is not None:
        whole("keep", keep, 0)
    seconds("grace", grace, zero=True)
    store = urza.store
    bad_notes = _bad_notes(urza) if damaged else []
    entries, broken = urza.entries(without=bad_notes)
    if damaged:
        broken |= _torn(urza, entries)
        entries = [entry for entry in entries if entry.id not in broken]
    ranked = sorted(entries, key=_worth)
    leaving = [entry.id for entry in ranked[keep:]] if keep is not None else []
    leaving += [seed_id for seed_id, error in broken.items() if damaged and isinstance(error, DamagedSeed)]
    staying = [entry for entry in ranked if entry.id not in leaving]
    unread = [seed_id for seed_id in broken if seed_id not in leaving]
    files = []
    for name in bad_notes:
        if not dry_run:
            store.remove(name)
        files.append(name)
    for seed_id in leaving:
        names = [f"seeds/{seed_id}.json", *store.names(f"notes/{seed_id}")]  # the record first: then it is gone
        for name in names:
            if not dry_run:
                store.remove(name)
        files += [name for name in names if name not in files]
    used = {file.name for entry in staying for file in entry.files}
    held = {entry.id for entry in staying} | set(unread)
    spare = [name for name in store.names("files") if name not in used] if not unread else []
    spare += [name for name in store.names("notes") if name.split("/")[1] not in held and name not in files]
    spare += store.names(TEMPORARY)
    spare = [name for name in spare if _OURS.fullmatch(name)]
    orphans = _orphans(urza, spare, held)
    spare = [name for name in spare if name not in orphans]
    young = 0
    for name in spare:
        if grace > 0 and store.age(name) < grace:
            young += 1
            continue
        if not dry_run:
            store.remove(name)
        files.append(name)
    why = {seed_id: str(broken[seed_id]) for seed_id in unread}
    lost = "is the stored program of seed {}, and no note says so any more: a note was lost; put the seed again"
    why |= {owner: f"{name} {lost.format(owner[:12])}" for name, owner in orphans.items()}
    return Swept(tuple(leaving), tuple(files), why, young)


def _orphans(urza: Urza, spare: list[str], held: set[str]) -> dict[str, str]:
    """Files that say that they are a program of a seed that stays, though none of its notes tells of them."""
    found: dict[str, str] = {}
    told: dict[str, set[str]] = {}
    for name in spare:
        if name.startswith("files/"):
            with contextlib.suppress(FileNotFoundError):
                owner = owner_of(urza.store.read(name))
                if owner in held and name not in told.setdefault(owner, urza.programs(owner)):
                    found[name] = owner
    return found


def _worth(entry: Entry) -> tuple[float, ...]:
    """The order in which seeds are kept: by contribution, unmeasured ones last, newer ones first."""
    unmeasured, undated = math.isnan(entry.contribution), math.isnan(entry.created)
    return unmeasured, 0 if unmeasured else -entry.contribution, undated, 0 if undated else -entry.created


def _torn(urza: Urza, entries: list[Entry]) -> dict[str, UrzaError]:
    """The seeds one of whose files is not what was written."""
    found: dict[str, UrzaError] = {}
    for entry in entries:
        try:
            urza.verify_files(entry)
        except DamagedSeed as error:
            found[entry.id] = error
    return found


def _bad_notes(urza: Urza) -> list[str]:
    """The notes that are not what was written."""
    bad = []
    for name in filter(_OURS.fullmatch, urza.store.names("notes")):
        try:
            Note.read(urza.store.read(name), name.split("/")[-1].removesuffix(".json"), name)
        except FileNotFoundError:
            continue
        except DamagedSeed:
            bad.append(name)
        except UrzaError:
            continue  # of a later format
    return bad
