"""Shared-prefix attention: kernels (in the interpreter on CPU) and references, against float64 and no sharing."""

from dataclasses import dataclass

import pytest
import torch
from helpers import DEVICE, TOLERANCE, error, held_keys, make_pages, prefix_sums, softmax_attention
from hf_paged_kernels import make_shared_prefix, paged_attention, shared_prefix_attention
from hf_paged_kernels.attention import ops, reference
from hf_paged_kernels.attention.shared_prefix import attend_shared_prefix, cut_runs, run_length

PAGE = 8


@pytest.fixture(params=["triton", "reference"])
def backend(request, monkeypatch, poison):
    """The portable kernels and the references, whatever the device."""
    monkeypatch.setattr(ops, "uses_triton", lambda tensor: request.param == "triton")
    monkeypatch.setattr(ops, "uses_gluon", lambda *tensors: False)


@dataclass
class Step:
    """Sequences in pages; ``groups`` share their first pages, and every page that nobody reads is NaN."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    table: torch.Tensor
    seq_lens: torch.Tensor
    cu: torch.Tensor
    max_query_len: int
    groups: list[tuple[int, int, int]]
    scales: dict[str, torch.Tensor]

    @property
    def tensors(self):
        return self.q, self.k_pages, self.v_pages, self.table, self.seq_lens, self.cu

    def prefix(self, **options):
        heads = {"num_q_heads": self.q.shape[1], "num_kv_heads": self.k_pages.shape[1]}
        options = {"max_query_len": self.max_query_len} | heads | options
        return make_shared_prefix(
            self.table, self.seq_lens, self.cu, options.pop("groups", self.groups), self.k_pages.shape[2], **options
        )

    def attend(self, prefix, **options):
        options = {"max_query_len": self.max_query_len, "return_lse": True} | self.scales | options
        return shared_prefix_attention(*self.tensors, prefix=prefix, **options)

    def attend_unshared(self, **options):
        return paged_attention(
            *self.tensors, max_query_len=self.max_query_len, return_lse=True, **self.scales, **options
        )

    def expected(self, softcap=None, sinks=None):
        """Float64, sequence by sequence."""
        outs, sums = [], []
        page_size = self.k_pages.shape[2]
        for i, length in enumerate(self.seq_lens.tolist()):
            pages = self.table[i, : -(-length // page_size)].long()
            kv = []
            for name, pool in (("k_scale", self.k_pages), ("v_scale", self.v_pages)):
                held = pool.double()[pages]
                if self.scales and name == "k_scale":
                    held = held_keys(pool[pages], self.scales[name][pages])
                elif self.scales:
                    held = held * self.scales[name].double()[pages][..., None]
                kv.append(held.transpose(1, 2).flatten(0, 1)[:length])
            rows = slice(self.cu[i], self.cu[i + 1])
            scale = self.q.shape[-1] ** -0.5
            out, lse = softmax_attention(
                self.q[rows], *kv, left=None, right=0, softcap=softcap, sinks=sinks, scale=scale
            )  # fmt: skip
            outs.append(out)
            sums.append(lse)
        return torch.cat(outs), torch.cat(sums, 1)


def make_step(parts, q_lens, heads=(4, 1), dims=(16, 16), dtype=torch.float32, page_size=PAGE, device=DEVICE):
    """``parts``: ``(num_sequences, prefix_pages)``, neighbours that share as many pages; ``q_lens`` are repeated."""
    keys, values, groups, query_lens = [], [], [], []
    for count, pages in parts:
        if pages:
            groups.append((len(keys), count, pages))
        shared = [torch.randn(pages * page_size, heads[1], dim, dtype=dtype, device=device) for dim in dims]
        for _ in range(count):
            query_lens.append(q_lens[len(query_lens) % len(q_lens)])
            own = query_lens[-1] + int(torch.randint(0, 3 * page_size, ()))
            for tokens, prefix, dim in zip((keys, values), shared, dims):
                tokens.append(torch.cat([prefix, torch.randn(own, heads[1], dim, dtype=dtype, device=device)]))
    k_pages, v_pages, table = make_pages(keys, values, page_size)
    for first, count, pages in groups:
        copies = table[first + 1 : first + count, :pages].flatten().long()
        k_pages[copies], v_pages[copies] = float("nan"), float("nan")
        table[first + 1 : first + count, :pages] = table[first, :pages]
    return Step(
        q=torch.randn(sum(query_lens), heads[0], dims[0], dtype=dtype, device=device),
        k_pages=k_pages, v_pages=v_pages, table=table,
        seq_lens=torch.tensor([len(x) for x in keys], dtype=torch.int32, device=device),
        cu=prefix_sums(query_lens, device), max_query_len=max(*query_lens, 1), groups=groups, scales={},
    )  # fmt: skip


def quantise(step, dtype):
    """The same pages in int8 or FP8; the scales of slots that nobody reads are NaN."""
    for name in "kv":
        pages = getattr(step, f"{name}_pages")
        unused = pages.isnan().any(-1)
        numbers, scale = reference.quantize(pages.nan_to_num(), dtype)
        setattr(step, f"{name}_pages", numbers)
        step.scales[f"{name}_scale"] = scale.masked_fill(unused, float("nan"))
    return step


def check(step, out, lse, **options):
    expected, expected_lse = step.expected(**options)
    assert out.dtype == step.q.dtype
    # Both parts are rounded to q's dtype, and the merged result again.
    assert error(out, expected) <= 1.5 * TOLERANCE[step.q.dtype]
    assert torch.allclose(lse.double().cpu(), expected_lse, atol=1e-4 if out.dtype == torch.float32 else 1e-3, rtol=0)


STEPS = {
    "two groups and loners": dict(parts=[(1, 0), (2, 1), (2, 0), (7, 5), (1, 0)], q_lens=[1]),
    "one member": dict(parts=[(1, 4)], q_lens=[1]),
    "64 samples": dict(parts=[(64, 2)], q_lens=[1]),
    "more than one split": dict(parts=[(3, 70), (1, 0)], q_lens=[1]),
    "three new tokens": dict(parts=[(7, 3), (1, 0), (2, 1)], q_lens=[3]),
    "mixed queries": dict(parts=[(5, 2), (2, 0), (4, 6)], q_lens=[1, 3, 0, 2]),
    "long queries": dict(parts=[(3, 4), (2, 0)], q_lens=[20, 1]),
    "loners only": dict(parts=[(3, 0)], q_lens=[1]),
}


@pytest.mark.parametrize(
    ("regime", "heads"),
    [*((regime, (4, 1)) for regime in STEPS), ("two groups and loners", (2, 2)), ("mixed queries", (2, 2)),
     ("two groups and loners", (7, 1)), ("three new tokens", (7, 1))],
    ids=str,
)  # fmt: skip
def test_against_float64_and_without_sharing(backend, regime, heads):
    step = make_step(**STEPS[regime], heads=heads, dims=(24, 16))
    prefix = step.prefix()
    out, lse = step.attend(prefix)
    check(step, out, lse)
    plain, plain_lse = step.attend_unshared()
    assert error(out, plain) < 2e-6
    assert torch.allclose(lse, plain_lse, atol=1e-5)


def test_loners_are_not_rounded_twice(backend):
    """A sequence without a prefix merges with nothing, which changes no bit."""
    step = make_step([(3, 0), (2, 2)], [1], dtype=torch.bfloat16)
    out, lse = step.attend(step.prefix())
    plain, plain_lse = step.attend_unshared()
    assert torch.equal(out[:3], plain[:3])
    assert torch.equal(lse[:, :3], plain_lse[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sinks_take_part_once(backend, dtype, softcap):
    step = make_step([(1, 0), (7, 2), (2, 3)], [1, 3], dtype=dtype)
    sinks = torch.randn(4, device=DEVICE) * 2
    out, lse = step.attend(step.prefix(), sinks=sinks, softcap=softcap)
    check(step, out, lse, sinks=sinks, softcap=softcap)


@pytest.mark.parametrize("page_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_pages(backend, page_dtype):
    step = quantise(make_step([(2, 0), (7, 3), (1, 1)], [1, 2]), page_dtype)
    out, lse = step.attend(step.prefix())
    check(step, out, lse)


def test_every_random_batch(backend):
    for _ in range(3):
        draw = lambda low, high: int(torch.randint(low, high + 1, ()))  # noqa: E731
        parts = [(draw(1, 9), draw(0, 4)) for _ in range(draw(1, 5))]
        heads = [(1, 1), (4, 2), (6, 1)][draw(0, 2)]
        step = make_step(parts, [draw(1, 4) for _ in range(3)], heads=heads)
        check(step, *step.attend(step.prefix(max_runs=30, max_prefix_pages=5)))


def test_other_steps_and_other_groups_in_the_same_shapes(backend):
    """What a captured graph does: next_step on tensors that changed in place, groups written over."""
    first = make_step([(4, 3), (5, 0)], [1])
    second = make_step([(1, 0), (3, 1), (5, 2)], [1])
    width = max(first.table.shape[1], second.table.shape[1])
    for step in (first, second):
        spare = width - step.table.shape[1]
        step.table = torch.nn.functional.pad(step.table, (0, spare), value=2**30)
    bounds = dict(max_runs=6, max_prefix_pages=4, max_suffix_pages=width)
    held = first.prefix(**bounds)
    fresh = second.prefix(**bounds)
    shapes = lambda p: [getattr(p, name).shape for name in ("page_table", "suffix_page_table", "plan")]  # noqa: E731
    assert shapes(held) == shapes(fresh)
    held.run_starts.copy_(fresh.run_starts)
    held.prefix_pages.copy_(fresh.prefix_pages)
    prefix = held.next_step(second.table, second.seq_lens, second.cu)
    check(second, *second.attend(prefix))


def test_a_row_does_not_depend_on_its_batch(backend):
    step = make_step([(6, 3), (1, 0)], [1], dtype=torch.float16)
    out, _ = step.attend(step.prefix())
    for i in (0, 4, 6):
        alone = Step(
            step.q[i : i + 1], step.k_pages, step.v_pages, step.table[i : i + 1], step.seq_lens[i : i + 1],
            prefix_sums([1], DEVICE), 1, [(0, 1, 3)] if i < 6 else [], {},
        )  # fmt: skip
        assert torch.equal(alone.attend(alone.prefix())[0], out[i : i + 1])


def test_one_graph_under_torch_compile():
    """Layers of a step trace without a break, the plan included."""
    step = make_step([(3, 2), (1, 0)], [1])
    start = step.prefix()

    def layer(q, table, seq_lens, cu):
        prefix = start.next_step(table, seq_lens, cu)
        rest = (1, None, None, 0.25, None, None)
        return attend_shared_prefix(q, step.k_pages, step.v_pages, cu, prefix, *rest)[0] * 2

    arguments = (step.q, step.table, step.seq_lens, step.cu)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), layer(*arguments))


def test_runs():
    assert cut_runs([], 3, 16) == ([0], [0, 0, 0])
    assert cut_runs([(4, 5, 7), (1, 2, 3)], 10, 2) == ([0, 1, 3, 4, 6, 8, 9], [0, 3, 3, 0, 7, 7, 7, 7, 7, 0])
    assert cut_runs([(0, 4, 1)], 4, 4) == ([0], [1] * 4)
    # Rows of a run: at most 64, and at most 16 query tokens.
    assert [run_length(group, 1, 99) for group in (1, 4, 5, 7, 8, 16, 64, 71)] == [16, 16, 8, 8, 8, 4, 1, 1]
    assert [run_length(4, queries, 99) for queries in (1, 3, 8, 16, 17, 300)] == [16, 5, 2, 1, 99, 99]


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"groups": 3}, TypeError, "groups must be a list of .* got int"),
        ({"groups": [(0, 1)]}, ValueError, r"groups must be a list of \(first_sequence, .* it holds \(0, 1\)"),
        ({"groups": [(0, 6, 1)]}, ValueError, r"groups holds \(0, 6, 1\): sequences 0 to 5 of a step that has 0 to 4"),
        ({"groups": [(0, 0, 1)]}, ValueError, r"groups holds \(0, 0, 1\)"),
        ({"groups": [(0, 2, 99)]}, ValueError, r"groups holds \(0, 2, 99\): prefix_pages must be 0 to"),
        ({"groups": [(1, 2, 1), (0, 2, 1)]}, ValueError, r"disjoint, got \(0, 2, 1\) and \(1, 2, 1\)"),
        ({"groups": [(2, 3, 2)]}, ValueError, "groups: sequence 4 does not share its first 2 pages with sequence 2"),
        ({"max_runs": 2}, ValueError, "max_runs must be at least the 3 of groups, got 2"),
        ({"max_prefix_pages": 1}, ValueError, "max_prefix_pages must be at least the 2 of groups, got 1"),
        ({"max_suffix_pages": 0}, ValueError, "max_suffix_pages must be a positive int, got 0"),
        ({"max_suffix_pages": 1}, ValueError, r"seq_lens\[4\] is 40: 40 tokens .* max_suffix_pages = 1 has room for"),
        ({"num_q_heads": 3, "num_kv_heads": 2}, ValueError, "multiple of num_kv_heads, got 3 and 2"),
        ({"max_query_len": 0}, ValueError, "max_query_len must be a positive int, got 0"),
    ],
)
def test_plans_that_are_refused(changes, kind, says):
    step = make_step([(1, 0), (3, 2), (1, 0)], [1], device="cpu")
    step.seq_lens[:] = torch.tensor([7, 17, 18, 19, 40], dtype=torch.int32)
    step.table = torch.nn.functional.pad(step.table, (0, 8), value=0)
    with pytest.raises(kind, match=says):
        step.prefix(**changes)


def test_a_member_without_private_tokens():
    step = make_step([(2, 2)], [2], device="cpu")
    step.seq_lens[1] = 17
    with pytest.raises(ValueError, match=r"seq_lens\[1\] is 17: .* at least the 16 tokens of its shared prefix and 2"):
        step.prefix()


def test_calls_that_are_refused():
    step = make_step([(3, 2), (1, 0)], [1], device="cpu")
    prefix = step.prefix()
    with pytest.raises(ValueError, match=r"window must be None, got 16: .* Call paged_attention"):
        step.attend(prefix, window=16)
    with pytest.raises(TypeError, match="unexpected keyword argument 'plan'"):
        step.attend(prefix, plan=prefix.plan)
    with pytest.raises(TypeError, match=r"prefix must be what make_shared_prefix\(\) gave, got NoneType"):
        step.attend(None)
    with pytest.raises(ValueError, match="softcap must be None or a positive number"):
        step.attend(prefix, softcap=-1.0)
    other = make_step([(5, 2)], [1], device="cpu")
    with pytest.raises(ValueError, match="got one of 4 sequences and pages of 8 tokens for 5 sequences"):
        other.attend(prefix)
    step.seq_lens[2] += 1
    step.table[2, -1] = 0
    with pytest.raises(ValueError, match=r"prefix was made for another step: .* Call prefix.next_step"):
        step.attend(prefix)
    step.attend(prefix.next_step(step.table, step.seq_lens, step.cu))
    step.table[0, 0] = 10**6
    with pytest.raises(ValueError, match=r"page_table\[0, 0\] is 1000000, outside of the pool"):
        step.attend(prefix)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [(8, 2), (14, 2), (4, 4)], ids=str)
@pytest.mark.parametrize("q_lens", [[1], [3], [1, 4, 0, 2], [20]], ids=str)
def test_on_the_gpu_inside_a_graph(poison, dim, heads, q_lens):
    """BF16 through the kernels that the GPU takes, then replayed at other lengths."""
    step = make_step(
        [(2, 0), (33, 130), (1, 2), (4, 20)], q_lens, heads, (dim, dim), torch.bfloat16, page_size=16, device="cuda"
    )
    prefix = step.prefix()
    check(step, *step.attend(prefix))

    def run():
        now = prefix.next_step(step.table, step.seq_lens, step.cu)
        rest = (step.max_query_len, None, None, dim**-0.5, None, None)
        return attend_shared_prefix(step.q, step.k_pages, step.v_pages, step.cu, now, *rest)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    # One token of context less, where there is one: the last keys drop out.
    shorter = step.seq_lens.cpu()
    for first, count, pages in step.groups:
        shorter[first : first + count] -= pages * 16
    step.seq_lens -= (shorter > step.cu.diff().cpu()).int().cuda()
    graph.replay()
    check(step, *result)
