"""The processes of a model that transformers has sharded (tensor parallel), as one engine.

Every rank runs the same scheduler. The first rank takes requests, and owns clock, seeds, and decisions about memory; it
sends one object of news ahead of each step. What depends on a request's own code (processors, criteria, beams) is
decided on the first rank, and sent. Keys and values of a rank are those of its own heads::

    rank 0   submit -> queue -> news --+--> plan -> forward -> tokens -> results
                                       |               |  (the model's own all-reduce)
    rank 1               generate()    +--> plan -> forward -> tokens -> results

Three gloo groups, whatever the model's backend is, so that three threads have one each: *steps* for the thread that
runs steps, *calls* for threads in ``generate()``, and *watch* for a thread that tells the others of failures. torch's
list of groups does not know them: it gives a name a second time once a group is destroyed, and ranks would look for one
another at the addresses of the old one.

Errors. A step that raises on all ranks ends its requests, as in one process. One that raises on some leaves the others
in the middle of the model's own communication, which nothing can complete: the engine ends on all ranks, with that
error.
"""

import contextlib
import hashlib
import io
import pickle
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from ..errors import RankError, RequestError
from ..transformers_internals import abort_communication
from .ranks import Alone

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=300)
"""An idle engine waits for news; a process that has died closes its connections, which ends the wait at once."""
CALL_WAIT_S = 600.0
"""Seconds that a call of all ranks waits for the others to make it."""
FAILED_WAIT_S = 10.0
"""Seconds that a rank whose step has failed waits for the others to fail alike, or to end the step."""
VERDICT_WAIT_S = 5.0
"""Seconds in which a lost connection is put down to a rank."""
WATCH_S = 0.5
"""Seconds between two looks at the others."""
SHORT_WAITS = ((0.0005, 2e-5), (0.01, 1e-4), (0.1, 5e-4), (2.0, 1e-3))
"""Seconds for which a wait sleeps so long at a time; after the last one 5 ms."""

HEAD = 2048
"""Bytes that a message takes at least; a longer one goes in two parts."""
LENGTH_BYTES = 8
"""Of these, before the message."""
WATCH_BYTES = 1024
ALIVE, LEAVES, FAILED = b"\0", b"\1", b"\2"

HELD: list[dict[str, Any]] = []
"""Groups of a forked child."""


class RankGroup(Alone):
    """The ranks of a model. All of them make one at the same time.

    Args:
        process_group: over which the model communicates.

    Attributes:
        failure: what has ended the work together, None: nothing has.
    """

    is_joint = True

    def __init__(self, process_group: Any) -> None:
        self.process_group = process_group
        self.rank, self.size = process_group.rank(), process_group.size()
        self.leads = self.rank == 0
        self.can_capture = distributed.get_backend(process_group) == "nccl"
        store = process_group.get_group_store()
        number = store.add(f"hf_paged/{self.rank}", 1)  # of this rank's groups over the same process group
        self._groups = {
            name: distributed.ProcessGroupGloo(
                distributed.PrefixStore(f"hf_paged/{number}/{name}", store), self.rank, self.size, LONGEST_WAIT
            )
            for name in ("steps", "calls", "watch")
        }
        self.failure: RankError | None = None
        self._own_failure: str | None = None
        self._failed_since: float | None = None
        self._step_failure: str | None = None
        self._leaves = threading.Event()
        self._has_ended = threading.Event()
        self._wake = threading.Event()
        self._on_failure: Callable[[RankError | None], bool] | None = None
        self._watcher: threading.Thread | None = None
        self._coming: tuple[torch.Tensor, Any] | None = None
        self._call_lock = threading.Lock()

    # Steps: called by the thread that runs them, and before there is one

    def decide(self, make: Callable[[], T]) -> T:
        """See :meth:`Alone.decide`."""
        return self._decide(make, self._group("steps"), None)

    def sendable(self, error: BaseException) -> BaseException:
        """See :meth:`Alone.sendable`."""
        return sendable(error)

    def least(self, number: int) -> int:
        """See :meth:`Alone.least`."""
        return min(self._gather(number, self._group("steps"), None))

    def first_text(self, text: str | None) -> str | None:
        """See :meth:`Alone.first_text`."""
        return next((found for found in self._gather(text, self._group("steps"), None) if found is not None), None)

    def gather(self, status: Any) -> list[Any]:
        """The ``status`` of all ranks, small, on all ranks."""
        return self._gather(status, self._group("steps"), None)

    def send_news(self, news: Any) -> None:
        """The first rank tells the others what comes next."""
        self._broadcast(dumps(news), self._group("steps"), None)

    def receive_news(self, timeout_s: float) -> Any:
        """What comes next, as the first rank says; None: nothing has come in ``timeout_s`` seconds."""
        if self._coming is None:
            self._coming = self._begin(self._group("steps"))
        head, work = self._coming
        if not self._is_done(work, timeout_s):
            return None
        self._coming = None
        return pickle.loads(self._rest(head, self._group("steps"), None))

    def note_step(self, failure: str | None) -> None:
        """What the last step has raised on this rank; None: nothing."""
        self._failed_since = None if failure is None else time.monotonic()
        self._step_failure = failure

    # Calls: made by all ranks, in threads of their own

    def meet(self, make: Callable[[], tuple[Any, Any]], timeout_s: float | None = None) -> Any:
        """Begin a call that all ranks make.

        Args:
            make: gives what must be the same on all ranks, and what the first rank has to say. What it raises on a rank
                ends the call on all of them.
            timeout_s: for the others to come; None: :data:`CALL_WAIT_S`.

        Returns:
            What the first rank has to say.

        Raises:
            RankError: the ranks differ, or another has not come, or has raised.
        """
        own, said, error = "", None, None
        try:
            same, said = make()
            own = hashlib.sha256(repr(same).encode()).hexdigest()
        except BaseException as raised:
            error = raised
        end = time.monotonic() + (CALL_WAIT_S if timeout_s is None else timeout_s)
        with self._call_lock:
            if error is not None and not self._groups:
                raise error
            group = self._group("calls")
            found = self._gather((own, None if error is None else words_of(error)), group, end)
            if error is not None:
                if any(failure is None for _, failure in found):
                    raise RankError(f"the call is not served on rank {self.rank}: {words_of(error)}") from error
                raise error
            for rank, (digest, failure) in enumerate(found):
                if failure is not None:
                    raise RankError(f"rank {rank} of {self.size} has ended the call: {failure}")
                if digest != found[0][0]:
                    raise RankError(
                        f"rank {rank} of {self.size} makes another call than rank 0: every rank of a sharded model "
                        f"must make the same calls with the same prompts and options, in the same order."
                    )
            return self._decide(lambda: said, group, end)

    def pass_together(self) -> None:
        """Go on once all ranks are here, in a call."""
        with self._call_lock:
            self._gather(None, self._group("calls"), time.monotonic() + CALL_WAIT_S)

    def decide_call(self, make: Callable[[], T]) -> T:
        """See :meth:`Alone.decide_call`."""
        with self._call_lock:
            return self._decide(make, self._group("calls"), time.monotonic() + CALL_WAIT_S)

    # Failures

    def watch(self) -> None:
        """Look after the others from now on."""
        self._watcher = threading.Thread(target=self._keep_watch, name="hf_paged ranks", daemon=True)
        self._watcher.start()

    def tell(self, on_failure: Callable[[RankError | None], bool]) -> None:
        """The engine has started: it is told of failures.

        Args:
            on_failure: called once, in a thread, with what has ended the work together; also when this rank says so.
                Called before that with None now and then: False: this rank has left.

        Raises:
            RankError: another rank's engine has not started.
        """
        self._on_failure = on_failure
        self.check()

    def fail(self, what: str) -> None:
        """Tell all ranks that this one cannot go on."""
        if self._own_failure is None:
            self._own_failure = f"rank {self.rank} of {self.size} {what}"
        if self.failure is None:
            self.failure = RankError(self._own_failure)
        self._wake.set()

    def check(self) -> None:
        """See :meth:`Alone.check`."""
        if self.failure is not None:
            raise RankError(str(self.failure))

    def raise_if_lost(self, error: BaseException) -> None:
        """Raises RankError: ``error`` came from the model's communication, which cannot go on."""
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            return
        end = time.monotonic() + VERDICT_WAIT_S  # The watch knows which rank it is.
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.02)
        raise RankError(
            f"the ranks of the model have lost one another: {words_of(error)}"
            if self.failure is None
            else str(self.failure)
        ) from error

    def leave(self) -> None:
        """End in order: the others look no longer after this rank, nor this one after them. Connections are closed,
        unless a rank has failed: what waits for that one holds them as long as the process lives."""
        self._leaves.set()
        self._wake.set()
        if self._watcher is not None and self._watcher.is_alive():  # Not in a forked child.
            self._has_ended.wait(10.0)

    def hold(self) -> None:
        """In a forked child: threads that a group waits for when it is destroyed are not there."""
        HELD.append(self._groups)

    def abort(self) -> None:
        """End what the model's own communication waits for, where the backend can (NCCL): streams go on."""
        if self.can_capture:
            with contextlib.suppress(RuntimeError):
                abort_communication(self.process_group)

    def _end_together(self) -> None:
        """Tell the engine of :attr:`failure`. Before there is one the model's communication goes on: where the engine
        starts on no rank, callers go on with the model."""
        if self._on_failure is not None:
            self.abort()
            self._on_failure(self.failure)

    def _keep_watch(self) -> None:
        try:
            self._look_after_others()
            if self.failure is None:
                self._leaves.wait()
                self._groups.clear()
        finally:
            self._has_ended.set()
        if self.failure is not None:
            threading.Event().wait()  # A group is destroyed once nothing waits in it; so these never are.

    def _look_after_others(self) -> None:
        while True:
            self._wake.wait(WATCH_S)
            is_held = self._on_failure is None or self._on_failure(None)
            if self._own_failure is None and not self._leaves.is_set() and not is_held:
                self.fail("has let go of its engine")
            state = FAILED if self._own_failure is not None else LEAVES if self._leaves.is_set() else ALIVE
            message = state + _cut(self._own_failure or "", WATCH_BYTES - 1)
            mine = torch.zeros(WATCH_BYTES, dtype=torch.uint8)
            mine[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            states = [torch.empty_like(mine) for _ in range(self.size)]
            try:
                work = self._groups["watch"].allgather([states], [mine])
                while not work.is_completed():
                    time.sleep(0.02)
                work.wait()
            except RuntimeError:
                if self._leaves.is_set():
                    return
                if self.failure is None:
                    self.failure = RankError(
                        f"one of the {self.size} processes of the model has died: its connections are closed. Start "
                        f"all of them again."
                    )
                self._end_together()
                return
            found = [bytes(state.numpy()).rstrip(b"\0") or ALIVE for state in states]
            failures = [text[1:].decode(errors="replace") for text in found if text[:1] == FAILED]
            if failures:
                if self.failure is None:
                    self.failure = RankError(failures[0])
                self._end_together()
                return
            if any(text[:1] == LEAVES for text in found):
                return

    # Messages

    def _group(self, name: str) -> Any:
        group = self._groups.get(name)
        if group is None:
            raise RankError("this rank has left its engine.")
        return group

    def _decide(self, make: Callable[[], T], group: Any, end: float | None) -> T:
        if not self.leads:
            value, error = pickle.loads(self._broadcast(None, group, end))
            if error is not None:
                raise error
            return value
        try:
            value = make()
            message = dumps((value, None))
        except BaseException as error:
            self._broadcast(dumps((None, sendable(error))), group, end)
            raise
        self._broadcast(message, group, end)
        return value

    def _gather(self, item: Any, group: Any, end: float | None) -> list[Any]:
        message = dumps(item)
        heads = self._all_gather(_head_of(message), group, end)
        lengths = [_length_of(head) for head in heads]
        most = max(lengths)
        rests = [torch.empty(0, dtype=torch.uint8)] * self.size
        if most > HEAD:  # All ranks have seen the same lengths.
            rests = self._all_gather(_bytes(message[HEAD - LENGTH_BYTES :], most - HEAD), group, end)
        raws = [bytes(head.numpy())[LENGTH_BYTES:] + bytes(rest.numpy()) for head, rest in zip(heads, rests)]
        return [pickle.loads(raw[: length - LENGTH_BYTES]) for raw, length in zip(raws, lengths)]

    def _all_gather(self, mine: torch.Tensor, group: Any, end: float | None) -> list[torch.Tensor]:
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._wait(lambda: group.allgather([found], [mine]), end)
        return found

    def _broadcast(self, message: bytes | None, group: Any, end: float | None) -> bytes:
        head, work = self._begin(group, message)
        self._finish(work, end)
        return self._rest(head, group, end, message)

    def _begin(self, group: Any, message: bytes | None = None) -> tuple[torch.Tensor, Any]:
        """Send or receive the beginning of a message."""
        self.check()
        head = _head_of(message or b"")
        with self._told():
            return head, _send(head, group)

    def _rest(self, head: torch.Tensor, group: Any, end: float | None, message: bytes | None = None) -> bytes:
        raw, length = bytes(head.numpy())[LENGTH_BYTES:], _length_of(head)
        if length <= HEAD:
            return raw[: length - LENGTH_BYTES]
        rest = _bytes((message or b"")[HEAD - LENGTH_BYTES :], length - HEAD)
        self._wait(lambda: _send(rest, group), end)
        return raw + bytes(rest.numpy())

    def _wait(self, begin: Callable[[], Any], end: float | None) -> None:
        self.check()
        with self._told():
            work = begin()
        self._finish(work, end)

    def _finish(self, work: Any, end: float | None) -> None:
        while not self._is_done(work, 1.0):
            if end is not None and time.monotonic() > end:
                self.fail("has waited for the others to make the same call, and they have not")
                self.check()

    def _is_done(self, work: Any, timeout_s: float) -> bool:
        """Wait, not inside of gloo, which hears neither Ctrl-C nor the end of the process.

        Raises:
            RankError: another rank has failed, or this one's last step has, and no other's.
        """
        begun = time.monotonic()
        while not work.is_completed():
            now = time.monotonic()
            self.check()
            if self._failed_since is not None and now - self._failed_since > FAILED_WAIT_S:
                self.fail(f"has failed in a step, and not all others have: {self._step_failure}")
            if now - begun > timeout_s:
                return False
            time.sleep(next((pause for until, pause in SHORT_WAITS if now - begun < until), 5e-3))
        with self._told():
            work.wait()
        return True

    @contextlib.contextmanager
    def _told(self) -> Any:
        """A closed connection has a name."""
        try:
            yield
        except RuntimeError as error:
            if self.failure is None:
                self.failure = RankError(
                    f"one of the {self.size} processes of the model has died, or has left its engine "
                    f"({str(error).splitlines()[0]:.200}). Start all of them again."
                )
            raise RankError(str(self.failure)) from error


def _bytes(message: bytes, count: int) -> torch.Tensor:
    """``count`` bytes that begin with a message, uint8 ``[count]``."""
    return torch.frombuffer(bytearray(message.ljust(count, b"\0")[:count]), dtype=torch.uint8)


def _head_of(message: bytes) -> torch.Tensor:
    """The beginning of a message, its length in bytes before it, uint8 ``[HEAD]``."""
    return _bytes(len(message).to_bytes(LENGTH_BYTES, "little") + message[: HEAD - LENGTH_BYTES], HEAD)


def _length_of(head: torch.Tensor) -> int:
    """Bytes of a message and of what says its length."""
    return LENGTH_BYTES + int.from_bytes(bytes(head[:LENGTH_BYTES].numpy()), "little")


def _send(tensor: torch.Tensor, group: Any) -> Any:
    """Begin to send the first rank's tensor into that of the others."""
    options = distributed.BroadcastOptions()
    options.rootRank = 0
    return group.broadcast([tensor], options)


def _cut(text: str, count: int) -> bytes:
    """The beginning of a text in UTF-8, at most ``count`` bytes of whole characters."""
    return text.encode(errors="replace")[:count].decode(errors="ignore").encode()


class _Pickler(pickle.Pickler):
    """Tensors go as arrays: their devices are not those of the receiver."""

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return torch.from_numpy, (item.detach().cpu().numpy(),)
        return NotImplemented


def dumps(item: Any) -> bytes:
    """A message."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(item)
    return buffer.getvalue()


def words_of(error: BaseException) -> str:
    """Type and message."""
    return f"{type(error).__name__}: {error}"[:400]


def sendable(error: BaseException) -> BaseException:
    """An error of a caller's own code may not survive the way to another process: its words do."""
    try:
        pickle.loads(dumps(error))
        return error
    except Exception:
        return RequestError(words_of(error))
