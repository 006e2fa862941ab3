"""What is not well with a run although its numbers are finite: spikes of the loss, experts that nothing reaches.

Shapes: R routers, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

# A spike is a loss this many times as far above the median of the last losses as these usually lie from it, and so much
# more than the median. Fewer losses say nothing.
_WINDOW, _FEWEST, _TIMES, _MORE = 50, 20, 6.0, 1.5
# Rows of load that are looked at together. An expert below this share of an even load is dead. A router is collapsed
# where all but as many experts as a token has are dead.
_ROWS, _DEAD = 20, 0.01


class Health:
    """Counts, and says once in a while what to change. The main rank's words are printed.

    Args:
        routers: R names; none for methods without routers.
        active: experts that each token has.
        tell: prints a line.

    Attributes:
        loss_spikes, nonfinite_steps: since the start of this process.
        dead_experts, collapsed_routers: over all routers, in the last rows of load.
    """

    def __init__(self, routers: Sequence[str], active: int, tell: Callable[[str], None]) -> None:
        self._routers, self._active, self._tell = routers, active, tell
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._loads: deque[Tensor] = deque(maxlen=_ROWS)
        self._said: set[str] = set()
        self.loss_spikes = self.nonfinite_steps = self.dead_experts = self.collapsed_routers = 0

    def add_loss(self, step: int, loss: float) -> None:
        """Take the loss of a step, counted from 1."""
        known = self._losses
        if len(known) >= _FEWEST:
            middle = median(known)
            usual = median(abs(one - middle) for one in known)
            if loss > middle + max(_TIMES * usual, (_MORE - 1) * abs(middle)):
                self.loss_spikes += 1
                self._say(
                    "spike",
                    f"step {step}: the loss is {loss:.4g}, where the median of the last {len(known)} steps is "
                    f"{middle:.4g}; if that happens often, lower training.learning_rate, raise warmup_steps, or set "
                    "max_grad_norm",
                )
        known.append(loss)

    def add_load(self, step: int, load_RE: Tensor) -> None:
        """Take where the tokens of a step went.

        Args:
            step: counted from 1.
            load_RE: top-k assignments over all ranks.
        """
        self._loads.append(load_RE.detach().cpu())
        experts = load_RE.shape[1]
        if len(self._loads) < _ROWS or experts <= self._active:
            return
        total_RE = torch.stack(list(self._loads)).sum(dim=0)
        share_RE = total_RE / total_RE.sum(dim=1, keepdim=True).clamp(min=1)
        dead_R = (share_RE < _DEAD / experts).sum(dim=1)
        self.dead_experts = int(dead_R.sum())
        collapsed_R = dead_R >= experts - self._active
        self.collapsed_routers = int(collapsed_R.sum())
        if self.collapsed_routers:
            self._say_of(step, collapsed_R, "sends nearly all tokens to the same experts")
        elif self.dead_experts:
            self._say_of(step, dead_R > 0, "sends next to no tokens to some of its experts")

    def row(self) -> dict[str, float]:
        """Counts for a row of metrics; what is 0 is left out."""
        names = ("loss_spikes", "nonfinite_steps", "dead_experts", "collapsed_routers")
        return {f"health/{name}": float(getattr(self, name)) for name in names if getattr(self, name)}

    def _say_of(self, step: int, which_R: Tensor, what: str) -> None:
        first, count = self._routers[int(which_R.nonzero()[0])], int(which_R.sum())
        self._say(
            what,
            f"step {step}: router {first} {what} ({count} of {len(self._routers)} routers do, over the last {_ROWS} "
            "logged steps); raise adapters.balance_weight, lower num_experts, or check that profiles differ",
        )

    def _say(self, key: str, line: str) -> None:
        """Each kind once."""
        if key not in self._said:
            self._said.add(key)
            self._tell(f"warning: {line}")
