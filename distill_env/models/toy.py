"""The models of the small tasks: shapes of teacher and student, their tokenizer, folders of the shipped teachers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill_env.tasks.coins import CoinsTask
from distill_env.tasks.sums import SumsTask

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, SmolLM3ForCausalLM

# the texts of the ids 0, 1, ...; the id after the last one is the end token
SYMBOLS = {task.name: task.symbols for task in (SumsTask, CoinsTask)}
TEACHERS = {name: Path(__file__).parents[1] / "data" / f"{name}_teacher" for name in SYMBOLS}


def small_teacher(task: str, width: int, layers: int) -> LlamaForCausalLM:
    """A teacher: a Llama over the task's vocabulary with new weights, from torch's global generator.

    Args:
        task: `sums` or `coins`.
        width: hidden width, a multiple of 4 (of 8 from 64 on, where it has four heads instead of two).
        layers: number of layers.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    eos = len(SYMBOLS[task])
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=eos + 1,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4 if width >= 64 else 2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def toy_student(task: str, width: int, layers: int, mlp: int) -> SmolLM3ForCausalLM:
    """A student: like the teacher, but with no position embedding in any layer.

    Trained on 2 to 5 digits of Sums, students of this size with rotary positions had hardly any correct chain at 6
    digits; without them they generalise to longer problems (Kazemnejad et al. 2023, "The Impact of Positional Encoding
    on Length Generalization", 2305.19466).

    Args:
        task: `sums` or `coins`.
        width: hidden width, a multiple of 4.
        layers: number of layers.
        mlp: width of the feed-forward layers.
    """
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    eos = len(SYMBOLS[task])
    return SmolLM3ForCausalLM(
        SmolLM3Config(
            vocab_size=eos + 1,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            no_rope_layers=[0] * layers,  # 0: this layer has no rotary positions
            use_sliding_window=False,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def toy_tokenizer(task: str) -> PreTrainedTokenizerFast:
    """One token per symbol, as the task encodes them; spaces have no meaning."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = SYMBOLS[task]
    vocabulary = {symbol: i for i, symbol in enumerate((*symbols, "<eos>"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    if task == "coins":
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
