"""`cusprun-edge`: parses, calls, prints; no logic of its own. Heavy imports live in the commands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cusprun import __version__, cli_corpora, cli_doctor, cli_measure, cli_serve, cli_ship, completion, flags
from cusprun.errors import Failed, InvalidRequest, reason_of
from cusprun.flags import Json, print_json
from cusprun.manual import EXIT_CODES, Manual, Sectioned

INTERRUPTED = 130

app = typer.Typer(
    name="cusprun-edge",
    cls=Manual,
    help="Turns a general language model into a small expert for one language, domain and task, and ships it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(cli_corpora.app, name="corpora")

Threads = Annotated[int | None, typer.Option(min=1, help="Threads; default: physical cores.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"cusprun-edge {__version__}")
        raise typer.Exit


def _given(context: typer.Context) -> dict[str, Any]:
    """The flags that were given on the command line, by field name."""
    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name not in ("recipe", "json_") and source is not None and source.name != "DEFAULT":
            given[name] = tuple(value) if isinstance(value, list) else value
    return given


@app.command(cls=Sectioned)
@flags.takes(flags.BUILDING)
def build(context: typer.Context, recipe: flags.Recipe = None, json_: Json = False, **_: Any) -> None:
    """Build an expert: find what the scenario does not need, remove it, export, measure.

    Everything that can be checked is checked first, and a plan is printed with what it takes. A build that was
    interrupted goes on from its last finished stage with the same command.

    Writes into the folder of the expert: recipe.yaml, expert.json, model/, gguf/ or onnx/, report/. Texts and converted
    models are kept in the cache, which CUSPRUN_CACHE moves.

    See also: doctor, corpora list, prune, chat, ship.

    Example: cusprun-edge build --lang en --domain legal --task qa
    """
    _build(_given(context), recipe, json_, upto="expert")


@app.command(cls=Sectioned)
@flags.takes(flags.PRUNING)
def prune(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Dense model: a folder, a .gguf, a hub id, or the default's name.", autocompletion=completion.models
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the expert.")],
    json_: Json = False,
    **_: Any,
) -> None:
    """Stop at the compacted model folder, <out>/model.

    It is a Hugging Face folder: transformers opens it, after `import cusprun` where its layers have different widths.

    Writes into the folder of the expert: recipe.yaml, expert.json, model/.

    See also: build, export, eval.

    Example: cusprun-edge prune HuggingFaceTB/SmolLM2-360M-Instruct --lang en --domain legal --out expert
    """
    _build(_given(context), None, json_, upto="model")


def _build(given: dict[str, Any], recipe: Path | None, as_json: bool, upto: str) -> None:
    from cusprun.recipe import make_recipe, read_recipe

    wish = read_recipe(recipe, given) if recipe is not None else make_recipe(given)
    from cusprun.build import build as run

    try:
        expert = run(wish, upto=upto)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from the last finished stage") from None
    if as_json:
        print_json(expert)
        return
    out = expert["folder"]
    report = Path(out) / "report" / "report.json"
    if upto == "expert" and report.is_file():
        import json

        from cusprun.benchmarks.tables import print_tables, report_tables

        print_tables(report_tables(json.loads(report.read_text(encoding="utf-8"))))
    page = Path(out) / "report" / "report.html"
    if page.is_file():
        typer.echo(f"{page}")
    for artifact in expert["artifacts"]:
        typer.echo(f"{Path(out) / artifact['path']}  {artifact['bytes'] / 2**20:.1f} MiB")
    typer.echo(f"{Path(out) / 'model'}  {expert['expert']['parameters'] / 1e6:.1f} M parameters")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A model folder, dense or compacted.")],
    out: Annotated[
        Path, typer.Option(help="The .gguf to write or a folder for it; the ONNX folder; of several types all.")
    ],
    format: flags.Format = None,
    quant: flags.Quant = None,
    name: Annotated[str | None, typer.Option(help="Name in the file; default: the folder's.")] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="An importance matrix, ours or llama.cpp's, to weigh the rounding by.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text to round by; an importance matrix of it is written beside the file.")
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.field("rounding"),
            help="nearest; imatrix, weighed by an importance matrix; gptq, whose errors are made up for by the weights "
            "still to be rounded; auto (default with a corpus): gptq in four bits, imatrix else.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1024, help="Tokens of that text.")] = 16384,
    tensor_type: flags.TensorType = None,
    split_max_size: Annotated[
        str | None, typer.Option(help="Write a larger .gguf in parts of at most this, such as 500M or 2G.")
    ] = None,
    block_size: flags.BlockSize = None,
    zero_points: flags.ZeroPoints = None,
    output_bits: flags.OutputBits = None,
    context: Annotated[
        int | None, typer.Option(help="Positions of an ONNX model; default: the model's, 32768 at most.")
    ] = None,
    prove: Annotated[
        bool, typer.Option("--prove/--no-prove", help="Run each file beside torch before it is named.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written and write nothing.")] = False,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Write a model folder for llama.cpp (GGUF) or onnxruntime (ONNX), in as many types as wished.

    Each file is run beside torch before it is named; one that computes something else is not kept. What a .gguf will
    take, and which matrices fall back to other types, --dry-run tells first.

    Writes --out, and an importance matrix beside it where text is given.

    See also: build, inspect, bench, compare.

    Example: cusprun-edge export expert/model --format gguf,onnx --quant q4_0,int4 --out shipped
    """
    from cusprun.exporters.request import Settings, export_model, tell

    settings = Settings(
        name=name, rounding=rounding, imatrix=imatrix, corpus=corpus,
        tokens=tokens, tensor_types=tensor_type or (),
        split_max_size=split_max_size, block_size=block_size or 32, zero_points=bool(zero_points),
        output_bits=output_bits or 8, context=context, threads=threads, prove=prove,
    )  # fmt: skip
    found = export_model(model, out, format or (), quant or (), settings, dry_run=dry_run)
    if json_:
        print_json(tell(found))
    else:
        typer.echo("\n".join(line for one in found for line in one.as_lines()))


app.command()(cli_measure.bench)
app.command("eval")(cli_measure.evaluate)
app.command()(cli_measure.compare)
app.command()(cli_measure.report)
app.command()(cli_doctor.doctor)
for _command in (cli_ship.ship, cli_ship.verify, cli_ship.unpack, cli_ship.keygen):
    app.command()(_command)


@app.command()
def chat(
    artifact: Annotated[
        Path,
        typer.Argument(help="An expert's folder, a model folder or a .gguf file.", autocompletion=completion.experts),
    ],
    system: Annotated[str | None, typer.Option(help="What the assistant is told first.")] = None,
    once: Annotated[str | None, typer.Option(help="Answer this prompt and leave.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Share of the probability to draw from.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawing.")] = 0,
    threads: Threads = None,
) -> None:
    """Talk to an expert in the terminal; Ctrl-C ends an answer, Ctrl-D the talk. Text piped in is one prompt.

    Example: cusprun-edge chat experts/smollm2-135m-instruct-en-legal-qa
    """
    from cusprun.deploy.chat import chat as talk
    from cusprun.runtimes import Sampling

    talk(artifact, system=system, once=once, sampling=Sampling(temperature, top_p, max_tokens, seed), threads=threads)


app.command()(cli_serve.run)
app.command()(cli_serve.serve)


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, a .gguf, a hub id, or the default's name.", autocompletion=completion.models
        ),
    ],
    json_: Json = False,
) -> None:
    """Print a model's family, sizes, units per layer and what each export holds of it, from its headers alone.

    See also: export --dry-run, bench.

    Example: cusprun-edge inspect smollm2-135m-instruct
    """
    from cusprun.inspection import as_lines, describe_model

    found = describe_model(model)
    if json_:
        print_json(found)
        return
    typer.echo("\n".join(as_lines(found)))


def main() -> None:
    """Runs the command line; errors of ours become one message on stderr and their exit code."""
    if completion.ASKED in os.environ:
        completion.rejoin_words(os.environ)
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    code = _run(app)
    if code == INTERRUPTED:
        # Where Ctrl-C fell into an exec() of some library's, CPython ends the process by SIGINT in the end, although
        # the interrupt was handled; everything is unwound and said by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(command: Callable[..., Any]) -> int:
    try:
        code = command(standalone_mode=False)  # the parser turns Ctrl-C into the code 130
    except (InvalidRequest, Failed) as error:
        print(f"cusprun-edge: {error}" if "\n" not in str(error) else f"cusprun-edge:\n{error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"cusprun-edge: {reason_of(error)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "cusprun":
            raise
        package = error.name.partition(".")[0]
        print(f"cusprun-edge: the package {package} is missing: pip install cusprun brings it", file=sys.stderr)
        return 2
    except Exception as error:
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):  # not the parser's own usage errors
            raise
        error.show()
        return int(error.exit_code)
    if code == INTERRUPTED:
        print("cusprun-edge: interrupted; the same command goes on from the last finished stage", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
