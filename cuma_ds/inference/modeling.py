"""An exported model, loaded and called with torch and transformers alone. Every exported folder holds this source.

Shapes: B sequences, N profiles, P profile width.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.inject import inject_adapters
from cuma_ds.adapters.model import CumaModel
from cuma_ds.errors import CheckpointError, ModelError, nearest
from cuma_ds.files import first_line, full_path, is_hub_id
from cuma_ds.identity import base_fact, changed_part, content_sha256, file_sha256, model_fingerprint
from cuma_ds.profiles.encoder import ProfileEncoder
from cuma_ds.profiles.linearize import Wording, linearize

EXPORT_FORMAT = 1
ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FOLDER = "adapter_config.json", "adapter_model.safetensors", "base"
# What two models must share for adapters of the one to make sense on the other.
BASE_FACTS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
# Profiles whose embeddings are kept.
_REMEMBERED = 4096
# Arguments of from_pretrained that say where an export is found, and those that transformers' Auto classes add.
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
_OF_AUTO_CLASSES = (
    "config", "adapter_kwargs", "code_revision", "_from_auto", "_commit_hash", "force_download", "subfolder",
)  # fmt: skip
_ENCODER_SETTINGS = ("pooling", "normalise", "max_tokens")

Profile = Mapping[str, object] | str


class ProfileFacts(TypedDict, total=False):
    """How a profile becomes a vector: ``profiles`` of ``adapter_config.json``.

    encoder: folder or hub id of the sentence encoder, None where only embeddings are taken.  fingerprint: of it.
    template, format: how fields become a sentence.  fields: names that training profiles had and sentences are made
    of.  only_fields: those that sentences are made of, in this order, where a recipe chose them.  pooling, normalise,
    max_tokens: arguments of :class:`ProfileEncoder` where they are not the usual ones.
    """

    encoder: str | None
    fingerprint: str
    template: str
    format: str
    fields: list[str]
    only_fields: list[str]
    pooling: str
    normalise: bool
    max_tokens: int


class Export(TypedDict, total=False):
    """The content of ``adapter_config.json``.

    base: facts and fingerprint of the base model, its ``dtype`` and ``trust_remote_code``.  adapters: values of
    :class:`CumaConfig`.  prompt: how training wrote prompts.  sha256: of the weights.  settings_sha256: of what decides
    the answers beside them; exports of release 0.1.0 have none.
    """

    peft_type: str
    format_version: int
    base_model_name_or_path: str
    base: dict[str, Any]
    adapters: dict[str, Any]
    profiles: ProfileFacts
    prompt: dict[str, Any]
    sha256: str
    settings_sha256: str


class ProfileReader:
    """Turns profiles, as text or fields, into the raw embeddings that adapters were trained with.

    Args:
        facts: how it is done.
        width: P, what the adapters take.
        encoder: folder or hub id of the sentence encoder, loaded at the first use; None takes the one of ``facts``.
    """

    def __init__(self, facts: ProfileFacts, width: int, encoder: str | None = None) -> None:
        self.facts, self.width = facts, width
        only = facts.get("only_fields")
        self.wording = Wording(facts["template"], facts.get("format"), None if only is None else tuple(only))
        self.encoder_path = encoder or facts.get("encoder")
        self._encoder: ProfileEncoder | None = None
        self._embedded: dict[str, Tensor] = {}

    def __call__(self, profiles: Sequence[Profile]) -> Tensor:
        """Raw embeddings [N, P] float32; a sentence seen lately is not embedded again.

        A field that no training profile had is a warning: the model cannot know what it means.

        Raises:
            ModelError: the adapters take no profiles, or the encoder is missing or another one.
            DataError: a profile without any answer.
        """
        if not self.width:
            raise ModelError("profiles were given, but these adapters take none (profile_dim is 0)")
        if isinstance(profiles, str | Mapping):
            raise ModelError(
                "profiles is a list with one profile per sequence, not a single profile; write profiles=[...]"
            )
        for profile in profiles:
            for message in unknown_fields(profile, self.facts.get("fields") or ()):
                warnings.warn(message, UserWarning, stacklevel=3)
        sentences = [linearize(profile, self.wording) for profile in profiles]
        missing = sorted(set(sentences) - self._embedded.keys())
        if missing:
            encoder = self._load()
            encoder.check_lengths(missing, apart=False)  # profiles of one call need not belong to one data set
            self._embedded.update(zip(missing, encoder(missing), strict=True))
        rows_NP = torch.stack([self._embedded[sentence] for sentence in sentences])
        for oldest in list(self._embedded)[: max(0, len(self._embedded) - _REMEMBERED)]:
            del self._embedded[oldest]
        return rows_NP

    def _load(self) -> ProfileEncoder:
        if self._encoder is None:
            if self.encoder_path is None:
                taken = "so it takes profile_embeddings; or load it with encoder=FOLDER"
                raise ModelError(f"this export names no sentence encoder, {taken}")
            settings: dict[str, Any] = {key: value for key, value in self.facts.items() if key in _ENCODER_SETTINGS}
            encoder, known = ProfileEncoder(self.encoder_path, **settings), self.facts.get("fingerprint")
            what = f"the sentence encoder {encoder.folder}"
            if encoder.dim != self.width:
                raise ModelError(f"{what} has width {encoder.dim}; the adapters take {self.width}")
            if known and encoder.fingerprint != known:
                raise ModelError(f"{what} is not the one these adapters were trained with (its fingerprint differs)")
            self._encoder = encoder
        return self._encoder


class CumaExportConfig(PreTrainedConfig):
    """``config.json`` of an exported folder. What the adapters are is in ``adapter_config.json``."""

    model_type = "cuma"


class CumaForCausalLM(CumaModel):
    """A frozen backbone with trained adapters; ``forward`` and ``generate`` also take profiles as text or fields.

    What this class does not define (``device``, ``dtype``, ``generation_config``, ...) is the backbone's.

    Attributes:
        export: the content of ``adapter_config.json``.
        folder: the exported folder it was loaded from.
        embed_profiles: raw embeddings [N, P] of profiles.
    """

    config_class = CumaExportConfig
    export: Export
    folder: Path
    embed_profiles: ProfileReader

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        base_model: str | None = None,
        encoder: str | None = None,
        **kwargs: Any,
    ) -> CumaForCausalLM:
        """Load an exported folder (or a hub id of one), in eval mode and frozen.

        Args:
            folder: what ``launchers/export.py --format hf`` wrote.
            dtype: of the backbone; by default the one it was trained with. Adapters are float32.
            base_model: folder or hub id of the backbone, if it is neither where the export says nor beside the export.
            encoder: folder or hub id of the sentence encoder, likewise.
            kwargs: for the backbone's ``from_pretrained`` (``device_map``, ``attn_implementation``, ...).
                ``trust_remote_code`` allows code that comes with the *backbone*; it is only passed on if the training
                run needed it.

        Raises:
            CheckpointError: the folder is no export, or its weights were changed.
            ModelError: the backbone is missing or another one.
        """
        place = _export_folder(str(folder), {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs})
        kwargs = {key: value for key, value in kwargs.items() if key not in _OF_AUTO_CLASSES}
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        export = read_export(place)
        state, facts = read_weights(place, export), export["base"]
        inside = (place / BASE_FOLDER / "config.json").is_file()
        path = base_model or (str(place / BASE_FOLDER) if inside else moved(export["base_model_name_or_path"], place))
        if not inside:
            export["base_model_name_or_path"] = full_path(str(path))
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code") and facts.get("trust_remote_code"))
        try:
            precision = facts["dtype"] if dtype in (None, "auto") else dtype
            base = AutoModelForCausalLM.from_pretrained(path, dtype=precision, **kwargs)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            reason = f"{first_line(error)} (base_model= names another place)"
            raise ModelError(f"the base model {path} cannot be loaded: {reason}") from None
        _check_base(str(path), base.config, facts)
        # Earlier exports have no such file.
        if "generation_config" not in kwargs and (place / "generation_config.json").is_file():
            base.generation_config = GenerationConfig.from_pretrained(place)
        injected = inject_adapters(base, CumaConfig(**export["adapters"]))
        model = cls(injected.base_model, injected.config, injected.context)
        model.load_adapter_state(state)
        model.export, model.folder = export, place
        named = export["profiles"].get("encoder")
        encoder = encoder or (moved(named, place) if named else None)
        model.embed_profiles = ProfileReader(export["profiles"], model.config.profile_dim, encoder)
        return model.eval().requires_grad_(False)

    def forward(
        self,
        *args: Any,
        profiles: Sequence[Profile] | None = None,
        profile_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward, see :meth:`CumaModel.forward`.

        Args:
            profiles: one per sequence, or a single one for all of them. Each is a sentence, or fields such as
                ``{"country": "Norway"}``.
            profile_embeddings: [B, P] (or [1, P]) raw sentence embeddings instead of ``profiles``.
        """
        if kwargs.get("profile_index") is None:
            profile_embeddings = self._one_per_row(self._inputs(args, kwargs).shape[0], profiles, profile_embeddings)
        return super().forward(*args, profile_embeddings=profile_embeddings, **kwargs)

    def generate(
        self,
        *args: Any,
        profiles: Sequence[Profile] | None = None,
        profile_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's ``generate``, every prompt with its own profile (arguments as in :meth:`forward`)."""
        profile_embeddings = self._one_per_row(self._inputs(args, kwargs).shape[0], profiles, profile_embeddings)
        return super().generate(*args, profile_embeddings=profile_embeddings, **kwargs)

    def _one_per_row(self, rows: int, profiles: Sequence[Profile] | None, embeddings: Tensor | None) -> Tensor | None:
        if profiles is not None:
            if embeddings is not None:
                raise ModelError("profiles and profile_embeddings were both given; give one of them")
            embeddings = self.embed_profiles(profiles)
        if embeddings is None or embeddings.dim() != 2:
            return embeddings  # refused further down, where the needed shape is known
        if embeddings.shape[0] not in (1, rows):
            given = f"{embeddings.shape[0]} profiles were given for {rows} sequences"
            raise ModelError(f"{given}; give one for each, or a single one for all")
        return embeddings.expand(rows, -1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_model":
                raise
            return getattr(self.base_model, name)

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> None:
        """Write the exported folder again, with the adapters as they are now; the backbone stays where it is.

        Args:
            save_directory: a new folder, or one whose files of the same names are replaced.
            kwargs: of transformers; ``push_to_hub`` and ``state_dict`` are refused, the others decide nothing here.

        Raises:
            ModelError: something is asked for that is not done here.
        """
        if refused := [name for name in ("push_to_hub", "state_dict") if kwargs.get(name)]:
            instead = "it writes an exported folder, which can be uploaded as it is"
            raise ModelError(f"save_pretrained takes no {refused[0]} here: {instead}")
        target = Path(save_directory).expanduser()
        if not target.exists() or not target.samefile(self.folder):
            shutil.copytree(self.folder, target, dirs_exist_ok=True)
        state = {
            name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in self.adapter_state().items()
        }
        save_file(state, target / ADAPTER_WEIGHTS, {"format": "pt"})
        profiles = {**self.export["profiles"], "encoder": self.embed_profiles.encoder_path}
        export = {**self.export, "profiles": profiles, "sha256": file_sha256(target / ADAPTER_WEIGHTS)}
        (target / ADAPTER_CONFIG).write_text(json.dumps(export, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def push_to_hub(self, *_: object, **__: object) -> None:
        """Refused: the backbone's own would upload names that cannot be loaded."""
        how = "(hf upload NAME FOLDER); after save_pretrained, where it was changed"
        raise ModelError(f"an exported folder is uploaded as it is {how}")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing to remember: an exported folder already carries its code."""


def load_exported(folder: str | Path, dtype: torch.dtype | str | None = None, **kwargs: Any) -> CumaForCausalLM:
    """Load an exported folder with the installed package; no code from the folder runs.

    Arguments and errors as in :meth:`CumaForCausalLM.from_pretrained`.
    """
    return CumaForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)


def unknown_fields(profile: Profile, known: Sequence[str]) -> list[str]:
    """One sentence about each field that no training profile had."""
    if isinstance(profile, str) or not known:
        return []
    plain = {name.replace("_", " ").lower() for name in known}
    messages = []
    for name in profile:
        if str(name).replace("_", " ").lower() not in plain:
            guess = nearest(str(name), known)
            what = f"the profile field {str(name)!r} is unknown to this model{guess}"
            messages.append(f"{what}; it was trained with {', '.join(known)}")
    return messages


def read_export(folder: Path) -> Export:
    """``adapter_config.json`` of an exported folder.

    Raises:
        CheckpointError: it is missing, damaged, or of another kind.
    """
    try:
        export = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind = export["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder} is no exported model: {ADAPTER_CONFIG} is missing or damaged") from None
    if kind != "CUMA" or "adapters" not in export:
        hint = "; import it first (--from-reference)" if kind == "CuMA" else ""
        raise CheckpointError(f"{folder} holds adapters of type {kind}, not an export of cuma-ds{hint}")
    if export.get("format_version") != EXPORT_FORMAT:
        raise CheckpointError(
            f"{folder} has export format {export.get('format_version')}; this version reads {EXPORT_FORMAT}"
        )
    if export.get("settings_sha256") not in (None, settings_sha256(export)):  # exports of release 0.1.0 have none
        raise CheckpointError(
            f"{folder} is damaged: {ADAPTER_CONFIG} no longer says how the adapters were trained; export again"
        )
    return export


def settings_sha256(export: Export) -> str:
    """Hash of what decides the answers of an export beside its weights, without places of base model and encoder."""
    profiles = {key: value for key, value in export["profiles"].items() if key != "encoder"}
    return content_sha256([export["adapters"], profiles, export.get("prompt")])


def _export_folder(path: str, hub: Mapping[str, Any]) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(path):
        raise CheckpointError(
            f"there is no exported model at {path}; expected a folder made by launchers/export.py, or a hub id of one"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, **hub))
    except Exception as error:
        raise CheckpointError(
            f"{path} is neither a folder nor an exported model the hub gives us: {first_line(error)}"
        ) from None


def moved(path: str, export: Path) -> str:
    """A folder that is no longer where the export says, but beside the export; else ``path`` as it is."""
    beside = export.resolve().parent / Path(path).name
    return str(beside) if Path(path).is_absolute() and not Path(path).exists() and beside.is_dir() else path


def read_weights(folder: Path, export: Export) -> dict[str, Tensor]:
    """The tensors of an export, as :meth:`CumaModel.load_adapter_state` takes them.

    Raises:
        CheckpointError: they are missing, damaged, or not those that were exported.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{folder} is incomplete: {ADAPTER_WEIGHTS} is missing")
    if file_sha256(file) != export["sha256"]:
        raise CheckpointError(
            f"{file} was changed after the export: its sha256 is not the one in {ADAPTER_CONFIG}; export again"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is no readable safetensors file: {error}") from None


def _check_base(path: str, config: object, facts: Mapping[str, Any]) -> None:
    for name in BASE_FACTS:
        wanted, there = facts.get(name), base_fact(config, name)
        if wanted is not None and there != wanted:
            raise ModelError(
                f"{path} is the wrong base model: its {name} is {there}, the adapters were trained on one with {wanted}"
            )
    known = facts.get("fingerprint")
    if known is None:
        warnings.warn(
            f"this export names no fingerprint of its base model, so that {path} is it cannot be checked", stacklevel=3
        )
    elif change := changed_part(path, known, model_fingerprint(path)):
        raise ModelError(
            f"{change} than the base model these adapters were trained on; name the right one (base_model=, --base)"
        )
