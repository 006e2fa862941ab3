"""A study is one YAML file: which recipes, which methods, how the learning rate is chosen, what is measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cuma_ds.config import RunConfig
from cuma_ds.errors import ConfigError, nearest
from cuma_ds.recipe import Key, find_recipe, load_config, read_yaml

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Settings(_Part):
    """What a recipe or a method of a study adds to a run: as ``--config`` and ``--set`` of launchers/train.py."""

    config: tuple[str, ...] = Field((), description="recipe files, or names of recipes that come with the package")
    set: tuple[str, ...] = Field((), description="section.key=value, on top of all files")


class Method(Settings):
    """A method. Its files and overrides come after those of the recipe and win."""

    learning_rates: tuple[float, ...] | None = Field(
        None, description="a grid of its own; [] is for methods that train nothing"
    )


class Tuning(_Part):
    """How the learning rate of each method is chosen: by the distance (loss, accuracy) on the split ``valid``."""

    learning_rates: tuple[float, ...] = Field(min_length=1, description="the grid")
    extend: int = Field(
        2, ge=0, description="most further rates while the best is at an edge, each as far out as the last two differ"
    )
    steps: int | None = Field(
        None, ge=1, description="optimizer steps of each trial; null tunes every budget by itself, at its own steps"
    )


class Evaluation(_Part):
    """What is measured of each run."""

    set: tuple[str, ...] = Field((), description="section.key=value of launchers/evaluate.py")
    ranks: int = Field(1, ge=1, description="processes that evaluate together")
    checkpoints: int = Field(
        1, ge=1, description="checkpoints along each run whose distance on valid makes its learning curve"
    )
    gradients: bool = Field(False, description="interference of groups' gradients, of methods with experts")
    generate: int | None = Field(None, ge=1, description="answer so many held-out conversations: Distinct-1/2, length")
    max_new_tokens: int = Field(128, ge=1, description="longest answer")


class Expected(_Part):
    """How long runs take where none of the study has been measured yet; for ``--dry-run`` alone."""

    seconds_per_step: float | None = Field(None, gt=0, description="of training")
    seconds_per_start: float = Field(30.0, ge=0, description="until the first step, and of each evaluation")
    machine: str = Field("unknown", description="what the two were measured on")


class Study(_Part):
    """Everything in a STUDY.yaml."""

    name: str = Field(pattern=_NAME, description="folder name of the study under output_dir")
    output_dir: str = Field("studies", description="folder that holds the study's folder")
    ranks: int = Field(1, ge=1, description="processes that train together, on this machine")
    recipes: dict[str, Settings] = Field(min_length=1, description="what is learned, by name")
    methods: dict[str, Method] = Field(min_length=1, description="how it is learned, by name")
    main: str | None = Field(None, description="the method that the others are compared with; null is the first")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="each gives a run of its own")
    budgets: tuple[int, ...] = Field(min_length=1, description="optimizer steps; each gives runs of its own")
    tuning: Tuning | None = Field(None, description="null takes the learning rate of the recipe")
    evaluation: Evaluation = Evaluation()
    targets: tuple[float, ...] = Field((), description="distances on valid; the report says when each method got there")
    expected: Expected = Expected()

    @field_validator("recipes", "methods")
    @classmethod
    def _check_names(cls, entries: dict[str, Settings]) -> dict[str, Settings]:
        for name in entries:
            if not re.match(_NAME, name):
                raise ValueError(f"{name!r} is no name; letters, digits, _ and - are allowed")
        return entries

    @model_validator(mode="after")
    def _check(self) -> Study:
        if self.main is not None and self.main not in self.methods:
            raise ValueError(f"main is {self.main!r}, but the methods are {', '.join(self.methods)}")
        for what, numbers in (("seeds", self.seeds), ("budgets", self.budgets)):
            if len(set(numbers)) < len(numbers) or min(numbers) < (what == "budgets"):
                least = 1 if what == "budgets" else 0
                raise ValueError(f"{what} are {list(numbers)}; each must be a different number from {least} on")
        for name, grid in self.grids().items():
            if self.tuning is None and len(grid) > 1:
                raise ValueError(f"methods.{name} has {len(grid)} learning rates, but nothing chooses one; add tuning")
            _check_grid(name, grid, 0 if self.tuning is None else self.tuning.extend)
        return self

    def grids(self) -> dict[str, tuple[float, ...]]:
        """The learning rates that each method starts with; none where it takes that of the recipe."""
        shared = () if self.tuning is None else self.tuning.learning_rates
        return {
            name: shared if method.learning_rates is None else method.learning_rates
            for name, method in self.methods.items()
        }

    @property
    def first(self) -> str:
        """The method that the others are compared with."""
        return self.main or next(iter(self.methods))

    @property
    def folder(self) -> Path:
        """The study's own folder."""
        return Path(self.output_dir) / self.name


class Task(NamedTuple):
    """One run of a study.

    Attributes:
        recipe, method: names in the study.
        steps: optimizer steps.
        seed: of the run.
        rate: learning rate; None leaves that of the recipe.
    """

    recipe: str
    method: str
    steps: int
    seed: int
    rate: float | None

    @property
    def name(self) -> str:
        """The name of the run."""
        rate = "" if self.rate is None else f".lr-{self.rate:g}"
        return f"{self.recipe}.{self.method}.{self.steps}-steps{rate}.seed-{self.seed}"


def load_study(path: str | Path) -> Study:
    """Read a study.

    Args:
        path: a YAML file, or the name of a study that comes with the package (``studies/quick``).

    Raises:
        ConfigError: one line with file, line and key for the first thing that is wrong.
    """
    file = find_recipe(path, study=True)
    try:
        values, lines = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise ConfigError(f"cannot read the study {file}: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line, problem = f":{mark.line + 1}" if mark else "", getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError(f"{file}{line}: broken YAML: {problem}") from None
    if not isinstance(values, dict):
        allowed = ", ".join(Study.model_fields)
        raise ConfigError(f"{file}:1: a study is a mapping of keys ({allowed}), not {type(values).__name__}")
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, lines, file)) from None
    _check_recipes(study, lines, file)
    return study


def run_arguments(study: Study, task: Task) -> list[str]:
    """The arguments of launchers/train.py for one run."""
    recipe, method = study.recipes[task.recipe], study.methods[task.method]
    points = study.evaluation.checkpoints
    own = [
        f"run.name={task.name}",
        f"run.output_dir={study.folder / 'runs'}",
        f"run.seed={task.seed}",
        f"training.steps={task.steps}",
        f"checkpoint.every={-(-task.steps // points)}",
        f"checkpoint.keep_last={points}",
    ]
    if task.rate is not None:
        own.append(f"training.learning_rate={task.rate!r}")
    return ["--config", *recipe.config, *method.config, "--set", *recipe.set, *method.set, *own]


def run_config(study: Study, task: Task) -> RunConfig:
    """The recipe of one run.

    Raises:
        ConfigError: files or overrides that cannot work together.
    """
    arguments = run_arguments(study, task)
    place = arguments.index("--set")
    return load_config(arguments[1:place], arguments[place + 1 :])


def _check_recipes(study: Study, lines: dict[Key, int], file: Path) -> None:
    """Build every combination once, so that a mistake shows before hours of computing."""
    for recipe, settings in study.recipes.items():
        for name, method in study.methods.items():
            line = f"{file}:{lines.get(('methods', name), 1)}: recipe {recipe!r} with method {name!r}"
            if not settings.config and not method.config:
                raise ConfigError(f"{line} names no recipe file; add config to one of them")
            for steps in sorted({*study.budgets, *_trial_steps(study)}):
                try:
                    config = run_config(study, Task(recipe, name, steps, study.seeds[0], None))
                except ConfigError as error:
                    raise ConfigError(f"{line}, {steps} steps: {error}") from None
                _check_ranks(config, study, line)


def _check_ranks(config: RunConfig, study: Study, line: str) -> None:
    """Refuse what the number of ranks cannot hold, and a grid without people to choose on."""
    ep_size = config.parallel.ep_size
    if study.ranks % ep_size:
        raise ConfigError(f"{line}: parallel.ep_size {ep_size} does not divide the study's {study.ranks} ranks")
    raw = config.data.source in ("wvs-sample", "jsonl", "community-alignment", "prism")
    prepared = config.data.path is not None and Path(config.data.path).is_dir()
    if study.tuning is not None and raw and not prepared and not config.data.valid_fraction:
        raise ConfigError(
            f"{line}: the learning rate is chosen on the split valid, but data.valid_fraction is 0; set it, e.g. to 0.1"
        )


def _trial_steps(study: Study) -> list[int]:
    return [] if study.tuning is None or study.tuning.steps is None else [study.tuning.steps]


def _check_grid(method: str, grid: tuple[float, ...], extend: int) -> None:
    if any(rate <= 0 for rate in grid) or len(set(grid)) < len(grid):
        raise ValueError(f"the learning rates of {method} are {list(grid)}; each must be a different number above 0")
    if len(grid) == 1 and extend:
        raise ValueError(
            f"the grid of {method} has one learning rate, which says nothing of how far to go when it is extended; "
            "give two, or set tuning.extend: 0"
        )


def _first_problem(error: ValidationError, lines: dict[Key, int], file: Path) -> str:
    problem = error.errors()[0]
    location = tuple(str(part) for part in problem["loc"])
    known = location
    while known and known not in lines:
        known = known[:-1]
    where, key = f"{file}:{lines.get(known, 1)}", ".".join(location)
    if problem["type"] == "extra_forbidden":
        allowed = _keys_at(location[:-1])
        what = ".".join(location[:-1]) or "a study"
        return f"{where}: unknown key {key!r}{nearest(location[-1], allowed)}; {what} allows: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{where}: key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {key} is {problem.get('input')!r}: {message}"


def _keys_at(location: Key) -> list[str]:
    """The keys that are allowed at a place of a study."""
    here: object = Study
    for part in location:
        if get_origin(here) is dict:
            here = get_args(here)[1]
            continue
        models = [one for one in (here, *get_args(here)) if isinstance(one, type) and issubclass(one, BaseModel)]
        here = models[0].model_fields[part].annotation
    models = [one for one in (here, *get_args(here)) if isinstance(one, type) and issubclass(one, BaseModel)]
    return list(models[0].model_fields)
