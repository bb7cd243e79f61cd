"""Why torch could not export a module, in words that lead to the line at fault."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator


def cause_of(error: Exception, training: bool) -> str:
    """What of the user's module torch.export could not take, where, and what would help."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    last = _last(error)
    at = f" (line {last[1]} of {last[0].rsplit('/', 1)[-1]})" if last else ""
    known = type(error).__name__
    if isinstance(error, TypeError) and _passes_through(error, "nn/modules/rnn.py"):
        return f"packed sequences have lengths of their own{at}; give padded arrays and a mask"
    if _passes_through(error, "_higher_order_ops/cond.py"):
        return f"torch.cond computes one of two branches{at}; compute both, and choose by torch.where"
    if "data-dependent" in text and training and _leaves_layers_out(error):
        return (
            f"a random number decides whether a layer is left out{at}, as in LayerDrop: a compiled program has all its "
            f"layers. Set the rate to 0 (in transformers: config.layerdrop = 0). torch said: {first}"
        )
    if "data-dependent" in text or "GuardOnDataDependent" in known or "DataDependent" in known:
        return (
            f"its control flow or its shapes depend on the values of a tensor{at}: a compiled program has one path for "
            f"all values; use torch.where or a mask instead. torch said: {first}"
        )
    if known == "UnsupportedOperatorException":
        return (
            f"it calls {first}{at}, which torch itself cannot export; an operator of your own needs a fake form "
            "(torch.library.register_fake)"
        )
    if "aten._ctc_loss" in text:
        return f"it calls torch.ctc_loss{at}: call torch.nn.functional.ctc_loss"
    if "aten::nonzero" in text or "unbacked" in text.lower() or "DynamicOutputShape" in known:
        return f"a shape depends on the values of a tensor{at}; torch said: {first}"
    return f"{known}: {first}{at}"


def _frames(error: Exception) -> Iterator[tuple[str, int, bool]]:
    """File and line of each frame that the traceback passes through, and whether it is neither torch's nor ours."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        file = frame.f_code.co_filename
        yield file, trace.tb_lineno, "/torch/" not in file and frame.f_globals.get("__package__") != __package__
        trace = trace.tb_next


def _passes_through(error: Exception, file: str) -> bool:
    return any(passed.endswith(file) for passed, _, _ in _frames(error))


def _last(error: Exception) -> tuple[str, int] | None:
    """The last file and line of the user's that the traceback passes through."""
    theirs = [(file, line) for file, line, is_theirs in _frames(error) if is_theirs]
    return theirs[-1] if theirs else None


def _leaves_layers_out(error: Exception) -> bool:
    """Whether the lines of code before the traceback left the user's speak of dropping layers."""
    file, line = _last(error) or ("", 0)
    said = "".join(linecache.getline(file, line - back).split("#")[0] for back in range(8))
    return re.search(r"\blayer_?drop\b|skip_the_layer", said, re.IGNORECASE) is not None
