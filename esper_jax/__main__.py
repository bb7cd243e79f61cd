"""`python -m esper_jax` is `esper-jax`."""

from .cli import main

main()
