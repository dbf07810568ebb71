"""Steps that the ranks of a sharded model take together: what the first one tells the others, and what all compare."""

import pickle
import zlib
from typing import Any

import numpy as np

from ..errors import RankError
from .group import RankGroup, words_of
from .news import StepNews, take_over
from .scheduling.request import Request
from .waiting import Mailbox


class JointSteps:
    """One rank's part. All of it is touched by the thread that runs steps, but for the claims.

    Args:
        group: the ranks.
        mail: of this rank's engine.

    Attributes:
        claims: requests of calls that all ranks make, by number, which this rank has not been sent yet; guarded by
            ``mail.changed``.
    """

    def __init__(self, group: RankGroup, mail: Mailbox) -> None:
        self.group, self.mail = group, mail
        self.claims: dict[int, Request] = {}
        self._known: dict[int, Request] = {}
        self._failure: str | None = None
        self._checksum = 0

    def tell(self, incoming: list[Request], cancels: list[Request], late: list[Request], has_work: bool) -> bool:
        """Tell the others what happens before the next step.

        Args:
            incoming, cancels, late: new requests, and those that end.
            has_work: there may be something to compute.

        Returns:
            Whether anything happens; otherwise nobody is told.
        """
        if not (incoming or cancels or late or has_work or self._failure is not None):
            return False
        requests = [(request.request_id, request.message) for request in incoming]
        self.group.send_news(StepNews(requests, [r.number for r in cancels], [r.number for r in late]))
        return True

    def send_command(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Have the others call a method of their step loops; nothing on a rank that does not lead."""
        if self.group.leads:
            self.group.send_news(StepNews(command=(name, arguments)))

    def understood(self, news: StepNews, now: float) -> tuple[list[Request], list[Request], list[Request]]:
        """What :meth:`tell` was given, as it is on this rank; ``now`` is on its clock."""
        incoming = []
        for request_id, message in news.requests:
            contents = pickle.loads(message)
            with self.mail.changed:
                request = take_over(request_id, contents, self.claims.pop(contents[0]["number"], None), now)
                self.mail.unfinished[request.request_id] = request
            self._known[request.number] = request
            incoming.append(request)
        # Some may have ended with the step before.
        cancels, late = (
            [self._known[n] for n in numbers if n in self._known] for numbers in (news.cancels, news.late)
        )
        self.mail.take()  # What callers of this rank have let go of, the first rank has not.
        return incoming, cancels, late

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self._known.pop(request.number, None)

    def note_tokens(self, tokens: np.ndarray) -> None:
        """A step has chosen these, int64 ``[n]``."""
        self._checksum = zlib.crc32(tokens.tobytes(), self._checksum)

    def note_failure(self, error: BaseException, in_step: bool = True) -> None:
        """A step, or what is done between two, has raised on this rank.

        Raises:
            RankError: what it raised came from the loss of another rank.
        """
        self.group.raise_if_lost(error)
        self._failure = words_of(error)
        if in_step:
            self.group.note_step(self._failure)

    def compare(self, change: str | None, num_steps: int) -> str | None:
        """Before a step: what has changed on any rank.

        Args:
            change: of the model, on this rank.
            num_steps: so far.

        Raises:
            RankError: ranks have chosen different tokens, or some have failed in the last step and others not.
        """
        found = self.group.gather((change and change[:400], self._failure, (self._checksum, num_steps)))
        failures = {rank: failure for rank, (_, failure, _) in enumerate(found) if failure is not None}
        self._failure = None
        self.group.note_step(None)
        if 0 < len(failures) < len(found):
            rank, failure = next(iter(failures.items()))
            raise RankError(f"rank {rank} of {len(found)} has failed in a step, and not all others have: {failure}")
        if len({state for _, _, state in found}) > 1:
            raise RankError(
                f"the {len(found)} ranks of the model have chosen different tokens: they do not compute the same. Are "
                f"weights, versions and devices alike?"
            )
        return next((text for text, _, _ in found if text is not None), None)

    def claim(self, numbers: list[int], requests: list[Request]) -> None:
        """Requests that will be sent are these; ``mail.changed`` is held."""
        self.claims |= dict(zip(numbers, requests))

    def end_claims(self) -> None:
        """Nothing more will be sent: what was claimed is among the unfinished. ``mail.changed`` is held."""
        claims, self.claims = self.claims, {}
        self.mail.unfinished |= {request.request_id: request for request in claims.values()}

    def end(self, error: BaseException) -> None:
        """This rank goes no further, so that no other can."""
        if self.group.failure is None:
            self.group.fail(f"has stopped: {words_of(error)}")
