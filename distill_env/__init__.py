"""Token generation as a Gymnasium environment whose teacher is the environment.

Importing this package registers the environments; neither torch nor transformers is imported before one is made.
"""

from gymnasium.envs.registration import register

__version__ = "0.1.0"

ENVIRONMENTS: dict[str, dict[str, object]] = {
    "Distill/Categorical-v0": {"task": "categorical", "teacher": "markov", "teacher_kwargs": {"vocab_size": 6}},
    "Distill/Sums-v0": {"task": "sums", "teacher": "sums"},
    "Distill/Coins-v0": {"task": "coins", "teacher": "coins"},
    "Distill/CausalLM-v0": {"task": "instruct", "teacher": "sums", "max_new_tokens": 24},
}

for _id, _kwargs in ENVIRONMENTS.items():
    register(
        id=_id,
        entry_point="distill_env.env:DistillEnv",
        vector_entry_point="distill_env.env:DistillVectorEnv",
        kwargs=_kwargs,
    )
