"""What a run will need on a cluster, from shapes alone: memory per GPU, bytes on the wire, tokens per second."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from torch import nn
from transformers import PretrainedConfig

from cuma_ds.config import NOTHING_TRAINS, RunConfig
from cuma_ds.errors import ConfigError, TopologyError
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.planning.activations import ActivationPeak, activation_peak
from cuma_ds.planning.cost import Hardware, Layout, Sizes, Work
from cuma_ds.planning.skeleton import Setup, gathered_parameters


@dataclass(frozen=True)
class Plan:
    """The prediction for one cluster size.

    memory: bytes per GPU by purpose.  host_memory: bytes per rank that offloading puts into CPU memory.  wire: bytes
    one rank sends per optimizer step, by purpose and collective.  dispatch: what ``parallel.dispatch`` comes to.
    seconds: of one step, by part.  max_micro_batch: most sequences of this length per forward that fit; 0 when not
    even one does.
    """

    gpus: int
    memory: dict[str, int]
    host_memory: dict[str, int]
    wire: dict[str, int]
    dispatch: str
    seconds: dict[str, float]
    tokens_per_second: float
    max_micro_batch: int
    fits: bool
    trained_parameters: int
    backbone_parameters: int
    work: dict[str, int]

    @property
    def total_memory(self) -> int:
        """Bytes per GPU at the peak."""
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        return {**asdict(self), "total_memory": self.total_memory, "total_wire": sum(self.wire.values())}


class Planner:
    """Predicts runs of one recipe on one backbone shape. Shapes are traced once; any number of cluster sizes follow.

    Args:
        config: the recipe; its ``model.path`` is not read.
        model_config: the backbone's configuration.
        profile_dim: P, width of the profile embeddings.

    Raises:
        ConfigError: the recipe's method trains nothing.
        ModelError: no causal language model has this configuration, or the recipe's targets match nothing.
    """

    def __init__(self, config: RunConfig, model_config: PretrainedConfig, profile_dim: int) -> None:
        if config.adapters.method in NOTHING_TRAINS:
            raise ConfigError(f"adapters.method {config.adapters.method} trains nothing; there is nothing to plan")
        self.config = config
        width = profile_dim if config.adapters.uses_profiles else 0
        adapters = config.adapters.model_copy(update={"profile_dim": width})
        self.setup = Setup(model_config, config.model_copy(update={"adapters": adapters}))
        self.sizes = _sizes(self.setup)
        self._peaks: dict[tuple[int, int], ActivationPeak] = {}

    def plan(self, gpus: int, work: Work, hardware: Hardware) -> Plan:
        """Memory, bytes and speed on ``gpus`` ranks.

        Raises:
            TopologyError: ``ep_size`` does not divide the number of GPUs.
            ConfigError: the DeepSpeed configuration cannot be read or cannot hold the combination.
        """
        layout = self.layout(gpus, work)
        held = layout.held()
        host = {name: held.pop(name) for name in layout.on_host()}
        peak, extra = self._peak(work), layout.dispatch_memory()
        memory = {**held, "activations": peak.bytes(work.sequences) + extra * work.sequences}
        room = hardware.memory - hardware.reserved - sum(held.values()) - peak.fixed
        per_sequence = peak.per_sequence + extra
        seconds = layout.seconds(hardware)
        return Plan(
            gpus=gpus,
            memory=memory,
            host_memory=host,
            wire=layout.wire(),
            dispatch=layout.dispatch,
            seconds=seconds,
            tokens_per_second=work.tokens * work.accumulation * gpus / sum(seconds.values()),
            max_micro_batch=max(0, int(room // per_sequence)) if per_sequence > 0 else 0,
            fits=sum(memory.values()) + hardware.reserved <= hardware.memory,
            trained_parameters=self.sizes.shared + self.sizes.expert,
            backbone_parameters=sum(self.sizes.backbone),
            work=asdict(work),
        )

    def layout(self, gpus: int, work: Work) -> Layout:
        """The recipe on ``gpus`` ranks (errors as in :meth:`plan`)."""
        ep_size = self.config.parallel.ep_size
        if gpus < 1 or gpus % ep_size:
            raise TopologyError(
                f"parallel.ep_size is {ep_size}, which does not divide {gpus} GPUs; allowed: multiples of {ep_size}"
            )
        settings = read_deepspeed_config(self.config, work.sequences, work.accumulation, gpus)
        return Layout(self.sizes, self.config, settings, gpus, work)

    def _peak(self, work: Work) -> ActivationPeak:
        key = (work.length, work.kept)
        if key not in self._peaks:
            self._peaks[key] = activation_peak(self.setup, *key)
        return self._peaks[key]


def _sizes(setup: Setup) -> Sizes:
    """Count a model's parameters."""
    model = setup.build()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = Counter({"replicated": 0, "per_expert": 0})
    for _, parameter, placement, _ in model.trained_parameters():
        trained[placement] += parameter.numel()
    return Sizes(
        backbone=_counts(frozen),
        gathered=_counts(gathered_parameters(setup)),
        itemsize=setup.dtype.itemsize,
        shared=trained["replicated"],
        expert=trained["per_expert"],
        layers=tuple(model.expert_shapes()),
        active=setup.config.adapters.active_experts,
        trained_itemsize=max((one.parameter.itemsize for one in model.trained_parameters()), default=4),
        largest=max(parameter.numel() for parameter in model.parameters()),
        multiplied=_multiplied(frozen, model.backbone),
        trained_multiplied=_multiplied([one.parameter for one in model.trained_parameters()], model.backbone),
        # Causal: half of 4 S D per token and layer.
        attention=2 * setup.text.num_hidden_layers * setup.text.hidden_size,
    )


def _counts(parameters: list[nn.Parameter]) -> tuple[int, ...]:
    return tuple(parameter.numel() for parameter in parameters)


def _multiplied(parameters: list[nn.Parameter], backbone: nn.Module) -> int:
    """Numbers of matrices that each token is multiplied with.

    An input embedding is looked up. A tied one is multiplied as the head.
    """
    embedding = backbone.get_input_embeddings()  # type: ignore[operator]
    head = backbone.get_output_embeddings()  # type: ignore[operator]
    looked_up = None if head is not None and head.weight is embedding.weight else embedding.weight
    return sum(p.numel() for p in parameters if p.dim() >= 2 and p is not looked_up)
