"""The trained model that a run starts from (``model.init_from``): what of the recipe it decides, what must agree with
it, and its tensors.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.config import NEW_SINCE_0_1_0, PrefixSection, RunConfig
from cuma_ds.data.prepared import read_manifest
from cuma_ds.errors import CheckpointError, ConfigError
from cuma_ds.files import is_hub_id
from cuma_ds.identity import changed_part
from cuma_ds.inference.modeling import ADAPTER_CONFIG, Export, moved, read_export, read_weights
from cuma_ds.inference.open import profiles_section
from cuma_ds.parallel.backbone import backbone_fingerprint
from cuma_ds.parallel.stored import StoredTensors, newest_whole, read_adapters
from cuma_ds.profiles import encoder_of
from cuma_ds.recipe import Key, make_config
from cuma_ds.runs import Run

# Keys that belong to a trained model and to the people it has seen. A recipe that leaves them out takes those of its
# start.
_PROMPT = ("profile_in_prompt", "profile_prompt", "system_prompt", "prompt_style", "option_order")
_SENTENCES = ("template", "format", "fields", "pooling", "normalise", "max_tokens")
_SPLIT = (
    "test_fraction",
    "valid_fraction",
    "heldout_fraction",
    "heldout_profile_fraction",
    "heldout_question_fraction",
    "split_seed",
)
_INHERITED = {
    "adapters": tuple(key for key in CumaConfig.model_fields if key != "profile_dim"),
    "prefix": tuple(PrefixSection.model_fields),
    "profiles": (*_SENTENCES, "encoder", "standardise"),
    "data": (*_PROMPT, *_SPLIT),
}
# Of these, what a recipe may change: how training goes on, and a place whose content is compared instead.
_MAY_DIFFER: set[Key] = {
    *(("adapters", f"balance_{key}") for key in ("weight", "probability", "scope", "decay")),
    *(("adapters", key) for key in ("gradient_mask", "gradient_groups", "dropout")),
    ("profiles", "encoder"),
    ("data", "heldout_question_fraction"),  # conversations and preferences have no questions
}
_WHAT = "a run folder, or a folder made by launchers/export.py --format hf"


@dataclass(frozen=True)
class Origin:
    """A trained model that a run may start from.

    Attributes:
        place: as the recipe names it.
        settings: what it knows of the keys that a recipe may leave out, by (section, key).
        backbone: fingerprint of the model it was trained on; empty where it does not say.
        encoder: fingerprint of its sentence encoder; None where it has none or does not say.
        manifest: of the data it was trained on; None for an export.
        tensors: reads what trains, the profile standardisation and the balance shares, by their key in a checkpoint.
    """

    place: str
    settings: Mapping[Key, object]
    backbone: Mapping[str, str]
    encoder: str | None
    manifest: Mapping[str, object] | None
    tensors: Callable[[], dict[str, Tensor]]

    def check(self, config: RunConfig, manifest: Mapping[str, object]) -> None:
        """Refuse a recipe on another backbone, encoder or split of the same people.

        Args:
            config: as :func:`with_start` returns it.
            manifest: of the data that the run will learn from.

        Raises:
            CheckpointError: names the key and both places.
            ModelError: a folder cannot be read.
        """
        change = changed_part(config.model.path, self.backbone, backbone_fingerprint(config.model))
        if change:
            raise CheckpointError(f"model.path: {change} than {self.place} (model.init_from) was trained on; name that")
        if not self.backbone:
            warnings.warn(
                f"model.init_from: {self.place} does not say what model it was trained on; that {config.model.path} is "
                "it cannot be checked",
                stacklevel=2,
            )
        encoder = config.profiles.encoder
        if config.adapters.uses_profiles and self.encoder and encoder_of(config.profiles).fingerprint != self.encoder:
            raise CheckpointError(
                f"profiles.encoder: {encoder} is another sentence encoder than {self.place} (model.init_from) was "
                "trained with; name that"
            )
        self._check_split(manifest)

    def _check_split(self, manifest: Mapping[str, object]) -> None:
        if self.manifest is None:
            warnings.warn(
                f"model.init_from: {self.place} is an export, which does not say on whom it was trained; that nobody "
                "of them is tested on cannot be checked",
                stacklevel=3,
            )
            return
        if self.manifest["source"] != manifest["source"]:
            return
        known, now = self.manifest, manifest
        if "split" not in known or "split" not in now:
            # Release 0.1.0 drew among the people present: only the same data is split in the same way.
            same = all(known.get(key) == now.get(key) for key in ("kind", "inputs", "split", "questions"))
        else:
            same = known["split"] == now["split"]
        same &= all(known[key] == now[key] for key in ("seed", "test_fraction", "heldout_fraction"))
        same &= known.get("valid_fraction", 0.0) == now.get("valid_fraction", 0.0)
        if not same:
            raise CheckpointError(
                f"model.init_from: {self.place} was trained on {_how(known)}, but this data is {_how(now)}: people it "
                "has learned from could be tested on; prepare the data of both in one way"
            )


def _how(manifest: Mapping[str, object]) -> str:
    """How the people of a prepared folder were split, in words."""
    split = manifest.get("split")
    by = f"whose people are {split['people']}" if isinstance(split, dict) else "as release 0.1.0 drew people"
    fractions = f"test_fraction {manifest['test_fraction']}, heldout_fraction {manifest['heldout_fraction']}"
    return f"data {by} ({fractions}, seed {manifest['seed']})"


def open_origin(place: str) -> Origin:
    """The newest checkpoint of a run, or an export.

    Args:
        place: ``model.init_from``.

    Raises:
        CheckpointError: it is something else, or holds no checkpoint, or is damaged; says what to use.
    """
    folder = Path(place).expanduser()
    try:
        if Run(folder).recipe.is_file():
            return _of_run(place)
        if (folder / ADAPTER_CONFIG).is_file():
            return _of_export(place)
    except CheckpointError as error:
        raise CheckpointError(f"model.init_from: {error} (it takes {_WHAT})") from None
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"model.init_from: {place} is a model as it is; name it as model.path, and leave init_from out"
        )
    what = "is neither"
    if not folder.is_dir():
        what = "is no folder here; train it or download it first" if is_hub_id(place) else "does not exist"
    raise CheckpointError(f"model.init_from: {place} {what}; it takes {_WHAT}")


def _of_run(place: str) -> Origin:
    run = Run(Path(place).expanduser())
    config, (_, newest) = run.config(), newest_whole(run.checkpoints, content=False)
    identity = newest.get("identity") or run.identity()
    encoder = identity.get("encoder")
    if encoder is None and (table := run.profiles(config)) is not None:
        encoder = table.fingerprint

    def tensors() -> dict[str, Tensor]:
        checkpoint, state = newest_whole(run.checkpoints)
        stored = StoredTensors(checkpoint, state)
        balance = {name: stored.get(name) for name in stored.names() if name.startswith("balance/")}
        return {f"param/{name}": tensor for name, tensor in read_adapters(checkpoint, state).items()} | balance

    manifest = read_manifest(run.data_folder)
    return Origin(place, _settings(config), identity.get("backbone", {}), encoder, manifest, tensors)


def _of_export(place: str) -> Origin:
    folder = Path(place).expanduser()
    export = read_export(folder)

    def tensors() -> dict[str, Tensor]:
        return {f"param/{name}": tensor for name, tensor in read_weights(folder, export).items()}

    backbone, encoder = export["base"].get("fingerprint", {}), export["profiles"].get("fingerprint")
    return Origin(place, _settings_of_export(folder, export), backbone, encoder, None, tensors)


def _settings(config: RunConfig) -> dict[Key, object]:
    settings: dict[Key, object] = {
        (section, key): getattr(values, key)
        for section, keys in _INHERITED.items()
        for key in keys
        if (values := getattr(config, section)) is not None
    }
    # Where a recipe leaves it out, its value depends on the source, and a run may start on data of another one.
    return settings | {("data", "heldout_fraction"): config.data.heldout}


def _settings_of_export(folder: Path, export: Export) -> dict[Key, object]:
    """What an export says. What it does not say about prompts is as it was in release 0.1.0."""
    adapters = CumaConfig(**export["adapters"])
    settings: dict[Key, object] = {
        ("adapters", key): getattr(adapters, key) for key in _INHERITED["adapters"] if key in export["adapters"]
    }
    about = profiles_section(export["profiles"])
    settings |= {("profiles", key): getattr(about, key) for key in _SENTENCES}
    settings["profiles", "encoder"] = None if about.encoder is None else moved(about.encoder, folder)
    released: dict[str, object] = {"profile_in_prompt": False, "option_order": "fixed"}
    released |= {key: NEW_SINCE_0_1_0["data", key] for key in ("prompt_style", "profile_prompt")}
    prompt = released | {key: value for key, value in export.get("prompt", {}).items() if value is not None}
    return settings | {("data", key): prompt.get(key) for key in _PROMPT}


def with_start(config: RunConfig) -> RunConfig:
    """The recipe with what it leaves to the model that it starts from: adapters, encoder and template of profiles, the
    way prompts are written, and the split of people.

    A run that has been started knows them itself. Each rank may call this, any number of times.

    Args:
        config: the recipe; returned as it is without ``model.init_from``.

    Raises:
        ConfigError: the recipe sets such a key to something else; names both.
        CheckpointError: there is nothing to start from, see :func:`open_origin`.
    """
    place, run = config.model.init_from, Run(config.run_dir)
    if place is None:
        return config
    started = run.config() if run.recipe.is_file() else None
    if started is not None and started.model.init_from is not None:
        settings, free = _settings(started), set(_settings(started))  # what differs, Run.create says
    else:
        if Path(place).expanduser().resolve() == config.run_dir.resolve():
            raise ConfigError(f"model.init_from: {place} is this run itself; choose another run.name")
        settings, free = dict(open_origin(place).settings), _MAY_DIFFER
    values = config.model_dump(mode="json", exclude_unset=True)
    own = {(section, key) for section in _INHERITED for key in values.get(section) or {}}
    if own & {("adapters", "gradient_mask"), ("adapters", "gradient_groups")}:  # one makes no sense without the other
        own |= {("adapters", "gradient_mask"), ("adapters", "gradient_groups")}
    for (section, key), known in settings.items():
        now = config.data.heldout if key == "heldout_fraction" else getattr(getattr(config, section), key, None)
        if (section, key) not in own:
            values.setdefault(section, {})[key] = known
        elif now != known and (section, key) not in free:
            shown = [list(value) if isinstance(value, tuple) else value for value in (known, now)]
            raise ConfigError(
                f"model.init_from: {place} has {section}.{key}: {shown[0]}, but this recipe says {shown[1]}; leave the "
                "key out"
            )
    if values["adapters"]["method"] == "cuma" and values["profiles"].get("encoder") is None:
        raise ConfigError(
            f"profiles.encoder is missing, and {place} (model.init_from) does not name its sentence encoder"
        )
    return make_config(values, where=f"the recipe with what {place} (model.init_from) decides")


def start_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors of a start policy as a file."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def check_same_start(config: RunConfig) -> None:
    """Refuse to go on with a run whose recipe now names something else to start from.

    The run does not need that folder any more, so one that has gone or was trained on is no matter. A renamed folder is
    known by its content.

    Raises:
        CheckpointError: another model.
    """
    run, place = Run(config.run_dir), config.model.init_from
    known = run.identity().get("start")
    if place is None or known is None or place == run.config().model.init_from or not Path(place).expanduser().exists():
        return
    if hashlib.sha256(start_bytes(open_origin(place).tensors())).hexdigest() != known:
        raise CheckpointError(
            f"model.init_from: {place} is not what {run.folder} started from; restore the key to resume, or choose "
            "another run.name"
        )
