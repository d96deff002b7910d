"""Tables: forks that share weights and nothing else."""

from __future__ import annotations

import pytest
import torch

from distill_env.models.tabular import TabularModel, markov, one_mode, two_modes


def test_forks_share_weights_but_not_rows() -> None:
    """Whatever a fork does, the original goes on as if it were alone."""
    model, alone = markov(5, order=2), markov(5, order=2)
    for m in (model, alone):
        m.start([[0], [1], [2]])
        m.extend(torch.tensor([[1], [2], [3]]))
    fork = model.fork()
    with pytest.raises(IndexError):  # it has no rows yet, the original's least of all
        fork.start([[2]], rows=[1])
    fork.start([[3], [3], [3]])
    fork.extend(torch.tensor([[0, 0, 0]] * 3))
    fork.start([[2]], rows=[1])
    block = torch.tensor([[2, 0], [0, 1], [1, 1]])
    assert torch.equal(model.extend(block), alone.extend(block))
    with torch.no_grad():
        model.table.mul_(2)
    assert torch.equal(fork.table, model.table)


def test_a_saved_table_comes_back_as_what_it_was(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for name, model in {"markov": markov(4), "two": two_modes(), "one": one_mode()}.items():
        model.save_pretrained(tmp_path / name)
        again = TabularModel.load(tmp_path / name)
        assert type(again) is type(model)
        assert torch.equal(again.log_table(), model.log_table())
        assert again.eos_token_id == model.eos_token_id
