"""Early stopping: asynchronous successive halving over the rungs of each stage (ASHA; Li et al. 2020, "A System for
Massively Parallel Hyperparameter Tuning", its stopping form).

Ray Tune's own scheduler has one time and one metric. A trial here has two stages, of which each counts its own steps
and has its own score; a decoder's PSNR says nothing against another encoder's. And stages are shared: what two trials
have in common is compared once, with the same verdict for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tune.journal import Journal
from tune.settings import EarlyStop


@dataclass
class Rung:
    """Who has come so far, with which score."""

    scores: dict[str, float] = field(default_factory=dict)
    """By the stage's key."""
    kept: dict[str, bool] = field(default_factory=dict)

    def judge(self, key: str, score: float, reduction: float) -> bool:
        """Whether the stage goes on: it is among the best 1 / `reduction` of those that have been here."""
        if key not in self.kept:
            others = list(self.scores.values())
            self.kept[key] = not others or score >= np.percentile(others, 100 * (1 - 1 / reduction))
            self.scores[key] = score
        return self.kept[key]


class Rungs:
    """Every rung of every group of comparable stages."""

    def __init__(self, settings: EarlyStop, journal: Journal) -> None:
        """`journal`: what was judged before is judged alike."""
        self.settings, self.journal = settings, journal
        self._rungs: dict[tuple[str, str, int], Rung] = {}
        for event in journal.events("rung"):
            rung = self._rung(event["stage"], event["group"], event["rung"])
            rung.scores[event["key"]], rung.kept[event["key"]] = event["score"], event["kept"]

    def goes_on(self, result: Mapping[str, Any]) -> bool:
        """Whether a stage whose look at held-out images this is may go on; its end is no rung."""
        shares = self.settings.rungs
        reached = [i for i, share in enumerate(shares) if result["step"] >= share * result["steps"] - 1e-6]
        if not reached or result["step"] >= result["steps"] or result.get("score") is None:
            return True
        number = reached[-1]
        rung = self._rung(result["stage"], result["group"], number)
        known = result["key"] in rung.kept
        kept = rung.judge(result["key"], float(result["score"]), self.settings.reduction)
        if not known:
            told = {name: result[name] for name in ("stage", "group", "key", "step", "score")}
            self.journal.add("rung", **told, rung=number, kept=bool(kept))
        return bool(kept)

    def _rung(self, stage: str, group: str, number: int) -> Rung:
        return self._rungs.setdefault((stage, group, number), Rung())


class StageASHA(FIFOScheduler):
    """The rungs as a scheduler of Ray Tune's."""

    def __init__(self, rungs: Rungs) -> None:
        super().__init__()
        self.rungs = rungs

    def __reduce__(self) -> Any:  # Ray Tune keeps a copy of everything, to restore what we do not let it restore
        return dict, ()

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Stop a trial whose stage lags behind."""
        if "stage" in result and not self.rungs.goes_on(result):
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE
