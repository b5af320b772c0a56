"""Compile kernel source text to a loaded shared library, with torch's `load_inline` made safe and cached on disk.

    Build("chain", source, host=False, arch=(9, 0)).load()  ->  ctypes.CDLL

`load_inline` alone hangs forever after a killed build, gives one process the library of another that chose the same
name, discards the compiler's output, and builds no CUDA library beside a CPU-only torch. This module changes that:

- The folder of a library is named by a hash of everything that it depends on, so two different libraries never meet.
- One build of it runs at a time, under a lock that the kernel releases when the holder dies.
- A build runs in a folder of its own, and its library is renamed into place when it is complete.
- A library on disk is loaded without a compiler, a subprocess, or `torch.utils.cpp_extension`.

Layout of the cache: `PREFIX_CONTENT_COMPILER/` with the library, `source.cu` or `source.cpp`, `build.log` (registers
and spills of every kernel, or the errors) and `lock`. Any of these folders may be deleted at any time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dualop.build import cache, locks, toolchain
from dualop.build.locks import cached_property
from dualop.errors import BackendUnavailable, BuildError

# Without -fno-gnu-unique the static (shared) storage of one kernel template would be one object in all libraries.
HOST_FLAGS = ("-O2", "-std=c++17", "-ffp-contract=off", "-fPIC", "-fno-gnu-unique")
CUDA_FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v")
# load_inline links against torch, which the kernels do not use: --as-needed drops it, so that no library depends on it.
LINK_FLAGS = ("-Wl,--as-needed", "-Wl,--no-undefined", "-Wl,-Bsymbolic")

# These variables change what a compiler does.
VARIABLES = ("CC", "CXX", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CPATH", "CPLUS_INCLUDE_PATH")

EMPTY_ARCHIVE = b"!<arch>\n"
WRAPPERS = ("ccache", "sccache")

# g++ "f.cpp:3:5: error: ...", nvcc "f.cu(3): error: ...", "nvcc fatal   : ...", "ptxas error   : ...", the linker's,
# and what a shell says of a program that it cannot start: "/bin/sh: 1: g+++: not found".
_ERROR = re.compile(
    r"\b(?:fatal )?error\b[^:=/]{0,12}:|\bfatal\s*:|undefined reference|cannot find -l|No space left"
    r"|^\S*sh: .*(?:not found|No such file|[Pp]ermission denied|Exec format|[Cc]annot execute|bad interpreter)"
)

# Paths that ninja and the shell accept wherever torch inserts them; torch escapes blanks only, and only in some places.
_PLAIN = re.compile(r"[\w./+-]+", re.ASCII)
KEEPER = "dualop-nvcc.sh"

_one_in_this_process = threading.Lock()  # because a build sets environment variables and torch's CUDA_HOME
_undo: list[Callable[[], None]] = []  # functions that restore them


def _in_child() -> None:
    """Unlock in a forked child and undo what a building thread had changed, since the child lacks that thread."""
    global _one_in_this_process
    _one_in_this_process = threading.Lock()
    while _undo:
        _undo.pop()()


locks.in_child(_in_child)


@dataclass(frozen=True)
class Build:
    """Describe a shared library to be built from `source`: CUDA C++ text that includes nothing but system headers.

    `host` compiles it with the C++ compiler instead of nvcc. `arch` is the compute capability to compile for, such as
    (9, 0), None for that of the current GPU; TORCH_CUDA_ARCH_LIST, where set, takes precedence over both. `prefix` only
    makes the folder's name readable.
    """

    prefix: str
    source: str
    host: bool
    arch: tuple[int, int] | None = None

    def try_load(self) -> ctypes.CDLL | None:
        """Return the library if it is in the cache, else None. A library that cannot be loaded also gives None.

        It starts no process and writes nothing. Without a compiler on this machine, the library of any compiler is
        accepted. Raises BackendUnavailable if no architecture is known to compile for.
        """
        if None not in self._compilers():
            return _opened(self.library)
        try:
            others = sorted(cache.folder().glob(f"{self.prefix}_{self._content}_*/*.so"))
        except OSError:  # the folder may not be readable
            return None
        return next((library for library in map(_opened, others) if library), None)

    def build(self) -> Path:
        """Return the path of the library; compile it, or wait for another process that is compiling it.

        Raises BackendUnavailable if a tool or an architecture is missing or the cache cannot be written, and
        BuildError, with the first error line and the log, if the compiler fails.
        """
        missing = toolchain.missing_tools(self.host)
        if missing:
            raise BackendUnavailable("kernels cannot be compiled here: " + "; ".join(missing))
        with ExitStack() as held:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locks.file(self.folder / "lock"))
            except OSError as error:
                raise cache.unwritable(error) from error
            if _opened(self.library) is None:
                self._compile()
        return self.library

    def load(self) -> ctypes.CDLL:
        """Return the library, from the cache or newly built. Raises what `build` raises."""
        library = self.try_load()
        if library is None:
            library = ctypes.CDLL(str(self.build()))
        return library

    @cached_property
    def name(self) -> str:
        """Return the name of the library and its folder. Raises BackendUnavailable if no architecture is known."""
        stamps = "\n".join(map(_stamp, self._compilers()))
        return f"{self.prefix}_{self._content}_{_digest(stamps)[:8]}"

    @property
    def folder(self) -> Path:
        return cache.folder() / self.name

    @property
    def library(self) -> Path:
        return self.folder / f"{self.name}.so"

    @property
    def log(self) -> Path:
        """Return what the compiler printed when the library was built, or why it was not built."""
        return self.folder / "build.log"

    @cached_property
    def _content(self) -> str:
        import torch

        about_torch = (torch.__version__, torch.version.cuda)
        variables = tuple(os.environ.get(name) for name in VARIABLES)
        flags = (self.host, HOST_FLAGS, CUDA_FLAGS, LINK_FLAGS, self._architecture)
        return _digest(repr((self.source, flags, about_torch, variables)))[:16]

    @cached_property
    def _architecture(self) -> str:
        """Return the text of TORCH_CUDA_ARCH_LIST, or flags of nvcc; "" on the host."""
        if self.host:
            return ""
        listed = _arch_list()
        if listed:
            return listed
        capability = self.arch
        if capability is None:
            import torch

            if not torch.cuda.is_available():
                raise BackendUnavailable(
                    "no GPU whose architecture could be compiled for: set TORCH_CUDA_ARCH_LIST, for instance to 9.0"
                )
            capability = torch.cuda.get_device_capability()
        number = "{}{}".format(*capability)
        return f"-gencode=arch=compute_{number},code=sm_{number}"

    def _compilers(self) -> tuple[Path | None, ...]:
        cxx = toolchain.find_cxx()
        return (cxx,) if self.host else (toolchain.find_nvcc(), cxx)

    def _compile(self) -> None:
        """Compile in a new folder, because children of an earlier, killed build may still write into the old one."""
        try:
            for stale in self.folder.glob("build-*"):
                shutil.rmtree(stale, ignore_errors=True)
            source = self.folder / ("source.cpp" if self.host else "source.cu")
            source.write_text(self.source, "utf-8")
            work = staging = Path(tempfile.mkdtemp(prefix="build-", dir=self.folder))
        except OSError as error:
            raise cache.unwritable(error) from error
        output, problem, failure = "", "", None
        try:
            work = _plain_folder(staging)
            built = self._made(work)
            if work != staging:
                built = Path(shutil.copy(built, staging))
            with built.open("rb") as file:
                os.fsync(file.fileno())  # so that no crash of the machine leaves half a library under its final name
            os.replace(built, self.library)
        except Exception as error:  # load_inline raises anything from ValueError to CalledProcessError
            problem, failure = toolchain.cxx_problem(), error
            if isinstance(error, UnicodeError):
                problem = f"error: a path is not in the encoding of the locale ({error}): set PYTHONUTF8=1\n"
            output = f"{problem}{error}\n"
        finally:
            with suppress(OSError):
                output = output or (work / "nvcc.log").read_text("utf-8", "replace")
            for folder in (work, staging):
                shutil.rmtree(folder, ignore_errors=True)
        for temporary in (work / "main.cpp", work / "cuda.cu"):
            output = output.replace(str(temporary), str(source))
        with suppress(OSError):  # a full disk must not hide the error
            self.log.write_text(output, "utf-8", "surrogateescape")
        if os.environ.get("DUALOP_VERBOSE", "") not in ("", "0"):
            print(f"{self.log}:\n{output}", file=sys.stderr)
        if failure is not None:
            first = first_error(problem or output)
            raise BuildError(f"{first}\n(compiling {source}; the whole log: {self.log})", self.log, first) from failure

    def _made(self, work: Path) -> Path:
        """Compile the source in `work` and return the library. Every exception becomes a BuildError."""
        named = self._architecture.startswith("-")  # a flag names it, else torch reads TORCH_CUDA_ARCH_LIST
        arch_flags, arch_list = ([self._architecture], "") if named else ([], self._architecture)
        # torch writes the text in the encoding of the locale. Beyond ASCII there are comments only.
        source = self.source.encode("ascii", "backslashreplace").decode()
        cuda = None if self.host else toolchain.cuda_home()
        with _one_in_this_process, _prepared(work, cuda, arch_list) as link_flags:
            from torch.utils.cpp_extension import load_inline

            load_inline(
                self.name,
                cpp_sources=[source] if self.host else [""],
                cuda_sources=None if self.host else [source],
                extra_cflags=list(HOST_FLAGS),
                extra_cuda_cflags=[*CUDA_FLAGS, *arch_flags],
                extra_ldflags=[*LINK_FLAGS, *link_flags],
                build_directory=str(work),
                no_implicit_headers=True,
                is_python_module=False,
            )
        # Do not look it up by name: load_inline appends a version when one process builds the same name twice.
        return next(work.glob("*.so"))


@contextmanager
def _prepared(work: Path, cuda: Path | None, arch_list: str = "") -> Iterator[list[str]]:
    """Set up what load_inline needs during one build, and yield the linker's flags. `cuda` is None on the host."""
    with locks.brief:
        from torch.utils import cpp_extension

    # An environment that is not activated has its ninja beside its Python and not on PATH.
    changes = {"PATH": os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))}
    compiler = toolchain.cxx_command()
    if compiler != [os.environ.get("CXX", "c++")] or not _PLAIN.fullmatch(compiler[0]):
        # Torch 2.13 reads CXX as one word, torch 2.11 as the text of a command: a script suits both.
        script = work / "c++"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@"\n', "utf-8", "surrogateescape")
        script.chmod(0o755)
        changes["CXX"] = str(script)
        if Path(compiler[0]).name in WRAPPERS:
            changes["TORCH_NO_COMPILER_WRAPPER"] = "1"  # torch 2.13 would put a second one in front
    if arch_list:
        changes["TORCH_CUDA_ARCH_LIST"] = arch_list
    link_flags, cuda_before = [], cpp_extension.CUDA_HOME
    if cuda:
        nvcc = os.environ.get("PYTORCH_NVCC", "")
        if not nvcc or KEEPER in nvcc:  # the latter is from a process that was building when it started this one
            nvcc = shlex.quote(str(cuda / "bin" / "nvcc"))
        keeper = work / KEEPER  # load_inline discards the output of a successful compiler
        wrapped = f'{nvcc} "$@" >nvcc.log 2>&1\nstatus=$?\ncat nvcc.log\nexit $status\n'
        keeper.write_text(wrapped, "utf-8", "surrogateescape")
        changes["PYTORCH_NVCC"] = f"sh {keeper}"
        for name in ("c10_cuda", "torch_cuda"):  # load_inline links against them, and a CPU-only torch has none
            (work / f"lib{name}.a").write_bytes(EMPTY_ARCHIVE)
        # The folder of the CUDA runtime, for when torch has not loaded the same one already.
        runtime = [folder for folder in (cuda / "lib64", cuda / "lib") if folder.is_dir()][:1]
        link_flags = [shlex.quote(flag) for flag in (f"-L{work}", *(f"-Wl,-rpath,{folder}" for folder in runtime))]
    before = {name: os.environ.get(name) for name in changes}

    def undo() -> None:
        cpp_extension.CUDA_HOME = cuda_before
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    _undo.append(undo)
    try:
        if cuda:
            cpp_extension.CUDA_HOME = str(cuda)
        os.environ.update(changes)
        yield link_flags
    finally:
        undo()
        _undo.clear()


def _plain_folder(staging: Path) -> Path:
    """Return the folder if ninja and every shell accept its path, else a new temporary one that they accept."""
    if _PLAIN.fullmatch(str(staging)):
        return staging
    above = [tempfile.gettempdir(), "/tmp", "/var/tmp"]
    for folder in (text for text in above if _PLAIN.fullmatch(text) and os.access(text, os.W_OK | os.X_OK)):
        return Path(tempfile.mkdtemp(prefix="dualop-build-", dir=folder))
    raise RuntimeError(
        f"error: ninja takes no path with other characters than ASCII letters, digits and ./_+-, as {staging} has, and "
        f"none of {', '.join(above)} is a writable folder without: set DUALOP_CACHE_DIR or TMPDIR to one"
    )


def _arch_list() -> str:
    """Return TORCH_CUDA_ARCH_LIST without blanks and empty items, which torch takes for names; "" if none is left."""
    items = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    return "" if items == ["native"] else ";".join(items)


def first_error(log: str) -> str:
    """Return the first line of a compiler's output that mentions an error, else its last line that is not empty."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "no output")


def _opened(library: Path) -> ctypes.CDLL | None:
    if not os.path.isfile(library):  # dlopen would find one that this process loaded before it was deleted
        return None
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        return None


def _stamp(compiler: Path | None) -> str:
    """Return what changes when a compiler is replaced. Asking for its version would start a process every time."""
    if compiler is None:
        return "none"
    real = compiler.resolve()
    status = real.stat()
    return f"{real} {status.st_size} {status.st_mtime_ns}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
