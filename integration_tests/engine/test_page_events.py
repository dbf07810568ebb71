"""Page events: who applies them knows what the prefix cache holds, whatever the engine does."""

import gc
import random
import threading

import pytest
import torch
from random_requests import tiny_model
from small_engines import config

import hf_paged
from hf_paged.engine.page_events import PageEventBatch
from hf_paged.errors import RequestError
from hf_paged.paging import PageAllocator, PrefixCache
from hf_paged.paging.page_events import page_events

PAGE = 8


def make_engine(model):
    options = hf_paged.EngineConfig(num_pages=14, page_size=PAGE, max_num_seqs=4, max_model_len=48, self_check=False)
    return hf_paged.Engine(model, options, background=False)


class Replica:
    """What a router knows: pages by name, with the page before each, and its tokens."""

    def __init__(self):
        self.pages, self.sequence = {}, None

    def apply(self, batches):
        for batch in batches:
            assert self.sequence is None or batch.is_snapshot or batch.sequence > self.sequence
            self.sequence = batch.sequence
            for event in batch.events:
                if isinstance(event, hf_paged.PagesCleared):
                    self.pages.clear()
                elif isinstance(event, hf_paged.PagesStored):
                    assert len(event.token_ids) == len(event.hashes) * event.page_size
                    assert event.page_size == PAGE
                    parent = event.parent_hash
                    for i, name in enumerate(event.hashes):
                        assert name not in self.pages
                        assert parent is None or parent in self.pages
                        self.pages[name] = (parent, event.token_ids[i * PAGE : (i + 1) * PAGE], event.salt)
                        parent = name
                else:
                    for name in event.hashes:
                        del self.pages[name]

    def prefixes(self):
        """Salt and tokens of every page with all before it."""

        def tokens(name):
            parent, own, _ = self.pages[name]
            return (() if parent is None else tokens(parent)) + own

        return {(salt, tokens(name)) for name, (_, _, salt) in self.pages.items()}


def cached(cache, known):
    """Those of the prefixes in ``known`` that the cache finds by itself, and how many it holds in all."""
    found = {(s, t) for s, t in known if len(cache._find_chain(t, len(t) // PAGE, s)) == len(t) // PAGE}
    return found, cache.num_tokens // PAGE


def agrees(cache, replica):
    prefixes = replica.prefixes()
    assert len(prefixes) == len(replica.pages)
    assert cached(cache, prefixes) == (prefixes, len(prefixes))


def ask(engine, rng, count):
    """Requests that begin alike, some under a salt; more than the pool has pages for."""
    for _ in range(count):
        beginning = [rng.randrange(3, 6)] * (PAGE * rng.randrange(1, 4))
        prompt = beginning + [rng.randrange(3, 90) for _ in range(rng.randrange(1, 14))]
        salt = rng.choice([None, None, "tenant"])
        engine.submit(prompt, generation_config=config(rng.randrange(1, 4)), cache_salt=salt)
    while engine.step():
        pass


@pytest.mark.parametrize("windows", [(None,), (None, 9), (9, 20)])
def test_replayed_changes_are_what_the_books_hold(windows):
    rng, replica = random.Random(len(windows)), Replica()
    allocators = [PageAllocator(24) for _ in windows]
    cache = PrefixCache(PAGE, allocators, windows)
    cache.changes = []
    for number in range(1, 400):
        what = rng.choice(["insert"] * 4 + ["evict", "evict", "forget", "clear" if rng.random() < 0.1 else "insert"])
        if what == "insert":
            for group, allocator in enumerate(allocators):
                cache.evict(group, max(0, 6 - allocator.num_free))
            count = rng.randrange(1, 6)
            tokens = [token for _ in range(count) for token in [rng.randrange(2)] * PAGE]
            pages = [list(allocator.allocate(count)) for allocator in allocators]
            given = [list(own) for own in pages]
            for group, window in enumerate(windows):
                if window is not None and rng.random() < 0.5:
                    given[group][0] = None  # The window has moved past it.
            cache.insert(tokens, given, rng.choice([None, "tenant"]))
            for allocator, own in zip(allocators, pages):
                allocator.free(own)
        elif what == "evict":
            cache.evict(rng.randrange(len(windows)), rng.randrange(4))
        elif what == "forget":
            group = rng.randrange(len(windows))
            cache.forget(group, [rng.randrange(24)])
        else:
            cache.clear()
        changes, cache.changes = cache.changes, []
        replica.apply([PageEventBatch(number, 0.0, page_events(changes, PAGE))])
        agrees(cache, replica)
        cache.check()
    fresh = Replica()
    fresh.apply([PageEventBatch(1, 0.0, page_events(((True, node) for node in cache.nodes()), PAGE))])
    assert fresh.pages == replica.pages


def test_replayed_events_are_what_is_cached():
    rng = random.Random(3)
    seen = {"stored": 0, "removed": 0}
    with make_engine(tiny_model("llama")) as engine:
        ask(engine, rng, 3)
        assert engine._core.pool.prefixes.changes is None  # Nobody has listened.
        listeners = [(engine.page_events(), Replica())]
        slow, slow_replica, was_behind = engine.page_events(max_pending=5), Replica(), 0
        for number in range(18):
            what = rng.choice(["ask"] * 6 + ["drop", "refresh", "sleep", "weights", "listen"])
            if what == "ask":
                ask(engine, rng, rng.randrange(1, 5))
            elif what == "drop":
                engine.drop_prefixes()
            elif what == "refresh":
                engine.refresh_weights()
            elif what == "sleep":
                engine.sleep()
                engine.wake()
            elif what == "weights":
                engine.pause()
                with torch.no_grad():
                    engine.model.get_input_embeddings().weight.mul_(1.01)
                engine.resume()
            else:
                listeners.append((engine.page_events(), Replica()))
            for listener, replica in listeners:
                batches = listener.take()
                for batch in batches:
                    seen["stored"] += sum(isinstance(event, hf_paged.PagesStored) for event in batch.events)
                    seen["removed"] += sum(isinstance(event, hf_paged.PagesRemoved) for event in batch.events)
                replica.apply(batches)
                agrees(engine._core.pool.prefixes, replica)
                assert not listener.num_dropped
            if number % 3 == 0:
                slow_replica.apply(slow.take())
                if slow.is_behind:
                    assert not slow_replica.pages
                    was_behind += 1
                else:
                    agrees(engine._core.pool.prefixes, slow_replica)
        # Once it has taken what waits, the next step brings all anew.
        slow_replica.apply(slow.take())
        ask(engine, rng, 1)
        slow_replica.apply(slow.take())
        agrees(engine._core.pool.prefixes, slow_replica)
        assert was_behind
        assert slow.num_dropped
        assert min(seen.values()) > 3
        assert len({replica.sequence for _, replica in listeners}) == 1
        engine.check()


def test_names_are_those_of_another_engine():
    """They are of tokens and salts alone."""
    prompt, names = [5] * PAGE + [7] * PAGE + [9], []
    for beginning in ([5] * PAGE + [8], [3] * PAGE + [9]):
        with make_engine(tiny_model("llama")) as engine, engine.page_events() as listener:
            for ids, salt in ((beginning, None), (prompt, None), (prompt, "a")):
                engine.submit(ids, generation_config=config(1), cache_salt=salt).result()
            replica = Replica()
            replica.apply(listener.take())
            found = {(salt, own, parent): name for name, (parent, own, salt) in replica.pages.items()}
            first = found[None, (5,) * PAGE, None]
            names.append((first, found[None, (7,) * PAGE, first], found["a", (5,) * PAGE, None]))
    assert names[0] == names[1]
    assert len(set(names[0])) == 3


def test_nothing_is_written_down_for_nobody():
    with make_engine(tiny_model("llama")) as engine:
        listener, other = engine.page_events(), engine.page_events()
        cache = engine._core.pool.prefixes
        assert cache.changes == []
        listener.close()
        del other
        gc.collect()
        ask(engine, random.Random(0), 1)
        assert cache.changes is None
        assert not [batch for batch in listener.take() if not batch.is_snapshot]
        with pytest.raises(ValueError, match="max_pending must be at least 1"):
            engine.page_events(max_pending=0)
    with pytest.raises(RequestError, match="closed"):
        engine.page_events()


def test_a_listener_waits_in_a_thread_of_its_own():
    replica = Replica()
    with hf_paged.Engine(tiny_model("llama"), hf_paged.EngineConfig(num_pages=24, page_size=PAGE)) as engine:
        listener = engine.page_events()

        def listen():
            while not listener.has_ended():
                listener.wait(60)
                replica.apply(listener.take())

        thread = threading.Thread(target=listen)
        thread.start()
        engine.submit([5] * 20, generation_config=config(8)).result()
    thread.join(60)
    assert not thread.is_alive()
    replica.apply(listener.take())
    assert not replica.pages  # The engine was closed.
    assert replica.sequence > 1


def test_calls_that_clear_take_room_too():
    with make_engine(tiny_model("llama")) as engine:
        listener = engine.page_events(max_pending=3)
        ask(engine, random.Random(0), 1)
        for _ in range(4):
            engine.drop_prefixes()
        assert listener.num_dropped
        assert [batch.events for batch in listener.take()] == [(hf_paged.PagesCleared(),)]
