"""Compiles the stand-in for the installed torch_npu: needs g++ and binutils, no headers of CANN.

    build/KEY/libascendcl.so    cann/*.cpp, and a function that returns 0 for every other symbol of CANN
    build/KEY/libhccl.so ...    empty: they only have to be there
    build/KEY/libkernels.so     kernels.cpp

KEY is a hash of the sources and of torch_npu's version, so a build is made once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# What torch_npu's libraries ask the loader for, besides libascendcl.
EMPTY = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
CANN_PREFIXES = ("acl", "rt", "Msprof", "Hccl", "ge")


def missing() -> str | None:
    """Why the stand-in cannot be built here, None if it can."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed: `make test-npu` makes an environment with it"
    absent = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not found: install a C++ compiler and binutils" if absent else None


def build() -> Path:
    """The folder with the libraries, built now if it is not there."""
    version = f"{importlib.metadata.version('torch_npu')} {importlib.metadata.version('torch')}"
    sources = [*sorted((HERE / "cann").glob("*.cpp")), HERE / "kernels.cpp", Path(__file__)]
    key = hashlib.sha256(b"".join([version.encode(), *(path.read_bytes() for path in sources)])).hexdigest()[:12]
    folder = HERE / "build" / key
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        _compile(unfinished)
        with contextlib.suppress(OSError):  # another process was faster
            unfinished.rename(folder)
    return folder


def _compile(folder: Path) -> None:
    kernels = subprocess.Popen(_kernels_command(folder))  # the slow one, beside the others
    cann = folder / "libascendcl.so"
    objects = [_object(source, folder) for source in sorted((HERE / "cann").glob("*.cpp"))]
    stubs = folder / "stubs.cpp"
    names = sorted(_wanted() - _defined_elsewhere() - {name for path in objects for name, _ in _symbols(path)})
    stubs.write_text("".join(f'extern "C" long {name}() {{ return 0; }}\n' for name in names))
    _run("g++", "-shared", "-fPIC", *map(str, [*objects, stubs]), "-o", str(cann), "-Wl,-soname,libascendcl.so")
    nothing = folder / "nothing.cpp"
    nothing.touch()
    for name in EMPTY:
        library = str(folder / f"lib{name}.so")
        links = ("-Wl,--no-as-needed", f"-L{folder}", "-lascendcl", "-Wl,-rpath,$ORIGIN")
        _run("g++", "-shared", str(nothing), "-o", library, f"-Wl,-soname,lib{name}.so", *links)
    if kernels.wait() != 0:
        raise RuntimeError("kernels.cpp does not compile, see above")


def _kernels_command(folder: Path) -> list[str]:
    torch = _package("torch")
    includes = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    links = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
    source, target = str(HERE / "kernels.cpp"), str(folder / "libkernels.so")
    return ["g++", "-O1", "-fPIC", "-std=c++20", "-shared", "-w", *includes, source, "-o", target, *links]


def _object(source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    _run("g++", "-O2", "-fPIC", "-std=c++17", "-fvisibility=hidden", "-c", str(source), "-o", str(target))
    return target


def _wanted() -> set[str]:
    """Symbols of CANN that torch_npu is linked against."""
    lib = _package("torch_npu") / "lib"
    users = [lib / f"lib{name}.so" for name in ("torch_npu", "npu_profiler", "tensorpipe")]
    users += (_package("torch_npu")).glob("_C*.so")
    found = {name for path in users for name, kind in _symbols(path, "-D") if kind == "U"}
    return {name for name in found if name.startswith(CANN_PREFIXES)}


def _defined_elsewhere() -> set[str]:
    libraries = [*(_package("torch") / "lib").glob("libtorch*.so"), *(_package("torch_npu") / "lib").glob("*.so")]
    return {name for path in libraries for name, kind in _symbols(path, "-D") if kind not in "Uw"}


def _symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(name, kind) as nm has them."""
    lines = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [(line.split()[-1].partition("@")[0], line.split()[-2]) for line in lines if len(line.split()) > 1]


def _package(name: str) -> Path:
    """Where a package lies; does not import it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
