"""Warn about anomalies in unattended runs: unusual gradients, and latents that die.

    grad_norm     the norm is more than `run.alarm_grad_norm` times the median of the last 100
                  finite norms
    dead          the share of dead latents has exceeded `run.alarm_dead`
    dead_growth   the share has risen by more than `run.alarm_dead_growth` above its lowest value
                  since the last alarm of this type

The share of dead latents counts only after 2 x dead_after tokens: until then it rises from zero in
every run. After an alarm its type pauses for 100 steps; the next alarm says how many were held back
meanwhile. Alarms do not change training.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

from ksparse.config import Recipe

WINDOW = 100
"""Norms whose median is the usual norm."""
LEAST = 20
"""Norms that there must be before one can be unusual."""
QUIET = 100
"""Steps after an alarm in which there is no other of its type."""


class Monitor:
    """Compares each step with those before it.

    Args:
        recipe: the recipe, with the limits in its section `run`.
        past: the rows of metrics of the steps before.
    """

    def __init__(self, recipe: Recipe, past: Iterable[dict[str, Any]] = ()):
        self.options, self.from_tokens = recipe.run, 2 * recipe.dead_after
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.lowest, self.above = math.inf, False
        self.last_alarm: dict[str, int] = {}
        """Step of the last alarm, by type."""
        self.kept_back: dict[str, int] = {}
        for row in past:
            self.see(row["step"], row.get("tokens", 0), row.get("grad_norm"), row.get("dead"))

    def see(
        self, step: int, tokens: int, grad_norm: float | None, dead: float | None = None
    ) -> list[dict[str, Any]]:
        """Return the alarms of a step, as rows of alarms.jsonl.

        Args:
            step: the number of the step.
            tokens: tokens trained on so far.
            grad_norm: the norm of the gradient; None or NaN if the batch was left out.
            dead: the share of dead latents; None if it was not computed.
        """
        alarms = [
            *self._gradient(grad_norm),
            *(self._dead(dead) if dead is not None and tokens >= self.from_tokens else ()),
        ]
        rows = [
            {"step": step, "tokens": tokens, **alarm}
            for alarm in alarms
            if self._is_due(alarm["alarm"], step)
        ]
        for row in rows:
            row["kept_back"] = self.kept_back.pop(row["alarm"], 0)
        return rows

    def _gradient(self, norm: float | None) -> Iterable[dict[str, Any]]:
        if norm is None or not math.isfinite(norm):
            return
        usual = statistics.median(self.norms) if len(self.norms) >= LEAST else math.inf
        self.norms.append(norm)
        if self.options.alarm_grad_norm and norm > self.options.alarm_grad_norm * usual:
            yield {
                "alarm": "grad_norm",
                "value": norm,
                "limit": self.options.alarm_grad_norm * usual,
                "says": f"the gradient's norm is {norm:.3g}, {norm / max(usual, 1e-300):,.0f} "
                f"times its usual {usual:.3g}; if this goes on, a smaller optim.lr or "
                "optim.clip = 1 may help",
            }

    def _dead(self, share: float) -> Iterable[dict[str, Any]]:
        limit, growth = self.options.alarm_dead, self.options.alarm_dead_growth
        above, self.above = self.above, bool(limit) and share > limit
        if self.above and not above:
            yield {
                "alarm": "dead",
                "value": share,
                "limit": limit,
                "says": f"{share:.0%} of the latents are dead, more than {limit:.0%}; a larger "
                "sae.k_aux, a lower optim.lr or fewer latents may help",
            }
        self.lowest = min(self.lowest, share)
        if growth and share > self.lowest + growth:
            yield {
                "alarm": "dead_growth",
                "value": share,
                "limit": self.lowest + growth,
                "says": "the share of dead latents has risen "
                f"from {self.lowest:.0%} to {share:.0%}",
            }
            self.lowest = share

    def _is_due(self, alarm: str, step: int) -> bool:
        """Return whether an alarm is given; count it if it is held back."""
        if step - self.last_alarm.get(alarm, -QUIET) < QUIET:
            self.kept_back[alarm] = self.kept_back.get(alarm, 0) + 1
            return False
        self.last_alarm[alarm] = step
        return True
