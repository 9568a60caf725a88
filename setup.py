"""The C++ kernels, a library for each vector set; everything else stands in pyproject.toml.

They are compiled against the torch of the environment that the package is installed into. Without
torch or a compiler, and where a build fails, the package is installed without them. In any case
`custom_ops/kernels/built.json` keeps what was built for which torch, or why nothing was.

Two variables of the environment choose what is compiled:

- CUSTOM_OPS_CPU_CAPABILITY: the vector sets. "all", or some of DEFAULT, AVX2 and AVX512 with commas
  between them. Without it, the one that torch uses on this machine.
- CUSTOM_OPS_SANITIZE=1: with the sanitizers, for `make test-asan`.
"""

import copy
import json
import os
import platform
import sys
import sysconfig
import time
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"custom_ops is built by setuptools 77 or newer, and this is {setuptools.__version__}: "
        "leave --no-build-isolation out, or run pip install 'setuptools>=77' first"
    )

SOURCES = Path("custom_ops/kernels/cpu")
NODE = Path("custom_ops/node")
RECORD = Path("custom_ops/kernels/built.json")
SOABI = sysconfig.get_config_var("SOABI")
# The flags with which torch compiles its own kernels for each vector set.
FLAGS = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    FLAGS["AVX512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"]
OPTIMISED = ["-O3", "-g0"]
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def library_name(capability):
    """Return the name that custom_ops.kernels.built looks for."""
    return f"_cpu_{capability.lower()}"


def library(capability):
    """Return the module for a vector set; what it needs of torch is added when it is built."""
    name = library_name(capability)
    mode = SANITIZED if os.environ.get("CUSTOM_OPS_SANITIZE") else OPTIMISED
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return Extension(
        f"custom_ops.kernels.{name}",
        [str(SOURCES / "module.cpp")],
        depends=sorted(str(path) for path in (*SOURCES.glob("*.h"), *NODE.glob("*.h"))),
        libraries=["c10", "torch", "torch_cpu", "torch_python"],
        language="c++",
        extra_compile_args=[
            "-std=c++20",
            *mode,
            "-fno-math-errno",
            # A product and a sum are one operation where fmadd says so. A compiler joins them in
            # whole vectors and not at the end of a loop: a row's bits would depend on its place.
            "-ffp-contract=off",
            "-fvisibility=hidden",
            "-Wno-unknown-pragmas",
            *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # in the compiler's own headers
            f"-DTORCH_EXTENSION_NAME={name}",
            f"-DCPU_CAPABILITY={capability}",
            f"-DCPU_CAPABILITY_{capability}",
            "-DAT_PARALLEL_OPENMP=1",
            *openmp,
            *FLAGS[capability],
        ],
        extra_link_args=[*openmp, *mode],
        optional=True,
    )


def usable_torch():
    """Return torch, or None and the reason.

    A build environment of pip's own does not show it, so that it is looked for where this
    interpreter installs packages.
    """
    if sys.platform == "win32":
        return None, "on Windows nothing is compiled"
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    try:
        import torch
        import torch.utils.cpp_extension
    except ImportError as error:
        return None, f"torch could not be imported when it was installed ({error})"
    return torch, ""


def wanted_capabilities(torch):
    """Return the vector sets to compile."""
    wanted = os.environ.get("CUSTOM_OPS_CPU_CAPABILITY", "")
    if wanted == "all":
        return list(FLAGS)
    if not wanted:
        here = torch.backends.cpu.get_cpu_capability()
        return [here if here in FLAGS else "DEFAULT"]
    if unknown := set(wanted.split(",")) - set(FLAGS):
        sys.exit(
            f"CUSTOM_OPS_CPU_CAPABILITY: expected all, or some of {','.join(FLAGS)}, got "
            f"{','.join(sorted(unknown))}"
        )
    return wanted.split(",")


def tell(message):
    """Print a line that `pip install -v` shows as it comes."""
    print(f"custom_ops: {message}", flush=True)


class BuildKernels(build_ext):
    """Compiles the libraries at the same time, and writes down what came of it."""

    def finalize_options(self):  # noqa: D102
        super().finalize_options()
        self.record = {"torch": "", "python": SOABI, "unusable": "", "libraries": {}}
        self.parallel = os.cpu_count()
        # An object of an earlier build may be of another torch, which its date does not tell.
        self.force = True

    def run(self):
        """Build the wanted libraries, or none where torch cannot be had."""
        torch, self.record["unusable"] = usable_torch()
        wanted = []
        if torch is None:
            tell(f"no C++ kernels: {self.record['unusable']}")
        else:
            self.record["torch"] = torch.__version__
            wanted = wanted_capabilities(torch)
            tell(f"compiling {' and '.join(wanted)} for torch {torch.__version__}")
        names = [library_name(capability) for capability in wanted]
        self.extensions = [e for e in self.extensions if e.name.endswith(tuple(names))]
        for extension in self.extensions:
            extension.include_dirs = torch.utils.cpp_extension.include_paths()
            extension.library_dirs = torch.utils.cpp_extension.library_paths()
        for stale in (Path(self.build_lib) / RECORD.parent).glob("_cpu_*"):
            stale.unlink()
        super().run()
        for folder in (self.build_lib, ".") if self.inplace else (self.build_lib,):
            path = Path(folder) / RECORD
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.record, indent=2) + "\n")

    def build_extension(self, ext):
        """Compile one library, in a folder of its own: they share the name of their source."""
        name, start = ext.name.rpartition(".")[2], time.monotonic()
        alone = copy.copy(self)
        alone.build_temp = str(Path(self.build_temp) / name)
        try:
            build_ext.build_extension(alone, ext)
        except (CCompilerError, BaseError) as error:
            self.record["libraries"][name] = str(error)
            tell(f"no {name}: {error}")
        else:
            self.record["libraries"][name] = ""
            tell(f"built {name} in {time.monotonic() - start:.0f} s")


class CopyModules(build_py):
    """Leaves out what an earlier version of the sources left in build/."""

    def run(self):  # noqa: D102
        super().run()
        if self.editable_mode:
            return
        outputs = {Path(name).resolve() for name in self.get_outputs(include_bytecode=False)}
        for module in Path(self.build_lib, "custom_ops").rglob("*.py"):
            if module.resolve() not in outputs:
                module.unlink()


setup(
    ext_modules=[library(capability) for capability in FLAGS],
    cmdclass={"build_ext": BuildKernels, "build_py": CopyModules},
)
