"""Page events of an engine for those who listen: routers that send requests where their beginning is cached."""

import time
import weakref
from collections import deque
from dataclasses import dataclass

from ..paging import PrefixCache
from ..paging.page_events import PageEvent, PagesCleared, PagesRemoved, PagesStored, page_events
from .waiting import Mailbox


@dataclass(frozen=True, slots=True)
class PageEventBatch:
    """Events of one step, or of a call between two steps.

    Attributes:
        sequence: one more than that of the batch before, counted by the engine.
        timestamp: seconds since the epoch.
        events: in the order in which they are to be applied.
        is_snapshot: all that is cached by now, behind a :class:`PagesCleared`: the first batch of a listener, and the
            next one after some were dropped.
    """

    sequence: int
    timestamp: float
    events: tuple[PageEvent, ...]
    is_snapshot: bool = False

    @property
    def num_pages(self) -> int:
        """Pages that the events name."""
        return sum(0 if isinstance(event, PagesCleared) else len(event.hashes) for event in self.events)


class PageEvents:
    """What one listener has not taken yet; see :meth:`Engine.page_events`. Any thread may use it.

    Args:
        mail: its ``changed`` guards this, and is notified of news.
        max_pending: pages of all batches that wait.

    Attributes:
        num_dropped: pages of batches that were dropped because the listener was too slow.
        is_behind: batches were dropped, and no snapshot has come since.
    """

    def __init__(self, mail: Mailbox, max_pending: int) -> None:
        self._mail, self._max_pending = mail, max_pending
        self._batches: deque[PageEventBatch] = deque()
        self._num_pending = 0
        self.num_dropped, self.is_behind, self.is_closed = 0, False, False

    def take(self) -> list[PageEventBatch]:
        """Batches that have come since the last call, without waiting.

        After some were dropped the first is of a lone :class:`PagesCleared`, and a snapshot comes with the next step:
        what was applied is true at all times, though not always complete.
        """
        with self._mail.changed:
            taken = list(self._batches)
            self._batches.clear()
            self._num_pending = 0
        return taken

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is something to take, or the engine is closed; returns whether there is."""
        with self._mail.changed:
            self._mail.changed.wait_for(lambda: bool(self._batches) or self.has_ended(), timeout_s)
            return bool(self._batches)

    def has_news(self) -> bool:
        """Whether there is something to take, or nothing comes any more; the engine's ``mail.changed`` is held."""
        return bool(self._batches) or self.has_ended()

    def has_ended(self) -> bool:
        """Whether nothing comes any more."""
        return self.is_closed or self._mail.is_closed

    def put(self, batch: PageEventBatch) -> None:
        """Add a batch; ``mail.changed`` is held. A snapshot is as large as the cache, and never dropped."""
        num_pages = max(1, batch.num_pages)  # A batch that names none takes room too.
        if batch.is_snapshot:
            self.is_behind = False
        elif self.is_behind or self._num_pending + num_pages > self._max_pending:
            self.num_dropped += num_pages
            if not self.is_behind:
                self.num_dropped += self._num_pending
                self._batches.clear()
                self._num_pending, self.is_behind = 0, True
                self._batches.append(PageEventBatch(batch.sequence, batch.timestamp, (PagesCleared(),)))
            return
        self._batches.append(batch)
        self._num_pending += num_pages

    @property
    def wants_snapshot(self) -> bool:
        """Whether it has taken what came before batches were dropped; ``mail.changed`` is held."""
        return self.is_behind and not self._batches

    def close(self) -> None:
        """Listen no more."""
        with self._mail.changed:
            self.is_closed = True
            sleepers, self._mail.sleepers = self._mail.sleepers, []
            self._mail.changed.notify_all()
        self._mail.wake_sleepers(sleepers)

    def __enter__(self) -> "PageEvents":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class PagePublisher:
    """Makes events of what a prefix cache writes down, and hands them out. The caller holds the engine's lock of steps.

    Args:
        prefixes: None: nothing is ever cached.
        page_size: tokens of a page.
    """

    def __init__(self, prefixes: PrefixCache | None, page_size: int) -> None:
        self._prefixes, self._page_size, self._sequence = prefixes, page_size, 1
        # A listener that nobody holds is none.
        self._listeners: weakref.WeakSet[PageEvents] = weakref.WeakSet()

    def add(self, listener: PageEvents) -> None:
        """Let a listener hear all that is cached by now, and then what changes; ``mail.changed`` is held."""
        self.publish()
        listener.put(self._snapshot())
        self._listeners.add(listener)
        if self._prefixes is not None and self._prefixes.changes is None:
            self._prefixes.changes = []

    def has_news(self) -> bool:
        """Whether :meth:`publish` has something to do."""
        return bool(self._listeners) or (self._prefixes is not None and self._prefixes.changes is not None)

    def publish(self) -> None:
        """Hand out what has changed; ``mail.changed`` is held."""
        listeners = [listener for listener in self._listeners if not listener.is_closed]
        if self._prefixes is None:
            return
        if not listeners:
            self._listeners.clear()
            self._prefixes.changes = None
            return
        changes, self._prefixes.changes = self._prefixes.changes, []
        if changes:
            self._sequence += 1
            batch = PageEventBatch(self._sequence, time.time(), page_events(changes, self._page_size))
            for listener in listeners:
                listener.put(batch)
        behind = [listener for listener in listeners if listener.wants_snapshot]
        if behind:
            snapshot = self._snapshot()
            for listener in behind:
                listener.put(snapshot)

    def _snapshot(self) -> PageEventBatch:
        stored: tuple[PageEvent, ...] = ()
        if self._prefixes is not None:
            stored = page_events(((True, node) for node in self._prefixes.nodes()), self._page_size)
        return PageEventBatch(self._sequence, time.time(), (PagesCleared(), *stored), is_snapshot=True)


__all__ = ["PageEventBatch", "PageEvents", "PagePublisher", "PagesCleared", "PagesRemoved", "PagesStored"]
