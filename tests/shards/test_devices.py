"""A growing run on 8 devices equals the run on one, however its parameters are divided, and goes on on others."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from esper_jax import Tolaria, germinate, morph
from esper_jax.tolaria.sharding import Layout
from tests.shards import run

pytestmark = pytest.mark.slow
WHOLE = "P()"


OTHERS = ("dp", "fsdp", "own", "rests", "on 4", "on 1")


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("what", ["params", "statistics", "optimizer", "folded"])
def test_every_layout_ends_where_one_device_ends(found, name, what):
    """Through germination, isolation, blending, fossilisation, a fold, and a checkpoint on another mesh."""
    for ours, theirs in zip(found[name][what], found["one"][what], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_the_seeds_lives_are_the_same(found):
    """A seed was blended in and kept, at the same ticks on every layout; the resumes began in mid-blend."""
    stages = found["one"]["stages"]
    assert [stage for _, _, stage in stages] == ["GERMINATED", "TRAINING", "BLENDING", "HOLDING", "FOSSILIZED"]
    assert stages[2][0] < run.HALF < stages[3][0]
    for name in ("dp", "fsdp", "own", "rests"):
        assert found[name]["stages"] == stages
        np.testing.assert_allclose(found[name]["scores"], found["one"]["scores"], atol=1e-3)
    for name in ("on 4", "on 1"):
        assert found[name]["stages"] == [stage for stage in stages if stage[0] > run.HALF]


@pytest.mark.parametrize(
    ("name", "devices"), [("one", 1), ("dp", 8), ("fsdp", 8), ("own", 8), ("rests", 8), ("on 4", 4), ("on 1", 1)]
)
def test_every_array_of_the_morph_is_on_all_devices_of_the_run(found, name, devices):
    assert found[name]["devices"] == [devices]


def test_growth_leaves_the_hosts_arrays_where_they_were_and_seeds_and_optimizer_follow(found):
    """fsdp divides the one large kernel, its momentum, and the half of a lora seed that reads the same features."""
    kernel, seed = "['Dense_1']['kernel']", "['Dense_1']['slot_0']"
    fsdp = found["fsdp"]
    assert {path for path, spec in fsdp["host places"].items() if spec != WHOLE} == {f"['params']{kernel}"}
    assert {path for path, spec in fsdp["seed places"].items() if spec != WHOLE} == {f"{seed}['down']"}
    moved = {path for path, spec in fsdp["optimizer places"].items() if spec != WHOLE}
    assert moved == {f".host[0].trace{kernel}", f".seeds{seed}.inner[0].trace['down']"}
    assert set(found["dp"]["host places"].values()) == {WHOLE}
    assert fsdp["written in parts"] == 1 and found["dp"]["written in parts"] == 0


def test_a_mesh_and_specs_of_ones_own_hold_and_seeds_can_be_kept_whole(found):
    own = found["own"]
    assert own["host places"]["['params']['Dense_1']['kernel']"] == "P('in', 'out')"
    assert set(own["seed places"].values()) == {WHOLE}


def test_one_program_a_structure_and_the_grown_ones_are_built_ahead(found):
    """The host's and the grown one; nothing that was built ahead is compiled anew. Planted, there is one for all."""
    for name in ("one", "dp", "fsdp", "own"):
        assert found[name]["compiled"] == 2 and found[name]["warnings"] == []
    assert found["rests"]["compiled"] == 1 and found["rests"]["warnings"] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("an axis", "names the axis 'model'; the mesh has in, out"),
        ("indivisible", "divides an axis of 2 of the parameter Dense_2/kernel (64, 2) by 4"),
        ("too long", "for the parameter Dense_2/bias has more entries than its shape (2,)"),
        ("missing", "names no PartitionSpec for the parameter Dense_2/"),
        ("extra", "for Dense_9/bias, which the host has not"),
        ("batch", "a batch of 30 examples does not divide over 8 devices; choose a multiple of 8"),
    ],
)
def test_a_layout_that_cannot_be_says_which_parameter_and_why(found, name, words):
    assert words in found["refused"][name]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sharding": "ddp"}, ValueError, "must be 'dp', 'fsdp' or PartitionSpecs, got 'ddp'"),
        ({"sharding": 3}, TypeError, "mapping of PartitionSpecs, got a int"),
        ({"sharding": {"kernel": "data"}}, TypeError, "mapping of PartitionSpecs, got a str"),
        ({"mesh": jax.devices()}, TypeError, "must be a jax.sharding.Mesh"),
        ({"sharding": "dp", "seed_sharding": "half"}, ValueError, "one of host, replicated, auto, got 'half'"),
        ({"seed_sharding": "auto"}, ValueError, "needs sharding= or mesh="),
        ({"sharding": "dp", "compile_in": "process"}, ValueError, "builds for one device"),
    ],
)
def test_wrong_options_are_refused_when_the_trainer_is_made(options, error, words):
    with pytest.raises(error, match=words):
        Tolaria(run.Net(), run.LOSS, run.optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("seeds", "divided"), [("host", {"slot_0", "slot_1"}), ("auto", {"slot_1"}), ("replicated", set())]
)
def test_seeds_are_divided_as_asked(seeds, divided):
    """A lora of 256 elements an array is an adapter that "auto" keeps whole, an mlp of 8,192 is not."""
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    grown = morph(run.Net().init(jax.random.key(0), run.TRAIN[0][:1]))
    grown = germinate(grown, "Dense_1", "lora", key=jax.random.key(1), rank=4)
    grown = germinate(grown, "Dense_1", "mlp", key=jax.random.key(2), hidden=128)
    places = Layout(mesh, "fsdp", seeds).shardings(grown).seeds
    found = {path[1].key for path, one in jax.tree_util.tree_leaves_with_path(places) if str(one.spec) != WHOLE}
    assert found == divided


def test_a_layout_says_what_it_is():
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    assert repr(Layout(mesh, "fsdp", "auto")) == "Layout(fsdp on data=1, seeds as auto)"
