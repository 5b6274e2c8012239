from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["vitkern", "vitkern.*"], exclude=["vitkern.kernels*"]),
        "vitkern.kernels",
        *(f"vitkern.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"vitkern.kernels": "kernels"},
)
