"""Several trainings side by side: what they ask of the models is done together, in shared batches.

Each training runs in a thread of its own, as it would alone, up to where it asks for images; then the next
has its turn. So only one of them runs at any time, in a fixed order, and none sees the others.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from discriminative.diffusion.gradients import ScoredBatch
from discriminative.tokens.batch import Asked, together


@dataclass
class Ended:
    """How a training ended: with a result, or an error."""

    result: Any = None
    error: BaseException | None = None


class Worker:
    """A training in a thread of its own.

    Args:
        train: the whole training; it is given the function that does what it asks for.
    """

    def __init__(self, train: Callable[[Callable[[Asked], list[ScoredBatch]]], Any]):
        self.train = train
        self.answers = SimpleQueue()
        self.said = SimpleQueue()
        self.asked: Asked | None = None
        self.ended: Ended | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)

    @property
    def is_new(self) -> bool:
        """Whether it has not begun."""
        return self.thread.ident is None

    def run(self) -> None:
        """The thread's work."""
        try:
            self.said.put(Ended(self.train(self.work)))
        except BaseException as error:
            self.said.put(Ended(error=error))

    def work(self, asked: Asked) -> list[ScoredBatch]:
        """Wait until what is asked for is done."""
        self.said.put(asked)
        answer = self.answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def result(self) -> Any:
        """What the training came to, once it has ended.

        Raises:
            Exception: that ended it.
        """
        if self.ended.error:
            raise self.ended.error
        return self.ended.result

    def go_on(self, answer: list[ScoredBatch] | BaseException | None = None) -> None:
        """Let it run until it asks for something, or ends."""
        if self.is_new:
            self.thread.start()
        else:
            self.answers.put(answer)
        said = self.said.get()
        self.asked = said if isinstance(said, Asked) else None
        self.ended = said if isinstance(said, Ended) else None


class SideBySide:
    """Trainings that go on together, each until it ends."""

    def __init__(self):
        self.workers: list[Worker] = []

    def add(self, train: Callable[[Callable[[Asked], list[ScoredBatch]]], Any]) -> Worker:
        """Take in another training, which begins with the next round.

        Args:
            train: is given the function that does what it asks for.
        """
        worker = Worker(train)
        self.workers.append(worker)
        return worker

    def until_one_ends(self) -> list[Worker]:
        """Go on until a training ends; those that did, which leave."""
        try:
            for worker in self.workers:
                if worker.is_new:
                    worker.go_on()
            while not any(worker.ended for worker in self.workers):
                self.round()
        except BaseException:
            self.stop()
            raise
        ended = [worker for worker in self.workers if worker.ended]
        self.workers = [worker for worker in self.workers if not worker.ended]
        return ended

    def round(self) -> None:
        """Do what all ask for, as much together as can be."""
        kinds = {}
        for worker in self.workers:
            kinds.setdefault(worker.asked.kind, []).append(worker)
        for workers in kinds.values():
            for worker, answer in zip(workers, answers([w.asked for w in workers]), strict=True):
                worker.go_on(answer)

    def stop(self) -> None:
        """Interrupt all: each keeps what it has, as it would alone."""
        for worker in self.workers:
            while not (worker.is_new or worker.ended):
                worker.go_on(KeyboardInterrupt())


def answers(asked: list[Asked]) -> list[list[ScoredBatch] | BaseException]:
    """What comes of each, in a batch together; where that fails, by itself: who is at fault fails alone."""
    try:
        return together(asked)
    except Exception:
        found = []
        for one in asked:
            try:
                found += together([one])
            except Exception as error:
                found.append(error)
        return found
