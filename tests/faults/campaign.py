"""Many random faults, each followed by the same command again; prints what docs/reliability.md shows.

    python tests/faults/campaign.py kills --number 60
    python tests/faults/campaign.py disk --number 120
    python tests/faults/campaign.py starts --number 20
    python tests/faults/campaign.py malformed --number 400
    python tests/faults/campaign.py malformed-on-two-ranks --number 60

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
import warnings
from collections.abc import Callable
from pathlib import Path

HELPERS = Path(__file__).parents[1] / "helpers"
sys.path[:0] = [str(Path(__file__).parent), str(HELPERS), str(HELPERS.parent), str(HELPERS.parents[1])]

from campaigns import Cases, Models, small, train  # noqa: E402
from commands import TRAIN  # noqa: E402
from kills import kills  # noqa: E402
from ranks import finish, start  # noqa: E402
from refusals import on_two_ranks, refusals  # noqa: E402

from cuma_ds.config import RunConfig  # noqa: E402
from cuma_ds.errors import CumaError  # noqa: E402
from cuma_ds.parallel.stored import check_checkpoint, newest_whole  # noqa: E402
from cuma_ds.recipe import load_config  # noqa: E402
from cuma_ds.run_status import problems  # noqa: E402
from cuma_ds.runs import Run  # noqa: E402
from cuma_ds.training.inputs import prepare_run  # noqa: E402


def starts(cases: Cases, seed: int, folder: Path) -> None:
    """Two starts of one run at once."""
    models = Models(folder)
    for case in cases.left():
        path = small(folder, models, f"case{case}")
        command = [TRAIN, "--config", str(path)]
        both = [start(2, command) for _ in range(2)]
        results = [finish(ranks, timeout=900) for ranks in both]
        codes = sorted([code for code, _ in one] for one in results)
        refused = next((one for one in results if one[0][0] == 2), [(None, "")])
        said = [line for _, output in refused for line in output.splitlines() if "is in use by" in line]
        cases.add(case, codes=codes, said=said)
        shutil.rmtree(load_config(path).run_dir)
    rows = cases.done.values()
    one_trained = sum(row["codes"][0] == [0, 0] for row in rows)
    one_refused = sum(row["codes"][1] == [2, 2] and len(row["said"]) == 1 for row in rows)
    print(json.dumps({"cases": len(rows), "one_trained": one_trained, "the_other_says_who": one_refused}))


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


def disk(cases: Cases, seed: int, folder: Path) -> None:
    """Damaged run folders: is it noticed and named, and what does the run go on from?"""
    models, generator = Models(folder), random.Random(seed)
    path = small(folder, models)
    assert [code for code, _ in train(path)] == [0, 0]
    whole = load_config(path).run_dir
    counts: collections.Counter[str] = collections.Counter()
    unnoticed = fell_back = needed = 0
    for case in range(cases.number):  # one draw after the other: this campaign has no slices
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
    print(json.dumps({"cases": cases.number, "unnoticed": unnoticed, "newest_damaged": needed,
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


CAMPAIGNS = {
    "kills": kills,
    "disk": disk,
    "starts": starts,
    "malformed": refusals,
    "malformed-on-two-ranks": on_two_ranks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(CAMPAIGNS))
    parser.add_argument("--number", type=int, required=True, help="of cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, metavar="FILE", help="keeps what came of cases; goes on from there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        CAMPAIGNS[arguments.what](Cases(arguments.results, arguments.number), arguments.seed, Path(folder))


if __name__ == "__main__":
    main()
