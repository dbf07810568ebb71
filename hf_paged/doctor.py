"""What ``hf-paged doctor`` does: each kernel beside its PyTorch reference, and what an engine makes of a model."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hf_paged_kernels as kernels
import torch
from hf_paged_kernels import compile_ahead
from hf_paged_kernels.attention import ops as attention_ops
from hf_paged_kernels.backend import has_gluon
from hf_paged_kernels.layers import ops as layer_ops
from hf_paged_kernels.linear.decode import decode_linear_op
from hf_paged_kernels.linear.skinny import skinny_gated_linear_op, skinny_linear_op
from hf_paged_kernels.sampling import ops as sampling_ops
from hf_paged_kernels.sampling.reference import slot_rules
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import tqdm

from .cache.paged_cache import PagedCache
from .engine import Engine, EngineConfig, is_supported
from .errors import UnsupportedModelError

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative errors (Frobenius) that rounding alone does not reach, by the dtype of the inputs."""

Tensors = dict[str, torch.Tensor]
Call = Callable[[Tensors], list[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Check:
    """One kernel on one set of inputs.

    Attributes:
        name: what it is called in the report.
        inputs: on the CPU.
        call: runs the kernel or the reference, whichever the tensors' device takes. What it returns is compared,
            changed inputs included.
        needs_hopper: elsewhere PyTorch's own operators take its place.
    """

    name: str
    inputs: Tensors
    call: Call
    needs_hopper: bool = False


def make_checks(dtype: torch.dtype, with_fp8: bool) -> list[Check]:
    """Every kernel, on small inputs of odd lengths."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return [*_dense_checks(new), *_paged_checks(new, with_fp8), *_layer_checks(new), _sampling_check(new)]


def _dense_checks(new: Callable[..., torch.Tensor]) -> list[Check]:
    q, k, v = new(2, 37, 4, 64), new(2, 37, 2, 64), new(2, 37, 2, 64)
    lse = torch.randn(4, 37)

    def forward(t: Tensors) -> list[torch.Tensor]:
        out, lse = kernels.flash_attention(
            t["q"], t["k"], t["v"], causal=True, window=20, softcap=15.0, sinks=t["sinks"], return_lse=True
        )
        return [out, lse]

    def backward(t: Tensors) -> list[torch.Tensor]:
        leaves = [t[name].detach().requires_grad_() for name in "qkv"]
        out = kernels.flash_attention(*leaves, causal=True)
        assert isinstance(out, torch.Tensor)
        return list(torch.autograd.grad(out, leaves, t["dout"]))

    def packed(t: Tensors) -> list[torch.Tensor]:
        return [kernels.flash_attention(t["q"][0], t["k"][0], t["v"][0], cu_seqlens_q=t["cu"], causal=True)]  # type: ignore[list-item]

    def merge(t: Tensors) -> list[torch.Tensor]:
        return list(kernels.merge_attention_states(t["q"][0], t["lse"], t["q"][1], t["lse"] + 1))

    dense = {"q": q, "k": k, "v": v}
    return [
        Check("flash_attention, window, softcap, sinks", dense | {"sinks": new(4)}, forward),
        Check("flash_attention, packed", dense | {"cu": torch.tensor([0, 5, 6, 37], dtype=torch.int32)}, packed),
        Check("flash_attention, backward", dense | {"dout": new(2, 37, 4, 64)}, backward),
        Check("merge_attention_states", {"q": q, "lse": lse}, merge),
    ]


def _paged_checks(new: Callable[..., torch.Tensor], with_fp8: bool) -> list[Check]:
    table = torch.arange(40, dtype=torch.int32).flip(0).view(2, 20)
    pages = {"k_pages": new(40, 2, 16, 64), "v_pages": new(40, 2, 16, 64), "table": table}
    step = {"lens": torch.tensor([301, 7], dtype=torch.int32)}

    def attend(longest: int) -> Call:
        def call(t: Tensors) -> list[torch.Tensor]:
            scales = {name: t[name] for name in ("k_scale", "v_scale") if name in t}
            return [
                kernels.paged_attention(  # type: ignore[list-item]
                    t["q"], t["k_pages"], t["v_pages"], t["table"], t["lens"], t["cu"], max_query_len=longest, **scales
                )
            ]

        return call

    def write(t: Tensors) -> list[torch.Tensor]:
        names = [name for name in ("k_pages", "v_pages", "k_scale", "v_scale") if name in t]
        kernels.write_pages(
            t["new_k"], t["new_v"], t["k_pages"], t["v_pages"], t["slots"], k_scale=t.get("k_scale"),
            v_scale=t.get("v_scale"),
        )  # fmt: skip
        return [t[name] for name in names]

    def copy(t: Tensors) -> list[torch.Tensor]:
        kernels.copy_pages(t["k_pages"], t["v_pages"], t["source"], t["target"])
        return [t["k_pages"], t["v_pages"]]

    def shared(t: Tensors) -> list[torch.Tensor]:
        prefix = kernels.make_shared_prefix(
            t["table"], t["lens"], t["cu"], [(0, 3, 4)], 16, num_q_heads=4, num_kv_heads=2, max_query_len=1
        )
        return [
            kernels.shared_prefix_attention(  # type: ignore[list-item]
                t["q"], t["k_pages"], t["v_pages"], t["table"], t["lens"], t["cu"], prefix=prefix, max_query_len=1
            )
        ]

    decode = pages | step | {"q": new(2, 4, 64), "cu": torch.tensor([0, 1, 2], dtype=torch.int32)}
    prefill = pages | step | {"q": new(40, 4, 64), "cu": torch.tensor([0, 37, 40], dtype=torch.int32)}
    common = torch.tensor([[0, 1, 2, 3, 4 + row, 8 + row] for row in range(3)], dtype=torch.int32)
    alike = pages | {
        "table": common, "lens": torch.tensor([70, 81, 96], dtype=torch.int32), "q": new(3, 4, 64),
        "cu": torch.tensor([0, 1, 2, 3], dtype=torch.int32),
    }  # fmt: skip
    writes = pages | {
        "new_k": new(7, 2, 64), "new_v": new(7, 2, 64), "slots": torch.tensor([3, 19, 20, -1, 639, 0, 100])
    }  # fmt: skip
    checks = [
        Check("paged_attention, decode", decode, attend(1)),
        Check("paged_attention, prefill", prefill, attend(37)),
        Check("shared_prefix_attention", alike, shared),
        Check("write_pages", writes, write),
        Check("copy_pages", pages | {"source": torch.tensor([1, 5]), "target": torch.tensor([2, 7])}, copy),
    ]
    for name, page_dtype in (("FP8", torch.float8_e4m3fn), ("INT8", torch.int8)):
        if page_dtype == torch.float8_e4m3fn and not with_fp8:
            continue
        quantised: Tensors = {}
        for pool in ("k_pages", "v_pages"):
            codes = torch.randint(-100, 100, pages[pool].shape, generator=torch.Generator().manual_seed(1))
            quantised[pool] = codes.to(page_dtype) if page_dtype == torch.int8 else (codes / 8).to(page_dtype)
            quantised[f"{pool[0]}_scale"] = torch.rand(pages[pool].shape[:3]) / 64 + 0.01
        checks += [
            Check(f"paged_attention, decode, {name} pages", decode | quantised, attend(1)),
            Check(f"paged_attention, prefill, {name} pages", prefill | quantised, attend(37)),
        ]
    return checks


def _layer_checks(new: Callable[..., torch.Tensor]) -> list[Check]:
    def norm(t: Tensors) -> list[torch.Tensor]:
        return list(layer_ops.rms_norm_op(t["x"], t["weight"], 1e-6, 0.0, True, t["residual"]))

    def activation(t: Tensors) -> list[torch.Tensor]:
        return [layer_ops.gated_activation_op(t["x"], "silu", "gate_up")]

    def rotary(t: Tensors) -> list[torch.Tensor]:
        q = layer_ops.rotary_write_op(
            t["q"], t["k"], t["v"], t["cos"], t["sin"], False, t["norm"], t["norm"], 1e-6, 0.0, True, t["k_pages"],
            t["v_pages"], None, None, t["slots"],
        )  # fmt: skip
        return [q, t["k_pages"], t["v_pages"]]

    def inputs(t: Tensors) -> list[torch.Tensor]:
        found = layer_ops.decode_inputs_op(t["slots"], t["computed"], t["last_token"])
        return [*found, t["computed"]]

    def rows(t: Tensors) -> list[torch.Tensor]:
        return list(layer_ops.decode_rows_op(t["slots"], t["lens"], t["table"], 16))

    def skinny(t: Tensors) -> list[torch.Tensor]:
        return [
            skinny_linear_op(t["x"], t["w"], None, None, t["norm"], 1e-6),
            skinny_gated_linear_op(t["x"], t["w"], None, t["norm"], 1e-6),
        ]

    def decode(t: Tensors) -> list[torch.Tensor]:
        return [decode_linear_op(t["x"], t["w"], None)]

    hidden = {"x": new(5, 512), "residual": new(5, 512), "weight": new(512)}
    angles = torch.rand(5, 32) * 6
    heads = {
        "q": new(5, 4, 64), "k": new(5, 2, 64), "v": new(5, 2, 64), "norm": new(64), "cos": angles.cos(),
        "sin": angles.sin(), "k_pages": new(4, 2, 16, 64), "v_pages": new(4, 2, 16, 64),
        "slots": torch.tensor([0, 17, -1, 40, 63]),
    }  # fmt: skip
    slots = torch.tensor([2, 0, 3])
    return [
        Check("rms_norm", hidden, norm),
        Check("gated_activation", {"x": new(5, 512)}, activation),
        Check("rotary embedding and page write", heads, rotary),
        Check(
            "step inputs",
            {"slots": slots, "computed": torch.tensor([4, 5, 6, 7]), "last_token": torch.tensor([9, 8, 7, 6])},
            inputs,
        ),
        Check(
            "page-table rows",
            {
                "slots": slots,
                "lens": torch.tensor([20, 17, 32], dtype=torch.int32),  # both pages: entries behind them are undefined
                "table": torch.arange(8, dtype=torch.int32).view(4, 2),
            },
            rows,
        ),
        Check("linear, 1 to 16 tokens", {"x": new(3, 1024), "w": new(512, 1024) / 32, "norm": new(1024)}, skinny, True),
        Check("linear, 17 to 256 tokens", {"x": new(24, 1024), "w": new(4096, 1024) / 32}, decode, True),
    ]


def _sampling_check(new: Callable[..., torch.Tensor]) -> Check:
    num_rows, vocab = 3, 1000
    inputs = {
        "logits": new(num_rows, vocab), "slots": torch.arange(num_rows), "positions": torch.tensor([4, 9, 2]),
        "temperature": torch.tensor([0.0, 0.8, 1.0], dtype=torch.float64), "top_k": torch.tensor([0, 0, 20]),
        "top_p": torch.tensor([1.0, 0.9, 1.0], dtype=torch.float64),
        "min_p": torch.zeros(num_rows, dtype=torch.float64),
        "seeds": torch.tensor([1, 2, 3]), "wants_lse": torch.ones(num_rows, dtype=torch.int64),
        "rules": torch.from_numpy(slot_rules(vocab)).repeat(num_rows, 1),
    }  # fmt: skip

    def call(t: Tensors) -> list[torch.Tensor]:
        return list(sampling_ops.sample_tokens_op(*(t[name] for name in inputs), None))

    return Check("choice of tokens", inputs, call)


@contextlib.contextmanager
def _kernels_for_cpu_tensors() -> Iterator[None]:
    """CPU tensors take the Triton kernels, which Triton's interpreter runs."""
    modules: tuple[Any, ...] = (attention_ops, layer_ops, sampling_ops)
    before = [module.uses_triton for module in modules]
    for module in modules:
        module.uses_triton = lambda tensor: True
    try:
        yield
    finally:
        for module, function in zip(modules, before):
            module.uses_triton = function


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """In the Frobenius norm; NaN where only one of the two is finite, and for other integers."""
    if not got.is_floating_point():
        return 0.0 if torch.equal(got.cpu(), expected) else float("nan")
    got, expected = got.cpu().double(), expected.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, got - expected)
    norm = expected.nan_to_num(0.0, 0.0, 0.0).norm()
    return float(difference.norm() / norm.clamp(min=1e-30))


def check_kernels(device: torch.device, say: Callable[[str], None]) -> bool:
    """Compare every kernel with its reference; returns whether all agree.

    Without an accelerator the kernels run in Triton's interpreter, in float32. That shows that they compute what they
    should, and nothing of how a compiler or a GPU treats them. ``TRITON_INTERPRET=1`` must be in the environment
    before triton is imported.
    """
    is_cpu = device.type == "cpu"
    dtype = torch.float32 if is_cpu else torch.bfloat16
    is_right = True
    checks = make_checks(dtype, with_fp8=not is_cpu)
    is_hopper = not is_cpu and has_gluon(device)
    if compile_ahead.can_compile(device):
        _compile_ahead([check for check in checks if is_hopper or not check.needs_hopper], device)
    for check in checks:
        if check.needs_hopper and not is_hopper:
            say(f"--    {check.name}: PyTorch's operators run here")
            continue
        started = time.perf_counter()
        expected = check.call({name: x.clone() for name, x in check.inputs.items()})
        with _kernels_for_cpu_tensors() if is_cpu else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of infinities in the interpreter
            try:
                got = check.call({name: x.clone().to(device) for name, x in check.inputs.items()})
                error = max(relative_error(*pair) for pair in zip(got, expected))
            except Exception as problem:  # a kernel that does not compile here is a finding, and others follow
                say(f"FAIL  {check.name}: {type(problem).__name__}: {str(problem).splitlines()[0]:.200}")
                is_right = False
                continue
        passed = error <= LIMITS[dtype]  # False for NaN
        is_right &= passed
        seconds = time.perf_counter() - started
        word = "ok  " if passed else "FAIL"
        say(f"{word}  {check.name}: error {error:.1e}, limit {LIMITS[dtype]:.0e}, {seconds:.1f} s")
    return is_right


def _compile_ahead(checks: list[Check], device: torch.device) -> None:
    """Compile side by side what the checks would compile one after the other; what fails is left to its check."""
    bar = tqdm(desc="compiling kernels", unit="kernel", leave=False, total=0)
    with bar, compile_ahead.compiling(device, bar):
        for check in checks:
            with contextlib.suppress(Exception):
                check.call({name: x.clone().to(device) for name, x in check.inputs.items()})


def check_model(path: str, with_weights: bool, device: torch.device, say: Callable[[str], None]) -> bool:
    """Say what of a model would be paged, served, fused and captured, and why the rest would not.

    Args:
        path: a folder or a hub id.
        with_weights: load the model and start an engine. False: from the config alone, without weights.
        device: of the engine.
        say: prints a line.

    Returns:
        Whether an engine serves it.

    Raises:
        ValueError, OSError, ImportError: the model cannot be loaded, for reasons that are not ours.
    """
    config = AutoConfig.from_pretrained(path)
    try:
        if with_weights:
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="paged_flash")
            model = model.to(device)
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, attn_implementation="paged_flash")
    except UnsupportedModelError as error:
        say(f"attention   refused: {error}")
        return False
    say(f"model       {type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}")
    say("attention   paged_flash")
    say(f"cache       {_describe_cache(model.config)}")
    reasons = [reason for reason in is_supported(model) if with_weights or "on the meta device" not in reason]
    if reasons:
        say(f"engine      refused: {'; '.join(reasons)}")
        return False
    if not with_weights:
        say("engine      nothing in its class and config speaks against it")
        say("fused       not tried: add --weights, which loads the model and starts an engine")
        say(f"captured    {'tried with --weights' if device.type == 'cuda' else f'no: {device} has no CUDA graphs'}")
        return True
    return _try_engine(model, device, say)


def _describe_cache(config: Any) -> str:
    try:
        groups = PagedCache(config).memory()
    except UnsupportedModelError as error:
        return f"transformers' own: {error}"
    kinds = []
    for group in groups:
        kind = "of full attention" if group.window is None else f"with a window of {group.window}"
        kinds.append(f"{group.num_layers} layers {kind}")
    others = config.get_text_config(decoder=True).num_hidden_layers - sum(group.num_layers for group in groups)
    return "pages: " + ", ".join(kinds) + (f"; {others} layers keep states of their own" if others > 0 else "")


def _try_engine(model: Any, device: torch.device, say: Callable[[str], None]) -> bool:
    """Start a small engine and say what it found."""
    options: dict[str, Any] = dict(max_num_seqs=4, max_batch_tokens=512, max_model_len=256)
    refusal = None
    try:
        try:
            engine = Engine(model.eval(), EngineConfig(fuse=True, **options), background=False)
        except UnsupportedModelError:
            raise
        except ValueError as error:  # nothing can be fused
            refusal = str(error)
            engine = Engine(model.eval(), EngineConfig(fuse=False, **options), background=False)
    except UnsupportedModelError as error:
        say(f"engine      refused: {error}")
        return False
    with engine:
        say("engine      serves it: its packed forward agrees with the model's own")
        say(f"fused       {engine.fused if refusal is None else refusal}")
        num_graphs = engine.warm_up([1])
        on_cpu = f"no: the model is on {device}" if device.type != "cuda" else "no: see the log"
        say(f"captured    {f'yes, {num_graphs} graphs for a batch of 1' if num_graphs else on_cpu}")
    return True
