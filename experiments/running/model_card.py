"""The model card of a student, and its upload to the hub."""

import itertools
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from jinja2 import Environment, FileSystemLoader

from agents import cards
from agents.config import PluginConfig, SB3Config
from experiments.running.config import SMALL_TASKS, RunConfig
from experiments.running.config_file import default_config, flag_values
from experiments.running.metric_display import evaluation_lines, markdown_table, metric

GATE = (
    *("hard_share_first", "hard_share_last", "rewritten_share_first", "rewritten_share_last", "teacher_tokens"),
    *("teacher_tokens_per_student_token", "teacher_passes", "teacher_positions", "tokens"),
)


def model_card(config: RunConfig, evaluation: dict[str, Any]) -> str:
    """`README.md` of a student: front matter, method, data, numbers before and after, and what the gate did.

    Args:
        config: of the run.
        evaluation: of the run, with `before`, `after` and `training`.
    """
    before, after, training = evaluation["before"], evaluation["after"], evaluation["training"]
    numbers = itertools.chain(*evaluation_lines(config.evaluation.samples, [before, after]).values())
    keys = [*GATE, *(["reference_tokens"] if training.get("reference_tokens") else [])]
    costs = [(m.label, m.text(training.get(m.key))) for m in map(metric, keys)]
    options = flag_values(config.agent_options)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template("model_card.md.j2").render(
        config=config,
        front_matter=front_matter(config),
        writers=writers(config),
        path=config.logging.push_to_hub or config.folder / "student",
        changed={name: value for name, value in changed_flags(config).items() if name in options},
        command=" ".join(command_of(config)),
        numbers=markdown_table([["", "before", "after"], *numbers]),
        costs=markdown_table([["", f"in {training['iterations']} iterations"], *costs]),
        versions=versions(config),
    )


def writers(config: RunConfig) -> str:
    """Who writes the training completions, as a sentence."""
    if isinstance(config.agent_options, PluginConfig):
        return "The agent decides who writes the completions during training."
    if config.method and config.method.teacher_writes == "reference":
        return "The training completions are the reference completions of the data."
    writers = {"always": "The teacher writes", "never": "The student writes"}
    writer = config.method.teacher_writes if config.method else ""
    return f"{writers.get(writer, 'Student and teacher write')} the completions during training."


def front_matter(config: RunConfig) -> str:
    """The card's front matter. A new student has the project's licence."""
    own, transformer = config.student.model, config.env in (*SMALL_TASKS, "lm")
    return cards.front_matter(own, config.agent, transformer, "" if own else "apache-2.0")


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


def versions(config: RunConfig) -> str:
    """Versions of the packages that the weights depend on."""
    return cards.versions(*["stable_baselines3"] * isinstance(config.agent_options, SB3Config))


def push(folder: Path, repository: str) -> str:
    """Upload a student's folder to the hub. Returns its address.

    The token is that of the environment (HF_TOKEN) or of `hf auth login`; it is read by huggingface_hub alone.

    Raises:
        ValueError: in one line, if there is no student or the hub does not take it; nothing on disk is lost.
    """
    if not folder.is_dir():
        raise ValueError(f"push_to_hub: {str(folder)!r} does not exist: the agent has no student to push")
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
