"""The command line. torch, triton and the kernels are imported inside the commands, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from dualop.errors import DualopError

if TYPE_CHECKING:
    import torch

DEFAULT_CHAIN = "add | swish | tanh | gelu | hardtanh(-1, 1)"
PIPED_WIDTH = 160  # a pipe has no width, and a table folded to 80 columns is hard to read or search


class _Commands(TyperGroup):
    """Errors that dualop raises on purpose end a command with one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DualopError as error:
            Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    help="Fused add + activation chains for PyTorch, on a CUDA C++ kernel or an equivalent Triton kernel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results to FILE, too.")]
Backends = Annotated[str, typer.Option("--backend", help="cuda, triton, reference, several with commas, or all.")]


def main() -> None:
    """The entry point of the script `dualop`."""
    app(prog_name="dualop")


@app.command()
def bench(
    backend: Backends = "all",
    chain: Annotated[str, typer.Option(help="What to run.")] = DEFAULT_CHAIN,
    shape: Annotated[str, typer.Option(help="Several with commas (16384x8192; on the CPU 64x256).")] = "",
    dtype: Annotated[str, typer.Option(help="Several with commas, or all.")] = "float32,bfloat16",
    operand: Annotated[
        str, typer.Option(help="Form of the operands: last (N,), channel (C, 1, ...), row (M, 1), scalar, full.")
    ] = "last",
    problem: Annotated[str, typer.Option(help="linear95: the whole model, nn.Linear and the chain behind it.")] = "",
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave torch.compile out.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    json_file: Json = None,
) -> None:
    """Time a chain forward and backward beside a device copy, torch eager and torch.compile; checked before timed."""
    device = _device()
    import dualop
    from dualop.bench import linear95, measure, table, workloads

    if problem not in ("", "linear95"):
        raise typer.BadParameter(f"{problem!r} is not known; there is linear95", param_hint="--problem")
    if operand not in workloads.FORMS:
        raise typer.BadParameter(f"{operand!r} is none of {', '.join(workloads.FORMS)}", param_hint="--operand")
    op, dtypes = dualop.chain(DEFAULT_CHAIN if problem else chain), _dtypes(dtype)
    names, unavailable = _backends(backend, op, device)
    out = _console()
    more: dict[str, Any] = {"unavailable": unavailable}
    _say_unavailable(out, unavailable)
    out.print(table.how(device), markup=False)
    rows: list[measure.Row] = []
    compiled = not no_compile
    if problem:
        with _steps(out, len(dtypes) * linear95.steps(len(names), compiled)) as progress:
            agreements, rows = linear95.run(names, dtypes, device, compiled, seed, progress)
        out.print(linear95.render(agreements))
        more["agreements"] = [vars(a) for a in agreements]
    else:
        default = "16384x8192" if device.type == "cuda" else "64x256"
        shapes = [workloads.parse_shape(text) for text in (shape or default).split(",")]
        works = [workloads.Workload(op, size, name, device, (operand,)) for size in shapes for name in dtypes]
        with _steps(out, len(works) * measure.steps(len(names), compiled)) as progress:
            for work in works:
                rows += measure.measure(work, names, compiled, seed, progress)
    groups: dict[tuple[str, str], list[measure.Row]] = {}
    for row in rows:
        groups.setdefault(("x".join(map(str, row.shape)), row.dtype), []).append(row)
    for (size_text, name), group in groups.items():
        out.print(table.render(group, f"{group[0].chain}   {size_text}   {name}"))
    _write(json_file, table.as_json(rows, device, **more))
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


@app.command()
def check(
    backend: Backends = "all",
    chain: Annotated[str, typer.Option(help="Only this one, in all cases (every stage and some chains).")] = "",
    dtype: Annotated[str, typer.Option(help="Several with commas, or all.")] = "all",
    seed: Annotated[int | None, typer.Option(help="Of the random inputs (a fresh one, printed).")] = None,
    json_file: Json = None,
) -> None:
    """Compare every backend with every other and with float64, forward and backward; exit 1 on a mismatch."""
    device = _device()
    import secrets

    import dualop
    from dualop import cases, check_table
    from dualop import check as checks

    seed = secrets.randbelow(2**31) if seed is None else seed
    todo = [(chain, cases.CASES)] if chain else cases.checked_chains()
    plan = [(dualop.chain(text), case) for text, some in todo for case in some if device.type == "cuda" or not case.gpu]
    names, unavailable = _backends(backend, plan[0][0], device)
    out = _console()
    _say_unavailable(out, unavailable)
    calls = [(op, case, name) for op, case in plan for name in _dtypes(dtype) if case.has(name)]
    samples = [(op, cases.sample(op, case, name, device, seed)) for op, case, name in calls]
    where = "interpreted on the CPU" if device.type == "cpu" else "on the GPU"
    out.print(f"{len(samples)} calls of {', '.join(names)} {where}, seed {seed}; new kernels are compiled first")
    rows: list[checks.Row] = []
    with _bar(out) as bar:
        if "cuda" in names:
            _prepare([(op, s.x, s.operands) for op, s in samples], bar("compiling"))
        step = bar("checking")
        for i, (op, s) in enumerate(samples):
            rows += checks.cross_check(op, s, names)
            step(i + 1, len(samples))
    ok = all(row.ok for row in rows)
    out.print(check_table.summary(rows, by_quantity=bool(chain)))
    if not ok:
        out.print(check_table.mismatches(rows))
    out.print(
        f"{'ok' if ok else 'MISMATCH'}: {', '.join(names)} {where}, {len(samples)} calls, {len(rows)} comparisons, "
        f"seed {seed}",
        style="green" if ok else "red",
        highlight=False,
    )
    about = {"ok": ok, "seed": seed, "device": str(device), "unavailable": unavailable}
    _write(json_file, {**about, "rows": [vars(row) for row in rows]})
    if not ok:
        raise typer.Exit(1)


@app.command()
def emit(
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="[default: print it]")] = None,
    backend: Annotated[str, typer.Option(help="cuda or triton.")] = "cuda",
    chain: Annotated[str, typer.Option(help="What follows the Linear.")] = DEFAULT_CHAIN,
    model: Annotated[
        str, typer.Option(help="linear:INxOUT, or input:AxBx... for the chain alone.")
    ] = "linear:8192x8192",
    batch: Annotated[int, typer.Option(help="Rows of the Linear's input.")] = 1024,
    operand: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SHAPE", help="8192, 1x8192 or scalar. [default: (OUT,)]")
    ] = None,
    linear: Annotated[str, typer.Option(help="Name of the Linear in the model.")] = "matmul",
    no_bias: Annotated[bool, typer.Option("--no-bias", help="The Linear has no bias.")] = False,
) -> None:
    """Write one self-contained file in KernelBench's form: ModelNew with the chain's kernels, forward and backward.

    Without options: level 2, problem 95.
    """
    from dualop.emit import emit as emitted
    from dualop.emit import parse_operands

    shapes = parse_operands(operand or [])
    text = emitted(chain, model, backend, batch=batch, bias=not no_bias, linear=linear, shapes=shapes)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text)
    except OSError as error:
        raise typer.BadParameter(f"{output}: {error.strerror}", param_hint="--output") from None


@app.command()
def doctor(json_file: Json = None) -> None:
    """Say what this machine has of what dualop needs, which backends run here, and what to install for the others."""
    from dualop import doctor as examination

    report = examination.examine()
    _console().print(examination.table(report))
    _write(json_file, examination.as_json(report))


@app.command()
def show(
    chain: Annotated[str, typer.Argument(metavar="CHAIN")],
    backend: Annotated[str, typer.Option(help="cuda, triton or reference.")] = "cuda",
) -> None:
    """Print the source that a backend compiles for a chain."""
    import dualop
    from dualop.errors import BackendUnavailable
    from dualop.registry import BACKENDS

    if backend not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    source = BACKENDS[backend].source(dualop.chain(chain))
    out = Console()
    if out.is_terminal:
        from rich.syntax import Syntax

        out.print(Syntax(source, "cuda" if backend == "cuda" else "python"))
    else:
        typer.echo(source, nl=not source.endswith("\n"))


@app.command()
def stages() -> None:
    """Print the table of stages with their parameters and defaults."""
    from rich.table import Table
    from rich.text import Text

    from dualop.stages import STAGES

    table = Table("stage", "also", "written", "alone, as a chain", title="stages", title_justify="left")
    for name, stage in STAGES.items():
        table.add_row(*map(Text, (name, ", ".join(stage.aliases), stage.signature, stage.example)))
    _console().print(table)


def _device() -> torch.device:
    """Where kernels run. Call it before importing dualop's modules: without a GPU it switches interpreting on."""
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DUALOP_INTERPRET", "1")
        # Triton's interpreter computes with numpy, which warns of every NaN and infinity that the check puts in.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.|numpy\.")
    from dualop.registry import interpreting

    return torch.device("cuda" if gpu and not interpreting() else "cpu")


def _backends(asked: str, chain: Any, device: torch.device) -> tuple[list[str], dict[str, list[str]]]:
    """The backends to run, and for `all` the reasons of those that cannot; one asked for by name raises."""
    from dualop.errors import BackendUnavailable
    from dualop.registry import BACKENDS, resolve

    if asked == "all":
        unavailable = {b.name: reasons for b in BACKENDS.values() if (reasons := b.reasons(chain, device))}
        return [name for name in BACKENDS if name not in unavailable], unavailable
    names = list(dict.fromkeys(name.strip() for name in asked.split(",")))
    for name in names:
        if name not in BACKENDS:
            raise BackendUnavailable(f"unknown backend {name!r}; there are {', '.join(BACKENDS)} and all")
        resolve(name, chain, device)
    return names, {}


def _dtypes(text: str) -> list[str]:
    from dualop.cases import DTYPES
    from dualop.errors import DtypeError

    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"}
    names = list(DTYPES) if text == "all" else [short.get(n.strip(), n.strip()) for n in text.split(",")]
    for name in names:
        if name not in DTYPES:
            raise DtypeError(f"unknown dtype {name!r}; there are {', '.join(DTYPES)}")
    return names


def _console() -> Console:
    out = Console()
    return out if out.is_terminal else Console(width=PIPED_WIDTH)


def _say_unavailable(out: Console, unavailable: dict[str, list[str]]) -> None:
    for name, reasons in unavailable.items():
        out.print(f"{name} does not run here and is left out: {'; '.join(reasons)}", style="yellow", markup=False)


def _prepare(calls: Sequence[Any], step: Callable[[int, int], None]) -> None:
    from dualop.backends.cuda import prepare
    from dualop.errors import BuildError

    with contextlib.suppress(BuildError):  # the call that needs this library builds again and reports it in its own row
        prepare(calls, progress=step)


@contextlib.contextmanager
def _bar(out: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Progress bars: `bar("checking")` gives a function of (done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:

        def bar(what: str) -> Callable[[int, int], None]:
            task = progress.add_task(what, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bar


@contextlib.contextmanager
def _steps(out: Console, total: int) -> Iterator[Callable[[str], None]]:
    """One bar of `total` steps: the function it gives says what the next one is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task, done = progress.add_task("", total=total), itertools.count()
        yield lambda text: progress.update(task, description=text, completed=next(done))


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise typer.BadParameter(f"{path}: {error.strerror}", param_hint="--json") from None
