"""Hypothesis runs the same examples every time here, and never times one: compilation makes the first slow."""

from hypothesis import HealthCheck, settings

settings.register_profile("esper_jax", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("esper_jax")
