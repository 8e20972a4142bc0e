"""What this machine's processor is: its name, and what tells whether another one computes as it does.

Read by the runtime for its results, and where a copy of a model is made, judged and chosen for a processor.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

#: How the flags begin that decide which instructions OpenVINO uses, on x86-64 and on ARM. Others come and go with the
#: kernel.
_FLAGS = ("amx", "avx", "fma", "f16c", "sse4", "asimd", "bf16", "fphp", "i8mm", "sve", "sme")


def cpu_name() -> str:
    """Return the name of the processor, "unknown" where the system does not provide it."""
    return proc_field(Path("/proc/cpuinfo"), "model name") or "unknown"


@functools.cache
def processor_id(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return what identifies a kind of processor: a digest of its name and of the instructions that it has.

    A virtual machine may hide instructions, so that the name alone does not tell.
    """
    flags = sorted(each for each in _flags(cpuinfo) if each.startswith(_FLAGS))
    facts = [proc_field(cpuinfo, "model name") or "", *flags]
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:16]


def _flags(cpuinfo: Path) -> list[str]:
    return (proc_field(cpuinfo, "flags") or proc_field(cpuinfo, "Features") or "").split()


def proc_field(path: Path, name: str) -> str | None:
    """Return the first value of a field of a file of /proc, None where the system does not have it."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
