"""Options of commands: fields of a recipe by group, other names that people use, and answers to unknown options."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo

from ..system.texts import hanging, nearest, without_tokens
from ..training.recipe import SIZES, TrainConfig

# Names of options in other libraries and scripts, with the option that a command may have instead.
ALIASES = {
    **dict.fromkeys(("--lr", "--base-lr", "--peak-lr"), "--learning-rate"),
    **dict.fromkeys(("--bs", "--batch", "--train-batch-size"), "--batch-size"),
    **dict.fromkeys(("--train-dir", "--data-dir", "--data-path", "--dataset", "--dataset-name"), "--data"),
    **dict.fromkeys(("--model-name-or-path", "--model-name", "--arch", "--checkpoint"), "--model"),
    **dict.fromkeys(("--img-size", "--input-size", "--imgsz", "--resolution"), "--image-size"),
    **dict.fromkeys(("--num-epochs", "--num-train-epochs"), "--epochs"),
    **dict.fromkeys(("--out", "--output", "--out-dir", "--save-dir"), "--output-dir"),
    **dict.fromkeys(("--workers", "--dataloader-num-workers"), "--num-workers"),
    **dict.fromkeys(("--opt", "--optim"), "--optimizer"),
    **dict.fromkeys(("--sched", "--scheduler", "--lr-scheduler-type"), "--schedule"),
    **dict.fromkeys(("--aug", "--augment"), "--augmentation"),
    "--wd": "--weight-decay",
    "--smoothing": "--label-smoothing",
    "--gradient-accumulation-steps": "--accumulation-steps",
    "--mixed-precision": "--precision",
    "--save-steps": "--save-every",
    "--logging-steps": "--log-every",
}
SPLITS = "put both folders into one, as photos/train and photos/val, and give that one: hf-vit train photos/"
ONE_DEVICE = (
    "a GPU is used if there is one. CUDA_VISIBLE_DEVICES=1 before the command selects the second GPU, and an empty "
    "CUDA_VISIBLE_DEVICES= selects the CPU"
)
MANY_DEVICES = "accelerate launch -m hf_vit before the command uses several"
CLASSES = "the classes are those of the data"
# Options that no command has, with what to do instead.
ANSWERS = {
    **dict.fromkeys(("--validation-dir", "--val-dir", "--eval-dir", "--test-dir", "--valid-dir"), SPLITS),
    **dict.fromkeys(("--device", "--gpu", "--cpu", "--use-cpu", "--no-cuda"), ONE_DEVICE),
    **dict.fromkeys(("--gpus", "--devices", "--num-gpus", "--num-processes"), MANY_DEVICES),
    **dict.fromkeys(("--num-classes", "--nb-classes", "--num-labels"), CLASSES),
    **dict.fromkeys(("--fp16", "--bf16", "--fp32"), "use --precision, with fp32, bf16 or fp16"),
    **dict.fromkeys(("--freeze", "--freeze-backbone", "--freeze-encoder"), "use --trained head"),
    "--pretrained": "name the checkpoint with --model, such as --model facebook/dinov2-small; its weights are loaded",
    "--lora": "use --trained lora",
    "--per-device-train-batch-size": "use --batch-size, the number of images per step over all devices",
    "--resume-from-checkpoint": "the same command resumes an interrupted run",
    "--overwrite-output-dir": "choose another --output-dir",
}

# Fields that come first in the help, and the first field of each further group.
FIRST = ("data", "model", "epochs", "batch_size", "learning_rate", "image_size", "output_dir", "resume")
GROUPS = {
    "train_split": "Data",
    "task": "Model",
    "cache": "Images",
    "teacher": "Distillation",
    "max_steps": "Optimization",
    "precision": "Hardware",
    "seed": "Run",
}
SHORT = {"output_dir": ("-o",)}
# Names of types in the help, by those of typer, and the limits of numbers that it adds to defaults.
TYPE, RANGE = re.compile(r" <([^<>]+)>"), re.compile(r"(; )?(\d[\d.]*<=?)?x[<>]=?[\d.]+(?=\])")
TYPES = {
    **dict.fromkeys(("str", "list[str]"), " TEXT"),
    **dict.fromkeys(("int", "int range"), " N"),
    **dict.fromkeys(("float", "float range"), " X"),
    "path": " PATH",
}
METAVARS = {bool: "[true|false]", int: "N", float: "X", str: "TEXT"}
FIELDS = {f"--{item.name.replace('_', '-')}": item for item in fields(TrainConfig)}
BOOLEANS = {name for name, item in FIELDS.items() if item.type is bool}
ARCHITECTURE = "--model-config"


class Command(TyperCommand):
    """A command that understands underscores and usual names in options, and lists its options by group."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace names of options by those of the command; fail with a remedy where there is none."""
        if ctx.resilient_parsing:  # completion of unfinished words
            return super().parse_args(ctx, args)
        try:
            return super().parse_args(ctx, [*self._renamed(ctx, list(args))])
        except typer.BadParameter as error:
            if type(error).__name__ == "MissingParameter":
                lines = inspect.cleandoc(self.help or "").splitlines()
                error.message = next((f"\n{line}" for line in lines if line.startswith("Example: ")), "")
            raise

    def _renamed(self, ctx: Any, words: list[str]) -> Iterator[str]:
        known = {name for parameter in self.get_params(ctx) for name in (*parameter.opts, *parameter.secondary_opts)}
        flags = {
            name
            for parameter in self.get_params(ctx)
            if getattr(parameter, "is_flag", False)
            for name in parameter.opts
        }
        booleans = BOOLEANS & known - flags
        while words:
            word = words.pop(0)
            if word == "--":
                yield from (word, *words)
                return
            if not word.startswith("--"):
                yield word
                continue
            name, equals, value = word.partition("=")
            if name not in known:
                name = "--" + name[2:].replace("_", "-")
            if name.startswith(f"{ARCHITECTURE}.") and ARCHITECTURE in known:
                field = name.removeprefix(f"{ARCHITECTURE}.").replace("-", "_")
                if not equals and not words:
                    ctx.fail(f"Option {name} requires a value.")
                yield f"{ARCHITECTURE}={field}={value if equals else words.pop(0)}"
            elif name.startswith("--no-") and f"--{name[5:]}" in booleans:
                yield f"--{name[5:]}=false"
            elif name in booleans and not equals and not (words and words[0] in ("true", "false")):
                yield f"{name}=true"
            else:
                yield self._known(ctx, name, known) + equals + value

    def _known(self, ctx: Any, name: str, known: set[str]) -> str:
        """Return the option of the command that a name stands for."""
        if name in known:
            return name
        if (other := ALIASES.get(name)) in known:
            return str(other)
        name = without_tokens(name)
        if name in ANSWERS:
            ctx.fail(f"There is no option {name}: {ANSWERS[name]}.")
        if (of_recipe := ALIASES.get(name, name)) in FIELDS:
            ctx.fail(f"There is no option {name}: {of_recipe} is an option of hf-vit train.")
        plain = {option[2:]: option for option in sorted(known) if option.startswith("--")}
        plain = {word.partition("-")[0]: option for word, option in plain.items()} | plain  # first words too
        meant = nearest(name.removeprefix("--"), plain)
        return ctx.fail(f"There is no option {name}" + (f": did you mean {plain[meant]}?" if meant else "."))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line, with the options that are required."""
        required = [item.opts[0] for item in self.get_params(ctx) if item.required and item.opts[0].startswith("--")]
        return [*super().collect_usage_pieces(ctx), *(f"{name} {name[2:].upper()}" for name in required)]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the description; examples stay in one line, so that they can be copied."""
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            formatter.write_paragraph()
            formatter.write("\n".join(hanging("  ", " ".join(paragraph.split()))) + "\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options under the headings of their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (row := parameter.get_help_record(ctx)) is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                name = TYPE.sub(lambda match: TYPES.get(match[1], f" [{match[1]}]"), row[0])
                name = name.split()[0] if usual == "Arguments" else name
                row = (name, RANGE.sub("", row[1]).removesuffix("  []"))
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(row)
        for heading in sorted(groups, key=lambda heading: (heading != "Arguments", heading != "Options")):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])


def with_recipe_fields(hidden: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter `given` of a command by an option for each field of a recipe that it does not have."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = dict(inspect.signature(command).parameters)
        taken = [item for item in fields(TrainConfig) if item.name not in (*own, "auto")]

        @wraps(command)
        def run(**arguments: Any) -> None:
            given: dict[str, Any] = {}
            for item in taken:
                given |= _values(item, arguments.pop(item.name))
            command(**arguments, given=given)

        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        options, group = {}, ""
        for item in taken:
            group = GROUPS.get(item.name, group)
            options[item.name] = inspect.Parameter(
                item.name, keyword, default=None, annotation=_annotation(item, group, hidden)
            )
        first = [options.pop(name) for name in FIRST if name in options]
        del own["given"]
        arguments = [each for each in own.values() if isinstance(each.annotation.__metadata__[0], ArgumentInfo)]
        rest = [each for each in own.values() if each not in arguments]
        parameters = [*arguments, *first, *rest, *options.values()]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _annotation(item: Any, group: str, hidden: bool) -> Any:
    """Return the annotation by which typer makes an option of a field; values are read as YAML afterwards."""
    is_first = item.name in FIRST
    option = typer.Option(
        f"--{item.name.replace('_', '-')}",
        *SHORT.get(item.name, ()),
        help=item.metadata["help"],
        metavar="H or HxW" if item.name in SIZES else _metavar(item.type),
        rich_help_panel=None if is_first else group,
        hidden=hidden,
    )
    return Annotated[(list[str] if _is_repeated(item) else str) | None, option]


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "NAME"
    if kind == dict[str, Any]:
        return "NAME=VALUE"
    return METAVARS.get(kind) or METAVARS.get(next(iter(get_args(kind)), str), "TEXT")


def _is_repeated(item: Any) -> bool:
    return item.type == dict[str, Any] or list[str] in get_args(item.type)


def _values(item: Any, text: Any) -> dict[str, Any]:
    """Return the values of fields that an option states: of a field, or of several of the architecture."""
    if text is None or text == []:
        return {}
    if item.type == dict[str, Any]:
        values: dict[str, Any] = {}
        for each in text:
            name, equals, value = each.partition("=")
            is_named = bool(equals) and name.isidentifier()
            values |= {f"{item.name}.{name}": _yaml(value)} if is_named else {item.name: _yaml(each)}
        return values
    if _is_repeated(item):
        several = [name for each in text for name in (_yaml(each) if each.startswith("[") else [each])]
        return {item.name: None if several == ["null"] else several if len(several) > 1 else several[0]}
    if str in (item.type, *get_args(item.type)):  # YAML would read `no` and dates as something else
        return {item.name: None if text == "null" else text}
    return {item.name: _yaml(text)}


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # for example a name with a bracket
        return text
