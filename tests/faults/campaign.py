"""Many random faults, each followed by the same command again; prints what docs/reliability.md shows.

    python tests/faults/campaign.py kills --number 60
    python tests/faults/campaign.py disk --number 120
    python tests/faults/campaign.py starts --number 20

Everything happens in a temporary folder, on tiny random models and two ranks. Cases are drawn with a seed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

HELPERS = Path(__file__).parents[1] / "helpers"
sys.path[:0] = [str(HELPERS), str(HELPERS.parent), str(HELPERS.parents[1])]

import conftest  # noqa: E402
import torch  # noqa: E402
from commands import TRAIN, all_tensors  # noqa: E402
from ranks import finish, start  # noqa: E402
from small_runs import recipe  # noqa: E402

from cuma_ds.config import RunConfig, load_config  # noqa: E402
from cuma_ds.errors import CumaError  # noqa: E402
from cuma_ds.parallel.stored import check_checkpoint, newest_whole  # noqa: E402
from cuma_ds.run_status import problems  # noqa: E402
from cuma_ds.runs import Run  # noqa: E402
from cuma_ds.training.inputs import prepare_run  # noqa: E402

HELPER = str(HELPERS / "with_fault.py")
TIMEOUT = 30
PLACES = {
    "preparation": ["cuma_ds.training.inputs:check_prompts", "cuma_ds.training.inputs:load_inputs"],
    "loading": ["cuma_ds.parallel.engine:place_model"],
    "forward": ["cuma_ds.parallel.engine:AdapterEngine.forward"],
    "dispatch": ["cuma_ds.parallel.dispatch:CheaperDispatch.dispatch"],
    "update": ["cuma_ds.parallel.engine:AdapterEngine.step"],
    "checkpoint": ["cuma_ds.parallel.checkpoint:save_file", "cuma_ds.parallel.checkpoint:write_state",
                   "cuma_ds.parallel.checkpoint:move_folder", "cuma_ds.parallel.checkpoint:remove_folder"],
}  # fmt: skip
ONCE = {"preparation", "loading"}
ON_MAIN = {"check_prompts", "write_state", "move_folder", "remove_folder"}


class Models:
    """The tiny models of the tests, in a folder of this process."""

    def __init__(self, folder: Path) -> None:
        class Factory:
            def mktemp(self, name: str) -> Path:
                (folder / name).mkdir(exist_ok=True)
                return folder / name

        self.llama = conftest.tiny_llama.__wrapped__(Factory())
        self.encoder = conftest.tiny_encoder.__wrapped__(Factory())


def small(folder: Path, models: Models, name: str = "run") -> Path:
    parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2, "timeout_seconds": TIMEOUT}
    return recipe(
        folder, models.llama, models.encoder, name, parallel=parallel, checkpoint={"every": 2, "keep_last": 2}
    )


def trained(path: Path) -> dict[str, torch.Tensor]:
    folder, _ = newest_whole(Run(load_config(path).run_dir).checkpoints)
    assert folder.name == "step-6", folder
    return all_tensors(folder)


def train(path: Path, what: dict | None = None) -> list[tuple[int | None, str]]:
    command = [TRAIN, "--config", str(path)]
    return finish(start(2, command if what is None else [HELPER, json.dumps(what), *command]), timeout=900)


def draw(generator: random.Random) -> tuple[str, str, dict]:
    """Where, what, and both as :mod:`with_fault` takes them."""
    where = generator.choice(list(PLACES))
    function = generator.choice(PLACES[where])
    sign = generator.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1"])
    calls = {"checkpoint": 3, "dispatch": 40}.get(where, 6)
    what = {"function": function, "do": sign, "call": 1 if where in ONCE else generator.randint(1, calls)}
    on_main = function.split(":")[1] in ON_MAIN
    ranks = [0] if on_main else generator.choice([[0], [1], [0, 1]])
    return where, f"{sign} {'all' if len(ranks) == 2 else 'one'}", {**what, "ranks": ranks}


def kills(number: int, seed: int, folder: Path) -> None:
    """Random faults in random places."""
    models, generator = Models(folder), random.Random(seed)
    assert [code for code, _ in train(small(folder, models, "quiet"))] == [0, 0]
    expected, counts = trained(folder / "quiet.yaml"), collections.Counter[str]()
    longest, different, codes = 0.0, 0, collections.Counter[str]()
    for case in range(number):
        where, what, fault = draw(generator)
        path = small(folder, models, f"case{case}")
        began = time.monotonic()
        results = train(path, fault)
        seconds = time.monotonic() - began
        longest = max(longest, seconds)
        again = train(path)
        same = [code for code, _ in again] == [0, 0]
        if same:
            found = trained(path)
            same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        different += not same
        ended = sorted({code for code, _ in results if code is not None})
        counts[where] += 1
        codes[f"{what.split()[0]} -> {ended}"] += 1
        print(f"{case}: {what} in {where} ({fault['function']}, call {fault['call']}): {ended}, {seconds:.0f} s, "
              f"{'as undisturbed' if same else 'DIFFERENT'}", flush=True)  # fmt: skip
        if not same:
            print(results, again, flush=True)
        shutil.rmtree(load_config(path).run_dir)
    print(json.dumps({"cases": number, "different": different, "longest_seconds": round(longest), **counts}))
    print(json.dumps(dict(codes)))


def starts(number: int, seed: int, folder: Path) -> None:
    """Two starts of one run at once."""
    models = Models(folder)
    one_trained = one_refused = 0
    for case in range(number):
        path = small(folder, models, f"case{case}")
        command = [TRAIN, "--config", str(path)]
        both = [start(2, command) for _ in range(2)]
        results = [finish(ranks, timeout=900) for ranks in both]
        codes = sorted([code for code, _ in one] for one in results)
        refused = next((one for one in results if one[0][0] == 2), [(None, "")])
        said = [line for _, output in refused for line in output.splitlines() if "is in use by" in line]
        one_trained += codes[0] == [0, 0]
        one_refused += codes[1] == [2, 2] and len(said) == 1
        print(f"{case}: {codes} {said}", flush=True)
        shutil.rmtree(load_config(path).run_dir)
    print(json.dumps({"cases": number, "one_trained": one_trained, "the_other_says_who": one_refused}))


def damages(run_dir: Path, generator: random.Random) -> tuple[str, Path, Callable[[], object]]:
    """A kind of damage, the file it befalls, and what does it."""
    files = [file for file in run_dir.rglob("*") if file.is_file() and file.stat().st_size > 0]
    files = [file for file in files if file.suffix in (".safetensors", ".json", ".arrow") or file.name == "latest"]
    files = [file for file in files if file.name not in ("deepspeed.json", "outcome.json")]
    kind = generator.choice(["flipped", "truncated", "emptied", "missing", "swapped"])
    file = generator.choice(sorted(files))
    content = bytearray(file.read_bytes())
    if kind == "flipped":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        return kind, file, lambda: file.write_bytes(bytes(content))
    if kind == "truncated":
        return kind, file, lambda: file.write_bytes(bytes(content[: generator.randrange(1, len(content))]))
    if kind == "emptied":
        return kind, file, lambda: file.write_bytes(b"")
    if kind == "missing":
        return kind, file, file.unlink
    others = [other for other in files if other.suffix == file.suffix and other.read_bytes() != bytes(content)]
    if not others:
        return "emptied", file, lambda: file.write_bytes(b"")
    other = generator.choice(sorted(others))
    return kind, file, lambda: shutil.copyfile(other, file)


def disk(number: int, seed: int, folder: Path) -> None:
    """Damaged run folders: is it noticed and named, and what does the run go on from?"""
    models, generator = Models(folder), random.Random(seed)
    path = small(folder, models)
    assert [code for code, _ in train(path)] == [0, 0]
    whole = load_config(path).run_dir
    counts: collections.Counter[str] = collections.Counter()
    unnoticed = fell_back = needed = 0
    for case in range(number):
        config = load_config(path, [f"run.output_dir={folder / f'disk{case}'}"])
        shutil.copytree(whole, config.run_dir)
        kind, file, befall = damages(config.run_dir, generator)
        inside = file.relative_to(config.run_dir)
        befall()
        said, used = complaints(config)
        counts[kind] += 1
        in_newest = "step-6" in inside.parts
        needed += in_newest
        fell_back += in_newest and used == "step-4"
        harmless = inside.name == "latest" and kind == "missing"  # people alone read it
        noticed = harmless or any(part in said for part in (inside.name, inside.parent.name))
        unnoticed += not noticed
        print(f"{case}: {kind} {inside}: {said[:110] or 'nothing'}; goes on from {used}", flush=True)
        shutil.rmtree(config.run_dir.parent)
    print(json.dumps({"cases": number, "unnoticed": unnoticed, "newest_damaged": needed,
                      "went_on_from_the_one_before": fell_back, **counts}))  # fmt: skip


def complaints(config: RunConfig) -> tuple[str, str]:
    """What a start and status.py --verify say, and the checkpoint that a start goes on from."""
    said, run, used = [], Run(config.run_dir), "none"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            prepare_run(config)
            newest, _ = newest_whole(run.checkpoints)
            check_checkpoint(newest, run.known_fingerprints(config), run.identity())
            used = newest.name
        except CumaError as error:
            said.append(str(error))
        with contextlib.suppress(CumaError):
            said += list(problems(run))
    return " | ".join([*said, *(str(one.message) for one in told if str(config.run_dir) in str(one.message))]), used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "disk", "starts"])
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    work = {"kills": kills, "disk": disk, "starts": starts}[arguments.what]
    with tempfile.TemporaryDirectory() as folder:
        work(arguments.number, arguments.seed, Path(folder))


if __name__ == "__main__":
    main()
