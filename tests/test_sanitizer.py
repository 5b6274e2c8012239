"""compute-sanitizer's rehearsal: which calls it gets, what is made of its output, what survives.

In place of the tool stands a script that passes on what the program prints and adds reports, in the
tool's words, to calls that it is told of; or dies, or hangs, or can't run. The program is the true
one, in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks._report.results import read
from benchmarks._verify import faults, sanitizer, watch
from benchmarks._verify.reports import FOREIGN, Report, Stream
from benchmarks._verify.sanitizer import main
from vitkern.kernels._triton import INTERPRET, TRITON_MISSING

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))

COUNT = """
import json
import sys
from benchmarks._verify import small
from tests.error_budget import as_tuple
from vitkern.kernels import REGISTRY
from vitkern.kernels._triton import gluon

def fits(call):
    # PyTorch takes the smaller arguments, too, and makes of them what the kernels make.
    arguments, op = call.arguments("meta"), REGISTRY[call.op]
    made = call.run(arguments, lambda _: None), op.reference(**arguments), op.portable(**arguments)
    shapes = [[(t.shape, t.dtype) for t in as_tuple(each)] for each in made]
    return shapes[0] == shapes[1] == shapes[2]

arch, ops = int(sys.argv[1]), list(REGISTRY.values())
found = small.survey(ops, arch)
calls = small.fewest(found, ops, arch)
gluon_configs = [c for call in calls for c in call.configs if call.impl == "gluon"]
print(json.dumps({
    "calls": len(calls),
    "configs": len(found.goals),
    "missing": sorted(found.goals.keys() - {key for call in calls for key in call.keys}),
    "gflop": [call.flops / 1e9 for call in calls],
    "elements": [call.elements for call in calls],
    "gluon": gluon().missing is None,
    "sharers": sorted({c[c.index("SHARERS"):][:9] for c in gluon_configs if "SHARERS" in c}),
    "impls": sorted({call.impl for call in calls}),
    "labels": [f"{call.op} {call.impl} {call.label} {call.dtype}" for call in calls],
    "unlike": [str(call) for call in calls if call.images and not fits(call)],
}))
"""


@pytest.fixture(scope="module", params=[80, 90], ids="sm_{}".format)
def counted(request: pytest.FixtureRequest) -> Row:
    """What COUNT finds, in a process where kernels are compiled and not interpreted."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(request.param)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout), arch=request.param)


@needs_triton
def test_small_calls_reach_every_launch_config(counted: Row) -> None:
    assert counted["configs"] > 500
    assert not counted["missing"]
    assert counted["calls"] < counted["configs"]
    assert {"triton", "cublas"} <= set(counted["impls"])
    both = counted["arch"] == 90 and counted["gluon"]
    assert counted["sharers"] == (["SHARERS=1", "SHARERS=2"] if both else [])


@needs_triton
def test_small_calls_are_small(counted: Row) -> None:
    gflop, elements = sorted(counted["gflop"]), sum(counted["elements"])
    print(f"{counted['calls']} calls reach {counted['configs']} configs: {sum(gflop):.0f} GFLOP, "
          f"{elements / 1e6:.0f} million elements")  # fmt: skip
    # Two of attention's, whose blocks the number of tokens decides, take more.
    assert gflop[-3] < 2.2
    assert gflop[-1] < 5
    assert sum(gflop) < 80
    assert elements < 400e6


@needs_triton
def test_small_calls_are_what_they_say(counted: Row) -> None:
    labels: list[str] = counted["labels"]
    assert len(set(labels)) == len(labels)
    assert not counted["unlike"]


TUNED = """
import json
import sys
from dataclasses import asdict
from benchmarks import _offline
from benchmarks.tune import places
from vitkern.kernels import REGISTRY, _tuned

card, entries, keys = ((9, 0), 132), {}, set()
found = places.of_steps([REGISTRY[name] for name in sys.argv[2:]], places.STAGES[0], *card)
for place in (place for place in found if place.impl == "triton"):
    for question, _ in places.looked_at(place, *card, {}):
        default, key = question.default, question.key
        other = [config for config in question.candidates() if config != default][-1]
        for asked, launches in places.looked_at(place, *card, {key: other}):
            if asked.key == key:
                keys |= {_offline.make_job(place.case(), each, 90).config_key for each in launches}
        entries[key] = {
            "kernel": key[0], "bucket": key[1], "dtype": str(key[2]).removeprefix("torch."),
            "config": asdict(other), "default": asdict(default),
        }
table = {"schema": _tuned.SCHEMA, "entries": [], "verified": {}, "configs": [*entries.values()]}
json.dump(table, open(sys.argv[1], "w"))
print(json.dumps(sorted(keys)))
"""


@needs_triton
def test_configs_of_a_table_are_looked_at(tmp_path: Path, capsys: Any) -> None:
    ops, table, plan = ["layer_norm", "linear_residual"], tmp_path / "t.json", tmp_path / "plan"
    done = subprocess.run(
        [sys.executable, "-c", TUNED, str(table), *ops],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = set(json.loads(done.stdout))
    rows = sanitizer.make_plan("cpu", ops, plan, table)
    default, reached = (
        {key for row in rows if bool(row.get("tuned")) == tuned for key in row.get("keys", ())}
        for tuned in (False, True)
    )
    assert expected - default
    assert expected <= default | reached
    calls = [row for row in rows if "control" not in row]
    names = {(row["op"], row["impl"], row["label"], row["dtype"]) for row in calls}
    assert len(names) == len(calls)
    # And such a call can be made.
    number = next(n for n, row in enumerate(rows) if "norm.forward" in row.get("tuned", ()))
    assert "norm.forward tuned to" in rows[number]["label"]
    if INTERPRET:
        assert sanitizer.child(plan, [number], "cpu") == 0
        assert "raised" not in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="--table: expected a table of measured configs"):
        sanitizer.make_plan("cpu", ops, plan, tmp_path / "absent.json")


OURS = {"norm_forward_kernel", "forward_kernel", "column_sum_kernel"}


def parsed(text: str) -> Stream:
    stream = Stream(OURS)
    for line in text.splitlines():
        stream.feed(line, 7)
    return stream


@pytest.mark.parametrize(
    ("text", "kernel", "warning"),
    [
        (
            """\
========= Invalid __global__ read of size 16 bytes
=========     at norm_forward_kernel+0xec0 in _norm.py:43
=========     by thread (18,0,0) in block (0,0,0)
=========     Access to 0x74505bcccca0 is out of bounds
=========     and is 161 bytes after the nearest allocation at 0x74505bccc800 of size 1,024 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch [0x16a3] in __triton_launcher.cpython-312-x86_64-linux-gnu.so
=========""",
            "norm_forward_kernel",
            False,
        ),
        (  # inlined: the kernel stands behind "Device Frame"
            """\
========= Invalid __shared__ read of size 4 bytes
=========     at _sum_combine+0x1f0 in standard.py:263
=========     by thread (0,0,0) in block (3,0,0)
=========     Device Frame: reduce_rows+0x1f0 in _reduce.py:12
=========     Device Frame: column_sum_kernel+0x1f0 in _reduce.py:30""",
            "column_sum_kernel",
            False,
        ),
        (  # no frames: a Triton function of unknown kernel is not foreign
            """\
========= Invalid __shared__ read of size 4 bytes
=========     at _sum_combine+0x1f0 in standard.py:263
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: call at launch+0x16a3 in launcher.c:12""",
            None,
            False,
        ),
        (
            """\
========= Error: Race reported between Write access at forward_kernel+0x150 in forward.py:27
=========     and Read access at forward_kernel+0x160 in forward.py:30 [4194304 hazards]
=========""",
            "forward_kernel",
            False,
        ),
        (
            """\
========= Warning: Race reported between Read access at forward_kernel+0x570 in forward.py:4
=========     and Write access at forward_kernel+0x5a0 in forward.py:9 [8 hazards]""",
            "forward_kernel",
            True,
        ),
        (
            """\
========= Barrier error detected. Divergent thread(s) in warp
=========     at forward_kernel+0x1a0 in forward.py:8
=========     by thread (16,0,0) in block (0,0,0)
=========     Barrier is located at shared address 0x10""",
            "forward_kernel",
            False,
        ),
        (  # as versions up to 2022 write it
            """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x150 in /root/kernels/forward.py:223:forward_kernel
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7fc406200400""",
            "forward_kernel",
            False,
        ),
        (ATEN := """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<(int)512, (int)1, at::native::ReduceOp<float>>(T3)\
+0x3f0 in Reduce.cuh:232
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f2d0a000200""", FOREIGN, False),
        (
            """\
========= Invalid __global__ read of size 16 bytes
=========     at sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas+0x3f0""",
            FOREIGN,
            False,
        ),
    ],
)  # fmt: skip
def test_a_report_is_read(text: str, kernel: str | None, warning: bool) -> None:
    stream = parsed(
        f"========= COMPUTE-SANITIZER\n@@ 7 start\n{text}\n========= ERROR SUMMARY: 1 error"
    )
    (report,) = stream.reports
    assert isinstance(report, Report)
    assert (report.kernel, report.warning, report.call) == (kernel, warning, 7)
    assert stream.summary == 1
    assert text.splitlines()[1].split()[-1] in report.text


def test_what_is_no_report() -> None:
    stream = parsed(
        "========= COMPUTE-SANITIZER\nsome warning of PyTorch\n"
        "=========     Tracking kernels launched by child processes requires it\n"
        "========= 23 errors were not printed. Use --print-limit option to adjust it\n"
        "========= LEAK SUMMARY: 0 bytes leaked in 0 allocations\n"
        "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    )
    assert not stream.reports
    assert not stream.unfit
    assert stream.summary == 2
    assert list(stream.tail) == ["some warning of PyTorch"]


# The tool's stand-in: what it says before, at a call whose name has the given words, and behind.
STAND_IN = r"""
import json, os, re, subprocess, sys, time

behaviour = json.load(open(os.environ["STAND_IN"]))
tool = sys.argv[sys.argv.index("--tool") + 1]
program = sys.argv[sys.argv.index(sys.executable):]
calls = [json.loads(line) for line in open(program[program.index("--child") + 1])]
print("========= COMPUTE-SANITIZER", flush=True)
if behaviour.get("terminated"):
    print("========= Error: Target application terminated before first instrumented API call")
    print("========= Error: couldn't find exit code.")
    sys.exit(255)
if behaviour.get("unsupported"):
    print('========= Error: Device not supported. Please refer to the "Supported Devices" '
          "section of the sanitizer documentation", flush=True)
child = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
errors = 0
for line in child.stdout:
    print(line, end="", flush=True)
    started = re.match(r"@@ (\d+) start", line)
    if started:
        call = calls[int(started[1])]
        name = " ".join([tool, call["op"], call["label"], call["dtype"]])
        for words, (what, text) in behaviour.get("at", {}).items():
            if words not in name:
                continue
            if what == "report":
                print(text, flush=True)
                errors += 1
            elif what == "die":
                child.kill()
                sys.exit(139)
            elif what == "hang":
                time.sleep(60)
print("========= ERROR SUMMARY:", behaviour.get("summary", errors), "errors", flush=True)
sys.exit(97 if errors else child.wait())
"""

CONTROLS = {
    "memcheck control": (
        "report",
        """\
========= Invalid __global__ write of size 4 bytes
=========     at copy_fault_kernel+0x90 in faults.py:17
=========     by thread (4,0,0) in block (0,0,0)
=========     Access to 0x7f2d0a000210 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2d0a000200 of size 16 bytes
=========""",
    ),
    "racecheck control": (
        "report",
        """\
========= Error: Race reported between Write access at race_fault_kernel+0xc0 in faults.py:24
=========     and Read access at race_fault_kernel+0xd0 in faults.py:24 [384 hazards]
=========     and Write access at race_fault_kernel+0xc0 in faults.py:24 [96 hazards]
=========""",
    ),
}
WRITE = """\
========= Invalid __global__ write of size 4 bytes
=========     at norm_forward_kernel+0x1a0 in _norm.py:123
=========     by thread (0,0,0) in block (3,0,0)
=========     Access to 0x7f2d0a000200 is out of bounds"""

# In place of the calls' program in most tests, since that takes seconds to start.
PROGRAM = """
import sys
for n in sys.argv[sys.argv.index("--calls") + 1].split(","):
    print("@@", n, "start", flush=True)
    print("@@", n, "done", flush=True)
"""
LABELS = ("first", "second", "third", "fourth", "fifth", "sixth")


class Rehearsal:
    """Runs `main` with the stand-in, and reads what it wrote."""

    processes = 2

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results, self.told = folder / "results.jsonl", folder / "stand-in.json"
        script = folder / "stand_in.py"
        script.write_text(STAND_IN)
        self.command = [sys.executable, str(script)]
        monkeypatch.setenv("STAND_IN", str(self.told))

    def __call__(self, *tools: str, **behaviour: Any) -> int:
        at = {**CONTROLS, **behaviour.pop("at", {})}
        self.told.write_text(json.dumps({"at": at, **behaviour}))
        return main(
            self.results, "cpu", ["layer_norm"], tools or ("memcheck",), processes=self.processes,
            command=self.command,
        )  # fmt: skip

    def rows(self, **wanted: Any) -> list[Row]:
        found = read(self.results).of("sanitizer")
        return [row for row in found if all(row.get(k) == v for k, v in wanted.items())]


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    """With PROGRAM for a child, and six calls of two kernels each."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    call = {"impl": "triton", "dtype": "float32", "source": "abc", "configs": ["WIDTH=8", "N=1"]}
    kernels = ["norm.norm_forward_kernel", "reduce.column_sum_kernel"]
    plan = [{**call, "op": "layer_norm", "label": label, "kernels": kernels} for label in LABELS]
    for tool, kernel in faults.KERNELS.items():
        row = {**call, "control": tool, "op": "control", "label": "a planted fault"}
        plan.append({**row, "kernels": [kernel], "configs": [""]})

    def make_plan(device: str, ops: Any, path: Path, table: Any) -> list[Row]:
        path.write_text("\n".join(map(json.dumps, plan)))
        return plan

    monkeypatch.setattr(watch, "PYTHON", (sys.executable, str(program)))
    monkeypatch.setattr(sanitizer, "make_plan", make_plan)
    return Rehearsal(tmp_path, monkeypatch)


@needs_triton
def test_the_calls_run_under_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan and the program are the true ones, in the interpreter."""
    rehearsal = Rehearsal(tmp_path, monkeypatch)
    rehearsal.processes = 1  # each takes seconds to start
    assert rehearsal("memcheck") == 0, rehearsal.rows(ok=False)
    rows = rehearsal.rows(op="layer_norm")
    assert len(rows) > 20
    assert all(row["ok"] and row["errors"] == 0 and row["seconds"] > 0 for row in rows)
    assert {row["kernel"] for row in rows} == {"norm.norm_forward_kernel"}
    assert {row["tool"] for row in rows} == {"memcheck"}


def test_what_is_right_is_not_done_again(rehearsal: Rehearsal) -> None:
    assert rehearsal("memcheck", "racecheck") == 0
    assert [row["errors"] for row in rehearsal.rows(op="control", ok=True)] == [1, 1]
    assert len(rehearsal.rows(op="layer_norm", ok=True)) == 2 * 2 * len(LABELS)
    assert read(rehearsal.results).about()["device"] == "cpu"  # so that no page counts them
    before = rehearsal.results.read_text()
    assert rehearsal("memcheck", "racecheck") == 0
    assert rehearsal.results.read_text() == before


def test_reports_crashes_and_hangs_cost_their_calls_only(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "CALL", 3.0)
    at = {
        "layer_norm second": ("report", WRITE),
        "layer_norm third": ("report", ATEN),
        "layer_norm fourth": ("die", ""),
        "layer_norm fifth": ("hang", ""),
    }
    assert rehearsal(at=at) == 1
    (wrong,) = rehearsal.rows(sample="second", ok=False)
    assert (wrong["kernel"], wrong["errors"]) == ("norm.norm_forward_kernel", 1)
    assert "norm_forward_kernel+0x1a0 in _norm.py:123" in wrong["what"][0]
    (foreign,) = rehearsal.rows(sample="third", op="PyTorch")
    assert (foreign["ok"], foreign["errors"]) == (True, 1)
    for label, why in (("fourth", "exit code 139"), ("fifth", "no answer in 3 s")):
        (first, second) = rehearsal.rows(sample=label)
        assert first["ok"] is second["ok"] is False
        assert why in first["why"]
    for label in ("first", "third", "sixth"):
        assert len(rehearsal.rows(sample=label, op="layer_norm", ok=True)) == 2
    # What was wrong is tried again, and nothing else.
    assert rehearsal() == 0
    assert len(rehearsal.rows(sample="first")) == 2
    assert len(rehearsal.rows(sample="fourth", ok=True)) == 2


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [({"unsupported": True}, "Device not supported"), ({"terminated": True}, "terminated before")],
)
def test_a_tool_that_cannot_run_proves_nothing(
    behaviour: Row, why: str, rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rehearsal(**behaviour) == 2
    (row,) = rehearsal.rows()
    assert (row["tool"], row["op"], row["ok"]) == ("memcheck", "all", None)
    assert why in row["why"]
    assert capsys.readouterr().err.count(why) == 1


def test_what_a_tool_failed_at_itself_is_not_checked(rehearsal: Rehearsal) -> None:
    text = "========= Internal Sanitizer Error: unable to patch the kernel\n========="
    assert rehearsal(at={"layer_norm third": ("report", text)}) == 2
    assert all(row["ok"] is None for row in rehearsal.rows(sample="third"))
    assert len(rehearsal.rows(op="layer_norm", ok=True)) == 2 * (len(LABELS) - 1)


def test_a_tool_that_sees_nothing_proves_nothing(rehearsal: Rehearsal) -> None:
    assert rehearsal(at={"memcheck control": ("nothing", "")}) == 1
    assert "fault made on purpose" in rehearsal.rows(op="control")[0]["why"]


def test_errors_that_cannot_be_read_count(rehearsal: Rehearsal) -> None:
    assert rehearsal(summary=3) == 1
    assert "3 errors were counted" in rehearsal.rows(op="unattributed")[0]["what"][0]


def test_what_fails_without_a_tool_is_wrong(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = PROGRAM.replace('"done"', '"raised ValueError: no" if n == "2" else "done"')
    (tmp_path / "program.py").write_text(bad)
    assert rehearsal("racecheck", "memcheck") == 1
    for tool, why in (("racecheck", "without a tool, too: "), ("memcheck", "")):
        whys = {row["why"] for row in rehearsal.rows(tool=tool, ok=False)}
        assert whys == {f"{why}ValueError: no"}
    assert {row["sample"] for row in rehearsal.rows(ok=False)} == {"third"}


def test_a_program_that_does_not_start(rehearsal: Rehearsal, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("raise SystemExit('no such module')")
    assert rehearsal("memcheck", "racecheck") == 2
    assert [row["tool"] for row in rehearsal.rows(ok=None)] == ["memcheck", "racecheck"]
    assert all("no such module" in row["why"] for row in rehearsal.rows())


def test_an_end_ahead_of_time_ends_all_processes(rehearsal: Rehearsal, tmp_path: Path) -> None:
    """Also those that a tool has started in a session of their own."""
    note = tmp_path / "pid"
    (tmp_path / "program.py").write_text(
        f"import os, time\nnote = {str(note)!r}\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    open(note, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "while not (os.path.exists(note) and open(note).read()):\n"
        "    time.sleep(0.01)\n"
        "print('@@ 0 start\\n@@ 0 done\\n@@ 1 start\\n@@ 1 done\\n@@ 2 start', flush=True)\n"
        "os.wait()\n"
    )
    calls: list[Row] = [{"kernels": []} for _ in range(3)]
    runner = watch.Runner(calls, tmp_path, "cpu", [], time.monotonic() + 60)
    outcomes = runner.run([(watch.PLAIN, [0, 1, 2])], 1)
    assert next(outcomes).ok
    outcomes.close()
    state = Path("/proc", note.read_text(), "stat")
    # A container's first process may leave it unburied.
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_out_of_time(rehearsal: Rehearsal) -> None:
    rehearsal.told.write_text("{}")
    assert main(rehearsal.results, "cpu", minutes=0.0, command=rehearsal.command) == 2
    assert {row["why"] for row in rehearsal.rows(ok=None)} == {"out of time"}


def test_without_a_gpu_or_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(tmp_path / "r.jsonl") == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitizer, "find_tool", lambda: None)
    assert main(tmp_path / "r.jsonl") == 2
    assert "no compute-sanitizer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--tool: expected some of memcheck"):
        main(tmp_path / "r.jsonl", tools=["leakcheck"])
