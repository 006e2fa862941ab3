"""Names that DeepSpeed, torch and transformers do not promise stand in the compat files alone, and all are checked."""

from __future__ import annotations

import ast
import importlib.util
import json
import runpy
from pathlib import Path

import deepspeed
import probe_deepspeed
import pytest
import torch
import transformers
from ranks import ROOT, run

from cuma_ds import torch_compat
from cuma_ds.parallel.transformers_compat import WeightNames, keeps_float32

HERE = Path(__file__).parents[1]
COMPAT = {
    "cuma_ds/parallel/deepspeed_compat.py",
    "cuma_ds/parallel/transformers_compat.py",
    "cuma_ds/torch_compat.py",
}
# Modules of DeepSpeed that are public, and modules of the others that are as private as a name with an underscore.
PUBLIC_DEEPSPEED = {"deepspeed", "deepspeed.accelerator"}
PRIVATE_MODULES = (
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "torch.distributed.distributed_c10d",
)
FOREIGN = ("torch", "deepspeed", "transformers")
# Attributes that DeepSpeed gives to parameters, or its optimizers have.
DEEPSPEED_ATTRIBUTES = {
    "ds_id", "ds_numel", "ds_shape", "ds_status", "ds_tensor", "allreduce", "group_name", "bit16_groups",
    "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "has_moe_layers", "release_backward_leftovers",
    "parameter_offload", "ds_inflight_param_registry",
}  # fmt: skip


def sources() -> list[Path]:
    return [file for folder in ("cuma_ds", "launchers", "csrc") for file in sorted((ROOT / folder).rglob("*.py"))]


def is_private_module(module: str) -> bool:
    root, *rest = module.split(".")
    if root == "deepspeed":
        return module not in PUBLIC_DEEPSPEED and module.rpartition(".")[0] not in PUBLIC_DEEPSPEED
    return root in FOREIGN and (module.startswith(PRIVATE_MODULES) or any(part.startswith("_") for part in rest))


def is_private_attribute(text: str, own: set[str]) -> bool:
    root, name = text.split(".")[0], text.split(".")[-1]
    if (
        root == "deepspeed"
        and text.count(".") > 1
        and not text.startswith(("deepspeed.zero.", "deepspeed.accelerator."))
    ):
        return True
    private = name.startswith("_") and not name.startswith("__") and root in {*FOREIGN, "dist", "nn"}
    return name not in own and (private or name in DEEPSPEED_ATTRIBUTES)


def private_names(source: str) -> list[str]:
    """Names in a module that DeepSpeed, torch or transformers may change without notice, as ``line: name``."""
    nodes = list(ast.walk(ast.parse(source)))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    found = []
    for node in nodes:
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"{node.lineno}: {module}" for module in modules if is_private_module(module)]
        if isinstance(node, ast.Attribute) and is_private_attribute(ast.unparse(node), own):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "from deepspeed.runtime.engine import DeepSpeedEngine", "import torch._C",
        "from torch.utils._pytree import tree_leaves",
        "from torch.distributed import distributed_c10d",
        "import transformers.core_model_loading", "torch.cpu._is_amx()",
        "print(parameter.ds_tensor)", "deepspeed.ops.__compatible_ops__", "dist._coalescing_manager()",
    ],
)  # fmt: skip
def test_a_private_name_is_noticed(line) -> None:
    assert private_names(line)


def test_public_names_are_none(tmp_path) -> None:
    lines = (
        "import deepspeed",
        "deepspeed.initialize()",
        "from deepspeed.accelerator import get_accelerator",
        "self._private = torch.nn",
    )
    assert not [line for line in lines if private_names(line)]


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_private_names_of_other_libraries_stand_in_the_compat_files_alone(file) -> None:
    if str(file.relative_to(ROOT)) not in COMPAT:
        assert not private_names(file.read_text()), f"move these to one of {', '.join(sorted(COMPAT))}"


@pytest.fixture(scope="module")
def changed() -> dict[str, str | None]:
    results = run(2, [str(HERE / "helpers" / "probe_deepspeed.py")])
    assert [code for code, _ in results] == [0, 0], results[0][1][-3000:]
    lines = [json.loads(line[5:]) for line in results[0][1].splitlines() if line.startswith("seen ")]
    return {line["name"]: line["changed"] for line in lines}


@pytest.mark.multirank
@pytest.mark.parametrize("name", [check.__name__ for check in probe_deepspeed.CHECKS])
def test_deepspeed_does_what_is_relied_on(name, changed) -> None:
    assert changed[name] is None, f"DeepSpeed {deepspeed.__version__} changed what {name} relies on: {changed[name]}"


@pytest.mark.multirank
def test_a_late_rank_is_waited_for_before_the_limit_is_lowered_and_a_lost_one_is_not_waited_for_longer() -> None:
    (code, first), (_, _) = run(2, [str(HERE / "helpers" / "late_rank.py")])
    assert code == 0, first[-3000:]
    said = json.loads(first.splitlines()[-1])
    changed = f"torch {torch.__version__} changed what limit_waiting relies on"
    assert said["met_the_late_rank"]
    assert said["groups"] == 2
    assert all(2 <= seconds < 10 for seconds in said["waited"]), (
        f"{changed}: a collective failed after {said['waited']} s, not 3"
    )


def test_launchers_have_the_names_by_which_a_rank_knows_them() -> None:
    for name in runpy.run_path(str(ROOT / "launchers" / "_cli.py"))["_LAUNCHERS"]:
        library = name.split(".")[0]
        if name != library:
            assert importlib.util.find_spec(name), f"{library} changed the module of its launcher: there is no {name}"


def test_torch_does_what_is_relied_on() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    changed = f"torch {torch.__version__} changed"
    with FakeTensorMode():
        assert torch_compat.is_fake(torch.ones(2)), f"{changed} the class of tensors that stand for others"
    one, two = torch.ones(2), torch.ones(3)
    found = torch_compat.tensors_in({"a": [one, 3], "b": (two, None)})
    assert [id(tensor) for tensor in found] == [id(one), id(two)], f"{changed} tree_leaves"

    class Counting(torch_compat.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Counting() as mode:
        torch.add(one, one)
    assert mode.calls == 1, f"{changed} TorchDispatchMode"

    linear, ran = torch.nn.Linear(2, 2), []
    handles = [
        linear.register_forward_pre_hook(lambda *_: ran.append("before")),
        linear.register_forward_hook(lambda *_: ran.append("first")),
        linear.register_forward_hook(lambda *_: ran.append("second")),
    ]
    with torch_compat.without_hooks(handles[:2]):
        linear(one)
    assert ran == ["second"], f"{changed} the handles of hooks"
    linear(one)
    assert ran[1:] == ["before", "first", "second"], f"{changed} where a module keeps its hooks"


def test_transformers_does_what_is_relied_on() -> None:
    changed = f"transformers {transformers.__version__} changed"
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    names = WeightNames(gpt2, gpt2.state_dict())
    assert names.of("wte.weight") == ("transformer.wte.weight", False), (
        f"{changed} how keys without a prefix are renamed"
    )
    assert names.of("lm_head.weight") == ("lm_head.weight", False), f"{changed} how keys are renamed"
    assert names.of("nothing")[0] not in gpt2.state_dict(), f"{changed} what unknown keys become"
    sizes = {
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2)
    )
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert WeightNames(mixtral, mixtral.state_dict()).of(key)[1], f"{changed} how it says that weights are converted"
    assert not keeps_float32(gpt2, torch.bfloat16), f"{changed} which weights stay in float32"
    gpt2._keep_in_fp32_modules_strict = ["wte"]
    assert keeps_float32(gpt2, torch.bfloat16), f"{changed} how models name weights that stay in float32"
