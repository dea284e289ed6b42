"""Puts notebooks, data cards and sweeps into the wheel, as mammo_nb/carried. All else is said in pyproject.toml."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
CARRIED = {"nbs":"*.ipynb", "nbs/lib":"*.ipynb", "nbs/papers":"*.ipynb", "cards":"*.md", "sweeps":"*.yaml"}


class Carry(build_py):
    "The usual build, with these files beside the package's own. An editable install finds the clone's."
    def run(self):
        super().run()
        if self.editable_mode: return
        for folder, pattern in CARRIED.items():
            target = Path(self.build_lib)/"mammo_nb"/"carried"/folder
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted((HERE/folder).glob(pattern)): shutil.copyfile(file, target/file.name)


setup(cmdclass=dict(build_py=Carry))
