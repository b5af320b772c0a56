"""The benchmarks: what they count, that they check before they time, what they write. Not how fast anything is."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_cli import run
from test_cli import wrong as wrong

import dualop
from dualop.bench import copying, linear95, measure, suite, table, timing, workloads
from dualop.bench.workloads import BACKWARD, COMPILED, COPY, EAGER, FORWARD, LAUNCH, Workload
from dualop.errors import ShapeError
from dualop.numerics import cases

CPU = torch.device("cpu")


def quiet(text):
    pass


def workload(text="add | tanh", shape=(6, 10), dtype="float32", operands=("last",), device=CPU):
    return Workload(dualop.chain(text), shape, dtype, device, operands)


def test_shapes():
    assert workloads.parse_shape("16384x8192") == (16384, 8192)
    assert workloads.parse_shape("2X3×4") == (2, 3, 4)
    for text in ("", "x", "3x", "-1x2", "0", "4*4"):
        with pytest.raises(ShapeError):
            workloads.parse_shape(text)


@pytest.mark.parametrize(
    ("operands", "count"), [(("last",), 10), (("row",), 6), (("scalar",), 1), (("full",), 60)], ids=str
)
def test_bytes_are_what_has_to_move(operands, count):
    work = workload(dtype="bfloat16", operands=operands)
    assert work.bytes(FORWARD) == 2 * (60 + 60 + count)
    assert work.bytes(BACKWARD) == 2 * (60 + 60 + 60 + 2 * count)


@pytest.mark.parametrize(
    ("arrange", "operands", "operand_arrange", "forward", "backward"),
    [
        ("every second", ("last",), "dense", 2 * 960 + 960 + 80, 2 * 960 + 2 * 960 + 2 * 80),
        ("every second", ("full",), "beside", 2 * 960 + 960, 2 * 960 + 3 * 960),  # both are read in one go
        ("transposed", ("full",), "transposed", 3 * 960, 5 * 960),
        ("inner", ("last",), "dense", 960 + 11 * 4 + 960 + 80, 960 + 11 * 4 + 2 * 960 + 2 * 80),
    ],
)
def test_bytes_of_what_is_strided_are_whole_sectors(arrange, operands, operand_arrange, forward, backward):
    """x is (12, 40) of bfloat16: 960 bytes."""
    work = Workload(dualop.chain("add"), (12, 40), "bfloat16", CPU, operands, arrange, operand_arrange)
    near = lambda count: pytest.approx(count, abs=2 * workloads.SECTOR)
    assert work.bytes(FORWARD) == near(forward) and work.bytes(BACKWARD) == near(backward)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((5, 33), (33, 1)),
        ((5, 64), (200, 1)),
        ((7, 3), (64, 2)),
        ((64, 5), (1, 64)),
        ((9,), (40,)),
        ((3, 4, 16), (400, 100, 1)),
        ((4, 1, 6), (6, 99, 1)),
        ((5, 40), (42, 1)),
        ((), ()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_sectors_are_counted_as_they_are_touched(shape, strides, dtype):
    """Against the set of all sectors, where runs start at sectors; a dense tensor counts its own bytes."""
    tensor = torch.empty(4096, dtype=dtype).as_strided(shape, strides)
    item = tensor.element_size()
    offsets = torch.arange(4096).as_strided(shape, strides).flatten() * item
    sectors = workloads.SECTOR * len(offsets.div(workloads.SECTOR, rounding_mode="floor").unique())
    found = workloads.touched(tensor)
    assert found <= sectors and sectors - found <= workloads.SECTOR * max(
        1, tensor.numel() // max(1, shape[-1] if shape else 1)
    )
    if tensor.is_contiguous():
        assert found == tensor.numel() * item


@pytest.mark.parametrize("entry", [e for part in ("rows", "strided") for e in suite.SUITE[part]], ids=str)
def test_samples_lie_as_the_workload_says(entry):
    """What is timed, what is checked and what is compiled ahead have the same strides."""
    work = Workload(dualop.chain(entry.chain), suite.SMALL[entry.shape], "float32", CPU, *entry[2:])
    sample = work.sample(0)
    planned, inputs = work.planned.tensors, (sample.x, *sample.operands)
    assert [t.shape for t in planned] == [t.shape for t in inputs] == work.shapes
    assert [t.stride() for t in planned] == [t.stride() for t in inputs]
    assert [t.storage_offset() for t in planned] == [t.storage_offset() for t in inputs]
    assert sample.gy.stride() == work.layout().strides
    drawn = work._drawn(0)  # as on a GPU
    assert [t.stride() for t in (drawn.x, *drawn.operands, drawn.gy)] == [t.stride() for t in (*inputs, sample.gy)]
    assert all(t.count_nonzero() == t.numel() for t in (drawn.x, *drawn.operands, drawn.gy))
    assert (entry.arrange == "dense") == sample.x.is_contiguous()
    if entry.operand_arrange == "beside":
        assert sample.operands[0].data_ptr() == sample.x.data_ptr() + 4 and not torch.equal(*inputs)


def test_what_cannot_lie_so_is_refused():
    for lies in ({"arrange": "channels_last"}, {"arrange": "heads"}, {"operand_arrange": "beside"}):
        with pytest.raises(ShapeError):
            Workload(dualop.chain("add"), (6, 10), "float32", CPU, ("full",), **lies)
    assert run("bench", "--memory", "nowhere").exit_code == 2
    said = run("bench", "--help").output.replace("│", " ")
    assert all(how in " ".join(said.split()) for how in cases.ARRANGEMENTS)


def test_forward_and_backward_calls_do_what_they_say():
    work = workload("add | mul(scale) | tanh")
    sample = work.sample(0)
    function = workloads.contestants(work, [], compiled=False)[EAGER]
    (forward,) = workloads.calls(function, FORWARD, [sample])
    x, add, scale = sample.x, *sample.operands
    y = forward()
    torch.testing.assert_close(y, torch.tanh((x + add) * scale), rtol=0, atol=0)
    assert not y.requires_grad
    (backward,) = workloads.calls(function, BACKWARD, [sample])
    gz = sample.gy * (1 - y * y)
    for _ in range(2):  # the graph is kept
        gx, gadd, gscale = backward()
        torch.testing.assert_close(gx, gz * scale)
        torch.testing.assert_close(gadd, (gz * scale).sum(0))
        torch.testing.assert_close(gscale, (gz * (x + add)).sum(0))


def test_fewer_rows_of_a_large_workload():
    work = workload(shape=(100, 10), operands=("full",))
    sample = work.sample(0, rows=7)
    assert sample.x.shape == sample.gy.shape == sample.operands[0].shape == (7, 10)


def test_timing_takes_the_median():
    found = timing._summary([5.0, 1.0, 3.0, 2.0, 4.0, 100.0, 3.5, 2.5, 4.5, 3.2, 3.1], "clock", "")
    assert (found.median_us, found.low_us, found.high_us, found.samples) == (3.2, 2.0, 5.0, 11)
    assert found.spread == pytest.approx(3.0 / 3.2)


def test_calls_take_turns():
    seen = []
    found = timing.timed([lambda: seen.append(0), lambda: seen.append(1)], None)
    assert found.method == "clock" and found.samples >= 3 and found.low_us <= found.median_us <= found.high_us
    assert seen[:4] == [0, 1, 0, 1] and seen.count(0) == seen.count(1)


def test_rows_of_a_workload():
    calls = []
    rows = measure.measure(workload(), ["reference"], False, 0, calls.append)
    assert len(calls) == measure.steps(1, False)
    assert [(r.direction, r.backend) for r in rows] == [
        (direction, name) for direction in (FORWARD, BACKWARD) for name in (COPY, EAGER, "reference")
    ]
    for group in (rows[:3], rows[3:]):
        copy, eager, ours = group
        assert copy.copy_share == 1 and copy.vs_eager is None and eager.vs_eager == 1
        assert ours.vs_eager == pytest.approx(eager.time_us / ours.time_us, rel=1e-3)
        assert ours.copy_share == pytest.approx(copy.time_us / ours.time_us, rel=1e-3)
        count = workload().bytes(ours.direction)
        assert copy.gbps == pytest.approx(count / copy.time_us / 1e3, rel=1e-3)
        assert ours.ok and not ours.interpreted and math.isfinite(ours.max_ulp) and ours.vs_compile is None
        assert math.isfinite(ours.beyond_rounding)
    assert rows[2].operand_sum is None and rows[2].operand_ulp is None
    assert 0 < rows[5].operand_sum < 200 and rows[5].operand_ulp is None
    (full,) = (r for r in measure.measure(workload(operands=("full",)), [], False, 0, quiet) if r.operand_ulp)
    assert full.direction == BACKWARD and full.operand_sum is None
    headers = {column.header for column in table.render(rows, "t").columns}
    assert {"ulp", "beyond rounding", "grad operand, u Σ|terms|"} <= headers and "grad operand, ulp" not in headers


def test_ratios_keep_their_digits_however_small():
    rows = [measure.Row(n, FORWARD, "relu", "float32", [2], time_us=t) for n, t in ((EAGER, 1.0), ("cuda", 34567.8))]
    assert measure.with_ratios(rows)[1].vs_eager == pytest.approx(1 / 34567.8, rel=1e-4)


def test_an_empty_launch_stands_beside_tiny_tensors_only(monkeypatch):
    empty = timing.Timing(2.0, 2.0, 2.0, 3, "graph")
    monkeypatch.setattr(measure, "launch_time", lambda device, stream: empty)
    rows = measure.measure(workload(), ["reference"], False, 0, quiet, eager=False)
    assert [row.backend for row in rows] == [LAUNCH, COPY, "reference"] * 2
    for row in rows:
        assert row.launches == pytest.approx(row.time_us / 2.0, rel=1e-3) and row.vs_eager is None
    assert rows[0].time_us == 2.0 and rows[0].copy_share is None
    assert "launches" in [column.header for column in table.render(rows, "t").columns]
    monkeypatch.setattr(measure, "TINY_BYTES", 100)
    assert all(row.launches is None for row in measure.measure(workload(), ["reference"], False, 0, quiet))


def test_the_fastest_copy_counts(monkeypatch):
    """Where torch's own copy is slow, a kernel that copies is taken, and remembered, but timed anew."""
    gpu, asked = torch.device("cuda"), []

    def timed(calls, stream):
        (call,) = calls
        asked.append((torch.clone, torch.mul).index(call.func))
        took = (444.0, 360.0)[asked[-1]]
        return timing.Timing(took, took, took, 3, "graph")

    monkeypatch.setattr(copying.torch, "ones", lambda size, dtype, device: torch.empty(size, dtype=dtype))
    monkeypatch.setattr(copying.timing, "timed", timed)
    monkeypatch.setattr(copying, "_fastest", {})
    result = copying.copy_time(1 << 20, 1, gpu, None)
    assert result.median_us == 360.0 and "kernel" in result.note and asked == [0, 1, 1]
    asked.clear()
    assert copying.copy_time(1 << 20, 1, gpu, None).median_us == 360.0 and asked == [1]


@pytest.mark.parametrize("way", range(len(copying.COPIES)))
def test_a_copy_copies(way):
    (copy,) = copying.copies(4096, 1, CPU, way)
    made = copy()
    assert 2 * made.nbytes == 4096 and (made == 1).all()


def test_what_is_wrong_is_not_timed(wrong):
    rows = measure.measure(workload(), [wrong], False, 0, quiet)
    forward, backward = (row for row in rows if row.backend == wrong)
    assert not forward.ok and forward.time_us is None and "wrong: y" in forward.note
    assert backward.ok and backward.time_us > 0
    result = run("bench", "--backend", wrong, "--no-compile", "--shape", "4x8", "--dtype", "float32")
    assert result.exit_code == 1 and "wrong: y" in result.output


def test_torch_compile_is_a_row_and_may_run_backward_twice():
    rows = measure.measure(workload("relu"), [], True, 0, quiet)
    compiled = [row for row in rows if row.backend == COMPILED]
    assert [row.direction for row in compiled] == [FORWARD, BACKWARD]
    assert all(row.time_us > 0 and row.vs_compile == 1 and not row.note for row in compiled)


def test_the_command_writes_rows(tmp_path, device):
    file = tmp_path / "bench.json"
    names = "cuda,triton,reference"
    shapes = ["4x8", "2x3x5"]
    result = run("bench", "--backend", names, "--no-compile", "--shape", ",".join(shapes), "--json", str(file))
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["device"]["type"] == device.type and found["device"]["torch"] == torch.__version__
    keys = {"backend", "direction", "chain", "dtype", "shape", "time_us", "gbps", "copy_share", "interpreted"}
    assert all(keys <= set(row) and row["time_us"] > 0 for row in found["rows"])
    assert {(tuple(row["shape"]), row["dtype"], row["direction"]) for row in found["rows"]} == {
        (shape, dtype, direction)
        for shape in ((4, 8), (2, 3, 5))
        for dtype in ("float32", "bfloat16")
        for direction in (FORWARD, BACKWARD)
    }
    launch = {LAUNCH} if device.type == "cuda" else set()
    assert {row["backend"] for row in found["rows"]} == {COPY, EAGER, "cuda", "triton", "reference"} | launch
    interpreted = {row["backend"] for row in found["rows"] if row["interpreted"]}
    if device.type == "cpu":
        assert interpreted == {"cuda", "triton"}
        assert "wall clock on the CPU" in found["times"] and "interpreted" in result.output
    else:
        assert not interpreted and all(row["method"] == "graph" for row in found["rows"])


def test_the_suite_is_a_line_for_each_chain_and_dtype(tmp_path, device, monkeypatch):
    entries = (
        suite.entry("add | gelu", suite.LARGE),
        suite.entry("add | gelu", suite.LARGE, "full"),
        suite.entry("relu", suite.NCHW, "last", "channels_last"),
    )
    monkeypatch.setitem(suite.SUITE, "chains", entries)
    file = tmp_path / "suite.json"
    result = run("bench", "--suite", "chains", "--backend", "cuda,triton", "--dtype", "bf16,fp32", "--json", str(file))
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith(("│ add | gelu", "│ relu"))]
    assert len(lines) == 6 and sum("full" in line for line in lines) == 2
    assert result.output.count("channels_last") == 2
    rows = json.loads(file.read_text())["rows"]
    assert {row["backend"] for row in rows} - {LAUNCH} == {COPY, "cuda", "triton"} and all(row["ok"] for row in rows)
    shown = [cell.strip() for cell in lines[0].split("│")]
    times = {
        (r["backend"], r["direction"]): r["time_us"]
        for r in rows
        if r["dtype"] == "bfloat16" and r["operands"] == "last"
    }
    assert float(shown[7]) == pytest.approx(times["cuda", FORWARD] / times[COPY, FORWARD], rel=2e-3)
    assert float(shown[10]) == pytest.approx(times["triton", BACKWARD] / times[COPY, BACKWARD], rel=2e-3)


def test_the_suite_covers_every_stage_and_its_parts_are_named():
    stages = {e.chain for e in suite.SUITE["stages"]}
    assert {stage.example for stage in dualop.stages.STAGES.values()} <= stages
    assert {"add | gelu", "add | mish", "add | softplus | tanh"} <= {e.chain for e in suite.SUITE["chains"]}
    every = [entry for part in suite.SUITE.values() for entry in part]
    assert len(set(every)) == len(every)
    assert {form for e in every for form in e.operands} >= {"last", "channel", "full", "position"}
    assert {e.shape for e in every} == set(suite.SMALL)  # each has a size for the CPU
    assert {e.arrange for e in every} >= {"dense", "channels_last", "inner", "every second", "transposed", "heads"}
    assert "rows, strided, medium" in " ".join(run("bench", "--help").output.replace("│", " ").split())
    assert run("bench", "--suite", "nothing").exit_code == 2


def test_a_wrong_result_is_wrong_in_the_suite(wrong, monkeypatch):
    monkeypatch.setitem(suite.SUITE, "chains", (suite.entry("relu", suite.LARGE),))
    result = run("bench", "--suite", "chains", "--backend", wrong, "--dtype", "float32")
    assert result.exit_code == 1 and "WRONG" in result.output


def test_columns_without_a_value_are_left_out():
    rows = [measure.Row("eager", FORWARD, "relu", "float32", [2], time_us=3.0)]
    assert [column.header for column in table.render(rows, "t").columns] == ["direction", "backend", "µs"]


def test_linear95_agrees(device):
    calls = []
    agreements, rows = linear95.run(["reference", "cuda"], ["float32", "bfloat16"], device, False, 0, calls.append)
    assert len(calls) == 2 * linear95.steps(2, False)
    quantities = ("y", "grad_input", "grad_weight", "grad_bias", "grad_add_value")
    assert [(a.dtype, a.backend) for a in agreements] == [
        (d, b) for d in ("float32", "bfloat16") for b in ("reference", "cuda") for _ in quantities
    ]
    assert {a.quantity for a in agreements} == set(quantities) and all(a.ok for a in agreements)
    assert {row.backend for row in rows} == {EAGER, "reference", "cuda", linear95.LINEAR}
    assert {row.direction for row in rows} == {FORWARD, linear95.STEP} and all(row.time_us > 0 for row in rows)


def test_linear95_finds_what_is_wrong(wrong):
    agreements, rows = linear95.run([wrong], ["float32"], CPU, False, 0, quiet)
    assert [a.quantity for a in agreements if not a.ok] == ["y"]
    assert [row.time_us for row in rows if row.backend == wrong] == [None, None]
    result = run("bench", "--problem", "linear95", "--backend", wrong, "--no-compile", "--dtype", "float32")
    assert result.exit_code == 1 and "DIFFERS" in result.output


@pytest.mark.gpu
def test_times_on_the_gpu_are_those_of_the_device(device):
    work = workload("add | tanh", (2048, 4096), "bfloat16", ("last",), device)
    rows = measure.measure(work, ["cuda", "triton"], True, 0, quiet)
    assert all(row.ok and row.method == "graph" for row in rows), [(row.backend, row.note) for row in rows]
    assert all(row.sets > 1 for row in rows)  # 32 MiB would stay in the cache
    assert all(0.02 < row.copy_share < 1.5 for row in rows)


@pytest.mark.gpu
def test_what_cannot_be_captured_is_timed_by_events(device):
    x = torch.ones(1000, device=device)
    with timing.on_stream(device) as stream:
        found = timing.timed([lambda: x.sum().item()], stream)
        assert found.method == "events" and "not capturable" in found.note and found.median_us > 0
        assert timing.timed([x.clone], stream).method == "graph"  # and the device is well afterwards


def test_torch_compile_stands_in_the_suite_on_request(tmp_path, monkeypatch):
    monkeypatch.setitem(suite.SUITE, "chains", (suite.entry("relu", suite.LARGE),))
    file = tmp_path / "suite.json"
    arguments = ["bench", "--suite", "chains", "--backend", "reference", "--dtype", "float32", "--json", str(file)]
    for more, there in (([], False), (["--compile"], True)):
        result = run(*arguments, *more)
        assert result.exit_code == 0 and (COMPILED in result.output) == there
        rows = [row for row in json.loads(file.read_text())["rows"] if row["backend"] == COMPILED]
        assert len(rows) == 2 * there and all(row["time_us"] > 0 and row["max_ulp"] is None for row in rows)
