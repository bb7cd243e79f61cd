"""The options that every benchmark script has."""

from __future__ import annotations

import argparse
import atexit
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

PLATFORMS = ("cpu", "gpu", "tpu")
MEMORY = ("kept", "returned")
DTYPES = ("float32", "bfloat16", "float16")
MODEL_NAMES = ("mlp", "cnn", "transformer")


def parser(
    about: str, *, rounds: int = 60, budget: float = 6.0, models: Sequence[str] = MODEL_NAMES
) -> argparse.ArgumentParser:
    """A parser with the common options; a script adds its own.

    Args:
      about: what the script measures, in a sentence or two.
      rounds: default of `--rounds`.
      budget: default of `--budget`, seconds.
      models: default of `--models`, and the choice.
    """
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--platform", choices=PLATFORMS, help="where to run; without it, what jax takes by itself")
    made.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype to compute in; weights are float32")
    made.add_argument("--scale", type=positive, default=1.0, help="factor of the models' widths")
    made.add_argument("--models", nargs="+", choices=tuple(models), default=list(models), help="models to measure")
    made.add_argument("--rounds", type=int, default=rounds, help="samples of each variant, at most")
    made.add_argument("--budget", type=positive, default=budget, help="seconds for each group of variants")
    made.add_argument("--seed", type=int, default=0, help="of data, weights and the order of variants")
    made.add_argument(
        "--memory",
        choices=MEMORY,
        default="returned",
        help="freed memory of this process: esper_jax.keep_memory() or not",
    )
    made.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the results there as JSON")
    return made


def begin(
    made: argparse.ArgumentParser, argv: Sequence[str] | None = None, *, reuse: bool = False
) -> argparse.Namespace:
    """Parse, and choose jax's platform before jax starts; one that is not there ends the script in a sentence.

    With `reuse`, for scripts that do not time compiling, each program is compiled once: its copies, and XLA's figures
    of it, come from a cache of this process's own. A copy then shows what timing differs by, not what compiling anew
    may choose.
    """
    args = made.parse_args(argv)
    if args.rounds < 1:
        made.error(f"--rounds must be 1 or more, got {args.rounds}")
    settle(args)
    import jax

    try:
        jax.devices()
    except RuntimeError as error:
        print(f"this jax cannot use the platform {args.platform or 'asked for'}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if reuse:
        folder = tempfile.TemporaryDirectory(prefix="programs-")
        atexit.register(folder.cleanup)
        jax.config.update("jax_compilation_cache_dir", folder.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return args


def settle(args: argparse.Namespace) -> None:
    """What the common options ask of this process, before jax starts."""
    if args.platform:
        os.environ["JAX_PLATFORMS"] = args.platform
    import jax

    import esper_jax

    if args.memory == "kept" and not esper_jax.keep_memory():
        args.memory = "as malloc has it"
    if args.platform:
        jax.config.update("jax_platforms", args.platform)


def positive(text: str) -> float:
    """A number above 0, for an option."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value
