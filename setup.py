"""The package needs what requirements.txt lists before its tests; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

needed = Path(__file__).with_name("requirements.txt").read_text().split("# For the tests")[0]
lines = (line.split("#")[0].strip() for line in needed.splitlines())
setup(install_requires=[line for line in lines if line])
