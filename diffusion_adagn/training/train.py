"""train(config): a training run, top to bottom."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ..commands import resume_command, with_commands
from ..config import RunConfig, as_config
from ..runs.layout import label_space
from ..runtime.precision import use_tf32
from .checkpointer import Checkpointer
from .diagnostics import ConditioningDiagnostics
from .export import sample_command, write_pipeline
from .logger import Logger
from .nonfinite import NonFiniteGuard
from .preview import Preview
from .setup import open_run_folder, prepare
from .snapshots import Snapshots
from .stop_signal import StopSignal
from .trainer import Trainer
from .validation import Validation

STOPPED = 75  # exit status: saved and left on a signal (EX_TEMPFAIL: try again)


def train(config: RunConfig | Mapping | str | Path, resume: bool = False) -> int:
    """Train to `training.max_steps`. A step with a non-finite loss or gradient is skipped and reported.

    Args:
        config: A RunConfig, a YAML file, the name of a recipe, or a dict of settings.
        resume: Continue from the latest checkpoint of `output_dir`; start if there is none.

    Returns:
        0 when finished; 75 when a signal stopped the run after a checkpoint was saved.

    Raises:
        InputError: The settings or the data cannot be used (nothing is changed), or too many consecutive steps were not finite
            (earlier checkpoints are intact).
    """
    setup = prepare(as_config(config), resume)
    with use_tf32(setup.speed.precision == "tf32"), open_run_folder(setup, resume) as recorded_lr:
        trainer = Trainer(setup)
        diagnostics = ConditioningDiagnostics(trainer, setup.heldout)
        validation, preview = Validation(trainer, setup.heldout), Preview(trainer)
        guard = NonFiniteGuard(trainer)
        checkpointer = Checkpointer(trainer, (diagnostics, trainer, guard))
        previous_lr = checkpointer.load(setup.checkpoint).get("lr", recorded_lr)
        snapshots = Snapshots(trainer)
        with (
            trainer.batches,
            Logger(trainer, setup.cost, setup.speed, previous_lr) as logger,
            StopSignal(setup.run, partial(logger.say, file=sys.stderr)) as stop,
        ):
            while trainer.step < trainer.max_steps:
                result = trainer.train_step(stop.name is not None, diagnostics.observe)
                logger.log_step(result)
                guard.check(result, logger)
                for part in (diagnostics, validation, preview, snapshots):
                    if part.due(trainer.step):
                        logger.log(**part.run(trainer.step, logger.say))
                if checkpointer.due(result):  # last: a killed run repeats what follows its checkpoint
                    checkpointer.save(logger.say, prune=not result.stopping)
                if result.stopping:
                    break
        logger.finish()
        run, finished = setup.run, trainer.step == trainer.max_steps
        if finished:
            if trainer.accelerator.is_main_process:
                write_pipeline(run, trainer.config, trainer.ema.model, trainer.dataset, trainer.step)
            text = f"\nDone: {trainer.step} steps. The model (EMA weights) is in {run.pipeline}\nSample it:"
            config = trainer.config
            following = sample_command(str(run.path), label_space(config), config.model.max_guidance_scale)
        else:
            saved = "not saved, since it was skipped" if result.skipped else "saved"
            text = f"Stopped by {stop.name or 'a signal'} at step {trainer.step}; {saved}. Resume with:"
            following = resume_command(run.path)
        trainer.accelerator.print(with_commands(text, following))
        trainer.accelerator.end_training()
        return 0 if finished else STOPPED
