"""The compiled part of the package. All else that setuptools needs is in setup.cfg.

It is optional: where there is no C compiler, the installation goes on without it.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "provider_image.images._resampling",
            ["provider_image/images/_resampling.c"],
            # Floating-point operations are neither combined nor reordered: Pillow's results are to be reproduced.
            extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            optional=True,
            # It is loaded by ctypes and uses nothing of Python, so one file serves every version.
            py_limited_api=True,
        )
    ]
)
