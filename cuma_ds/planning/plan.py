"""What a run will need on a cluster, from shapes alone: memory per GPU, bytes on the wire, tokens per second."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from torch import nn
from transformers import PretrainedConfig

from cuma_ds.config import NOTHING_TRAINS, RunConfig
from cuma_ds.errors import ConfigError, TopologyError
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.planning.activations import ActivationPeak, Live, activation_peaks
from cuma_ds.planning.cost import Hardware, Layout, Sizes, Weight, Work, overlapped
from cuma_ds.planning.skeleton import Setup, gathered_parameters


@dataclass(frozen=True)
class Plan:
    """The prediction for one cluster size.

    shards: ranks that hold one copy of the backbone between them.  memory: bytes per GPU by purpose.  host_memory:
    bytes per rank that offloading puts into CPU memory.  wire: bytes one rank sends per optimizer step, by purpose and
    collective.  links: those of backbone and experts, by link.  dispatch: what ``parallel.dispatch`` comes to.
    seconds: of one step, by part.  max_micro_batch: most sequences of this length per forward that fit; 0 when not
    even one does.
    """

    gpus: int
    shards: int
    quantisation: str
    ep_size: int
    memory: dict[str, int]
    host_memory: dict[str, int]
    wire: dict[str, int]
    links: dict[str, int]
    dispatch: str
    seconds: dict[str, float]
    max_micro_batch: int
    fits: bool
    trained_parameters: int
    backbone_parameters: int
    work: dict[str, int]

    @property
    def total_memory(self) -> int:
        """Bytes per GPU at the peak."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """Of one step in which nothing overlaps."""
        return sum(self.seconds.values())

    @property
    def overlapped_seconds(self) -> float:
        """Of one step in which the backbone is gathered while layers compute."""
        return overlapped(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs, where nothing overlaps."""
        return self._tokens / self.step_seconds

    @property
    def overlapped_tokens_per_second(self) -> float:
        """Of all GPUs, where the backbone is gathered while layers compute."""
        return self._tokens / self.overlapped_seconds

    @property
    def _tokens(self) -> int:
        work = self.work
        return work["sequences"] * work["length"] * work["accumulation"] * self.gpus

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        computed = ("step_seconds", "overlapped_seconds", "tokens_per_second", "overlapped_tokens_per_second")
        sums = {"total_memory": self.total_memory, "total_wire": sum(self.wire.values())}
        return {**asdict(self), **sums, **{name: getattr(self, name) for name in computed}}


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
        self._peaks: dict[tuple[int, int], dict[Live, ActivationPeak]] = {}

    def plan(self, gpus: int, work: Work, hardware: Hardware) -> Plan:
        """Memory, bytes and speed on ``gpus`` ranks.

        Raises:
            TopologyError: ``ep_size`` does not divide the number of GPUs, or the shard group not the machines.
            ConfigError: the DeepSpeed configuration cannot be read or cannot hold the combination.
        """
        return self.plan_layout(self.layout(gpus, work, hardware), hardware)

    def plan_layout(self, layout: Layout, hardware: Hardware) -> Plan:
        """The same, of one that :meth:`layout` gave, possibly changed since."""
        work, held = layout.work, layout.held()
        host = {name: held.pop(name) for name in layout.on_host()}
        lines = self._activations(layout)
        memory = {**held, "activations": max(0, *(round(line.at(work.sequences)) for line in lines))}
        room = hardware.memory - hardware.reserved - sum(held.values())
        fitting = [int((room - line.fixed) // line.per_sequence) for line in lines if line.per_sequence > 0]
        return Plan(
            gpus=layout.gpus,
            shards=layout.shards,
            quantisation=layout.config.model.quantisation,
            ep_size=layout.ep_size,
            memory=memory,
            host_memory=host,
            wire=layout.wire(),
            links=layout.links(),
            dispatch=layout.dispatch,
            seconds=layout.seconds(hardware),
            max_micro_batch=max(0, min(fitting, default=0)),
            fits=sum(memory.values()) + hardware.reserved <= hardware.memory,
            trained_parameters=self.sizes.shared + self.sizes.expert,
            backbone_parameters=self.sizes.backbone_parameters,
            work=asdict(work),
        )

    def layout(self, gpus: int, work: Work, hardware: Hardware, config: RunConfig | None = None) -> Layout:
        """The recipe on ``gpus`` ranks, or one that has the same shapes (errors as in :meth:`plan`)."""
        config = config or self.config
        ep_size = config.parallel.ep_size
        if gpus < 1 or gpus % ep_size:
            raise TopologyError(
                f"parallel.ep_size is {ep_size}, which does not divide {gpus} GPUs; allowed: multiples of {ep_size}"
            )
        settings = read_deepspeed_config(config, work.sequences, work.accumulation, gpus)
        return Layout(self.sizes, config, settings, hardware.machines(gpus), work)

    def _activations(self, layout: Layout) -> list[ActivationPeak]:
        """Peaks of a layout besides what it holds, which includes the largest live weight; the highest one counts."""
        key = (layout.work.length, layout.work.kept)
        if key not in self._peaks:
            self._peaks[key] = activation_peaks(self.setup, *key)
        moved, largest = layout.dispatch_memory(), layout.largest_live()
        return [
            ActivationPeak(peak.fixed + layout.live(weights) - largest, peak.per_sequence + moved)
            for weights, peak in self._peaks[key].items()
        ]


def _sizes(setup: Setup) -> Sizes:
    """Count a model's parameters."""
    model, packable = setup.build_packable()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [one.parameter for one in model.trained_parameters()]
    numbers = Counter({"replicated": 0, "per_expert": 0})
    for _, parameter, placement, _ in model.trained_parameters():
        numbers[placement] += parameter.numel()
    layers = tuple(model.expert_shapes())
    multiplied, trained_multiplied = (_multiplied(some, model.backbone) for some in (frozen, trained))

    def weights(parameters: list[nn.Parameter]) -> Counter[Weight]:
        return Counter(Weight.of(parameter, setup.dtype, packable) for parameter in parameters)

    return Sizes(
        backbone=weights(frozen),
        gathered=weights(gathered_parameters(setup, model)),
        itemsize=setup.dtype.itemsize,
        shared=numbers["replicated"],
        expert=numbers["per_expert"],
        layers=layers,
        active=setup.config.adapters.active_experts,
        trained_itemsize=max((parameter.itemsize for parameter in trained), default=4),
        largest_trained=max((parameter.numel() for parameter in trained), default=0),
        multiplied=multiplied,
        trained_multiplied=trained_multiplied,
        # Causal: half of 4 S D per token and layer.
        attention=2 * setup.text.num_hidden_layers * setup.text.hidden_size,
    )


def _multiplied(parameters: list[nn.Parameter], backbone: nn.Module) -> int:
    """Numbers of matrices that each token is multiplied with.

    An input embedding is looked up. A tied one is multiplied as the head.
    """
    embedding = backbone.get_input_embeddings()  # type: ignore[operator]
    head = backbone.get_output_embeddings()  # type: ignore[operator]
    looked_up = None if head is not None and head.weight is embedding.weight else embedding.weight
    return sum(p.numel() for p in parameters if p.dim() >= 2 and p is not looked_up)
