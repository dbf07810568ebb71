"""Prefix cache: its rules one by one, and random use of several groups against a dictionary of token prefixes."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_paged.paging import PageAllocator, PrefixCache, PrefixMatch, prefix_cache

pytestmark = pytest.mark.quick

PAGE = 4


def tokens_of(text):
    """One page per letter: ``"ab"`` is two pages of four equal tokens."""
    return [ord(letter) for letter in text for _ in range(PAGE)]


def make(*windows, num_pages=32):
    allocators = [PageAllocator(num_pages) for _ in windows]
    return PrefixCache(PAGE, allocators, windows), allocators


def keep(cache, text, salt=None, given_back=()):
    """Insert pages that only the cache goes on to own; ``given_back``: (group, index) of pages that are None."""
    pages = [
        [None if (group, i) in given_back else allocator.allocate(1)[0] for i in range(len(text))]
        for group, allocator in enumerate(cache.allocators)
    ]
    num_new = cache.insert(tokens_of(text), pages, salt)
    give_back(cache, pages)
    return pages, num_new


def give_back(cache, pages):
    for allocator, of_group in zip(cache.allocators, pages):
        allocator.free(page for page in of_group if page is not None)


def found(cache, text, salt=None):
    """How many pages a match finds, given back at once (it still counts as a use)."""
    match = cache.match(tokens_of(text), salt)
    give_back(cache, match.pages)
    return match.num_tokens // PAGE


def cached(cache, *texts):
    """Those of ``texts`` that are cached to the end, looked up without using them."""
    return [text for text in texts if len(cache._find_chain(tokens_of(text), len(text), None)) == len(text)]


def check(cache, *owners):
    """Every page of every group is owned by the cache or by one of ``owners`` (pages per group)."""
    cache.check()
    for group, allocator in enumerate(cache.allocators):
        held = [page for pages in owners for page in pages[group] if page is not None]
        allocator.check([*cache.held(group), *held])


# Finding


def test_finds_the_longest_prefix_of_full_pages():
    cache, (allocator,) = make(None)
    (pages,), num_new = keep(cache, "abc")
    assert num_new == 3
    assert cache.match([], None) == PrefixMatch(0, ([],))
    for tokens, expected in [
        (tokens_of("abc"), 3),
        (tokens_of("abcd"), 3),
        (tokens_of("abd"), 2),
        (tokens_of("abc")[:-1], 2),
        (tokens_of("abc")[:3], 0),
        (tokens_of("bc"), 0),
        (tokens_of("aac"), 1),
    ]:
        match = cache.match(tokens)
        assert match == PrefixMatch(expected * PAGE, (pages[:expected],))
        check(cache, match.pages)
        give_back(cache, match.pages)
    assert allocator.num_used == 3


@pytest.mark.parametrize(("max_tokens", "expected"), [(0, 0), (3, 0), (4, 1), (7, 1), (11, 2), (12, 3), (99, 3)])
def test_never_matches_more_than_max_tokens(max_tokens, expected):
    cache, _ = make(None)
    keep(cache, "abc")
    assert cache.match(tokens_of("abc"), max_tokens=max_tokens).num_tokens == expected * PAGE


def test_the_caller_and_the_cache_own_their_pages_separately():
    cache, (allocator,) = make(None)
    keep(cache, "ab")
    first, second = cache.match(tokens_of("ab")), cache.match(tokens_of("ab"))
    check(cache, first.pages, second.pages)
    cache.clear()
    check(cache, first.pages, second.pages)
    assert cache.num_pages == (0,)
    assert cache.num_tokens == 0
    assert found(cache, "ab") == 0
    give_back(cache, first.pages)
    give_back(cache, second.pages)
    assert allocator.num_free == 32


def test_a_partial_page_is_not_kept():
    cache, (allocator,) = make(None)
    pages = [allocator.allocate(2)]
    assert cache.insert(tokens_of("ab")[:-1], pages) == 1
    assert list(cache.held(0)) == pages[0][:1]
    check(cache, pages)


@pytest.mark.parametrize("same_hash", [False, True])
def test_salts_keep_tenants_apart(monkeypatch, same_hash):
    if same_hash:
        monkeypatch.setattr(prefix_cache, "_hash", lambda parent, tokens: 0)
    cache, _ = make(None)
    (red,), _ = keep(cache, "ab", salt="red")
    (blue,), _ = keep(cache, "ab", salt=("blue", 1))
    assert cache.match(tokens_of("ab"), "red").pages == (red,)
    assert cache.match(tokens_of("ab"), ("blue", 1)).pages == (blue,)
    assert found(cache, "ab") == 0
    assert found(cache, "ab", "green") == 0
    # The key of a page as a salt: the second page of "ab" must not be taken for the first page of "b".
    assert found(cache, "b", prefix_cache._hash("red", tuple(tokens_of("a")))) == 0


def test_equal_hashes_never_give_wrong_pages(monkeypatch):
    monkeypatch.setattr(prefix_cache, "_hash", lambda parent, tokens: 7)
    cache, _ = make(None, 3)
    texts = ["aa", "ab", "ba", "bb", "aab", "baa"]
    kept = {text: keep(cache, text)[0] for text in texts}
    owned = {}
    for text in texts:
        for i in range(len(text)):
            owned.setdefault(text[: i + 1], kept[text][0][i])
    for text in [*texts, "abab", "b", "bab", "c"]:
        (pages, _) = cache.match(tokens_of(text)).pages
        assert pages == [owned[text[: i + 1]] for i in range(len(text)) if text[: i + 1] in owned]


def test_tokens_that_python_hashes_alike_are_told_apart():
    assert hash(-1) == hash(-2)
    cache, (allocator,) = make(None)
    pages = [allocator.allocate(1)]
    cache.insert([-1] * PAGE, pages)
    assert cache.match([-2] * PAGE).num_tokens == 0
    assert cache.match([-1] * PAGE).pages == (pages[0],)


# Groups and windows


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6, 8, 9, 10, 13, 100])
@pytest.mark.parametrize("num_pages", [1, 2, 3, 4])
def test_a_window_needs_the_pages_that_its_next_query_sees(window, num_pages):
    end = num_pages * PAGE
    seen = {position // PAGE for position in range(max(0, end - window + 1), end)}
    text = "abcd"[:num_pages]
    for missing in range(num_pages):
        cache, _ = make(None, window)
        (_, kept), _ = keep(cache, text, given_back={(1, missing)})
        match = cache.match(tokens_of(text))
        assert (match.num_tokens == end) == (missing not in seen)
        if missing not in seen:
            assert match.pages[1] == [page if i in seen else None for i, page in enumerate(kept)]
            assert None not in match.pages[0]
        check(cache, match.pages)


def test_falls_back_to_the_longest_length_that_every_group_can_use():
    cache, _ = make(None, 3, 6)
    # "abcd" needs d of group 1, which is gone; "abc" needs b and c of group 2, and b is gone; "ab" has all.
    keep(cache, "abcd", given_back={(1, 3)})
    assert found(cache, "abcd") == 3
    cache.clear()
    keep(cache, "abcd", given_back={(1, 3), (2, 1)})
    assert found(cache, "abcd") == 1
    cache.clear()
    keep(cache, "abcd", given_back={(0, 0)})
    assert found(cache, "abcd") == 0


def test_the_first_page_wins_and_gaps_are_filled():
    cache, _ = make(None, 6)
    (full, sliding), num_new = keep(cache, "abc", given_back={(1, 0), (1, 1)})
    assert num_new == 4
    assert found(cache, "abc") == 0
    (_, newcomer), num_new = keep(cache, "abcd", given_back={(1, 0)})
    # The page of d in both groups, and the page of b that group 1 had given back.
    assert num_new == 3
    match = cache.match(tokens_of("abc"))
    assert match.pages == (full, [None, newcomer[1], sliding[2]])
    give_back(cache, match.pages)
    assert cache.num_pages == (4, 3)
    assert keep(cache, "abcd")[1] == 1
    assert keep(cache, "abcd")[1] == 0
    check(cache)


def test_a_tail_without_pages_is_not_kept():
    cache, _ = make(None, 3)
    _, num_new = keep(cache, "abc", given_back={(0, 0), (1, 0), (0, 2), (1, 2)})
    assert num_new == 2
    assert cached(cache, "a", "ab", "abc") == ["a", "ab"]
    assert cache.evict(0, 1) == 1
    # "a" held nothing and led nowhere any more.
    assert cache.num_tokens == 0
    check(cache)


# Eviction


def test_evicts_the_least_recently_used_from_its_tail():
    cache, (allocator,) = make(None)
    keep(cache, "abc")
    keep(cache, "xyz")
    found(cache, "abc")
    # What is left, and what that begins with.
    for left in (
        ["abc", "xy", "x", "ab", "a"],
        ["abc", "x", "ab", "a"],
        ["abc", "ab", "a"],
        ["ab", "a"],
        ["a"],
        [],
    ):
        assert cache.evict(0, 1) == 1
        assert cached(cache, "abc", "xyz", "xy", "x", "ab", "a") == left
        assert allocator.num_used == len(left)
        check(cache)
    assert cache.evict(0, 1) == 0


def test_a_page_that_others_continue_stays():
    cache, _ = make(None)
    keep(cache, "abc")
    keep(cache, "abx")
    found(cache, "abc")
    assert cache.evict(0, 1) == 1
    assert cached(cache, "abc", "abx") == ["abc"]
    keep(cache, "aby")
    found(cache, "a")
    assert cache.evict(0, 2) == 2
    assert cached(cache, "abc", "aby", "ab", "a") == ["ab", "a"]


def test_using_the_beginning_does_not_save_the_tail():
    cache, _ = make(None)
    keep(cache, "abc")
    keep(cache, "xyz")
    found(cache, "a")
    assert cache.evict(0, 3) == 3
    assert cached(cache, "a", "ab", "x", "xy", "xyz") == ["a", "x", "xy"]


def test_pages_in_use_are_passed_over_and_count_as_used():
    cache, (allocator,) = make(None)
    keep(cache, "abc")
    keep(cache, "xyz")
    running = cache.match(tokens_of("ab"))
    found(cache, "xyz")
    assert cache.evict(0, 2) == 2
    assert cached(cache, "abc", "ab", "xyz", "xy") == ["ab", "xy"]
    assert cache.evict(0, 9) == 2
    assert cached(cache, "ab", "x") == ["ab"]
    check(cache, running.pages)
    give_back(cache, running.pages)
    assert cache.evict(0, 9) == 2
    assert allocator.num_free == 32
    check(cache)


def test_pages_in_use_are_given_up_only_to_reach_pages_before_them():
    cache, (full, sliding) = make(None, 3)
    keep(cache, "abc")
    keep(cache, "xy")
    # The window of the running sequence has moved past a and b: in group 1 only the cache owns those.
    running = cache.match(tokens_of("abc"))
    assert running.pages[1][:2] == [None, None]
    others = cache.match(tokens_of("x"))
    assert cache.evict(1, 1) == 1
    assert cached(cache, "abc", "x", "xy") == ["abc", "x"]
    assert cache.evict(1, 1) == 1
    assert cached(cache, "a", "ab", "abc", "x") == ["a", "x"]
    assert cache.evict(1, 5) == 1
    assert cached(cache, "a", "x") == ["x"]
    assert cache.evict(1, 5) == 0
    assert cached(cache, "x") == ["x"]
    check(cache, running.pages, others.pages)
    assert (full.num_used, sliding.num_used) == (4, 2)


def test_gives_up_a_chain_with_a_gap_in_the_middle():
    cache, (allocator,) = make(3)
    keep(cache, "abcd", given_back={(0, 1), (0, 2)})
    running = cache.match(tokens_of("abcd"))
    assert cache.evict(0, 1) == 1
    assert (cache.num_tokens, allocator.num_used) == (0, 1)
    check(cache, running.pages)


def test_frees_pages_of_the_group_asked_for():
    cache, (full, sliding) = make(None, 3)
    keep(cache, "abcd", given_back={(1, 0), (1, 1)})
    keep(cache, "xyz", given_back={(1, 0), (1, 1)})
    assert (full.num_used, sliding.num_used) == (7, 3)
    assert cache.evict(1, 2) == 2
    assert (full.num_used, sliding.num_used) == (5, 1)
    # The end of "ab" can match nothing in group 1, so it goes before a page that is older in use but still of use.
    assert cache.evict(1, 1) == 1
    assert cached(cache, "a", "xy") == ["xy"]
    assert cache.evict(1, 1) == 0
    assert cache.evict(0, 2) == 2
    assert cache.num_pages == (0, 0)
    check(cache)


def test_evicting_nothing_changes_nothing():
    cache, _ = make(None, 3)
    keep(cache, "ab")
    assert cache.evict(0, 0) == 0
    cache.match(tokens_of("ab"))
    assert cache.evict(0, 1) == 0
    assert cache.num_pages == (2, 2)
    assert cache.stats.evictions == 0


# Counts and errors


def test_stats():
    cache, _ = make(None, 3)
    keep(cache, "abc")
    found(cache, "abd")
    found(cache, "x")
    cache.evict(0, 1)
    cache.match(tokens_of("ab"), max_tokens=5)
    assert cache.stats == prefix_cache.PrefixCacheStats(
        queries=3, hits=2, tokens_asked=24, tokens_found=12, pages_cached=6, evictions=2
    )
    assert cache.num_pages == (2, 2)
    assert cache.num_tokens == 8
    cache.clear()
    assert cache.stats.evictions == 2


def test_refuses_nonsense():
    for arguments, message in [
        ((0, [PageAllocator(1)], [None]), "page_size must be at least 1 token, got 0"),
        ((4, [], []), "one entry per group of layers, got 0 and 0"),
        ((4, [PageAllocator(1)], [None, 3]), "one entry per group of layers, got 1 and 2"),
        ((4, [PageAllocator(1)], [0]), r"windows\[0\] must be None or at least 1 token, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            PrefixCache(*arguments)
    cache, _ = make(None)
    with pytest.raises(ValueError, match="max_tokens must be None or at least 0, got -1"):
        cache.match([], max_tokens=-1)
    with pytest.raises(ValueError, match="group must be 0 to 0, got 1"):
        cache.evict(1, 1)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        cache.evict(0, -1)


def test_an_insert_that_fails_changes_nothing():
    cache, (full, sliding) = make(None, 6)
    (kept, _), _ = keep(cache, "ab")
    mine = [full.allocate(3), sliding.allocate(3)]
    free = full.allocate(1)[0]
    full.free([free])
    for pages, message in [
        ([mine[0]], "one entry for each of 2 groups, got 1"),
        ([mine[0], mine[1][:2]], r"pages\[1\] must have the 3 full pages of 12 tokens, got 2"),
        ([[mine[0][0], mine[0][1], free], mine[1]], f"page {free} is free"),
        ([mine[0], [*mine[1][:2], -1]], r"pages\[1\]\[2\] must be 0 to 31, got -1"),
        ([[*mine[0][:2], kept[0]], mine[1]], "cached for other tokens already"),
        ([mine[0], [mine[1][0]] * 3], "cached for other tokens already"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.insert(tokens_of("xyz"), pages)
        assert cache.num_pages == (2, 2)
        assert cached(cache, "x") == []
        check(cache, mine)


# Random use


class NaiveCache:
    """The rules of the prefix cache on a dictionary of token prefixes, with nothing made fast.

    ``entries`` maps (salt, prefix) to the page ids of the prefix's last page, least recently used first.
    """

    def __init__(self, page_size, windows, owners):
        self.page_size, self.windows, self.owners = page_size, windows, owners
        self.entries = {}

    def key(self, salt, tokens, num_pages):
        return salt, tuple(tokens[: num_pages * self.page_size])

    def parent(self, key):
        return key[0], key[1][: -self.page_size]

    def continued(self, key):
        return any(self.parent(other) == key for other in self.entries)

    def frees(self, key, group):
        page = self.entries[key][group]
        return page is not None and self.owners[group][page] == 1

    def touch(self, keys):
        touched = {key for key in self.entries for other in keys if other[0] == key[0] and self.begins(key, other)}
        for key in sorted(touched, key=lambda key: (-len(key[1]), self.rank(key, keys))):
            self.entries[key] = self.entries.pop(key)

    def rank(self, key, keys):
        """Among equally deep pages: by the first of ``keys`` that brought them."""
        return min(i for i, other in enumerate(keys) if other[0] == key[0] and self.begins(key, other))

    def begins(self, key, other):
        return other[1][: len(key[1])] == key[1]

    def needed(self, group, num_pages):
        end = num_pages * self.page_size
        first = 0 if self.windows[group] is None else max(0, end - self.windows[group] + 1)
        return {position // self.page_size for position in range(first, end)}

    def match(self, tokens, salt, max_tokens):
        limit = min(len(tokens), len(tokens) if max_tokens is None else max_tokens) // self.page_size
        for n in range(limit, 0, -1):
            chain = [self.entries.get(self.key(salt, tokens, i + 1)) for i in range(n)]
            groups = range(len(self.windows))
            if None not in chain and all(chain[i][g] is not None for g in groups for i in self.needed(g, n)):
                self.touch([self.key(salt, tokens, n)])
                return [[chain[i][g] if i in self.needed(g, n) else None for i in range(n)] for g in groups]
        return [[] for _ in self.windows]

    def insert(self, tokens, pages, salt):
        n = len(tokens) // self.page_size
        while n and all(of_group[n - 1] is None for of_group in pages):
            n -= 1
        num_new = 0
        for i in range(n):
            entry = self.entries.setdefault(self.key(salt, tokens, i + 1), [None] * len(pages))
            for group, of_group in enumerate(pages):
                if entry[group] is None and of_group[i] is not None:
                    entry[group] = of_group[i]
                    self.owners[group][of_group[i]] += 1
                    num_new += 1
        if n:
            self.touch([self.key(salt, tokens, n)])
        return num_new

    def drop(self, key):
        for group, page in enumerate(self.entries.pop(key)):
            if page is not None:
                self.owners[group][page] -= 1
        parent = self.parent(key)
        if (
            parent in self.entries
            and not self.continued(parent)
            and not any(p is not None for p in self.entries[parent])
        ):
            self.drop(parent)

    def evict(self, group, count):
        freed, passed_over = 0, []
        for key in list(self.entries):
            if freed == count or all(entry[group] is None for entry in self.entries.values()):
                break
            if key not in self.entries:
                continue
            if not self.continued(key) and (self.frees(key, group) or self.entries[key][group] is None):
                freed += self.frees(key, group)
                self.drop(key)
            else:
                passed_over.append(key)
        self.touch(passed_over)
        for key in passed_over:
            if freed < count and key in self.entries and self.frees(key, group):
                for other in sorted(self.entries, key=lambda other: -len(other[1])):
                    if other in self.entries and other[0] == key[0] and self.begins(key, other):
                        self.drop(other)
                freed += 1
        return freed


class PrefixMachine(RuleBasedStateMachine):
    """Sequences start from what the cache finds, grow, are inserted, lose pages to their window, and end."""

    @initialize(
        page_size=st.integers(1, 3),
        windows=st.lists(st.sampled_from([None, None, 1, 2, 3, 4, 7]), min_size=1, max_size=3),
        sizes=st.lists(st.integers(3, 14), min_size=3, max_size=3),
        same_hash=st.booleans(),
    )
    def start(self, page_size, windows, sizes, same_hash):
        self.patch = pytest.MonkeyPatch()
        if same_hash:
            self.patch.setattr(prefix_cache, "_hash", lambda parent, tokens: 3)
        self.page_size = page_size
        self.allocators = [PageAllocator(size) for _, size in zip(windows, sizes)]
        self.cache = PrefixCache(page_size, self.allocators, windows)
        self.owners = [[0] * allocator.num_pages for allocator in self.allocators]
        self.model = NaiveCache(page_size, windows, self.owners)
        # What was last written into a page: the salt and all tokens up to the page's end.
        self.memory = [{} for _ in windows]
        self.running = []

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()

    tokens = st.lists(st.integers(0, 1), max_size=10)
    salts = st.sampled_from([None, None, None, "tenant"])

    def own(self, pages, by):
        for group, of_group in enumerate(pages):
            for page in of_group:
                if page is not None:
                    self.owners[group][page] += by

    def match(self, tokens, salt, max_tokens):
        found = self.cache.match(tokens, salt, max_tokens)
        assert list(found.pages) == self.model.match(tokens, salt, max_tokens)
        assert all(len(pages) * self.page_size == found.num_tokens for pages in found.pages)
        self.own(found.pages, +1)
        for group, pages in enumerate(found.pages):
            for i, page in enumerate(pages):
                if page is not None:
                    assert self.memory[group][page] == (salt, tokens[: (i + 1) * self.page_size]), "a wrong page"
        return [list(pages) for pages in found.pages]

    def evict(self, group, count):
        free = self.allocators[group].num_free
        freed = self.cache.evict(group, count)
        assert freed == self.model.evict(group, count)
        assert freed == self.allocators[group].num_free - free
        assert freed <= count
        if freed < count:
            assert all(self.owners[group][page] > 1 for page in self.cache.held(group)), "a page could have been freed"

    def end(self, pages):
        self.own(pages, -1)
        for allocator, of_group in zip(self.allocators, pages):
            allocator.free(page for page in of_group if page is not None)

    @rule(tokens=tokens, salt=salts, max_tokens=st.none() | st.integers(0, 10))
    def run(self, tokens, salt, max_tokens):
        pages = self.match(tokens, salt, max_tokens)
        missing = -(-len(tokens) // self.page_size) - len(pages[0])
        for group, allocator in enumerate(self.allocators):
            self.evict(group, max(0, missing - allocator.num_free))
        if any(allocator.num_free < missing for allocator in self.allocators):
            self.end(pages)
            return
        for group, allocator in enumerate(self.allocators):
            new = allocator.allocate(missing)
            self.own([new if g == group else [] for g in range(len(pages))], +1)
            for i, page in enumerate(new, start=len(pages[group])):
                self.memory[group][page] = (salt, tokens[: (i + 1) * self.page_size])
            pages[group] += new
        self.running.append((tokens, salt, pages))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def give_pages_back(self, data):
        _, _, pages = data.draw(st.sampled_from(self.running))
        group = data.draw(st.integers(0, len(pages) - 1))
        count = data.draw(st.integers(0, len(pages[group])))
        gone = [pages[group][:count] if g == group else [] for g in range(len(pages))]
        self.end(gone)
        pages[group][:count] = [None] * count

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ends=st.booleans())
    def insert(self, data, ends):
        i = data.draw(st.integers(0, len(self.running) - 1))
        tokens, salt, pages = self.running[i]
        before = sum(self.cache.num_pages)
        num_new = self.cache.insert(tokens, pages, salt)
        assert num_new == self.model.insert(tokens, pages, salt)
        assert num_new == sum(self.cache.num_pages) - before
        if ends:
            del self.running[i]
            self.end(pages)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def cancel(self, data):
        self.end(self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))[2])

    @rule(data=st.data(), count=st.integers(0, 6))
    def evict_some(self, data, count):
        self.evict(data.draw(st.integers(0, len(self.allocators) - 1)), count)

    @rule(seldom=st.sampled_from([False] * 9 + [True]))
    def clear(self, seldom):
        if seldom:
            self.cache.clear()
            for entry in self.model.entries.values():
                self.own([[page] for page in entry], -1)
            self.model.entries.clear()

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def every_page_is_accounted_for(self):
        check(self.cache, *(pages for _, _, pages in self.running))
        assert self.cache.num_tokens == len(self.model.entries) * self.page_size
        cached = {}
        for node in self.cache._order:
            tokens, parent = node.tokens, node.parent
            while parent is not None:
                tokens, parent = parent.tokens + tokens, parent.parent
            cached[node.salt, tokens] = node.pages
        assert cached == self.model.entries
        for group in range(len(self.allocators)):
            pages = {entry[group] for entry in self.model.entries.values()} - {None}
            assert set(self.cache.held(group)) == pages
            assert self.cache.num_pages[group] == len(pages)


PrefixMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPrefixes = PrefixMachine.TestCase


def test_ten_thousand_operations_leak_nothing():
    rng = random.Random(0)
    cache, allocators = make(None, 6, 9, num_pages=48)
    running = []
    for _ in range(10_000):
        action = rng.random()
        if action < 0.45:
            text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 9)))
            match = cache.match(tokens_of(text), max_tokens=max(0, PAGE * len(text) - 1))
            pages = [list(of_group) for of_group in match.pages]
            missing = len(text) - len(pages[0])
            for group, allocator in enumerate(allocators):
                cache.evict(group, max(0, missing - allocator.num_free))
            if all(allocator.num_free >= missing for allocator in allocators):
                for of_group, allocator in zip(pages, allocators):
                    of_group += allocator.allocate(missing)
                running.append((text, pages))
            else:
                give_back(cache, pages)
                if running:
                    give_back(cache, running.pop(0)[1])
        elif action < 0.85 and running:
            text, pages = running.pop(rng.randrange(len(running)))
            cache.insert(tokens_of(text), pages)
            give_back(cache, pages)
        elif action < 0.995:
            cache.evict(rng.randrange(3), rng.randint(0, 4))
        else:
            cache.clear()
        check(cache, *(pages for _, pages in running))
    for _, pages in running:
        give_back(cache, pages)
    assert cache.stats.hits > 1000
    assert cache.stats.evictions > 1000
    assert [cache.evict(group, 48) for group in range(3)] != [0, 0, 0]
    cache.clear()
    assert all(allocator.num_free == 48 for allocator in allocators)


def test_a_long_chain_is_kept_found_and_given_up():
    """Nothing recurses, whatever the depth of a chain."""
    num_pages = 20_000
    allocator = PageAllocator(num_pages)
    cache = PrefixCache(1, [allocator], [None])
    pages = allocator.allocate(num_pages)
    cache.insert(range(num_pages), [pages])
    allocator.free(pages)
    allocator.free(cache.match(range(num_pages)).pages[0])
    for _ in range(num_pages):
        assert cache.evict(0, 1) == 1
    assert allocator.num_free == num_pages


def test_a_long_chain_behind_one_page_is_given_up():
    num_pages = 20_000
    full, sliding = allocators = PageAllocator(num_pages), PageAllocator(num_pages)
    cache = PrefixCache(1, allocators, [None, 2])
    pages = [full.allocate(num_pages), sliding.allocate(num_pages)]
    cache.insert(range(num_pages), pages)
    sliding.free(pages[1])
    # The sequence goes on to own all of group 0: its pages are passed over, and cannot be freed.
    assert cache.evict(0, 1) == 0
    assert cache.num_pages == (num_pages, num_pages)
    sliding.share(pages[1][1:])
    # The only page of group 1 that comes back is the first.
    assert cache.evict(1, 1) == 1
    assert cache.num_pages == (0, 0)
