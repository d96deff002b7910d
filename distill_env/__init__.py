"""Token generation as a Gymnasium environment whose teacher is the environment.

Importing this package registers the environments; neither torch nor transformers is imported before one is made.
"""

from gymnasium.envs.registration import register

__version__ = "0.1.0"

# Writing like the teacher returns more than asking it for everything, and asking more than ending at once: in the table
# by its entropies and the price, elsewhere because a completion that is right is paid for. One REWRITE writes a whole
# reasoning step there, since an agent that explores hardly ever asks for every token of an answer.
# `experiments/returns.py` prints the returns.
GRADED: dict[str, object] = {
    "rewrite_span": "step",
    "rewrite_cost": 1.0,
    "log_prob_floor": -10.0,
    "task_reward": 20.0,
    "observation": "one_hot",
}
ENVIRONMENTS: dict[str, dict[str, object]] = {
    "Distill/Categorical-v0": {
        "task": "categorical",
        "teacher": "markov",
        "teacher_kwargs": {"vocab_size": 6, "seed": 2, "sharpness": 4.0},
        "rewrite_cost": 1.0,
        "observation": "one_hot",
    },
    "Distill/Sums-v0": {"task": "sums", "teacher": "sums", **GRADED},
    "Distill/Coins-v0": {"task": "coins", "teacher": "coins", **GRADED},
    "Distill/CausalLM-v0": {"task": "instruct", "teacher": "sums", "max_new_tokens": 24},
}

for _id, _kwargs in ENVIRONMENTS.items():
    register(
        id=_id,
        entry_point="distill_env.env:DistillEnv",
        vector_entry_point="distill_env.env:DistillVectorEnv",
        kwargs=_kwargs,
    )
