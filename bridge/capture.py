"""From a torch module to a `Graph`: torch.export in both modes, and every refusal with its cause. Imports torch."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram, export
from torch.utils import _pytree as pytree

from .causes import cause_of
from .graph import BridgeError, Graph, Tensor
from .inputs import called_as, forward_names, free_axes, signature_of, two_examples
from .reader import Reader, numpy_dtype
from .torch_attention import attention_as_one_op
from .torch_losses import losses_for_export
from .torch_norms import written_out_statistics
from .torch_patches import CAPTURING, instead
from .torch_random import distributions_for_export, number_noise, refuse_fixed_numbers


def capture(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, train: bool = True
) -> tuple[Graph, dict[str, Any]]:
    """The graph of a module and its large constants, from one call's inputs; without `train` of evaluation alone.

    The first dimension of every tensor as long as the first tensor's is the batch, and free.

    Raises:
      BridgeError: where the module cannot become one program for all values of its inputs, with the cause.
    """
    name = type(module).__name__
    _check_tensors(module, name)
    args, kwargs = two_examples(args), two_examples(dict(kwargs))
    signature = signature_of(module, kwargs)
    shapes = free_axes(signature, args, kwargs, name)
    programs, constants, takes = [], {}, None
    for mode in (False, True) if train else (False,):
        copied = copy_of(module)
        with modes_kept(module):
            try:
                if copied is not module:
                    with plain_attention():
                        _refuse_functions(_functions_of(copy_of(module).train(mode), args, kwargs, name), name)
                with called_as(copied, signature):
                    exported = _export(copied.train(mode), args, kwargs, shapes, name)
                program, large, takes = Reader(
                    exported, module, signature, name, "train" if mode else "evaluate"
                ).read()
            except BridgeError as error:
                if not mode:
                    raise
                hint = "this is training mode alone: from_torch(..., train=False) imports evaluation"
                raise BridgeError(f"{error} ({hint})") from error.__cause__
        programs.append(program)
        constants.update(large)
    tensors, aliases = _tensors(module, constants)
    graph = Graph(
        name=name,
        evaluate=programs[0],
        train=programs[1] if train else None,
        takes=takes,
        names=forward_names(module),
        tensors=tensors,
        aliases=aliases,
        modules=modules_of(module),
    )
    return graph, constants


_PLAIN = (
    torch.nn.Linear,
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
    torch.nn.Embedding,
    torch.nn.LayerNorm,
    torch.nn.GroupNorm,
    torch.nn.RMSNorm,
    torch.nn.modules.batchnorm._BatchNorm,
    torch.nn.modules.instancenorm._InstanceNorm,
    torch.nn.MultiheadAttention,
)


def modules_of(module: torch.nn.Module) -> tuple[tuple[str, str, bool], ...]:
    """Path and class of each module in it, and whether its forward is a layer and no more."""
    return tuple((path, type(child).__name__, _is_plain(child)) for path, child in module.named_modules())


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether the module's forward is its layer and no more, so that a hook on it sees the layer's input and output."""
    if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return True
    base = next((cls for cls in _PLAIN if isinstance(module, cls)), None)
    return base is not None and type(module).forward is base.forward and "forward" not in vars(module)


@contextlib.contextmanager
def modes_kept(module: torch.nn.Module) -> Iterator[None]:
    """Meanwhile training modes may change; afterwards they are as they were."""
    modes = {child: child.training for child in module.modules()}
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Meanwhile torch's attention takes no fast path, which has values of its own where keys are masked."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _plain_checkpoints() -> contextlib.AbstractContextManager[None]:
    """Meanwhile checkpoints that are not reentrant are plain calls: of nested ones export would lose the gradients."""
    private, place = "_checkpoint_without_reentrant_generator", torch.utils.checkpoint

    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    return instead((place, private, nothing)) if hasattr(place, private) else contextlib.nullcontext()


def copy_of(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself where it cannot be copied (e.g. a weight that is computed before each call)."""
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError):
        return module


def _check_tensors(module: torch.nn.Module, name: str) -> None:
    for path, child in module.named_modules():
        kind = type(child).__module__
        if "quantized" in kind or isinstance(child, torch.jit.ScriptModule):
            raise BridgeError(
                f"{name}: {path or 'the module'} is a {kind}.{type(child).__name__}; quantised and scripted "
                "modules have "
                "no parameters to train: give the float module"
            )
        if child._backward_hooks or child._backward_pre_hooks:
            raise BridgeError(
                f"{name}: {path or 'the module'} has a backward hook, which the captured graph would lose; remove it"
            )
    for path, parameter in module.named_parameters():
        if parameter._backward_hooks:
            raise BridgeError(f"{name}: parameter {path!r} has a hook on its gradient, which would be lost; remove it")
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_complex() and isinstance(tensor, torch.nn.Parameter):
            raise BridgeError(
                f"{name}: parameter {path!r} is complex; torch and JAX define its gradient differently. Hold real and "
                "imaginary parts as two parameters (torch.view_as_complex in forward)"
            )
        if tensor.is_quantized or tensor.is_sparse or tensor.layout != torch.strided:
            raise BridgeError(
                f"{name}: {path!r} is a {tensor.layout} tensor of {tensor.dtype}; only dense ones are read"
            )
        if tensor.is_meta:
            raise BridgeError(f"{name}: {path!r} is on the meta device and has no values; load the weights first")


@contextlib.contextmanager
def _custom_functions() -> Iterator[list[str]]:
    """The user's `torch.autograd.Function`s that are called meanwhile: export keeps their forward alone."""
    seen: list[str] = []
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            seen.append(f"{cls.__module__}.{cls.__qualname__}")
        return original.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        torch.autograd.Function.apply = original


def _export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, name: str
) -> ExportedProgram:
    silenced = logging.root.manager.disable
    said = io.StringIO()  # and prints some; what the user's own forward says is said again below
    logging.disable(logging.CRITICAL)  # torch logs whole graphs for what the error below says in a sentence
    try:
        with (
            CAPTURING,
            plain_attention(),
            _plain_checkpoints(),
            warnings.catch_warnings(record=True) as told,
            torch.fx.experimental._config.patch(backed_size_oblivious=True),
            attention_as_one_op(),
            written_out_statistics(),
            losses_for_export(),
            distributions_for_export(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(io.StringIO()),
            _custom_functions() as custom,
        ):
            warnings.simplefilter("always")
            exported = export(module, args, kwargs, strict=False, dynamic_shapes=shapes)
            _stop_gradients(exported, name)
            number_noise(exported.graph_module)
            exported = exported.run_decompositions({})
    except BridgeError:
        raise
    except Exception as error:
        shared, cause = _shared_buffers(module), cause_of(error, module.training)
        if shared is not None and "compiled_fn" in str(error):
            cause = (
                f"{shared[0]} and {shared[1]} are one buffer, which the forward changes under both names, and torch "
                "cannot export that: give each place a module of its own"
            )
        raise BridgeError(f"{name} cannot be captured: {cause}") from error
    finally:
        logging.disable(silenced)
    if said.getvalue():
        print(said.getvalue(), end="")  # noqa: T201
    _check_memory(told, module, name)
    _refuse_functions(custom, name)
    return exported


def _refuse_functions(custom: list[str], name: str) -> None:
    if custom:
        raise BridgeError(
            f"{name} calls {', '.join(sorted(set(custom)))}, an autograd Function whose backward the captured graph "
            "would lose: write it with torch operations, or as a torch.library operator and register_op() its JAX form"
        )


def _functions_of(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> list[str]:
    """The user's `torch.autograd.Function`s on the way back from one call's outputs, however they were called."""

    def learnt(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.detach().clone().requires_grad_() if floating else leaf

    args, kwargs = pytree.tree_map(learnt, (args, kwargs))
    try:
        with (
            torch.enable_grad(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            outputs = refuse_fixed_numbers(lambda: module(*args, **kwargs), name)
    except BridgeError:
        raise
    except Exception:  # the export says what is wrong
        return []
    todo = [leaf.grad_fn for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    seen, found = set(), []
    while todo:
        step = todo.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        function = getattr(type(step), "_forward_cls", None)
        if function is torch.utils.checkpoint.CheckpointFunction:
            raise BridgeError(
                f"{name} checkpoints activations with use_reentrant=True, of which the captured graph would lose the "
                "gradients: use_reentrant=False comes over"
            )
        if function is not None and not function.__module__.startswith("torch."):
            found.append(f"{function.__module__}.{function.__qualname__}")
        todo += [before for before, _ in step.next_functions]
    return found


def _stop_gradients(exported: ExportedProgram, name: str) -> None:
    """Mark what `no_grad` gives as detached, and refuse autocast: decomposing forgets both."""
    for graph_module in exported.graph_module.modules():
        for node in getattr(graph_module, "graph", torch.fx.Graph()).nodes:
            called = str(node.target) if node.op == "call_function" else ""
            if "wrap_with_autocast" in called and True in node.args[:4]:
                raise BridgeError(f"{name} runs under autocast; give a module in the dtype it should compute in")
            if "wrap_with_set_grad_enabled" not in called or node.args[0] is not False:
                continue
            body = graph_module.get_submodule(node.args[1].target)
            (output,) = (inner for inner in body.graph.nodes if inner.op == "output")
            with body.graph.inserting_before(output):

                def detached(given: Any, body: Any = body) -> Any:
                    if not isinstance(given.meta.get("val"), torch.Tensor):
                        return given
                    stopped = body.graph.call_function(torch.ops.aten.detach.default, (given,))
                    stopped.meta = dict(given.meta)
                    return stopped

                output.args = torch.fx.node.map_arg(output.args, detached)
            body.recompile()


def _shared_buffers(module: torch.nn.Module) -> tuple[str, str] | None:
    """Two names of one buffer."""
    first: dict[int, str] = {}
    for path, buffer in module.named_buffers(remove_duplicate=False):
        if first.setdefault(id(buffer), path) != path:
            return first[id(buffer)], path
    return None


def _is_torchs_own(module: torch.nn.Module, attribute: str) -> bool:
    """Whether torch itself sets the attribute anew in every call: an RNN's list of weights, the old weight_norm's."""
    path, _, leaf = attribute.removeprefix("self.").rpartition(".")
    own = dict(module.named_parameters())
    before = f"{path}.{leaf}" if path else leaf
    return "_flat_weights" in attribute or f"{before}_v" in own or f"{before}_orig" in own


def _check_memory(told: list[warnings.WarningMessage], module: torch.nn.Module, name: str) -> None:
    """Torch warns of tensors that a forward keeps in attributes (of those that its own RNN sets, too)."""
    for warning in told:
        found = re.search(r"tensor attributes? (.*?) (?:was|were) assigned during export", str(warning.message))
        kept = [a.strip() for a in found[1].split(",")] if found else []
        if kept := [attribute for attribute in kept if not _is_torchs_own(module, attribute)]:
            raise BridgeError(
                f"{name} keeps tensors in {', '.join(kept)}; a pure function has no such memory: return them, "
                "or make them "
                "buffers (register_buffer)"
            )


def _tensors(module: torch.nn.Module, constants: Mapping[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    found: list[Tensor] = []
    aliases: list[tuple[str, str]] = []
    persistent = set(module.state_dict(keep_vars=True))
    first: dict[int, str] = {}
    for kind, named in (
        ("parameter", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
    ):
        for path, tensor in named:
            if id(tensor) in first:
                aliases.append((path, first[id(tensor)]))
                continue
            first[id(tensor)] = path
            frozen = kind == "parameter" and not tensor.requires_grad
            dtype = numpy_dtype(tensor.dtype)
            found.append(Tensor(path, tuple(tensor.shape), dtype, kind, path in persistent, frozen))
    for path, value in constants.items():
        found.append(Tensor(path, tuple(value.shape), numpy_dtype(value.dtype), "buffer", False, False))
    return tuple(found), tuple(aliases)
