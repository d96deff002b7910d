"""Where the models of a run are, and in which data types: what `auto` stands for. Light to import."""

from dataclasses import asdict, dataclass, fields, replace

from agents.pair import READS_DATA, automatic_device, usual_dtype, usual_lengths
from experiments.running.config import RunConfig
from experiments.running.run_folder import read_json, write_json

FILE = "placement.json"


@dataclass(frozen=True)
class Placement:
    """The device of both models and their data types, without `auto`."""

    device: str
    dtype: str  # of the teacher
    student_dtype: str


def placement(config: RunConfig) -> Placement:
    """What the flags say; for `auto`, what the run in this folder has, or else what this machine suggests.

    A run that began on the CPU stays there. One that began on a GPU goes on where there is none, in its data types.

    Raises:
        ValueError: for a folder whose `placement.json` is damaged.
    """
    had, device = kept_placement(config), config.loading.device
    if device == "auto":
        device = had.device if had and had.device == "cpu" else automatic_device()
    usual = usual_dtype(device)
    student_usual = usual if config.method is not None else "float32"  # other agents know no other
    suggested = had or Placement(device, usual, student_usual)
    dtype, student_dtype = config.teacher.dtype, config.student.dtype
    return Placement(
        device,
        suggested.dtype if dtype == "auto" else dtype,
        suggested.student_dtype if student_dtype == "auto" else student_dtype,
    )


def with_lengths(config: RunConfig) -> RunConfig:
    """The configuration with the lengths that the device of its models suggests, in place of None.

    A task that makes its own problems, or that is the user's, has a horizon of its own.
    """
    prompt, completion = usual_lengths(placement(config).device)
    horizon = config.environment.max_new_tokens
    if horizon is None and config.data.task in READS_DATA:
        horizon = completion
    return replace(
        config,
        data=replace(config.data, max_prompt_tokens=config.data.max_prompt_tokens or prompt),
        environment=replace(config.environment, max_new_tokens=horizon),
    )


def kept_placement(config: RunConfig) -> Placement | None:
    """What the run in this folder began with; None if there is none."""
    path = config.folder / FILE
    if not config.name or not path.is_file():
        return None
    return Placement(**read_json(path, {field.name: str for field in fields(Placement)}))


def keep_placement(config: RunConfig) -> None:
    """Write what the run began with into its folder, once."""
    if kept_placement(config) is None:
        write_json(config.folder / FILE, asdict(placement(config)))


def placement_line(config: RunConfig) -> str:
    """What was chosen, as one line."""
    import torch

    chosen, horizon = placement(config), config.environment.max_new_tokens
    parts = [
        f"device {chosen.device}",
        f"teacher {chosen.dtype}",
        f"student {chosen.student_dtype}",
        f"prompts of at most {config.data.max_prompt_tokens} tokens",
        f"completions of at most {horizon}" if horizon else "completions as long as the task allows",
        f"{torch.get_num_threads()} threads",
    ]
    return ", ".join(parts)
