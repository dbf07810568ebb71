"""Modules that may be fused, told from what they are made of and from what they got and gave. Never from a name.

A finder gives the parts of a module, or the reason why it is not one of its kind; formulas are only supposed here, and
verified by :mod:`verification`. A module must have no parameters but those that the fused forward reads.
"""

import copy
import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hf_paged_kernels.layers.reference import rms_norm_reference
from torch import nn

from .forwards import AttentionOptions, FusedNorm, LayerParts
from .recording import Attended, Call, Recording
from .stand_ins import has_own_forward


class PatternMismatch(Exception):
    """The reason why a module is not fused."""


# Norms

EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
SCALES = (1e-3, 0.03, 1.0, 32.0)
"""Of the rows that norms are tried on: in the first, eps is as large as the mean square."""
EXACT = {torch.float32: 1e-6, torch.float64: 1e-6, torch.float16: 2e-5, torch.bfloat16: 2e-4}
"""Differences between the same formula in eager PyTorch: far below one rounding in half precision."""


def norm_formula(module: nn.Module) -> tuple[float, float, bool]:
    """``(eps, weight_offset, round_first)`` of an RMSNorm, found by trying it on random rows with a random weight.

    Raises:
        PatternMismatch: it is none, or of no known kind.
    """
    weight = dict(module.named_parameters()).get("weight")
    if weight is None or len(list(module.parameters())) != 1 or any(True for _ in module.buffers()) or weight.ndim != 1:
        raise PatternMismatch("it has not one weight [N] alone")
    given = [module.__dict__[name] for name in EPS_NAMES if name in module.__dict__]
    if len(given) != 1 or has_own_forward(module) or type(weight) is not nn.Parameter:
        raise PatternMismatch("it has no eps, or a forward of its own")
    eps = torch.finfo(weight.dtype).eps if given[0] is None else given[0]
    if not isinstance(eps, float):
        raise PatternMismatch("its eps is no number")
    generator = torch.Generator().manual_seed(0)
    # With a weight of ones or zeros, as many are made, kinds could not be told from one another.
    twin = copy.copy(module)
    other = torch.randn(weight.shape, generator=generator).to(weight)
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(other, requires_grad=False)}
    x = torch.randn(len(SCALES), len(weight), generator=generator) * torch.tensor(SCALES)[:, None]
    x = x.to(weight)
    try:
        wanted = type(module).forward(twin, x)
    except Exception as error:
        raise PatternMismatch(f"{type(error).__name__}: {error}") from None
    best, chosen = float("inf"), (0.0, True)
    for offset in (0.0, 1.0):
        for round_first in (True, False):
            got = rms_norm_reference(x, other, eps, offset, round_first, None)[0]
            if not isinstance(wanted, torch.Tensor) or wanted.shape != got.shape or wanted.dtype != got.dtype:
                raise PatternMismatch("it returns another shape or dtype")
            difference = torch.linalg.vector_norm((got - wanted).double(), dim=-1)
            size = torch.linalg.vector_norm(wanted.double(), dim=-1).clamp(min=1e-30)
            worst = float((difference / size).max())
            if worst < best:
                best, chosen = worst, (offset, round_first)
    if best > EXACT[weight.dtype]:
        raise PatternMismatch("it is no RMSNorm of a known kind")
    return eps, *chosen


# Gated MLPs

ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "relu": torch.relu,
}  # fmt: skip
"""Those of ``gated_activation_op``."""


@dataclass(frozen=True, slots=True)
class MlpParts:
    """``down(act(gate(x)) * up(x))``.

    Attributes:
        gate_up: gate and up, or one layer with both outputs.
        order: "up_gate" if the gate is the second half of one layer.
    """

    gate_up: list[nn.Linear]
    down: nn.Linear
    activation: str
    order: str
    inside: list[nn.Module]


def mlp_parts(module: nn.Module, recording: Recording) -> MlpParts:
    """The parts of a gated MLP.

    Raises:
        PatternMismatch: it is none.
    """
    linears, others = _linears_of(module)
    call = recording.call(module)
    inner = [recording.call(linear) for linear in linears]
    if call is None or len(linears) not in (2, 3) or any(c is None for c in inner):
        raise PatternMismatch("it is not made of two or three linear layers")
    if len(call.args) != 1 or call.kwargs:
        raise PatternMismatch("it takes more than hidden states")
    _check_parameters(module, linears)
    calls = {linear: c for linear, c in zip(linears, inner) if c is not None}
    first = [linear for linear in linears if _is_same(calls[linear].x, call.x)]
    last = [linear for linear in linears if linear not in first]
    if len(last) != 1 or not _is_same(calls[last[0]].y, call.y):
        raise PatternMismatch("its output is not that of a linear layer behind the others")
    middle = calls[last[0]].x
    outputs = [calls[linear].y for linear in first]
    if len(first) == 1 and outputs[0] is not None:
        outputs = list(outputs[0].chunk(2, -1))
    assert middle is not None
    found = [
        (activation, is_swapped)
        for activation in ACTIVATIONS
        for is_swapped in (False, True)
        if _is_equal(middle, _gated(outputs, activation, is_swapped))
    ]
    if len(found) != 1:
        raise PatternMismatch("its activation is of no known kind" if not found else "activations cannot be told apart")
    activation, is_swapped = found[0]
    if is_swapped and len(first) == 2:
        first, is_swapped = first[::-1], False
    return MlpParts(first, last[0], activation, "up_gate" if is_swapped else "gate_up", [*linears, *others])


def _gated(outputs: list[Any], activation: str, is_swapped: bool) -> torch.Tensor | None:
    gate, up = reversed(outputs) if is_swapped else outputs
    if gate.shape != up.shape:
        return None
    # As eager modules do it, on the tensors that they had: the same bits.
    return ACTIVATIONS[activation](gate) * up


# Attention


@dataclass(frozen=True, slots=True)
class AttentionParts:
    """An attention module.

    Attributes:
        qkv: layers of queries, keys, values, or one layer with all outputs in this order.
        norms: of queries and keys, or none.
        names, allowed: of arguments: all that the forward takes, those that it got.
    """

    qkv: list[nn.Linear]
    out: nn.Linear
    norms: list[nn.Module]
    options: AttentionOptions
    names: tuple[str, ...]
    allowed: frozenset[str]
    inside: list[nn.Module]


def attention_parts(module: nn.Module, recording: Recording, cache: Any) -> AttentionParts:
    """The parts of an attention module.

    Raises:
        PatternMismatch: it is none, or a part of it is of no known kind.
    """
    call = recording.call(module)
    attended = recording.attended[module].get(0, [])
    if call is None or len(attended) != 1 or call.x is None:
        raise PatternMismatch("it attends more than once")
    seen = attended[0]
    linears, others = _linears_of(module)
    norms = [other for other in others if any(True for _ in other.parameters())]
    calls = {inner: recording.call(inner) for inner in (*linears, *norms)}
    if any(c is None for c in calls.values()) or len(norms) not in (0, 2):
        raise PatternMismatch("it is not made of linear layers and norms of queries and keys that run once")
    out = [x for x in linears if _starts_with(calls[x], seen.out)]
    first = [x for x in linears if _is_same(_x(calls[x]), call.x)]
    if len(out) != 1 or len(first) not in (1, 3) or len(linears) != len(first) + 1:
        raise PatternMismatch("it is not made of linear layers before and one behind attention")
    if not _is_same(_y(calls[out[0]]), call.y) or not isinstance(call.output, tuple) or call.output[1:] != (None,):
        raise PatternMismatch("it returns something else than its last layer")
    for step in recording.attended[module].values():
        if len(step) != 1 or _settings(step[0]) != _settings(seen):
            raise PatternMismatch("it attends in more than one way")
    layer = cache.layers[seen.index]
    window = None if seen.left is None else seen.left + 1
    if layer.window is not None and (window is None or window > layer.window):
        raise PatternMismatch("it sees more than the cache keeps")
    pages = layer.group.layers[layer.index]
    _, num_q_heads, head_dim = seen.query.shape
    num_kv_heads, v_dim = pages.k.shape[1], pages.v.shape[3]
    sizes = [num_q_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * v_dim]
    has = [x.out_features for x in first]
    if pages.k.shape[3] != head_dim or has not in (sizes, [sum(sizes)]) or out[0].in_features != num_q_heads * v_dim:
        raise PatternMismatch(f"its layers have {has} outputs, attention has {sizes}")
    sinks = None
    if seen.sinks is not None:
        sinks = next((p for p in module.parameters(recurse=False) if _is_of(seen.sinks, p)), None)
        if sinks is None:
            raise PatternMismatch("its sinks are no parameter")
    _check_parameters(module, [*linears, *norms], sinks)
    if norms:
        starts = [0, sizes[0]] if len(first) == 1 else [0, 0]
        for norm, source, start in zip(norms, (first[0], first[min(1, len(first) - 1)]), starts):
            given, made = _x(calls[norm]), _y(calls[source])
            if given is None or made is None or given.data_ptr() != made.data_ptr() + start * made.itemsize:
                raise PatternMismatch("its norms are not those of queries and keys, before anything else")
    options = AttentionOptions(
        seen.index, num_q_heads, num_kv_heads, head_dim, v_dim, seen.left, seen.right, seen.softcap, seen.scale, sinks
    )
    names, allowed = arguments(module, recording)
    return AttentionParts(first, out[0], norms, options, names, allowed, [*linears, *others])


def _settings(seen: Attended) -> tuple[Any, ...]:
    sinks = None if seen.sinks is None else seen.sinks.data_ptr()
    return seen.index, seen.left, seen.right, seen.softcap, sinks, seen.scale, seen.query.shape[1:]


def _is_of(sinks: torch.Tensor, parameter: torch.Tensor) -> bool:
    return sinks.data_ptr() == parameter.data_ptr() and sinks.numel() == parameter.numel()


def _starts_with(call: Call | None, out: torch.Tensor) -> bool:
    """Whether a layer got what attention returned."""
    x = _x(call)
    return x is not None and x.data_ptr() == out.data_ptr() and x.numel() == out.numel()


# Decoder layers


def layer_parts(module: nn.Module, recording: Recording, norms: dict[nn.Module, FusedNorm]) -> LayerParts:
    """The parts of a decoder layer, and the proof of its sums: they are the same bits.

    Raises:
        PatternMismatch: it is none.
    """
    call = recording.call(module)
    children = [child for child in module.children() if recording.call(child) is not None]
    own_norms = [child for child in children if child in norms]
    attention = [child for child in children if child in recording.attended]
    rest = [child for child in children if child not in own_norms and child not in attention]
    mlp = [child for child in rest if any(True for _ in child.parameters())]
    if call is None or len(attention) != 1 or len(mlp) != 1:
        raise PatternMismatch("it is not one attention and one MLP")
    if any(type(child) not in (nn.Dropout, nn.Identity) for child in rest if child not in mlp):
        raise PatternMismatch("it has parts of no known kind")
    if not isinstance(call.output, torch.Tensor):
        raise PatternMismatch("it returns more than hidden states")
    _check_parameters(module, [*own_norms, *attention, *mlp])
    calls = {child: recording.call(child) for child in children}
    left = dict.fromkeys(own_norms)

    def take(x: torch.Tensor | None, is_equal: bool = False) -> tuple[FusedNorm | None, torch.Tensor | None]:
        """The norm of x, and its result; or none, and x."""
        for norm in left:
            given = _x(calls[norm])
            if _is_equal(given, x) if is_equal else _is_same(given, x):
                del left[norm]
                return norms[norm], _y(calls[norm])
        return None, x

    h, (a, m) = call.x, (_y(calls[attention[0]]), _y(calls[mlp[0]]))
    attended, transformed = calls[attention[0]], calls[mlp[0]]
    assert attended is not None
    assert transformed is not None
    pre_attention, x = take(h)
    if not _is_same(_x(attended), x):
        raise PatternMismatch("attention gets something else than its input")
    post_attention, a = take(a)
    t = None if a is None or h is None or a.shape != h.shape else h + a
    pre_mlp, x = take(t, is_equal=True)
    if not (_is_same(_x(transformed), x) or (pre_mlp is None and _is_equal(_x(transformed), x))):
        raise PatternMismatch("the MLP gets something else than the sum")
    post_mlp, m = take(m)
    if left or t is None or m is None or m.shape != t.shape or not _is_equal(call.y, t + m):
        raise PatternMismatch("its output is not the sum of its parts")
    if len(transformed.args) != 1 or transformed.kwargs:
        raise PatternMismatch("the MLP takes more than hidden states")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(module).forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    for step in recording.steps_of(module) or ():
        layer_call, inner = recording.call(module, step), recording.call(attention[0], step)
        if layer_call is None or inner is None:
            raise PatternMismatch("its parts do not run in every step")
        given, passed = defaults | _by_name(module, layer_call), _by_name(attention[0], inner)
        if any(name not in given or given[name] is not x for name, x in passed.items() if name != "hidden_states"):
            raise PatternMismatch("attention gets arguments that the layer does not get")
    handed_on = tuple(name for name in _by_name(attention[0], attended) if name != "hidden_states")
    return LayerParts(
        attention[0], mlp[0], pre_attention, post_attention, pre_mlp, post_mlp, handed_on, defaults, modules=children
    )


# What they share


def arguments(module: nn.Module, recording: Recording) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of the positional arguments of a module's forward, and of all that it got in any step."""
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    got = {
        name
        for step in recording.steps_of(module) or ()
        for call in recording.calls[module][step]
        for name in _by_name(module, call)
    }
    return names, frozenset(got)


def _by_name(module: nn.Module, call: Call) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return dict(zip(tuple(inspect.signature(type(module).forward).parameters)[1:], call.args)) | call.kwargs


def _linears_of(module: nn.Module) -> tuple[list[nn.Linear], list[nn.Module]]:
    """Plain linear layers among the children, and the other children, which must not have any."""
    children = list(module.children())
    linears = [child for child in children if type(child) is nn.Linear and not has_own_forward(child)]
    others = [child for child in children if child not in linears]
    if any(isinstance(inner, nn.Linear) for other in others for inner in other.modules()):
        raise PatternMismatch("it has linear layers that are not plain, or deeper inside")
    if has_own_forward(module):
        raise PatternMismatch("it has a forward of its own")
    return linears, others


def _check_parameters(module: nn.Module, parts: Iterable[nn.Module], also: nn.Parameter | None = None) -> None:
    """Refuse weights that the fused forward would not read."""
    known = {id(p) for part in parts for p in part.parameters()} | {id(also)}
    if any(id(p) not in known for p in module.parameters()):
        raise PatternMismatch("it has other weights beside those of its parts")


def _x(call: Call | None) -> torch.Tensor | None:
    return None if call is None else call.x


def _y(call: Call | None) -> torch.Tensor | None:
    return None if call is None else call.y


def _is_same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether they are the same elements in memory."""
    if a is None or b is None:
        return False
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype)


def _is_equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether they are equal: the same bits in half precision, and in more up to the last one or two."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype in (torch.float32, torch.float64):
        return torch.allclose(a, b, rtol=1e-6, atol=1e-7 * float(b.abs().max()))
    return torch.equal(a, b)
