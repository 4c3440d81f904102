"""Define the commands that answer: generate, chat, serve."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from philora.cli import options
from philora.cli.application import GROUP_USE, add_command, err, out, quiet_transformers, set_up_logging
from philora.errors import ConfigError, fault

if TYPE_CHECKING:
    from philora.generation.batches import GenerationSettings
    from philora.generation.conversation import AdapterPool

PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
PRODUCTS_KEPT = 256
"""oneDNN and PyTorch keep compiled code for every length of prompt, by default for 1,024 of them."""


@add_command(GROUP_USE, "evaluation.md", 'philora generate runs/support --prompt "Where is my order?"', name="generate")
def generate_answers(
    source: options.AdapterArgument,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="File of prompts: conversations as JSONL, JSON, CSV or Parquet, or a .txt with one prompt a line. "
            "-: read lines from standard input.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text of a prompt. May be repeated.", show_default=False)
    ] = None,
    output: Annotated[str | None, typer.Option("--out", help="JSONL file to write. Default: standard output.")] = None,
    base: options.BaseOption = None,
    adapter: Annotated[bool, typer.Option(help="Answer with the adapter, or with the base alone.")] = True,
    max_new_tokens: options.MaxNewTokensOption = 256,
    batch_size: Annotated[int, typer.Option(help="Number of answers generated at a time.")] = 16,
    stop: options.StopOption = None,
    sample: options.SampleOption = False,
    temperature: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    seed: options.SeedOption = 0,
    control_tokens: options.ControlTokensOption = False,
) -> None:
    """Generate answers to a file of prompts, or to prompts on the command line, as JSONL."""
    set_up_logging("warning")
    if (prompts is None) == (not prompt):
        given = "nothing" if prompts is None else "both"
        raise ConfigError(fault("generate", "prompts", given, "--prompts FILE, --prompts - or --prompt TEXT"))
    from philora.generation.batches import GenerationSettings
    from philora.generation.inference import answer_file, prompts_of_lines
    from philora.reporting.progress import evaluation_shown

    asked: Any = prompts if prompts is not None else [[{"role": "user", "content": turn}] for turn in prompt or ()]
    if prompts == "-":
        asked = prompts_of_lines(sys.stdin.buffer.read(), "standard input")
    drawn = (sample, temperature, top_p, top_k, seed)
    settings = GenerationSettings(max_new_tokens, batch_size, *drawn, tuple(stop or ()), control_tokens)
    with evaluation_shown(err):
        lines = answer_file(source, asked, settings, base=base, adapter=adapter, out=output)
    if output is None:
        sys.stdout.write(lines)
    else:
        out.print(f"{output}: {lines.count(chr(10))} answers", highlight=False)


@add_command(GROUP_USE, "chat.md", "philora chat runs/support --web")
def chat(
    source: options.AdapterArgument,
    base: options.BaseOption = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            help="System prompt; -: none. Default: that of the training data, where nearly all of it has the same.",
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokensOption = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Temperature of sampling. 0: always take the likeliest token.")
    ] = 0.0,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of sampling. Default: a new one each time.")] = None,
    stop: options.StopOption = None,
    web: Annotated[
        bool,
        typer.Option(
            "--web", help="Serve a web page with base and adapter side by side, instead of a chat in the terminal."
        ),
    ] = False,
    host: options.HostOption = "127.0.0.1",
    port: options.PortOption = 8080,
    key: options.KeyOption = None,
    votes: Annotated[
        str | None,
        typer.Option(
            "--votes", help="File for the votes given on the page. Default: preferences.jsonl in the run folder."
        ),
    ] = None,
    control_tokens: options.ControlTokensOption = False,
) -> None:
    """Chat with an adapter in the terminal, or in the browser with the answers of its base beside it."""
    set_up_logging("warning")
    if web:
        terminal_only = {"system": system, "temperature": temperature, "top-p": top_p, "top-k": top_k, "seed": seed}
        for option, value in {**terminal_only, "stop": stop}.items():
            if value:
                todo = "Leave it out: the page has fields of its own"
                raise ConfigError(fault("chat", f"--{option}", value, "no such option with --web", todo))
        file = Path(votes) if votes else votes_folder(source) / "preferences.jsonl"
        _serve([source], base, host, port, key, 32, max_new_tokens, file, control_tokens)
        return
    with err.status("loading"):
        from philora.generation.conversation import chat_settings, load_pool, name_of

        quiet_transformers()
        seed = secrets.randbits(31) if seed is None else seed
        settings = chat_settings(max_new_tokens, temperature, top_p, top_k, seed, stop or ())
        name = name_of(source)
    pool = load_pool({name: source}, base)  # on a terminal the bars of transformers and the Hub show the progress
    pool.control_tokens = control_tokens
    _talk(pool, settings, name, system)


@add_command(GROUP_USE, "serving.md", "philora serve support=runs/support --port 8000")
def serve(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Adapters of one base. NAME is the model name that clients use; default: the name of the folder.",
            metavar="[NAME=]RUN_OR_ADAPTER...",
        ),
    ],
    base: options.BaseOption = None,
    host: options.HostOption = "127.0.0.1",
    port: options.PortOption = 8000,
    key: options.KeyOption = None,
    max_requests: Annotated[
        int,
        typer.Option(
            "--max-requests",
            min=1,
            help="Requests in progress or waiting at a time. Further ones are refused with status 429.",
        ),
    ] = 32,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", min=1, help="Length limit of an answer in tokens, for requests that give none."
        ),
    ] = 512,
    control_tokens: options.ControlTokensOption = False,
) -> None:
    """Serve base and adapters over an API that OpenAI's clients can use."""
    set_up_logging("warning")
    _serve(sources, base, host, port, key, max_requests, max_new_tokens, None, control_tokens)


def votes_folder(source: str) -> Path:
    """Return the default folder of votes: the run folder, also if its adapter or a checkpoint was named."""
    from philora.models.run_folder import run_of

    folder = Path(source).expanduser()
    return run_of(folder) or (folder if folder.is_dir() else Path())


def _serve(
    sources: list[str],
    base: str | None,
    host: str,
    port: int,
    key: str | None,
    max_requests: int,
    max_new_tokens: int,
    votes: Path | None,
    control_tokens: bool,
) -> None:
    """Load the adapters and serve them until a signal; with `votes`, the page too."""
    for name in PRODUCT_CACHES:
        os.environ.setdefault(name, str(PRODUCTS_KEPT))
    with err.status("loading"):
        try:
            import uvicorn  # noqa: F401
        except ModuleNotFoundError as error:
            todo = "Install them: pip install 'philora[serve]'"
            raise ConfigError(fault("philora", "serve", error.name, "uvicorn and starlette", todo)) from error
        from philora.serving import app as serving
        from philora.serving import connections
        from philora.serving import votes as vote_files
        from philora.serving.questions import held_out_questions
        from philora.serving.scheduler import Scheduler

        connections.check_key(host, key)
        if votes is not None:
            vote_files.check_votes(votes)
        bound = connections.listen(host, port)
        from philora.generation.conversation import chat_settings, load_named

        quiet_transformers()
    pool = load_named(sources, base)
    pool.control_tokens = control_tokens
    defaults, hosts = chat_settings(max_new_tokens), connections.hosts_of(host)
    scheduler = Scheduler(pool, limit=max_requests)
    asked = held_out_questions(sources[0]) if votes is not None else ()
    served = serving.build_app(
        pool, defaults=defaults, scheduler=scheduler, key=key, hosts=hosts, votes=votes, questions=asked
    )
    address = connections.address_of(bound)
    if votes is not None:
        out.print(f"page:   {address}/{f'#key={key}' if key else ''}", highlight=False)
        out.print(f"votes:  {votes}", highlight=False)
    out.print(f"models: {', '.join((*pool.adapters, pool.base))}", highlight=False)
    for adapter, trained in pool.systems.items():
        out.print(f"{adapter}: {trained}, where a request has none of its own", highlight=False)
    out.print(f"API:    {address}/v1\nCtrl-C stops the server", highlight=False)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after it has stopped
        connections.Server(served, scheduler).run(sockets=[bound])


def _talk(pool: AdapterPool, settings: GenerationSettings, name: str, system: str | None) -> None:
    """Hold a conversation on the terminal, or over a pipe."""
    from philora.generation.conversation import Conversation
    from philora.serving import terminal as terminals

    interactive = sys.stdin.isatty()
    if interactive:
        terminals.complete_commands()
        err.print(f"[dim]{escape(name)} on {escape(pool.base)}; /help lists the commands[/]", highlight=False)
    trained = pool.systems.get(name)
    if system is None and trained is not None:
        system = trained.text
        err.print(f"[dim]{escape(str(trained))} (/system - removes it)[/]", highlight=False)

    def read() -> str:
        if interactive:
            return input("> ")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(text: str) -> None:
        err.print(f"[dim]{escape(text)}[/]", highlight=False)

    wrapped = terminals.WordWrap(write, lambda: shutil.get_terminal_size().columns) if sys.stdout.isatty() else write
    guard = terminals.typing_ignored if interactive else contextlib.nullcontext
    conversation = Conversation(pool, settings, name, None if system == "-" else system)
    terminal = terminals.Terminal(conversation, read, wrapped, note, guard)
    terminal.run()
    if terminal.refused and not interactive:
        sys.exit(2)
