"""Every scenario in its short form; `benchmarks/faults.py` runs the full one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.faults.scenarios import SCENARIOS
from tests.servers import needs_redis

MARKS = {"killed": pytest.mark.slow, "soak": pytest.mark.slow, "bus": needs_redis}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in SCENARIOS])
def test_nothing_that_can_go_wrong_goes_unseen_or_spoils_the_run(name, tmp_path):
    scenario, _, short = SCENARIOS[name]
    found = scenario(tmp_path, np.random.default_rng(0), short)
    assert not found.failures, "\n".join(found.failures)
    assert found.trials >= 1
