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
from collections.abc import Callable, Collection

from tune.journal import Journal
from tune.settings import EarlyStop
from tune.store import Stage

Scores = dict[str, float]


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
        self._steps: dict[str, int] = {}
        self._reached: dict[str, int] = {}
        self._allowed: dict[str, int] = {}
        for event in journal.events("rung", "promoted", "stage"):
            if event["event"] == "rung":
                self._enter(event["group"], event["key"], event["rung"], event["score"], event["step"])
            elif event["event"] == "promoted":
                self._allowed[event["key"]] = event["rung"]
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

    def steps(self, key: str) -> int:
        """At which step a stage waits."""
        return self._steps.get(key, 0)

    def arrived(self, group: str, key: str, step: int, score: float) -> None:
        """A stage has come as far as it may."""
        rung = self._allowed.get(key, 0)
        if self._reached.get(key, -1) < rung:
            self._enter(group, key, rung, score, step)
            self.journal.add("rung", group=group, key=key, rung=rung, step=step, score=score)

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

    def rescue(self, busy: Collection[str]) -> bool:
        """Once none will come any more: let the best stage of each group go on that would else have none at its end.

        busy: groups with members at work.
        """
        found = False
        for name, group in self._scores.items():
            highest = max((rung for rung, scores in group.items() if scores), default=None)
            if name in busy or highest is None:
                continue
            if all(self._allowed.get(key, 0) <= highest and not self.is_done(key) for key in group[highest]):
                found |= self._let_on(ranked(group[highest])[0], highest)
        return found

    def _enter(self, group: str, key: str, rung: int, score: float, step: int) -> None:
        self._scores[group][rung][key] = score
        self._reached[key], self._steps[key] = rung, step

    def _let_on(self, key: str, rung: int) -> bool:
        if self._allowed.get(key, 0) > rung or self.is_done(key):
            return False
        self._allowed[key] = rung + 1
        self.journal.add("promoted", key=key, rung=rung + 1)
        return True


def ranked(scores: Scores) -> list[str]:
    """Keys, the best score first; of equal ones, by the key."""
    return sorted(scores, key=lambda key: (-scores[key], key))
