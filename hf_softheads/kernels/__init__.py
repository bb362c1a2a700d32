"""Optional C++ kernels, built on first use by `torch.utils.cpp_extension` and kept in the user's cache.

Nothing here is needed: without a compiler everything works, slower, and `describe` says why. A kernel is a file of
plain C functions, called through ctypes (no torch headers: two seconds to build instead of forty); it is checked
against the plain definition by the tests, for every instruction set it has a path for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_softheads.compiling import constant

_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-pthread")
_LARGE = 2**22  # bytes
STATES = 64  # hidden states that a kernel takes at once: what it makes of more would not stay in the caches
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "native": ("-march=native",),
    "vnni": ("-march=cascadelake",),
    "avx2": ("-march=x86-64-v3",),
    "plain": (),
}
"""Compiler flags by instruction set: `native` is what this processor has, the others are smaller sets."""


class KernelUnavailable(RuntimeError):
    """A kernel could not be built here, or does not fit what it was asked for; the message says why."""


def cache_folder() -> Path:
    """Where compiled kernels are kept; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_softheads"


@functools.cache
def load(name: str, instructions: str = "native") -> ctypes.CDLL:
    """The compiled `cpp/name.cpp`.

    Raises:
        KernelUnavailable: there is no C++ compiler or no ninja, or the compiler failed.
    """
    source = Path(__file__).parent / "cpp" / f"{name}.cpp"
    flags = [*_FLAGS, *INSTRUCTIONS[instructions]]
    identity = repr((flags, os.environ.get("CXX"), torch.__version__, _processor())).encode()
    code = b"".join(file.read_bytes() for file in [source, *sorted(source.parent.glob("*.hpp"))])
    digest = hashlib.sha256(code + identity).hexdigest()[:16]
    target = cache_folder() / f"{name}-{digest}.so"
    compiler = os.environ.get("CXX", "c++")
    if not target.exists() and shutil.which(compiler) is None:
        raise KernelUnavailable(f"no C++ compiler ({compiler}; the variable CXX names another)")
    try:
        if not target.exists():
            _build(source, flags, target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines()]  # mostly command lines
        told = next((line for line in lines if "error:" in line), lines[0])
        if isinstance(error, ModuleNotFoundError):
            told = f"{error.name} is not installed; run `pip install {error.name}`"
        raise KernelUnavailable(f"could not build {source.name}: {told[:300]}") from error


def _build(source: Path, flags: list[str], target: Path) -> None:
    # In a folder of its own: cpp_extension's lock would outlive a process that is killed while it builds, and every
    # later one would wait for it. Another process may build the same file meanwhile; either is right.
    from torch.utils import cpp_extension

    target.parent.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("PATH", "")
    # ninja may be installed beside a Python whose environment is not activated
    os.environ["PATH"] = os.pathsep.join([path, sysconfig.get_path("scripts")])
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            cpp_extension.load(
                source.stem,
                [str(source)],
                extra_cflags=flags,
                build_directory=folder,
                is_python_module=False,
            )
            next(Path(folder).glob("*.so")).replace(target)
    finally:
        os.environ["PATH"] = path


def in_large_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty(shape)` in pages of 2 MiB where Linux grants them: they are there sooner, their addresses known."""
    size = math.prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < _LARGE:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


Argument = Tensor | int | float | Sequence["Argument"]


def call(function: Any, *arguments: Argument) -> None:
    """A function of a kernel: tensors become pointers, integers `int64_t`, numbers `float`, sequences arrays of these.

    The number of threads is added as its last argument.
    """
    function(*map(_as_c, arguments), ctypes.c_int64(torch.get_num_threads()))


def _as_c(argument: Argument) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    items = [_as_c(item) for item in argument]
    return (type(items[0]) * len(items))(*items)


class Kernel(NamedTuple):
    """What `select` found.

    Attributes:
        library: the compiled functions; None where there are none.
        reason: why there are none; None where there are.
    """

    library: ctypes.CDLL | None
    reason: str | None

    @property
    def instructions(self) -> str:
        """The instruction set that its functions use, such as `AVX-512`."""
        if self.library is None:
            raise KernelUnavailable(str(self.reason))
        function = self.library.instructions
        function.restype = ctypes.c_char_p
        found: bytes = function()
        return found.decode()


def select(name: str) -> Kernel:
    """The kernel for this machine, built if need be, or the reason why there is none."""
    try:
        return Kernel(load(name), None)
    except KernelUnavailable as error:
        return Kernel(None, str(error))


@constant
def instructions(name: str) -> str:
    """The instruction set of the kernel that `select` finds, `none` without one. A constant for torch.compile."""
    kernel = select(name)
    return "none" if kernel.library is None else kernel.instructions


@constant
def why_not(name: str) -> str | None:
    """The reason why `select` finds no kernel; None if it does. A constant for torch.compile."""
    return select(name).reason


def _processor() -> str:
    """Something that differs where `-march=native` does, so that a shared home directory is safe."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "".join(
        sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})
    )
