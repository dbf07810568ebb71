"""What stops an engine, changes what its steps run on, and lets it go on: between two steps."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import RequestError
from .core import no_gradients
from .page_events import PageEvents
from .process import wait_if_exiting
from .ranks import Alone
from .views import EngineViews


class EngineControls(EngineViews):
    """The part of :class:`Engine` that acts between two steps. Of a sharded model the first rank's calls act on all
    ranks, and those of the others do nothing.

    Attributes:
        ranks: the processes that hold the model.
    """

    ranks: Alone
    _in_step: bool

    def wake_loop(self) -> None:
        """Have a thread run steps; ``mail.changed`` is held."""
        raise NotImplementedError

    def pause(self, *, keep_graphs: bool = False, weights_change: bool = True) -> None:
        """Stop once the running step has ended; requests keep their pages.

        What happens to weights, modules and PEFT adapters meanwhile is seen by :meth:`resume`, which then drops what
        was computed before: prefixes, captured steps, and the keys and values of running requests, which compute their
        tokens again. Other changes to what the model computes (an attribute of a module, say) are not seen: call
        :meth:`refresh_weights`. Without a pause, changes are seen by the next step; those that leave no trace (through
        ``parameter.data``, or by custom kernels) when a request finds a prefix of its prompt in an engine
        that was idle, and not while requests run.

        Args:
            keep_graphs: captured decode steps are replayed again after :meth:`resume`, if nothing has changed. False:
                they are captured again.
            weights_change: False: nothing writes to the weights meanwhile, so :meth:`resume` need not compare all of
                their bytes.
        """
        with self._between_steps("pause"):
            self._command("pause", keep_graphs, weights_change)

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        with self.drive:
            self.loop.check_open()
            if self.loop.is_asleep and self.ranks.leads:
                raise RequestError("the engine sleeps: call wake().")
            self._command("resume")
        with self.mail.changed:
            self.wake_loop()

    def warm_up(self, batch_sizes: Sequence[int] | None = None, *, progress: bool = False) -> int:
        """Capture the decode steps of these batch sizes before they are needed.

        Args:
            batch_sizes: None: all up to ``max_num_seqs``, and steps over chunks of prompts as well. On a GPU a step of
                ``max_batch_tokens`` is run too, so that its kernels are compiled.
            progress: show a progress bar.

        Returns:
            CUDA graphs that the engine now has; 0 where it captures none.
        """
        sizes = None if batch_sizes is None else list(batch_sizes)
        for size in sizes or ():
            if not 1 <= size <= self.config.max_num_seqs:
                raise ValueError(f"batch_sizes must be 1 to {self.config.max_num_seqs} (max_num_seqs), got {size!r}.")
        with self._between_steps("warm_up"), no_gradients(), self._core.on_device():
            return self._command("warm_up", sizes, progress) or 0

    def refresh_weights(self) -> None:
        """Say that the model has changed in a way that the engine does not see, see :meth:`pause`.

        Prefixes are dropped, running requests compute their tokens again.
        """
        with self._between_steps("refresh_weights"):
            self._command("start_over", None)

    def drop_prefixes(self) -> None:
        """Forget every cached prefix; running requests keep their pages."""
        with self._between_steps("drop_prefixes"):
            self._command("drop_prefixes")

    def page_events(self, *, max_pending: int = 65_536) -> PageEvents:
        """Listen to what enters and leaves the prefix cache; several may. Waits for the running step.

        The first batch names all that is cached by now; then each step that changes something gives one. A page is
        cached as long as the full pages of its tokens are; where all layers have sliding windows, some of it.

        Args:
            max_pending: pages of batches that wait for the listener; more are dropped and counted, and it gets all that
                is cached anew once it has taken what waits.

        Raises:
            RequestError: the engine is closed, or a request's own code asks.
            ValueError: ``max_pending`` is less than 1.
        """
        if max_pending < 1:
            raise ValueError(f"max_pending must be at least 1 page, got {max_pending!r}.")
        with self._between_steps("page_events"):
            listener = PageEvents(self.mail, max_pending)
            with self.mail.changed:
                self.loop.pages.add(listener)
        return listener

    def sleep(self, *, keep_graphs: bool = False) -> None:
        """Give the memory of the pages back, and pause.

        Requests wait, and compute their tokens again after :meth:`wake`.

        Args:
            keep_graphs: captured steps stay, with the memory of their intermediate results, so that :meth:`wake` need
                not capture them again; see :meth:`pause` for the changes of the model that are seen.
        """
        with self._between_steps("sleep"):
            self._command("sleep", keep_graphs)

    def wake(self) -> None:
        """Go on after :meth:`sleep`."""
        with self.drive:
            self.loop.check_open()
            self._command("wake")
            self.resume()

    def _command(self, name: str, *arguments: Any) -> Any:
        """Have the loop do this between two steps, on all ranks; the first rank's call counts, others' do nothing."""
        return self.loop.command(name, *arguments) if self.ranks.leads else None

    @contextlib.contextmanager
    def _between_steps(self, name: str) -> Iterator[None]:
        """No step runs meanwhile.

        Raises:
            RequestError: the engine is closed, or a request's own code asks.
        """
        wait_if_exiting()
        with self.drive:
            if self._in_step:
                raise RequestError(
                    f"{name}() was called inside a step, by a request's own code (a logits processor or a criterion): "
                    f"call it from outside."
                )
            self.loop.check_open()
            yield
            self.loop.note_counts()
