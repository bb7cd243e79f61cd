"""Seeds come back from the library to the bit, are found by what they are, and cost memory within a budget."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import pickle
import struct
import subprocess
import sys
import uuid
from typing import Any, ClassVar

import fsspec
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings

import esper_jax
from esper_jax import Stage, Urza, UrzaError, seed_of
from esper_jax.kasmina.blend import BLENDS
from esper_jax.urza import UnknownSeed

from .world import FITTING, SITES, by_hand, holding, host_params, same_bits, stored


@pytest.fixture(params=["directory", "memory"])
def urza(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Urza:
    return Urza(tmp_path / "seeds" if request.param == "directory" else f"memory://{uuid.uuid4().hex}")


@pytest.mark.parametrize(("blueprint", "kind"), FITTING)
def test_a_seed_of_every_blueprint_comes_back_to_the_bit(blueprint: str, kind: str) -> None:
    urza = Urza(f"memory://{uuid.uuid4().hex}")
    for blend in BLENDS if blueprint == "lora" else ("add",):
        seed = stored(blueprint, SITES[kind], blend=blend)
        back = urza.get(urza.put(seed, measure=False))
        assert (back.blueprint, back.config, back.blend, back.reads) == (blueprint, seed.config, blend, seed.reads)
        assert same_bits(back.params, seed.params)


def test_what_was_measured_comes_back_and_what_was_not_stays_unmeasured(urza: Urza) -> None:
    """FLOPs by XLA, milliseconds by the clock; a contribution only where the seed's state has one."""
    seed_id = urza.put(seed_of(holding(), "Dense_0"), provenance={"run": "digits", "epochs": (1, 2), "loss": math.inf})
    found = urza.get(seed_id)
    assert found.contribution == 2.5 and found.parameters == 4 * 8 + 8 * 6
    assert found.flops in (160, 166) and found.latency_ms > 0  # 2 (4 x 8 + 8 x 6), and the scale of 1 if it is kept
    assert found.measured_on["shape"] == (1, 4)
    origin = {name: found.provenance[name] for name in ("run", "epochs", "loss", "site", "slot", "stage")}
    assert origin == {
        "run": "digits", "epochs": (1, 2), "loss": math.inf, "site": "Dense_0", "slot": 0, "stage": "HOLDING",
    }  # fmt: skip
    other = urza.get(urza.put(seed_of(holding("mlp", contribution=math.nan), "Dense_0"), measure=False))
    assert math.isnan(other.contribution) and math.isnan(other.flops) and math.isnan(other.latency_ms)
    assert not other.measured_on


def test_the_same_seed_is_one_entry_and_the_newest_measurement_counts(urza: Urza) -> None:
    """An unmeasured value never hides one that was measured."""
    ids = [urza.put(by_hand(1), contribution=value, measure=False) for value in (1.0, 3.0, math.nan)]
    assert len(set(ids)) == 1 and [entry.id for entry in urza.find()] == ids[:1]
    assert urza.get(ids[0]).contribution == 3.0
    changed = [by_hand(2), by_hand(1, blend="lerp"), by_hand(1, config={"number": 1.0}), by_hand(1, reads="output")]
    assert len({ids[0], *(urza.put(seed, measure=False) for seed in changed)}) == 5


def test_ids_do_not_depend_on_the_store_or_the_order_of_keys(tmp_path: pathlib.Path) -> None:
    first = by_hand(1, config={"a": 1, "b": (2, 3)})
    again = dataclasses.replace(first, config={"b": [2, 3], "a": 1}, params=dict(reversed(first.params.items())))
    assert Urza(tmp_path).put(first, measure=False) == Urza(f"memory://{uuid.uuid4().hex}").put(again, measure=False)


FLOATS = st.floats(width=64) | st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, -0.0, 5e-324])
PLAIN = st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=8)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)
CONFIGS = st.dictionaries(st.text(max_size=8).filter(lambda key: not key.startswith("$")), VALUES, max_size=4)
DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e4m3b11fnuz", "int8", "int4", "bool")


@st.composite
def trees(draw: st.DrawFn) -> Any:
    """A tree of finite arrays of any bits, dtype and shape."""

    def leaf(key: int) -> np.ndarray:
        dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        size = math.prod(shape)
        if dtype.name in ("bool", "int4"):
            return np.array([draw(st.integers(0, 1)) for _ in range(size)], np.int8).astype(dtype).reshape(shape)
        made = np.frombuffer(draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)), dtype)
        finite = np.isfinite(made.astype(np.float64))
        return np.where(finite, made, np.zeros((), dtype)).astype(dtype).reshape(shape)

    names = st.text("ab_. é", max_size=4)
    kinds = st.recursive(
        st.just(0), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=4
    )

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: fill(child) for key, child in node.items()}
        if isinstance(node, list):
            return tuple(map(fill, node)) if draw(st.booleans()) else [fill(child) for child in node]
        return leaf(0)

    return {"own": leaf(0), "rest": fill(draw(kinds))}


def bits(value: Any) -> Any:
    """A config with its floats as bytes, so that NaN equals NaN and 0.0 is not -0.0."""
    if type(value) is float:
        return struct.pack(">d", value)
    if isinstance(value, tuple):
        return tuple(map(bits, value))
    return (type(value).__name__, value)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=CONFIGS, params=trees())
def test_any_config_and_any_arrays_round_trip_to_the_bit(config: dict[str, Any], params: Any) -> None:
    urza = Urza("memory://round-trips")
    seed_id = urza.put(by_hand(0, config=config, params=params), measure=False)
    back = Urza("memory://round-trips").get(seed_id)
    assert {key: bits(value) for key, value in back.config.items()} == {k: bits(v) for k, v in config.items()}
    assert same_bits(back.params, params)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"params": {"a/b": np.ones(1), "a": {"b": np.ones(1)}}}, ValueError, "two arrays would share the name"),
        ({"params": {"a": np.array([1.0, np.nan], np.float32)}}, ValueError, "params/a .* not finite"),
        ({"params": {}}, ValueError, "without parameters"),
        ({"params": {1: np.ones(2)}}, TypeError, "key 1; keys of stored parameters must be strings"),
        ({"params": {"a": 3.0}}, TypeError, "params/a is a float; stored parameters are arrays"),
        ({"config": {"act": jnp.tanh}}, TypeError, r"config\['act'\] is a .*Python's own types"),
        ({"config": {"n": np.int64(3)}}, TypeError, r"config\['n'\] is a int64"),
        ({"blend": "sum"}, ValueError, "unknown blend 'sum'"),
        ({"contribution": math.inf}, ValueError, "contribution must be finite, or NaN"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_a_sentence_and_nothing_is_written(change, error, sentence, urza) -> None:
    with pytest.raises(error, match=sentence):
        urza.put(by_hand(0, **change), measure=False)
    assert urza.find() == [] and urza.store.names("files") == []


def test_put_and_get_say_what_they_take(urza: Urza) -> None:
    with pytest.raises(TypeError, match=r"put\(\) takes a seed from seed_of"):
        urza.put({"params": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='blueprint "nobody\'s" is not registered here'):
        urza.put(by_hand(0), program=True)
    seed_id = urza.put(by_hand(0), measure=False)
    assert urza.get(seed_id[:6]).id == seed_id
    for wrong, sentence in (("0000", "there is no seed '0000'.*holds 1"), ("", "4 digits or more"), ("zz", "4 digits")):
        with pytest.raises(UnknownSeed, match=sentence):
            urza.get(wrong)
    with pytest.raises(UrzaError, match="has no stored program"):
        urza.get(seed_id, program=True)


def test_find_gives_what_germinates_at_a_site_best_first(urza: Urza) -> None:
    """Unmeasured seeds come last; `compatible_with` is exactly what `germinate` accepts."""
    sites = esper_jax.morph(host_params()).spec.by_path
    wide, narrow = (stored("lora", sites["Dense_0"], seed=i, rank=rank) for i, rank in enumerate((8, 2)))
    seeds = [
        (wide, 1.0),
        (narrow, 4.0),
        (stored("norm", sites["Dense_1"]), math.nan),
        (stored("se", SITES["conv"]), 9.0),
    ]
    names = [urza.put(seed, contribution=value, measure=False) for seed, value in seeds]
    order = lambda **asked: [names.index(entry.id) for entry in urza.find(**asked)]  # noqa: E731
    assert order() == [3, 1, 0, 2] and order(limit=2) == [3, 1]
    assert order(order="parameters") == [2, 1, 3, 0]
    assert order(order="newest")[0] == 3 and order(blueprint="lora", max_params=30) == [1]
    assert order(compatible_with=sites["Dense_0"]) == [1, 0] and order(compatible_with=sites["Dense_1"]) == [2]
    morph = esper_jax.morph(host_params())
    for number, path in itertools.product(range(4), sites):
        fits = number in order(compatible_with=sites[path])
        try:
            esper_jax.germinate(morph, path, urza.get(names[number]))
            assert fits
        except ValueError:
            assert not fits
    with pytest.raises(ValueError, match="unknown order 'best'; choose one of contribution"):
        urza.find(order="best")
    with pytest.raises(TypeError, match=r"takes a Site such as morph.spec.by_path"):
        urza.find(compatible_with="Dense_0")  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.PRUNED, Stage.DORMANT])
def test_only_a_seed_that_is_part_of_the_output_is_harvested(stage: Stage) -> None:
    with pytest.raises(ValueError, match=f"Dense_0 slot 0 is {stage.name}; a seed is worth keeping once"):
        seed_of(holding(stage=stage), "Dense_0")


def test_the_cache_keeps_what_was_used_last_within_its_budget(tmp_path: pathlib.Path) -> None:
    writer = Urza(tmp_path)
    ids = [writer.put(by_hand(i), measure=False) for i in range(3)]
    size = writer.find()[0].files[0].bytes
    urza = Urza(tmp_path, cache_bytes=2 * size + 1)
    for seed in (0, 1, 0, 2, 0, 1):  # reading 2 drops 1, reading 1 again drops 2
        assert urza.get(ids[seed]).config == {"number": seed}
    stats = urza.cache
    assert (stats.hits, stats.misses, stats.evictions) == (2, 4, 2)
    assert (stats.files, stats.bytes, stats.budget) == (2, 2 * size, 2 * size + 1)
    none = Urza(tmp_path, cache_bytes=size - 1)
    for _ in range(2):
        none.get(ids[0])
    assert (none.cache.hits, none.cache.misses, none.cache.evictions, none.cache.bytes) == (0, 2, 0, 0)
    urza.remove(ids[0])
    with pytest.raises(UnknownSeed):
        urza.get(ids[0])
    with pytest.raises(ValueError, match="cache_bytes must be a whole number of 0 or more, got -1"):
        Urza(tmp_path, cache_bytes=-1)


def test_cached_parameters_cannot_be_written_to(tmp_path: pathlib.Path) -> None:
    urza = Urza(tmp_path)
    seed = urza.get(urza.put(by_hand(1), measure=False))
    with pytest.raises(ValueError, match="read-only"):
        seed.params["down"][0] = 7


def test_gc_frees_removed_seeds_and_leavings_but_nothing_young_or_in_use(urza: Urza) -> None:
    ids = [urza.put(by_hand(i), contribution=float(i), measure=False) for i in range(4)]
    shared = urza.put(by_hand(3, blend="lerp"), measure=False)  # the same arrays: one file
    urza.store.write(f"tmp/{uuid.uuid4().hex}", b"half")  # as a killed writer leaves it
    urza.remove(ids[0])
    assert urza.gc().files == () and urza.gc().young == 2
    would = urza.gc(keep=2, grace=0, dry_run=True)
    assert len(urza.ids()) == 4 and urza.gc(keep=2, grace=0) == would
    assert set(would.seeds) == {ids[1], shared} and would.unread == {}
    assert sorted(urza.ids()) == sorted(ids[2:])
    assert len(urza.store.names("files")) == 2 and urza.store.names("tmp") == []
    assert {urza.get(seed_id).config["number"] for seed_id in ids[2:]} == {2, 3}
    assert urza.gc(grace=0).files == ()
    with pytest.raises(ValueError, match="keep must be a whole number"):
        urza.gc(keep=-1)


def test_nothing_is_pickled(urza: Urza, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle was used")

    for name in ("loads", "load", "dumps", "dump", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    urza.get(urza.put(stored("mlp", hidden=2), measure=False, program=True), program=True)
    kinds = {name.rsplit(".", 1)[-1] for name in urza.store.names("")}
    assert kinds <= {"json", "safetensors", "lock"}


@pytest.mark.parametrize("package", ["fsspec", "safetensors"])
def test_a_missing_package_is_named_with_what_to_install(package: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs the package {package}: pip install "esper_jax\[urza\]"'):
        Urza(tmp_path)


def test_looking_makes_no_directory(tmp_path: pathlib.Path) -> None:
    urza = Urza(tmp_path / "nowhere")
    assert urza.find() == [] and urza.gc().files == ()
    with pytest.raises(UnknownSeed, match="there is no seed 'abcd'"):
        urza.get("abcd")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_url_is_one_sentence() -> None:
    with pytest.raises(UrzaError, match="nosuch://seeds cannot be opened as a library of seeds"):
        Urza("nosuch://seeds")


class Flaky(MemoryFileSystem):
    """A store in memory over a bad line: the next calls raise what `trouble` holds."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    trouble: ClassVar[list[Exception]] = []
    calls = 0

    def _try(self) -> None:
        type(self).calls += 1
        if self.trouble:
            raise self.trouble.pop()

    def cat_file(self, *args: Any, **kwargs: Any) -> Any:
        self._try()
        return super().cat_file(*args, **kwargs)

    def pipe_file(self, *args: Any, **kwargs: Any) -> Any:
        self._try()
        return super().pipe_file(*args, **kwargs)


@pytest.fixture
def flaky() -> Urza:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store, Flaky.trouble, Flaky.calls = {}, [], 0
    return Urza("flaky://seeds", wait=0.001)


def test_a_remote_store_is_asked_again_after_passing_trouble(flaky: Urza) -> None:
    Flaky.trouble = [ConnectionResetError(), TimeoutError()]
    seed_id = flaky.put(by_hand(1), measure=False)
    assert Flaky.calls == 5  # arrays, note and record, and two calls again
    Flaky.trouble = [ConnectionResetError()]
    assert flaky.get(seed_id).config == {"number": 1}


def test_a_remote_store_that_stays_away_is_one_error_and_leaves_no_seed(flaky: Urza) -> None:
    Flaky.trouble = [ConnectionResetError("gone") for _ in range(9)]
    with pytest.raises(UrzaError, match="flaky://seeds: ConnectionResetError: gone after up to 3 attempts"):
        flaky.put(by_hand(1), measure=False)
    Flaky.trouble, Flaky.calls = [PermissionError(13, "no")], 0
    with pytest.raises(UrzaError, match="PermissionError"):
        flaky.put(by_hand(1), measure=False)
    assert Flaky.calls == 1 and flaky.find() == []


def test_the_package_imports_without_what_a_library_needs() -> None:
    """`import esper_jax` reads neither fsspec nor safetensors."""
    code = (
        "import sys; sys.modules.update(fsspec=None, safetensors=None, tenacity=None, flatbuffers=None)\n"
        "import esper_jax.urza.cli, esper_jax; print(esper_jax.Urza.__name__)"
    )
    assert (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) == "Urza\n"
