"""The command line: ``tileweld explain|dump|kernels|bench TARGET``. Errors are one line and exit code 2; TILEWELD_LOG=debug shows the traceback."""
from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .errors import OptionError, RefusalError, TileweldError

# torch takes seconds to import: every command imports what it needs, so that --help and a typing error are quick.

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="What tileweld makes of a model: the rewrites, the refusals and why, the graphs, the kernels.")


class Stage(str, Enum):
    capture = "capture"
    passes = "passes"
    aot = "aot"
    kernels = "kernels"


class Format(str, Enum):
    text = "text"
    dot = "dot"
    json = "json"


TARGET = Annotated[str, typer.Argument(help="hf:llama[:eager|sdpa][:pad], models:deepseek_mla[:variant], or file.py:factory")]
DYNAMIC = Annotated[bool, typer.Option("--dynamic", help="trace with symbolic shapes")]
TRAIN = Annotated[bool, typer.Option("--train", help="training mode: trace the backward too")]
OPTION = Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="an option of the backend; repeat for more (passes=attention:off)")]
ATTN = Annotated[str | None, typer.Option("--attn", help="hf: only: eager or sdpa")]
DTYPE = Annotated[str | None, typer.Option("--dtype", help="cast module and float inputs: float16, bfloat16, float32, float64")]
BATCH = Annotated[int, typer.Option("--batch", min=1, help="batch size of the example inputs of hf: and models:")]
LENGTH = Annotated[int, typer.Option("--length", min=1, help="their number of tokens")]
JSON = Annotated[bool, typer.Option("--json", help="JSON instead of tables")]
DEVICE = Annotated[str | None, typer.Option("--device", help="roofline times on h200, a100, 4090, cpu (this one, measured), or flops=2e11,bandwidth=2e10")]
PLOT = Annotated[Path | None, typer.Option("--plot", help="also draw a roofline with every rewrite before and after (needs matplotlib)")]
OUTPUT = Annotated[Path | None, typer.Option("-o", "--output", help="write to this file")]


@app.command()
def explain(target: TARGET, dynamic: DYNAMIC = False, train: TRAIN = False, option: OPTION = None, attn: ATTN = None, dtype: DTYPE = None, batch: BATCH = 2, length: LENGTH = 17,
            as_json: JSON = False, strict: Annotated[bool, typer.Option("--strict", help="exit code 1 if anything was refused")] = False,
            html: Annotated[Path | None, typer.Option("--html", help="also write one self-contained HTML file: tables, graph diffs, kernel sources")] = None,
            device: DEVICE = None, plot: PLOT = None):
    """What is fused, what is refused and why, what it saves, and what every fused op runs on. Builds no kernel."""
    with _errors():
        chosen = _device(device, plot)
        report, options = _trace(target, dynamic, train, option, attn, dtype, batch, length)
        report.device = chosen
        if plot is not None:
            from .roofline import draw

            draw(report.cost, chosen, plot, title=target)
        if html is not None:
            from .report_html import page

            _write(html, page(report, options, target))
        _show_report(report, as_json)
        if strict and report.refusals:
            raise typer.Exit(1)


@app.command()
def dump(target: TARGET, stage: Annotated[Stage, typer.Option("--stage", help="which graph")] = Stage.passes,
         form: Annotated[Format, typer.Option("--format", help="how to write it")] = Format.text,
         diff: Annotated[bool, typer.Option("--diff", help="what the stage changed, as a unified diff")] = False,
         dynamic: DYNAMIC = False, train: TRAIN = False, option: OPTION = None, attn: ATTN = None, dtype: DTYPE = None, batch: BATCH = 2, length: LENGTH = 17,
         output: OUTPUT = None):
    """The graph at a stage: as captured, after the passes, behind AOTAutograd (forward and backward), or the generated kernels."""
    with _errors():
        if diff and (form is not Format.text or stage in (Stage.capture, Stage.kernels)):
            raise OptionError(f"--diff has no meaning for --stage {stage.value} --format {form.value}", cure="use --stage passes or aot, --format text")
        if form is Format.dot and stage is Stage.kernels:
            raise OptionError("kernels are no graph", where="--format dot", cure="use --format text or json")
        report, options = _trace(target, dynamic, train, option, attn, dtype, batch, length)
        text = _dumped(report, options, stage.value, form, diff)
        if output is not None:
            _write(output, text + "\n")
        else:
            _print_coloured(text, diff)


@app.command()
def kernels(target: TARGET, arch: Annotated[str | None, typer.Option("--arch", help="sm_80,sm_90,sm_100,gfx942: compile the Triton kernels ahead of time, without a GPU")] = None,
            every_config: Annotated[bool, typer.Option("--every-config", help="all configurations that tuning may choose, not the default alone")] = False,
            dynamic: DYNAMIC = False, option: OPTION = None, attn: ATTN = None, dtype: DTYPE = None, batch: BATCH = 2, length: LENGTH = 17, as_json: JSON = False):
    """The generated kernels: built for this machine with size and time, or with --arch compiled ahead of time for GPUs."""
    with _errors():
        from . import kernels_command

        given = _parse_options(option)
        if arch:
            kernels_command.check_architectures(arch.split(","))
            given = {**given, "target": "triton"}
        report, _ = _trace(target, dynamic, False, option, attn, dtype, batch, length, given)
        with _progress("compiling"):
            rows = kernels_command.ahead_of_time(report.sources, arch.split(","), every_config) if arch else kernels_command.on_this_machine(report.sources)
        if as_json:
            typer.echo(json.dumps(rows.records, indent=2))
        else:
            _console().print(rows.table)
        if rows.failed:
            raise typer.Exit(1)


@app.command()
def bench(target: TARGET, device: DEVICE = None, rounds: Annotated[int, typer.Option("--rounds", min=1, help="timed calls of each contender, in turn")] = 10,
          backend: Annotated[list[str] | None, typer.Option("--backend", metavar="NAME", help="one more backend of torch.compile; repeat for more")] = None,
          no_inductor: Annotated[bool, typer.Option("--no-inductor", help="leave TorchInductor out: its first call takes long")] = False,
          dynamic: DYNAMIC = False, option: OPTION = None, attn: ATTN = None, dtype: DTYPE = None, batch: BATCH = 2, length: LENGTH = 17, as_json: JSON = False, plot: PLOT = None):
    """Eager, TorchInductor and tileweld on a target, interleaved in this process: times, errors, achieved FLOP/s and bytes/s against the roofline."""
    with _errors():
        from . import targets

        given = _parse_options(option)
        targets.check(target, attn)
        chosen = _device(device, plot, guessed=True)
        if not _debugging():
            warnings.simplefilter("ignore")

        from . import bench as benching

        made = targets.cast(targets.parse_target(target, attn=attn, batch=batch, length=length), dtype)
        contenders = ["eager", *(() if no_inductor else ("inductor",)), *dict.fromkeys(backend or ()), "tileweld"]
        try:
            result = benching.run(made, list(dict.fromkeys(contenders)), rounds=rounds, device=chosen, options=given, dynamic=dynamic or None)
        except Exception as error:
            if not isinstance(_root(error), TileweldError):
                _blame(made)
            raise
        if plot is not None:
            from .roofline import draw

            draw(result.costs, result.device, plot, title=target, measured=result.measured())
        _show_report(result, as_json)
        if result.row("tileweld").error is not None and result.row("tileweld").seconds is None:
            raise typer.Exit(1)


def main() -> None:
    """The console script."""
    app(prog_name="tileweld")


# ---------------------------------------------------------------- the parts of a command


def _trace(target, dynamic, train, option, attn, dtype, batch, length, given=None):
    """(report, checked options) of the target."""
    from . import targets

    given = _parse_options(option) if given is None else given
    targets.check(target, attn)

    from .. import passes
    from .explain import trace
    from .options import Options

    checked = Options.parse(given, tuple(p.NAME for p in passes.PIPELINE))
    if not _debugging():
        warnings.simplefilter("ignore")  # torch's and transformers' own; they hide the table
    with _progress(f"tracing {target}"):
        made = targets.cast(targets.parse_target(target, attn=attn, batch=batch, length=length), dtype)
        if train and hasattr(made.call, "train"):
            made.call.train()
        try:
            return trace(made.call, made.args, made.kwargs, dynamic=dynamic or None, options=given, train=train, grad=train), checked
        except Exception as error:
            if not isinstance(_root(error), TileweldError):
                _blame(made)
            raise


def _device(name, plot, guessed=False):
    """The Device that a command names, before anything is traced; None where none is named. A picture needs one, unless the command finds it out itself, and matplotlib."""
    if plot is not None:
        from .roofline import check

        check(plot, name, guessed)
    if name is None:
        return None
    from .devices import named

    with _progress(f"measuring {name}"):
        return named(name)


def _blame(made) -> None:
    """Raise TargetError if the target fails in eager PyTorch as well: then its message, not Dynamo's, is the one to read."""
    import torch

    from .targets import TargetError

    try:
        with torch.no_grad():
            made.call(*made.args, **made.kwargs)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise TargetError(f"the target itself fails in eager PyTorch: {type(error).__name__}: {first}", where=_user_line(error), cure="make it run with its example inputs") from error


def _parse_options(pairs) -> dict:
    """key=value words to the options dict; values by the type of the option's default."""
    from .options import TABLE

    given = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"--option {pair!r} has no '='", where="--option", cure="write key=value")
        if key not in TABLE:
            raise OptionError.unknown("option", key, TABLE, where="--option")
        given[key] = _option_value(key, value, TABLE[key])
    return given


def _option_value(key, value, row):
    words = {"true": True, "on": True, "false": False, "off": False}
    if isinstance(row.default, bool):
        return words.get(value.lower(), value)  # what is neither is refused by the table's own check
    if isinstance(row.default, dict):
        entries = dict(part.partition(":")[::2] for part in value.split(","))
        if not all(word.lower() in words for word in entries.values()):
            raise OptionError(f"--option {key}={value!r}", where="--option", cure=f"write {key}=name:on or {key}=name:off, with commas between")
        return {name: words[word.lower()] for name, word in entries.items()}
    return int(value) if value.isdigit() else value


def _dumped(report, options, stage, form, diff) -> str:
    from . import dump as dumping

    if stage == "kernels":
        if form is Format.json:
            fields = ("name", "language", "rewrite", "detail", "entry", "source", "parts")
            return json.dumps({"stage": stage, "kernels": [{f: getattr(k, f) for f in fields} for k in report.sources]}, indent=1)
        return dumping.kernels(report, options)
    if diff:
        return dumping.diff(report, stage) or "# the stage changed nothing"
    views = dumping.views(report, stage)
    if form is Format.json:
        return dumping.to_json(stage, views)
    if form is Format.dot:
        return dumping.to_dot(views)
    return "\n\n".join(f"# {v.title}\n{dumping.text(v.gm)}" for v in views)


def _show_report(report, as_json) -> None:
    if as_json:
        made = report.to_json()
        typer.echo(made if isinstance(made, str) else json.dumps(made, indent=2))
        return
    console = _console()
    if not console.is_terminal:  # rich would cut lines at 80 columns in a file or a pipe
        typer.echo(str(report))
        return
    for table in report.tables():
        console.print(table)


def _print_coloured(text: str, diff: bool) -> None:
    colours = {"+": "green", "-": "red", "@": "cyan"} if diff else {"#": "cyan"}
    for line in text.splitlines():
        typer.secho(line, fg=colours.get(line[:1]))  # plain where stdout is no terminal


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise TileweldError(f"cannot write {path}: {error.strerror}", cure="give another file") from error


def _console():
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


@contextlib.contextmanager
def _progress(what: str):
    """A spinner on stderr, only where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


# ---------------------------------------------------------------- errors


def _debugging() -> bool:
    from . import log

    return log.get("capture").isEnabledFor(10)


@contextlib.contextmanager
def _errors():
    """Any failure becomes one line on stderr: exit code 1 for a refusal under strict, 2 for the rest. torch's own logging is silent."""
    silenced = logging.root.manager.disable
    try:
        if not _debugging():
            logging.disable(logging.ERROR)  # Dynamo logs the traceback of what it raises
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        sys.stderr.close()  # `| head` closed the pipe: nothing to say
        raise typer.Exit(0) from None
    except Exception as error:
        if _debugging():
            raise
        cause = _root(error)
        typer.secho(_one_line(cause), fg="red", err=True)
        raise typer.Exit(1 if isinstance(cause, RefusalError) else 2) from None
    finally:
        logging.disable(silenced)


def _root(error: BaseException) -> BaseException:
    """What a backend raised inside Dynamo, which wraps it."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    return error


def _one_line(error: BaseException) -> str:
    if isinstance(error, TileweldError):
        return str(error)
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return str(TileweldError(f"{type(error).__name__}: {first}", where=_user_line(error), cure="TILEWELD_LOG=debug shows the traceback"))


def _user_line(error: BaseException) -> str | None:
    """The last line of the traceback that lies neither in torch nor here."""
    found, traceback = None, error.__traceback__
    own = str(Path(__file__).resolve().parent)
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith((own, "<")) and not file.endswith("contextlib.py") and not any(f"/{package}/" in file for package in ("torch", "typer", "click")):
            found = f"{'/'.join(Path(file).parts[-2:])}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found
