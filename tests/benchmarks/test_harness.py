"""The arithmetic of the benchmarks: what is called a median, a ratio and noise is that."""

from __future__ import annotations

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import (
    Column,
    Report,
    Timing,
    interleave,
    markdown,
    noise_floor,
    ratio,
    roofline,
    shown,
    summarise,
    within,
    workload,
)
from benchmarks.common.models import build
from benchmarks.common.output import plain
from benchmarks.common.timing import median_interval


def timing(*samples: float) -> Timing:
    return Timing("t", np.asarray(samples))


def test_a_summary_is_numpys_percentiles_of_the_samples() -> None:
    samples = np.random.default_rng(0).lognormal(size=501)
    found = summarise(samples)
    assert found["median"] == np.sort(samples)[250] and found["worst"] == samples.max()
    assert found["iqr"] == pytest.approx(np.subtract(*np.percentile(samples, [75, 25])))
    assert found["median"] < found["p95"] < found["p99"] < found["worst"] and found["count"] == 501
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_a_ratio_is_taken_within_rounds_so_that_load_common_to_both_cancels() -> None:
    load = np.array([1.0, 5.0, 2.0, 9.0, 1.0])
    found = ratio(timing(*1.1 * load), timing(*load))
    assert found.median == pytest.approx(1.1) and found.spread == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="time them together"):
        ratio(timing(1.0), timing(1.0, 2.0))


def test_the_interval_of_the_median_covers_it_in_at_least_95_of_100_draws() -> None:
    draw = np.random.default_rng(1)
    for size in (10, 40):
        intervals = [median_interval(draw.exponential(size=size)) for _ in range(2000)]
        assert np.mean([low <= np.log(2) <= high for low, high in intervals]) >= 0.95


def test_the_noise_floor_is_how_far_an_identical_copys_interval_reaches_from_1() -> None:
    copy = ratio(timing(*np.linspace(0.9, 1.02, 41)), timing(*np.ones(41)))
    floor = noise_floor([copy])
    assert floor == pytest.approx(max(1 - copy.low, copy.high - 1)) and floor > 0.03
    slow = ratio(timing(*np.full(41, 1.2)), timing(*np.ones(41)))
    assert within(copy, floor) and not within(slow, floor)
    with pytest.raises(ValueError, match="identical copy"):
        noise_floor([])


def test_interleaving_finds_which_variant_is_slower_and_by_how_much() -> None:
    def sleeper(seconds: float):
        return lambda _: time.sleep(seconds)

    found = interleave({"base": sleeper(2e-3), "slow": sleeper(6e-3)}, rounds=9, warmup=1, min_sample=1e-3)
    assert {t.samples.size for t in found.values()} == {9}
    assert 2 < ratio(found["slow"], found["base"]).median < 4
    assert found["base"].median >= 2e-3


def test_a_sample_makes_many_calls_of_a_fast_variant_and_goes_through_all_input_sets() -> None:
    seen: list[int] = []
    found = interleave({"a": seen.append}, rounds=3, sets=3, warmup=1, min_sample=1e-3)
    assert found["a"].calls > 100 and set(seen) == {0, 1, 2}


def test_what_a_variant_returns_is_waited_for() -> None:
    x = jnp.ones((600, 600))
    work = jax.jit(lambda x: jnp.linalg.matrix_power(x / 600, 40))
    direct = []
    jax.block_until_ready(work(x))
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(work(x))
        direct.append(time.perf_counter() - began)
    found = interleave({"a": lambda _: work(x)}, rounds=5, min_sample=1e-6)
    assert found["a"].median > 0.3 * min(direct)


def test_a_budget_ends_the_rounds_but_not_before_the_least() -> None:
    found = interleave({"a": lambda _: time.sleep(2e-3)}, rounds=500, budget=1e-3, least=4, min_sample=1e-3)
    assert found["a"].samples.size == 4


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"sets": 0}])
def test_timing_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give variants"):
        interleave({"a": lambda _: None}, **wrong)


def test_a_roofline_counts_two_operations_a_product_term_and_both_ways_of_a_copy() -> None:
    found = roofline(size=64, rounds=3)
    assert found["matmul_flops"] > 1e6 and found["copy_bytes"] > 1e6 and found["size"] == 64


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (1.5e-6, "time", "1.5 us"),
        (0.25, "time", "250 ms"),
        (12.0, "time", "12 s"),
        (1.0, "ratio", "1.000"),
        (None, "ratio", "-"),
        (float("nan"), "time", "-"),
        ([0.99, 1.01], "interval", "0.990 to 1.010"),
        (False, "yes", "NO"),
        (0.031, "percent", "3.1%"),
    ],
)
def test_values_are_shown_with_their_units_and_absent_ones_as_a_dash(value: object, form: str, text: str) -> None:
    assert shown(value, form) == text


def test_the_json_file_and_the_markdown_made_of_it_hold_the_same_figures(tmp_path, capsys) -> None:
    args = argparse.Namespace(json=tmp_path / "a" / "out.json", dtype="float32", scale=1.0)
    report = Report("demo", "A demonstration.", args)
    rows = [{"name": "a|b", "time": np.float64(2e-3)}, {"name": "gone"}]
    report.table("Times", [Column("name", "what"), Column("time", "median", "time")], rows, "A note.")
    report.finish()
    read = json.loads(args.json.read_text())
    assert read["tables"][0]["rows"][0]["time"] == 2e-3
    assert {"processor", "cores", "platform"} <= set(read["machine"]) and read["versions"]["jax"] == jax.__version__
    assert markdown(read["tables"][0]).splitlines()[2:] == [
        "| what | median |",
        "|---|---:|",
        "| a\\|b | 2 ms |",
        "| gone | - |",
        "",
        "A note.",
    ]
    assert "2 ms" in capsys.readouterr().out


def test_a_plain_table_is_aligned() -> None:
    assert plain(["a", "b"], [["long", "1"]]) == "a     b\n-------\nlong  1"


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_models_grow_with_scale_compute_in_the_dtype_asked_for_and_keep_float32_weights(name: str) -> None:
    def shapes(scale: float, dtype: str):
        model, shape, _ = build(name, scale, dtype)
        x = jax.ShapeDtypeStruct((2, *shape), jnp.int32 if name == "transformer" else jnp.float32)
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
        return variables, jax.eval_shape(model.apply, variables, x)

    size = [sum(leaf.size for leaf in jax.tree.leaves(shapes(scale, "float32")[0])) for scale in (0.5, 1.0)]
    assert size[0] < size[1]
    variables, outputs = shapes(0.5, "bfloat16")
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_a_workload_has_different_batches_and_a_seed_planted_at_each_site_it_names() -> None:
    made = workload("mlp", scale=0.1, batch=2, sets=2)
    assert not np.array_equal(made.batches[0][0], made.batches[1][0])
    planted = made.morph(planted=True)
    assert [plant.site for plant in planted.spec.plants] == ["Dense_0", "Dense_1"]
    assert made.morph().spec.plants == ()
    with pytest.raises(ValueError, match="choose from mlp, cnn, transformer"):
        workload("rnn")
