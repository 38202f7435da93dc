"""What a finished run leaves for people: pictures and a card, in the folder of the model."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from . import inspection
from .data import EvaluationImages, evaluation_loader, normalize
from .evaluation import predict
from .hub import machine, write_card
from .training import Run


def write_report(run: Run, command: str) -> Tensor:
    """Write `training.png`, `predictions.png`, `positions.png` and the card with the figures of `run`.

    Returns:
        Probabilities of the held-out images, `[N, num_labels]`.
    """
    held_out = EvaluationImages(run.data.evaluation, run.data.columns, run.processor, in_memory=True)
    loader = evaluation_loader(held_out, run.config.batch_size, num_workers=0)
    probabilities = predict(run.model, loader, partial(normalize, processor=run.processor))
    images: Sequence[Tensor] = held_out.kept or ()
    title = run.output_dir.resolve().name
    figures = {
        "training.png": inspection.plot_training(run.log, f"{title}: {run.metrics['steps']:,} steps"),
        "predictions.png": inspection.plot_predictions(
            images, held_out.labels, probabilities, run.data.label_names, f"{title}: held-out images"
        ),
    }
    if hasattr(run.model.vit.embeddings.position_embeddings, "on_grid"):
        similarity = inspection.position_similarity(run.model)
        figures["positions.png"] = inspection.plot_position_similarity(
            similarity, f"{title}: similarity of position embeddings"
        )
    for name, figure in figures.items():
        figure.savefig(run.output_dir / name)

    metrics = run.metrics
    write_card(
        run.output_dir,
        title=title,
        description=(
            f"Trained on {metrics['train_images']:,} images of {run.data.name} in {metrics['steps']:,} steps "
            f"({metrics['seconds']:.0f} s), and measured on {metrics['eval_count']:,} others."
        ),
        results={"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"]},
        measured={"command": command, "hardware": machine(), "seeds": str(run.config.seed)},
        dataset=run.data.name,
        split=run.data.eval_split,
        sections={"Recipe": f"```yaml\n{run.config.to_yaml()}```"},
        images=list(figures),
    )
    return probabilities
