"""``python tests/helpers/on_device.py RUN FOLDER``: train, evaluate, ask, serve and export on a device that is no CPU.

What is left on the CPU by mistake meets a tensor of the device and raises, as on a GPU (see pretend_device.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pretend_device import DEVICE, OnDevice
from run_folder import content, lively
from torch import Tensor

# Wrappers cannot see through tensors that were made in inference mode.
torch.inference_mode = torch.no_grad  # type: ignore[assignment,misc]

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters  # noqa: E402
from cuma_ds.config import ModelSection  # noqa: E402
from cuma_ds.data.batch import EncodedExample, collate  # noqa: E402
from cuma_ds.evaluation.gradients import Interference  # noqa: E402
from cuma_ds.evaluation.run import evaluate  # noqa: E402
from cuma_ds.evaluation.subject import run_subject  # noqa: E402
from cuma_ds.export.lora import write_lora  # noqa: E402
from cuma_ds.inference.open import open_run  # noqa: E402
from cuma_ds.inference.running import ModelForward, RunningBatch  # noqa: E402
from cuma_ds.inference.sampling import Sampler, Sampling, next_tokens  # noqa: E402
from cuma_ds.inference.talk import Talker  # noqa: E402
from cuma_ds.methods.cuma import model_inputs  # noqa: E402
from cuma_ds.parallel.backbone import load_backbone  # noqa: E402
from cuma_ds.profiles import ProfileTable  # noqa: E402
from cuma_ds.training.objectives.sft import label_losses  # noqa: E402

CPU = torch.device("cpu")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"router": "linear", "gate_norm": "softmax_topk"},
    {"gate_norm": "softmax"},
    {"gradient_mask": "dominant", "shared_a": True},
    {"method": "hydralora", "profile_dim": 0},
    {"method": "lora", "num_experts": 1, "top_k": 1, "profile_dim": 0},
    {"num_experts": 64, "lora_r": 32},
]


def same(name: str, on_device: Any, on_cpu: Any) -> None:
    """Equal numbers, to what sums in another order may differ by."""
    torch.testing.assert_close(
        torch.as_tensor(on_device), torch.as_tensor(on_cpu), rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}"
    )
    print("same:", name)


def gradients(base: ModelSection, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Of one batch with padding, for every adapter parameter; on the CPU."""
    config = CumaConfig(
        **{"num_experts": 4, "top_k": 2, "lora_r": 4, "target_modules": ("q_proj", "v_proj"), "profile_dim": 16}
        | options
    )
    model: CumaModel = lively(inject_adapters(load_backbone(base, device).to(dtype), config)).train()
    generator = torch.Generator().manual_seed(1)
    table = ProfileTable(["a", "b", "c"], torch.randn(3, 16, generator=generator), "") if config.profile_dim else None
    if table is not None:
        model.set_profile_standardisation(table.embeddings, 3.0)
    rows = [EncodedExample(list(range(3, 9 + n)), [4 + n], [7], [1.0], n % 3) for n in range(4)]
    batch = collate(rows, 0)
    mask = torch.rand(3, config.num_experts, generator=generator) if not options else None
    out = model(**model_inputs(batch, table, device, mask))
    loss = label_losses(out.logits, batch.targets.to(device)).sum()
    (loss + getattr(out, "balance_loss", 0.0)).backward()
    found = [parameter.grad for _, parameter in model.adapter_parameters()]
    assert all(isinstance(gradient, OnDevice) == (device != CPU) for gradient in found)
    return [gradient.cpu() for gradient in found if gradient is not None]


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.float().flatten() for gradient in gradients])


def asked(run: Path) -> list[Any]:
    """Answers, choices and routing of three people, then the same people in the server's batch."""
    opened = open_run(run)
    talker = Talker(opened, Sampling(max_new_tokens=6))
    people = [{"country": country} for country in ("Norway", "Ghana", "Japan")]
    messages = [{"role": "user", "content": "Can people be trusted?"}]
    found: list[Any] = [
        talker.answers(messages, people),
        talker.choose("Which?", ["this", "that"], people),
        talker.gates(messages, people),
    ]
    profiles = opened.reader([f"A person from {country}." for country in ("Norway", "Ghana", "Japan")])
    batch = RunningBatch(ModelForward(opened.model), 0)
    samplers = [Sampler(), Sampler(temperature=0.7, seed=5), Sampler(temperature=1.1, top_p=0.9, seed=6)]
    tokens = next_tokens(batch.join([[5, 6, 7], [8, 9]], profiles[:2]), samplers[:2])
    tokens += next_tokens(batch.join([[10]], profiles[2:]), samplers[2:])
    tokens = next_tokens(batch.step(tokens), samplers)
    batch.keep([0, 2])
    return [*found, tokens, next_tokens(batch.step([tokens[0], tokens[2]]), [samplers[0], samplers[2]])]


def judged(run: Path, out: Path) -> list[list[float]]:
    """The numbers of a report with gradients, by split and row."""
    report = evaluate(run_subject(run), out / "report", extras=[Interference(groups=3, examples=4)])
    splits = content(report)["splits"]
    rows = [row for split in sorted(splits) for _, row in sorted(splits[split]["rows"].items())]
    numbers = [[value for _, value in sorted(row.items()) if isinstance(value, float)] for row in rows]
    lora = write_lora(run, [{"country": "Norway"}, {"country": "Ghana"}], out / "lora", prompts=8)
    return [
        *numbers,
        *([value for _, value in sorted(row.items()) if isinstance(value, float)] for row in lora["profiles"]),
    ]


def main() -> None:
    """Compare everything."""
    run, folder = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((folder / "model.json").read_text())
    base = ModelSection(path=config["path"], dtype="float32")
    for options in VARIANTS:
        with mock.patch(
            "torch.cpu._is_amx_tile_supported", return_value=True
        ):  # or the CPU would multiply bfloat16 in float32
            (exact, moved), (moved_rounded, rounded) = (
                [flat(gradients(base, options, dtype, device)) for device in places]
                for dtype, places in ((torch.float32, (CPU, DEVICE)), (torch.bfloat16, (DEVICE, CPU)))
            )
        assert (moved - exact).norm() <= 1e-4 * exact.norm(), (options, (moved - exact).norm(), exact.norm())
        # In 16 bits two orders of sums differ by a tenth of these gradients, or less than one is away from float32.
        most = max((rounded - exact).norm(), 0.1 * rounded.norm())
        assert (moved_rounded - rounded).norm() <= most, (options, (moved_rounded - rounded).norm(), most)
        print("same: gradients", options)
    here = {"asked": asked(run), "judged": judged(run, folder / "cpu")}
    plain = load_backbone

    def on_device(model: ModelSection, device: torch.device | None = None) -> Any:
        return plain(model, DEVICE)

    with mock.patch("cuma_ds.inference.open.load_backbone", on_device):
        there = {"asked": asked(run), "judged": judged(run, folder / "device")}
    for number, (one, other) in enumerate(zip(there["asked"], here["asked"], strict=True)):
        if isinstance(one, Tensor) or isinstance(one[0], list):
            same(f"asked {number}", one, other)
        else:
            assert one == other, (one, other)
    for number, (one, other) in enumerate(zip(there["judged"], here["judged"], strict=True)):
        same(f"judged {number}", one, other)


if __name__ == "__main__":
    main()
