"""The sampling kernels (in the interpreter on CPU) against warpers and noise in float64, and against the reference."""

import math

import pytest
import torch
from amount import pairwise
from helpers import DEVICE
from hf_paged_kernels.sampling import reference
from hf_paged_kernels.sampling.choose_triton import sample_tokens_launch
from hf_paged_kernels.sampling.ops import sample_tokens_op
from hf_paged_kernels.sampling.reference import INVALID_TOKEN, gumbel_noise, sample_tokens_reference, tile_size

NEUTRAL = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
KINDS = {
    "greedy": dict(temperature=0.0),
    "temperature": dict(temperature=0.7),
    "hot": dict(temperature=5.0),
    "top_k": dict(top_k=50),
    "one": dict(top_k=1, temperature=1.3),
    "many": dict(top_k=700),
    "all": dict(top_k=10**12, temperature=0.9),
    "top_p": dict(top_p=0.95, temperature=0.8),
    "half": dict(top_p=0.5),
    "narrow": dict(top_p=0.05),
    "none": dict(top_p=0.0),
    "min_p": dict(min_p=0.1, temperature=1.5),
    "equal": dict(min_p=1.0),
    "top_k top_p": dict(top_k=20, top_p=0.8, temperature=0.6),
    "top_p min_p": dict(top_p=0.9, min_p=0.05),
    "everything": dict(top_k=300, top_p=0.95, min_p=0.02, temperature=1.1),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(parameters: list[dict[str, float]]) -> tuple[torch.Tensor, ...]:
    """Parameters of each row in a slot of its own, shuffled; other slots hold what no row may read.

    Returns slots, positions, and the tables in the order of the op's arguments.
    """
    num = len(parameters)
    slots = torch.randperm(num + 3)[:num]
    poison = dict(temperature=math.nan, top_k=-(10**9), top_p=math.nan, min_p=math.nan)
    dtypes = dict(temperature=torch.float64, top_k=torch.int64, top_p=torch.float64, min_p=torch.float64)
    columns = []
    for name, dtype in dtypes.items():
        column = torch.full((num + 3,), poison[name], dtype=dtype)
        column[slots] = torch.tensor([(NEUTRAL | p)[name] for p in parameters], dtype=dtype)
        columns.append(column)
    seeds = torch.randint(-(2**63), 2**63 - 1, (num + 3,))
    positions = torch.randint(0, 2**20, (num,))
    wants_lse = torch.randint(0, 2, (num + 3,))
    rules = torch.zeros(num + 3, reference.MARKS, dtype=torch.int64)
    return tuple(x.to(DEVICE) for x in (slots, positions, *columns, seeds, wants_lse, rules))


def kept_or_border(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float):
    """Which tokens are kept, and which so close to a border that rounding decides: float64, from the definition."""
    scores = (logits.float().cpu() / torch.tensor(temperature)).double()
    kept = torch.ones_like(scores, dtype=torch.bool)
    border = torch.zeros_like(kept)
    if top_k:
        kept = scores >= scores.sort(descending=True).values[min(top_k, len(scores)) - 1]
    if top_p < 1:
        order = scores.masked_fill(~kept, -math.inf).sort(stable=True).indices
        probabilities = (scores.masked_fill(~kept, -math.inf).softmax(0))[order]
        below = probabilities.cumsum(0)
        is_kept = below > 1 - top_p
        is_kept[-1] = True
        kept_by_p = torch.zeros_like(kept).scatter_(0, order, is_kept)
        near = torch.zeros_like(kept).scatter_(0, order, (below - (1 - top_p)).abs() < 1e-5)
        near[order[-1]] = False
        kept, border = kept & (kept_by_p | near), near & kept
    if min_p:
        ratio = (scores - scores.max()).exp()
        near = ((ratio / min_p - 1).abs() < 1e-5) & (ratio < 1)
        kept &= (ratio >= min_p) | near
        border |= near
    return kept, border


def draws(
    scores: torch.Tensor, seed: torch.Tensor, position: torch.Tensor, kept, border, live, turn: int = 0
) -> set[int]:
    """The tokens that may be drawn by tiles, from the definition: one, or several where rounding decides.

    Args:
        scores: ``[vocab]`` float32.
        seed, position: ``[1]`` int64.
        kept, border: of :func:`kept_or_border`.
        live: bool ``[vocab]``: tokens that can be drawn at this turn.
    """
    size = tile_size(len(scores))
    tiles = scores.double().masked_fill(~live, -math.inf).split(size)
    start = -(2**31) + 256 * turn
    ids = torch.arange(start, start + len(tiles), dtype=torch.int32)
    values = torch.stack([tile.logsumexp(0) for tile in tiles]) + gumbel_noise(seed, position, ids)[0]
    allowed = set()
    for tile in (values >= values.max() - 1e-5).nonzero().flatten().tolist():
        ids = torch.arange(tile * size, min(len(scores), (tile + 1) * size))
        noisy = scores[ids] + gumbel_noise(seed, position, ids.int())[0]
        sure = noisy.masked_fill(~live[ids] | border[ids], -math.inf).max()
        first = (noisy == sure) & (sure > -math.inf)
        first &= first.cumsum(0) == 1
        for token in ids[first | (live[ids] & border[ids] & (noisy >= sure))].tolist():
            if kept[token] or border[token]:
                allowed.add(token)
            if not kept[token] or border[token]:
                above = (scores > scores[token]) | ((scores == scores[token]) & (torch.arange(len(scores)) > token))
                if (live & above).any():
                    allowed |= draws(scores, seed, position, kept, border, live & above, turn + 1)
    return allowed


def check(logits: torch.Tensor, parameters: list[dict[str, float]]) -> int:
    """Choose and compare every row; returns how many rows were decided by rounding at a border."""
    slots, positions, *columns, seeds, wants_lse, rules = tables(parameters)
    chosen, lse = sample_tokens_launch(logits, slots, positions, *columns, seeds, wants_lse, rules)
    got, wanted = chosen.tolist(), (wants_lse[slots] > 0).cpu()
    expected_lse = logits.double().cpu().logsumexp(-1)
    is_finite = wanted & expected_lse.isfinite()
    assert lse.cpu()[~wanted].isnan().all()
    assert torch.allclose(lse.double().cpu()[is_finite], expected_lse[is_finite], rtol=2e-6, atol=2e-6)
    vocab = logits.shape[-1]
    ids = torch.arange(vocab, dtype=torch.int32)
    noise = gumbel_noise(seeds[slots].cpu(), positions.cpu(), ids)
    num_close = 0
    for row, given in enumerate(parameters):
        options = NEUTRAL | given
        x = logits[row].float().cpu()
        if options["temperature"] == 0:
            expected = INVALID_TOKEN if x.isnan().any() else int((x == x.max()).nonzero()[0])
            assert got[row] == expected, (row, given)
            continue
        scores = x / torch.tensor(options["temperature"])
        if not scores.max().isfinite():
            assert got[row] == INVALID_TOKEN, (row, given)
            continue
        kept, border = kept_or_border(logits[row], **options)
        if vocab > tile_size(vocab) and not 0 < options["top_k"] < vocab:
            here = seeds[slots[row]].cpu()[None], positions[row].cpu()[None]
            live, near = kept_or_border(logits[row], options["temperature"], 0, 1.0, options["min_p"])
            allowed = draws(scores, *here, kept, border | near, live)
            num_close += len(allowed) > 1
            assert got[row] in allowed, (row, given, got[row], allowed)
            continue
        noisy = (scores + noise[row]).masked_fill(~kept, -math.inf)
        # The best token that is kept for sure, or one at a border that is better still.
        sure = noisy.masked_fill(border, -math.inf).max()
        allowed = {int((noisy.masked_fill(border, -math.inf) == sure).nonzero()[0])}
        close = set((border & (noisy >= sure)).nonzero().flatten().tolist())
        num_close += bool(close)
        assert got[row] in allowed | close, (row, given, got[row], allowed, close)
    return num_close


@pairwise(dtype=DTYPES, vocab=[1, 5, 63, 1000, 4097], spread=[0.5, 8.0])
def test_all_parameters_next_to_each_other(poison, dtype, vocab, spread):
    parameters = [KINDS[name] for name in KINDS]
    logits = (torch.randn(len(parameters), vocab) * spread).to(dtype).to(DEVICE)
    check(logits, parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_vocabulary(poison, dtype):
    parameters = [KINDS[name] for name in ("greedy", "temperature", "top_k", "top_p", "min_p", "everything")]
    logits = (torch.randn(len(parameters), 151_936) * 2).to(dtype).to(DEVICE)
    check(logits, parameters)


def test_vocabularies_beyond_the_number_of_tiles(poison, monkeypatch):
    monkeypatch.setattr(reference, "MAX_TILES", 2)
    parameters = [KINDS[name] for name in KINDS]
    check((torch.randn(len(parameters), 6000) * 3).bfloat16().to(DEVICE), parameters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(poison, dtype):
    """Few distinct values: top-k keeps those that equal the k-th, top-p removes by rising id."""
    parameters = [KINDS[name] for name in KINDS]
    logits = torch.randint(-3, 3, (len(parameters), 300)).to(dtype).to(DEVICE)
    logits[:3] = 0
    logits[5, 7] = -0.0
    check(logits, parameters)
    check(torch.zeros(len(parameters), 5000, dtype=dtype, device=DEVICE), parameters)


def test_scores_that_are_equal_after_the_division():
    """Neighbouring float32 logits become ties by a temperature, which top-k keeps all."""
    start = torch.tensor(1.9).view(torch.int32)
    logits = (start + torch.randperm(200)).int().view(torch.float32)[None].repeat(40, 1).to(DEVICE)
    assert len((logits[0] / 1.1).unique()) < 200
    check(logits, [dict(temperature=1.1, top_k=k, top_p=p) for k, p in zip(range(1, 41), [1.0, 0.3, 0.7, 0.99] * 10)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_tokens(poison, dtype):
    """Most of a row, or all but one token, or all are -inf."""
    parameters = [KINDS[name] for name in KINDS]
    logits = torch.randn(len(parameters), 5000) * 3
    logits[torch.rand(logits.shape) < 0.98] = -math.inf
    logits[: len(KINDS)] = -math.inf
    logits[torch.arange(8), torch.randint(0, 5000, (8,))] = 1.5
    check(logits.to(dtype).to(DEVICE), parameters)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_without_a_distribution(poison, value):
    parameters = [KINDS[name] for name in KINDS]
    logits = torch.randn(len(parameters), 5000)
    logits[:, 4321] = value
    check(logits.to(DEVICE), parameters)


def test_scores_of_any_size(poison):
    parameters = [dict(temperature=t) for t in (1e-6, 1e-3, 1e-38, 1e3, 1e30)] * 4
    logits = torch.randn(len(parameters), 3000) * torch.tensor([1, 100.0, 1e-6, 1e4])[:, None].repeat(5, 1)
    check(logits.to(DEVICE), parameters)


def test_log_sum_exp_of_large_logits(poison):
    """What a token's logit is less it, its log-probability, is right to the last digits of float32 at any size."""
    logits = torch.randn(3, 5000) + torch.tensor([[1e4], [-1e6], [1e8]])
    slots, positions, *columns, seeds, _, rules = tables([{}] * 3)
    _, lse = sample_tokens_launch(logits.to(DEVICE), slots, positions, *columns, seeds, seeds * 0 + 1, rules)
    assert torch.allclose(lse.cpu(), logits.double().logsumexp(-1), rtol=0, atol=1e-5)


def test_most_rows_are_decided_by_their_definition():
    """The border that rounding may move is small: it hardly ever decides."""
    parameters = [KINDS["top_p"], KINDS["half"], KINDS["min_p"]] * 15
    assert check((torch.randn(45, 2000) * 3).to(DEVICE), parameters) <= 2


def test_a_row_depends_on_itself_only():
    """Not on its place, its slot, the batch, or the strides of the logits."""
    parameters = [KINDS[name] for name in KINDS]
    slots, positions, *rest = tables(parameters)
    logits = torch.randn(len(parameters), 4500, device=DEVICE) * 2
    whole, lse = sample_tokens_launch(logits, slots, positions, *rest)
    padded = torch.full((len(parameters), 4567), math.nan, device=DEVICE)
    padded[:, :4500] = logits
    order = torch.randperm(len(parameters), device=DEVICE)
    for some in (order[:1], order[:7]):
        got = sample_tokens_launch(padded[some][:, :4500], slots[some], positions[some], *rest)
        assert torch.equal(got[0], whole[some])
        assert torch.equal(got[1].nan_to_num(0), lse[some].nan_to_num(0))
    assert torch.equal(sample_tokens_launch(logits, slots, positions, *rest)[0], whole)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(top_k=5), dict(top_p=0.8), dict(min_p=0.1, temperature=0.7), dict(top_k=9, top_p=0.9)],
    ids=str,
)
def test_tokens_have_the_distribution_of_the_kept_scores(options):
    logits = (torch.randn(12, generator=torch.Generator().manual_seed(3)) * 2).bfloat16()
    num = 3000 if DEVICE == "cuda" else 150
    options = NEUTRAL | options
    slots = torch.zeros(num, dtype=torch.int64, device=DEVICE)
    columns = [
        torch.tensor([options[name]], dtype=dtype, device=DEVICE)
        for name, dtype in (
            ("temperature", torch.float64), ("top_k", torch.int64), ("top_p", torch.float64), ("min_p", torch.float64)
        )
    ]  # fmt: skip
    seeds = torch.tensor([17], device=DEVICE)
    rows, positions = logits.expand(num, -1).to(DEVICE), torch.arange(num, device=DEVICE)
    drawn, _ = sample_tokens_launch(
        rows,
        slots,
        positions,
        *columns,
        seeds,
        torch.zeros_like(seeds),
        torch.zeros(1, reference.MARKS, dtype=torch.int64).to(DEVICE),
    )
    kept, border = kept_or_border(logits, **options)
    assert not border.any()
    expected = (logits.float() / options["temperature"]).masked_fill(~kept, -math.inf).softmax(0)
    counts = torch.bincount(drawn.cpu(), minlength=12)
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - num * expected[kept]) ** 2 / (num * expected[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


def changed(logits: torch.Tensor, position: int, biases, penalty, seen, banned) -> torch.Tensor:
    """The logits of one row ``[vocab]`` as rules change them, token by token."""
    x = logits.float().cpu().clone()
    for token, bias, first, end in biases:
        if first <= position < end:
            x[token] += torch.tensor(bias)
    for token in set(seen):
        if penalty is not None and token < len(x):
            x[token] = x[token] * torch.tensor(penalty) if x[token] < 0 else x[token] / torch.tensor(penalty)
    for token in banned:
        x[token] = -math.inf
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [67, 4500])
def test_rules_of_slots(poison, dtype, vocab):
    """Every second row has rules: it chooses what a row without any does whose logits were changed, and marks it."""
    parameters = [KINDS[name] for name in KINDS] * 2
    num = len(parameters)
    slots, positions, *columns, wants_lse, _ = tables(parameters)
    logits = (torch.randn(num, vocab) * 3).to(dtype)
    rules = torch.full((num + 3, reference.MARKS + -(-vocab // 32)), -1, dtype=torch.int64)
    expected, picks = logits.float().clone(), torch.Generator().manual_seed(5)

    def some(count: int) -> list[int]:
        # With tokens that are likely to be chosen.
        likely = logits[row].float().topk(8).indices
        return [*torch.randint(0, vocab, (count,), generator=picks).tolist(), *likely[torch.randperm(8)[:4]].tolist()]

    for row in range(num):
        position, given = int(positions[row]), {}
        if row % 2:
            ends = [(0, 2**62), (position, position + 1), (0, position), (position + 1, 2**62)]
            biases = [(token, 2.5 * i - 20, *ends[i % 4]) for i, token in enumerate(sorted(set(some(10))))]
            biases[0] = (biases[0][0], -math.inf, 0, 2**62)
            given = [
                dict(penalty=1.7, seen=[*some(40), vocab + 99]), dict(banned=some(30)), dict(biases=biases),
                dict(penalty=0.6, seen=some(9), banned=some(20), biases=biases),
            ][row // 2 % 4]  # fmt: skip
            full = dict(biases=(), penalty=None, seen=(), banned=()) | given
            expected[row] = changed(logits[row], position, **full)
        words = torch.from_numpy(reference.slot_rules(vocab, **given))
        if given:
            rules[slots[row]] = words
        else:
            rules[slots[row], 0] = words[0]
    rules, before = rules.to(DEVICE), rules.clone()
    none = torch.zeros(num + 3, reference.MARKS, dtype=torch.int64, device=DEVICE)
    want, _ = sample_tokens_reference(expected.to(DEVICE), slots, positions, *columns, wants_lse, none)
    for choose in (sample_tokens_reference, sample_tokens_launch):
        table = rules.clone()
        got, lse = choose(logits.to(DEVICE), slots, positions, *columns, wants_lse, table)
        assert torch.equal(got, want)
        wanted = (wants_lse[slots] > 0).cpu()
        raw = logits.double().logsumexp(-1)
        assert torch.allclose(lse.double().cpu()[wanted], raw[wanted], rtol=2e-6, atol=2e-6)
        marked = before.clone()
        for row in range(num):
            token, words = int(got[row]), marked[slots[row].cpu()]
            if words[0] & reference.WITH_MARKS and token >= 0:
                words[reference.MARKS + token // 32] |= 1 << token % 32 * 2
        assert torch.equal(table.cpu(), marked)


@pytest.mark.parametrize("temperature", [0.6, 1.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rules_with_few_tokens_and_a_temperature(dtype, temperature):
    """Narrow logits are ranked by themselves, but not those that rules have changed."""
    num, vocab = 12, 67
    parameters = [dict(top_k=1 + row % 5, temperature=temperature) for row in range(num)]
    slots, positions, *columns, wants_lse, _ = tables(parameters)
    words = torch.from_numpy(reference.slot_rules(vocab, biases=[(3, 0.5, 0, 2**62)]))
    rules = torch.zeros(num + 3, len(words), dtype=torch.int64) + words
    arguments = ((torch.randn(num, vocab) * 3).to(dtype).to(DEVICE), slots, positions, *columns, wants_lse)
    want, _ = sample_tokens_reference(*arguments, rules.to(DEVICE, copy=True))
    got, _ = sample_tokens_launch(*arguments, rules.to(DEVICE, copy=True))
    assert int(want.min()) >= 0
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("dtype", "vocab"), [(dtype, 67) for dtype in DTYPES] + [(torch.float32, 2500)], ids=lambda value: str(value)
)
def test_counts_and_masks_of_slots(poison, dtype, vocab):
    """Rows with counts, with masks, with both and with a spent mask choose what a row without any does whose logits
    were changed; counts grow, and masks are spent."""
    parameters = [KINDS[name] for name in KINDS] * 5
    num = len(parameters)
    slots, positions, *columns, wants_lse, _ = tables(parameters)
    logits = (torch.randn(num, vocab) * 3).to(dtype)
    mask_at, counts_at, width = reference.rules_places(vocab)
    rules = torch.full((num + 3, width), -1, dtype=torch.int64)
    expected, picks = logits.float().clone(), torch.Generator().manual_seed(5)
    counts, kinds = torch.zeros(num, vocab, dtype=torch.int64), []
    for row in range(num):
        kind, slot, likely = row // len(KINDS), int(slots[row]), logits[row].float().topk(8).indices
        given = dict(presence=0.75 * (row % 3), frequency=0.25 - 0.5 * (row % 2)) if kind in (1, 3, 4) else {}
        given |= dict(has_mask=True) if kind >= 2 else {}
        given |= dict(penalty=1.5, seen=likely[:3].tolist()) if kind == 3 else {}
        words = torch.from_numpy(reference.slot_rules(vocab, **given))
        rules[slot, : len(words)] = words
        x = changed(logits[row], 0, (), given.get("penalty"), given.get("seen", ()), ())
        if kind in (1, 3, 4):
            counts[row, torch.randint(0, vocab, (20,), generator=picks)] = 3
            counts[row, likely[torch.randperm(8, generator=picks)[:5]]] = torch.tensor([1, 2, 7, 200, 32767])
            rules[slot].view(torch.int16)[4 * counts_at :][:vocab] = counts[row].short()
            hit = counts[row] > 0
            x = torch.where(hit, x - given["frequency"] * counts[row].float() - given["presence"], x)
        if kind in (2, 3):
            allowed = torch.rand(vocab, generator=picks) < 0.5
            allowed[0] = True
            bits = torch.zeros(-(-vocab // 32), dtype=torch.int64)
            for token in allowed.nonzero().flatten().tolist():
                bits[token // 32] |= 1 << token % 32
            signed = torch.where(bits >= 2**31, bits - 2**32, bits).int()
            rules[slot].view(torch.int32)[2 * mask_at :][: len(signed)] = signed
            rules[slot, 0] ^= reference.WITH_MASK | reference.MASK_IS_SPENT
            x = x.masked_fill(~allowed, -math.inf)
        expected[row] = x
        kinds.append(kind)
    none = torch.zeros(num + 3, reference.MARKS, dtype=torch.int64, device=DEVICE)
    want, _ = sample_tokens_reference(expected.to(DEVICE), slots, positions, *columns, wants_lse, none)
    assert int((want >= 0).sum()) > num // 2
    for choose in (sample_tokens_reference, sample_tokens_launch):
        table = rules.to(DEVICE, copy=True)
        got, _ = choose(logits.to(DEVICE), slots, positions, *columns, wants_lse, table)
        assert torch.equal(got, want)
        for row, kind in enumerate(kinds):
            words, after = rules[slots[row].cpu()], table[slots[row].cpu()].cpu()
            mine, token = counts[row].clone(), int(got[row])
            if kind in (1, 3) and token >= 0:
                mine[token] = min(int(mine[token]) + 1, reference.MOST_COUNTED)
            if kind in (1, 3, 4):
                assert torch.equal(after.view(torch.int16)[4 * counts_at :][:vocab].long(), mine)
            spent = reference.WITH_MASK | reference.MASK_IS_SPENT if kind in (2, 3) else 0
            assert int(after[0]) == int(words[0]) ^ spent


def test_a_nan_under_a_mask():
    """Among the tokens that may be chosen it ends the row, as without a mask; others are not looked at."""
    vocab, num = 67, 2
    slots, positions, *columns, wants_lse, _ = tables([KINDS["greedy"]] * num)
    mask_at, _, width = reference.rules_places(vocab)
    rules = torch.zeros(num + 3, width, dtype=torch.int64)
    logits = torch.randn(num, vocab)
    logits[:, 40] = torch.nan
    for row in range(num):
        slot, words = int(slots[row]), torch.from_numpy(reference.slot_rules(vocab, has_mask=True))
        rules[slot, : len(words)] = words
        rules[slot, 0] = reference.WITH_MASK
        rules[slot].view(torch.int32)[2 * mask_at + 1] = [1 << 8 | 1 << 9, 1 << 9][row]
    for choose in (sample_tokens_reference, sample_tokens_launch):
        got, _ = choose(logits.to(DEVICE), slots, positions, *columns, wants_lse, rules.to(DEVICE, copy=True))
        assert got.tolist() == [reference.INVALID_TOKEN, 41]


@pytest.mark.parametrize("vocab", [5, 1000, 5000])
def test_the_reference_chooses_the_same(vocab):
    """The path of CPU tensors. Rows that rounding decides are few enough to have none here."""
    parameters = [KINDS[name] for name in KINDS]
    slots, positions, *rest = tables(parameters)
    logits = torch.randn(len(parameters), vocab, device=DEVICE) * 3
    expected, expected_lse = sample_tokens_reference(logits, slots, positions, *rest)
    for function in (sample_tokens_launch, sample_tokens_op):
        tokens, lse = function(logits, slots, positions, *rest, None)
        assert torch.equal(tokens, expected)
        assert torch.allclose(lse, expected_lse, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("choose", [sample_tokens_launch, sample_tokens_reference])
def test_tokens_are_noted_by_slot(choose):
    parameters = [KINDS[name] for name in KINDS] * 2
    slots, positions, *rest = tables(parameters)
    logits = torch.randn(len(parameters), 4500, device=DEVICE) * 2
    logits[3, 7] = math.nan
    expected, _ = choose(logits, slots, positions, *rest)
    noted = torch.full((len(parameters) + 3,), 77, device=DEVICE)
    by_slot = torch.full_like(noted, -(10**9)).index_put((slots,), positions)
    got, _ = choose(logits, slots, by_slot, *rest, noted)
    assert torch.equal(got, expected)
    assert int(got[3]) == INVALID_TOKEN
    assert torch.equal(noted, torch.full_like(noted, 77).index_put((slots,), expected.clamp(min=0)))


def test_no_rows():
    slots, positions, *rest = tables([KINDS["top_p"]])
    tokens, lse = sample_tokens_launch(torch.empty(0, 9, device=DEVICE), slots[:0], positions[:0], *rest)
    assert tokens.shape == lse.shape == (0,)


def test_the_op_has_a_fake_implementation():
    slots, positions, *rest = tables([KINDS[name] for name in KINDS])
    logits = torch.randn(len(KINDS), 100, device=DEVICE)
    torch.library.opcheck(sample_tokens_op.op, (logits, slots, positions, *rest, None), test_utils="test_faketensor")
