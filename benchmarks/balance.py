"""How steadily the balance loss alone keeps experts in use, for several decays: a router of 8 experts, two at first.

The experts stay as they start (B = 0), so that only the balance loss moves the router. AdamW scales any gradient to its
learning rate, so this is the hardest case for shares that lag behind.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cuma_ds.adapters import CumaConfig, inject_adapters

WIDTH = 256


class Linear(nn.Module):
    """A backbone of one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        """The linear's output as a model returns it."""
        return SimpleNamespace(hidden=self.q_proj(inputs_embeds))


def used_experts(config: CumaConfig, mean: float, steps: int) -> list[int]:
    """Experts that get a hundredth of the assignments or more, in every step.

    Args:
        mean: of the inputs' normal distribution (deviation 1); the larger, the more alike all tokens are.
    """
    torch.manual_seed(0)
    model = inject_adapters(Linear(), config).double().train()
    router = {name: parameter for name, parameter in model.adapter_parameters() if ".router." in name}
    with torch.no_grad():
        router["q_proj.router.weight_h"][:2] += 6 / (WIDTH * mean)
    optimizer = torch.optim.AdamW(router.values(), lr=1e-3, weight_decay=0.0)
    generator, used = torch.Generator().manual_seed(1), []
    people_NP = 3 * torch.randn(4, config.profile_dim, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        x = mean + torch.randn(8, 16, WIDTH, generator=generator, dtype=torch.float64)
        asked_B = torch.randint(0, len(people_NP), (len(x),), generator=generator)
        loss = model(inputs_embeds=x, profile_embeddings=people_NP[asked_B]).balance_loss
        statistics = model.routing_statistics()
        assert statistics is not None
        load_E = statistics.load_RE[0]
        used.append(int((load_E >= 0.01 * load_E.sum()).sum()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return used


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decays", nargs="+", type=float, default=[0.0, 0.5, 0.9, 0.98], help="adapters.balance_decay")
    parser.add_argument("--means", nargs="+", type=float, default=[0.5, 1.0], help="means of the inputs")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps; the second half is shown")
    arguments = parser.parse_args()
    table = Table(title=f"experts in use of 8, mean over steps {arguments.steps // 2 + 1} to {arguments.steps}")
    for heading in ("balance_decay", *(f"input mean {mean:g}" for mean in arguments.means)):
        table.add_column(heading, justify="right")
    for decay in arguments.decays:
        config = CumaConfig(num_experts=8, lora_r=2, profile_dim=4, target_modules=("q_proj",), balance_decay=decay)
        late = [used_experts(config, mean, arguments.steps)[arguments.steps // 2 :] for mean in arguments.means]
        table.add_row(f"{decay:g}", *(f"{sum(used) / len(used):.1f}" for used in late))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
