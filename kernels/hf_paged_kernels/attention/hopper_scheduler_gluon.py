"""What a program of the Hopper kernel does next: its scheduler warp finds tiles of work and hands them to the others.

See :mod:`.hopper_gluon`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import primitives_triton, split_plan_triton

key_bounds = gluon.jit(primitives_triton.key_bounds.fn)
find_sequence = gluon.jit(primitives_triton.find_sequence.fn)
split_lengths = gluon.jit(split_plan_triton.split_lengths.fn)
load_item = gluon.jit(split_plan_triton.load_item.fn)


@gluon.jit
def schedule(lengths, work, queue, tile_counter, OPTIONS: gl.constexpr):
    """The scheduler warp: finds out what this program does next and hands it out, a tile ahead of the others.

    A program that is free takes the next tile by ``tile_counter``. ``queue``: two notes of 16 numbers in shared memory
    with their full and empty barriers.

    Decode is launched before the previous kernel has ended (``dependent_launch_triton``). No warp touches global memory
    before the first note, so it is enough that this one waits. With ``can_prefetch_kv`` (``paged_attention_op``) the
    first note goes out before: producers then copy keys and values of earlier steps, and wait before they copy more.
    Consumers write nothing before either, since they wait for the queries; of a split without keys, this warp waits.

    The counter of splits is the plan's, and all layers take it in turn: it is touched after the wait only, and the
    last program leaves zeros to the next launch.
    """
    MODE: gl.constexpr = OPTIONS[0]
    PACK: gl.constexpr = OPTIONS[2]
    CONSUMERS: gl.constexpr = OPTIONS[8]
    HAS_LEFT: gl.constexpr = OPTIONS[9]
    HAS_RIGHT: gl.constexpr = OPTIONS[10]
    BLOCK_Q: gl.constexpr = 64 * CONSUMERS // PACK
    turn = 0
    tile = gl.program_id(0)
    num_tiles = work[0]
    if MODE == "split":
        if work[9] == 0:
            gdc_wait()
        # Asked for with the number of tiles: whether there is such a tile is seen when both have come.
        item = load_item(lengths[3], tile // work[5])
        num_tiles = gl.maximum(gl.load(lengths[4]), 1) * work[5]
    while tile < num_tiles:
        if MODE == "split":
            found = _find_split(tile, item, work, HAS_LEFT, HAS_RIGHT)
            if found[8] <= found[7]:
                gdc_wait()
        else:
            found = _find_block(tile, lengths, work, MODE, BLOCK_Q, HAS_LEFT, HAS_RIGHT)
        _hand_out(found, turn, queue)
        if MODE == "split":
            gdc_wait()
        tile = gl.num_programs(0) + _count_up(tile_counter, "relaxed")
        if MODE == "split":
            item = load_item(lengths[3], gl.minimum(tile, num_tiles - 1) // work[5])
        turn += 1
    if MODE == "split":
        gdc_wait()
        if _count_up(tile_counter + 1, "acq_rel") == gl.num_programs(0) - 1:
            gl.atomic_xchg(tile_counter + 1, 0)
            gl.atomic_xchg(tile_counter, 0)
        gdc_launch_dependents()  # The merge gets ready meanwhile.
    nothing = tile * 0
    _hand_out(
        (nothing - 1, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing),
        turn, queue,
    )  # fmt: skip


@gluon.jit
def _count_up(counter, SEM: gl.constexpr):
    """Add one to a counter; returns what it was.

    A tensor, not a number, whose value the threads would read from shared memory: at a place that Triton had also given
    to a barrier that no warp waited for (H200: with two programs on a multiprocessor some read the barrier's bits).
    """
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    before = gl.atomic_add(counter + lane * 0, lane * 0 + 1, mask=lane == 0, sem=SEM)
    return gl.max(gl.where(lane == 0, before, 0), 0)


@gluon.jit
def _hand_out(found, turn, queue):
    """Write a note of what was found, once everyone has read the one two turns ago, which had its place."""
    notes, full, empty = queue
    layout: gl.constexpr = gl.BlockedLayout([16], [32], [gl.num_warps()], [0])
    index = gl.arange(0, 16, layout=layout)
    numbers = gl.zeros([16], gl.int32, layout)
    for i in gl.static_range(11):
        numbers = gl.where(index == i, found[i], numbers)
    mbarrier.wait(empty.index(turn % 2), (turn // 2 & 1) ^ 1)
    notes.index(turn % 2).store(numbers)
    mbarrier.arrive(full.index(turn % 2))


@gluon.jit
def receive(turn, queue):
    """What ``_find_split`` or ``_find_block`` found for this turn; a negative sequence: nothing is left."""
    notes, full, empty = queue
    layout: gl.constexpr = gl.BlockedLayout([16], [32], [gl.num_warps()], [0])
    index = gl.arange(0, 16, layout=layout)
    mbarrier.wait(full.index(turn % 2), turn // 2 & 1)
    numbers = notes.index(turn % 2).load(layout)
    mbarrier.arrive(empty.index(turn % 2))
    found = ()
    for i in gl.static_range(11):
        # Every thread holds all numbers: this picks a register.
        found += (gl.sum(gl.where(index == i, numbers, 0), 0),)
    return found


@gluon.jit
def split_bounds(
    split, num_keys, query_len, window_left, window_right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr
):  # fmt: skip
    """``(start, stop)``: the keys of one split that at least one of a sequence's queries sees."""
    start, stop = key_bounds(
        num_keys - query_len, num_keys - 1, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )  # fmt: skip
    length = split_lengths(num_keys, query_len)
    start = gl.maximum(start, split * length)
    stop = gl.minimum(stop, (split + 1) * length)
    if query_len == 0:
        stop = start
    return start, stop


@gluon.jit
def _find_split(tile, item, work, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """What tile ``tile`` is, a split for one head; see :func:`_find_block`."""
    _num_tiles, _num_seqs, _seqlen_q, _seqlen_k, _num_blocks, num_heads, _section, window_left, window_right, _ = work
    seq, split, place, num_partials, q_start, query_len, num_keys = item
    none = tile * 0
    start, stop = split_bounds(split, num_keys, query_len, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    return seq, tile % num_heads, none, query_len, q_start, num_keys, none, start, stop, place, num_partials


@gluon.jit
def _find_block(
    tile,
    lengths,
    work,
    MODE: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):
    """What tile ``tile`` is: ``(seq, head, first_token, query_len, q_start, num_keys, k_start, start, stop, place,
    num_partials)``.

    ``start..stop`` are the keys that the tile's rows see; one of ``num_partials`` splits leaves its sums at ``place``.
    Heads are taken in sections whose keys and values fit in the L2 cache; within a section the last blocks, which see
    most keys, come first.
    """
    cu_seqlens_q, cu_seqlens_k, seq_lens, _items, _num_items = lengths
    _num_tiles, num_seqs, seqlen_q, seqlen_k, num_blocks, num_heads, l2_section, window_left, window_right, _ = work
    none = tile * 0
    num_columns = num_heads * num_seqs if MODE == "dense" else num_heads
    start_column = tile // (l2_section * num_blocks) * l2_section
    rest = tile % (l2_section * num_blocks)
    width = gl.minimum(l2_section, num_columns - start_column)
    block = num_blocks - 1 - rest // width
    column = start_column + rest % width
    head = column % num_heads
    if MODE == "dense":
        seq = column // num_heads
        first_token = block * BLOCK_Q
        q_start = none
        k_start = none
        query_len = seqlen_q
        num_keys = seqlen_k
    else:
        seq = find_sequence(cu_seqlens_q, block, num_seqs, BLOCK_Q)
        q_start = gl.load(cu_seqlens_q + seq)
        first_token = (block - q_start // BLOCK_Q - seq) * BLOCK_Q
        query_len = gl.load(cu_seqlens_q + seq + 1) - q_start
        if MODE == "varlen":
            k_start = gl.load(cu_seqlens_k + seq)
            num_keys = gl.load(cu_seqlens_k + seq + 1) - k_start
        else:
            k_start = none
            num_keys = gl.load(seq_lens + seq)
    context_len = num_keys - query_len
    last_token = gl.minimum(first_token + BLOCK_Q, query_len) - 1
    start, stop = key_bounds(
        context_len + first_token, context_len + last_token, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    if first_token >= query_len:
        stop = start
    return seq, head, first_token, query_len, q_start, num_keys, k_start, start, stop, none, none + 1
