"""The compiled part of the package; everything else is in pyproject.toml.

Setuptools' way to declare it there is still experimental and warns in every build.
"""

import os
import sys

from setuptools import Extension, setup

SOURCES = "sknode/ode/kernels/src"
UNITS = ("module", "threads", "baseline", "avx2", "avx512")
HEADERS = (
    "standard",
    "problem",
    "threads",
    "simd",
    "network",
    "flow",
    "stepper",
    "solve",
    "adjoint",
    "recurrent",
    "perceptron",
)

kernels = Extension(
    "sknode.ode.kernels._native",
    sources=[f"{SOURCES}/{name}.cpp" for name in UNITS],
    depends=[f"{SOURCES}/{name}.h" for name in HEADERS],
    language="c++",
    # vector extensions of GCC and clang; code for other instruction sets than the
    # compiler's default is in units of its own and chosen at run time
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fno-math-errno",
        "-ffp-contract=fast",
        "-Wno-psabi",
        "-pthread",
    ],
    extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else [])],
    py_limited_api=True,
    # without a compiler that can do this, the installation goes on and torch serves
    optional=True,
)

# MSVC has no such extensions: on Windows a wheel without compiled code is built,
# which serves everywhere
left_out = sys.platform == "win32" or os.environ.get("SKNODE_KERNELS") == "0"

setup(
    ext_modules=[] if left_out else [kernels],
    options={} if left_out else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
