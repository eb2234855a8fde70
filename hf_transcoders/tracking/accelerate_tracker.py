"""A tracker for plain training loops with accelerate."""

import os

from accelerate.tracking import GeneralTracker, on_main_process, register_tracker_class

from .local import LocalTracker


class AccelerateTracker(GeneralTracker):
    """
    Records a training loop in files for `Run.load`, as [`TranscoderTrackingCallback`] records a Trainer's run.

    Importing this module registers the tracker with accelerate. Scalars are recorded by `Accelerator.log`; histograms, tables,
    images, pages and alerts by the [`LocalTracker`], which is `accelerator.get_tracker("hf_transcoders", unwrap=True)`.

    Args:
        run_name (`str`): Name of the run: the project name of `Accelerator.init_trackers`.
        logging_dir (`str` or `os.PathLike`): Logging folder of accelerate. Records are saved in its subfolder `tracking`.
        resume_step (`int`, *optional*):
            Step at which to continue the records: `init_kwargs={"hf_transcoders": {"resume_step": 100}}`.

    Example:

    ```python
    >>> import hf_transcoders.tracking.accelerate_tracker
    >>> accelerator = Accelerator(log_with=["hf_transcoders", "trackio"], project_dir="runs/loop")
    >>> accelerator.init_trackers("loop", config={"learning_rate": 1e-3})
    >>> accelerator.log({"train/fvu": 0.3}, step=1)
    >>> accelerator.end_training()
    ```
    """

    name = "hf_transcoders"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike, resume_step: int | None = None):
        super().__init__()
        self.run_name = run_name
        self.resume_step = resume_step
        self._local = LocalTracker(logging_dir)
        self._logs = 0

    @property
    def tracker(self) -> LocalTracker:
        return self._local

    @on_main_process
    def start(self):
        self._local.start({"name": self.run_name}, self.resume_step)

    @on_main_process
    def store_init_configuration(self, values: dict):
        self._local.update(arguments=values)

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs):
        """
        Args:
            values (`dict[str, float]`): Metrics by name, such as `train/<dictionary>/fvu`.
            step (`int`, *optional*): Optimizer step. By default logs are counted.
        """
        self._logs = self._logs + 1 if step is None else step
        self._local.scalars(self._logs, values)

    @on_main_process
    def finish(self):
        self._local.finish("finished")


register_tracker_class(AccelerateTracker)
