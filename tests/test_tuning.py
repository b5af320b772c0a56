"""Launches that were searched for: backends use them, results stay the same, `dualop tune` finds and keeps them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from test_cli import process, run

import dualop
from dualop.backends import cuda, registry, triton
from dualop.backends.registry import BACKENDS
from dualop.bench import tuning
from dualop.bench.workloads import BACKWARD, FORWARD, Workload
from dualop.launch import tuning as store
from dualop.launch.grid import Cut, backward_grid, power_of_two
from dualop.launch.layout import DTYPES, layout_of

CPU = torch.device("cpu")
OP = dualop.chain("add | relu")
# Neither is a heuristic's choice.
CUTS = {
    "cuda": Cut(rows=1, threads=64, across=16, resident=2),
    "triton": Cut(rows=16, threads=64, across=32, resident=1),
}
KERNELS = tuple(CUTS)
pytestmark = pytest.mark.skipif(not dualop.backends.registry.interpreting(), reason="kernels are on the GPU")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A store of its own; builds stay where the other tests have them."""
    monkeypatch.setattr(store, "_folder", lambda: tmp_path / "tune")
    forget()
    yield tmp_path / "tune"
    monkeypatch.undo()
    forget()


def forget():
    store._read.cache_clear()
    registry.forget_launches()


@pytest.fixture
def launches(monkeypatch):
    """The grid of every launch, as (backend, direction, rows and columns of a tile, programs)."""
    seen = []

    def note(backend, direction, grid):
        seen.append((backend, direction, (grid.tile_rows, grid.tile_cols), (grid.row_programs, grid.col_programs)))

    def cuda_run(self, launcher, y, gy, views):
        note("cuda", FORWARD if gy is None else BACKWARD, self.grid)
        return original_cuda(self, launcher, y, gy, views)

    def triton_launch(self, pointers, inputs):
        note("triton", BACKWARD if "NEEDS" in self.numbers else FORWARD, self.grid)
        return original_triton(self, pointers, inputs)

    original_cuda, original_triton = cuda.Launch._run, triton.Launch.__call__
    monkeypatch.setattr(cuda.Launch, "_run", cuda_run)
    monkeypatch.setattr(triton.Launch, "__call__", triton_launch)
    return seen


def tensors(rows=40, columns=72, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for shape in ((rows, columns), (columns,), (rows, columns))]


def results(backend, x, bias, gy, op=OP):
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    y = op(x, bias, backend=backend)
    return y.detach(), *torch.autograd.grad(y, (x, bias), gy)


def keep(backend, direction, x, bias, op=OP, cut=None):
    what = store.subject(backend, op, layout_of(x, [bias]), direction)
    store.keep(what, CPU, cut or CUTS[backend], 1.0, 2.0)
    registry.forget_launches()


def tile(backend, columns=72):
    cut = CUTS[backend]
    across = min(cut.across, power_of_two(-(-columns // 4)))
    return cut.threads // across * cut.rows, across * 4


# ---- the backends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
def test_what_was_kept_is_launched_and_changes_no_result(backend, launches):
    x, bias, gy = tensors()
    before = results(backend, x, bias, gy)
    assert tile(backend) not in [seen[2] for seen in launches]
    for direction in (FORWARD, BACKWARD):
        keep(backend, direction, x, bias)
    launches.clear()
    after = results(backend, x, bias, gy)
    (rows, columns), programs = tile(backend), (-(-40 // tile(backend)[0]), -(-72 // tile(backend)[1]))
    assert launches[0] == (backend, FORWARD, (rows, columns), programs)
    assert launches[1][:3] == (backend, BACKWARD, (rows, columns)) and len(launches) == 2
    assert torch.equal(before[0], after[0])
    for one, other in zip(before[1:], after[1:]):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_one_direction_alone(backend, launches):
    x, bias, gy = tensors()
    keep(backend, BACKWARD, x, bias)
    results(backend, x, bias, gy)
    assert [seen[2] == tile(backend) for seen in launches] == [False, True]


def test_other_shapes_dtypes_chains_and_backends_have_launches_of_their_own(launches):
    x, bias, gy = tensors()
    keep("triton", FORWARD, x, bias)
    others = [
        (OP, tensors(rows=65)),
        (OP, tensors(columns=130)),
        (OP, tensors(dtype=torch.bfloat16)),
        (dualop.chain("add | neg"), (x, bias, gy)),
        (OP, (x, x[:, :1].clone(), gy)),
    ]
    for op, given in others:
        op(*given[:2], backend="triton")
    OP(x, bias, backend="cuda")
    assert len(launches) == 6 and tile("triton") not in [seen[2] for seen in launches]
    launches.clear()
    OP(*tensors(rows=33)[:2], backend="triton")  # of the same bucket
    assert launches[0][2] == tile("triton")


@pytest.mark.parametrize("backend", KERNELS)
def test_a_second_call_looks_nothing_up(backend, monkeypatch):
    looked = []
    original = store.lookup
    monkeypatch.setattr(store, "lookup", lambda *a: looked.append(a) or original(*a))
    given = tensors()
    results(backend, *given)
    assert len(looked) == 2
    results(backend, *given)
    assert len(looked) == 2


def test_only_rows_and_registers_make_another_library():
    x, bias, _ = tensors()
    layout = layout_of(x, [bias])
    signature = cuda._signature(layout, [x.dtype, bias.dtype], [True] * 3)
    name = lambda **more: cuda._build(OP, signature, CPU, (base[0], replace(base[1], **more))).name
    base = cuda._cuts(OP, layout)
    assert len({name(), name(threads=64, across=64), name(least=1, most=2)}) == 1
    assert len({name(), name(rows=4), name(resident=8)}) == 3
    assert cuda.source(OP, signature, True) == cuda.source(OP, signature, True, base)


# ---- the heuristic and the candidates --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16384, 8192), (128, 512), (1, 16), (5,), (70_000, 3)], ids=str)
def test_candidates(backend, direction, dtype, shape):
    x = torch.empty(shape, dtype=dtype, device="meta")
    layout = layout_of(x, [torch.empty(shape[-1:], dtype=dtype, device="meta")], device=CPU)
    present = BACKENDS[backend].heuristic(OP, layout, direction)
    found = BACKENDS[backend].candidates(layout, direction, present)
    assert found[0] == present and len(set(found)) == len(found) <= 41
    assert shape != (16384, 8192) or len(found) >= 20
    for cut in found:
        assert 32 <= cut.threads <= 256 and cut.across <= cut.threads
        assert all(n & (n - 1) == 0 for n in (cut.rows, cut.threads, cut.across))
        assert backend == "triton" or cut.threads >= 64
    near = store.near(layout, direction, present)
    assert bool(near) == store.sums(layout, direction)
    assert all(replace(cut, least=present.least, most=present.most) == present for cut in near)


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("shared", [91 << 10, 155 << 10, 219 << 10])
def test_tiles_under_way_fit_into_shared_memory(count, shared):
    x = torch.empty(4096, 4096, device="meta")
    layout = layout_of(x, [torch.empty(4096, device="meta"), *[x] * count])
    cut = triton.TALL[layout.dtype].fitted(triton.BACKWARD[layout.dtype], layout, 132)
    grid = backward_grid(layout, *triton._tile(layout, cut), 132, cut)
    each = (2 + count) * grid.tile_rows * grid.tile_cols * 4  # x, the operands and gy
    stages = triton._stages(layout, grid, shared)
    assert 1 <= stages <= triton.STAGES and (stages - 1) * each <= shared
    assert stages == triton.STAGES or stages * each > shared
    assert (grid.row_programs == 1) == (count <= 1) and (count > 1 or stages > 1)


# ---- the search ------------------------------------------------------------------------------------------------------


def task(direction=FORWARD, backend="triton", shape=(4, 8)):
    return tuning.Task(Workload(OP, shape, "float32", CPU), backend, direction)


def quiet(what):
    return lambda done, total: None


@pytest.fixture
def few(monkeypatch):
    """Three candidates: the heuristic's, another, and one that no kernel can be compiled for."""
    broken = Cut(rows=3, threads=64, across=64, resident=1)
    other = Cut(rows=2, threads=64, across=64, resident=1)
    monkeypatch.setattr(store, "candidates", lambda *a: [a[-1], other, broken])
    monkeypatch.setattr(store, "near", lambda *a: ())
    monkeypatch.setattr(tuning, "BUDGET_S", 0.0)
    return other, broken


def test_a_launch_that_fails_is_left_out(few):
    (row,) = tuning.run([task()], 0, True, quiet)
    other, broken = few
    assert row.ok and row.kept and row.tried == 3 and row.gain >= 1
    assert [{k: v for k, v in f.items() if k != "why"} for f in row.failed] == [asdict(broken)] and row.failed[0]["why"]
    assert {Cut(**{k: v for k, v in t.items() if k != "us"}) for t in row.times} == {Cut(**row.heuristic), other}
    assert store.lookup(task().subject, CPU, Cut) == Cut(**row.best)


def test_what_was_kept_is_taken_by_the_next_call(few, launches):
    """And what was forgotten is not taken any more."""
    x, bias = torch.randn(4, 8), torch.randn(8)

    def taken():
        launches.clear()
        OP(x, bias, backend="triton")
        return launches[0][2]

    before = taken()
    store.keep(task().subject, CPU, few[0], 1.0, 2.0)
    assert taken() == before  # a backend remembers what it chose
    tuning.run([task(BACKWARD)], 0, True, quiet)
    assert taken() != before
    assert "deleted" in run("tune", "--forget").output and taken() == before


def test_a_launch_with_wrong_results_is_not_kept(few, monkeypatch, folder):
    class Wrong(triton.Triton):
        def forward(self, chain, x, operands, cut=None):
            return super().forward(chain, x, operands, cut) * 1.01

    monkeypatch.setitem(BACKENDS, "triton", Wrong())
    forward, backward = tuning.run([task(), task(BACKWARD)], 0, True, quiet)
    assert not forward.ok and not forward.kept and "wrong: y" in forward.note and forward.best_us
    assert backward.ok and backward.kept
    assert store.lookup(task().subject, CPU, Cut) is None and store.lookup(task(BACKWARD).subject, CPU, Cut)


def test_a_heuristic_that_cannot_be_launched_is_a_row_that_is_not_ok(few, monkeypatch):
    monkeypatch.setattr(BACKENDS["triton"], "heuristic", lambda *a: few[1])
    (row,) = tuning.run([task()], 0, True, quiet)
    assert not row.ok and row.note and row.best is None and store.lookup(task().subject, CPU, Cut) is None


def test_what_an_earlier_search_found_is_tried_again():
    known = Cut(rows=16, threads=64, across=64, resident=1)
    assert known not in task().candidates
    store.keep(task().subject, CPU, known, 1.0, 2.0)
    assert known in task().candidates and task().candidates[0] == task().heuristic != known


def test_every_launch_is_compiled_before():
    one = task(BACKWARD, "cuda", (64, 512))
    chosen = [
        cuda._cuts(c.chain, layout_of(c.tensors[0], c.tensors[1:], device=CPU), c.cuts)[1] for c in tuning.planned(one)
    ]
    assert chosen == one.candidates and len(chosen) > 1
    assert cuda._cuts(OP, one.work.layout(one.direction))[1] == one.heuristic


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_finds_and_keeps_and_forgets(few, tmp_path, folder):
    file = tmp_path / "tune.json"
    arguments = ["tune", "--chain", "add | relu", "--backend", "triton", "--shape", "4x8", "--dtype", "float32"]
    dry = run(*arguments, "--dry-run", "--direction", "forward")
    assert dry.exit_code == 0 and "nothing was kept" in dry.output and not folder.exists()
    done = run(*arguments, "--json", str(file))
    assert done.exit_code == 0 and "say nothing about a GPU" in done.output and "holds 2 launches" in done.output
    found = json.loads(file.read_text())
    assert [row["direction"] for row in found["rows"]] == [FORWARD, BACKWARD] and found["launches"] == 2
    for row in found["rows"]:
        assert row["ok"] and row["kept"] and row["interpreted"] and row["heuristic_us"] >= row["best_us"] > 0
        assert store.lookup(task(row["direction"]).subject, CPU, Cut) == Cut(**row["best"])
    assert "deleted" in run("tune", "--forget").output and store.lookup(task().subject, CPU, Cut) is None
    assert "nothing was kept" in run("tune", "--forget").output


def test_the_command_compiles_and_times_cuda(monkeypatch, few):
    monkeypatch.setattr(store, "candidates", lambda *a: [a[-1], replace(a[-1], threads=64, across=64)])
    arguments = ["--chain", "add | relu", "--backend", "cuda", "--shape", "4x8", "--dtype", "float32"]
    done = run("tune", *arguments, "--direction", "backward")
    assert done.exit_code == 0, done.output
    assert store.lookup(task(BACKWARD, "cuda").subject, CPU, Cut) is not None


def test_without_a_backend_the_command_takes_all_that_have_launches_to_choose(monkeypatch, few, tmp_path):
    monkeypatch.setattr(store, "candidates", lambda *a: [a[-1]])
    file = tmp_path / "tune.json"
    arguments = ["--chain", "add | relu", "--shape", "4x8", "--dtype", "float32", "--direction", "forward", "--dry-run"]
    assert run("tune", *arguments, "--json", str(file)).exit_code == 0
    names = [name for name, backend in BACKENDS.items() if backend.heuristic(OP, task().work.layout(), FORWARD)]
    assert [row["backend"] for row in json.loads(file.read_text())["rows"]] == names and "reference" not in names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "reference"], "no launches to choose"),
        (["--direction", "up"], "forward, backward, both"),
        (["--operand", "diagonal"], "diagonal"),
        (["--chain", "add | swishh"], "did you mean swish"),
    ],
)
def test_mistakes_of_the_command(arguments, said):
    done = run("tune", *arguments)
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split())


def test_without_a_gpu_interpreting_must_be_asked_for():
    done = process("-m", "dualop", "tune", DUALOP_INTERPRET="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "DUALOP_INTERPRET=1" in done.stderr and done.stdout == ""
