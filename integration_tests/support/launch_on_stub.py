"""Compares the launches of ``launch_triton`` with Triton's own, on a stub of a GPU, for ``test_launch.py``.

Every launch of a family of ``compile_for_hopper``, or of the public functions, is made three times with the same
arguments: to compile, by Triton, and bound. What Triton's C launcher is given must be the same, and the bound launch
must not go through Triton's binder.
"""

import sys

import compile_for_hopper
import torch
from hf_paged_kernels import launch_triton as launches
from triton.runtime.jit import JITFunction

from eval.kernel_bench.stub_gpu import pretend_hopper

COMPARED: list[str] = []
RUNS: list[str] = []
IS_COMPARED: list[bool] = []
own_launch, own_run = launches.launch, JITFunction.run


def counted_run(self, *args, **kwargs):
    RUNS.append(self.fn.__name__)
    return own_run(self, *args, **kwargs)


def plain(values):
    """Addresses in place of tensors; without Triton's hooks, which are empty, what they would be told, and None."""
    if isinstance(values, tuple | list):
        return [plain(x) for x in values if x is not None and type(x).__name__ not in ("HookChain", "LazyDict")]
    return values.data_ptr() if isinstance(values, torch.Tensor) else values


def compare(kernel, grid, arguments, constants, bound_launch):
    """Only the arguments of kernels that are None are left out, by both alike."""
    launches._launch_by_triton(kernel, grid, arguments, constants)
    expected = plain(stub.calls[-1])
    RUNS.clear()
    num_calls = stub.num_calls
    bound_launch()
    assert not RUNS, f"{kernel.fn.__name__} goes through Triton's binder"
    assert stub.num_calls == num_calls + 1
    assert plain(stub.calls[-1]) == expected, (kernel.fn.__name__, expected, plain(stub.calls[-1]))
    COMPARED.append(kernel.fn.__name__)


def checked_launch(kernel, grid, *arguments, **constants):
    bound = own_launch(kernel, grid, *arguments, **constants)
    if IS_COMPARED:
        compare(kernel, grid, arguments, constants, lambda: own_launch(kernel, grid, *arguments, **constants))
    return bound


class CheckedLaunch(launches.Launch):
    """Binds by ``checked_launch``, and compares its own launch too."""

    __slots__ = ()

    def __call__(self, *tensors):
        super().__call__(*tensors)
        if IS_COMPARED:
            given = iter([x for x in tensors if x is not None])
            arguments = tuple(launches._with_memory(x, given) for x in self.arguments)
            again = super().__call__
            compare(self.kernel, self.grid, arguments, self.constants, lambda: again(*tensors))


class CheckedSeries(launches.Series):
    """What it launches by addresses is what its launches are on tensors."""

    __slots__ = ()

    def start_on(self, tensors):
        super().start_on(tensors)
        if not IS_COMPARED:
            return
        IS_COMPARED.clear()
        super().start_on(tensors)
        number = len(self.launches)
        expected = [plain(call) for call in list(stub.calls)[-number:]]
        num_calls = stub.num_calls
        assert self.start([x.data_ptr() for x in tensors])
        assert stub.num_calls == num_calls + number
        assert [plain(call) for call in list(stub.calls)[-number:]] == expected
        assert not self.start([x.data_ptr() + 4 for x in tensors])
        assert stub.num_calls == num_calls + number
        IS_COMPARED.append(True)
        COMPARED.append("Series")


def public() -> None:
    """The public functions: later calls bind nothing again, and read nothing back."""
    from eval.bench_host_time import kernel_calls

    def refuse(*args):
        raise AssertionError("a value is read back from the device")

    for name, call in kernel_calls("cpu", False, (64,)).items():
        IS_COMPARED.append(True)
        call()
        call()
        IS_COMPARED.clear()
        readers = {x: getattr(torch.Tensor, x) for x in ("tolist", "item", "cpu", "__bool__", "__int__", "nonzero")}
        for reader in readers:
            setattr(torch.Tensor, reader, refuse)
        RUNS.clear()
        num_calls = stub.num_calls
        call()
        for reader, own in readers.items():
            setattr(torch.Tensor, reader, own)
        assert stub.num_calls > num_calls, name
        assert not RUNS, (name, RUNS)
    keeps_no_memory()


def keeps_no_memory() -> None:
    """By the op, as compiled code calls it, a launch neither takes of kept counters nor keeps some."""
    from hf_paged_kernels.attention.ops import flash_attention_op

    q = torch.randn(1, 300, 4, 128, dtype=torch.bfloat16)
    arguments = (q, q, q, None, None, 300, None, 0, None, None, 0.1)
    launches._counters.clear()
    num_kept = []
    for call in (flash_attention_op.op, flash_attention_op, flash_attention_op.op):
        call(*arguments)
        num_kept.append(sum(map(len, launches._counters.values())))
    assert num_kept == [0, launches.COUNTERS - 1, launches.COUNTERS - 1], num_kept


if __name__ == "__main__":
    stub = pretend_hopper()
    JITFunction.run = counted_run
    launches.launch, launches.Launch, launches.Series = checked_launch, CheckedLaunch, CheckedSeries
    if sys.argv[1] == "public":
        public()
    else:
        IS_COMPARED.append(True)
        compile_for_hopper.FAMILIES[sys.argv[1]]()
    print(*sorted(set(COMPARED)))
