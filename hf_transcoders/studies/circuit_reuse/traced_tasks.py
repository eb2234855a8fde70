"""The circuits of IOI and Colored Objects on one model: their stages, and the roles of heads in them."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from ...lm.wrappers import measures_model
from ...tasks.colored_objects import colored_objects
from ...tasks.ioi import indirect_object_identification
from ...tasks.task import Task
from .roles import Roles, RoleTests, find_roles
from .stages import STAGES, Stage, trace_stages


@dataclass(frozen=True)
class TracedTasks:
    """The circuits of the two tasks of the paper.

    Args:
        tasks (`dict[str, Task]`): The tasks `"ioi"` and `"colored-objects"`.
        stages (`dict[str, list[Stage]]`): Traced stages of each.
        roles ([`Roles`]): Heads by role.
        begins_with_bos (`bool`): Whether prompts begin with the beginning-of-sequence token.
    """

    tasks: dict[str, Task]
    stages: dict[str, list[Stage]]
    roles: Roles
    begins_with_bos: bool


@measures_model
def trace_tasks(
    model: PreTrainedModel,
    tokenizer,
    prompts: int = 64,
    depth: int = len(STAGES),
    tests: RoleTests | None = None,
    add_bos: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TracedTasks:
    """Trace IOI and Colored Objects, and test every head for every role.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the model.
        prompts (`int`, *optional*, defaults to 64): Number of prompts of each task.
        depth (`int`, *optional*, defaults to 4): Largest number of stages of each task. Role tests use the first two.
        tests ([`RoleTests`], *optional*): Thresholds of the role tests.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token. The default is that of the tokenizer.
        seed (`int`, *optional*, defaults to 0): Seed for the prompts and all random choices.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress bars.

    Returns:
        [`TracedTasks`]

    Raises:
        [`TranscoderError`]: the tokenizer splits words of the tasks, or the model's attention cannot be edited.
    """
    tasks = {
        "ioi": indirect_object_identification(tokenizer, prompts, "s2_io_flip", seed=seed, add_bos=add_bos),
        "colored-objects": colored_objects(tokenizer, prompts, seed=seed, add_bos=add_bos),
    }
    stages = {name: trace_stages(model, task, depth=depth, progress=progress) for name, task in tasks.items()}
    first_ids = tasks["ioi"].dataset[0]["clean_ids"]
    bos = tokenizer.bos_token_id if first_ids[0] == tokenizer.bos_token_id else None
    roles = find_roles(
        model, tasks["ioi"], stages["ioi"], tasks["colored-objects"], stages["colored-objects"], tests, bos, seed
    )
    return TracedTasks(tasks, stages, roles, bos is not None)
