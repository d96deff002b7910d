"""The model card of a student, and its upload to the hub."""

from __future__ import annotations

import itertools
import json
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import distill_env
from agents.config import DistillConfig, SB3Config
from experiments.running.config import SMALL_TASKS, RunConfig
from experiments.running.config_file import default_config, flag_values
from experiments.running.metric_display import evaluation_lines, markdown_table, metric

GATE = (
    *("hard_share_first", "hard_share_last", "rewritten_share_first", "rewritten_share_last", "teacher_tokens"),
    *("teacher_tokens_per_student_token", "teacher_passes", "teacher_positions", "tokens"),
)

LOAD_TABLE = """A table of categorical distributions, not a transformer:

```python
from distill_env.models.tabular import TabularModel

student = TabularModel.load("PATH")
```"""

LOAD_LM = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

student = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""


def model_card(config: RunConfig, evaluation: dict[str, Any]) -> str:
    """`README.md` of a student: front matter, method, data, numbers before and after, and what the gate did.

    Args:
        config: of the run.
        evaluation: of the run, with `before`, `after` and `training`.
    """
    before, after, training = evaluation["before"], evaluation["after"], evaluation["training"]
    numbers = itertools.chain(*evaluation_lines(config.evaluation.samples, [before, after]).values())
    gate = [(m.label, m.text(training.get(m.key))) for m in map(metric, GATE)]
    fields, options = changed_fields(config), config.agent_options
    where = config.logging.push_to_hub or str(config.out / config.name / "student")
    parts = [
        front_matter(config),
        f"# {config.name}",
        f"A student of {teacher_of(config)}, distilled by `{config.agent}` of distill_env, seed {options.seed}.",
        (LOAD_TABLE if config.env == "categorical" else LOAD_LM).replace("PATH", where),
        "## Method",
        f"{method_of(config)} Changed from the defaults: " + (", ".join(fields) if fields else "nothing") + ".",
        "```bash\n" + " ".join(command_of(config)) + "\n```",
        "## Data",
        data_of(config),
        "## Numbers",
        f"The student alone at temperature 1, {config.evaluation.samples} completions of each of up to "
        f"{config.evaluation.prompts} prompts of the test split. "
        "This is one seed; comparing methods needs several.",
        markdown_table([["", "before", "after"], *numbers]),
        "## What the gate did",
        markdown_table([["", f"in {training['iterations']} iterations"], *gate]),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions(config).items()),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(config: RunConfig) -> str:
    """YAML between dashes. A licence or a base model that is not known is left out; the hub refuses a wrong one."""
    lines = []
    licence = licence_of(config)
    if licence:
        lines.append(f"license: {licence}")
    if config.env != "categorical":
        lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    if config.student.model and not Path(config.student.model).exists():
        lines.append(f"base_model: {json.dumps(config.student.model)}")
    lines += ["tags:", "- distill-env", "- distillation", f"- {json.dumps(config.agent)}"]
    return "\n".join(["---", *lines, "---"])


def licence_of(config: RunConfig) -> str | None:
    """The licence of the initial weights: the project's, or that in the model card beside them."""
    if not config.student.model:
        return "apache-2.0"
    card = Path(config.student.model) / "README.md"
    pattern = r"\A---\n.*?^license: *([\w.-]+) *$.*?^---$"
    match = re.search(pattern, card.read_text() if card.is_file() else "", re.M | re.S)
    return match[1] if match else None


def teacher_of(config: RunConfig) -> str:
    if config.env == "lm":
        return f"`{config.teacher.model}`"
    if config.env in SMALL_TASKS:
        return f"the teacher of {config.env.capitalize()} that ships with distill_env"
    return "a Markov table"


def data_of(config: RunConfig) -> str:
    if config.env == "lm":
        where = f" (`{config.data.path}`)" if config.data.path else ""
        return f"The prompts of {config.data.task}{where}. Student and teacher write the completions during training."
    if config.env in SMALL_TASKS:
        share = config.training.warm_start
        warm = f" The warm start by sft reached {share:.0%} of the teacher's correct chains." if share else ""
        return (
            f"Problems of {config.env.capitalize()}. Student and teacher write the completions during training.{warm}"
        )
    return "None: the empty prompt."


def method_of(config: RunConfig) -> str:
    options = config.agent_options
    if isinstance(options, DistillConfig):
        m = options.method
        return (
            f"The row `{config.agent}` of agents/methods.py: teacher_writes `{m.teacher_writes}`, loss `{m.loss}`, "
            f"weighting `{m.weighting}`, score `{m.gate.score}`, tau {m.gate.tau}."
        )
    if isinstance(options, SB3Config):
        return f"`{options.algorithm}` of Stable-Baselines3 with REWRITE as an action."
    return f"The agent `{config.agent}`."


def changed_fields(config: RunConfig) -> list[str]:
    """Options of the agent that differ from its defaults in this environment, as `name value`."""
    own = flag_values(config.agent_options)
    return [f"`{name}` {value}" for name, value in changed_flags(config).items() if name in own]


def changed_flags(config: RunConfig) -> dict[str, Any]:
    """All flags that differ from their defaults, without those for folders."""
    default = flag_values(default_config(config.agent, config.env))
    skipped = {"agent", "env", "out", "resume", "push_to_hub"}
    return {k: v for k, v in flag_values(config).items() if v != default[k] and k not in skipped}


def command_of(config: RunConfig) -> list[str]:
    """The command that repeats the run."""
    command = ["python", "experiments/run.py", "--agent", config.agent, "--env", config.env]
    for name, value in changed_flags(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            command.append(flag if value else "--no-" + flag[2:])
        else:
            command += [flag, *map(str, value if isinstance(value, list) else [value])]
    return command


def versions(config: RunConfig) -> dict[str, str]:
    """Versions of the packages that the weights depend on."""
    packages = ["torch", "transformers"] + ["stable_baselines3"] * isinstance(config.agent_options, SB3Config)
    own = {"distill_env": distill_env.__version__, "Python": platform.python_version()}
    return own | {name: metadata.version(name) for name in packages}


def push(folder: Path, repository: str) -> str:
    """Upload a student's folder to the hub. Returns its address.

    The token is that of the environment (HF_TOKEN) or of `hf auth login`; it is read by huggingface_hub alone.

    Raises:
        ValueError: in one line, if there is no student or the hub does not take it; nothing on disk is lost.
    """
    if not folder.is_dir():
        raise ValueError(f"push_to_hub: {str(folder)!r} does not exist: the agent has no student to push")
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Student of {folder.parent.name}")
    except Exception as error:  # of the hub, of its HTTP library, of the network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"push_to_hub: {repository!r} was not pushed ({reason}); everything is saved, push {str(folder)!r} again "
            f"with: hf upload {repository} {folder}"
        ) from None
    return str(address)
