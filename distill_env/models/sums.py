"""The models of Sums: the shape of teacher and student, the tokenizer, and where the shipped teacher lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill_env.tasks.sums import EOS, SYMBOLS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TEACHER_PATH = Path(__file__).parents[1] / "data" / "sums_teacher"


def sums_llama(width: int, layers: int, mlp: int | None = None) -> LlamaForCausalLM:
    """A Llama of the vocabulary of Sums with fresh weights, drawn from torch's global generator.

    Args:
        width: hidden width, a multiple of 4 (of 8 from 64 on, where it has four heads instead of two).
        layers: number of layers.
        mlp: width of the feed-forward layers; twice the hidden width if None.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SYMBOLS) + 1,
            hidden_size=width,
            intermediate_size=mlp or 2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4 if width >= 64 else 2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
    )


def sums_tokenizer() -> PreTrainedTokenizerFast:
    """One token a symbol, as the task encodes them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
