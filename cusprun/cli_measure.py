"""`cusprun-edge bench`, `eval`, `compare`, `report`: figures of artifacts as they ship, and the page of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cusprun import completion
from cusprun.errors import InvalidRequest
from cusprun.flags import Json, print_json


class Score(StrEnum):
    """Which tokens of a window count."""

    second_half = "second-half"
    all = "all"


Threads = Annotated[int | None, typer.Option(min=1, help="Threads; default: physical cores.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.", autocompletion=completion.devices)]
Against = Annotated[
    Path | None,
    typer.Option(help="The artifact to compare with, such as the dense model.", autocompletion=completion.experts),
]


def bench(
    artifact: Annotated[
        list[Path],
        typer.Argument(
            help="A .gguf file, a model folder or an expert's folder; of a profile the model.",
            autocompletion=completion.experts,
        ),
    ],
    against: Against = None,
    prefill: Annotated[str | None, typer.Option(help="Tokens of prompts, with commas; default 128,512,2048.")] = None,
    decode: Annotated[str | None, typer.Option(help="Tokens generated, with commas; default 128.")] = None,
    depth: Annotated[
        str | None, typer.Option(help="Tokens in the cache before them, with commas; default 0,2048.")
    ] = None,
    threads: Annotated[str | None, typer.Option(help="Threads, with commas; default: physical cores.")] = None,
    repetitions: Annotated[int | None, typer.Option(help="Rounds, instead of --until.")] = None,
    until: Annotated[
        str | None, typer.Option(help="Rounds until every standard error is below this share; default 2%.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="No further round after this time; default with --until: 600.")
    ] = None,
    device: Device = "cpu",
    csv: Annotated[Path | None, typer.Option(help="Write a line per test, in llama-bench's columns.")] = None,
    md: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Instead write what a dense model's layers cost here, for build --device-profile."),
    ] = None,
    quant: Annotated[
        list[str] | None, typer.Option(help="Types of the profile, with commas.", autocompletion=completion.types)
    ] = None,
    json_: Json = False,
) -> None:
    """Measure tokens per second, time to first token, load time and memory, each run in a fresh process.

    Rounds alternate between the artifacts until the errors are small; an interrupted bench goes on with the same
    command. With --profile it writes what one dense model's layers cost here, for build --device-profile.

    Writes --csv, --md and --profile where they are given.

    See also: compare, eval, build.

    Example: cusprun-edge bench expert --against dense.gguf
    """
    if profile is not None or quant:
        others = (against, prefill, decode, depth, repetitions, until, max_seconds, csv, md)
        _profile(artifact, profile, quant or [], threads, _device(device), any(value is not None for value in others))
        return
    from cusprun.benchmarks.request import Request, measure

    asked = Request(
        artifacts=[_artifact(path) for path in artifact], against=_artifact(against) if against else None,
        prefill=prefill, decode=decode, depth=depth, threads=threads, repetitions=repetitions, until=until,
        max_seconds=max_seconds, device=_device(device), csv=csv, md=md,
    )  # fmt: skip
    found = measure(asked)
    if json_:
        print_json(found)
    else:
        from cusprun.benchmarks.speed_table import bench_tables
        from cusprun.benchmarks.tables import print_tables

        print_tables(bench_tables(found))


def _profile(
    models: list[Path], profile: Path | None, quants: list[str], threads: str | None, device: str, others: bool
) -> None:
    if profile is None:
        raise InvalidRequest("--quant names the types of a profile: write --profile FILE too")
    if len(models) != 1 or others or (threads is not None and not threads.isdigit()):
        raise InvalidRequest("--profile is of one dense model and goes with --quant, --threads N and --device alone")
    from cusprun.benchmarks.profile import profile_device

    found = profile_device(str(models[0]), profile, quants, threads=int(threads) if threads else None, device=device)
    for quant, one in found.types.items():
        typer.echo(f"{quant}: {1 / one.seconds.whole:.1f} tokens/s, {one.memory.whole / 1e6:.0f} MB")
    typer.echo(str(profile))


def evaluate(
    artifact: Annotated[
        Path,
        typer.Argument(help="A .gguf file, a model folder or an expert's folder.", autocompletion=completion.experts),
    ],
    text: Annotated[Path | None, typer.Option(help="A text file to measure perplexity and bits per byte on.")] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Items with known answers: a .jsonl file, or an expert's folder for its own.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, NAME[,NAME|FILE.yaml]; a file may run code.")
    ] = None,
    against: Against = None,
    context: Annotated[int, typer.Option(help="Tokens of one window of the text.")] = 512,
    score: Annotated[Score, typer.Option(help="Tokens of a window that count.")] = Score.second_half,
    limit: Annotated[int | None, typer.Option(help="Most items of each kind or task.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a generated answer to a question.")] = 64,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each item of a task.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put tasks through the chat template; questions always are.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure and ask again what was before.")] = False,
    threads: Threads = None,
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Quality of an artifact as it ships: perplexity and bits per byte of a text, answers to questions, harness tasks.

    With --against also what it costs over that one: KL divergence, differences with intervals and p-values. Artifacts
    with different vocabularies are scored over the same bytes: compare their bits per byte.

    Writes answers into the cache, so that they are not asked for again; --fresh asks all the same.

    See also: bench, compare, report.

    Example: cusprun-edge eval expert --text contracts.txt --against dense.gguf --json
    """
    from cusprun.benchmarks import harness
    from cusprun.benchmarks import questions as asking
    from cusprun.benchmarks.kept_quality import evaluate_kept
    from cusprun.benchmarks.tables import print_tables
    from cusprun.benchmarks.task_tables import harness_table, questions_table
    from cusprun.corpora.items import read_items

    if text is None and questions is None and tasks is None:
        raise InvalidRequest("there is nothing to measure on: write --text FILE, --questions FILE or --tasks NAME")
    names = [] if tasks is None else harness.parse_tasks(tasks)
    items = [] if questions is None else read_items(questions)
    if questions is not None:
        asking.check_items(items, limit, max_new_tokens)
    texts = [] if text is None else _texts(text)
    path, other = _artifact(artifact), _artifact(against) if against else None
    runs: dict[str, Any] = {"against": other, "threads": threads, "device": _device(device)}
    found: dict[str, Any] = {}
    if text is not None:
        pair = evaluate_kept(path, {"text": texts}, context=context, score=score.value, fresh=fresh, **runs)["text"]
        found |= pair.as_json()
        if not json_:
            typer.echo("\n".join(pair.as_lines()))
    if questions is not None:
        kinds = asking.evaluate_items(path, items, limit=limit, max_new_tokens=max_new_tokens, fresh=fresh, **runs)
        found["questions"] = {kind: result.as_json() for kind, result in kinds.items()}
        if not json_:
            print_tables([questions_table(found["questions"])])
    if names:
        scores = harness.evaluate_tasks(
            path,
            names,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            fresh=fresh,
            **runs,
        )
        found["tasks"] = {name: result.as_json() for name, result in scores.items()}
        if not json_:
            print_tables([harness_table(found["tasks"])])
    if json_:
        print_json(found)


def _texts(path: Path) -> list[str]:
    """The documents of a file; of running text the file as it is, whose windows do not end with a document."""
    from cusprun.corpora.document import Scenario
    from cusprun.corpora.own import read_own

    documents = [document.text for document in read_own(path, "text", Scenario())]  # says what cannot be read
    return [path.read_text(encoding="utf-8")] if _plain(path) else documents


def compare(
    artifact: Annotated[
        list[Path],
        typer.Argument(help="Experts' folders, .gguf files, ONNX or model folders.", autocompletion=completion.experts),
    ],
    quant: Annotated[
        list[str] | None,
        typer.Option(
            help="Also the dense model in these types, with commas, or `all`; rounded as the expert's.",
            autocompletion=completion.types_or_all,
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="That model; default: the one that the first expert came from.", autocompletion=completion.models
        ),
    ] = None,
    smaller: Annotated[
        list[str] | None, typer.Option(help="A smaller dense model, in the same types; may be repeated.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text to measure on; default: the first expert's held-out texts.")
    ] = None,
    eval_tokens: Annotated[int, typer.Option(min=1024, help="Tokens of each text.")] = 6144,
    repetitions: Annotated[int, typer.Option(min=1, help="Speed runs of each artifact, in alternation.")] = 5,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed and memory too.")] = True,
    md: Annotated[Path | None, typer.Option(help="Write the table to this Markdown file too.")] = None,
    threads: Threads = None,
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Which artifacts are worth shipping: quality against bytes, decode speed and memory, and who dominates whom.

    Writes --md where it is given. Dense models in the types asked for are made in the cache.

    See also: bench, eval, report.

    Example: cusprun-edge compare experts/smollm2-135m-instruct-en-legal-qa --quant q8_0,q4_0
    """
    from cusprun.benchmarks.contenders import compare_artifacts
    from cusprun.benchmarks.frontier import frontier_table
    from cusprun.benchmarks.tables import as_markdown, print_tables
    from cusprun.files import written_whole

    found = compare_artifacts(
        artifact, quants=quant or (), dense=dense, smaller=smaller or (), text=text, eval_tokens=eval_tokens,
        repetitions=repetitions if speed else None, threads=threads, device=_device(device),
    )  # fmt: skip
    if md is not None:
        with written_whole(md) as part:
            part.write_text(as_markdown(frontier_table(found)), encoding="utf-8")
    if json_:
        print_json(found)
    else:
        print_tables([frontier_table(found)])


def _artifact(path: Path) -> Path:
    """The .gguf or model folder that a path stands for."""
    from cusprun.deploy.chat import find_artifact

    return find_artifact(path)


def _plain(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".txt", ".md")


def _device(value: str) -> str:
    if value not in ("cpu", "cuda"):
        raise InvalidRequest(f"--device {value}: write cpu or cuda")
    return value


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="Folders that builds left.", autocompletion=completion.experts),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The .html file; default: the expert's own report/report.html, of many ./report.html."),
    ] = None,
    json_: Json = False,
) -> None:
    """Put one expert or many into one page that opens offline: verdict, tables, plots, sample answers, recipe.

    Writes --out; of one expert without it report/report.html in its folder and a page for each further type.

    See also: build, compare.

    Example: cusprun-edge report experts/en-legal experts/de-legal --out experts.html
    """
    from cusprun.benchmarks.report_page import read_experts, verdicts, write_page, write_pages

    experts = read_experts(folders)
    if out is None and len(folders) == 1:
        paths = write_pages(folders[0])
    else:
        paths = [write_page(experts, out or Path("report.html"))]
    found = [
        {"name": expert.name, "folder": str(expert.folder), "quant": expert.quant, "verdict": list(sentences)}
        for expert, sentences in zip(experts, verdicts(experts), strict=True)
    ]
    if json_:
        print_json({"pages": [str(path) for path in paths], "experts": found})
        return
    for one in found:
        typer.echo("\n".join([str(one["name"]), *one["verdict"], ""]))
    typer.echo("\n".join(map(str, paths)))
