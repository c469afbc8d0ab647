"""Build the two compiled modules: the cycle engine, and the binding to the C kernels in csrc/.

Variables: SYSMT_WERROR=1 makes warnings errors; SYSMT_SANITIZE=address,undefined adds sanitizers.
"""

import os
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

HERE = Path(__file__).parent
CYCLE_STEP = str(Path("csrc", "cycle_step.c"))
MACROS = [("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")]

compile_args = ["-O3", "-std=c11", "-Wall", "-Wextra", "-pthread", "-fno-strict-aliasing"]
compile_args += ["-ffp-contract=off"]  # float results are single roundings: no fused multiply-add
link_args = ["-pthread"]
if os.environ.get("SYSMT_WERROR") == "1":
    compile_args += ["-Werror"]
if sanitizers := os.environ.get("SYSMT_SANITIZE"):
    compile_args += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g", "-O1"]
    link_args += [f"-fsanitize={sanitizers}"]


def extension(pyx: Path) -> Extension:
    """One extension module for a .pyx file; the C sources it binds come along."""
    sources = [str(pyx)]
    depends = []
    if pyx.stem == "cycle":
        sources += [CYCLE_STEP]
        depends += [str(Path(CYCLE_STEP).with_suffix(".h"))]
    elif pyx.stem == "_native":
        sources += sorted({str(path) for path in Path("csrc").glob("*.c")} - {CYCLE_STEP})
        depends += sorted(str(path) for path in Path("csrc").glob("*.h"))
    return Extension(
        ".".join(pyx.with_suffix("").parts),
        sources,
        depends=depends,
        include_dirs=[numpy.get_include(), "csrc"],
        define_macros=MACROS,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


os.chdir(HERE)
setup(
    ext_modules=cythonize(
        [extension(path) for path in sorted(Path("sysmt").rglob("*.pyx"))],
        language_level=3,
        build_dir="build/cython",
    )
)
