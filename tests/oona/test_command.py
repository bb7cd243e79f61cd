"""`esper-jax train` with the bus and dashboards: the options reach the trainer, and a bus that is not there is said."""

from __future__ import annotations

import pytest

from esper_jax import cli
from esper_jax.experiment import read_config
from esper_jax.nissa import read_events
from esper_jax.oona import Address, Reader
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
