"""The built-in tasks: data that never changes or leaks, hosts that learn, errors that say what to do."""

import builtins
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from esper_jax.tasks import MLP, TASKS, CharTransformer, Conv1dNet, DigitsCNN, Task, accuracy, cross_entropy, get_task
from esper_jax.tasks.charlm import VOCABULARY, encode


@pytest.fixture(scope="module")
def built():
    return {name: get_task(name) for name in TASKS}


@pytest.mark.parametrize(
    ("name", "example", "dtype", "classes", "outputs"),
    [
        ("digits", (8, 8, 1), np.float32, 10, (10,)),
        ("mnist1d", (40,), np.float32, 10, (10,)),
        ("mnist1d-cnn", (40,), np.float32, 10, (10,)),
        ("charlm", (64,), np.int32, 97, (64, 97)),
    ],
)
def test_shapes_and_dtypes_of_data_outputs_losses_and_scores(built, name, example, dtype, classes, outputs):
    task = built[name]
    assert task.name == name
    assert task.classes == classes
    for _, (x, y) in task.splits():
        assert x.shape[1:] == example
        assert x.dtype == dtype
        assert y.dtype == np.int32
        assert y.shape == x.shape[: y.ndim]
        assert y.min() >= 0
        assert y.max() < classes
    x, y = task.train[0][:3], task.train[1][:3]
    out = jax.jit(lambda key: task.model.apply(task.model.init(key, task.example), x))(jax.random.key(0))
    assert out.shape == (3, *outputs)
    assert task.loss(out, y).shape == (3,)
    assert task.score(out, y).shape == (3,)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "mnist1d-cnn"])  # the data of mnist1d
def test_building_twice_gives_the_same_bits_and_leaves_the_global_generators_alone(built, name):
    before, numpy_before = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    again = get_task(name)
    assert random.getstate() == before
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    for (_, first), (_, second) in zip(built[name].splits(), again.splits(), strict=True):
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("name", TASKS)
def test_no_example_is_in_two_splits(built, name):
    rows = {part: {row.tobytes() for row in x} for part, (x, _) in built[name].splits()}
    assert not rows["train"] & rows["validation"]
    assert not rows["train"] & rows["test"]
    assert not rows["validation"] & rows["test"]


@pytest.mark.parametrize("name", ["digits", "mnist1d"])
def test_every_class_is_in_every_split_at_its_share(built, name):
    for _, (_, y) in built[name].splits():
        share = np.bincount(y, minlength=10) / len(y)
        assert share.min() > 0.07
        assert share.max() < 0.13


def test_data_is_read_only(built):
    with pytest.raises(ValueError, match="read-only"):
        built["digits"].train[0][0] = 0


def test_mnist1d_is_standardised_by_its_training_part(built):
    x = built["mnist1d"].train[0]
    assert abs(x.mean()) < 1e-4
    assert abs(x.std() - 1) < 1e-4


def test_charlm_targets_are_the_inputs_one_character_later(built):
    x, y = built["charlm"].train
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    np.testing.assert_array_equal(encode("\n ~\té"), [0, 1, 95, 96, 96])
    assert len(VOCABULARY) == 96


def test_char_transformer_does_not_look_ahead():
    model = CharTransformer(vocabulary=7, width=8, length=10)
    x = jax.random.randint(jax.random.key(0), (2, 10), 0, 7)
    forward = jax.jit(lambda x: model.apply(model.init(jax.random.key(1), x), x))
    before, after = forward(x), forward(x.at[:, 6:].set((x[:, 6:] + 1) % 7))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.array_equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("name", TASKS)
def test_the_host_learns_within_a_few_steps(built, name):
    task = built[name]
    x, y = jnp.asarray(task.train[0][: task.batch_size]), jnp.asarray(task.train[1][: task.batch_size])
    variables = jax.jit(task.model.init)(jax.random.key(0), task.example)
    params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    tx = optax.adamw(task.learning_rate)

    @jax.jit
    def step(params, stats, opt_state):
        def objective(params):
            out, new = task.model.apply({"params": params, **stats}, x, train=True, mutable=list(stats))
            return task.loss(out, y).mean(), new

        (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    opt_state, losses = tx.init(params), []
    for _ in range(15):
        params, stats, opt_state, loss = step(params, stats, opt_state)
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    # 3 % of a guess's loss, ln C, is far above the rounding of float32 and far below what 15 steps give.
    assert losses[-1] < losses[0] - 0.03 * np.log(task.classes)


def test_loss_and_score_are_per_example_and_average_over_positions():
    logits = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75]], [[0.9, 0.1], [0.9, 0.1]]]))
    targets = jnp.array([[0, 1], [0, 1]])
    want = -np.array([np.log(0.5) + np.log(0.75), np.log(0.9) + np.log(0.1)]) / 2
    np.testing.assert_allclose(cross_entropy(logits, targets), want, rtol=1e-6)
    np.testing.assert_array_equal(accuracy(logits, targets), [1.0, 0.5])


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (DigitsCNN(features=(2, 3), classes=4), jnp.zeros((2, 8, 8, 1))),
        (MLP(features=(5,), classes=4), jnp.zeros((2, 6))),
        (Conv1dNet(features=(2, 2, 2), classes=4), jnp.zeros((2, 16))),
    ],
)
def test_the_widths_of_a_host_can_be_turned(model, x):
    assert jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0), x), x)).shape == (2, 4)


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no task 'digit'; choose from digits, mnist1d, mnist1d-cnn, charlm"):
        get_task("digit")


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("mnist1d", "mnist1d")])
def test_a_missing_package_says_what_to_install(monkeypatch, name, package):
    real = builtins.__import__

    def absent(wanted, variables=None, scope=None, names=(), level=0):
        if level == 0 and wanted.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {wanted!r}", name=package)
        return real(wanted, variables, scope, names, level)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        ImportError, match=rf'task {name!r} needs the package {package!r}.*pip install "esper_jax\[tasks\]"'
    ):
        get_task(name)


def test_a_text_that_is_too_long_says_how_to_read_it():
    model = CharTransformer(vocabulary=5, length=4)
    with pytest.raises(ValueError, match=r"6 characters long and this CharTransformer reads 4 at most.*length=6"):
        model.init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))


def test_a_task_whose_data_does_not_fit_is_refused():
    x, y = np.zeros((4, 2), np.float32), np.zeros(4, np.int32)
    with pytest.raises(ValueError, match="task 'mine': test has 4 inputs and 3 targets"):
        Task("mine", "", "", MLP(), (x, y), (x, y), (x, y[:3]))
    with pytest.raises(ValueError, match="batch_size 64 does not fit its 4 training examples; give 1 to 4"):
        Task("mine", "", "", MLP(), (x, y), (x, y), (x, y))
