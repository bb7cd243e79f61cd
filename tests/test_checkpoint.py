"""Checkpoints: equal to the bit or named as damaged, at any kill, flip, cut or deletion."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from esper_jax.tolaria import checkpoint as checkpoint_module
from esper_jax.tolaria import manifest as manifests
from esper_jax.tolaria import together
from esper_jax.tolaria.checkpoint import CheckpointError, Checkpoints, CheckpointWarning, StructureMismatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Node:
    weights: object
    note: str = dataclasses.field(default="", metadata={"static": True})


Pair = collections.namedtuple("Pair", ["left", "right"])


def tree_of(value: float, n: int = 40) -> dict:
    """A tree with something different in each leaf, so that swapped leaves show."""
    noise = np.random.RandomState(int(value)).rand(n).astype(np.float32)
    return {
        "w": jnp.asarray(noise + value),
        "count": jnp.int32(value),
        "b": {"x": jnp.full((3, 2), value, jnp.bfloat16)},
    }


def assert_same(found: object, expected: object) -> None:
    """Equal structure, dtypes and bits (NaN payloads and the sign of zero included)."""
    assert jax.tree_util.tree_structure(found) == jax.tree_util.tree_structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        if hasattr(b, "dtype") and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype, name
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def two_steps(directory: pathlib.Path) -> Checkpoints:
    """Steps 1 and 2, with different values, sizes and meta."""
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, tree_of(1), {"step": 1})
    checkpoints.save(2, tree_of(2), {"step": 2})
    return checkpoints


# ---------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("container", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_every_dtype_and_shape_round_trips_to_the_bit(directory, container):
    names = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "complex64"]
    names += ["bfloat16", "float8_e4m3fn", "int4", "uint4"]
    if container is np.asarray:
        names += ["int64", "uint64", "float64", "complex128"]
    draw = np.random.RandomState(0)
    tree = {}
    for name in names:
        for shape in [(), (1,), (3, 5), (0,), (2, 0, 3)]:
            tree[f"{name}/{shape}"] = container(np.asarray(draw.randint(0, 2, shape)).astype(jnp.dtype(name)))
    tree["bits"] = container(draw.randint(0, 2**32, 64, dtype=np.uint32).view(np.float32))  # NaN payloads, denormals
    tree["negative zeros"] = container(np.full(7, -0.0, np.float32))
    tree["signalling nan"] = container(np.array(0x7FA00003, np.uint32).view(np.float32))
    checkpoints = Checkpoints(directory)
    checkpoints.save(0, tree, {})
    restored = checkpoints.restore(tree).tree
    assert_same(restored, tree)
    kind = jax.Array if container is jnp.asarray else np.ndarray
    assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(restored))


def test_nodes_scalars_keys_and_optax_states_round_trip(directory):
    params = {"Dense/0": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}}
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1, 0, 9))), 2)
    tree = {
        "opt": tx.init(params),
        "node": Node(Pair([jnp.arange(3), None], ()), note="static"),
        "a/b": jnp.float32(1),
        "a": {"b": jnp.float32(2)},  # the same path when joined by "/"
        7: np.float64(0.1),
        8: np.arange(6, dtype=">f4").reshape(2, 3).T,
    }
    tree = {str(k): v for k, v in tree.items()}
    keys = {
        "one": jax.random.key(1),
        "many": jax.random.split(jax.random.key(2, impl="rbg"), (2, 3)),
        "old": jax.random.PRNGKey(3),
    }
    scalars = {"int": 3, "float": 0.1, "bool": True, "complex": 1j}
    checkpoints = Checkpoints(directory)
    checkpoints.save(5, (tree, keys, scalars, None, {}), {"nested": [1, {"a": None}], "nan": float("nan")})
    found_tree, found_keys, found_scalars, none, empty = checkpoints.restore((tree, keys, scalars, None, {})).tree
    tree["8"] = tree["8"].astype("<f4")
    assert_same(found_tree, tree)
    assert_same(found_keys, keys)
    assert found_tree["node"].note == "static"
    assert isinstance(found_tree["7"], np.float64)
    assert (found_scalars, none, empty) == (scalars, None, {})
    assert {name: type(value).__name__ for name, value in found_scalars.items()} == {name: name for name in scalars}
    drawn = jax.random.normal(found_keys["one"], (3,))
    assert_same(drawn, jax.random.normal(keys["one"], (3,)))
    meta = checkpoints.read_meta()
    assert meta["nested"] == [1, {"a": None}]
    assert np.isnan(meta["nan"])


def test_template_may_be_shapes_only_or_a_function_of_meta(directory):
    tree = {**tree_of(3), "key": jax.random.key(9)}
    checkpoints = Checkpoints(directory)
    checkpoints.save(3, tree, {"features": 40})
    assert_same(checkpoints.restore(jax.eval_shape(lambda: tree)).tree, tree)
    seen = []
    restored = checkpoints.restore(lambda meta: seen.append(meta) or tree)
    assert_same(restored.tree, tree)
    assert seen == [{"features": 40}]
    assert (restored.step, restored.meta, restored.skipped) == (3, {"features": 40}, ())
    flat = checkpoints.restore_flat()
    assert list(flat) == ["['b']['x']", "['count']", "['key']", "['w']"]
    assert flat["['w']"].tobytes() == np.asarray(tree["w"]).tobytes()


def test_weak_types_and_python_scalars_count_as_the_arrays_they_become(directory):
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, {"step": 7, "rate": 0.1}, {})
    restored = checkpoints.restore({"step": jnp.int32(0), "rate": jnp.float32(0)}).tree
    assert_same(restored, {"step": jnp.int32(7), "rate": jnp.float32(0.1)})
    checkpoints.save(2, {"step": jnp.asarray(8), "rate": jnp.asarray(0.5)}, {})
    assert_same(checkpoints.restore({"step": 0, "rate": 0.0}).tree, {"step": jnp.int32(8), "rate": jnp.float32(0.5)})
    checkpoints.save(3, {"step": 2**40, "rate": 0.1}, {})
    with pytest.raises(StructureMismatch, match="too large"):
        checkpoints.restore({"step": jnp.int32(0), "rate": 0.0})


def test_saved_values_survive_donation_and_mutation_right_after_save(directory):
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    checkpoints = Checkpoints(directory)
    state, host = {"w": jnp.arange(1000.0)}, np.arange(4)
    for step in range(3):
        expected = np.asarray(state["w"]).copy()
        checkpoints.save(step, (state, host), {})
        host += 1
        state = double(state)
        restored = checkpoints.restore((state, host)).tree
        assert_same(restored, ({"w": jnp.asarray(expected)}, host - 1))
        assert_same(double(restored[0]), state)  # restored buffers may be donated too


def test_restored_leaves_take_the_sharding_of_the_template(directory):
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("d",)), jax.sharding.PartitionSpec("d"))
    tree = {
        "a": jax.device_put(jnp.arange(4), sharding),
        "b": jnp.arange(4),
        "k": jax.device_put(jax.random.key(0), jax.devices()[0]),
    }
    checkpoints = Checkpoints(directory)
    checkpoints.save(0, tree, {})
    restored = checkpoints.restore(tree).tree
    assert_same(restored, tree)
    assert restored["a"].sharding == sharding
    assert not restored["b"].committed  # or the next jitted step would compile again


def test_saving_and_restoring_print_and_log_nothing(two_steps, capfd, caplog):
    capfd.readouterr()
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_steps.save(3, tree_of(3), {})
        two_steps.restore(tree_of(0))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"w": "text"}, r"\['w'\] is a str"),
        ({"w": {"f": len}}, r"\['w'\]\['f'\] is a builtin"),
        ({"w": np.array([None])}, "dtype object"),
        ({"w": np.array(["a"])}, "numbers only"),
    ],
)
def test_a_leaf_that_cannot_be_stored_is_named_before_anything_is_written(directory, tree, words):
    with pytest.raises(TypeError, match=words):
        Checkpoints(directory).save(0, tree, {})
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"slots": {0: "lora"}}, r"meta\['slots'\] has the key 0"),
        ({"a": [{1, 2}]}, r"meta\['a'\]\[0\] is a set"),
        ([], "list"),
    ],
)
def test_meta_that_json_would_change_or_refuse_is_named(directory, meta, words):
    with pytest.raises(TypeError, match=words):
        Checkpoints(directory).save(0, {}, meta)


def test_missing_extra_reshaped_and_recast_leaves_are_four_errors_naming_the_path(two_steps):
    good = tree_of(0)
    cases = {
        "missing leaf ['v']: found nothing, expected float32[2]": {**good, "v": jnp.zeros(2)},
        "extra leaf ['count']: found int32[], expected nothing": {"w": good["w"], "b": good["b"]},
        "reshaped leaf ['w']: found float32[40], expected float32[41]": {**good, "w": jnp.zeros(41)},
        "recast leaf ['b']['x']: found bfloat16[3,2], expected float32[3,2]": {**good, "b": {"x": jnp.zeros((3, 2))}},
        "recast leaf ['count']: found int32[], expected key<fry>[]": {**good, "count": jax.random.key(0)},
    }
    for message, template in cases.items():
        with pytest.raises(StructureMismatch) as caught:  # and no CheckpointWarning: a mismatch is no damage
            two_steps.restore(template)
        assert message in str(caught.value)
        assert "step 2 in" in str(caught.value)
        assert str(caught.value).count(" leaf ") == 1


def test_a_key_of_another_implementation_is_a_recast(directory):
    checkpoints = Checkpoints(directory)
    checkpoints.save(0, {"key": jax.random.key(0)}, {})
    with pytest.raises(StructureMismatch, match=r"recast leaf \['key'\]: found key<fry>\[\], expected key<rbg>"):
        checkpoints.restore({"key": jax.random.key(0, impl="rbg")})


def test_an_empty_directory_and_an_absent_step_say_so_and_what_to_do(directory, two_steps):
    empty = Checkpoints(directory / "nothing")
    assert (empty.steps(), empty.latest(), empty.best()) == ([], None, None)
    for call in (empty.restore_flat, empty.read_meta, lambda: empty.restore({})):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*nothing: check the path"):
            call()
    with pytest.raises(CheckpointError, match=r"no step 7 in .*it has the steps \[1, 2\]"):
        two_steps.restore(tree_of(0), step=7)
    with pytest.raises(ValueError, match="negative"):
        two_steps.save(-1, {}, {})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(directory, keep=0)
    (directory / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot use"):
        Checkpoints(directory / "file")
    with two_steps:
        pass
    with pytest.raises(CheckpointError, match="closed"):
        two_steps.restore_flat()


def test_saving_an_existing_step_raises_and_force_replaces_it(two_steps):
    with pytest.raises(CheckpointError, match=r"step 2 exists in .*force=True"):
        two_steps.save(2, tree_of(9), {})
    assert_same(two_steps.restore(tree_of(0)).tree, tree_of(2))
    two_steps.save(2, tree_of(9), {"new": True}, force=True)
    restored = two_steps.restore(tree_of(0))
    assert_same(restored.tree, tree_of(9))
    assert (restored.step, restored.meta) == (2, {"new": True})
    assert sorted(os.listdir(two_steps.directory)) == ["1", "2"]


def test_a_folder_that_is_no_checkpoint_is_never_removed(directory):
    checkpoints = Checkpoints(directory, keep=1)
    (directory / "3").mkdir()
    (directory / "3" / "thesis.txt").write_text("years of work")
    checkpoints.save(5, tree_of(5), {})
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoints.save(3, tree_of(3), {})
    assert (directory / "3" / "thesis.txt").read_text() == "years of work"
    assert checkpoints.steps() == [5]


# ---------------------------------------------------------------------------------------------- what is kept


def test_the_newest_and_the_best_are_kept_and_ties_go_to_the_later(directory):
    checkpoints = Checkpoints(directory, keep=2, keep_best=1)
    scores = [0.1, 0.9, 0.9, None, float("nan"), 0.2, 0.3]
    kept, best = [], []
    for step, score in enumerate(scores):
        checkpoints.save(step, {"w": jnp.full(3, step)}, {}, score=score)
        kept.append(checkpoints.steps())
        best.append(checkpoints.best())
    assert best == [0, 1, 2, 2, 2, 2, 2]
    assert kept == [[0], [0, 1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]
    assert checkpoints.latest() == 6
    assert sorted(os.listdir(directory)) == ["2", "5", "6"]


def test_the_step_just_saved_is_kept_even_if_it_is_not_the_newest(directory):
    checkpoints = Checkpoints(directory, keep=1, keep_best=0)
    checkpoints.save(10, tree_of(1), {})
    checkpoints.save(5, tree_of(2), {})
    assert checkpoints.steps() == [5, 10]


def test_listings_follow_the_disk_and_not_a_memory_of_it(two_steps):
    other = Checkpoints(two_steps.directory)
    other.save(3, tree_of(3), {})
    assert two_steps.latest() == 3
    shutil.rmtree(two_steps.directory / "3")
    assert (two_steps.latest(), two_steps.steps()) == (2, [1, 2])
    two_steps.save(3, tree_of(4), {})
    assert_same(other.restore(tree_of(0)).tree, tree_of(4))


# ---------------------------------------------------------------------------------------------- damage


def damages(data: bytes, rng: random.Random) -> dict[str, bytes | None]:
    flipped = bytearray(data)
    if flipped:
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return {"flipped": bytes(flipped), "cut to 0": b"", "cut to half": data[: len(data) // 2], "deleted": None}


def test_damage_to_any_file_falls_back_naming_leaf_and_file_or_changes_no_bit(two_steps, capfd):
    rng = random.Random(0)
    newest = two_steps.directory / "2"
    outcomes = collections.Counter()
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        data, name = file.read_bytes(), file.relative_to(newest).as_posix()
        for kind, damaged in damages(data, rng).items():
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                restored = two_steps.restore(tree_of(0))
            assert_same(restored.tree, tree_of(restored.step))
            assert restored.meta == {"step": restored.step}
            outcomes[restored.step] += 1
            if restored.step == 1:
                (skipped,), (warning,) = restored.skipped, caught
                assert warning.category is CheckpointWarning
                assert skipped.step == 2
                assert f"skipped step 2 in {two_steps.directory}: {skipped.reason}" == str(warning.message)
                assert name in skipped.reason or kind == "flipped"
                assert name == "manifest.json" or "leaf" in skipped.reason
                with pytest.raises(CheckpointError, match=r"step 2 in .* is damaged"):
                    two_steps.restore(tree_of(0), step=2)
            else:
                assert restored.skipped == ()
            file.write_bytes(data)
    assert outcomes[1] > 10
    assert capfd.readouterr() == ("", "")
    assert_same(two_steps.restore(tree_of(0)).tree, tree_of(2))


def test_a_flipped_bit_of_a_weight_is_caught_wherever_it_lies(directory):
    """Incompressible data: nearly every flip hits a value, which Orbax alone would restore without a word."""
    tree = {"w": jnp.asarray(np.random.RandomState(0).randint(0, 2**32, 4000, dtype=np.uint32))}
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, {"w": tree["w"] + 1}, {})
    checkpoints.save(2, tree, {})
    rng = random.Random(1)
    largest = max((p for p in (directory / "2").rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
    data, reasons = largest.read_bytes(), []
    for _ in range(12):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        largest.write_bytes(bytes(flipped))
        with pytest.warns(CheckpointWarning, match="skipped step 2"):
            restored = checkpoints.restore(tree)
        assert_same(restored.tree, {"w": tree["w"] + 1})
        reasons.append(restored.skipped[0].reason)
    assert any("leaf ['w']: its bytes have crc32:" in reason for reason in reasons)


def test_a_damaged_step_does_not_keep_another_from_being_saved_or_restored(two_steps):
    """Orbax's manager reads the metadata of every step it finds, and raises if one is damaged."""
    for step in ("1", "2"):
        (two_steps.directory / step / "_CHECKPOINT_METADATA").write_text('{"unknown": 1}')
    two_steps.save(3, tree_of(3), {})
    for step in (1, 2, 3):
        assert_same(two_steps.restore(tree_of(0), step=step).tree, tree_of(step))


def test_all_steps_damaged_is_one_error_naming_each_step_and_why(two_steps):
    two_steps.save(3, tree_of(3), {})
    (two_steps.directory / "1" / "manifest.json").write_text("{")
    (two_steps.directory / "2" / "manifest.json").unlink()
    shutil.rmtree(two_steps.directory / "3" / "default")
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError) as caught:
        two_steps.restore(lambda meta: pytest.fail("no template is asked for"))
    message = str(caught.value)
    assert "every step" in message
    assert "step 1: manifest.json cannot be read" in message
    assert "step 2: manifest.json is missing" in message
    assert "step 3: leaf " in message and "; file default/manifest.ocdbt is missing" in message


def test_a_manifest_of_a_later_format_says_which_version_and_is_no_damage(two_steps):
    file = two_steps.directory / "2" / "manifest.json"
    body = json.loads(file.read_text())["manifest"] | {"format": 99}
    file.write_text(json.dumps({"checksum": manifests._text_checksum(body), "manifest": body}))
    with pytest.raises(CheckpointError, match=r"format 99, written by \{.*'jax'.*reads up to format"):
        two_steps.restore(tree_of(0))
    two_steps.save(3, tree_of(3), {})
    assert two_steps.steps() == [1, 2, 3]


def test_a_damaged_step_may_be_saved_again_and_does_not_count_as_kept(directory):
    checkpoints = Checkpoints(directory, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, tree_of(step), {})
    (directory / "3" / "default" / "_METADATA").write_text("{}")
    with pytest.warns(CheckpointWarning, match="skipped step 3"):
        assert checkpoints.restore(tree_of(0)).step == 2
    with pytest.warns(CheckpointWarning, match=r"step 3 in .* is damaged and is replaced"):
        checkpoints.save(3, tree_of(30), {})
    assert_same(checkpoints.restore(tree_of(0)).tree, tree_of(30))
    (directory / "2" / "default" / "_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.restore(tree_of(0), step=2)
    checkpoints.save(4, tree_of(4), {})
    assert checkpoints.steps() == [3, 4]


# ---------------------------------------------------------------------------------------------- crashes


class Kill(BaseException):
    """Ends a save as a kill would: no handler of the library runs."""


def kill(*_: object) -> None:
    raise Kill


def test_a_crash_before_the_manifest_leaves_the_step_unlisted(two_steps, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "write", kill)
        with pytest.raises(Kill):
            two_steps.save(3, tree_of(3), {})
    assert (two_steps.directory / ".saving" / "3" / "default").is_dir()  # Orbax had finished
    assert two_steps.steps() == [1, 2]
    assert_same(two_steps.restore(tree_of(0)).tree, tree_of(2))
    two_steps.save(3, tree_of(3), {})
    assert_same(two_steps.restore(tree_of(0)).tree, tree_of(3))
    assert sorted(os.listdir(two_steps.directory)) == ["1", "2", "3"]


@pytest.mark.parametrize("moment", range(6))
def test_a_crash_at_any_rename_or_removal_of_a_forced_save_leaves_the_old_or_the_new_step(
    directory, monkeypatch, moment
):
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(1, tree_of(1), {})  # the only step: there is nothing older to fall back to
    calls = iter(range(100))
    rename, rmtree = os.rename, shutil.rmtree

    def counted(original):
        def call(*args, **kwargs):
            if str(args[0]).startswith(str(directory / ".saving" / "1") + ".orbax"):
                return original(*args, **kwargs)  # Orbax's own
            if next(calls) == moment:
                raise Kill
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.os, "rename", counted(rename))
        patch.setattr(checkpoint_module.shutil, "rmtree", counted(rmtree))
        with contextlib.suppress(Kill, CheckpointError):
            checkpoints.save(1, tree_of(2), {}, force=True)
    found = Checkpoints(directory).restore(tree_of(0))
    assert found.step == 1
    assert found.skipped == ()
    assert any(np.array_equal(found.tree["w"], tree_of(value)["w"]) for value in (1, 2))
    checkpoints.save(1, tree_of(3), {}, force=True)
    assert_same(checkpoints.restore(tree_of(0)).tree, tree_of(3))
    assert os.listdir(directory) == ["1"]


def test_a_full_disk_is_one_error_and_the_next_save_works(two_steps):
    before = sorted(os.listdir(two_steps.directory))
    noise = {"w": np.random.RandomState(0).rand(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="step 3 could not be saved"):
            two_steps.save(3, noise, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(two_steps.directory)) == before
    assert_same(two_steps.restore(tree_of(0)).tree, tree_of(2))
    two_steps.save(3, noise, {})
    assert_same(two_steps.restore(noise).tree, noise)


LOOP = """
import os, random, signal, sys, time, warnings
import numpy as np
from esper_jax.tolaria.checkpoint import Checkpoints
rng = random.Random(0)
for number in range(int(sys.argv[2])):
    directory = os.path.join(sys.argv[1], str(number))
    pid = os.fork()
    if pid == 0:
        checkpoints = Checkpoints(directory, keep=2)
        for value in range(1, 10**6):
            step = value // 2  # every step is saved once and then replaced
            checkpoints.save(step, {"w": np.full(5000, value)}, {"value": value}, force=True)
    time.sleep(rng.uniform(0.02, 0.7))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
"""


def test_kill_9_at_random_moments_always_leaves_a_whole_newest_step(tmp_path):
    """The children fork from a process that has only imported, so that many kills cost one import."""
    kills = 8
    for number in range(kills):
        Checkpoints(tmp_path / str(number)).save(0, {"w": np.full(5000, 0)}, {"value": 0})
    root = pathlib.Path(checkpoint_module.__file__).parents[2]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", LOOP, str(tmp_path), str(kills)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    progress = []
    for number in range(kills):
        checkpoints = Checkpoints(tmp_path / str(number))
        restored = checkpoints.restore({"w": np.zeros(5000, int)})
        assert restored.skipped == ()  # a kill alone never tears a step
        assert restored.step == checkpoints.latest()
        assert restored.meta["value"] // 2 == restored.step
        assert (restored.tree["w"] == restored.meta["value"]).all()
        progress.append(restored.meta["value"])
        checkpoints.save(10**6, {"w": np.zeros(3)}, {})
        assert all(name.isdecimal() for name in os.listdir(checkpoints.directory))
    assert max(progress) > 0, "no child got as far as one save"


def test_the_part_of_a_process_that_is_gone_or_failed_is_not_waited_for(tmp_path, monkeypatch):
    """Each is an error with the reason, which fails that one save."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(OSError, match="process 1 is gone and has stored no part"):
        together.collect(tmp_path, (), {1}.__contains__)
    (tmp_path / "failed.1").write_text("OSError: no space")
    with pytest.raises(OSError, match="process 1 could not store its part: OSError: no space"):
        together.collect(tmp_path, ())
    (tmp_path / "stored.1.json").write_text("{}")
    assert together.collect(tmp_path, (), {1, 2}.__contains__) == ()


def test_a_step_of_other_versions_that_does_not_fit_says_which_wrote_it(tmp_path, monkeypatch):
    """Only those that differ, and only where something does not fit."""
    from esper_jax.tolaria import manifest

    here = manifest.versions()
    with Checkpoints(tmp_path) as store:
        with monkeypatch.context() as patched:
            patched.setattr(manifest, "versions", lambda: {**here, "jax": "0.4.1"})
            store.save(1, {"a": jnp.ones(2)}, {})
        store.save(2, {"a": jnp.ones(2)}, {})
        written = rf"step 1 in .* \(written by jax 0\.4\.1; here are jax {here['jax']}\) does not fit"
        with pytest.raises(StructureMismatch, match=written):
            store.restore({"a": jnp.ones(3)}, step=1)
        with pytest.raises(StructureMismatch) as raised:
            store.restore({"a": jnp.ones(3)}, step=2)
        assert "written by" not in str(raised.value)
        assert store.restore({"a": jnp.ones(2)}, step=1).step == 1
