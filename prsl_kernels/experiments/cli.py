"""The command line `prsl`. Each command imports what it needs when it runs, so that `prsl --help` is quick."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.console import printable
from prsl_kernels.experiments.errors import UserError

if TYPE_CHECKING:
    from prsl_kernels.experiments.config import Recipe
    from prsl_kernels.experiments.pipeline import Experiment, Stage

# No command looks anything up on a hub: models and data are local, or asked for with `prsl data fetch`.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _explain_os_error(error: OSError) -> str:
    place = str(error.filename) if error.filename else "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}: the disk is full; free some space or choose another place, then run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place}: no permission to write or read it; choose another place or mend its permissions"
    return f"{place}: {error.strerror or error}; choose another place, or mend this one"


def _fail(message: str, status: int) -> NoReturn:
    if ranks.tell():
        print("\n".join(printable(line) for line in f"prsl: {message}".split("\n")), file=sys.stderr)
    sys.exit(status)


class _Group(TyperGroup):
    """Every foreseeable failure of a command is one message on stderr and a non-zero exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            ranks.join()
            if not ranks.is_main():
                sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (results are printed once)
            result = super().invoke(ctx)
            ranks.leave()
            return result
        except UserError as error:
            _fail(str(error), 1)
        except KeyboardInterrupt:
            _fail(ranks.trouble() or "interrupted; the same command goes on from here", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit's flush fails again
            sys.exit(1)
        except OSError as error:
            _fail(_explain_os_error(error), 1)
        except MemoryError:
            _fail("out of memory; lower tasks.<task>.attack.batch_size and finetune.batch_size with --set", 1)


app = typer.Typer(
    name="prsl",
    cls=_Group,
    help="Fine-tune vision-language models with PRSL and with cross entropy, attack them, score them, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # or "[captions]" in a help text is taken for markup
    add_completion=False,
)
data_app = typer.Typer(help="Data: check a folder, fetch the embedded sets and the encoder.", no_args_is_help=True)
app.add_typer(data_app, name="data")
model_app = typer.Typer(help="Checkpoints to start from.", no_args_is_help=True)
app.add_typer(model_app, name="model")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, a YAML file, or a run directory.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="The run directory; by default runs/<recipe's name>.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key, such as tasks.vqa.attack.eps=4; repeatable."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
TaskOption = Annotated[str | None, typer.Option("--task", help="This task only.")]
ArmOption = Annotated[str | None, typer.Option("--arm", help="This arm only.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="This seed only.")]


def _recipe(recipe: str, out: Path | None, overrides: list[str] | None) -> tuple[Recipe, Path]:
    """The recipe that an argument names, and the run directory."""
    from prsl_kernels.experiments.config import load_recipe
    from prsl_kernels.experiments.pipeline import whole_run

    source = Path(recipe)
    # Alone, a further test set would have arms of its own, trained on other data and put in place of the borrowed ones.
    given = source.parent if source.is_file() else source
    for place in (given if source.exists() else None, out):
        whole = None if place is None else whole_run(place)
        if whole is not None:
            raise UserError(f"{place}: belongs to the run {whole}; give that one")
    if source.is_dir() and (source / "recipe.yaml").is_file():
        out = out or source
        recipe = str(source / "recipe.yaml")
    resolved = load_recipe(recipe, tuple(overrides or ()))
    return resolved, out or Path("runs") / resolved.name


def _experiment(
    recipe: str,
    out: Path | None,
    overrides: list[str] | None,
    device: str,
    until: str,
    task: str | None = None,
    arm: str | None = None,
    seed: int | None = None,
) -> Experiment:
    from prsl_kernels.experiments.pipeline import run_experiment

    resolved, folder = _recipe(recipe, out, overrides)

    def chosen(stage: Stage) -> bool:
        return all(asked is None or asked == found for asked, found in ((arm, stage.arm), (seed, stage.seed)))

    return run_experiment(
        resolved,
        folder,
        device=_device(device),
        until=until,
        task=task,  # type: ignore[arg-type]  # whatever was typed; a task that is not there is refused by name
        only=chosen,
    )


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name!r}: not usable here ({reason}); try --device cpu") from None
    return name


@app.command()
def run(recipe: RecipeArgument, out: OutOption = None, set_: SetOption = None, device: DeviceOption = "auto") -> None:
    """Runs all stages of a recipe; finished ones are skipped, an interrupted one goes on."""
    _show_headline(_experiment(recipe, out, set_, device, "report").run)


def _show_headline(folder: Path) -> None:
    from prsl_kernels.experiments.pipeline import HEADLINE, TESTS

    typer.echo(f"\nReport: {(folder / 'report.html').resolve()}")
    for line in (folder / HEADLINE).read_text(encoding="utf-8").splitlines():
        typer.echo(f"  {line}")
    for page in sorted((folder / TESTS).glob("*/report.html")):
        typer.echo(f"On {page.parent.name}: {page.resolve()}")


@app.command()
def plan(
    recipe: RecipeArgument,
    out: OutOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="Plan for A100, H100, H200, RTX 4090 or L40S, wherever this is.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: seconds and bytes.")] = False,
) -> None:
    """Says what a recipe will take: its stages, hours, memory and disk, and what is finished. Starts nothing.

    Hours are those of an idle machine: from finished stages in the run directory, else from a few calls timed here,
    else modelled from the model's size.
    """
    from prsl_kernels.experiments.planning import make_plan, render

    resolved, folder = _recipe(recipe, out, set_)
    found = make_plan(resolved, folder, device=_device(device), gpu=gpu)
    typer.echo(json.dumps(found.as_json(), indent=2, allow_nan=False) if as_json else render(found))


@app.command()
def sweep(
    recipe: RecipeArgument,
    out: OutOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    ray: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="A Ray cluster (auto, HOST:PORT, ray://HOST:PORT) whose nodes all see the run directory; "
            "local is this machine, without Ray.",
        ),
    ] = "local",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Stages at a time, at most; by default as many as the resources allow.")
    ] = None,
) -> None:
    """Runs the stages of a recipe beside each other, each in a worker with the resources that the recipe gives it.

    A stage begins when those that it needs are done. One that fails takes along what needs it, and nothing else;
    a worker that dies is replaced, and goes on where it was. Finished stages are skipped, as in `prsl run`.
    """
    from prsl_kernels.experiments.sweep import LOCAL, sweep

    resolved, folder = _recipe(recipe, out, set_)
    if ray == LOCAL:
        sweep(resolved, folder, device=_device(device), jobs=jobs)
    else:
        from prsl_kernels.experiments.sweep_ray import connected

        with connected(ray) as cluster:
            found = cluster.device(device)
            sweep(resolved, folder, device=found, connect=cluster.workers, jobs=jobs)
    _show_headline(folder)


@app.command(hidden=True)
def stage(
    run: Annotated[Path, typer.Argument()],
    name: Annotated[str, typer.Argument()],
    key: Annotated[str, typer.Option()],
    device: DeviceOption = "auto",
) -> None:
    """What a worker of `prsl sweep` runs: one stage, for as long as its standard input is open."""
    from prsl_kernels.experiments.sweep import end_with_input, run_stage

    end_with_input()
    run_stage(run, name, key=key, device=_device(device))


@app.command()
def finetune(
    recipe: RecipeArgument,
    out: OutOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    task: TaskOption = None,
    arm: ArmOption = None,
    seed: SeedOption = None,
) -> None:
    """Fine-tunes the arms from the base checkpoint."""
    _experiment(recipe, out, set_, device, "finetune", task, arm, seed)


@app.command()
def attack(
    recipe: RecipeArgument,
    out: OutOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    task: TaskOption = None,
    arm: ArmOption = None,
    seed: SeedOption = None,
) -> None:
    """Attacks the test images of each fine-tuned arm and records what it says of them."""
    _experiment(recipe, out, set_, device, "attack", task, arm, seed)


@app.command()
def evaluate(
    recipe: RecipeArgument,
    out: OutOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    task: TaskOption = None,
) -> None:
    """Scores what the arms said, clean and attacked."""
    _experiment(recipe, out, set_, device, "evaluate", task)


@app.command()
def report(
    recipe: RecipeArgument, out: OutOption = None, set_: SetOption = None, device: DeviceOption = "auto"
) -> None:
    """Writes the report of a run: one HTML file and its figures."""
    experiment = _experiment(recipe, out, set_, device, "report")
    typer.echo((experiment.run / "report.html").resolve())


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Finished run directories.")],
    out: Annotated[Path | None, typer.Option("--out", help="Also as a page, in this HTML file.")] = None,
) -> None:
    """Puts runs side by side: endpoints, arms, effects, settings, and what keeps them from being comparable."""
    from prsl_kernels.experiments.report.compare import compare_runs

    typer.echo(compare_runs(runs, out))


@app.command()
def score(
    candidates: Annotated[Path, typer.Argument(help="JSON: {id: caption}.")],
    references: Annotated[Path, typer.Argument(help="JSON: {id: [captions]}.")],
    encoder: Annotated[
        str | None, typer.Option(help="A local folder of the encoder for BERTScore; by default the packaged MiniLM.")
    ] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="The encoder's layer for BERTScore.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Only these scores, separated by commas.")] = None,
) -> None:
    """BLEU, ROUGE-L, CIDEr, METEOR and BERTScore of anybody's captions, as JSON on standard output."""
    from prsl_kernels.experiments.config import METRICS
    from prsl_kernels.experiments.metrics import score_files

    chosen = METRICS if metrics is None else tuple(metrics.split(","))
    result = score_files(candidates, references, metrics=chosen, encoder=encoder, num_layers=num_layers)
    typer.echo(json.dumps(result, indent=2, allow_nan=False))


@app.command("train-base")
def train_base(
    task: Annotated[str, typer.Argument(help="captions or vqa.")],
    out: Annotated[Path | None, typer.Option(help="The model folder to make; by default bases/<task>.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Shortens or prolongs the recipe.")] = None,
) -> None:
    """Trains a base checkpoint of the embedded tasks from nothing; interrupted, it goes on where it was."""
    from prsl_kernels.experiments.training.base import train_base as train

    typer.echo(train(task, out or Path("bases") / task, seed=seed, steps=steps).resolve())


@data_app.command()
def fetch() -> None:
    """Downloads the packages with the embedded data from PyPI, verifies their checksums and unpacks them."""
    from prsl_kernels.experiments.data.packages import fetch_packages

    for name, folder in fetch_packages(download=True).items():
        typer.echo(f"{name}: {folder}")


@data_app.command("check")
def check_data(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The folder of a data set.")],
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="NAME", help="coco, visual-genome, natural-images, imagefolder or datasets."),
    ] = None,
    exclude_coco: Annotated[
        str | None, typer.Option("--exclude-coco", metavar="PATH", help="COCO's folder; its test images are excluded.")
    ] = None,
) -> None:
    """Says what is in a folder, what is missing or unreadable, and what it would be used for."""
    from prsl_kernels.experiments.data.check import check

    lines, usable = check(path, layout, exclude_coco)
    for line in lines:
        typer.echo(printable(line))
    if not usable:
        raise typer.Exit(1)


@model_app.command()
def combine(
    encoder: Annotated[str, typer.Argument(help="An image encoder: a folder, or a downloaded Hub name.")],
    decoder: Annotated[str, typer.Argument(help="A language model such as openai-community/gpt2, in the same way.")],
    out: Annotated[Path, typer.Argument(help="The model folder to make.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the new weights, those of the cross attention.")] = 0,
) -> None:
    """Makes a captioner, not yet trained, of an image encoder and a language model."""
    from prsl_kernels.experiments.models.combine import combine as join

    typer.echo(join(encoder, decoder, out, seed=seed).resolve())


@app.command()
def doctor() -> None:
    """Says what is installed, which backends run here, and why the others do not."""
    from prsl_kernels.experiments.doctor import diagnose

    typer.echo(diagnose())


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM is treated as Ctrl-C is: what is finished stays, what is not goes on next time."""
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the command line."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


if __name__ == "__main__":
    main()
