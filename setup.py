"""The C++ kernels, one library for each vector set; everything else stands in pyproject.toml.

They are compiled against the torch of the environment that the package is installed into. Without
torch there, without a compiler, or where a build fails, the package is installed without them.
With CUSTOM_OPS_SANITIZE=AVX512, say, that one alone is compiled, for `make test-asan`.
"""

import os
import platform
import sys
import sysconfig

from setuptools import setup
from setuptools.command.build_ext import build_ext

SOURCES = "custom_ops/kernels/cpu"
# The flags with which torch compiles its own kernels for each vector set.
FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"],
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def cpp_extension():
    """Return torch.utils.cpp_extension, or None where there is no torch."""
    # pip builds in an environment of its own, which sees neither torch nor what torch needs; the
    # one that it installs into is the same interpreter's.
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        print(f"custom_ops: no C++ kernels, torch cannot be imported here ({error})")
        return None
    return cpp_extension


def extensions():
    """Return an extension module for each vector set of this kind of processor."""
    if sys.platform == "win32" or (torch := cpp_extension()) is None:
        return []
    capabilities = list(FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["DEFAULT"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    sanitize = []
    if only := os.environ.get("CUSTOM_OPS_SANITIZE"):
        sanitize, capabilities = SANITIZE, [only]
    return [
        torch.CppExtension(
            f"custom_ops.kernels._cpu_{capability.lower()}",
            [f"{SOURCES}/module.cpp"],
            depends=[f"{SOURCES}/{name}" for name in os.listdir(SOURCES)],
            extra_compile_args=[
                "-std=c++20",
                *(["-O1", "-g1", *sanitize] if sanitize else ["-O3", "-g0"]),
                "-fno-math-errno",
                "-fvisibility=hidden",
                "-Wno-unknown-pragmas",
                f"-DTORCH_EXTENSION_NAME=_cpu_{capability.lower()}",
                f"-DCPU_CAPABILITY={capability}",
                f"-DCPU_CAPABILITY_{capability}",
                "-DAT_PARALLEL_OPENMP=1",
                *openmp,
                *FLAGS[capability],
            ],
            extra_link_args=[*openmp, *sanitize],
            optional=True,
        )
        for capability in capabilities
    ]


class BuildAtOnce(build_ext):
    """The libraries at the same time; each takes a core for a quarter of a minute."""

    def finalize_options(self):  # noqa: D102
        super().finalize_options()
        self.parallel = os.cpu_count()


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildAtOnce})
