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
from dualop.launch import tuning as store
from dualop.launch.layout import layout_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    warps: int
    rows: int = 1


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALOP_CACHE_DIR", str(tmp_path))
    yield tmp_path / "tune"
    store._read.cache_clear()


def subject(text="add | relu", shape=(100, 1000), direction="forward", backend="triton", dtype=torch.float32):
    op = dualop.chain(text)
    x = torch.zeros(shape, dtype=dtype)
    return store.subject(backend, op, layout_of(x, [x[0]] * len(op.operands)), direction)


# ---- the search ------------------------------------------------------------------------------------------------------


def test_the_fastest_is_found():
    seen = []
    times = {Launch(1): 30.0, Launch(2): 20.0, Launch(4): 10.0, Launch(8): 15.0}
    steps = []
    result = store.search(Launch(1), list(times), lambda c: seen.append(c) or times[c], lambda *a: steps.append(a))
    assert (result.best, result.microseconds, result.before, result.tried) == (Launch(4), 10.0, 30.0, 4)
    assert result.gain == 3.0 and steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[:4] == [Launch(1), Launch(2), Launch(4), Launch(8)]  # the present one first, and none twice
    assert sorted(seen[4:8], key=lambda c: c.warps) == sorted(times, key=lambda c: c.warps)  # then in turns


def test_one_lucky_measurement_does_not_win():
    calls = {}

    def time(launch):
        calls[launch] = calls.get(launch, 0) + 1
        return 5.0 if launch.warps == 2 and calls[launch] == 1 else {1: 10.0, 2: 20.0}[launch.warps]

    result = store.search(Launch(1), [Launch(2)], time)
    assert result.best == Launch(1) and result.microseconds == result.before == 10.0


def test_what_is_not_clearly_better_changes_nothing():
    near = 1 - store.MARGIN / 2
    assert store.search(Launch(1), [Launch(2)], lambda c: 10.0 if c.warps == 1 else 10.0 * near).best == Launch(1)
    far = 1 - store.MARGIN * 2
    assert store.search(Launch(1), [Launch(2)], lambda c: 10.0 if c.warps == 1 else 10.0 * far).best == Launch(2)


def test_only_the_fastest_few_are_timed_again():
    seen = []
    launches = [Launch(n) for n in range(1, 21)]
    store.search(Launch(20), launches, lambda c: seen.append(c) or float(c.warps))
    again = seen[20:]
    assert set(again) == {*launches[: store.FINALISTS], Launch(20)} and len(again) == 5 * store.ROUNDS


def test_neighbours_of_the_fastest_are_tried_once():
    seen, steps = [], []
    near = lambda best: [Launch(best.warps, 2), Launch(best.warps, 4), best]
    times = {1: 30.0, 2: 20.0, 4: 25.0}
    time = lambda c: seen.append(c) or times[c.warps] / c.rows
    result = store.search(Launch(1), [Launch(2), Launch(4)], time, lambda *a: steps.append(a), near)
    assert result.best == Launch(2, 4) and result.microseconds == 5.0 and result.before == 30.0
    assert seen[:5] == [Launch(1), Launch(2), Launch(4), Launch(2, 2), Launch(2, 4)]
    assert steps == [(1, 3), (2, 3), (3, 3), (4, 5), (5, 5)] and result.tried == 5
    assert result.first[Launch(2, 2)] == 10.0


def test_a_candidate_that_fails_is_left_out_and_the_present_one_raises():
    def time(launch):
        if launch.warps == 2:
            raise RuntimeError("out of registers\nat line 3")
        return 10.0

    result = store.search(Launch(1), [Launch(2), Launch(4)], time)
    assert result.best == Launch(1) and result.failed == {Launch(2): "RuntimeError: out of registers"}
    with pytest.raises(RuntimeError, match="registers"):
        store.search(Launch(2), [Launch(1)], time)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_a_workload_is_timed_with_the_launch_that_is_tried(monkeypatch, device, direction):
    used = set()

    class Tuned(Reference):
        name = "tuned"

        def forward(self, chain, x, operands, cut=None):
            used.add((FORWARD, cut))
            return super().forward(chain, x, operands)

        def backward(self, chain, gy, x, operands, needs, cut=None):
            used.add((BACKWARD, cut))
            return super().backward(chain, gy, x, operands, needs)

    monkeypatch.setitem(BACKENDS, "tuned", Tuned())
    work = Workload(dualop.chain("add | relu"), (8, 16), "float32", device)
    result = store.search(Launch(1), [Launch(2)], tuning.timer(work, "tuned", direction, 0))
    assert result.tried == 2 and result.microseconds > 0
    assert used == {(direction, Launch(1)), (direction, Launch(2))}


# ---- the store -------------------------------------------------------------------------------------------------------


def test_subjects_share_a_bucket_of_powers_of_two():
    assert subject(shape=(100, 1000)) == subject(shape=(128, 1024)) == subject(shape=(65, 520))
    assert subject().shape == "128x1024"
    others = [
        subject(shape=(129, 1000)), subject(direction="backward"), subject(backend="cuda"), subject("add | gelu"),
        subject(dtype=torch.bfloat16), subject("add"),
    ]  # fmt: skip
    assert len({subject(), *others}) == 7
    x = torch.zeros(100, 1000)
    rows = store.subject("triton", dualop.chain("add | relu"), layout_of(x, [x[:, :1]]), "forward")
    assert rows != subject()  # an operand along the rows


def test_what_is_kept_is_found_by_this_process_and_the_next(folder):
    assert store.lookup(subject(), CPU, Launch) is None
    file = store.keep(subject(), CPU, Launch(8, 2), 12.34567, 15.0)
    assert file.parent == folder and store.lookup(subject(), CPU, Launch) == Launch(8, 2)
    store._read.cache_clear()
    assert store.lookup(subject(), CPU, Launch) == Launch(8, 2)
    assert store.lookup(subject(direction="backward"), CPU, Launch) is None
    (entry,) = json.loads(file.read_text())["found"].values()
    assert entry == {"launch": {"warps": 8, "rows": 2}, "us": 12.346, "before_us": 15.0}


def test_the_file_is_read_once(folder, monkeypatch):
    store.keep(subject(), CPU, Launch(8), 1.0, 2.0)
    assert store.lookup(subject(), CPU, Launch) == Launch(8)
    for file in folder.glob("*.json"):
        file.unlink()
    assert store.lookup(subject(), CPU, Launch) == Launch(8)
    assert store.lookup(subject("mul"), CPU, Launch) is None


def test_another_gpu_or_software_has_another_file(folder, monkeypatch):
    names = {"cuda:0": "NVIDIA H200", "cuda:1": "NVIDIA A100-SXM4/80GB"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert re.fullmatch(r"NVIDIA-H200_[0-9a-f]{12}\.json", store.keep(subject(), first, Launch(8), 1.0, 2.0).name)
    assert store.lookup(subject(), first, Launch) == Launch(8) and store.lookup(subject(), second, Launch) is None
    store._software.cache_clear()
    store._read.cache_clear()
    monkeypatch.setattr(store, "_triton", lambda: "9.9")
    assert store.lookup(subject(), first, Launch) is None
    store._software.cache_clear()


def test_where_nothing_is_kept_no_source_is_read(monkeypatch):
    digested = []
    monkeypatch.setattr(store, "_software", lambda: digested.append(1) or "0")
    assert store.lookup(subject(), CPU, Launch) is None and not digested
    store.keep(subject(), CPU, Launch(8), 1.0, 2.0)
    digested.clear()
    for _ in range(3):
        assert store.lookup(subject(), CPU, Launch) == Launch(8)
    assert len(digested) == 1


def test_forgetting_leaves_other_gpus(folder, monkeypatch):
    names = {"cuda:0": "NVIDIA H200", "cuda:1": "NVIDIA H200 NVL"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    first, second = map(torch.device, names)
    file = store.keep(subject(), first, Launch(8), 1.0, 2.0)
    old = folder / "NVIDIA-H200_0123456789ab.json"  # of other software
    old.write_text("{}")
    store.keep(subject(), second, Launch(4), 1.0, 2.0)
    assert store.kept(first) == (file, 1)
    assert sorted(store.forget(first)) == sorted([file, old])
    assert store.lookup(subject(), first, Launch) is None and store.lookup(subject(), second, Launch) == Launch(4)
    assert store.forget(first) == [] and store.kept(first) == (file, 0)


def test_the_software_is_that_of_the_kernels(monkeypatch, tmp_path):
    store._software.cache_clear()
    store.keep(subject(), CPU, Launch(8), 1.0, 2.0)
    before = store._software()
    changed = tmp_path / "kernels"
    changed.mkdir()
    (changed / "math.cuh").write_text("// faster")
    folder = store.sources.folder
    monkeypatch.setattr(store.sources, "folder", lambda name: changed if name == "cuda" else folder(name))
    store._software.cache_clear()
    store._read.cache_clear()  # as in another process
    assert store._software() != before and store.lookup(subject(), CPU, Launch) is None
    store._software.cache_clear()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 99, "found": {}}', '{"format": 1}', '{"format": 1, "found": {"a": 3}}'], ids=str
)
def test_a_file_that_is_none_is_ignored_said_and_rewritten(text):
    file = store.keep(subject(), CPU, Launch(8), 1.0, 2.0)
    file.write_text(text)
    with pytest.warns(UserWarning, match="writes it anew"):
        assert store.lookup(subject(), CPU, Launch) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.lookup(subject(), CPU, Launch) is None  # said once
        store.keep(subject(), CPU, Launch(4), 1.0, 2.0)
        assert store.lookup(subject(), CPU, Launch) == Launch(4)


def test_a_launch_with_other_fields_is_ignored():
    @dataclass(frozen=True)
    class Other:
        stages: int

    store.keep(subject(), CPU, Other(3), 1.0, 2.0)
    assert store.lookup(subject(), CPU, Launch) is None and store.lookup(subject(), CPU, Other) == Other(3)


def test_it_waits_for_another_process_that_is_writing_and_keeps_what_that_one_wrote():
    file = store.keep(subject("mul(1)"), CPU, Launch(1), 1.0, 2.0)
    assert store.lookup(subject("mul(1)"), CPU, Launch) == Launch(1)
    with ThreadPoolExecutor(1) as pool:
        with locks.file(f"{file}.lock"):
            kept = pool.submit(store.keep, subject("mul(2)"), CPU, Launch(2), 1.0, 2.0)
            with pytest.raises(TimeoutError):
                kept.result(0.5)
            content = json.loads(file.read_text())
            content["found"][str(subject("mul(3)"))] = {"launch": {"warps": 3}}
            file.write_text(json.dumps(content))
        kept.result(30)
    assert [store.lookup(subject(f"mul({i})"), CPU, Launch) for i in (1, 2, 3)] == [Launch(1), Launch(2), Launch(3)]
    assert {path.name for path in file.parent.iterdir()} <= {file.name, f"{file.name}.lock"}


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DUALOP_CACHE_DIR", str(blocked))
    assert store.lookup(subject(), CPU, Launch) is None
    with pytest.raises(BackendUnavailable, match="DUALOP_CACHE_DIR"):
        store.keep(subject(), CPU, Launch(8), 1.0, 2.0)
