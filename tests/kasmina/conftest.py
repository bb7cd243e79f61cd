"""How these tests run: hypothesis repeats the same examples, and only bits are tested on fully optimised programs.

Compiling is nearly all the time they take. Without XLA's optimisations it takes half; the tests of equal bits (contract
15, 16 and 18) need the optimised program, because it is fusion that could break them.
"""

import jax
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("esper_jax", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("esper_jax")

OPTIMISED = ("test_empty_slots", "test_faults", "test_isolation", "test_random_lives", "test_summary")


@pytest.fixture(scope="module", autouse=True)
def _optimisation(request):
    jax.config.update("jax_disable_most_optimizations", not request.module.__name__.endswith(OPTIMISED))
    yield
    jax.config.update("jax_disable_most_optimizations", False)
