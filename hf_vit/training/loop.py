"""The training loop: `train` turns a recipe into a folder with a trained model.

All randomness follows from the seed and the position in the run: initial weights from the seed; the order of images
from (seed, epoch); augmentation from (seed, epoch, image); mixing, masks and dropout from (seed, step). The learning
rate follows from the step. So a checkpoint holds no random state, and a resumed run gives the same bits as an
uninterrupted one; on GPUs, with `deterministic`.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..data.images import derive_seed
from ..data.labelled import ImageData
from ..data.loaders import naming_dead_workers, training_loader
from ..data.orders import StreamOrder, training_order
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..system.locking import lock_folder_together
from ..system.machine import deterministic_algorithms
from ..system.progress import TimeLeft, progress_bar, show
from ..system.stopping import StopSignals
from .gradients import compute_gradients
from .parallel import build_accelerator
from .recipe import TrainConfig
from .run import Publish, Run, check_output_dir, clear_output
from .tasks import build_model

Steps = Callable[[Run], Iterable[int]]


def remaining_steps(run: Run) -> Iterable[int]:
    """Yield every step that is not done yet, until the run is over."""
    for step in range(run.state.step, run.plan.total_steps):
        if run.is_over:
            return
        yield step


def train(
    config: TrainConfig,
    publish: Publish | None = None,
    steps: Steps = remaining_steps,
    build: Callable[[TrainConfig, Any], tuple[Any, HFViTImageProcessor]] = build_model,
    data: ImageData | None = None,
) -> Run:
    """Train a model, or resume an interrupted run in `config.output_dir`.

    Args:
        config: The recipe; fields that are `auto` are chosen from the data, the model and the machine.
        publish: Called every `push_every` steps on the main process with the number of steps and a function that
            writes the model into a folder; must return soon.
        steps: Returns the steps to take; what its iterator does between two steps is not part of training.
        build: Builds the model and its image processor from the recipe and the task. A function other than
            `build_model` compares other architectures under the same conditions.
        data: The images; by default those that the recipe names.

    Raises:
        Interrupted: If SIGINT, SIGTERM or SIGHUP came: after a checkpoint was saved, or before the first step.
        ValueError: If the recipe does not fit the data, the machine, or the run in `output_dir`; or if another
            process uses that folder.
        OSError: If a file cannot be written, or another process of this run, or a data loader process, has died.
        FloatingPointError: If the loss is not finite; names the step.
    """
    check_output_dir(config)
    with StopSignals() as signals:
        accelerator = build_accelerator(config)
        with (
            lock_folder_together(accelerator, Path(config.output_dir)),
            naming_dead_workers(),
            deterministic_algorithms(config.deterministic),
        ):
            return _train(config, publish, steps, build, data, signals, accelerator)


def _train(
    config: TrainConfig,
    publish: Publish | None,
    steps: Steps,
    build: Callable[..., Any],
    data: ImageData | None,
    signals: StopSignals,
    accelerator: Accelerator,
) -> Run:
    # ---- build, prepare
    if config.resume == "never" and accelerator.is_main_process:
        clear_output(Path(config.output_dir))
    accelerator.wait_for_everyone()
    run = Run(config, accelerator, signals, build, data)
    config, plan, state, say = run.config, run.plan, run.state, run.say
    model, optimizer = state.model, state.optimizer

    # ---- resume
    run.resume()
    # The order of images continues where the checkpoint stands, so it is made after loading.
    order = training_order(
        run.data,
        run.images,
        config.batch_size,
        config.seed,
        (state.step, plan.total_steps),
        run.division,
        config.shuffle_buffer,
        state.images_per_epoch,
        config.sampling,
    )
    # The list grows while a stream is read; sharing it keeps the state up to date.
    state.images_per_epoch = order.images_per_epoch if isinstance(order, StreamOrder) else None
    run.loader = training_loader(run.images, order, config.num_workers)
    signals.has_begun = True  # from here on there is something to save, so a signal waits for the end of a step
    if state.is_evaluation_due:
        run.evaluate()

    # ---- loop
    run.batches = iter(run.loader)
    run.bar = progress_bar(plan.total_steps, "steps", initial=state.step, disable=not accelerator.is_main_process)
    left = TimeLeft(plan.total_steps, say)
    model.train()
    with run.bar, run.checkpoints.waiting():
        for step in steps(run):
            is_last, epoch = step + 1 == plan.total_steps, (step + 1) / plan.steps_per_epoch

            # step
            # Seeding every step makes its random numbers independent of what was drawn before, so nothing random
            # needs saving. Processes that see different images draw different numbers.
            seed = derive_seed(config.seed, "step", step, run.division.process)
            learning_rate = plan.schedule.apply(optimizer, config.learning_rate, step)
            batches = [state.throughput.next_batch(run.batches) for _ in range(config.accumulation_steps)]
            for batch in batches:
                state.broken.new += batch.pop("broken")
            step_loss = compute_gradients(run, batches, seed)
            norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
            if accelerator.scaler is None:  # a gradient scaler skips overflowing steps itself
                # A gradient that is not finite makes the loss of its step not finite, at no cost: nothing is read.
                step_loss += 0 * (norm.full_tensor() if isinstance(norm, DTensor) else norm)
            if config.on_nonfinite == "skip" and not accelerator.reduce(step_loss.clone()).isfinite():
                say(f"Skipped step {step + 1}: its loss or gradient is not finite.")
                state.log.add(step + 1, epoch=epoch, skipped=True)
                if accelerator.scaler is not None:  # it skips the step too, and lowers its scale
                    optimizer.step()
            else:
                optimizer.step()
                if optimizer.step_was_skipped:  # by the gradient scaler, which lowers its scale
                    state.log.add(step + 1, epoch=epoch, skipped=True)
                state.average.update()
                state.pending_losses.append(step_loss)  # not read here: reading waits for the device
            optimizer.zero_grad()
            state.step = step + 1
            state.throughput.images += config.batch_size
            run.bar.update()
            left.after(state.step)

            # log
            if state.step % config.log_every == 0 or is_last:
                losses = state.mean_losses()
                state.pending_losses.clear()
                state.throughput.lap()
                if len(losses):
                    state.log.add(state.step, epoch=epoch, loss=losses.mean().item(), learning_rate=learning_rate)
                state.broken.gather()
                run.shown.update(_progress(losses, learning_rate, state.throughput.summary()))
                show(run.bar, run.shown)

            # evaluate
            if state.step % plan.eval_every == 0 or is_last:
                run.evaluate()
                show(run.bar, run.shown)
                run.bar.refresh()

            # save
            # All processes agree on a signal at the same step, or one would wait for the others forever. The last
            # step ends the run anyway.
            stop = 0 if is_last or run.is_over else signals.agreed(accelerator, state.step)
            with state.throughput.paused():
                run.checkpoints.raise_error()
                if state.step % plan.save_every == 0 or is_last or stop or run.is_over:
                    run.save()
                if publish is not None and state.step % plan.push_every == 0 and not is_last:
                    run.publish(publish)
            if stop:
                run.interrupt(stop)

    # ---- finish
    if not run.is_evaluated:  # `steps` ended before the plan
        run.evaluate()
    del run.batches  # ends data loader processes
    run.finish()
    return run


def _progress(losses: Tensor, learning_rate: float, speed: dict[str, float]) -> dict[str, str]:
    """Return what the progress bar shows."""
    return {
        **({"loss": f"{losses.mean().item():.3f}"} if len(losses) else {}),
        "images/s": f"{speed['images_per_second']:,.0f}",
        "data wait": f"{speed['data_wait_share']:.0%}",
        "lr": f"{learning_rate:.1e}",
    }
