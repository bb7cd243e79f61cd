"""Why torch could not export a module, in words that lead to the line at fault."""

from __future__ import annotations

import linecache
import re


def cause_of(error: Exception, training: bool) -> str:
    """What of the user's module torch.export could not take, where, and what would help."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    where = _user_line(error)
    at = f" ({where})" if where else ""
    known = type(error).__name__
    if isinstance(error, TypeError) and _passes_through(error, "nn/modules/rnn.py"):
        return f"packed sequences have lengths of their own{at}; give padded arrays and a mask"
    if _passes_through(error, "_higher_order_ops/cond.py"):
        return f"torch.cond computes one of two branches{at}; compute both, and choose by torch.where"
    if "data-dependent" in text and training and _leaves_layers_out(error):
        return (
            f"a random number decides whether a layer is left out{at}, as in LayerDrop: a compiled program has all its "
            "layers. Set the rate to 0 (in transformers: config.layerdrop = 0)"
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


def _passes_through(error: Exception, file: str) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(file):
            return True
        trace = trace.tb_next
    return False


def _leaves_layers_out(error: Exception) -> bool:
    """Whether the lines of code before the traceback left the user's speak of dropping layers."""
    said, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and trace.tb_frame.f_globals.get("__package__") != __package__:
            lines = (linecache.getline(file, trace.tb_lineno - back).split("#")[0] for back in range(8))
            said = "".join(lines)
        trace = trace.tb_next
    return re.search(r"\blayer_?drop\b|skip_the_layer", said, re.IGNORECASE) is not None


def _user_line(error: Exception) -> str:
    """The last line of code outside torch that the traceback passes through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if "/torch/" not in frame.f_code.co_filename and frame.f_globals.get("__package__") != __package__:
            found = f"line {trace.tb_lineno} of {frame.f_code.co_filename.rsplit('/', 1)[-1]}"
        trace = trace.tb_next
    return found
