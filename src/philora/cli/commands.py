"""The command line: the only module that exits. What a run shows is printed by `philora.reporting.display`.

Exit codes: 0 done; 1 a run failed; 2 usage, configuration or data; 3 a run was stopped by a signal, has saved what it
had done and says how to go on; 130 (Ctrl-C) and 143 (SIGTERM) where nothing is saved to go on from. With --json
standard output holds one JSON document.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from philora import __version__
from philora.errors import ConfigError, PhiloraError, fault
from philora.interface.choices import SETTINGS, choose, stem
from philora.reporting import display
from philora.runtime import process_state, processes
from philora.runtime.signals import StopOnSignal

if TYPE_CHECKING:
    from philora.training.readiness import Preflight

app = typer.Typer(
    name="philora",
    help="Fine-tune Phi language models with LoRA on your own chat data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


out = display.SafeConsole(soft_wrap=True)
err = display.SafeConsole(stderr=True, soft_wrap=True)


def _complete_setting(incomplete: str) -> list[str]:
    """Settings that a word of the shell may become: those of philora, TRL and PEFT, by their source."""
    from philora.configuration import schema
    from philora.configuration.fields import FIELDS

    libraries = {"training_config": schema.training_fields(), "peft_config": schema.lora_fields()}
    names = {*FIELDS, *(f"{section}.{name}" for section, fields in libraries.items() for name in fields)}
    return sorted(f"{each}=" for each in names if each.startswith(incomplete))


def _complete_run(incomplete: str) -> list[str]:
    """Run folders that a word of the shell may become, and the folders on the way to them."""
    start = Path(incomplete)
    around, beginning = (start, "") if incomplete.endswith("/") or not incomplete else (start.parent, start.name)
    folders = [each for each in sorted(around.glob("*")) if each.is_dir() and each.name.startswith(beginning)]
    folders += [] if incomplete else sorted(each.parent for each in Path().glob("runs/*/config.yaml"))
    shown = [each for each in folders if not each.name.startswith(".") or beginning.startswith(".")]
    return [str(each) if (each / "config.yaml").is_file() else f"{each}/" for each in shown]


ConfigArgument = Annotated[
    str, typer.Argument(help="YAML file of the run, or its data: a file or folder.", metavar="CONFIG_OR_DATA")
]
AdapterArgument = Annotated[
    str,
    typer.Argument(
        help="Run folder, adapter folder, loralib file or hub id (OWNER/NAME/SUBFOLDER@REVISION).",
        metavar="RUN_OR_ADAPTER",
        autocompletion=_complete_run,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", help="Base model; default: the run's, or the one that the adapter names.", show_default=False
    ),
]
HostOption = Annotated[str, typer.Option("--host", help="Address to listen on; beyond this machine it needs a key.")]
PortOption = Annotated[int, typer.Option("--port", help="Port; 0 takes one that is free.", min=0, max=65535)]
KeyOption = Annotated[
    str | None,
    typer.Option("--api-key", envvar="PHILORA_API_KEY", help="Key that requests must bring.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that go over the file's.", metavar="[KEY=VALUE]...", autocompletion=_complete_setting
    ),
]


def _setting(flag: str, help: str) -> Any:
    """An option that is a setting of the configuration, which checks its value."""
    return typer.Option(flag, help=help, show_default=False, rich_help_panel="Settings")


ModelFlag = Annotated[str | None, _setting("--model", "Base: a hub id, a folder, or a name such as phi-3-mini.")]
EvalFlag = Annotated[str | None, _setting("--eval", "Held-out data: a file, or a share of the data such as 0.1.")]
OutFlag = Annotated[str | None, _setting("--out", "Run folder.")]
EpochsFlag = Annotated[str | None, _setting("--epochs", "Passes over the data.")]
LearningRateFlag = Annotated[str | None, _setting("--learning-rate", "At its peak, such as 1e-4.")]
BatchSizeFlag = Annotated[str | None, _setting("--batch-size", "Rows of a micro-batch on each device.")]
MaxLengthFlag = Annotated[str | None, _setting("--max-length", "Longest row, in tokens.")]
SeedFlag = Annotated[str | None, _setting("--seed", "Of the split, the order and the adapter's start.")]
RankFlag = Annotated[str | None, _setting("--rank", "Rank of the adapter.")]
AlphaFlag = Annotated[str | None, _setting("--alpha", "Its multiplier is alpha / rank.")]
DropoutFlag = Annotated[str | None, _setting("--dropout", "On the adapter's input.")]
TargetsFlag = Annotated[str | None, _setting("--target-modules", "Such as q_proj,v_proj; all-linear: all of them.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Show warnings and what goes wrong, nothing else.")]

PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
PRODUCTS_KEPT = 256
"""A server's prompts have every length, and oneDNN and PyTorch keep compiled code for each: 1,024 by default."""

# For completion, which must not load torch; `philora.exporting` has the same words.
FORMATS = ("peft", "loralib", "gguf", "ollama")
LAYOUTS = ("server", "fused", "slices", "merged", "adapter", "base+adapter")
FILE_TYPES = ("f16", "q8_0", "f32")

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
SampleOption = Annotated[bool, typer.Option("--sample", help="Draw each token; default: the likeliest.")]
TemperatureOption = Annotated[float | None, typer.Option(help="Of sampling; default: the model's own.")]
TopPOption = Annotated[float | None, typer.Option(help="Of sampling; default: the model's own.")]
TopKOption = Annotated[int | None, typer.Option(help="Of sampling; default: the model's own.")]
SeedOption = Annotated[int, typer.Option(help="Of sampling.")]
ControlTokensOption = Annotated[
    bool,
    typer.Option("--control-tokens", help="Read control tokens inside messages as such; default: as text."),
]


def _version(shown: bool) -> None:
    if shown:
        out.print(f"philora {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if debug:
        os.environ["PHILORA_DEBUG"] = "1"
    name = context.invoked_subcommand
    if processes.count() > 1 and name != "train":
        todo = f"Start it without a launcher: philora {name}"
        raise ConfigError(fault("philora", "command", name, "train, the command that several processes share", todo))


@app.command()
def demo(
    output: Annotated[str, typer.Option("--out", help="Run folder; a number is added when it is taken.")] = "runs/demo",
    overrides: Overrides = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune the bundled nano model on the bundled help desk, and show that it worked."""
    from philora.configuration.folders import unused_folder

    folder = unused_folder(Path(output))
    _train("demo", [f"training_config.output_dir={folder}", *(overrides or [])], False, as_json)


@app.command()
def init(
    data: Annotated[str, typer.Argument(help="File, folder or hub id of conversations.", metavar="DATA")],
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder, or a name such as phi-3-mini; default: one that fits this machine."),
    ] = None,
    output: Annotated[str | None, typer.Option("--out", help="YAML file; default: named after the data.")] = None,
) -> None:
    """Write a short configuration for DATA, and check it."""
    _logging("warning")
    from philora.files.checkpoint import write_text

    file = Path(output) if output else Path(f"{stem(data)}.yaml")
    if file.exists():
        expected = "a file that is not there yet"
        raise ConfigError(fault("init", "out", str(file), expected, "Give another with --out, or remove this one"))
    with err.status("looking at the data"):
        from philora.planning.starter import start

        begun = start(data, model)
    write_text(file, begun.text)
    out.print(f"{file}: {begun.found}\n", highlight=False, markup=False)
    out.print(begun.text, highlight=False, markup=False)
    _check(str(file), [], f"philora train {shlex.quote(str(file))}", False, False)


@app.command()
def train(
    context: typer.Context,
    config: ConfigArgument,
    overrides: Overrides = None,
    model: ModelFlag = None,
    evaluation: EvalFlag = None,
    output: OutFlag = None,
    epochs: EpochsFlag = None,
    learning_rate: LearningRateFlag = None,
    batch_size: BatchSizeFlag = None,
    max_length: MaxLengthFlag = None,
    seed: SeedFlag = None,
    rank: RankFlag = None,
    alpha: AlphaFlag = None,
    dropout: DropoutFlag = None,
    target_modules: TargetsFlag = None,
    resume: Annotated[
        str, typer.Option("--resume", help="Go on from the newest whole checkpoint: yes, or force (changed settings).")
    ] = "",
    quiet: QuietFlag = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune as CONFIG says, or on DATA by settings that fit it, evaluate before and after, write the run folder."""
    if resume not in ("", "yes", "force"):
        raise typer.BadParameter(f"{resume!r}: expected --resume or --resume=force")
    given = [*(overrides or []), *_flagged(context)]
    _train(config, given, "force" if resume == "force" else bool(resume), as_json, quiet)


@app.command()
def check(
    context: typer.Context,
    config: ConfigArgument,
    overrides: Overrides = None,
    model: ModelFlag = None,
    evaluation: EvalFlag = None,
    output: OutFlag = None,
    epochs: EpochsFlag = None,
    learning_rate: LearningRateFlag = None,
    batch_size: BatchSizeFlag = None,
    max_length: MaxLengthFlag = None,
    seed: SeedFlag = None,
    rank: RankFlag = None,
    alpha: AlphaFlag = None,
    dropout: DropoutFlag = None,
    target_modules: TargetsFlag = None,
    quiet: QuietFlag = False,
    as_json: JsonOption = False,
) -> None:
    """Look at everything a run needs before any weight is loaded: data, labels, targets, memory, time."""
    _logging("warning")
    words = [each for each in sys.argv[1:] if each not in ("--json", "--quiet")]
    command = shlex.join(["philora", *("train" if each == "check" else each for each in words)])
    _check(config, [*(overrides or []), *_flagged(context)], command, as_json, quiet)


def _check(config: str, overrides: list[str], command: str, as_json: bool, quiet: bool) -> None:
    """Show what `check` found, and its verdict with the command that starts the run."""
    with err.status("checking"):
        from philora.training.readiness import preflight

        source, given, _ = choose(config, overrides)
        found = preflight(source, given)
    if as_json:
        _print_json({**found.to_dict(), "verdict": found.verdict(command)})
        return
    if not quiet:
        _show_preflight(found)
    verdict = escape(found.verdict(command))
    out.print(f"[bold {'yellow' if found.problems else 'green'}]{verdict}[/]", highlight=False)


def _show_preflight(found: Preflight) -> None:
    out.print(f"[bold]model[/]      {escape(found.model)}")
    out.print(f"[bold]stops[/]      {escape(', '.join(found.stop_tokens))}   padding {escape(found.padding_token)}")
    out.print(f"[bold]device[/]     {escape(str(found.hardware))}")
    table = Table("data", "rows", "tokens", "labels", "longest", "truncated", "dropped", "duplicates", box=None)
    for name, figures in found.data.items():
        keys = ("rows", "tokens", "labels", "longest_tokens", "truncated", "dropped", "duplicates")
        table.add_row(name, *(f"{figures.get(key, 0):,}" for key in keys))
    out.print(table)
    _show_sources(found.sources)
    for notice in found.notices:
        out.print(f"[yellow]notice[/]     {escape(notice)}")
    out.print("\n[bold]one example; the loss is on the coloured tokens[/]")
    out.print(_coloured(found.preview))
    out.print(f"\n[bold]what is trained[/]\n{escape(str(found.coverage))}", highlight=False)
    plan = Table("plan", "", box=None)
    for name, value in found.plan.rows():
        plan.add_row(name, escape(value))
    out.print()
    out.print(plan, highlight=False)
    out.print()


@app.command("data")
def show_data(
    source: Annotated[
        str, typer.Argument(help="Data file, folder or hub id; or the YAML file of a run.", metavar="FILE")
    ],
    overrides: Overrides = None,
    as_json: JsonOption = False,
) -> None:
    """Show what data holds: shape, counts, lengths, repeats, odd rows, e-mail addresses, examples with labels."""
    _logging("error")  # what is found is shown in its place
    from philora.dataset.describe import describe_data

    found = describe_data(source, overrides or [])
    if as_json:
        _print_json(found.to_dict())
        return
    _show_sources(found.sources)
    for name, split in found.splits.items():
        counts = split.counts
        out.print(f"[bold]{name:<10}[/] {counts.rows:,} rows, {counts.duplicates:,} duplicates", highlight=False)
        out.print(f"           tokens of {escape(found.tokenizer)}: {split.tokens}", highlight=False)
        out.print(f"           tokens of answers: {split.answer_tokens}", highlight=False)
        out.print(f"           turns: {split.turns}", highlight=False)
        if split.system_turns is not None:
            text, share = split.system_turns
            out.print(f"           system turn of {share:.0%}: {escape(text)}", highlight=False)
    among = "eval are nearly the same as one of train" if "eval" in found.splits else "train are nearly the same"
    out.print(f"[bold]repeats[/]    {found.near_duplicates:,} rows of {among}", highlight=False)
    for each in found.findings:
        out.print(f"[yellow]found[/]      {escape(str(each))}", highlight=False)
    for notice in found.notices:
        out.print(f"[yellow]notice[/]     {escape(notice)}")
    out.print("\n[bold]examples; the loss is on the coloured tokens[/]")
    for example in found.examples:
        out.print(_coloured(example))


@app.command("evaluate")
def evaluate_adapter(
    source: AdapterArgument,
    data: Annotated[str | None, typer.Option(help="Rows to judge by; default: those the run held out.")] = None,
    base: BaseOption = None,
    answers: Annotated[int | None, typer.Option(min=0, help="Answers to generate; default: as in the run.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to read at most.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Of rouge,bleu,chrf; default: those that are installed.")] = None,
    judge: Annotated[str | None, typer.Option(help="Command that reads answers as JSONL and writes scores.")] = None,
    forgetting: Annotated[bool, typer.Option(help="Score general prompts and plain texts too.")] = True,
    keep_training_rows: Annotated[
        bool, typer.Option("--keep-training-rows", help="Score rows of the training set too.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; default: as in the run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Answers at a time; default: as in the run.")] = None,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = 0,
    output: Annotated[str | None, typer.Option("--out", help="Folder; default: evaluation in the run folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score base and adapter on the same held-out rows: loss, answers, ROUGE, BLEU, chrF, and what was forgotten."""
    _logging("warning" if as_json else "info")
    from philora.evaluation.assessment import evaluate

    changed: dict[str, float | None] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    changed |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    with process_state.quiet_libraries():
        found = evaluate(
            source,
            data=data,
            base=base,
            generation={"do_sample": sample, "seed": seed} | {k: v for k, v in changed.items() if v is not None},
            answers=answers,
            limit=limit,
            metrics=None if metrics is None else [each.strip() for each in metrics.split(",") if each.strip()],
            judge=judge,
            forgetting=forgetting,
            keep_training_rows=keep_training_rows,
            out=output,
            command=shlex.join(["philora", *sys.argv[1:]]),
        )
    if as_json:
        _print_json(found.results)
        return
    for title, figures in (("held-out data", found.figures), ("general prompts and texts", found.forgetting)):
        if figures:
            display.show_figures(out, title, figures)
    out.print(
        f"\nresults: {found.folder / 'results.json'}\nby row:  {found.folder / 'examples.jsonl'}", highlight=False
    )


@app.command("generate")
def generate_answers(
    source: AdapterArgument,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="JSONL, JSON, CSV or Parquet of conversations, or a .txt of prompts; -: lines of standard input.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt; may be given again.", show_default=False)
    ] = None,
    output: Annotated[str | None, typer.Option("--out", help="JSONL file; default: standard output.")] = None,
    base: BaseOption = None,
    adapter: Annotated[bool, typer.Option(help="With the adapter, or the base alone.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Answers at a time.")] = 16,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given again.")] = None,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = 0,
    control_tokens: ControlTokensOption = False,
) -> None:
    """Answer prompts in batches, as JSONL."""
    _logging("warning")
    if (prompts is None) == (not prompt):
        given = "nothing" if prompts is None else "both"
        raise ConfigError(fault("generate", "prompts", given, "--prompts FILE, --prompts - or --prompt TEXT"))
    from philora.generation.batches import GenerationSettings
    from philora.generation.inference import answer_file, prompts_of_lines

    asked: Any = prompts if prompts is not None else [[{"role": "user", "content": each}] for each in prompt or ()]
    if prompts == "-":
        asked = prompts_of_lines(sys.stdin.buffer.read(), "standard input")
    settings = GenerationSettings(
        max_new_tokens,
        batch_size,
        sample,
        temperature,
        top_p,
        top_k,
        seed,
        stop_strings=tuple(stop or ()),
        control_tokens=control_tokens,
    )
    lines = answer_file(source, asked, settings, base=base, adapter=adapter, out=output)
    if output is None:
        sys.stdout.write(lines)
    else:
        out.print(f"{output}: {lines.count(chr(10))} answers", highlight=False)


@app.command()
def chat(
    source: AdapterArgument,
    base: BaseOption = None,
    system: Annotated[
        str | None,
        typer.Option("--system", help="System prompt; default: that of nearly all training data; -: none."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Of sampling, in (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Of sampling, at least 1.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of sampling; default: another each time.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends an answer; may be repeated.")] = None,
    web: Annotated[bool, typer.Option("--web", help="A page in the browser: base and adapter side by side.")] = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8080,
    key: KeyOption = None,
    votes: Annotated[
        str | None, typer.Option("--votes", help="File of the page's votes; default: preferences.jsonl in the run.")
    ] = None,
    control_tokens: ControlTokensOption = False,
) -> None:
    """Talk to an adapter, here or in the browser beside its base."""
    _logging("warning")
    if web:
        terminal_only = {"system": system, "temperature": temperature, "top-p": top_p, "top-k": top_k, "seed": seed}
        for option, value in {**terminal_only, "stop": stop}.items():
            if value:
                todo = "Leave it out: the page has fields of its own"
                raise ConfigError(fault("chat", f"--{option}", value, "no such option with --web", todo))
        file = Path(votes) if votes else _votes_folder(source) / "preferences.jsonl"
        _serve([source], base, host, port, key, 32, max_new_tokens, file, control_tokens)
        return
    with err.status("loading"):
        from philora.generation.conversation import Conversation, chat_settings, load_voices, name_of
        from philora.serving.terminal import Terminal

        _quiet()
        settings = chat_settings(max_new_tokens, temperature, top_p, top_k, _seed(seed), stop or ())
        name = name_of(source)
    voices = load_voices({name: source}, base)  # on a terminal the bars of transformers and the Hub show how far it is
    voices.control_tokens = control_tokens
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ModuleNotFoundError):  # Windows' console edits lines by itself
            import readline  # noqa: F401 - editing and history of `input`

        err.print(f"[dim]{escape(name)} on {escape(voices.base)}; /help says what there is[/]", highlight=False)

    trained = voices.systems.get(name)
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

    terminal = Terminal(Conversation(voices, settings, name, None if system == "-" else system), read, write, note)
    terminal.run()
    if terminal.refused and not interactive:
        sys.exit(2)


@app.command()
def serve(
    sources: Annotated[
        list[str],
        typer.Argument(help="Adapters of one base, with names if you like.", metavar="[NAME=]RUN_OR_ADAPTER..."),
    ],
    base: BaseOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    key: KeyOption = None,
    max_requests: Annotated[
        int, typer.Option("--max-requests", min=1, help="Answers being made or waiting; more are refused with 429.")
    ] = 32,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer where a request does not say.")
    ] = 512,
    control_tokens: ControlTokensOption = False,
) -> None:
    """Answer OpenAI's clients: the base and each adapter is a model of its own."""
    _logging("warning")
    _serve(sources, base, host, port, key, max_requests, max_new_tokens, None, control_tokens)


@app.command()
def merge(
    source: AdapterArgument,
    output: Annotated[str, typer.Option("--out", help="Folder for the merged model.")],
    base: BaseOption = None,
    fresh_base: Annotated[
        bool, typer.Option("--fresh-base", help="After training over a quantised base: merge into its 16-bit weights.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="With --fresh-base: rows for the loss of both bases; default: those that the run held out."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, such as 500MB or 5GB.")] = "2GB",
    verify: Annotated[bool, typer.Option(help="Compare logits of adapter and merged model.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Write a model folder with the adapter added to the weights, a shard at a time."""
    _logging("warning")
    scores = None
    if data is not None and not fresh_base:
        from philora.errors import ConfigError, fault

        todo = "philora evaluate RUN --data FILE scores an adapter as it is"
        raise ConfigError(fault("merge", "data", data, "--fresh-base beside it, whose loss it is for", todo))
    if fresh_base:
        from philora.evaluation.fresh_base import merge_into_fresh_base

        result, scores = merge_into_fresh_base(
            source, output, base=base, data=data, max_shard_size=max_shard_size, verify=verify
        )
    else:
        from philora.exporting.merged_folder import merge_to_folder

        result = merge_to_folder(source, output, base=base, max_shard_size=max_shard_size, verify=verify)
    if as_json:
        _print_json({**_plain(result), "loss": _plain(scores)})
        return
    out.print(f"{result.folder}: {result.shards} file(s), {result.bytes / 1e9:.2f} GB", highlight=False)
    out.print(str(result.agreement) if result.agreement else "not verified", highlight=False)
    if scores is not None:
        out.print(f"loss on {scores.rows:,} rows that were not trained on, with the adapter:", highlight=False)
        for name, each in (("dequantised base", scores.trained_over), ("fresh base (this folder)", scores.fresh)):
            accuracy = f"token accuracy {100 * each.token_accuracy:.1f}%"
            out.print(f"  {name:<25} {each.loss:.4f}, {accuracy}", highlight=False)


@app.command()
def export(
    source: AdapterArgument,
    output: Annotated[str, typer.Option("--out", help="Folder for the result.")],
    format: Annotated[
        str, typer.Option(help="peft, loralib, gguf (llama.cpp) or ollama.", autocompletion=lambda: list(FORMATS))
    ] = "peft",
    layout: Annotated[
        str | None,
        typer.Option(
            help="Of peft: server (one rank, one alpha), fused or slices. "
            "Of gguf and ollama: merged, base+adapter or adapter. Default: the first.",
            show_default=False,
            autocompletion=lambda: list(LAYOUTS),
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of gguf and ollama: f16, q8_0 or f32.", autocompletion=lambda: list(FILE_TYPES))
    ] = "f16",
    base: BaseOption = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Of a loralib file that has no lora.json beside it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the adapter in another layout; nothing is written unless it computes the same."""
    _logging("warning")
    from philora.exporting.conversion import export as convert

    result = convert(source, output, format=format, layout=layout, dtype=dtype, base=base, lora_alpha=lora_alpha)
    if as_json:
        _print_json({"format": format, **_plain(result)})
        return
    out.print(f"{result.folder}: {format}, verified", highlight=False)
    out.print(str(result.agreement), highlight=False)
    if format in ("gguf", "ollama"):
        missing = "llama.cpp: not tried, it is not installed (pip install llama-cpp-python builds it)"
        failed = result.reader_failure and f"unverified by llama.cpp: {result.reader_failure}"
        out.print(str(result.reader or failed or missing), highlight=False)


@app.command()
def push(
    source: AdapterArgument,
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hugging Face Hub.", metavar="REPO_ID")],
    merged: Annotated[bool, typer.Option("--merged", help="Push the whole model, merged and verified.")] = False,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Remove an adapter where a model is pushed, or a model where an adapter is."),
    ] = False,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Of a new repository; default: the owner's setting.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go; send nothing.")] = False,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish the adapter, or the merged model, with its card on the Hugging Face Hub."""
    _logging("warning")
    from philora.reporting.pushing import push as publish

    result = publish(source, repo_id, merged=merged, replace=replace, private=private, dry_run=dry_run, base=base)
    if as_json:
        _print_json(_plain(result))
        return
    table = Table("file", "bytes", box=None)
    for name, size in result.files.items():
        table.add_row(escape(name), f"{size:,}")
    out.print(table)
    if result.removed:
        out.print(escape(f"removed from the repository: {', '.join(result.removed)}"), highlight=False)
    where = f"would go to {result.repo_id}; nothing was sent" if result.url is None else str(result.url)
    out.print(where, highlight=False)


@app.command("config")
def show_config(config: ConfigArgument, overrides: Overrides = None, as_json: JsonOption = False) -> None:
    """Show the effective configuration and where each value comes from."""
    from philora.configuration.config import load_config
    from philora.configuration.writing import explain

    settings, given, _ = choose(config, overrides or [])
    rows = list(explain(load_config(settings, given)))
    if as_json:
        shown = {key: {"value": value, "from": origin} for key, value, origin in rows}
        print(json.dumps(shown, ensure_ascii=False, indent=2, default=str))
        return
    table = Table("setting", "value", "from", box=None)
    for key, value, origin in rows:
        table.add_row(key, escape(json.dumps(value, ensure_ascii=False, default=str)), escape(origin))
    out.print(table)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders; several are compared.", metavar="RUN...")],
    output: Annotated[
        str | None, typer.Option("--out", help="File; default: report.html in the run folder, or comparison.html here.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write report.html of a run again, or one page about several."""
    from philora.reporting.report import write_comparison, write_report

    if len(runs) == 1:
        written = write_report(Path(runs[0]), out=Path(output) if output else None)
    else:
        written = write_comparison([Path(each) for each in runs], Path(output or "comparison.html"))
    if open_it and not webbrowser.open(written.absolute().as_uri()):
        err.print("[yellow]notice:[/] no browser was found: open the file yourself", highlight=False)
    if as_json:
        _print_json({"report": str(written)})
        return
    out.print(str(written), highlight=False)


@app.command("runs")
def show_runs(
    folder: Annotated[str, typer.Argument(help="Folder that holds runs.", metavar="FOLDER")] = "runs",
    as_json: JsonOption = False,
) -> None:
    """List the runs in FOLDER, the newest first: base, date, held-out loss, matching answers, status."""
    from philora.reporting.run_list import list_runs

    found = list_runs(Path(folder).expanduser())
    if as_json:
        _print_json({"runs": [each.to_dict() for each in found]})
        return
    table = Table(box=None)
    for name in ("run", "base", "date", "held-out loss", "exact match", "status"):
        table.add_column(name, no_wrap=True)
    for each in found:
        loss = "" if each.loss is None else f"{each.loss:.4f}"
        loss = loss if each.loss_before is None else f"{each.loss_before:.4f} → {loss}"
        matches = "" if each.exact_match is None else f"{100 * each.exact_match:.1f}%"
        table.add_row(
            escape(each.name), escape(each.base), each.date[:16].replace("T", " "), loss, matches, each.status
        )
    if not found:
        out.print(f"no runs in {folder}", highlight=False)
        return
    display.print_whole(out, table)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what works on this machine: Python, packages, device, compiler, caches, disk, the Hub."""
    _logging("warning")
    with err.status("looking"):
        from philora.cli.doctor import examine

        found = examine()
    broken = [each.name for each in found if each.status == "fault"]
    if as_json:
        _print_json({"works": not broken, "findings": [each.to_dict() for each in found]})
    else:
        colours = {"ok": "green", "note": "yellow", "fault": "red"}
        for each in found:
            todo = f"  {each.todo}" if each.todo else ""
            line = (
                f"[{colours[each.status]}]{each.status.ljust(5)}[/] {each.name.ljust(16)} {escape(each.value + todo)}"
            )
            out.print(line, highlight=False)
        out.print(f"\n{'does not work: ' + ', '.join(broken) if broken else 'philora works here'}", highlight=False)
    if broken:
        sys.exit(1)


@app.command()
def explain(
    entry: Annotated[str | None, typer.Argument(help="Name after `help: philora explain`; default: list them.")] = None,
) -> None:
    """Say what an error message means and what to do, from the troubleshooting page."""
    from philora.cli.troubleshooting import entries, entry_named

    if entry is None:
        table = Table("name", "", box=None)
        for each in entries():
            table.add_row(each.name, escape(each.title))
        out.print(table)
        return
    found = entry_named(entry)
    out.print(f"[bold]{escape(found.title)}[/]\n", highlight=False)
    out.print(escape("\n".join(found.forms)), style="dim", highlight=False)
    out.print(f"\n{escape(found.text)}", highlight=False)


# ------------------------------------------------------------------------------------------------- inside


def _show_sources(sources: dict[str, Any]) -> None:
    """Show which shape each source was read as, how that was recognised, and its first conversations."""
    for each in (source for some in sources.values() for source in some):
        out.print(f"[bold]read[/]       {escape(str(each))}", highlight=False)
        for example in each.examples:
            out.print(f"           [dim]{escape(example)}[/]", highlight=False)


def _coloured(tokens: list[tuple[str, bool]]) -> Text:
    """An example whose tokens with loss are coloured."""
    text = Text()
    for token, labelled in tokens:
        text.append(token, style="black on green" if labelled else "dim")
    return text


def _votes_folder(source: str) -> Path:
    """Where votes go by default: the run folder, also where its adapter or a checkpoint was named."""
    from philora.models.run_folder import run_of

    folder = Path(source).expanduser()
    return run_of(folder) or (folder if folder.is_dir() else Path())


def _flagged(context: typer.Context) -> list[str]:
    """The options that are settings, as overrides."""
    given = []
    for name, key in SETTINGS.items():
        value = context.params[name]
        if value is None:
            continue
        if name == "target_modules" and "," in value:
            value = json.dumps([each.strip() for each in value.split(",")])
        elif name in ("model", "output") or (name == "evaluation" and Path(value).expanduser().exists()):
            value = json.dumps(value, ensure_ascii=False)  # text, whatever YAML would read in it
        given.append(f"{key}={value}")
    return given


def _print_json(data: dict[str, Any]) -> None:
    from philora.files.checkpoint import as_json

    sys.stdout.write(as_json(data))


def _plain(value: Any) -> Any:
    """A result as values that JSON has."""
    if hasattr(value, "_asdict"):
        return {key: _plain(each) for key, each in value._asdict().items()}
    return value.to_dict() if hasattr(value, "to_dict") else value


def _logging(level: str) -> None:
    """Show philora's log lines from `level` on, and keep the libraries' chatter off the terminal."""
    import warnings

    lines = display.log_lines(err, level)
    if not processes.is_main():  # what the first process says, it says for all
        warnings.simplefilter("ignore")
    root = logging.getLogger(display.ROOT)
    root.handlers[:] = [lines]
    root.propagate = False
    root.setLevel(min(logging.INFO, lines.level))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks of optional kernels on import
    display.ignore_future_warnings()
    if not (err.is_terminal and processes.is_main()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _quiet() -> None:
    """Keep the tokenizer's words about refused prompts away, and bars of loading from what is no terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not err.is_terminal:
        transformers_logging.disable_progress_bar()


def _seed(given: int | None) -> int:
    import secrets

    return secrets.randbits(31) if given is None else given


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
        from philora.serving.scheduler import Scheduler

        connections.check_key(host, key)
        if votes is not None:
            serving.check_votes(votes)
        bound = connections.listen(host, port)
        from philora.generation.conversation import chat_settings, load_named

        _quiet()
    voices = load_named(sources, base)
    voices.control_tokens = control_tokens
    defaults = chat_settings(max_new_tokens)
    scheduler = Scheduler(voices, limit=max_requests)
    app = serving.build_app(
        voices, defaults=defaults, scheduler=scheduler, key=key, hosts=connections.hosts_of(host), votes=votes
    )
    address = connections.address_of(bound)
    if votes is not None:
        out.print(f"page:   {address}/{f'#key={key}' if key else ''}", highlight=False)
        out.print(f"votes:  {votes}", highlight=False)
    out.print(f"models: {', '.join((*voices.adapters, voices.base))}", highlight=False)
    for adapter, trained in voices.systems.items():
        out.print(f"{adapter}: {trained}, where a request has none of its own", highlight=False)
    out.print(f"API:    {address}/v1\nCtrl-C ends it", highlight=False)
    with contextlib.suppress(KeyboardInterrupt):  # as it was told to end; uvicorn raises it again when it has ended
        connections.run(app, scheduler, bound)


def _train(source: str, overrides: list[str], resume: bool | str, as_json: bool, quiet: bool = False) -> None:
    from philora.configuration.config import load_config

    _logging("info")
    settings, given, said = processes.on_main(lambda: choose(source, overrides, resume))
    config = load_config(settings, given)
    _logging("warning" if quiet else str(config.training_config.get("log_level", "info")))
    for each in said:
        logging.getLogger("philora.run").info("%s", each)
    command = shlex.join(processes.command(sys.argv[1:]))
    if source == "demo":
        command = shlex.join(processes.command(["train", "demo", *overrides]))  # in the folder that `demo` found
    with (
        StopOnSignal("while loading", command),
        err.status("loading") if processes.is_main() else contextlib.nullcontext(),
    ):
        from philora.reporting.progress import ProgressBar
        from philora.training.run import train as run_training
    if not as_json:
        run_training(config, resume=resume, command=command, quiet=quiet)
        return
    bar = ProgressBar(err)
    try:
        result = run_training(config, resume=resume, callbacks=[bar], command=command, quiet=True)
    finally:
        bar.close()
    if processes.is_main():
        _print_json({"folder": str(result.folder), "adapter": str(result.adapter), **result.results})


def _arguments(arguments: list[str]) -> list[str]:
    """Let `--resume` stand without a value."""
    return ["--resume=yes" if each == "--resume" else each for each in arguments]


def main() -> None:
    """Run the command line; each philora error becomes one readable message and its exit code."""
    # Read by GNU's OpenMP when torch loads it: by default its threads spin for long while they wait for each other,
    # which makes a run more than ten times slower as soon as anything else uses a core.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with process_state.run():
            if app(args=_arguments(sys.argv[1:]), standalone_mode=False) == 130:  # what typer makes of Ctrl-C
                raise KeyboardInterrupt
    except PhiloraError as error:
        _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt:
        _fail("stopped", 130, None)
    except Exception as error:
        if isinstance(error, typer.Exit):
            sys.exit(error.exit_code)
        show = getattr(error, "show", None)
        if show is not None:  # a usage error of the parser
            show()
            sys.exit(2)
        if os.environ.get("PHILORA_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error}\n(philora --debug shows the traceback)", 1, error)


def _fail(text: str, code: int, error: Any) -> None:
    """One message, whatever the number of processes, and the exit code of what went wrong first."""
    with processes.last_word(text, code, error) as (speaks, code):
        if speaks and error is not None and os.environ.get("PHILORA_DEBUG"):
            err.print_exception()
        if speaks:
            err.print(f"[red]philora:[/] {escape(text)}", highlight=False)
            from philora.cli.troubleshooting import entry_of

            if (entry := entry_of(text)) is not None:
                err.print(f"[dim]help: philora explain {entry.name}[/]", highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
