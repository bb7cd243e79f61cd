"""A checkpoint of another version describes what this one cannot build: one sentence that says which wrote it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from esper_jax import restore_morph
from esper_jax.tolaria import manifest, persist
from esper_jax.tolaria.checkpoint import StructureMismatch
from tests.tolaria import growing


def plant(meta: dict[str, Any]) -> dict[str, Any]:
    """The seed that a checkpoint describes."""
    (found,) = meta["spec"]["plants"]
    return found


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], bool]] = {
    "a site without its kind": (lambda meta: meta["spec"]["sites"][0].pop("kind"), True),
    "a plant with one thing more": (lambda meta: plant(meta).update(colour="blue"), True),
    "a blueprint that is none here": (lambda meta: plant(meta).update(blueprint="mlp_of_tomorrow"), True),
    "a config that it has not": (lambda meta: plant(meta).update(config={"hidden": 8, "depth": 2}), True),
    "no host": (lambda meta: meta.pop("host"), True),
    "a dtype that is none": (lambda meta: meta["host"]["params"]["Dense_0"].update(kernel=["float7", [3, 4]]), True),
    "a session with one thing more": (lambda meta: meta["session"].update(mood="good"), False),
    "a decision with one thing less": (lambda meta: meta["session"].pop("pending"), False),
}
"""What another version may write otherwise, and whether the morph alone needs it."""


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_built_here_names_the_step_and_the_versions(tmp_path, monkeypatch, change):
    alter, for_the_morph = CHANGES[change]
    here, real = manifest.versions(), persist.described

    def described(*args: Any) -> Any:
        tree, meta = real(*args)
        if meta["spec"]["plants"]:
            alter(meta)
        return tree, meta

    made = growing.trainer(tmp_path, checkpoint_every=100)
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "versions", lambda: {**here, "esper_jax": "9.9.9"})
        patched.setattr(persist, "described", described)
        made.fit(growing.start(made), growing.TRAIN, growing.VALIDATION, epochs=4)
    words = rf"step 32 in .* \(written by esper_jax 9\.9\.9; here are esper_jax {here['esper_jax']}\) describes what"
    for restore in (growing.trainer(tmp_path).restore, *([lambda: restore_morph(tmp_path)] if for_the_morph else [])):
        with pytest.raises(StructureMismatch, match=words):
            restore()
