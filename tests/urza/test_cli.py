"""`esper-jax urza`: what a person reads of a library, in 80 columns, and one sentence for a mistake."""

from __future__ import annotations

import math
import pathlib
import shutil
from typing import Any

import pytest

from esper_jax import Urza, cli

from .world import SITES, stored


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """Three seeds, one of them unmeasured, one with a program, with long names."""
    root = tmp_path_factory.mktemp("library")
    urza = Urza(root)
    seeds = (stored("lora", rank=2), stored("mlp", hidden=4096), stored("bottleneck", SITES["conv"]))
    origins: tuple[dict[str, Any], ...] = (
        {"site": "block_0/Dense_1"},
        {"run": "runs/7", "loss": math.nan},
        {"site": "encoder/stage_3/block_11/Conv_2"},
    )
    names = [
        urza.put(seeds[0], contribution=0.5, provenance=origins[0]),
        urza.put(seeds[1], contribution=12.25, program=True, provenance=origins[1]),
        urza.put(seeds[2], measure=False, provenance=origins[2]),
    ]
    return str(root), names


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.main(["urza", *arguments])
    return capsys.readouterr().out


def test_list_shows_the_best_first_in_80_columns(library, capsys) -> None:
    root, names = library
    lines = said(capsys, "list", root).splitlines()
    assert lines[0].split() == ["id", "blueprint", "site", "features", "params", "points", "FLOPs", "ms"]
    assert [line.split()[0] for line in lines[1:4]] == [names[1][:8], names[0][:8], names[2][:8]]
    assert max(map(len, lines)) <= 80 and lines[-1].startswith("3 seeds, ")
    assert lines[1].split()[5:8] == ["->", "5", "49,157"] or "49,157" in lines[1]
    assert "+12.25" in lines[1] and "…block_11/Conv_2" in lines[3] and lines[3].split()[-3:] == ["-", "-", "-"]
    assert len(said(capsys, "list", root, "--blueprint", "lora").splitlines()) == 3
    assert len(said(capsys, "list", root, "--max-params", "100", "--limit", "1").splitlines()) == 3


def test_show_tells_all_of_one_seed_and_verifies_it(library, capsys) -> None:
    root, names = library
    text = said(capsys, "show", root, names[1][:6])
    for part in (names[1], "mlp (activation='gelu', hidden=4096)", "dense 6 -> 5, float32, reads the layer's input",
                 "params/down float32[6, 4096]", "+12.25 points", "StableHLO for inputs of rank 2, 3, 4",
                 "from run", "runs/7", "bytes, verified"):  # fmt: skip
        assert part in text
    assert "nan" not in text


def test_gc_removes_what_it_says(library, tmp_path: pathlib.Path, capsys) -> None:
    names = library[1]
    root = str(shutil.copytree(library[0], tmp_path / "copy"))
    would = said(capsys, "gc", root, "--keep", "1", "--grace", "0", "--dry-run")
    assert would.startswith("would remove 2 seed(s) and 6 file(s)") and len(Urza(root).ids()) == 3
    did = said(capsys, "gc", root, "--keep", "1", "--grace", "0")
    assert did.startswith("removed 2 seed(s) and 6 file(s)") and Urza(root).ids() == [names[1]]
    assert "left 0" not in did and said(capsys, "gc", root).strip() == "removed 0 seed(s) and 0 file(s)"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["list", "nowhere"], "there is no library of seeds at nowhere"),
        (["list", "{root}", "--order", "best"], "unknown order 'best'; choose one of contribution"),
        (["show", "{root}", "ffff0000"], "there is no seed 'ffff0000'"),
        (["gc", "{root}", "--keep", "-1"], "keep must be a whole number of 0 or more, got -1"),
        (["list", "nosuch://x"], "nosuch://x cannot be opened as a library of seeds"),
        (["sweep"], "invalid choice|Unrecognized|list, show, gc"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(
    arguments, sentence, library, capsys, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["urza", *(word.format(root=library[0]) for word in arguments)])
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and text.startswith("esper-jax: ") and len(text.strip().splitlines()) == 1
    assert any(part in text for part in sentence.split("|"))
