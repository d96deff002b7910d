"""What a deployment with a teacher on call costs: counts, and the price that a deployer makes of them."""

from __future__ import annotations

from dataclasses import dataclass

from agents.rollout import Rollout


@dataclass(frozen=True)
class Prices:
    """The prices of a deployment, in any unit; by default that of a position which the teacher processes.

    The defaults are a guess at API prices: a written token costs four times one that is read, a position in a prefix
    cache a tenth, and the student a tenth of its teacher.
    """

    processed: float = 1.0
    cached: float = 0.1
    written: float = 4.0
    call: float = 0.0
    student: float = 0.1


@dataclass(frozen=True)
class Usage:
    """What completions used, summed. The first four are the teacher's, see `agents.rollout.RolloutCost`."""

    written: int  # tokens that the teacher wrote
    processed: int  # positions that it processed, each prefix once
    reprocessed: int  # the same if every call processes its prefix again
    scored: int  # positions at which its distribution was computed
    calls: int
    student: int  # positions that the student processed, those of rejected drafts included

    @classmethod
    def of(cls, rollout: Rollout) -> Usage:
        cost, length = rollout.cost, rollout.mask.sum()
        prompts = sum(len(prompt.ids) for prompt in rollout.prompts)
        student = 0 if cost.drafted == 0 else prompts + int(length) + cost.wasted
        return cls(cost.teacher_tokens, cost.processed, cost.reprocessed, cost.scored, cost.calls, student)

    def price(self, prices: Prices, prefix_cache: bool = True) -> float:
        """The price of all of it.

        Args:
            prices: of each part.
            prefix_cache: whether the server keeps prefixes between calls; it then reads them at the price of `cached`.
        """
        again = self.reprocessed - self.processed
        return (
            prices.written * self.written
            + prices.processed * self.processed
            + (prices.cached if prefix_cache else prices.processed) * again
            + prices.call * self.calls
            + prices.student * self.student
        )
