"""Define the commands that merge, export and publish an adapter: merge, export, push."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from philora.cli import options
from philora.cli.application import GROUP_SHARE, add_command, out, plain_values, print_json, set_up_logging
from philora.reporting import display


@add_command(GROUP_SHARE, "memory.md", "philora merge runs/support --out merged")
def merge(
    source: options.AdapterArgument,
    output: Annotated[
        str, typer.Option("--out", help="Folder to write the merged model to; must be empty or not exist.")
    ],
    base: options.BaseOption = None,
    fresh_base: Annotated[
        bool,
        typer.Option("--fresh-base", help="Merge into the 16-bit weights of a base that was quantised in training."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="With --fresh-base: rows on which the loss over both bases is measured. Default: the held-out rows."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size limit of a file of weights, such as 500MB or 5GB.")] = "2GB",
    verify: Annotated[
        bool, typer.Option(help="Compare the logits of the merged model with those of base and adapter.")
    ] = True,
    as_json: options.JsonOption = False,
) -> None:
    """Write a model folder with the adapter merged into the weights, one shard at a time."""
    set_up_logging("warning")
    scores = None
    if data is not None and not fresh_base:
        from philora.errors import ConfigError, fault

        todo = "philora evaluate RUN --data FILE scores an adapter as it is"
        raise ConfigError(fault("merge", "data", data, "--fresh-base too, because its loss is measured on it", todo))
    if fresh_base:
        from philora.evaluation.fresh_base import merge_into_fresh_base

        result, scores = merge_into_fresh_base(
            source, output, base=base, data=data, max_shard_size=max_shard_size, verify=verify
        )
    else:
        from philora.exporting.merged_folder import merge_to_folder

        result = merge_to_folder(source, output, base=base, max_shard_size=max_shard_size, verify=verify)
    if as_json:
        print_json({**plain_values(result), "loss": plain_values(scores)})
        return
    out.print(f"{result.folder}: {result.shards} file(s), {result.bytes / 1e9:.2f} GB", highlight=False)
    out.print(str(result.agreement) if result.agreement else "not verified", highlight=False)
    if scores is not None:
        out.print(f"loss with the adapter on {scores.rows:,} rows that were not trained on:", highlight=False)
        for name, item in (("dequantised base", scores.trained_over), ("fresh base (this folder)", scores.fresh)):
            accuracy = f"token accuracy {100 * item.token_accuracy:.1f}%"
            out.print(f"  {name:<25} {item.loss:.4f}, {accuracy}", highlight=False)


@add_command(GROUP_SHARE, "formats.md", "philora export runs/support --format ollama --dtype q8_0 --out support-ollama")
def export(
    source: options.AdapterArgument,
    output: Annotated[str, typer.Option("--out", help="Folder to write; must be empty or not exist.")],
    format: Annotated[
        str,
        typer.Option(
            help="Format to write: peft, loralib, gguf (llama.cpp) or ollama.",
            autocompletion=lambda: list(options.FORMATS),
        ),
    ] = "peft",
    layout: Annotated[
        str | None,
        typer.Option(
            help="Layout within the format. peft: server (one rank, one alpha), fused or slices. "
            "gguf: merged, base+adapter or adapter. ollama: merged or base+adapter. Default: the first.",
            show_default=False,
            autocompletion=lambda: list(options.LAYOUTS),
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the weights in gguf and ollama: f16, q8_0 or f32.",
            autocompletion=lambda: list(options.FILE_TYPES),
        ),
    ] = "f16",
    base: options.BaseOption = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(help="Alpha that a loralib file was trained with. Needed only where no lora.json is beside it."),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Convert an adapter to another format. The result is written only if it computes the same."""
    set_up_logging("warning")
    from philora.exporting.conversion import export as convert

    result = convert(source, output, format=format, layout=layout, dtype=dtype, base=base, lora_alpha=lora_alpha)
    if as_json:
        print_json({"format": format, **plain_values(result)})
        return
    out.print(f"{result.folder}: {format}, verified", highlight=False)
    out.print(str(result.agreement), highlight=False)
    if format in ("gguf", "ollama"):
        missing = "llama.cpp: not checked, because it is not installed (pip install llama-cpp-python)"
        failed = result.reader_failure and f"unverified by llama.cpp: {result.reader_failure}"
        out.print(str(result.reader or failed or missing), highlight=False)


@add_command(GROUP_SHARE, "hub.md", "philora push runs/support OWNER/NAME --dry-run")
def push(
    source: options.AdapterArgument,
    repo_id: Annotated[
        str,
        typer.Argument(
            help="Repository on the Hugging Face Hub, as OWNER/NAME. It is created where it does not exist.",
            metavar="REPO_ID",
        ),
    ],
    merged: Annotated[
        bool,
        typer.Option("--merged", help="Push the complete model with the adapter merged, instead of the adapter alone."),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Remove the adapter in the repository when a model is pushed, or the model when an adapter is.",
        ),
    ] = False,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Visibility of a new repository. Default: the owner's setting on the Hub.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files that would be uploaded, and upload nothing.")
    ] = False,
    base: options.BaseOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Upload an adapter, or the merged model, with its model card to the Hugging Face Hub."""
    set_up_logging("warning")
    from philora.reporting.pushing import push as publish

    result = publish(source, repo_id, merged=merged, replace=replace, private=private, dry_run=dry_run, base=base)
    if as_json:
        print_json(plain_values(result))
        return
    table = Table("file", "bytes", box=None)
    for name, size in result.files.items():
        table.add_row(escape(name), f"{size:,}")
    display.print_whole(out, table)
    if result.removed:
        out.print(escape(f"removed from the repository: {', '.join(result.removed)}"), highlight=False)
    where = f"would go to {result.repo_id}; nothing was sent" if result.url is None else str(result.url)
    out.print(where, highlight=False)
