"""The commands and their flags, which become plain calls. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

import lora_cli
from lora_cli.door import door, print_json, tell
from lora_cli.launch import leaving

app = typer.Typer(
    name="lora",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune language models with low-rank adapters from one YAML recipe.",
    epilog="Exit codes: 0 done, 1 a bug, 2 recipe or usage, 3 non-finite loss, 4 out of memory, 5 storage, 6 data, "
    "7 output folder in use, 128 + n stopped by signal n.",
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Change keys, e.g. training.learning_rate=1e-4.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model. Read it first.")
]
AdapterArgument = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder, ours or PEFT's.", show_default=False)
]
Base = Annotated[str | None, typer.Option("--base", help="The base model, if not where the adapter says.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora {lora_cli.__version__}")
        raise typer.Exit


@app.callback()
def lora(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune language models with low-rank adapters from one YAML recipe."""


@app.command(short_help="Train an adapter; run again to resume.")
@door
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; the earlier run is kept aside.")] = False,
    nproc_per_node: Annotated[
        int | None, typer.Option("--nproc-per-node", metavar="N", help="Train in N processes, one on each GPU.")
    ] = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train; the same command again resumes. Writes the adapter and its figures to output_dir."""
    from lora_cli.launch import launched

    if nproc_per_node is not None:
        flags = {"--fresh": fresh, "--trust-remote-code": trust_remote_code, "--json": as_json, "--debug": debug}
        _start_processes(nproc_per_node, recipe, overrides or [], [flag for flag, given in flags.items() if given])
    if not launched():
        _train(recipe, overrides, fresh, trust_remote_code, as_json)
        return
    from lora_cli.distributed import joined

    with joined() as world:
        _train(recipe, overrides, fresh, trust_remote_code, as_json, world)


def _start_processes(count: int, recipe: Path, overrides: list[str], flags: list[str]) -> None:
    """Refuse what one process can refuse for all, start them, and leave with their exit code."""
    from lora_cli.launch import check_devices, check_launch, launch
    from lora_cli.recipe import load_recipe

    check_launch(count)
    loaded = load_recipe(recipe, overrides)
    check_devices(count, loaded.recipe.training.use_cpu)
    raise typer.Exit(launch(count, ["train", *flags, "--", str(recipe), *overrides]))


def _train(
    recipe: Path, overrides: list[str] | None, fresh: bool, remote_code: bool, as_json: bool, world: Any = None
) -> None:
    from lora_cli.recipe import load_recipe

    with world.together() if world else contextlib.nullcontext():
        loaded = load_recipe(recipe, overrides)  # a mistake is told before anything heavy is imported

    from lora_cli.commands.train import train
    from lora_cli.distributed import ALONE
    from lora_cli.report.console import make_console
    from lora_cli.report.training import Silence, TrainingScreen, show_outcome

    world = world or ALONE
    console = make_console()
    screen = Silence() if as_json or not world.is_main else TrainingScreen(console)
    try:
        outcome = train(loaded, screen, fresh=fresh, remote_code=remote_code, world=world)
    finally:
        screen.close()
    if outcome is None:  # the main process shows it
        return
    if as_json:
        print_json(outcome.summary.to_dict())
    else:
        show_outcome(console, outcome)


@app.command(short_help="Check a recipe before training.")
@door
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    nproc_per_node: Annotated[
        int, typer.Option("--nproc-per-node", metavar="N", help="Plan for N processes of one machine.")
    ] = 1,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell everything that can be known before training, in seconds and without weights."""
    from lora_cli.launch import check_count
    from lora_cli.recipe import load_recipe

    check_count(nproc_per_node)
    loaded = load_recipe(recipe, overrides)

    from lora_cli.commands.check import check
    from lora_cli.report.plan import show_check

    result = check(loaded, remote_code=trust_remote_code, processes=nproc_per_node)
    tell(result, show_check, as_json)


@app.command("count-params", short_help="Count total and learnable parameters.")
@door
def count_params(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|ADAPTER|MODEL", help="A recipe, an adapter's folder or a model.")
    ],
    overrides: Overrides = None,
    every_tensor: Annotated[bool, typer.Option("--all", help="List every tensor: name, 1 or 0, elements.")] = False,
    base: Base = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Count parameters, total and learnable, from config.json alone."""
    from lora_cli.commands.count_params import count_params
    from lora_cli.report.console import make_console
    from lora_cli.report.counting import show_counts

    result = count_params(what, overrides, base=base, remote_code=trust_remote_code)
    if as_json:
        print_json(result.to_dict())
    else:
        show_counts(make_console(), result, every_tensor=every_tensor)


@app.command(short_help="Fold an adapter into its base, verified.")
@door
def merge(
    adapter: AdapterArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write (default: ADAPTER-merged).")
    ] = None,
    base: Base = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16 (default: as the base is stored).")
    ] = None,
    onto: Annotated[
        str, typer.Option("--onto", help="Of a run on a quantized base: full, or dequantized (what the run saw).")
    ] = "full",
    rows: Annotated[str | None, typer.Option("--rows", help="Data file to compare on (default: the run's).")] = None,
    verify: Annotated[bool, typer.Option(help="Compare the result with base + adapter.")] = True,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fold an adapter into its base, verify the result, and write a plain model folder."""
    from lora_cli.errors import UsageError

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {dtype} is not known", "use float32, bfloat16 or float16")
    if onto not in ("full", "dequantized"):
        raise UsageError(f"--onto {onto} is not known", "use full or dequantized")

    from lora_cli.commands.merge import merge
    from lora_cli.report.merging import show_merge

    target = output or adapter.resolve().with_name(f"{adapter.resolve().name}-merged")
    report = merge(
        adapter, target, base=base, dtype=dtype, onto=onto, rows=rows, verify=verify, remote_code=trust_remote_code
    )
    tell(report, show_merge, as_json)


@app.command(short_help="Look into an adapter, or compare two.")
@door
def inspect(
    adapter: AdapterArgument,
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", help="Another adapter to compare with.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show an adapter's modules, norms and ranks, and what servers say of it. The base is not read."""
    from lora_cli.commands.inspect import inspect
    from lora_cli.report.inspecting import show_inspection

    found = inspect(adapter, other)
    tell(found, show_inspection, as_json)


@app.command(short_help="Lower an adapter's rank.")
@door
def shrink(
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", show_default=False)],
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="The highest rank to keep.")] = None,
    keep_energy: Annotated[
        float | None,
        typer.Option("--keep-energy", metavar="SHARE", help="Least rank with this share of the squared norm: 0.99."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write an adapter of lower rank with the best approximation of every update. The base is not read."""
    from lora_cli.commands.shrink import shrink
    from lora_cli.report.rewriting import show_shrink

    report = shrink(adapter, output, rank=rank, keep_energy=keep_energy)
    tell(report, show_shrink, as_json)


@app.command(short_help="Make several adapters into one.")
@door
def combine(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Folders of adapters of one base.")],
    weights: Annotated[str, typer.Option("--weights", help="One for each adapter, such as 0.7,0.3.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", show_default=False)],
    method: Annotated[
        str, typer.Option("--method", help="cat (the exact sum), svd, linear, ties, dare_linear or dare_ties.")
    ] = "cat",
    density: Annotated[float, typer.Option("--density", help="Share of numbers kept by ties and dare_*.")] = 0.5,
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="Rank of svd (default: the highest).")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the numbers that dare_* drops.")] = 42,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Combine adapters of one base as PEFT's add_weighted_adapter does. The base is not read."""
    from lora_cli.errors import UsageError

    try:
        numbers = [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UsageError(f"--weights {weights} is no list of numbers", "write it as --weights 0.7,0.3") from None

    from lora_cli.adapters.combining import Settings
    from lora_cli.commands.combine import combine
    from lora_cli.report.rewriting import show_combine

    report = combine(adapters, numbers, output, Settings(method, density, rank, seed))
    tell(report, show_combine, as_json)


@app.command(short_help="Write an adapter for a server.")
@door
def export(
    adapter: AdapterArgument,
    server: Annotated[str, typer.Option("--for", metavar="SERVER", help="peft, vllm, sglang or llama.cpp.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write (default: ADAPTER-SERVER).")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    base: Base = None,
    rows: Annotated[str | None, typer.Option("--rows", help="Data file to compare on (default: the run's).")] = None,
    verify: Annotated[bool, typer.Option(help="Compare logits with base + adapter, if the base is here.")] = True,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write an adapter with scale 1 and one rank, which the server reads as it was trained, and check that it does."""
    from lora_cli.commands.export import export
    from lora_cli.report.rewriting import show_export

    target = output or adapter.resolve().with_name(f"{adapter.resolve().name}-{server}")
    report = export(
        adapter,
        target,
        server=server,
        dtype=dtype,
        base=base,
        rows=rows,
        verify=verify,
        remote_code=trust_remote_code,
    )
    tell(report, show_export, as_json)


@app.command(short_help="Print every recipe key.")
@door
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table, the one in the README.")] = False,
    debug: Debug = False,
) -> None:
    """Print every key of a recipe as a JSON schema, for editors, or as a table."""
    from lora_cli.recipe.document import json_schema, key_table

    typer.echo(key_table() if markdown else json.dumps(json_schema(), indent=2))


def main() -> None:
    with leaving():
        app()
