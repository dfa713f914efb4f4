"""What pyproject.toml cannot say: a built package holds the recipes, which stay at the top of the clone."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies ``recipes/`` into the package (found again by mvar_lightning/runs/recipe_files.py)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file in sorted(Path("recipes").rglob("*.yaml")):
                self.mkpath(str(Path(self.build_lib, "mvar_lightning", file.parent)))
                self.copy_file(str(file), str(Path(self.build_lib, "mvar_lightning", file)))


setup(cmdclass={"build_py": BuildWithRecipes})
