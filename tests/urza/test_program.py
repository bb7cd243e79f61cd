"""A seed whose forward pass was stored runs, trains and grows where its blueprint's source is not."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap
import uuid
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_jax
from esper_jax import Site, Stage, Urza, seed_of
from esper_jax.kasmina.blueprints import get_blueprint, register_blueprint
from esper_jax.kasmina.graft import zero_taps
from esper_jax.urza import StoredSeed

from .grower import TRAIN, VALIDATION, Grower, trainer
from .world import FITTING, SITES, by_hand, holding, host_params, same_bits, stored

PLAIN = [(name, kind) for name, kind in FITTING if kind != "attention"]
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The registry of blueprints, put back afterwards."""
    held = dict(get_blueprint.__globals__["_REGISTRY"])
    monkeypatch.setitem(get_blueprint.__globals__, "_REGISTRY", held)
    return held


@pytest.fixture
def urza() -> Urza:
    return Urza(f"memory://{uuid.uuid4().hex}")


def sine_init(key: jax.Array, site: Site, *, waves: int = 4) -> dict[str, Any]:
    first, second = jax.random.split(key)
    up = 0.1 * jax.random.normal(second, (waves, site.out_features), site.dtype)
    return {"down": jax.random.normal(first, (site.in_features, waves), site.dtype), "ways": [up]}


def sine(params: dict[str, Any], u: jax.Array) -> jax.Array:
    return jnp.sin(u @ params["down"]) @ params["ways"][0]


@pytest.fixture
def sourceless(urza: Urza, registry: dict[str, Any]) -> tuple[Urza, StoredSeed]:
    """A library with a seed of a user's blueprint, which is then forgotten; and the seed as it was put."""
    register_blueprint("sine", init=sine_init, apply=sine, reads="input", kinds=("dense",))
    site = esper_jax.morph(host_params()).spec.by_path["Dense_0"]
    seed = stored("sine", site, waves=3)
    urza.put(seed, program=True, contribution=1.0, measure=False)
    del registry["sine"]
    return urza, seed


@pytest.mark.parametrize(("blueprint", "kind"), PLAIN)
def test_the_program_of_every_blueprint_gives_what_its_source_gives(blueprint, kind, urza, registry) -> None:
    """Outputs and gradients at sizes that were not named when it was stored; to float32 rounding."""
    site = SITES[kind]
    seed = stored(blueprint, site)
    program = get_blueprint(urza.get(urza.put(seed, program=True, measure=False), program=True).blueprint)
    source = get_blueprint(blueprint)
    width = site.in_features if source.reads == "input" else site.out_features
    for shape in [(2, 5, 7, width)] if site.spatial else [(2, 4, width)]:
        u = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
        assert program.reads == source.reads and program.fits(site)

        def both(params: Any, u: jax.Array) -> list[Any]:
            runs = (
                lambda p, u: program.apply(p, u, site=site),
                lambda p, u: source.apply(p, u, site=site, **seed.config),
            )
            return [
                jax.value_and_grad(lambda p, u, run=run: jnp.sum(jnp.sin(run(p, u))), (0, 1))(params, u) for run in runs
            ]

        mine, theirs = jax.jit(both)(seed.params, u)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_it_germinates_by_itself_where_the_blueprint_is_unknown(sourceless) -> None:
    """`get` registers the program under a name of its own; the seed's parameters are the stored ones."""
    urza, seed = sourceless
    (entry,) = urza.find(compatible_with=esper_jax.morph(host_params()).spec.by_path["Dense_0"])
    found = urza.get(entry)
    assert found.blueprint == f"sine@{entry.id[:12]}" and same_bits(found.params, seed.params)
    morph = esper_jax.germinate(esper_jax.morph(host_params()), "Dense_0", found)
    assert same_bits(morph.seeds["Dense_0"]["slot_0"], jax.tree.map(jnp.asarray, seed.params))
    with pytest.raises(KeyError, match="unknown blueprint 'sine'"):
        esper_jax.germinate(morph, "Dense_0", "sine", key=jax.random.key(0))


def test_without_a_program_an_unknown_blueprint_is_named_and_fits_nowhere(urza: Urza) -> None:
    found = urza.get(urza.put(by_hand(3), measure=False))
    with pytest.raises(ValueError, match=f'stored seed {found.id[:12]} .*unknown blueprint "nobody\'s"'):
        esper_jax.germinate(esper_jax.morph(host_params()), "Dense_0", found)
    assert urza.find(compatible_with=esper_jax.morph(host_params()).spec.by_path["Dense_0"]) == []


def test_it_fits_no_site_of_another_shape(sourceless) -> None:
    urza, _ = sourceless
    morph = esper_jax.morph(host_params())
    found = urza.get(urza.find()[0])
    with pytest.raises(ValueError, match=r"needs dense \[4\] -> \[6\] float32, the site is dense \[6\] -> \[3\]"):
        esper_jax.germinate(morph, "Dense_1", found)
    assert morph.spec.plants == () and urza.find(compatible_with=morph.spec.by_path["Dense_1"]) == []
    with pytest.raises(ValueError, match=f"stored seed {found.id[:12]} runs inputs of rank 2, 3, 4, got shape"):
        get_blueprint(found.blueprint).apply(found.params, jnp.ones((1, 1, 1, 1, 4)))


def test_it_runs_and_learns_in_a_grown_model_like_its_source(sourceless, registry) -> None:
    """Inside lean and planted slots, under jit, grad, vmap and the taps of a train step; to float32 rounding."""
    urza, _ = sourceless
    found = urza.get(urza.find()[0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)

    def model(variables: Any, x: jax.Array) -> jax.Array:
        import flax.linen as nn

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                h = nn.relu(nn.Dense(6, name="Dense_0")(x))
                return nn.Dense(3, name="Dense_1")(h)

        return Net().apply({"params": variables}, x)

    forward = esper_jax.graft(model)

    def loss(params: Any, morph: Any, alpha: Any) -> jax.Array:
        morph = morph.with_params(params)
        life = {path: s.replace(alpha=s.alpha.at[0].set(alpha)) for path, s in morph.state.items()}
        y = forward.tapped(morph.replace(state=life), zero_taps(morph), jnp.array(False), x)
        return jnp.mean(jnp.square(y))

    register_blueprint("sine", init=sine_init, apply=sine, reads="input", kinds=("dense",))
    results = {}
    for name, blueprint in (("program", found.blueprint), ("source", "sine")):
        for planted in (None, {blueprint: dict(found.config)}) if name == "program" else (None,):
            morph = esper_jax.morph(host_params(), slots=2, planted=None)
            if planted is not None:
                morph = esper_jax.morph(host_params(), slots=2, planted=planted, where="Dense_0")
            given = {"params": found.params, **found.config}
            morph = esper_jax.germinate(morph, "Dense_0", blueprint, **given)
            for _ in range(2):
                morph = esper_jax.advance(morph, "Dense_0")
            run = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, None, 0)))
            results[name, planted is None] = run(morph.params, morph, jnp.array([0.25, 1.0]))
    for lean in (True, False):
        pair = [jax.tree.leaves(results[which]) for which in (("program", lean), ("source", True))]
        assert any(np.any(np.asarray(leaf) != 0) for leaf in pair[0])
        for a, b in zip(*pair, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_trained_program_is_put_again_under_its_own_name_with_its_program(sourceless) -> None:
    """What goes by `sine@id` in this process is a `sine` in every library."""
    urza, _ = sourceless
    found = urza.get(urza.find()[0])
    morph = esper_jax.germinate(esper_jax.morph(host_params(), slots=1), "Dense_0", found)
    grown = holding()
    life = {"Dense_0": jax.tree.map(lambda field: field[:1], grown.state["Dense_0"])}
    seeds = jax.tree.map(lambda leaf: leaf * 2, morph.seeds)
    again = urza.put(seed_of(morph.replace(seeds=seeds, state=life), "Dense_0"), measure=False)
    assert again != found.id and urza.entry(again).blueprint == "sine" and urza.get(again).programs == found.programs
    assert urza.put(found, measure=False) == found.id
    other = Urza(f"memory://{uuid.uuid4().hex}")
    assert other.put(found, measure=False) == found.id and other.get(found.id).programs == found.programs


def test_a_blueprint_that_cannot_be_stored_says_so_and_nothing_is_written(urza: Urza, registry) -> None:
    def picky(params: dict[str, Any], u: jax.Array) -> jax.Array:
        return u @ params["w"] * float(u.shape[0] > 3)

    register_blueprint("picky", init=lambda key, site: {"w": jnp.ones((6, 5))}, apply=picky, reads="input")
    with pytest.raises(
        ValueError, match=r"forward pass of 'picky' cannot be stored for an input of rank 2 .*without program="
    ):
        urza.put(stored("picky"), program=True, measure=False)
    assert urza.ids() == []


def test_a_program_that_jax_cannot_read_is_named(urza: Urza) -> None:
    seed_id = urza.put(stored("lora", rank=2), program=True, measure=False)
    found = urza.get(seed_id)
    broken = StoredSeed(**{**vars(found), "programs": {2: b"nonsense" * 20}, "id": ""})
    broken_id = urza.put(broken, measure=False)
    apply = get_blueprint(urza.get(broken_id, program=True).blueprint).apply
    with pytest.raises(ValueError, match=f"stored seed {broken_id[:12]}: JAX .* cannot read its program"):
        apply(found.params, jnp.ones((2, 6)))


def test_another_config_is_refused_because_the_program_has_its_own(sourceless) -> None:
    urza, _ = sourceless
    name = urza.get(urza.find()[0]).blueprint
    with pytest.raises(ValueError, match="its program is that of the config {'waves': 3}, got {'waves': 9}"):
        esper_jax.germinate(esper_jax.morph(host_params()), "Dense_0", name, key=jax.random.key(0), waves=9)


@pytest.mark.slow
def test_another_process_without_the_source_goes_on_with_it(sourceless, tmp_path: pathlib.Path) -> None:
    """Germinated by a decision and trained here, restored there with the library alone, and trained on."""
    memory, _ = sourceless
    urza = Urza(tmp_path / "seeds")
    seed_id = urza.put(memory.get(memory.find()[0]), measure=False)
    name, run = f"sine@{seed_id[:12]}", str(tmp_path / "run")
    made = trainer(run, Grower(seed_id), urza)
    state, _ = made.fit(made.init({"params": host_params()}, key=jax.random.key(1)), TRAIN, VALIDATION, epochs=4)
    assert [plant.blueprint for plant in state.morph.spec.plants] == [name]
    assert int(state.morph.state["Dense_0"].stage[0]) == Stage.TRAINING
    go_on = f"""
        import numpy as np
        from tests.urza.grower import Grower, TRAIN, VALIDATION, trainer
        from esper_jax import CheckpointError, Stage, Urza, restore_morph
        try:
            restore_morph({run!r})
        except CheckpointError as error:
            print(error)
        urza = Urza({urza.store.url!r})
        before = restore_morph({run!r}, urza=urza)
        made = trainer({run!r}, Grower({seed_id!r}), urza)
        state, _ = made.fit(made.restore(), TRAIN, VALIDATION, epochs=7)
        moved = state.morph.seeds["Dense_0"]["slot_0"]["down"] - before.seeds["Dense_0"]["slot_0"]["down"]
        stage = Stage(int(state.morph.state["Dense_0"].stage[0])).name
        print(state.morph.spec.plants[0].blueprint, stage, bool(np.abs(moved).max() > 0))
    """
    command = [sys.executable, "-c", textwrap.dedent(go_on)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert f"It is a stored program: get '{seed_id[:12]}' from its library first" in said[0]
    assert said[1] == f"{name} BLENDING True"
