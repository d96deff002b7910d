"""The completions that are being written: their tokens, who wrote each, and the keys of their episodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill_env.ragged import PAD, Bools, Ints, row_and_column, slice_rows
from distill_env.randomness import Purpose, episode_key, episode_keys, uniform, uniform_number
from distill_env.rules import has_ended
from distill_env.tasks.base import Prompt


class CompletionBatch:
    """n rows, each a prompt and the completion written after it so far.

    Args:
        num_rows: n.
        prompts: what `begin` draws from.
        max_prompt_length: of any prompt that a row may hold, in tokens.
        max_new_tokens: at which a completion ends.
        eos_token_id: the token with which it ends earlier.

    Attributes:
        ids: int64 [n, T], prompt and completion, padded on the right with -1; T is the sum of both largest lengths.
        rewritten: bool [n, T], which of these tokens the teacher wrote.
        rewards: float64 [n, T], what each token of the completion paid, nats.
        prompts: `Prompt` [n].
        prompt_lengths: int64 [n].
        lengths: int64 [n], tokens of the completion.
        keys: uint64 [n], from which all randomness of the episode follows.
        ended: bool [n], whether the completion has ended; True before the first `begin`.
        changes: calls of `begin` and `append`, but not of `begin_next` and `append_one`, whose caller knows the row.
    """

    def __init__(
        self, num_rows: int, prompts: Sequence[Prompt], max_prompt_length: int, max_new_tokens: int, eos_token_id: int
    ) -> None:
        self.max_new_tokens, self.eos_token_id = max_new_tokens, eos_token_id
        self.ids = np.full((num_rows, max_prompt_length + max_new_tokens), PAD, np.int64)
        self.rewritten = np.zeros(self.ids.shape, np.bool_)
        self.rewards = np.zeros(self.ids.shape)
        self.prompts = np.full(num_rows, prompts[0], object)
        self.prompt_lengths, self.lengths, self._episodes = np.zeros((3, num_rows), np.int64)
        self.keys, self._seeds = np.zeros((2, num_rows), np.uint64)
        self.ended = np.ones(num_rows, np.bool_)
        self.changes = 0
        self._prompt_array, self._prompt_ids = _as_array(prompts), _flatten(prompts)

    def __len__(self) -> int:
        return len(self.ids)

    def seed(self, row: int, seed: int) -> None:
        """Begin the row's stream of episodes anew: 0 <= seed < 2**64."""
        self._seeds[row], self._episodes[row] = seed, 0

    def begin(
        self, rows: Ints, prompts: Sequence[Prompt] | None = None, keys: NDArray[np.uint64] | None = None
    ) -> None:
        """Start the next episode of `rows` with these prompts and keys, [len(rows)], or those that the seed gives."""
        self.changes += 1
        if keys is None:
            keys = episode_keys(self._seeds[rows], self._episodes[rows])
        if prompts is None:
            index = (uniform(keys, 0, Purpose.PROMPT) * len(self._prompt_array)).astype(np.int64)
            chosen, (ids, starts, lengths) = self._prompt_array[index], self._prompt_ids
            starts, lengths = starts[index], lengths[index]
        else:
            chosen, (ids, starts, lengths) = _as_array(prompts), _flatten(prompts)
        self.keys[rows] = keys
        self._episodes[rows] += 1
        row, column = row_and_column(lengths)
        self.ids[rows] = PAD
        self.ids[rows[row], column] = ids[starts[row] + column]
        self.rewritten[rows], self.rewards[rows] = False, 0.0
        self.prompts[rows] = chosen
        self.prompt_lengths[rows] = lengths
        self.lengths[rows] = 0
        self.ended[rows] = False

    def append(self, tokens: Ints, counts: Ints, rewritten: Bools, rewards: NDArray[np.float64]) -> None:
        """Append the first `counts[i]` of row i's tokens [n, k], written by the teacher where `rewritten` [n, k]."""
        self.changes += 1
        rows, columns = row_and_column(counts)
        place = (self.prompt_lengths + self.lengths)[rows] + columns
        self.ids[rows, place] = tokens[rows, columns]
        self.rewritten[rows, place] = rewritten[rows, columns]
        self.rewards[rows, place] = rewards[rows, columns]
        self.lengths = self.lengths + counts
        at_end = has_ended(self.last_tokens(), self.lengths, self.eos_token_id, self.max_new_tokens)
        self.ended |= (counts > 0) & at_end

    def begin_next(self, row: int) -> None:
        """`begin` of one row with what its seed gives."""
        key = episode_key(int(self._seeds[row]), int(self._episodes[row]))
        index = int(uniform_number(key, 0, Purpose.PROMPT) * len(self._prompt_array))
        ids, starts, lengths = self._prompt_ids
        start, length = int(starts[index]), int(lengths[index])
        self.keys[row] = key
        self._episodes[row] += 1
        self.ids[row] = PAD
        self.ids[row, :length] = ids[start : start + length]
        self.rewritten[row], self.rewards[row] = False, 0.0
        self.prompts[row] = self._prompt_array[index]
        self.prompt_lengths[row], self.lengths[row], self.ended[row] = length, 0, False

    def append_one(self, row: int, token: int, rewritten: bool, reward: float) -> bool:
        """`append` of one token to one row; whether its completion has ended."""
        length = int(self.lengths[row]) + 1
        place = int(self.prompt_lengths[row]) + length - 1
        self.ids[row, place], self.rewritten[row, place], self.rewards[row, place] = token, rewritten, reward
        self.lengths[row] = length
        ended = has_ended(token, length, self.eos_token_id, self.max_new_tokens)
        self.ended[row] = ended
        return bool(ended)

    def last_tokens(self) -> Ints:
        """The last token of each row, [n]: of its completion, or of its prompt while that is empty."""
        return self.ids[np.arange(len(self)), self.prompt_lengths + self.lengths - 1]

    def tokens_from(self, start: Ints) -> Ints:
        """The tokens of each completion from number `start[i]` on, left-aligned and padded, [n, w]."""
        return slice_rows(self.ids, self.prompt_lengths + start, self.prompt_lengths + self.lengths)

    def completion(self, row: int) -> tuple[list[int], list[bool]]:
        """The tokens of a row's completion, and which of them the teacher wrote."""
        part = self._part(row)
        return self.ids[row, part].tolist(), self.rewritten[row, part].tolist()

    def token_rewards(self, row: int) -> list[float]:
        """What each token of a row's completion paid, nats."""
        return self.rewards[row, self._part(row)].tolist()

    def _part(self, row: int) -> slice:
        start = self.prompt_lengths[row]
        return slice(start, start + self.lengths[row])


def _as_array(prompts: Sequence[Prompt]) -> NDArray[np.object_]:
    array = np.empty(len(prompts), object)
    array[:] = prompts
    return array


def _flatten(prompts: Sequence[Prompt]) -> tuple[Ints, Ints, Ints]:
    """The ids of all prompts in one array, where each prompt begins in it, and how long it is."""
    lengths = np.array([len(p.ids) for p in prompts], np.int64)
    ids = np.fromiter((t for p in prompts for t in p.ids), np.int64, int(lengths.sum()))
    return ids, lengths.cumsum() - lengths, lengths
