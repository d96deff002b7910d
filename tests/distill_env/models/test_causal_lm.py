"""CausalLM: whatever is started, extended and rewound, its log-probabilities are those of each row alone, uncached."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill_env.divergence import reverse_kl
from distill_env.models.causal_lm import CausalLM
from distill_env.models.toy import small_teacher, toy_student
from tests.helpers.random_walks import RandomWalk, alone
from tests.helpers.small_models import small_config, small_model

V, CONTEXT, EOS = 40, 48, 1
SIZES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2": {"num_key_value_heads": 2},
    "GPT2": {},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: str, dtype: torch.dtype = torch.float64, **extra: Any) -> Any:
    """A small random model whose distributions are far from uniform, so that every mistake shows."""
    options: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    options |= {"intermediate_size": 64} if kind != "GPT2" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options, **SIZES.get(kind, {"num_key_value_heads": 2}) | extra)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


@contextmanager
def batch_sizes(model: Any) -> Iterator[list[int]]:
    """Collects the number of rows of every forward pass."""
    seen: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield seen
    hook.remove()


def random_walk(model: Any, seed: int, operations: int, pass_overhead: int = 2) -> float:
    """The largest difference from the oracle in a random history."""
    lm = CausalLM(model)
    lm.pass_overhead = pass_overhead
    return RandomWalk(lm, seed, lm.max_length or CONTEXT).run(operations).log_prob


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_history_gives_the_log_probs_of_each_row_alone(kind: str, seed: int) -> None:
    assert random_walk(build(kind), seed, operations=120) < 1e-9


def test_any_history_of_rows_that_share_every_pass() -> None:
    assert random_walk(build("Llama"), 4, operations=60, pass_overhead=10**6) < 1e-9


def test_any_history_in_float32() -> None:
    assert random_walk(build("Llama", torch.float32), 2, operations=60) < 1e-4


def test_any_history_with_eager_attention() -> None:
    # GPT-2's eager softmax works in the model's own precision, Llama's in float32
    assert random_walk(build("GPT2", attn_implementation="eager"), 3, operations=60) < 1e-9


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("pass_overhead", [0, 5, 10**6])
def test_features_and_head_equal_start_and_extend(kind: str, pass_overhead: int) -> None:
    model = build(kind)
    lm = CausalLM(model)
    lm.pass_overhead = pass_overhead
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    tokens = torch.tensor([[20, 21, -1, -1], [22, 23, 24, 25], [26, -1, -1, -1]])
    first, after = lm.start(prompts), lm.extend(tokens)
    states = torch.cat([first[:, None], after[:, :-1]], 1)  # [n, T, V], where each token was chosen
    # the last token of a row is chosen from a state, too, and padding is in nobody's way
    masks = [tokens >= 0, torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).bool(), torch.zeros(3, 4).bool()]
    for mask in masks:
        log_probs = lm.head(lm.features(prompts, tokens, mask))
        assert log_probs.shape == (int(mask.sum()), V)
        torch.testing.assert_close(log_probs.detach(), states[mask], rtol=0, atol=1e-9)


def test_gradient_of_features_and_head_is_that_of_the_whole_model() -> None:
    model = build("Llama")  # tied embeddings: the head's gradient has to reach them as well
    lm = CausalLM(model)
    prompt, answer = [3, 4, 5], [6, 7, EOS]
    tokens = torch.tensor([answer])
    picked = lm.head(lm.features([prompt], tokens, tokens >= 0)).gather(1, tokens.T)
    actual = torch.autograd.grad(picked.sum(), list(lm.parameters()))
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, 2:-1]
    expected = torch.autograd.grad(torch.log_softmax(logits, -1).gather(1, tokens.T).sum(), list(model.parameters()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    # what is inferred may stand in a loss as a constant
    weight = lm.start([prompt]).exp()
    (lm.head(lm.features([prompt], tokens, tokens >= 0))[:1] * weight).sum().backward()
    assert not weight.requires_grad


@pytest.mark.parametrize("habit", ["scales", "refuses"])
def test_a_model_that_computes_something_else_from_embeddings_is_given_ids(habit: str) -> None:
    """Some scale what they look up, not what they are given: training would see another model than the rollout."""
    model = build("Llama")
    forward = model.model.forward

    @functools.wraps(forward)
    def other(input_ids: Any = None, inputs_embeds: Any = None, **rest: Any) -> Any:
        if input_ids is None and habit == "refuses":
            raise ValueError("input_ids: needed")
        embeddings = inputs_embeds if input_ids is None else 3 * model.model.embed_tokens(input_ids)
        return forward(inputs_embeds=embeddings, **rest)

    model.model.forward = other
    lm = CausalLM(model)
    tokens = torch.tensor([[3, 4, 5]])
    lm.start([[2, 6]])
    expected = lm.extend(tokens)[:, :2]
    torch.testing.assert_close(
        lm.head(lm.features([[2, 6]], tokens, torch.tensor([[False, True, True]])))[None].detach(), expected
    )


def test_dropout_never_acts() -> None:
    model = build("GPT2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    lm = CausalLM(model)
    model.train()
    tokens = torch.tensor([[5, 6]])
    log_probs = lm.head(lm.features([[3, 4]], tokens, tokens >= 0)).detach()
    model.train()
    torch.testing.assert_close(log_probs[:1], lm.start([[3, 4]]))
    torch.testing.assert_close(log_probs, alone(model, [3, 4, 5])[1:])


def test_a_cut_vocabulary_is_the_softmax_of_the_cut_logits() -> None:
    model = build("Qwen2")
    lm = CausalLM(model, vocab_size=31)
    tokens = torch.tensor([[7, 8]])
    first, after = lm.start([[5, 6]]), lm.extend(tokens)
    expected = alone(model, [5, 6, 7, 8], vocab_size=31)
    torch.testing.assert_close(torch.cat([first, after[0]]), expected[1:], rtol=0, atol=1e-9)
    log_probs = lm.head(lm.features([[5, 6]], tokens, tokens >= 0))
    torch.testing.assert_close(log_probs.detach(), expected[1:3], rtol=0, atol=1e-9)


def test_ids_that_do_not_exist_have_no_probability_and_no_gradient() -> None:
    model = build("Gemma2", head_dim=8, final_logit_softcapping=5.0)
    absent = [0, 7, 30]
    lm = CausalLM(model, vocab_size=31, absent_ids=absent)
    tokens = torch.tensor([[8, 9]])
    actual = lm.head(lm.features([[5, 6]], tokens, tokens >= 0))
    masked = alone(model, [5, 6, 8], vocab_size=31)[1:].index_fill(-1, torch.tensor(absent), -torch.inf)
    torch.testing.assert_close(actual.detach(), masked.log_softmax(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(lm.start([[5, 6]])[0], actual[0].detach(), rtol=0, atol=1e-6)
    reverse_kl(actual, torch.full_like(actual, -3.0)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in lm.parameters() if p.grad is not None)
    for wrong in ([31], [-1], [EOS]):
        with pytest.raises(ValueError, match="absent_ids: "):
            CausalLM(model, vocab_size=31, absent_ids=wrong)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Gemma3Text", {"final_logit_softcapping": 2.0, "head_dim": 8, "sliding_window": 16}),
    ],
)
def test_what_a_family_does_to_its_logits_is_done(kind: str, extra: dict[str, Any]) -> None:
    model = build(kind, **extra)
    lm = CausalLM(model)
    torch.testing.assert_close(lm.start([[5, 6, 7]])[0], alone(model, [5, 6, 7])[-1], rtol=0, atol=1e-6)


def test_a_row_that_is_given_up_is_not_computed() -> None:
    model = build("Llama")
    lm = CausalLM(model)
    one = torch.full((4, 1), 7)
    with batch_sizes(model) as seen:
        lm.start([[2], [3, 4], [5], [6]])
        lm.extend(one)
        lm.rewind([1, -1, 1, 1])
        lm.extend(torch.tensor([[8], [-1], [9], [9]]))
        lm.rewind([1, 1, 2, -1])
        lm.extend(torch.tensor([[8], [-1], [9], [-1]]))
        lm.rewind([-1, -1, -1, -1])
        lm.extend(torch.full((4, 2), -1))  # no row is left: no pass at all
        lm.start([[5, 6], [7]], rows=[3, 1])
        after = lm.extend(torch.tensor([[-1], [8], [-1], [9]]))
    assert seen == [4, 4, 3, 2, 2, 2]
    torch.testing.assert_close(after[1, 0], alone(model, [7, 8])[-1], rtol=0, atol=1e-9)
    torch.testing.assert_close(after[3, 0], alone(model, [5, 6, 9])[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("pass_overhead", [0, 10**6])
def test_a_prompt_that_is_there_several_times_is_read_once(pass_overhead: int) -> None:
    """Each of its rows then goes its own way, and others keep what they had."""
    model = build("Llama")
    lm = CausalLM(model)
    lm.pass_overhead = pass_overhead
    lm.start([[3], [9, 8, 7], [4], [5], [6]])
    lm.extend(torch.tensor([[2], [2], [-1], [-1], [-1]]))
    with batch_sizes(model) as seen:
        before = lm.start([[5, 6], [4], [5, 6], [5, 6]], rows=[4, 0, 2, 3])
        after = lm.extend(torch.tensor([[1], [3], [7], [8], [9]]))
    assert sum(seen) == 2 + 5
    for row, (prompt, token) in enumerate(
        zip([[4], [9, 8, 7, 2], [5, 6], [5, 6], [5, 6]], [1, 3, 7, 8, 9], strict=True)
    ):
        torch.testing.assert_close(after[row, 0], alone(model, [*prompt, token])[-1], rtol=0, atol=1e-9)
    for place, prompt in enumerate([[5, 6], [4], [5, 6], [5, 6]]):
        torch.testing.assert_close(before[place], alone(model, prompt)[-1], rtol=0, atol=1e-9)


def test_few_busy_rows_are_computed_without_the_others() -> None:
    model = build("Llama")
    lm = CausalLM(model)
    with batch_sizes(model) as seen:
        lm.start([[2], [3, 4], [5], [6]])
        lm.start([[9, 9]], rows=[1])
        after = lm.extend(torch.tensor([[-1], [8], [-1], [-1]]))
    assert seen == [4, 1, 1]
    torch.testing.assert_close(after[1, 0], alone(model, [9, 9, 8])[-1], rtol=0, atol=1e-9)


def test_forks_share_weights_but_not_rows() -> None:
    model = build("Llama")
    lm = CausalLM(model)
    lm.start([[5, 6]])
    other = lm.fork()
    with pytest.raises(ValueError, match="tokens: "):
        other.extend(torch.tensor([[10]]))
    other.start([[7], [8, 9]])
    torch.testing.assert_close(lm.extend(torch.tensor([[10]]))[0], alone(model, [5, 6, 10])[-1:], rtol=0, atol=1e-9)
    assert next(lm.parameters()) is next(other.parameters())


def test_saved_folders_load_with_plain_transformers(tmp_path: Path) -> None:
    model = build("Llama")
    lm = CausalLM(model, vocab_size=31)
    lm.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(alone(plain, [5, 6, 7]), alone(model, [5, 6, 7]), rtol=0, atol=0)
    loaded = CausalLM.load(tmp_path, vocab_size=31, dtype="float64")
    assert loaded.eos_token_id == EOS
    assert loaded.max_length == CONTEXT
    torch.testing.assert_close(loaded.start([[5, 6]]), lm.start([[5, 6]]), rtol=0, atol=1e-9)
    with torch.no_grad():
        next(loaded.parameters()).zero_()
    loaded.load_state_dict(lm.state_dict())
    torch.testing.assert_close(loaded.start([[5, 6]]), lm.start([[5, 6]]), rtol=0, atol=1e-9)


def test_parameters_are_the_trainable_ones() -> None:
    model = build("Llama")
    model.model.layers[0].requires_grad_(False)
    assert len(list(CausalLM(model).parameters())) == sum(p.requires_grad for p in model.parameters())


def test_the_context_is_a_limit_up_to_its_last_token() -> None:
    model = build("GPT2")
    lm = CausalLM(model)
    sequence = list(range(3, 3 + CONTEXT - 12)) + list(range(12))
    lm.start([sequence[:-3], [4]])
    # the first row takes its last tokens while the padding of the second block lies beyond the context
    lm.extend(torch.tensor([[sequence[-3], -1, -1], [5, 6, 7]]))
    after = lm.extend(torch.tensor([[sequence[-2], sequence[-1], -1, -1], [8, 9, 10, 11]]))
    torch.testing.assert_close(after[0, :2], alone(model, sequence)[-2:], rtol=0, atol=1e-9)
    torch.testing.assert_close(after[1], alone(model, [4, 5, 6, 7, 8, 9, 10, 11])[-4:], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"row 0 .* 45 .* 4 .* 48"):
        lm.extend(torch.tensor([[3], [3]]))
    lm.extend(torch.tensor([[-1], [3]]))  # the refused call has changed nothing
    with pytest.raises(ValueError, match=r"row 1 .* 49 "):
        lm.start([[3] * 49], rows=[1])
    mask = torch.tensor([[False, False, True, True]])
    with pytest.raises(ValueError, match=r" 47 .* 3 "):
        lm.features([[3] * 47], torch.tensor([[3, 4, 5, 6]]), mask)


WINDOWS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 6},  # in all layers
    "Gemma2": {"sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 8},  # in every second one
    "GptOss": {"sliding_window": 6, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},  # and sinks
    "Qwen3": {
        "sliding_window": 6,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "head_dim": 8,
    },  # in the upper ones
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_any_history_across_the_border_of_a_sliding_window(kind: str) -> None:
    model = build(kind, torch.float32, **WINDOWS[kind])
    assert CausalLM(model).max_length == CONTEXT
    assert random_walk(model, 5, operations=60) < 2e-3


def test_a_window_that_the_cached_pass_does_not_mask_is_a_limit() -> None:
    """As of a model whose layers read their windows when they are built."""
    model = build("Mistral", sliding_window=6)
    forward = model.model.forward

    @functools.wraps(forward)
    def other(*args: Any, **kwargs: Any) -> Any:
        model.config.sliding_window, window = 6, model.config.sliding_window
        try:
            return forward(*args, **kwargs)
        finally:
            model.config.sliding_window = window

    model.model.forward = other
    lm = CausalLM(model)
    assert lm.max_length == 6
    assert RandomWalk(lm, 6, 6, prompt=4).run(40).log_prob < 1e-9
    with pytest.raises(ValueError, match=r" 7 .* 6 together"):
        lm.start([[3] * 7])


ORIGINAL = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "original_max_position_embeddings": ORIGINAL,
}


@pytest.mark.parametrize("kind", ["Phi3", "Llama"])
def test_longrope_ends_where_its_frequencies_change(kind: str) -> None:
    more = {"original_max_position_embeddings": ORIGINAL} if kind == "Phi3" else {}
    model = build(kind, rope_parameters=LONGROPE, **more)
    lm = CausalLM(model)
    assert lm.max_length == ORIGINAL
    walk = RandomWalk(lm, 7, ORIGINAL).run(60)  # padding lies beyond the border, too
    assert walk.log_prob < 1e-5  # rotary angles are computed in float32
    with pytest.raises(ValueError, match=r" 17 .* 16 together"):
        lm.start([[3] * 17])


def test_dynamic_rope_is_exact_up_to_its_border() -> None:
    model = build("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    assert random_walk(model, 8, operations=60) < 1e-5


def test_a_model_whose_short_rows_change_beside_long_ones_is_refused() -> None:
    """By a rule of its own, which no configuration tells."""
    model = build("Llama")
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def other(x: Tensor, position_ids: Tensor) -> Any:
        cos, sin = forward(x, position_ids)
        return (cos * 1.3, sin) if int(position_ids.max()) >= CONTEXT // 2 else (cos, sin)

    rotary.forward = other
    with pytest.raises(ValueError, match=r"model: LlamaForCausalLM .* beside a row of 48 "):
        CausalLM(model)


def test_mistakes_are_named() -> None:
    lm = CausalLM(build("Llama"))
    with pytest.raises(ValueError, match="tokens: "):
        lm.extend(torch.tensor([[3]]))  # nothing has been started
    lm.start([[3], [4]])
    with pytest.raises(ValueError, match="prompts: prompt 1 "):
        lm.start([[3], []])
    with pytest.raises(ValueError, match="prompts: prompt 0 "):
        lm.start([[40]], rows=[0])
    for rows in ([2], [0, 1], [-1]):
        with pytest.raises(ValueError, match="rows: "):
            lm.start([[3]], rows=rows)
    with pytest.raises(ValueError, match="tokens: "):
        lm.extend(torch.tensor([[3, -1], [-1, 3]]))
    with pytest.raises(ValueError, match="lengths: "):
        lm.rewind([0])
    lm.rewind([0, -1])
    with pytest.raises(ValueError, match="tokens: row 1 "):
        lm.extend(torch.tensor([[3], [3]]))
    with pytest.raises(ValueError, match="mask: "):
        lm.features([[3]], torch.tensor([[3, -1]]), torch.tensor([[True, True]]))


@pytest.mark.parametrize(
    ("model_type", "kind"), [("mamba", "linear_attention"), ("lfm2", "conv"), ("qwen3_5_text", "linear_attention")]
)
def test_layers_with_a_recurrent_state_are_named(model_type: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^model: \w+ .*\({kind}\)") as error:
        CausalLM(small_model(small_config(model_type)))
    assert "\n" not in str(error.value)


def test_unsupported_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size: 41; .* 40"):
        CausalLM(build("Llama"), vocab_size=41)
    with pytest.raises(ValueError, match=r"eos_token_id: \[1, 2\]"):
        CausalLM(_with_eos(build("Llama"), [1, 2]))
    assert CausalLM(_with_eos(build("Llama"), [1, 2]), eos_token_id=2).eos_token_id == 2
    with pytest.raises(ValueError, match="model: "):
        CausalLM(build("Llama").model)
    # multiplies its logits by a number that nobody here knows of
    with pytest.raises(ValueError, match="model: HyperCLOVAXForCausalLM "):
        CausalLM(build("HyperCLOVAX", logits_scaling=4.0))
    with pytest.raises(ValueError, match="dtype: 'int8'"):
        CausalLM.load(tmp_path, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: 'abacus'"):
        CausalLM.load(tmp_path, device="abacus")
    with pytest.raises(OSError, match="name_or_path: "):
        CausalLM.load(tmp_path / "nowhere")


def _with_eos(model: Any, eos: list[int]) -> Any:
    model.config.eos_token_id = eos
    return model


def test_the_student_of_sums_knows_no_positions() -> None:
    """One layer without positions sees a set of earlier tokens: their order changes nothing; that of the teacher's
    shape, with rotary positions, does."""
    prompts = [[7, 10, 2, 10, 9, 11], [2, 10, 10, 9, 7, 11]]
    torch.manual_seed(0)
    without = CausalLM(toy_student("sums", 16, 1, 24).double()).start(prompts)
    rotary = CausalLM(small_teacher("sums", 16, 1).double()).start(prompts)
    torch.testing.assert_close(without[0], without[1], rtol=0, atol=1e-12)
    assert float((rotary[0] - rotary[1]).abs().max()) > 1e-6


def test_a_reserved_cache_stays_where_it_is() -> None:
    """While rows grow, are cut back, given up and started again; without it the cache moves."""
    moved = {}
    for reserved in (0, 24):
        lm = CausalLM(build("Llama", torch.float32))
        lm.reserve(reserved)
        lm.start([(1, 2), (3,), (4, 5, 6)])
        places = set()
        for i in range(6):
            lm.extend(torch.tensor([[1, 2, 3], [4, -1, -1], [5, 6, -1]]))
            lm.rewind([2 * i, i, -1])
            lm.start([(7, 8)], [2])
            places.add(tuple(b.data_ptr() for buffers in lm._cache.buffers.values() for b in buffers))
        moved[reserved] = len(places)
    assert moved[0] > 1 == moved[24]
