"""The search for the fastest launch, and what is kept of it on disk."""

from __future__ import annotations

import json
import re
import warnings
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass

import pytest
import torch

import dualop
from dualop.backends.reference import Reference
from dualop.backends.registry import BACKENDS
from dualop.bench import tuning
from dualop.bench.workloads import BACKWARD, FORWARD, Workload
from dualop.build import locks
from dualop.errors import BackendUnavailable
from dualop.launch import tune, tuned
from dualop.launch.layout import layout

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    warps: int
    rows: int = 1


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALOP_CACHE_DIR", str(tmp_path))
    yield tmp_path / "tune"
    tuned._read.cache_clear()


def subject(text="add | relu", shape=(100, 1000), direction="forward", backend="triton", dtype=torch.float32):
    op = dualop.chain(text)
    x = torch.zeros(shape, dtype=dtype)
    return tuned.subject(backend, op, layout(x, [x[0]] * len(op.operands)), direction)


# ---- the search ------------------------------------------------------------------------------------------------------


def test_the_fastest_is_found():
    seen = []
    times = {Launch(1): 30.0, Launch(2): 20.0, Launch(4): 10.0, Launch(8): 15.0}
    steps = []
    result = tune.search(Launch(1), list(times), lambda c: seen.append(c) or times[c], lambda *a: steps.append(a))
    assert (result.best, result.microseconds, result.before, result.tried) == (Launch(4), 10.0, 30.0, 4)
    assert result.gain == 3.0 and steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[:4] == [Launch(1), Launch(2), Launch(4), Launch(8)]  # the present one first, and none twice
    assert sorted(seen[4:8], key=lambda c: c.warps) == sorted(times, key=lambda c: c.warps)  # then in turns


def test_one_lucky_measurement_does_not_win():
    calls = {}

    def time(launch):
        calls[launch] = calls.get(launch, 0) + 1
        return 5.0 if launch.warps == 2 and calls[launch] == 1 else {1: 10.0, 2: 20.0}[launch.warps]

    result = tune.search(Launch(1), [Launch(2)], time)
    assert result.best == Launch(1) and result.microseconds == result.before == 10.0


def test_what_is_not_clearly_better_changes_nothing():
    near = 1 - tune.MARGIN / 2
    assert tune.search(Launch(1), [Launch(2)], lambda c: 10.0 if c.warps == 1 else 10.0 * near).best == Launch(1)
    far = 1 - tune.MARGIN * 2
    assert tune.search(Launch(1), [Launch(2)], lambda c: 10.0 if c.warps == 1 else 10.0 * far).best == Launch(2)


def test_only_the_fastest_few_are_timed_again():
    seen = []
    launches = [Launch(n) for n in range(1, 21)]
    tune.search(Launch(20), launches, lambda c: seen.append(c) or float(c.warps))
    again = seen[20:]
    assert set(again) == {*launches[: tune.FINALISTS], Launch(20)} and len(again) == 5 * tune.ROUNDS


def test_neighbours_of_the_fastest_are_tried_once():
    seen, steps = [], []
    near = lambda best: [Launch(best.warps, 2), Launch(best.warps, 4), best]
    times = {1: 30.0, 2: 20.0, 4: 25.0}
    time = lambda c: seen.append(c) or times[c.warps] / c.rows
    result = tune.search(Launch(1), [Launch(2), Launch(4)], time, lambda *a: steps.append(a), near)
    assert result.best == Launch(2, 4) and result.microseconds == 5.0 and result.before == 30.0
    assert seen[:5] == [Launch(1), Launch(2), Launch(4), Launch(2, 2), Launch(2, 4)]
    assert steps == [(1, 3), (2, 3), (3, 3), (4, 5), (5, 5)] and result.tried == 5
    assert result.first[Launch(2, 2)] == 10.0


def test_a_candidate_that_fails_is_left_out_and_the_present_one_raises():
    def time(launch):
        if launch.warps == 2:
            raise RuntimeError("out of registers\nat line 3")
        return 10.0

    result = tune.search(Launch(1), [Launch(2), Launch(4)], time)
    assert result.best == Launch(1) and result.failed == {Launch(2): "RuntimeError: out of registers"}
    with pytest.raises(RuntimeError, match="registers"):
        tune.search(Launch(2), [Launch(1)], time)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_a_workload_is_timed_with_the_launch_that_is_tried(monkeypatch, device, direction):
    used = set()

    class Tuned(Reference):
        name = "tuned"

        def forward(self, chain, x, operands):
            self.note(chain, x, operands, FORWARD)
            return super().forward(chain, x, operands)

        def backward(self, chain, gy, x, operands, needs):
            self.note(chain, x, operands, BACKWARD)
            return super().backward(chain, gy, x, operands, needs)

        def note(self, chain, x, operands, way):
            what = tuned.subject("tuned", chain, layout(x, operands), way)
            used.add((way, tuned.lookup(what, x.device, Launch)))

    monkeypatch.setitem(BACKENDS, "tuned", Tuned())
    work = Workload(dualop.chain("add | relu"), (8, 16), "float32", device)
    what, time = tuning.timer(work, "tuned", direction, 0)
    assert what == tuned.subject("tuned", work.chain, layout(torch.zeros(8, 16), [torch.zeros(16)]), direction)
    result = tune.search(Launch(1), [Launch(2)], time)
    assert result.tried == 2 and result.microseconds > 0
    assert used == {(direction, Launch(1)), (direction, Launch(2))} | (
        {(FORWARD, None)} if direction == BACKWARD else set()
    )


# ---- the store -------------------------------------------------------------------------------------------------------


def test_subjects_share_a_bucket_of_powers_of_two():
    assert subject(shape=(100, 1000)) == subject(shape=(128, 1024)) == subject(shape=(65, 513))
    assert subject().shape == "128x1024"
    others = [
        subject(shape=(129, 1000)), subject(direction="backward"), subject(backend="cuda"), subject("add | gelu"),
        subject(dtype=torch.bfloat16), subject("add"),
    ]  # fmt: skip
    assert len({subject(), *others}) == 7
    x = torch.zeros(100, 1000)
    rows = tuned.subject("triton", dualop.chain("add | relu"), layout(x, [x[:, :1]]), "forward")
    assert rows != subject()  # an operand along the rows


def test_what_is_kept_is_found_by_this_process_and_the_next(folder):
    assert tuned.lookup(subject(), CPU, Launch) is None
    file = tuned.keep(subject(), CPU, Launch(8, 2), 12.34567, 15.0)
    assert file.parent == folder and tuned.lookup(subject(), CPU, Launch) == Launch(8, 2)
    tuned._read.cache_clear()
    assert tuned.lookup(subject(), CPU, Launch) == Launch(8, 2)
    assert tuned.lookup(subject(direction="backward"), CPU, Launch) is None
    (entry,) = json.loads(file.read_text())["found"].values()
    assert entry == {"launch": {"warps": 8, "rows": 2}, "us": 12.346, "before_us": 15.0}


def test_the_file_is_read_once(folder, monkeypatch):
    tuned.keep(subject(), CPU, Launch(8), 1.0, 2.0)
    assert tuned.lookup(subject(), CPU, Launch) == Launch(8)
    for file in folder.glob("*.json"):
        file.unlink()
    assert tuned.lookup(subject(), CPU, Launch) == Launch(8)
    assert tuned.lookup(subject("mul"), CPU, Launch) is None


def test_another_gpu_or_software_has_another_file(folder, monkeypatch):
    names = {"cuda:0": "NVIDIA H200", "cuda:1": "NVIDIA A100-SXM4/80GB"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert re.fullmatch(r"NVIDIA-H200_[0-9a-f]{12}\.json", tuned.keep(subject(), first, Launch(8), 1.0, 2.0).name)
    assert tuned.lookup(subject(), first, Launch) == Launch(8) and tuned.lookup(subject(), second, Launch) is None
    tuned._software.cache_clear()
    tuned._read.cache_clear()
    monkeypatch.setattr(tuned, "_triton", lambda: "9.9")
    assert tuned.lookup(subject(), first, Launch) is None
    tuned._software.cache_clear()


def test_where_nothing_is_kept_no_source_is_read(monkeypatch):
    digested = []
    monkeypatch.setattr(tuned, "_software", lambda: digested.append(1) or "0")
    assert tuned.lookup(subject(), CPU, Launch) is None and not digested
    tuned.keep(subject(), CPU, Launch(8), 1.0, 2.0)
    digested.clear()
    for _ in range(3):
        assert tuned.lookup(subject(), CPU, Launch) == Launch(8)
    assert len(digested) == 1


def test_forgetting_leaves_other_gpus(folder, monkeypatch):
    names = {"cuda:0": "NVIDIA H200", "cuda:1": "NVIDIA H200 NVL"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    first, second = map(torch.device, names)
    file = tuned.keep(subject(), first, Launch(8), 1.0, 2.0)
    old = folder / "NVIDIA-H200_0123456789ab.json"  # of other software
    old.write_text("{}")
    tuned.keep(subject(), second, Launch(4), 1.0, 2.0)
    assert tuned.kept(first) == (file, 1)
    told = []
    tuned.on_change(forget := lambda: told.append(1))
    assert sorted(tuned.forget(first)) == sorted([file, old]) and told
    tuned._listeners.remove(forget)
    assert tuned.lookup(subject(), first, Launch) is None and tuned.lookup(subject(), second, Launch) == Launch(4)
    assert tuned.forget(first) == [] and tuned.kept(first) == (file, 0)


def test_the_software_is_that_of_the_kernels(monkeypatch, tmp_path):
    tuned._software.cache_clear()
    tuned.keep(subject(), CPU, Launch(8), 1.0, 2.0)
    before = tuned._software()
    changed = tmp_path / "kernels"
    changed.mkdir()
    (changed / "math.cuh").write_text("// faster")
    folder = tuned.sources.folder
    monkeypatch.setattr(tuned.sources, "folder", lambda name: changed if name == "cuda" else folder(name))
    tuned._software.cache_clear()
    tuned._read.cache_clear()  # as in another process
    assert tuned._software() != before and tuned.lookup(subject(), CPU, Launch) is None
    tuned._software.cache_clear()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 99, "found": {}}', '{"format": 1}', '{"format": 1, "found": {"a": 3}}'], ids=str
)
def test_a_file_that_is_none_is_ignored_said_and_rewritten(text):
    file = tuned.keep(subject(), CPU, Launch(8), 1.0, 2.0)
    file.write_text(text)
    with pytest.warns(UserWarning, match="writes it anew"):
        assert tuned.lookup(subject(), CPU, Launch) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.lookup(subject(), CPU, Launch) is None  # said once
        tuned.keep(subject(), CPU, Launch(4), 1.0, 2.0)
        assert tuned.lookup(subject(), CPU, Launch) == Launch(4)


def test_a_launch_with_other_fields_is_ignored():
    @dataclass(frozen=True)
    class Other:
        stages: int

    tuned.keep(subject(), CPU, Other(3), 1.0, 2.0)
    assert tuned.lookup(subject(), CPU, Launch) is None and tuned.lookup(subject(), CPU, Other) == Other(3)


def test_within_trying_the_tried_launch_is_chosen_and_caches_are_told():
    told = []
    tuned.on_change(forget := lambda: told.append(tuned.lookup(subject(), CPU, Launch)))
    try:
        tuned.keep(subject(), CPU, Launch(8), 1.0, 2.0)
        with tuned.trying(subject(), Launch(2)):
            assert tuned.lookup(subject(), CPU, Launch) == Launch(2)
            assert tuned.lookup(subject("mul"), CPU, Launch) is None
        assert told == [Launch(8), Launch(2), Launch(8)]
        with pytest.raises(ZeroDivisionError), tuned.trying(subject(), Launch(2)):
            raise ZeroDivisionError
        assert tuned.lookup(subject(), CPU, Launch) == Launch(8)
    finally:
        tuned._listeners.remove(forget)


def test_it_waits_for_another_process_that_is_writing_and_keeps_what_that_one_wrote():
    file = tuned.keep(subject("mul(1)"), CPU, Launch(1), 1.0, 2.0)
    assert tuned.lookup(subject("mul(1)"), CPU, Launch) == Launch(1)
    with ThreadPoolExecutor(1) as pool:
        with locks.file(f"{file}.lock"):
            kept = pool.submit(tuned.keep, subject("mul(2)"), CPU, Launch(2), 1.0, 2.0)
            with pytest.raises(TimeoutError):
                kept.result(0.5)
            content = json.loads(file.read_text())
            content["found"][str(subject("mul(3)"))] = {"launch": {"warps": 3}}
            file.write_text(json.dumps(content))
        kept.result(30)
    assert [tuned.lookup(subject(f"mul({i})"), CPU, Launch) for i in (1, 2, 3)] == [Launch(1), Launch(2), Launch(3)]
    assert {path.name for path in file.parent.iterdir()} <= {file.name, f"{file.name}.lock"}


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DUALOP_CACHE_DIR", str(blocked))
    assert tuned.lookup(subject(), CPU, Launch) is None
    with pytest.raises(BackendUnavailable, match="DUALOP_CACHE_DIR"):
        tuned.keep(subject(), CPU, Launch(8), 1.0, 2.0)
