"""Bytes between devices are read from a compiled program's text, and grow with the mesh as rings send them."""

from __future__ import annotations

import pytest

from benchmarks.common.collectives import on, results, sent

TEXT = """
  %all-reduce.1 = f32[512,10]{1,0} all-reduce(%dot.3), channel_id=1, replica_groups={{0,1}}
  %all-reduce.2 = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=2
  %all-gather-start.1 = (f32[64]{0}, f32[512]{0}) all-gather-start(%p), channel_id=3
  %all-gather-done.1 = f32[512]{0} all-gather-done(%all-gather-start.1)
  ROOT %reduce-scatter.5 = f32[64]{0} reduce-scatter(%g), channel_id=4
  %fusion.3 = f32[512]{0} fusion(%all-reduce.1), kind=kLoop
  %permute = pred[16]{0} collective-permute(%q)
"""


def test_each_collective_is_counted_once_with_the_bytes_of_its_result():
    assert results(TEXT) == {
        "all-reduce": (2, 512 * 10 * 4 + 4 * 4 + 2 * 3 * 2),
        "all-gather": (1, 512 * 4),
        "reduce-scatter": (1, 64 * 4),
        "collective-permute": (1, 16),
    }
    assert results("%dot.1 = f32[2,2]{1,0} dot(%a, %b)") == {}


@pytest.mark.parametrize(
    ("kind", "size", "devices", "expected"),
    [
        ("all-reduce", 800, 8, 1400),
        ("all-gather", 800, 8, 700),
        ("reduce-scatter", 100, 8, 700),
        ("all-to-all", 800, 8, 700),
        ("collective-permute", 100, 8, 100),
        ("all-reduce", 800, 1, 0),
    ],
)
def test_a_device_sends_what_a_ring_sends(kind, size, devices, expected):
    assert sent({kind: (1, size)}, devices) == pytest.approx(expected)


def test_on_a_larger_mesh_only_what_is_scattered_becomes_smaller():
    found = {"all-reduce": (1, 800), "reduce-scatter": (1, 100)}
    assert on(found, 8, 16) == {"all-reduce": (1, 800), "reduce-scatter": (1, 50)}
    assert sent(on(found, 8, 512), 512) == pytest.approx(2 * 800 * 511 / 512 + 800 // 512 * 511)
