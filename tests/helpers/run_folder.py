"""Run folders as training leaves them, with random adapters, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors.torch import save, save_file

from cuma_ds.adapters import CumaModel, inject_adapters
from cuma_ds.config import RunConfig
from cuma_ds.data import load_data
from cuma_ds.identity import file_sha256
from cuma_ds.inference.modeling import Profile
from cuma_ds.inference.open import Opened
from cuma_ds.learned_settings import fingerprint
from cuma_ds.parallel.backbone import load_backbone
from cuma_ds.parallel.stored import write_start, write_state
from cuma_ds.profiles import ProfileTable, encoder_of, wording_of
from cuma_ds.runs import Run

OPINIONS = Path(__file__).parents[1] / "data" / "opinions.jsonl"


def lively(model: CumaModel, seed: int = 3) -> CumaModel:
    """Give every adapter parameter a value that matters (experts start as zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def content(part: BaseModel) -> dict:
    """A report, or a part of one, as report.json holds it."""
    return part.model_dump(mode="json", exclude_unset=True)


@torch.no_grad()
def next_logits(opened: Opened, ids: list[int], profile: Profile | None = None) -> torch.Tensor:
    """Logits [V] of the token after ``ids``: one whole forward, no cache, no batch, no padding."""
    who = {} if profile is None else {"profile_embeddings": opened.reader([profile])}
    return opened.model(torch.tensor([ids]), **who).logits[0, -1]


def make_run(
    folder: Path,
    backbone: Path,
    encoder: Path,
    adapters: dict,
    constant_routing: bool = False,
    source: Path = OPINIONS,
    start: dict[str, torch.Tensor] | None = None,
    **sections: dict,
) -> tuple[Path, CumaModel, ProfileTable | None]:
    """Write a run of one checkpoint.

    Args:
        adapters: section of the recipe, on top of 4 experts, top 2, rank 2 beside q_proj and v_proj.
        constant_routing: routers do not look at the token.
        source: answers, conversations or preferences as JSON lines.
        start: adapters that the run started from, as ``CumaModel.adapter_state`` returns them.
        sections: further sections of the recipe.

    Returns:
        The folder, the model it holds, and its embedded profiles (None for methods without).
    """
    plain = {"num_experts": 4, "top_k": 2, "lora_r": 2, "target_modules": ["q_proj", "v_proj"]}
    values = {
        "run": {"name": folder.name, "output_dir": str(folder.parent)},
        "model": {"path": str(backbone), "dtype": "float32"},
        "profiles": {"encoder": str(encoder)},
        "adapters": plain | adapters,
        "data": {"source": "jsonl", "path": str(source), "test_fraction": 0.4},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    config = RunConfig.model_validate(values)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    data = load_data(config.data, wording_of(config.profiles)).save(folder / "data")
    table = None
    if config.adapters.uses_profiles:
        table = ProfileTable.build(data.sentences, encoder_of(config.profiles), folder.parent / "cache")
        table.save(folder / "profiles.safetensors")
    width = table.embeddings.shape[1] if table is not None else 0
    model = lively(
        inject_adapters(load_backbone(config.model), config.adapters.model_copy(update={"profile_dim": width}))
    )
    if table is not None:
        model.set_profile_standardisation(table.embeddings, 3.0)
    if constant_routing:
        with torch.no_grad():
            for name, parameter in model.adapter_parameters():
                if name.endswith("router.weight_h"):
                    parameter.zero_()
    if start is not None:
        write_start(folder / "start", save({f"param/{name}": tensor for name, tensor in start.items()}))
        config = config.model_copy(update={"model": config.model.model_copy(update={"init_from": "elsewhere"})})
    checkpoint = folder / "checkpoints" / "step-7"
    Run(folder).record_identity(config, data, table)
    checkpoint.mkdir(parents=True)
    save_file(
        {f"param/{name}": tensor.clone() for name, tensor in model.adapter_state().items()},
        checkpoint / "shared.safetensors",
    )
    state = {"step": 7, "fingerprint": fingerprint(config), "identity": Run(folder).identity()}
    write_state(checkpoint, state, {"shared.safetensors": file_sha256(checkpoint / "shared.safetensors")})
    (folder / "checkpoints" / "latest").write_text("step-7\n")
    return folder, model, table
