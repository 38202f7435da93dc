"""The main job in one go: train on handwritten digits, save, load elsewhere, show."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training.loop import train
from ..training.recipe import TrainConfig
from ..training.report import write_report

# What a user without this package runs: the code comes from the folder.
FRESH_PROCESS = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", sys.argv[1], trust_remote_code=True, device="cpu")
answers = classify(json.load(sys.stdin), top_k=1, batch_size=32)
json.dump([answer[0] for answer in answers], sys.stdout)
"""
EXAMPLES = 10


def quickstart(output_dir: str, seed: int, resume: str, say: Callable[[str], None], **overrides: Any) -> None:
    """Train the recipe `digits`, write the folder with its card and pictures, and load it in a fresh process.

    Args:
        output_dir: Where the model ends up.
        seed: Of the run; the held-out images are the same for all seeds.
        resume: See `TrainConfig`.
        say: Prints a line.
        overrides: Other fields of the recipe.
    """
    say("Training a Vision Transformer on scikit-learn's handwritten digits.")
    config = TrainConfig.from_recipe("digits", output_dir=output_dir, seed=seed, resume=resume, **overrides)
    run = train(config)
    if not run.is_main_process or run.predictions is None:
        return
    metrics = run.metrics
    right = round(metrics["eval_accuracy"] * metrics["eval_count"])
    say(
        f"Test accuracy {metrics['eval_accuracy']:.2%} ({right} of {metrics['eval_count']} held-out digits), "
        f"seed {seed}, {metrics['parameters']:,} parameters, {run.timing['seconds']:.0f} s of training."
    )
    write_report(run, f"hf-vit quickstart --seed {seed}")

    say(f'\nLoading it in a fresh process by pipeline("image-classification", "{output_dir}"):')
    column, label_column = run.data.columns
    answers = classify_elsewhere(run.output_dir, run.data.evaluation[column])
    names = [run.data.label_names[label] for label in run.data.evaluation[label_column]]
    say("  true  predicted")
    for name, answer in list(zip(names, answers, strict=True))[:EXAMPLES]:
        mark = "" if name == answer["label"] else "   wrong"
        say(f"  {name:>4}  {answer['label']:>9}  {answer['score']:6.1%}{mark}")
    here = [run.data.label_names[index] for index in run.predictions.predicted.tolist()]
    same = sum(answer["label"] == label for answer, label in zip(answers, here, strict=True))
    say(f"  {same} of {len(here)} answers are those of the model in memory.")
    say(f"\n{output_dir}/ holds the model (safetensors), config, processors, code, card, and")
    say("  training.png     loss and accuracy")
    say("  confusion.png    which digits it takes for which")
    say("  predictions.png  held-out digits, and all that it gets wrong")
    say("  positions.png    what it learned about where patches lie (figure 7 of the paper)")
    say(f"\nPublish it:  hf-vit push {output_dir} YOUR_NAME/{run.output_dir.resolve().name}")


def classify_elsewhere(folder: Path, images: Any) -> list[dict[str, Any]]:
    """Return what `pipeline` answers in a new process that reads the images from files, in their order."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = []
        for index, image in enumerate(images):
            paths.append(str(Path(temporary) / f"{index:05d}.png"))
            image.save(paths[-1])
        finished = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, str(folder.resolve())],
            input=json.dumps(paths),
            capture_output=True,
            text=True,
            cwd=temporary,  # so that a source tree beside us is not found
        )
    if finished.returncode:
        raise RuntimeError(f"The fresh process could not classify with {folder}:\n{finished.stderr}")
    return json.loads(finished.stdout)
