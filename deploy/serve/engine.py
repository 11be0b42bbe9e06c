"""The models and the queue before them: each runtime belongs to one thread, and requests are answered in their order.

A prompt is computed in pieces of PIECE tokens counted from its start, and what is kept from request to request are
whole pieces of prompts. Every state is thereby computed in one way only, whatever came before, and an answer depends on
its request alone, to the last bit. It also bounds how long a request that was given up goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np

from cusprun.deploy.serve.job import Broken, Done, End, Event, Job, Piece, Scored, Ticket
from cusprun.deploy.serve.metrics import Metrics
from cusprun.deploy.serve.stop import StopText
from cusprun.runtimes import Runtime
from cusprun.runtimes.generation import TextStream, common_prefix, draw

PIECE = 64  # tokens of a prompt that are computed at once
LATEST = 0.2  # weight of the latest request in the mean duration

logger = logging.getLogger("cusprun.serve")


class Busy(Exception):
    """The queue is full; it should be empty in ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"full for {seconds:.1f} s")
        self.seconds = seconds


class Stopping(Exception):
    """The engine takes no more requests."""


class _GivenUp(Exception):
    """Nobody waits for the answer any more."""


class _Late(Exception):
    """The deadline passed before an answer's first token."""


class Engine:
    """``runtimes`` answer one request each at a time, ``queue`` more may wait."""

    def __init__(self, runtimes: Sequence[Runtime], queue: int, metrics: Metrics) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._most, self._metrics = queue, metrics
        self._mean = 1.0  # seconds of one request; measured from the first on
        self._answered = 0
        self._stopping = False
        self._workers = [_Worker(runtime, self._deliver, self._finish, metrics) for runtime in runtimes]
        metrics.watch(lambda: self.waiting, lambda: self.running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return sum(worker.ticket is not None for worker in self._workers)

    @property
    def patience(self) -> float:
        """Seconds until those that are here will have been answered, by the mean of the answers so far."""
        return self._mean * (self.waiting + self.running) / len(self._workers)

    def submit(self, job: Job, deliver: Callable[[Event], None], timeout: float) -> Ticket:
        """Queues a job. Raises Busy where the queue is full, Stopping after :meth:`stop`."""
        ticket = Ticket(job, deliver, time.monotonic() + timeout)
        with self._lock:
            if self._stopping:
                raise Stopping
            if len(self._waiting) >= self._most and self.running == len(self._workers):
                raise Busy(self.patience)
            self._waiting.append(ticket)
            self._dispatch()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a job that is no longer wanted: at once where it waits, else before the next token or piece."""
        with self._lock:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._metrics.cancelled.inc()

    def stop(self) -> None:
        """Takes no more jobs; those that are here go on."""
        with self._lock:
            self._stopping = True

    def drop_all(self) -> None:
        """Ends every job with Broken("stopping")."""
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
            running = [worker.ticket for worker in self._workers if worker.ticket is not None]
            for ticket in (*waiting, *running):
                if not ticket.cancelled:
                    ticket.deliver(Broken("stopping"))
                    ticket.cancelled = True

    def close(self) -> None:
        """Ends the threads and frees the models."""
        self.stop()
        self.drop_all()
        for worker in self._workers:
            worker.close()

    def _dispatch(self) -> None:
        """Hands waiting jobs to idle workers, each to the one that holds most of its prompt. With the lock held."""
        while self._waiting:
            idle = [worker for worker in self._workers if worker.ticket is None]
            if not idle:
                return
            ticket = self._waiting.popleft()
            prompt = ticket.job.prompts[0]
            max(idle, key=lambda worker: common_prefix(worker.held, prompt)).give(ticket)

    def _deliver(self, ticket: Ticket, event: Event) -> None:
        """Passes an event on, unless nobody waits for it any more: whoever did may be gone altogether."""
        with self._lock:
            if not ticket.cancelled:
                ticket.deliver(event)

    def _finish(self, worker: _Worker, seconds: float | None) -> None:
        """A worker is free again; ``seconds`` is how long a whole answer took."""
        with self._lock:
            worker.ticket = None
            if seconds is not None:
                weight = LATEST if self._answered else 1.0
                self._mean += weight * (seconds - self._mean)
                self._answered += 1
            self._dispatch()


class _Worker:
    """A runtime and the thread that alone calls it."""

    def __init__(
        self,
        runtime: Runtime,
        deliver: Callable[[Ticket, Event], None],
        finish: Callable[[_Worker, float | None], None],
        metrics: Metrics,
    ) -> None:
        self._runtime, self._deliver, self._finish, self._metrics = runtime, deliver, finish, metrics
        self.held: tuple[int, ...] = ()  # whole pieces of the last prompt, computed in pieces
        self.ticket: Ticket | None = None
        self._wake = threading.Semaphore(0)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def give(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self._wake.release()

    def close(self) -> None:
        self._closed = True
        self._wake.release()
        self._thread.join()
        self._runtime.close()

    def _work(self) -> None:
        while True:
            self._wake.acquire()
            if self._closed:
                return
            ticket = self.ticket
            assert ticket is not None
            begun = time.monotonic()
            self._metrics.waited.observe(begun - ticket.arrived)
            whole = False
            try:
                for event in self._answer(ticket):
                    self._deliver(ticket, event)
                whole = True
            except _GivenUp:
                self._metrics.cancelled.inc()
            except _Late:
                self._deliver(ticket, Broken("timeout"))
            except Exception:
                logger.exception("a generation failed")
                self.held = ()
                self._deliver(ticket, Broken("error"))
            del ticket  # an idle worker holds on to nothing
            self._finish(self, time.monotonic() - begun if whole else None)

    def _answer(self, ticket: Ticket) -> Iterator[Event]:
        job, first, said, reused = ticket.job, True, 0, 0
        answers = list(product(job.prompts, range(job.choices)))
        for index, (prompt, choice) in enumerate(answers):
            try:
                logits, kept = self._read(prompt, ticket)
            except _Late:
                if first:
                    raise
                for left in range(index, len(answers)):  # those before are kept
                    yield End(left, "length")
                break
            reused += kept if choice == 0 else 0
            if first:
                self._metrics.first_token.observe(time.monotonic() - ticket.arrived)
                first = False
            for event in self._write(ticket, index, choice, logits, len(prompt)):
                if isinstance(event, int):
                    said += event
                else:
                    yield event
        total = sum(map(len, job.prompts))
        self._metrics.prompt_tokens.inc(total)
        self._metrics.cached_tokens.inc(reused)
        yield Done(total, reused, said)

    def _read(self, prompt: tuple[int, ...], ticket: Ticket) -> tuple[np.ndarray, int]:
        """Next-token logits after the prompt, and how many of its tokens were there already."""
        kept = common_prefix(self.held, prompt[:-1]) // PIECE * PIECE
        self._runtime.forget(kept)
        self.held = prompt[:kept]
        logits: np.ndarray | None = None
        for end in (*range(kept + PIECE, len(prompt), PIECE), len(prompt)):
            self._check(ticket)
            if time.monotonic() > ticket.deadline:
                raise _Late
            logits = self._runtime.prefill(prompt[:end], reuse=True)
            self.held = prompt[: end // PIECE * PIECE]
        assert logits is not None
        return logits, kept

    def _write(self, ticket: Ticket, index: int, choice: int, logits: np.ndarray, before: int) -> Iterator[Event | int]:
        """The events of one answer, and a 1 for each token."""
        job, runtime, sampling = ticket.job, self._runtime, ticket.job.sampling
        rng = np.random.default_rng((sampling.seed + choice) % 2**64)
        text, stop = TextStream(runtime), StopText(job.stop)
        pending: deque[tuple[int, Scored]] = deque()  # characters up to its end, token
        fed = 0
        reason = "length"
        room = min(sampling.max_tokens, runtime.n_context - before)
        for count in range(room):
            self._check(ticket)
            token = draw(logits, sampling, rng)
            if token in runtime.end_tokens:
                reason = "stop"
                break
            yield 1
            self._metrics.tokens.inc()
            # Control tokens are no text: what they would spell belongs to the template.
            piece = text.feed(token) if runtime.token_bytes(token) else ""
            fed += len(piece)
            if job.alternatives is not None:
                pending.append((fed, _score(runtime, logits, token, job.alternatives)))
            shown = stop.feed(piece)
            scored = _released(pending, stop.released)
            if shown or scored:
                yield Piece(index, shown, scored)
            if stop.hit:
                reason = "stop"
                break
            if count + 1 == room or time.monotonic() > ticket.deadline:
                break
            logits = runtime.step(token)
        if not stop.hit:
            shown = stop.feed(text.flush()) + stop.flush()
            scored = tuple(scored for _, scored in pending)
            if shown or scored:
                yield Piece(index, shown, scored)
        yield End(index, "stop" if reason == "stop" or stop.hit else "length")

    def _check(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            raise _GivenUp


def _released(pending: deque[tuple[int, Scored]], shown: int) -> tuple[Scored, ...]:
    """Takes the tokens whose characters were all shown."""
    found = []
    while pending and pending[0][0] <= shown:
        found.append(pending.popleft()[1])
    return tuple(found)


def _score(runtime: Runtime, logits: np.ndarray, token: int, alternatives: int) -> Scored:
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best: list[int] = []
    if alternatives:
        best = np.argpartition(-logprobs, alternatives)[:alternatives].tolist()
        best.sort(key=lambda one: -logprobs[one])

    def scored(one: int, top: tuple[Scored, ...] = ()) -> Scored:
        return Scored(runtime.decode([one]), tuple(runtime.token_bytes(one)), float(logprobs[one]), top)

    return scored(token, tuple(map(scored, best)))
