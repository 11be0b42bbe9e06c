"""`cusprun-edge run`, `serve`: an artifact continues a text, or answers over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cusprun import completion
from cusprun.errors import InvalidRequest

Artifact = Annotated[
    Path,
    typer.Argument(
        help="An expert's folder, a .gguf file, an ONNX folder or a model folder.",
        show_default=False,
        autocompletion=completion.experts,
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; default: physical cores.")]
Context = Annotated[int, typer.Option(min=16, help="Tokens of prompt and answer together.")]


def run(
    artifact: Artifact,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; without one, stdin is read.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Share of the probability to draw from.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawing.")] = 0,
    context: Context = 4096,
    threads: Threads = None,
) -> None:
    """Continue a text: no roles, no chat template. `chat --once` asks a question instead.

    See also: chat, serve.

    Example: cusprun-edge run expert "This agreement is made between"
    """
    from cusprun.deploy.run import run as continue_text
    from cusprun.runtimes import Sampling

    sampling = Sampling(temperature, top_p, max_tokens, seed)
    continue_text(artifact, prompt, sampling=sampling, threads=threads, context=context)


def serve(
    artifact: Artifact,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback demands a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one and prints it.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="CUSPRUN_API_KEY", help="Key that clients send; better in the environment.", metavar="KEY"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's id; default: the expert's name.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name in the Host header; may be repeated.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="A web origin that may call, such as https://example.org; repeat.")
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, max=64, help="Answers generated at once, each with a context and threads of its own.")
    ] = 1,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are answered with 429.")] = 32,
    context: Context = 4096,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    max_body: Annotated[str, typer.Option(help="Largest request, such as 1MB.")] = "1MB",
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds from a request to its last token; then an answer is cut.")
    ] = 300,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for running answers after SIGTERM or Ctrl-C.")] = 30,
    threads: Threads = None,
    browser: Annotated[
        bool, typer.Option("--browser", help="What is named is a browser's bundle: show its page to a browser here.")
    ] = False,
) -> None:
    """Answer over HTTP as OpenAI's interface does: chat and plain completions, streams, models, health, metrics.

    The address goes to stdout once it answers. SIGTERM or Ctrl-C lets running answers end, a second one does not.

    With --browser, the page of a bundle that `ship --target browser` made, with the headers that let it use threads; of
    the other options --host and --port count.

    See also: chat, run, ship --target server.

    Example: cusprun-edge serve experts/smollm2-135m-instruct-en-legal-qa --port 8080
    """
    if browser:
        from cusprun.deploy.static import serve_folder

        serve_folder(artifact, host, port)
        return
    from cusprun.budget import parse_bytes
    from cusprun.deploy.serve import serve as answer
    from cusprun.deploy.serve.settings import Settings

    try:
        body = parse_bytes(max_body)
    except ValueError as error:
        raise InvalidRequest(f"--max-body: {error}") from error
    settings = Settings(
        host=host, port=port, api_key=api_key, name=name, allow_hosts=tuple(allow_host or ()),
        origins=tuple(cors or ()), parallel=parallel, queue=queue, context=context, max_tokens=max_tokens,
        max_body=body, timeout=timeout, grace=grace, threads=threads,
    )  # fmt: skip
    answer(artifact, settings)
