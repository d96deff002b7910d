"""The perplexity of a corpus under the models of a run, read as their tokenizer reads a text."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from distill_env.models.causal_lm import CausalLM
from distill_env.models.toy import toy_tokenizer
from experiments.running.corpus import corpus_perplexities
from experiments.running.flags import parse
from tests.helpers.random_walks import alone
from tests.helpers.tiny_models import EOS, IDS, flags, move_ids, write_model, write_prompts


def test_a_corpus_begins_with_what_the_tokenizer_puts_before_a_text(tmp_path: Path) -> None:
    pair = write_model(tmp_path / "t", 1, rows=24), write_model(tmp_path / "s", 2, rows=17)
    tokenizer = toy_tokenizer("sums")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    for folder in pair:
        tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("7+2+9=99;98;")
    run = parse([*flags(*pair, write_prompts(tmp_path)), "--out", str(tmp_path)])
    agent = SimpleNamespace(student=CausalLM.load(pair[1], vocab_size=IDS))
    metrics = corpus_perplexities(run, agent, str(tmp_path / "text.txt"), 0, 32, 8, Console(quiet=True))
    ids = tokenizer("7+2+9=99;98;")["input_ids"]
    assert metrics["tokens"] == len(ids) - 1
    for name, model in (("teacher", CausalLM.load(pair[0]).model), ("after", agent.student.model)):
        log_probs = alone(model, ids, IDS)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
        assert math.log(metrics[name]) == pytest.approx(-float(log_probs.mean()), rel=1e-4)


def test_a_corpus_with_a_token_that_the_models_do_not_have(tmp_path: Path) -> None:
    pair = write_model(tmp_path / "t", 1), write_model(tmp_path / "s", 2)
    for folder in pair:
        move_ids(folder, _x=IDS)
    (tmp_path / "text.txt").write_text("7+x")
    run = parse([*flags(*pair, write_prompts(tmp_path)), "--out", str(tmp_path)])
    agent = SimpleNamespace(student=CausalLM.load(pair[1]))
    with pytest.raises(ValueError, match=r"corpus: .*'x'"):
        corpus_perplexities(run, agent, str(tmp_path / "text.txt"), 0, 32, 8, Console(quiet=True))
