"""The command line: `lcore generate | plan | info | demo | eval`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Generator as PyGenerator
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
import typer
from rich.console import Console

import lcore
from lcore.cache.formats import FORMATS
from lcore.cache.overflow import overflow_folder
from lcore.cache.policies import parse_policy
from lcore.cache.selection import parse_selection
from lcore.cli_options import (
    Chunk,
    Context,
    KvFormat,
    Overflow,
    Policy,
    Select,
    SessionFile,
    WeightDtype,
    parse_context,
    parse_dtype,
    parse_formats,
    parse_layers,
    parse_overflow,
)
from lcore.demo import run_demo
from lcore.evaluation import needle
from lcore.generation import Done, Event, Generator, Stats, Token, show_prefill
from lcore.generation.plan_table import plan_table
from lcore.generation.planner import folder_planner

app = typer.Typer(
    name="lcore",
    help="Reads and writes very long texts with a model on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

evaluate = typer.Typer(help="Measure a model.", no_args_is_help=True)
app.add_typer(evaluate, name="eval")

ModelFolder = Annotated[
    Path, typer.Option("-m", "--model", help="Folder with config.json, safetensors and tokenizer.json.", exists=True)
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="CPU threads; default: all cores.")]


def main() -> None:
    app(prog_name="lcore")


@contextmanager
def user_errors() -> Iterator[None]:
    """One line and exit code 1 for wrong input or full memory, 130 for Ctrl-C; warnings in one line each."""

    def show_warning(message: Warning | str, *_: object, **__: object) -> None:
        typer.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            yield
        except BrokenPipeError:  # the reader of our output has left; the command framework ends quietly
            raise
        except (OSError, ValueError, TypeError, NotImplementedError, ArithmeticError, MemoryError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


@app.command()
def generate(
    *,
    model: ModelFolder,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option("-f", "--prompt-file", help="File that holds the prompt, UTF-8; - is stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", "--temp", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens up to this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this many times as probable as the best.")] = 0.0,
    seed: Annotated[int, typer.Option("-s", "--seed", help="Same seed, same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")] = None,
    kv_format: KvFormat = None,
    skip_layers: Annotated[str, typer.Option(help="Layers that are not coded, as 0,1,31.")] = "",
    fp_prefix: Annotated[int, typer.Option(help="First tokens of every layer that are not coded.")] = 0,
    prefill_chunk: Chunk = 2048,
    policy: Policy = None,
    select: Select = None,
    session: SessionFile = None,
    context: Context = None,
    overflow: Overflow = None,
    dtype: WeightDtype = "auto",
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="With or without the chat template; default: if there is one.")
    ] = None,
    speculate: Annotated[
        Literal["ngram", "self", "none"],
        typer.Option(help="Draft tokens from the text, or by the model over its last tokens; the text is the same."),
    ] = "none",
    threads: Threads = None,
) -> None:
    """Read a prompt and write the model's continuation: text on stdout, counts and rates on stderr."""
    if prompt is None and prompt_file is None:
        raise typer.BadParameter("give --prompt, --prompt-file, or both: the prompt follows the file")
    room = parse_context(context)
    with user_errors():
        text = (_read_text(prompt_file) if prompt_file is not None else "") + (prompt or "")
        _set_threads(threads)
        decoder = lcore.load_model(model, dtype=parse_dtype(dtype))
        if decoder.tokenizer is None:
            raise ValueError(f"lcore generate: --model must hold a tokenizer.json, got {model}")
        use_chat = decoder.tokenizer.chat_template is not None if chat is None else chat
        generator = Generator(
            decoder,
            parse_formats(kv_format),
            prefill_chunk,
            None if policy is None else parse_policy(policy),
            context=room,
            speculate=None if speculate == "none" else speculate,
            select=None if select is None else parse_selection(select),
            skip_layers=parse_layers(skip_layers),
            fp_prefix=fp_prefix,
            overflow=parse_overflow(overflow),
        )
        events = generator.stream(
            [{"role": "user", "content": text}] if use_chat else text,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop or (),
            session=session,
        )
        # Closed at once when the writing fails, so that a session is saved before the program ends.
        with closing(cast("PyGenerator[Event, None, None]", events)):
            _write(events)


@app.command()
def plan(
    *,
    model: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.", exists=True)],
    context: Annotated[int, typer.Option("-c", "--context", min=1, help="Tokens of a row.")],
    kv_format: Annotated[str | None, typer.Option(help="Only this format (K,V for two); default: all.")] = None,
    batch: Annotated[int, typer.Option("-b", "--batch", min=1, help="Rows.")] = 1,
    prefill_chunk: Chunk = 2048,
    overflow: Overflow = None,
    dtype: WeightDtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object, in bytes.")] = False,
) -> None:
    """Print what a context needs of memory, item by item and format by format, and the longest that fits."""
    with user_errors():
        file = overflow_folder("plan", parse_overflow(overflow), 0)
        planner = folder_planner(model, parse_dtype(dtype), batch, prefill_chunk, file)
        found = planner.plan(context, [parse_formats(kv_format)] if kv_format else tuple(FORMATS))
        if as_json:
            typer.echo(json.dumps(asdict(found), indent=2))
        else:
            Console().print(plan_table(found))


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False) -> None:
    """Print the version, what was built, and which op runs where."""
    facts = lcore.build_info()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    built = ", ".join(facts["cpu_isas_built"])
    typer.echo(f"lcore {facts['version']}, torch {facts['torch']}, {facts['threads']} threads")
    typer.echo(f"CPU   {facts['cpu_isa']} (built: {built})")
    typer.echo(f"CUDA  {', '.join(facts['cuda_archs']) or 'not in this build'}")
    width = max(map(len, facts["ops"]))
    for op, where in facts["ops"].items():
        typer.echo(f"  {op:{width}}  cpu: {where['cpu']:10}  cuda: {where['cuda']}")


@app.command()
def demo(
    *,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the document.")] = 32768,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to hide needles in; default: Python sources.", exists=True)
    ] = None,
    depths: Annotated[str, typer.Option(help="Where the needles are hidden, 0 first line to 1 last.")] = "0.1,0.5,0.9",
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="Model folder; default: the bundled one.", exists=True)
    ] = None,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="Of the keys and values.")] = 0,
    threads: Threads = None,
) -> None:
    """Hide needles in a long real text, read it, and ask the bundled model for each of them."""
    with user_errors():
        _set_threads(threads)
        run_demo(
            tokens,
            depths=_numbers("--depths", depths),
            text_file=text,
            model_folder=model or needle.BUNDLED_MODEL,
            seed=seed,
            say=typer.echo,
        )


@evaluate.command(
    "needle", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def eval_needle(context: typer.Context) -> None:
    """Measure how often a model finds a needle, by length and depth of the document (--help for options)."""
    sys.argv = ["lcore eval needle", *context.args]
    with user_errors():
        needle.main()


def _read_text(path: str) -> str:
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"lcore generate: --prompt-file must be UTF-8 text, got {path} with {error}") from None


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} must be numbers with commas between them, got {text!r}") from None


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _write(events: Iterator[Event]) -> None:
    for event in show_prefill(events):
        if isinstance(event, Token):
            sys.stdout.write(event.text)
            sys.stdout.flush()
        elif isinstance(event, Done):
            sys.stdout.write("\n")
            sys.stdout.flush()
            typer.echo(f"{describe(event.stats)}, ended by {event.reason}", err=True)


def describe(stats: Stats) -> str:
    """Counts and rates in one line."""
    kept = f"kept {stats.reused_tokens:,} tokens, " if stats.reused_tokens else ""
    read = stats.prompt_tokens - stats.reused_tokens
    missed = f"at most {stats.dropped_mass:.2%} of attention missed, " if stats.dropped_mass else ""
    drafts = f"{stats.accepted:,} of {stats.drafted:,} drafted tokens accepted, " if stats.drafted else ""
    return (
        f"read {read:,} tokens in {stats.prefill_seconds:.1f} s ({stats.prefill_rate:,.1f} tokens/s), "
        f"{kept}wrote {stats.new_tokens:,} in {stats.decode_seconds:.1f} s ({stats.decode_rate:,.1f} tokens/s), "
        f"{drafts}{missed}cache {stats.cache_bytes / 1e6:,.1f} MB, peak memory {stats.peak_bytes / 1e6:,.0f} MB"
    )
