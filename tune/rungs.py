"""Early stopping: asynchronous successive halving over the rungs of each stage (ASHA; Li et al. 2020, "A System for
Massively Parallel Hyperparameter Tuning", Algorithm 1).

A stage may be trained up to a rung, a share of its steps, and waits there; it goes on once it is among the best of
those that came so far. Ray Tune's own scheduler has one time and one metric, and ends for good what it stops. A trial
here has two stages, of which each counts its own steps and has its own score, and a decoder's PSNR says nothing against
another encoder's. Stages are shared: what two trials have in common waits, and goes on, once. And a stage that waits
has its state on disk, so it costs nothing to be wrong about it for a while.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tune.journal import Journal
from tune.settings import EarlyStop
from tune.store import Stage

Scores = dict[str, float]
NEAR = 1e-9


class Rungs:
    """How far each stage has come, and may go. Everything is in the journal, and found there again."""

    def __init__(
        self, settings: EarlyStop | None, journal: Journal, alone: Callable[[Stage], bool] = lambda stage: False
    ) -> None:
        """`settings`: None lets every stage go to its end; `alone`: whether nobody will ever be compared with it."""
        self.journal, self._alone = journal, alone
        self.shares = settings.rungs if settings else ()
        self.reduction = settings.reduction if settings else 1.0
        self._scores: defaultdict[str, defaultdict[int, Scores]] = defaultdict(lambda: defaultdict(dict))
        self._waits: dict[str, dict[str, Any]] = {}
        self._reached: dict[str, int] = {}
        self._allowed: dict[str, int] = {}
        for event in journal.events("rung", "promoted", "stage"):
            if event["event"] == "rung":
                self._enter(event)
            elif event["event"] == "promoted":
                self._allowed[event["key"]] = sum(one < event["share"] - NEAR for one in self.shares)
            else:
                self.done(event["outcome"]["key"])

    def limit(self, stage: Stage) -> float:
        """Up to which share of its steps a stage may be trained; 1 is all of it."""
        allowed = self._allowed.get(stage.key, 0)
        return 1.0 if self._alone(stage) or allowed >= len(self.shares) else self.shares[allowed]

    def waits(self, stage: Stage) -> bool:
        """Whether a stage has come as far as it may."""
        return not self.is_done(stage.key) and self._reached.get(stage.key, -1) >= self._allowed.get(stage.key, 0)

    def is_done(self, key: str) -> bool:
        """Whether a stage is trained and measured."""
        return self._reached.get(key, -1) >= len(self.shares) + 1

    def done(self, key: str) -> None:
        """A stage is trained and measured."""
        self._reached[key] = len(self.shares) + 1

    def waiting(self) -> dict[str, dict[str, Any]]:
        """What is known of each stage that is not done, by key: the `step` and the `seconds` of its highest rung."""
        return {key: at for key, at in self._waits.items() if not self.is_done(key)}

    def arrived(self, at: Mapping[str, Any]) -> None:
        """A stage has come as far as a trial was allowed when it began: `group`, `key`, `share`, `step`, `score`,
        `seconds`. Another that shares the stage may have come there before, or farther since."""
        rung = self._rung(at["share"])
        if rung is not None and self._reached.get(at["key"], -1) < rung:
            self._enter(at)
            known = {name: at[name] for name in ("group", "key", "share", "step", "score", "seconds")}
            self.journal.add("rung", **known)

    def lost(self, stage: Stage) -> None:
        """A stage failed: the places that it has among the best are free."""
        for scores in self._scores[stage.group].values():
            scores.pop(stage.key, None)

    def promote(self) -> bool:
        """Let the best stages go on that wait, from the highest rung down; whether there were any.

        Of n that came to a rung so far, the best n / `reduction`.
        """
        found = False
        for rung in reversed(range(len(self.shares))):
            for group in self._scores.values():
                scores = group[rung]
                for key in ranked(scores)[: int(len(scores) / self.reduction)]:
                    found |= self._let_on(key, rung)
        return found

    def rescue(self, busy: Collection[str], *, one: bool = False) -> bool:
        """Once none will come any more: let the best stage of each group go on that would else have none at its end.

        busy: groups with members at work; one: of the first such group alone.
        """
        found = False
        for name, group in self._scores.items():
            highest = max((rung for rung, scores in group.items() if scores), default=None)
            if name in busy or highest is None:
                continue
            if all(self._allowed.get(key, 0) <= highest and not self.is_done(key) for key in group[highest]):
                found |= self._let_on(ranked(group[highest])[0], highest)
                if one and found:
                    break
        return found

    def _enter(self, at: Mapping[str, Any]) -> None:
        rung = self._rung(at["share"])
        if rung is not None:
            self._scores[at["group"]][rung][at["key"]] = at["score"]
            self._reached[at["key"]] = rung
        self._waits[at["key"]] = dict(at)

    def _rung(self, share: float) -> int | None:
        """The rung at a share of the steps; None where an earlier command had others."""
        return next((i for i, one in enumerate(self.shares) if abs(one - share) < NEAR), None)

    def _let_on(self, key: str, rung: int) -> bool:
        if self._allowed.get(key, 0) > rung or self.is_done(key):
            return False
        self._allowed[key] = rung + 1
        self.journal.add("promoted", key=key, share=self.shares[rung + 1] if rung + 1 < len(self.shares) else 1.0)
        return True


def ranked(scores: Scores) -> list[str]:
    """Keys, the best score first; of equal ones, by the key."""
    return sorted(scores, key=lambda key: (-scores[key], key))
