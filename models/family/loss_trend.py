"""How fast a model still learns: the slope of its training loss over the logarithm of its tokens.

A loss that falls as a power of the tokens D, L = E + A D^-a, has the slope dL / d ln D = -a A D^-a:
what a model gains by e times the tokens, which falls as it learns. A small model is left where it
gains little. That stages end by the slope of the loss is Shen et al.'s (arXiv:2203.06211, section
4, of the slope over compute); this formula, its window and its margin are ours. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

MOST_BLOCKS = 64
LEAST_BLOCKS = 8
ERRORS = 2.0
"""Standard errors that the fall must lie below the threshold by: losses of few sequences scatter,
and a slope that is small by chance must not end a stage."""


class Slope(NamedTuple):
    """A line through means of losses, by least squares.

    Attributes:
        fall: nats that the loss falls by for each unit of ln(tokens).
        error: its standard error, from what scatters about the line.
        blocks: means that the line goes through.
    """

    fall: float
    error: float
    blocks: int

    def below(self, threshold: float) -> bool:
        """Return whether the loss falls by less than `threshold`, beyond what is chance."""
        return self.fall + ERRORS * self.error < threshold


class LossTrend:
    """The training losses of one stage, in at most 64 blocks of equally many steps.

    When there are 64, neighbours become one, so that what is kept does not grow with the run. The
    line goes through the blocks since half of the stage's tokens: the last doubling.

    Args:
        block_steps: steps in a block at first.
    """

    def __init__(self, block_steps: int = 1) -> None:
        self.block_steps = block_steps
        self.steps = 0  # in the block that fills
        self.filling = [0.0, 0.0, 0.0]  # losses, ln(tokens), how many
        self.blocks: list[list[float]] = []
        """Of each full block: tokens of the stage at its end, mean loss, mean ln(tokens)."""

    def add(self, tokens: int, loss: float | None) -> bool:
        """Take the loss of a step; return whether it filled a block.

        Args:
            tokens: of the stage, this step's among them.
            loss: nats; None for a step that was left out.
        """
        self.steps += 1
        if loss is not None and math.isfinite(loss):
            parts = (loss, math.log(tokens), 1.0)
            self.filling = [a + b for a, b in zip(self.filling, parts, strict=True)]
        if self.steps < self.block_steps:
            return False
        losses, logs, number = self.filling
        if number:
            self.blocks.append([float(tokens), losses / number, logs / number])
        self.steps, self.filling = 0, [0.0, 0.0, 0.0]
        if len(self.blocks) == MOST_BLOCKS:
            pairs = zip(self.blocks[::2], self.blocks[1::2], strict=True)
            self.blocks = [[b[0], (a[1] + b[1]) / 2, (a[2] + b[2]) / 2] for a, b in pairs]
            self.block_steps *= 2
        return True

    def slope(self) -> Slope | None:
        """Return the slope over the last doubling of the tokens; None with too few blocks."""
        if not self.blocks:
            return None
        half = self.blocks[-1][0] / 2
        points = [(log, loss) for tokens, loss, log in self.blocks if tokens > half]
        n = len(points)
        if n < LEAST_BLOCKS:
            return None
        mean_x, mean_y = (math.fsum(p[at] for p in points) / n for at in (0, 1))
        spread = math.fsum((x - mean_x) ** 2 for x, _ in points)
        slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread
        left = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
        return Slope(-slope, math.sqrt(left / (n - 2) / spread), n)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep for the same decisions after a restart."""
        return {
            "block_steps": self.block_steps,
            "steps": self.steps,
            "filling": list(self.filling),
            "blocks": [list(block) for block in self.blocks],
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> LossTrend:
        """Return the trend that a checkpoint keeps."""
        found = cls(int(state["block_steps"]))
        found.steps, found.filling = int(state["steps"]), list(map(float, state["filling"]))
        found.blocks = [list(map(float, block)) for block in state["blocks"]]
        return found
