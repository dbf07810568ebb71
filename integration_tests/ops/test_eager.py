"""Eager calls run an op's function; whatever traces, wraps or transforms them sees the op."""

from types import SimpleNamespace

import hf_paged_kernels as kernels
import pytest
import torch
from hf_paged_kernels import backend, checks
from hf_paged_kernels.attention import ops
from hf_paged_kernels.eager import EagerOp, eager_op
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@eager_op("hf_paged_test::half", mutates_args=("seen",))
def half_op(x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Counts its calls in ``seen``, reads memory as a kernel does."""
    if seen is not None:
        seen += 1
    return torch.tensor(memory(x)).view(x.shape) / 2


@half_op.register_fake
def _(x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape)


def memory(x):
    """The numbers at a contiguous tensor's address, whatever it says they stand for."""
    import ctypes

    return [(ctypes.c_float * x.numel()).from_address(x.data_ptr())[i] for i in range(x.numel())]


class Counted:
    """The custom op of an EagerOp, with a count of its calls."""

    def __init__(self, op):
        self.op, self.calls = op, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.op(*args, **kwargs)


@pytest.fixture
def counted(monkeypatch):
    def count(op: EagerOp) -> Counted:
        spy = Counted(op.op)
        monkeypatch.setattr(op, "op", spy)
        return spy

    return count


def dense():
    return torch.randn(1, 5, 4, 16), torch.randn(1, 7, 2, 16), torch.randn(1, 7, 2, 16)


def test_plain_calls_do_not_go_through_the_op(counted):
    spy, back = counted(ops.flash_attention_op), counted(ops.flash_attention_backward_op)
    q, k, v = dense()
    kernels.flash_attention(q, k, v)
    with torch.inference_mode(), torch.autocast("cpu"):
        kernels.flash_attention(torch.nn.Parameter(q, requires_grad=False), k, v)
    kernels.flash_attention(q.requires_grad_(), k, v).sum().backward()
    assert spy.calls == back.calls == 0


class Subclass(torch.Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def under(mode):
    def call(x):
        with mode:
            return half_op(x, None)

    return call


@pytest.mark.parametrize(
    "call",
    [
        under(Functions()), under(Dispatches()), lambda x: half_op(x.as_subclass(Subclass), None),
        lambda x: half_op(x.to("meta"), None), make_fx(lambda x: half_op(x, None)),
        lambda x: torch.jit.trace(lambda y: half_op(y, None), x),
        lambda x: half_op(torch._subclasses.FakeTensorMode().from_tensor(x), None),
    ],
    ids=["function mode", "dispatch mode", "subclass", "meta", "make_fx", "jit", "fake"],
)  # fmt: skip
def test_whoever_looks_sees_the_op(call, counted):
    spy = counted(half_op)
    call(torch.randn(3))
    assert spy.calls >= 1


def test_functorch_sees_the_op(counted):
    """Which it refuses; the function would compute on whatever memory is behind a wrapper."""
    spy = counted(half_op)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: half_op(x, None).sum())(torch.randn(3))
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(lambda x: half_op(x, None))(torch.randn(2, 3))
    assert spy.calls == 2


def test_a_tensor_that_stands_for_its_negative():
    """A kernel reads memory, in which the sign is not."""
    x = torch.randn(3)
    negative = torch.conj(torch.complex(torch.zeros(3), x)).imag.view(3)
    assert negative.is_neg()
    assert torch.equal(half_op(negative, None), -x / 2)
    q, k, v = (torch.conj(torch.complex(y, y)).imag for y in dense())
    assert torch.equal(kernels.flash_attention(q, k, v), kernels.flash_attention(*(y.resolve_neg() for y in (q, k, v))))


def test_what_an_op_writes_has_another_version():
    """Or autograd would go on with what it saved before."""
    x, seen = torch.randn(3), torch.zeros(())
    for times in (1, 2):
        before = seen._version
        half_op(x, seen)
        assert seen._version > before
        assert float(seen) == times
    pages = torch.zeros(6, 2, 8, 16)
    weight = torch.randn(6, 2, 8, 16, requires_grad=True)
    product = (weight * pages).sum()
    new = torch.randn(1, 2, 16)
    kernels.write_pages(new, new, pages, pages.clone(), torch.tensor([3]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_gradients_are_those_of_the_op():
    q, k, v = (x.requires_grad_() for x in dense())
    sinks = torch.randn(4, requires_grad=True)
    arguments = (q, k, v, None, None, 5, 3, 0, 5.0, sinks, 0.25)
    grads = torch.randn(1, 5, 4, 16), torch.randn(1, 4, 5)
    found, expected = (
        torch.autograd.grad(call(*arguments), (q, k, v, sinks), grads)
        for call in (ops.flash_attention_op, ops.flash_attention_op.op)
    )
    for one, other in zip(found, expected):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert not ops.flash_attention_op(*arguments)[0].requires_grad


def test_inside_of_another_op_no_gradient_is_recorded():
    @torch.library.custom_op("hf_paged_test::outer", mutates_args=())
    def outer(x: torch.Tensor) -> torch.Tensor:
        return kernels.flash_attention(x, x, x)

    out = outer(torch.randn(1, 3, 2, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()


@pytest.mark.parametrize("option", [{"window": True}, {"window": (True, 0)}, {"scale": True}, {"max_seqlen_q": True}])
def test_an_equal_option_of_another_type_is_checked(option):
    q, k, v = dense()
    accepted = {name: (1, 0) if isinstance(value, tuple) else 1 for name, value in option.items()}
    for _ in range(2):
        kernels.flash_attention(q, k, v, **accepted)
        with pytest.raises(TypeError, match=next(iter(option))):
            kernels.flash_attention(q, k, v, **option)


def test_shapes_strides_and_dtypes_are_checked_once():
    calls = []

    def check(x, option):
        calls.append(1)
        return x.shape, option

    x = torch.randn(3, 4)
    for tensor in (x, x.clone(), x.T.contiguous().T, x.half(), x[:2], x.to("meta")):
        for _ in range(2):
            assert checks.once(check, (tensor,), 2) == (tensor.shape, 2)
    assert len(calls) == 5
    for option in (2.0, True, (2,), None, None, "2", "2"):
        checks.once(check, (x,), option)
    assert len(calls) == 5 + 4 + 2


def test_values_on_an_accelerator_are_left_alone(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert not checks.may_read_values(on_gpu)
    assert checks.may_read_values(torch.zeros(1))
    assert not checks.may_read_values(torch.zeros(1, device="meta"))
    monkeypatch.setattr(checks, "VALUES_ON_DEVICE", True)
    assert not checks.may_read_values(torch.zeros(1, device="meta"))


def test_a_layout_is_not_known_by_what_a_thread_takes(monkeypatch):
    """One that takes references for a while does not decide for later calls."""
    monkeypatch.setattr(backend, "_has_gluon", lambda device: True)
    q, k = (torch.randn(1, 5, heads, 128).bfloat16() for heads in (4, 2))
    with backend.on_references():
        assert not backend.uses_gluon(q, k, k, 1.0)
    assert backend.uses_gluon(q, k, k, 1.0)
