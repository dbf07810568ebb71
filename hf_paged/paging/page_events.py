"""What enters and leaves a prefix cache, as events: a router that applies them knows what an engine has cached."""

import hashlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from .prefix_cache import PrefixNode

HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class PagesStored:
    """Pages that follow one another were cached.

    Attributes:
        hashes: names of the pages, 64 bits with a sign: of a page's tokens, all tokens before it and ``repr`` of the
            salt. The same in every process, where that is.
        parent_hash: name of the page before the first one; None: the first one begins a sequence.
        token_ids: ``len(hashes) * page_size`` tokens.
        page_size: tokens of a page.
        salt: only requests with an equal one find them.
    """

    hashes: tuple[int, ...]
    parent_hash: int | None
    token_ids: tuple[int, ...]
    page_size: int
    salt: Hashable = None


@dataclass(frozen=True, slots=True)
class PagesRemoved:
    """Pages, by their names, that are not cached any more. All that continued them went before, or with them."""

    hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PagesCleared:
    """No page is cached."""


PageEvent = PagesStored | PagesRemoved | PagesCleared


def page_events(changes: Iterable[tuple[bool, PrefixNode | None]], page_size: int) -> tuple[PageEvent, ...]:
    """Events of ``PrefixCache.changes``; those of pages that follow one another become one.

    Args:
        changes: in their order. Parents were named before their children: by earlier changes, or by a call for
            ``(True, node)`` of all nodes.
        page_size: tokens of a page.
    """
    events: list[PageEvent] = []
    stored: list[PrefixNode] = []
    removed: list[int] = []

    def finish() -> None:
        if stored:
            first = stored[0]
            names = tuple(_name(node) for node in stored)
            tokens = tuple(token for node in stored for token in node.tokens)
            parent = None if first.parent is None else first.parent.event_hash
            events.append(PagesStored(names, parent, tokens, page_size, first.salt))
            stored.clear()
        if removed:
            events.append(PagesRemoved(tuple(removed)))
            removed.clear()

    for has_come, node in changes:
        if node is None:
            finish()
            events.append(PagesCleared())
        elif has_come:
            if removed or (stored and node.parent is not stored[-1]):
                finish()
            stored.append(node)
        else:
            if stored:
                finish()
            removed.append(_name(node))
    finish()
    return tuple(events)


def _name(node: PrefixNode) -> int:
    """A page's name, made when it is first asked for."""
    if node.event_hash is None:
        before = repr(node.salt).encode()
        if node.parent is not None:
            assert node.parent.event_hash is not None, "a page was named before the one that it follows"
            before = node.parent.event_hash.to_bytes(HASH_BYTES, "little", signed=True)
        tokens = b"".join(token.to_bytes(HASH_BYTES, "little", signed=True) for token in node.tokens)
        digest = hashlib.blake2b(before + tokens, digest_size=HASH_BYTES, person=b"page" if node.parent else b"first")
        node.event_hash = int.from_bytes(digest.digest(), "little", signed=True)
    return node.event_hash
