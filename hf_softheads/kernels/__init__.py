"""Optional C++ kernels, compiled on first use by the machine's compiler and kept in the user's cache.

Nothing here is needed: every head works without a compiler, slower. A kernel is a plain C function in a file named
after its variant; it is checked against the plain definition by the tests.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")


class KernelUnavailable(RuntimeError):
    """A kernel could not be built here; the message says why."""


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The compiled `name.cpp` of this folder.

    Raises:
        KernelUnavailable: there is no C++ compiler, or it failed.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise KernelUnavailable("no C++ compiler found (c++, g++ or $CXX)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_softheads"
    identity = [source.read_bytes(), repr((compiler, _FLAGS, _processor())).encode()]
    target = cache / f"{name}-{hashlib.sha256(b''.join(identity)).hexdigest()[:16]}.so"
    if not target.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                fresh = Path(folder) / target.name
                command = [compiler, *_FLAGS, str(source), "-o", str(fresh)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
                fresh.replace(
                    target
                )  # another process may have built the same file: either is right
        except subprocess.CalledProcessError as error:
            raise KernelUnavailable(f"{compiler} failed: {error.stderr.strip()[:500]}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelUnavailable(f"could not build {name}: {error}") from error
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise KernelUnavailable(f"could not load {target}: {error}") from error


def why_not(name: str) -> str | None:
    """The reason why a kernel cannot be used here, or None."""
    try:
        load(name)
    except KernelUnavailable as error:
        return str(error)
    return None


def _processor() -> str:
    """Something that differs where `-march=native` does, so that a shared home directory is safe."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "".join(
        sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})
    )
