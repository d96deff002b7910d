"""Every causal language model type of the installed Transformers, built small: exact in any history, or refused.

    pytest -m slow -rs tests/distill_env/models/test_every_model.py

`-rs` lists the types that are refused, and those that this file cannot build, each with the reason.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distill_env.models.causal_lm import CausalLM
from tests.helpers.random_walks import RandomWalk
from tests.helpers.small_models import CONTEXT, ROPE_TYPES, small_config, small_model, with_rope

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CLOSE = 1e-3  # total variation of a distribution, float32


def built(config: Any) -> Any:
    """The model; skips a configuration that Transformers cannot build small or run."""
    try:
        model = small_model(config)
        model(input_ids=model.dummy_inputs["input_ids"][:, :3] % 8, use_cache=False)
    except Exception as error:  # whatever a model of somebody else's raises
        pytest.skip(f"not built: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160])
    return model


def check(config: Any) -> None:
    """Ragged rows, junk drafts, rewinds and restarts, up to the limit and so across every border below it."""
    model = built(config)
    try:
        lm = CausalLM(model, eos_token_id=1)
    except ValueError as error:
        if "\n" in str(error):
            raise
        pytest.skip(f"refused: {error}"[:160])
    longest = min(lm.max_length or CONTEXT, CONTEXT)
    for seed, overhead in enumerate((lm.pass_overhead, 10**6)):  # rows grouped by length, and all in one pass
        lm.pass_overhead = overhead
        assert RandomWalk(lm, seed, longest, prompt=longest - 2).run(60).total_variation < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("fill", [True, False], ids=["filled", "default"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_is_exact_or_refused(model_type: str, fill: bool) -> None:
    try:
        config = small_config(model_type, fill)
    except Exception as error:
        pytest.skip(f"not built: {type(error).__name__}"[:160])
    check(config)


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPE_TYPES)
@pytest.mark.parametrize("model_type", TYPES)
def test_positions_that_depend_on_the_length_of_the_pass(model_type: str, rope: str) -> None:
    try:
        config = with_rope(model_type, rope)
    except Exception as error:
        pytest.skip(f"not built: {type(error).__name__}"[:160])
    if config is None:
        pytest.skip("no rotary positions")
    check(config)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mamba"])
def test_a_few_of_them(model_type: str) -> None:
    """What stays of the sweep in the default run: a plain model, one with windows, and one that is refused."""
    model = built(small_config(model_type))
    if model_type == "mamba":
        with pytest.raises(ValueError, match=r"^model: "):
            CausalLM(model, eos_token_id=1)
        return
    lm = CausalLM(model, eos_token_id=1)
    assert RandomWalk(lm, 0, CONTEXT, prompt=CONTEXT - 2).run(30).total_variation < CLOSE
