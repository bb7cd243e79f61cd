"""Data that cannot be trained on is refused with the place of what is wrong, and good data costs nothing on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.tolaria.inspect import check_arrays, check_batch
from tests.tolaria import growing

X, Y = growing.TRAIN


def changed(array, at, value):
    """A copy with one value changed."""
    array = np.array(array)
    array[at] = value
    return array


BAD = {
    "nan": ((changed(X, (7, 1), np.nan), Y), r"inputs hold nan at \[7, 1\] \(1 such values\)"),
    "infinite": ((changed(X, (9, 0), -np.inf), Y), r"inputs hold -inf at \[9, 0\]"),
    "device nan": ((jnp.asarray(changed(X, (7, 1), np.nan)), jnp.asarray(Y)), r"inputs hold nan at \[7, 1\]"),
    "label": ((X, changed(Y, 3, 2)), r"the target at \[3\] is 2, and with classes=2 it must be 0 to 1"),
    "negative label": ((X, changed(Y, 3, -1)), r"the target at \[3\] is -1"),
    "floating label": (
        (X, changed(Y.astype(np.float32), 3, 7.5)),
        r"the target at \[3\] is 7.5, and with classes=2 it",
    ),
    "object": ((X.astype(object), Y), "inputs are of dtype object, and must be numbers"),
    "text": ((X, Y.astype(str)), r"targets are of dtype <U\d+, and must be numbers"),
    "mapping": ({"image": changed(X, (0, 0), np.nan), "label": Y}, r"inputs hold nan at \[0, 0\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_arrays_are_looked_through_once_and_refused_before_the_first_step(name):
    data, words = BAD[name]
    with pytest.raises(ValueError, match=f"the training data: {words}.*check_data=False"):
        check_arrays("training", data, 2)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((X[:0], Y[:0]), "it is empty"),
        ((X[:4], Y[:3]), r"different numbers of examples, \(4, 3\), \(3,\)"),
        ((np.float32(1), np.int32(1)), "no examples along a first axis"),
        ((changed(X[:4], (2, 0), np.nan), Y[:4]), r"inputs hold nan at \[2, 0\]"),
        ((X[:4], np.array(["a", "b", "c", "d"])), "targets are of dtype <U1"),
        ((X[:2], np.array([0.0, 5.0])), r"the target at \[1\] is 5.0"),  # as many labels as classes
        ((X[:4], np.array([0, 1, 5, 1])), r"the target at \[2\] is 5"),
        ({"a": X[:4], "b": changed(X[:4], (1, 1), np.inf)}, r"b hold inf at \[1, 1\]"),
        ((changed(X[:4].astype(np.float64), (1, 2), 1e300), Y[:4]), r"inputs hold 1e\+300 at \[1, 2\]"),  # as float32
        ((changed(X[:4], (3, 0), np.nan), jnp.asarray(Y[:4])), r"inputs hold nan at \[3, 0\]"),
    ],
)
def test_a_bad_batch_of_an_iterable_is_named_with_its_epoch(batch, words):
    with pytest.raises(ValueError, match=f"batch 3 of epoch 1 of the validation data: .*{words}"):
        check_batch("validation", batch, 2, 1, 3, values=True)


def test_a_batch_of_other_dtypes_than_those_before_it_is_named():
    """It would have the train step compiled anew; the same for JAX is the same."""
    first = check_batch("training", (X[:4], Y[:4]), 2, 0, 0, values=True)
    assert first == {"inputs": "float32", "targets": "int32"}
    assert check_batch("training", (X[:3].astype(np.float64), Y[:3]), 2, 0, 1, values=True, like=first) == first
    words = "batch 2 of epoch 0 .*its arrays are inputs float16, targets int32, and those of earlier .*inputs float32"
    with pytest.raises(ValueError, match=words):
        check_batch("training", (X[:4].astype(np.float16), Y[:4]), 2, 0, 2, values=True, like=first)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "validation data must be a pair .*got NoneType"),
        (5, "validation data must be a pair .*got int"),
    ],
)
def test_validation_data_that_is_none_is_refused_before_the_first_step(data, words):
    made = growing.trainer(None, controller=None)
    state = growing.start(made)
    for call in (lambda: made.fit(state, (X, Y), data, epochs=1), lambda: made.evaluate(state, data)):
        with pytest.raises(TypeError, match=words):
            call()


def test_validation_data_that_is_read_only_once_will_do_for_one_evaluation():
    made = growing.trainer(None, controller=None)
    state = growing.start(made)
    with pytest.raises(TypeError, match="validation data of type list_iterator can be read only once"):
        made.fit(state, (X, Y), iter([(X, Y)]), epochs=1)
    assert made.evaluate(state, iter([(X, Y)])) == made.evaluate(state, [(X, Y)])


def test_batches_of_two_structures_may_alternate_each_in_its_dtypes():
    like = check_batch("training", (X[:4], Y[:4]), 2, 0, 0, values=True)
    like = check_batch("training", {"a": X[:4], "b": Y[:4] > 0}, 2, 0, 1, values=True, like=like)
    assert like == {"inputs": "float32", "targets": "int32", "a": "float32", "b": "bool"}
    like = check_batch("training", (X[:4], Y[:4]), 2, 0, 2, values=True, like=like)
    with pytest.raises(
        ValueError, match="batch 3 of epoch 0 .*its arrays are a float32, b int32, and those of earlier"
    ):
        check_batch("training", {"a": X[:4], "b": Y[:4]}, 2, 0, 3, values=True, like=like)


def test_what_is_good_passes_and_values_on_the_device_or_later_on_are_not_fetched():
    check_arrays("training", (X, Y), 2)
    check_arrays("training", (X, Y.astype(np.float32) * 7), None)  # a regression's targets
    check_arrays("training", (X, Y.astype(np.float32)), 2)  # as a binary cross-entropy takes them
    check_arrays("training", (X, Y[:, None] * 0.8 + 0.1), 2)
    check_arrays("training", (X, Y * 2.0 - 1.0), 2)  # as a hinge loss takes them
    check_arrays("training", (X, 9 * np.eye(2, dtype=np.float32)[Y]), 2)  # another model's logits
    check_batch("training", (X[:4], Y[:4]), 2, 0, 0, values=True)
    bad = changed(X[:4], (0, 0), np.nan)
    check_batch("training", (bad, Y[:4]), 2, 0, 0, values=False)
    with jax.transfer_guard_device_to_host("disallow"):
        check_batch("training", (jnp.asarray(bad), jnp.asarray(Y[:4])), 2, 0, 0, values=True)


def test_fit_refuses_bad_data_of_each_form_and_trains_on_it_where_asked_to():
    """As arrays, a list or a function of the epoch; with check_data=False the bad batch is skipped and counted."""
    bad = changed(X, (0, 0), np.nan)
    batches = [(bad[i : i + 32], Y[i : i + 32]) for i in range(32, 256, 32)] + [(bad[:32], Y[:32])]
    made = growing.trainer(None, controller=None)
    for train, validation, words in (
        ((bad, Y), growing.VALIDATION, "the training data: inputs hold nan"),
        (batches, growing.VALIDATION, "batch 7 of epoch 0 of the training data: inputs hold nan"),
        ((X, Y), batches, "batch 7 of epoch 0 of the validation data"),
        ((X, Y), [(X[:8], Y[:8]), (X[:8].astype(np.float16), Y[:8])], "batch 1 of epoch 0 of the validation data"),
        ([(X[:8], Y[:8]), {"x": X[:8], "y": Y[:8] > 0}], growing.VALIDATION, "batch 1 of epoch 0 .*targets bool"),
        (lambda epoch: batches, growing.VALIDATION, "batch 7 of epoch 0"),
    ):
        with pytest.raises(ValueError, match=words):
            made.fit(growing.start(made), train, validation, epochs=1)
    with pytest.raises(ValueError, match="the validation data: inputs hold nan"):
        made.evaluate(growing.start(made), (bad, Y))
    made.evaluate(growing.start(made), [(X, Y)])
    with pytest.raises(ValueError, match="batch 7 of epoch 0 of the validation data: inputs hold nan"):
        made.evaluate(growing.start(made), batches)  # other data is looked at anew
    made = growing.trainer(None, controller=None, check_data=False)
    _, history = made.fit(growing.start(made), batches, growing.VALIDATION, epochs=1)
    assert any("1 batch(es) with a non-finite loss" in event.message for event in history.of_kind("warning"))
