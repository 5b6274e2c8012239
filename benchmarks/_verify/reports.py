"""What compute-sanitizer prints, read: reports, by kernel, and what the tool says of itself.

A report starts with a line behind "========= " and goes on with indented ones:

    ========= Invalid __global__ write of size 4 bytes
    =========     at forward_kernel+0x1a0 in layer_norm.py:123
    =========     by thread (0,0,0) in block (0,0,0)

A device function that the compiler inlined stands in the place of the kernel, whose own line
("Device Frame: ") follows; racecheck names kernels in the first line, too. The strings are those in
the program of version 2025.3.
"""

import re
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

PREFIX = "========="
FOREIGN = "foreign"

# No reports: what stands around them.
AROUND = re.compile(
    r"COMPUTE-SANITIZER|(?:LEAK|OPTIX) SUMMARY|Tracking kernels launched|Target application "
    r"|\d+ errors were (?:not printed|skipped)|couldn't find exit code|Saved host backtrace"
)
SUMMARY = re.compile(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+)")
# The tool can't do its work, whatever the program does.
UNFIT = re.compile(
    r"Device not supported|unsupported driver version|[Uu]nable to initialize|Failed to initialize"
    r"|Could not connect|No attachable process|Unable to add \w+ patches"
    r"|Unable to find injection|Failed to launch target"
)
# The tool failed on one kernel.
INTERNAL = re.compile(r"Internal Sanitizer|Internal error encountered|Error in printing record")
NAME = r"((?:void |int |float )?[A-Za-z_][\w:<>~]*)"
SYMBOL = re.compile(
    rf"(?:\bat |Device Frame: ?)(?:{NAME}(?=.*\+0x[0-9a-f]|.* in \S+:\d)"
    rf"|0x[0-9a-f]+ in \S+:\d+:{NAME})"  # versions up to 2022
)


@dataclass
class Report:
    """One report. kernel: of ours its name, FOREIGN for another's, None if it names none.

    call: which call it belongs to, where one was under way.
    """

    lines: list[str]
    call: int | None
    kernel: str | None = None
    warning: bool = False
    internal: bool = False

    @property
    def text(self) -> str:
        """Its first lines, in one."""
        return " | ".join(line.strip() for line in self.lines[:3] if line.strip())[:300]


@dataclass
class Stream:
    """The output of one process, fed line by line.

    ours: names of our kernels' functions. unfit: why the tool can't run here. summary: how many
    errors or hazards the tool counted, if it came to say so. tail: the last lines of the program.
    """

    ours: Collection[str]
    reports: list[Report] = field(default_factory=list)
    unfit: str = ""
    summary: int | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=5))

    def feed(self, line: str, call: int | None) -> None:
        """Take one line, which came while `call` was under way."""
        if not line.startswith(PREFIX):
            if line.strip() and not line.startswith("@@"):
                self.tail.append(line.strip())
            return
        text = line[len(PREFIX) :].rstrip()
        if not text.strip():
            return
        if re.match(r"\s{2,}|\s+and ", text):  # goes on
            if self.reports and SUMMARY.search(text) is None:
                self._add(self.reports[-1], text)
            return
        text = text.strip()
        if found := SUMMARY.search(text):
            self.summary = (self.summary or 0) + int(found[1])
        elif UNFIT.search(text):
            self.unfit = self.unfit or text
        elif AROUND.search(text):
            if "Error" in text:
                self.tail.append(text)
        else:
            report = Report([], call, internal=bool(INTERNAL.search(text)))
            report.warning = text.startswith(("Warning", "WARN"))
            self.reports.append(report)
            self._add(report, text)

    def _add(self, report: Report, text: str) -> None:
        if len(report.lines) < 12:
            report.lines.append(text)
        for now, before in SYMBOL.findall("" if "Host Frame" in text else text):
            name = (now or before).lstrip("_")
            if name in self.ours:
                report.kernel = name
            elif report.kernel is None and not re.search(r"\.(?:py|ttgir):", text):
                # Of a Triton kernel's file it may be a function of the kernel's.
                report.kernel = FOREIGN
