"""Every command, script and manifest of docs/launch.md is one that works: read as a shell, Kubernetes or we read it."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from esper_jax import cli
from esper_jax.options import Train

from .test_docs import blocks

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "launch.md"
BLOCKS = list(blocks(PAGE.read_text()))
SCRIPTS = [block.text for block in BLOCKS if block.language == "bash"]
(MANIFEST,) = (yaml.safe_load(block.text) for block in BLOCKS if block.language == "yaml")
POD = MANIFEST["spec"]["replicatedJobs"][0]["template"]["spec"]
SCRIPTS.append(POD["template"]["spec"]["containers"][0]["command"][2])


def commands(script: str) -> list[str]:
    """The `esper-jax train` commands that a script runs: with what `what` may be, and 1 for other variables."""
    script = script.replace("\\\n", " ")
    whats = re.findall(r'what="([^"]*)"', script) or [""]
    found = re.findall(r"esper-jax train ([^\n&\"]*(?:\"\$\w+\")?[^\n&\"]*)", script)
    given = [text.replace("$what", what) for text in found for what in whats]
    return [re.sub(r'"?\$\w+"?', "1", text.replace("$run", "/shared/run")) for text in given]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_one_and_its_commands_begin_a_run_of_several_processes(script, monkeypatch):
    parsed = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    seen: list[Train] = []

    class Passed(Exception):
        """The options are taken."""

    def begin(options: Train) -> None:
        options.check()
        seen.append(options)
        raise Passed

    monkeypatch.setattr(cli, "run", begin)
    monkeypatch.setattr(cli, "resumed", lambda options, named: options)
    found = commands(script)
    assert found
    for text in found:
        with pytest.raises(Passed):
            cli.main(["train", *shlex.split(text)])
    assert all(options.distributed for options in seen)


def test_the_manifest_is_a_jobset_whose_first_pod_is_the_coordinator():
    """A pod is called JOBSET-JOB-INDEX-INDEX.JOBSET, and an indexed job says which of them it is."""
    name, job = MANIFEST["metadata"]["name"], MANIFEST["spec"]["replicatedJobs"][0]
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert POD["completionMode"] == "Indexed" and POD["parallelism"] == POD["completions"] and job["replicas"] == 1
    (text,) = {re.sub(r"--(task|resume) .*--quiet", "", found) for found in commands(SCRIPTS[-1])}
    words = shlex.split(text)
    assert words[words.index("--coordinator") + 1] == f"{name}-{job['name']}-0-0.{name}:9000"
    assert words[words.index("--processes") + 1] == str(POD["parallelism"])
