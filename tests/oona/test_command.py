"""`esper-jax train` with the bus and dashboards: the options reach the trainer, and a bus that is not there is said."""

from __future__ import annotations

import warnings

import pytest

from esper_jax import cli, options
from esper_jax.nissa import read_events
from esper_jax.oona import Address, Reader
from esper_jax.options import Train, read_config
from tests.servers import RedisServer, needs_redis

pytest.importorskip("redis")


@needs_redis
@pytest.mark.slow
def test_a_run_is_on_the_bus_and_on_the_dashboards_and_its_password_is_not_written(tmp_path, capsys):
    with RedisServer(password="right-secret") as server:
        started = ["train", "--quiet", "--controller", "none", "--epochs", "1", "--run-dir", str(tmp_path / "r")]
        with pytest.raises(SystemExit) as stopped:
            cli.main([*started, "--oona", server.url.replace("right", "wrong")])
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and "refuses" in said and "secret" not in said and len(said.splitlines()) == 1
        # The directory is free for another attempt.
        cli.main([*started, "--oona", server.url, "--tensorboard", "--prometheus", "0", "--no-baseline", "--no-figure"])
        with Reader(Address.of(server.url)) as reader:
            found = [message.event.to_json() for message in reader.read(1000)]
        kept = read_config(tmp_path / "r")
        assert (kept.prometheus, kept.tensorboard, kept.oona) == (0, True, server.bare_url)
    assert found == [event.to_json() for event in read_events(tmp_path / "r/events.jsonl")]
    assert list((tmp_path / "r/tensorboard").glob("events*"))
    assert not (tmp_path / "r/spool/TensorBoardSink").exists()  # everything was given
    for path in tmp_path.rglob("*.json*"):
        assert b"secret" not in path.read_bytes()


def test_a_url_that_is_none_is_one_sentence(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--run-dir", str(tmp_path / "r"), "--oona", "localhost"])
    assert stopped.value.code == 2 and "oona must be a URL such as" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_resume_takes_the_options_of_the_run_and_those_given_now_that_say_where_events_go(tmp_path):
    run_dir = tmp_path / "r"
    begun = Train(run_dir=run_dir, epochs=3, oona="redis://me:secret@h/0?run=x", oona_optional=True, tensorboard=True)
    options.write_config(begun, run_dir)
    assert "secret" not in (run_dir / "config.json").read_text()
    kept = options.resumed(Train(resume=run_dir, epochs=9))
    assert (kept.epochs, kept.oona, kept.oona_optional, kept.tensorboard) == (3, "redis://me@h/0?run=x", True, True)
    other = options.resumed(Train(resume=run_dir, oona="redis://:other@g/0", quiet=True, prometheus=0))
    assert (other.oona, other.quiet, other.prometheus) == ("redis://:other@g/0", True, 0)


@needs_redis
@pytest.mark.slow
def test_a_run_is_resumed_from_the_command_line_while_its_server_is_away(tmp_path, capsys):
    run_dir = tmp_path / "r"
    options = ["--quiet", "--controller", "none", "--epochs", "5", "--no-baseline", "--no-figure"]
    with RedisServer(password="right-secret") as server:
        cli.main(["train", *options, "--run-dir", str(run_dir), "--oona", server.url])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:  # no password is kept
            cli.main(["train", "--resume", str(run_dir)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and "REDISCLI_AUTH" in said and "a run directory never keeps it" in said
        cli.main(["train", "--resume", str(run_dir), "--oona", server.url])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--resume", str(run_dir)])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "does not answer" in said and "--oona-optional" in said and "\n" not in said
    with warnings.catch_warnings(action="always"):
        cli.main(["train", "--resume", str(run_dir), "--oona-optional"])
    assert [event.kind for event in read_events(run_dir / "events.jsonl")][-1] in ("run_ended", "warning")
    texts = [line for line in capsys.readouterr().err.splitlines() if line.startswith("esper-jax: ")]
    assert len(texts) == 2 and "events wait on disk" in texts[0] and "were not delivered" in texts[1]
