"""Hostile values for the commands beside `train`: each is taken, or refused in one sentence with status 2."""

from __future__ import annotations

import contextlib
import io
import pathlib
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_jax import cli, watching
from tests.faults.found import examples
from tests.faults.test_input import NUMBERS, TEXT

SETTING = st.tuples(
    st.sampled_from(["plateau", "gates.strict", "plan", "blueprints", "tempo", ""]) | TEXT, TEXT | NUMBERS
)
CASES = {
    "watch --once": st.tuples(
        TEXT | st.sampled_from(["redis://", "redis://:0", "unix://", "redis://[::1", "http://x"])
    ),
    "watch . --interval=": st.tuples(NUMBERS | TEXT),
    "urza list": st.tuples(TEXT),
    "urza list . --order=": st.tuples(TEXT),
    "urza list . --blueprint=": st.tuples(TEXT),
    "urza list . --limit=": st.tuples(NUMBERS | TEXT),
    "urza list . --max-params=": st.tuples(NUMBERS | TEXT),
    "urza show .": st.tuples(TEXT),
    "urza gc . --dry-run --keep=": st.tuples(NUMBERS | TEXT),
    "urza gc . --dry-run --grace=": st.tuples(NUMBERS | TEXT),
    "tamiyo serve --controller=": st.tuples(
        TEXT | st.sampled_from(["a:b", ":", "os:path", "json:", ".x:y", "tamiyo:"])
    ),
    "tamiyo serve --set": SETTING.map(lambda pair: ("=".join(pair),)),
    "tamiyo serve --host=": st.tuples(TEXT),
    "tamiyo serve --port=": st.tuples(NUMBERS | TEXT),
    "tamiyo serve --max-bytes=": st.tuples(NUMBERS | TEXT),
    "tamiyo serve --token-file=": st.tuples(TEXT),
    "schema": st.tuples(TEXT),
    "": st.tuples(TEXT),
}


class Unserved:
    """A server that closes its sockets and is done."""

    def __init__(self, config: None) -> None:
        pass

    def run(self, sockets: list[socket.socket]) -> None:
        for one in sockets:
            one.close()


@pytest.fixture(scope="module", autouse=True)
def nothing_begins(tmp_path_factory: pytest.TempPathFactory):
    """No service waits for questions, no screen is drawn, and all happens in an empty folder."""
    import uvicorn

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("empty"))
        patched.setattr(uvicorn, "Config", lambda *_, **__: None)
        patched.setattr(uvicorn, "Server", Unserved)
        real = watching.watch
        patched.setattr(watching, "watch", lambda source, **how: real(source, **how) if how["once"] else None)
        yield


def ended(arguments: list[str]) -> tuple[int, str]:
    """The exit status of a command, 0 where it comes back, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(arguments)
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
    return 0, ""


@pytest.mark.parametrize("command", CASES)
def test_any_value_is_taken_or_refused_in_a_sentence(command):
    @settings(max_examples=examples(12), deadline=None)
    @given(values=CASES[command])
    def check(values: tuple[str, ...]) -> None:
        words = command.split()
        if command.endswith("="):
            words[-1] += values[0]
        else:
            words += values
        status, said = ended(words)
        assert status in (0, 2), (words, said)
        if status:
            assert said.startswith("esper-jax: ") and len(said.strip().splitlines()) == 1, (words, said)

    check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["watch", ".", "--interval", "nan"], "--interval must be"),
        (["watch", ".", "--interval", "inf"], "--interval must be"),
        (["watch", "nowhere", "--once"], "nowhere"),
        (["urza", "list", "nowhere"], "there is no library of seeds at nowhere"),
        (
            ["tamiyo", "serve", "--controller", "broken:it"],
            "controller 'broken:it' cannot be loaded: RuntimeError: not me",
        ),
        (["tamiyo", "serve", "--port", "70000"], "cannot listen on 127.0.0.1, port 70000"),
        (["tamiyo", "serve", "--host", "a" * 100], "aaa can be reached by others, so a bearer token is needed"),
    ],
)
def test_what_is_wrong_is_said(arguments, words):
    pathlib.Path("broken.py").write_text("raise RuntimeError('not me')\n")
    status, said = ended(arguments)
    assert status == 2 and words in said, said
