"""The file of a `Freezer` in the folder of a Trainer's checkpoint."""

import os
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

FILE = "gcfreeze.pt"
"""The freezer's state, next to the Trainer's own files."""


def save(state_dict: dict[str, Any], args: TrainingArguments, state: TrainerState) -> None:
    """Write the freezer's state into the folder of the checkpoint that the Trainer has just saved."""
    torch.save(state_dict, os.path.join(_folder(args, state), FILE))


def load(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Return the freezer's state at the step that training resumes at.

    The Trainer does not tell callbacks which folder it resumes from. So the folder is the one that the arguments name,
    or else the one of the same step in the output directory, if its log is that of the run.

    Raises:
        ValueError: the file is missing, or belongs to another run.
    """
    given = str(args.resume_from_checkpoint or "")
    folder = given if os.path.isdir(given) else _folder(args, state)
    file, trainer_state = os.path.join(folder, FILE), os.path.join(folder, "trainer_state.json")
    way_out = "Pass the folder that `train` resumes from to `TrainingArguments(resume_from_checkpoint=...)`, too."
    if not os.path.isfile(file):
        raise ValueError(
            f"There is no {file}, so freezing cannot resume at step {state.global_step}. {way_out} If the run was saved"
            " without this callback, start a new run from its weights."
        )
    if os.path.isfile(trainer_state) and TrainerState.load_from_json(trainer_state).log_history != state.log_history:
        raise ValueError(f"{folder} belongs to another run than the one that resumes: their logs differ. {way_out}")
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found


def _folder(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
