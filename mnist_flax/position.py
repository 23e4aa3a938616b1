"""Where a run stands beside its state."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mnist_flax.steps import Metrics


@dataclass(frozen=True)
class Position:
    """Epochs, sums and times so far, which every checkpoint keeps.

    Attributes:
        epoch: epochs finished.
        loss_sum, correct, count: training metrics of the epoch under way, summed over examples;
            of several seeds arrays [seeds] or, as a checkpoint gives them back, lists.
        seconds: time spent training in the epoch under way.
        compile_seconds: time spent compiling the training program, over all starts of the run.
        wall_seconds: time of the whole run, over all its starts.
    """

    epoch: int = 0
    loss_sum: ArrayLike = 0.0
    correct: ArrayLike = 0
    count: ArrayLike = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    wall_seconds: float = 0.0

    def after(self, metrics: Metrics, seconds: float) -> "Position":
        """With a finished piece of the epoch under way counted."""
        return replace(
            self,
            loss_sum=self.loss_sum + np.asarray(metrics.loss_sum, np.float64),
            correct=self.correct + np.asarray(metrics.correct, np.int64),
            count=self.count + np.asarray(metrics.count, np.int64),
            seconds=self.seconds + seconds,
        )

    def next_epoch(self) -> "Position":
        """At the beginning of the next epoch, of which nothing is counted."""
        return replace(self, epoch=self.epoch + 1, loss_sum=0.0, correct=0, count=0, seconds=0.0)

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, and `Position(**record)` takes up."""
        return {key: np.asarray(value).tolist() for key, value in asdict(self).items()}
