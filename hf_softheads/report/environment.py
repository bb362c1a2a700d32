"""What a report of a fault needs to say about the machine: versions, processor, kernels, GPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from hf_softheads import kernels
from hf_softheads.files import human_bytes
from hf_softheads.kernels.onednn import why_no_int8
from hf_softheads.report.provenance import provenance
from hf_softheads.report.tables import Table
from hf_softheads.version import __version__

# by the name that people know, those of `/proc/cpuinfo` that all have to be there
_FEATURES = {
    "AVX2": ("avx2", "fma"),
    "AVX-512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "VNNI": ("avx512_vnni",),
    "AVX-VNNI": ("avx_vnni",),
    "bf16": ("avx512_bf16",),
    "AMX bf16": ("amx_tile", "amx_bf16"),
    "AMX int8": ("amx_tile", "amx_int8"),
    "NEON": ("asimd",),
    "SVE": ("sve",),
}
_VARIABLES = ("CXX", "XDG_CACHE_HOME", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE")


def environment() -> dict[str, Any]:
    """Everything that results and speed depend on. Kernels that this machine has not built yet are built."""
    origin = provenance()
    versions = origin["versions"]
    if versions["hf_softheads"] is None:  # run from its source, not installed
        versions["hf_softheads"] = __version__
    return {
        "versions": versions,
        "commit": origin["commit"],
        "system": platform.platform(),
        "processor": {
            "name": origin["machine"]["cpu"],
            "architecture": platform.machine(),
            "features": features(),
            "torch uses": torch.backends.cpu.get_cpu_capability(),
            "cores": origin["machine"]["cores"],
            "threads": torch.get_num_threads(),
        },
        "kernels": {name: _kernel(name) for name in _kernel_names()} | {"int8 of oneDNN": _int8()},
        "compiler": _compiler(),
        "cache": _cache(),
        "gpus": _gpus(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def environment_table(found: dict[str, Any]) -> Table:
    """`environment` for people."""
    table = Table(["", "found"])
    for name, version in found["versions"].items():
        table.add(name, version or "not installed")
    processor, cache, compiler = found["processor"], found["cache"], found["compiler"]
    table.add("system", found["system"])
    table.add("processor", f"{processor['name']} ({processor['architecture']})")
    table.add("features", ", ".join(processor["features"]) or "none that matter here")
    table.add("torch uses", processor["torch uses"])
    table.add("threads", f"{processor['threads']} of {processor['cores']} cores")
    for name, kernel in found["kernels"].items():
        table.add(f"kernel {name}", kernel["instructions"] or f"no: {kernel['reason']}")
    table.add("compiler", compiler["version"] or f"{compiler['command']}: not found")
    table.add(
        "kernel cache", f"{cache['folder']}: {cache['files']} files, {human_bytes(cache['nbytes'])}"
    )
    for gpu in found["gpus"] or [None]:
        table.add("GPU", "none that this torch can use" if gpu is None else _gpu_line(gpu))
    for name, value in found["variables"].items():
        table.add(name, value)
    if found["commit"]:
        table.add("commit", found["commit"])
    return table


def features() -> list[str]:
    """Instruction sets of this processor that kernels here or torch's own make use of."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags: set[str] = set()
    for line in lines:
        if line.startswith(("flags", "Features")):
            flags |= set(line.partition(":")[2].split())
    if not flags:  # not Linux; torch asks the processor
        probe = getattr(torch.cpu, "get_capabilities", dict)
        flags = {name.replace("avx512_", "avx512") for name, has in probe().items() if has is True}
        flags |= {f"avx512_{name}" for name in ("vnni", "bf16") if f"avx512{name}" in flags}
        flags |= {"fma"} if "fma3" in flags else set()
    return [name for name, needed in _FEATURES.items() if flags.issuperset(needed)]


def _kernel_names() -> list[str]:
    return sorted(file.stem for file in (Path(kernels.__file__).parent / "cpp").glob("*.cpp"))


def _kernel(name: str) -> dict[str, str | None]:
    kernel = kernels.select(name)
    if kernel.library is None:
        return {"instructions": None, "reason": kernel.reason}
    return {"instructions": kernel.instructions, "reason": None}


def _int8() -> dict[str, str | None]:
    reason = why_no_int8()
    return {"instructions": None if reason else "VNNI", "reason": reason}


def _compiler() -> dict[str, str | None]:
    command = os.environ.get("CXX", "c++")
    version = None
    if shutil.which(command):
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
        version = next(iter(done.stdout.splitlines()), None)
    return {"command": command, "version": version}


def _cache() -> dict[str, Any]:
    folder = kernels.cache_folder()
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        "folder": str(folder),
        "files": len(files),
        "nbytes": sum(file.stat().st_size for file in files),
    }


def _gpus() -> list[dict[str, Any]]:
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "nbytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "runtime": runtime,
            }
        )
    for name in ("xpu", "mps"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            found.append({"name": name, "nbytes": None, "capability": None, "runtime": name})
    return found


def _gpu_line(gpu: dict[str, Any]) -> str:
    if gpu["nbytes"] is None:
        return str(gpu["name"])
    return f"{gpu['name']}, {human_bytes(gpu['nbytes'])}, capability {gpu['capability']}, {gpu['runtime']}"
