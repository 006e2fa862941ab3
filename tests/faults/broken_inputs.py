"""Malformed recipes, data, checkpoints, profiles, models, calls and environments: each by name, with what it changes.

A case changes a copy of a small world and names a command. The command must say one line, leave with 2 and change
nothing in that world.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import yaml

TRAIN, EVALUATE, GENERATE, EXPORT = (f"launchers/{name}.py" for name in ("train", "evaluate", "generate", "export"))
PREPARE, STATUS, PLAN, SERVE = (f"launchers/{name}.py" for name in ("prepare_data", "status", "plan", "serve"))
COMPARE, HOSTS = "launchers/compare.py", "launchers/check_hosts.py"


class World(NamedTuple):
    """Places of a small world: a recipe with its model, encoder and data, a finished run, and an export of it."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def recipe(self) -> Path:
        return self.folder / "fresh.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "done"

    def values(self) -> dict:
        """The recipe."""
        return yaml.safe_load(self.recipe.read_text())

    def rows(self) -> list[dict]:
        """The data."""
        return [json.loads(line) for line in (self.folder / "data.jsonl").read_text().splitlines()]

    def write_rows(self, rows: list[object]) -> None:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (self.folder / "data.jsonl").write_text("\n".join(lines) + "\n", errors="surrogatepass")


class Case(NamedTuple):
    """One malformed thing.

    Attributes:
        kind: recipe | data | checkpoint | profile | model | call | environment.
        name: says what is wrong.
        command: words of the command; ``{world}`` stands for the folder.
        change: breaks the world.
        variables: of the environment, None for one that is missing.
        fresh: needs an interpreter of its own.
    """

    kind: str
    name: str
    command: tuple[str, ...]
    change: Callable[[World], object] = lambda world: None
    variables: Mapping[str, str | None] = MappingProxyType({})
    fresh: bool = False


FRESH = (TRAIN, "--config", "{world}/fresh.yaml")
ASK = (GENERATE, "--run", "{world}/runs/done", "--prompt", "Hi?", "--max-new-tokens", "2")


def cases(seed: int) -> list[Case]:
    """All of them, in an order that is drawn with a seed and that others do not change."""
    found = [
        *recipes(),
        *texts_of_recipes(),
        *data(),
        *checkpoints(),
        *profiles(),
        *models(),
        *calls(),
        *environments(),
    ]
    names = [(case.kind, case.name) for case in found]
    assert len(set(names)) == len(names), "two cases have one name"
    return sorted(found, key=lambda case: hashlib.sha256(f"{seed}, {case.kind}, {case.name}".encode()).digest())


VALUES: dict[str, list[object]] = {
    "run.name": ["", "a/b", "..", 3, None, "x" * 300, "nul\0l"],
    "run.seed": ["one", -1, 1.5, 1 << 80, None],
    "run.output_dir": ["/proc/none", "/dev/null"],
    "model.path": ["{world}/none", "{world}/data.jsonl", "", 5, None, "{world}", "nobody/has-this", "~/none"],
    "model.dtype": ["float8", "int8", 16],
    "profiles.encoder": ["{world}/none", "{world}/data.jsonl", 1, None, "{world}/model"],
    "profiles.template": ["none", 1],
    "profiles.format": ["{", "{country", "[{age}", "a}", ""],
    "profiles.fields": [[], ["planet"], "country", [1]],
    "profiles.standardise": [0, -1, "much", float("nan")],
    "adapters.method": ["lor", None, 1],
    "adapters.num_experts": [0, -1, 1.5, "four", 100000000],
    "adapters.top_k": [0, 9, -1],
    "adapters.target_modules": [[], ["none_proj"], "q_proj", [3]],
    "adapters.lora_r": [0, -4, 1e9, "4"],
    "adapters.balance_weight": [-1, float("inf"), float("nan"), "x"],
    "data.source": ["csv", "wvs", 1],
    "data.path": ["{world}/none.jsonl", "{world}/model", 3, "nobody/none", ""],
    "data.max_length": [0, 7, 1 << 40, "long", 100000],
    "data.test_fraction": [0, 1, 1.5, -0.1, float("nan")],
    "data.heldout_fraction": [1, -1, "a lot"],
    "data.max_people": [0, 100000],
    "data.questions": [["none"], [], "faith"],
    "data.prompt_style": ["codebook", "poem"],
    "data.option_order": ["average", "random"],
    "training.steps": [0, -1, "ten", 1.5, True],
    "training.epochs": [0, -1, 1],
    "training.global_batch_size": [0, 7.5, -8],
    "training.micro_batch_size": [0, "x"],
    "training.learning_rate": [0, -1, "1e-3x", float("nan"), float("inf")],
    "training.adam_betas": [[0.9], [2, 0.9], 0.9, ["a", "b"]],
    "training.warmup_steps": [-1, 100],
    "training.objective": ["ppo", "dpo", "grpo", None],
    "training.group_field": ["planet", 3],
    "parallel.ep_size": [0, 3, -1, "two"],
    "parallel.timeout_seconds": [0, -1, "soon", float("nan")],
    "parallel.deepspeed_config": ["none", "{world}/data.jsonl", 3],
    "checkpoint.every": [-1, "two"],
    "checkpoint.keep_last": [0, -3],
    "evaluation.batch_size": [0, "x"],
    "nothing.key": [1],
    "training.stepz": [3],
}  # fmt: skip


def recipes() -> Iterator[Case]:
    """One value of the recipe is wrong; of each key some, so that all keys come in."""
    for key, values in VALUES.items():
        section, name = key.split(".")
        for value in values[:3]:

            def change(world: World, section: str = section, name: str = name, value: object = value) -> None:
                recipe = world.values()
                given = value.replace("{world}", str(world.folder)) if isinstance(value, str) else value
                recipe.setdefault(section, {})[name] = given
                world.recipe.write_text(yaml.safe_dump(recipe))

            yield Case("recipe", f"{key}: {str(value)[:40]!r}", FRESH, change)


TEXTS: dict[str, bytes] = {
    "empty": b"", "only a comment": b"# nothing\n", "a list": b"- a\n- b\n", "a word": b"train\n", "a number": b"3\n",
    "a tab": b"run:\n\tname: x\n", "broken": b"run: {name: x\n", "two documents": b"run: {name: x}\n---\nmodel: {}\n",
    "a key twice": b"run: {name: x}\nrun: {name: y}\n", "an anchor in a circle": b"run: &a\n  name: *a\n",
    "a python object": b"run: !!python/object/apply:os.system ['true']\n", "an unknown tag": b"run: !thing {name: x}\n",
    "bytes that are no text": b"run: {name: \xff\xfe\x00}\n", "UTF-16": "run: {name: x}\n".encode("utf-16"),
    "a null section": b"model:\n", "a section that is a list": b"model: [1, 2]\n",
    "a section that is a word": b"model: x\n", "a merge key of nothing": b"run:\n  <<: 3\n",
    "a date": b"run: {name: 2020-01-01}\nmodel: {path: 2020-01-01}\n", "a number as key": b"3: {name: x}\n",
    "a null as key": b"~: {name: x}\n", "a list as key": b"? [a, b]\n: x\n", "nested far": b"[" * 3000,
    "half of a pair": b'run: {name: "\\ud800"}\nmodel: {path: x}\n', "a bell": b"run: {name: \x07}\n",
    "JSON with a trailing comma": b'{"run": {"name": "x",},,}\n',
}  # fmt: skip


def texts_of_recipes() -> Iterator[Case]:
    """The file of the recipe is wrong."""
    for name, text in TEXTS.items():
        yield Case("recipe", f"file: {name}", FRESH, lambda world, text=text: world.recipe.write_bytes(text))
    yield Case("recipe", "file: a folder", (TRAIN, "--config", "{world}/model"))
    yield Case("recipe", "file: missing", (TRAIN, "--config", "{world}/none.yaml"))
    yield Case("recipe", "file: no such name", (TRAIN, "--config", "quickstarr"))


ROWS: dict[str, dict[str, object]] = {
    "no question": {"question": ""}, "question is a list": {"question": ["a"]}, "one option": {"options": ["a"]},
    "options alike": {"options": ["a", "a "]}, "27 options": {"options": [str(i) for i in range(27)]},
    "options nested": {"options": [["a"], ["b"]]}, "answer beyond": {"answer": 99}, "answer negative": {"answer": -1},
    "answer null": {"answer": None}, "answer true": {"answer": True}, "answer 1.5": {"answer": 1.5},
    "answer is other text": {"answer": "Perhaps"}, "profile null": {"profile": None}, "profile list": {"profile": [1]},
    "profile empty": {"profile": {}}, "profile nested": {"profile": {"country": {"name": "Norway"}}},
    "profile blank": {"profile": "  "}, "profile of unknowns": {"profile": {"country": "n/a", "age": None}},
    "person is a list": {"person_id": [1]}, "person is 1.5": {"person_id": 1.5}, "unknown key": {"answr": 1},
    "question_id is a dict": {"question_id": {}}, "scale unknown": {"scale": "round"}, "shares too": {"shares": [1, 0]},
    "messages too": {"messages": []}, "half of a pair": {"question": "\ud800"}, "weight 0": {"weight": 0},
    "far nested": {"profile": {"a": [[[[[[]]]]]]}},
}  # fmt: skip
LINES = {
    "a list": "[1, 2]", "a word": "word", "a number": "3", "null": "null", "broken": '{"profile": ', "a key twice":
    '{"profile": "A nurse.", "profile": "x"}', "NaN": '{"profile": NaN}', "nested far": "[" * 5000, "nul": "\0\0\0",
    "a comma too many": '{"a": 1,}', "infinity": '{"weight": Infinity}',
    "a number of 5000 digits": '{"a": ' + "9" * 5000 + "}",
}  # fmt: skip
FILES: dict[str, bytes] = {
    "empty": b"", "blank lines": b"\n\n \n", "UTF-16": '{"a": 1}\n'.encode("utf-16"), "Latin-1": b'{"a": "\xe9"}\n',
    "gzip without the name": b"\x1f\x8b\x08\x00" + b"x" * 40, "a pretty-printed object": b'{\n "a": 1\n}\n',
    "all keys of nothing": b"{}\n",
}  # fmt: skip


def data() -> Iterator[Case]:
    """A row, a line or the file of the data is wrong."""
    for name, changes in ROWS.items():
        wrong = changes if "weight" not in changes else {**changes, "question_id": "w"}

        def change(world: World, wrong: dict[str, object] = wrong) -> None:
            rows = world.rows()
            rows[5] = {**rows[5], **wrong}
            world.write_rows(rows)

        command = FRESH if "weight" not in changes else (*FRESH, "--set", "data.weights=true")
        yield Case("data", f"row: {name}", command, change)
    for name, line in LINES.items():
        yield Case("data", f"line: {name}", FRESH, lambda world, line=line: world.write_rows([*world.rows(), line]))
    for name, content in FILES.items():
        yield Case(
            "data", f"file: {name}", (PREPARE, "jsonl", "--root", "{world}/data.jsonl", "--out", "{world}/out"),
            lambda world, content=content: (world / "data.jsonl").write_bytes(content),
        )  # fmt: skip
    yield from [
        Case("data", "file: a missing key", FRESH, lambda world: world.write_rows(
            [{key: value for key, value in row.items() if key != "options"} for row in world.rows()])),
        Case("data", "file: one question, two lists of options", FRESH, lambda world: world.write_rows(
            [{**row, "question_id": "same"} for row in world.rows()])),
        Case("data", "file: two kinds", FRESH, lambda world: world.write_rows(
            [*world.rows(), {"profile": "A nurse.", "messages": [{"role": "user", "content": "Hi"},
                                                                {"role": "assistant", "content": "Ho"}]}])),
        Case("data", "file: one person", FRESH, lambda world: world.write_rows(
            [{**row, "person_id": "p"} for row in world.rows()])),
        Case("data", "file: a long question", FRESH, lambda world: world.write_rows(
            [{**row, "question": "so " * 900 + str(row["question_id"])} for row in world.rows()])),
        Case("data", "file: parquet that is none",
             (PREPARE, "jsonl", "--root", "{world}/x.parquet", "--out", "{world}/o"),
             lambda world: (world / "x.parquet").write_bytes(b"PAR1 no table PAR1")),
        Case("data", "manifest: no number", FRESH, lambda world: prepared(world, '{"format_version": "x"}')),
        Case("data", "manifest: a list", FRESH, lambda world: prepared(world, "[]")),
        Case("data", "manifest: broken", FRESH, lambda world: prepared(world, "{")),
        Case("data", "manifest: empty", FRESH, lambda world: prepared(world, "")),
        Case("data", "manifest: keys are missing", FRESH, lambda world: prepared(world, '{"format_version": 1}')),
    ]  # fmt: skip


def prepared(world: World, manifest: str) -> None:
    """Let the recipe read a prepared folder with this manifest."""
    shutil.copytree(world.run / "data", world / "prepared")
    (world / "prepared" / "manifest.json").write_text(manifest)
    set_recipe(world, "data", path=str(world / "prepared"))


def set_recipe(world: World, section: str, **values: object) -> None:
    recipe = world.values()
    recipe.setdefault(section, {}).update(values)
    world.recipe.write_text(yaml.safe_dump(recipe))


STATES: dict[str, str] = {
    "empty": "", "broken": "{", "a list": "[]", "null": "null", "no keys": "{}", "step is text": '{"step": "x"}',
    "files are a number": '{"step": 2, "files": 3}', "nested far": "[" * 3000, "a number": "12",
}  # fmt: skip


def damage(name: str, content: bytes | None) -> Callable[[World], None]:
    """Write a content into every file of that name in the run; None removes it."""

    def change(world: World) -> None:
        files = list(world.run.rglob(name))
        assert files, name
        for file in files:
            file.unlink() if content is None else file.write_bytes(content)

    return change


def checkpoints() -> Iterator[Case]:
    """A file of a finished run or of an export is wrong, and nothing whole is left."""
    readers = {
        "evaluate": (EVALUATE, "--run", "{world}/runs/done", "--out", "{world}/report"), "generate": ASK,
        "export": (EXPORT, "--format", "hf", "--run", "{world}/runs/done", "--out", "{world}/exported"),
        "train": (TRAIN, "--config", "{world}/done.yaml"),
    }  # fmt: skip
    reader = list(readers)
    for number, (name, text) in enumerate(STATES.items()):
        used = reader[number % len(reader)]
        yield Case("checkpoint", f"state.json: {name} ({used})", readers[used], damage("state.json", text.encode()))
    files = {
        "shared.safetensors": b"x" * 100, "experts-0-of-1.safetensors": b"", "profiles.safetensors": b"\xff" * 64,
        "config.yaml": b"run: [", "identity.json": b"{", "manifest.json": b"[]", "train.arrow": b"ARROW1 no table",
    }  # fmt: skip
    for number, (name, content) in enumerate(files.items()):
        for what, given in (("broken", content), ("missing", None)):
            if (name, given) == ("profiles.safetensors", None):
                continue  # training embeds them again
            used = reader[(number + (given is None)) % len(reader)]
            yield Case("checkpoint", f"{name}: {what} ({used})", readers[used], damage(name, given))
    exported = (GENERATE, "--export", "{world}/export", "--prompt", "Hi?", "--max-new-tokens", "2")
    for file in ("adapter_config.json", "config.json"):
        for name in ("empty", "a list", "no keys"):

            def change(world: World, file: str = file, text: str = STATES[name]) -> None:
                (world / "export" / file).write_text(text)

            yield Case("checkpoint", f"export {file}: {name}", exported, change)
    yield from [
        Case("checkpoint", "a run folder that is none", (GENERATE, "--run", "{world}/model", "--prompt", "Hi")),
        Case("checkpoint", "an export that is none", (GENERATE, "--export", "{world}/model", "--prompt", "Hi")),
        Case("checkpoint", "a step that is not there", (EVALUATE, "--run", "{world}/runs/done", "--step", "77")),
        Case("checkpoint", "no checkpoints folder", ASK, lambda world: shutil.rmtree(world.run / "checkpoints")),
        Case("checkpoint", "a run of another model", (TRAIN, "--config", "{world}/done.yaml", "--set",
                                                      "adapters.lora_r=2")),
        Case("checkpoint", "a run of other data", (TRAIN, "--config", "{world}/done.yaml", "--set", "run.seed=9")),
    ]  # fmt: skip


def profiles() -> Iterator[Case]:
    """What stands behind --profile, and the encoder."""
    given = {
        "broken JSON": "{", "a list": '["Norway"]', "a key twice": '{"country": "a", "country": "b"}', "empty": "",
        "blank": "   ", "nested": '{"country": {"a": 1}}', "a list of a field": '{"age": [1]}', "NaN": '{"age": NaN}',
        "an empty object": "{}", "unknowns": '{"country": "n/a"}', "half of a pair": '{"country": "\\ud800"}',
        "no bytes of UTF-8": "\udcff\udcfe", "far nested": "[" * 3000, "null": '{"country": null}',
    }  # fmt: skip
    for name, text in given.items():
        yield Case("profile", f"--profile: {name}", (*ASK, "--profile", text))
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        for name, content in (("missing", None), ("empty", b""), ("broken", b"{" * 50)):

            def change(world: World, file: str = file, content: bytes | None = content) -> None:
                place = world / "encoder" / file
                place.unlink() if content is None else place.write_bytes(content)

            yield Case("profile", f"encoder {file}: {name}", FRESH, change)


def models() -> Iterator[Case]:
    """A file of the model folder is wrong."""

    def rewrite(file: str, **keys: object) -> Callable[[World], None]:
        def change(world: World) -> None:
            content = json.loads((world / "model" / file).read_text())
            content.update(keys)
            (world / "model" / file).write_text(json.dumps(content))

        return change

    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        for name, content in (("missing", None), ("empty", b""), ("broken", b"{" * 50), ("no keys", b"{}")):
            if (file, name) in (("tokenizer_config.json", "missing"), ("tokenizer_config.json", "no keys")):
                continue  # transformers reads such a folder

            def change(world: World, file: str = file, content: bytes | None = content) -> None:
                place = world / "model" / file
                place.unlink() if content is None else place.write_bytes(content)

            yield Case("model", f"{file}: {name}", FRESH, change)
    for name, keys in {
        "another architecture": {"model_type": "nothing"}, "no vocabulary": {"vocab_size": 0},
        "vocabulary of text": {"vocab_size": "many"}, "other heads": {"num_attention_heads": 3},
        "other width": {"hidden_size": 24}, "other layers": {"num_hidden_layers": 9}, "BERT": {"model_type": "bert"},
    }.items():  # fmt: skip
        yield Case("model", f"config.json: {name}", FRESH, rewrite("config.json", **keys))
    for name, template in {
        "raises": "{{ raise_exception('never') }}", "divides by zero": "{{ 1 // 0 }}", "broken": "{% for %}",
        "adds text and number": "{{ messages[0].content + 1 }}", "shows nothing": "x",
        "calls what is not there": "{{ nothing() }}", "never ends an answer": "{% for m in messages %}{% endfor %}",
    }.items():  # fmt: skip

        def change(world: World, template: str = template) -> None:
            (world / "model" / "chat_template.jinja").write_text(template)

        yield Case("model", f"chat template: {name}", FRESH, change)
    yield Case("model", "weights cut short", FRESH, lambda world: cut(world / "model" / "model.safetensors"))
    yield Case(
        "model", "encoder's weights cut short", FRESH, lambda world: cut(world / "encoder" / "model.safetensors")
    )


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


CALLS: dict[str, list[str]] = {
    TRAIN: [
        "", "--config", "--config {world}/fresh.yaml --steps 3", "--config {world}/fresh.yaml --set",
        "--config {world}/fresh.yaml --set training.steps", "--config {world}/fresh.yaml --set =3",
        "--config {world}/fresh.yaml --set training=3", "--config {world}/fresh.yaml --set a.b.c=3",
        "--config {world}/fresh.yaml --set training.steps=[", "--config {world}/fresh.yaml {world}/none.yaml",
    ],
    EVALUATE: [
        "", "--run {world}/none", "--run {world}/runs/done --export {world}/export", "--model {world}/model",
        "--model {world}/model --data {world}/none --out {world}/r", "--run {world}/runs/done --splits nothing",
        "--run {world}/runs/done --generate 0", "--run {world}/runs/done --judge-url http://x",
        "--run {world}/runs/done --batch-size 0", "--run {world}/runs/done --set evaluation.nothing=1",
        "--run {world}/runs/done --splits valid", "--adapter {world}/export --base {world}/model",
        "--adapter {world}/model --base {world}/model --data {world}/data.jsonl --out {world}/r",
        "--run {world}/runs/done --generate 2 --temperature nan", "--run {world}/runs/done --generate 2",
        "--run {world}/runs/done --out {world}/data.jsonl", "--run {world}/runs/done --step x",
    ],
    GENERATE: [
        "", "--run {world}/runs/done --prompt ''", "--run {world}/runs/done --prompt Hi --options A",
        "--run {world}/runs/done --options A B", "--run {world}/runs/done --prompt Hi --compare",
        "--run {world}/runs/done --prompt Hi --temperature -1", "--run {world}/runs/done --prompt Hi --top-p 2",
        "--run {world}/runs/done --prompt Hi --temperature nan", "--run {world}/runs/done --prompt Hi --device tpu",
        "--run {world}/runs/done --prompt Hi --max-new-tokens 0", "--run {world}/runs/done --prompt Hi --device cuda:9",
        "--run {world}/runs/done --prompt Hi --base {world}/model", "--export {world}/export --step 2 --prompt Hi",
        "--run {world}/runs/done --prompt Hi --seed x", "--run {world}/runs/done --prompt Hi --max-new-tokens 99999999",
    ],
    EXPORT: [
        "", "--format hf --run {world}/none --out {world}/e",
        "--format hf --run {world}/runs/done --out {world}/export",
        "--format gguff --run {world}/runs/done --out {world}/e",
        "--format hf --run {world}/runs/done --out {world}/data.jsonl", "--format hf --run {world}/runs/done",
        "--format hf --run {world}/runs/done --out /proc/none/e", "--run {world}/runs/done --out {world}/e",
        "--format hf --run {world}/runs/done --out {world}/e --step 1",
        "--format lora --run {world}/runs/done --out {world}/e --profile [",
    ],
    PREPARE: [
        "", "nothing --out {world}/o", "jsonl --out {world}/o", "jsonl --root {world}/none --out {world}/o",
        "jsonl --root {world}/data.jsonl", "jsonl --root {world}/data.jsonl --out {world}/model",
        "jsonl --root {world}/data.jsonl --out {world}/data.jsonl",
        "jsonl --root {world}/data.jsonl --out /proc/none/o",
        "jsonl --root {world}/data.jsonl --out {world}/o --test-fraction 2",
        "jsonl --root {world}/data.jsonl --out {world}/o --seed -1",
        "jsonl --root {world}/data.jsonl --out {world}/o --encoder {world}/none",
        "jsonl --root {world}/data.jsonl --out {world}/o --questions none",
        "jsonl --root {world}/data.jsonl --out {world}/o --weights", "jsonl --root {world}/data.jsonl --out .",
        "jsonl --root {world}/data.jsonl --out {world}/o --template poem", "synthetic --modes 1 --out {world}/o",
        "wvb --root {world}/model --out {world}/o", "prism --root {world} --out {world}/o",
        "community-alignment --root {world}/data.jsonl --out {world}/o",
        "global-opinions --root {world}/data.jsonl --out {world}/o", "subpop --root {world}/data.jsonl --out {world}/o",
        "survey --file {world}/none.sav --map {world}/m.yaml --suggest",
        "survey --file {world}/data.jsonl --map {world}/m.yaml --out {world}/o",
    ],
    STATUS: ["", "{world}/none", "{world}/model", "{world}/data.jsonl", "{world}/runs/done --verfy"],
    PLAN: [
        "", "--config {world}/none.yaml", "--config {world}/fresh.yaml --gpus 0",
        "--config {world}/fresh.yaml --gpus x",
        "--config {world}/fresh.yaml --memory-gb -1", "--config {world}/fresh.yaml --model-config {world}/data.jsonl",
        "--config {world}/fresh.yaml --gpus-per-node 0", "--config {world}/fresh.yaml --efficiency nan",
    ],
    COMPARE: ["", "--study {world}/none", "--study {world}/model", "--study {world}/fresh.yaml", "--bootstrap x"],
    HOSTS: ["", "--hostfile {world}/none", "--hostfile {world}/model", "--hostfile {world}/data.jsonl",
            "--hostfile {world}/fresh.yaml --timeout 0"],
    SERVE: ["", "--run {world}/none", "--run {world}/runs/done --port 99999999", "--run {world}/runs/done --port x",
            "--run {world}/runs/done --max-batch 0", "--run {world}/runs/done --api-key-file {world}/none",
            "--run {world}/runs/done --max-length 0", "--run {world}/runs/done --export {world}/export"],
}  # fmt: skip


def calls() -> Iterator[Case]:
    """Command lines that mean nothing."""
    for command, lines in CALLS.items():
        for line in lines:
            words = [word if word != "''" else "" for word in line.split()]
            yield Case("call", f"{Path(command).stem} {line}".strip(), (command, *words))


ENVIRONMENTS: dict[str, tuple[dict[str, str | None], bool]] = {
    "RANK is a word": ({"RANK": "first", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}, False),
    "RANK beyond": ({"RANK": "5", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}, False),
    "RANK negative": ({"RANK": "-1", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}, False),
    "RANK empty": ({"RANK": "", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}, False),
    "WORLD_SIZE is a word": ({"RANK": "0", "WORLD_SIZE": "two"}, False),
    "WORLD_SIZE is 0": ({"RANK": "0", "WORLD_SIZE": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}, False),
    "WORLD_SIZE is 1.5": ({"RANK": "0", "WORLD_SIZE": "1.5"}, False),
    "WORLD_SIZE empty": ({"RANK": "0", "WORLD_SIZE": ""}, False),
    "MASTER_PORT is a word": ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, False),
    "MASTER_PORT beyond": ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, False),
    "MASTER_PORT is missing": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, False),
    "MASTER_PORT is taken": ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{taken}"},
                             False),
    "MASTER_ADDR is no host": ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no.such.host.invalid",
                                "MASTER_PORT": "29517"}, False),
    "LOCAL_RANK is a word": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x", "MASTER_ADDR": "127.0.0.1",
                              "MASTER_PORT": "29517"}, False),
    "the accelerator is unknown": ({"DS_ACCELERATOR": "abacus"}, True),
    "OMP_NUM_THREADS is a word, RANK too": ({"OMP_NUM_THREADS": "x", "RANK": "x"}, True),
    "ASCII terminal, a recipe that is missing": ({"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, True),
    "no home, a model that is missing": ({"HOME": None}, True),
    "a home that is not there, a model that is missing": ({"HOME": "/nonexistent"}, True),
    "no folder for temporary files, a model that is missing": ({"TMPDIR": "/nonexistent"}, True),
}  # fmt: skip


def environments() -> Iterator[Case]:
    """Variables that launchers or users set wrongly, and folders that may not be written."""
    for name, (variables, fresh) in ENVIRONMENTS.items():
        missing = {"recipe that is missing": "{world}/nöne.yaml"}
        command = next(((TRAIN, "--config", place) for words, place in missing.items() if words in name), FRESH)
        if "model that is missing" in name:
            command = (*FRESH, "--set", "model.path=~/nöne")
        yield Case("environment", name, command, variables=variables, fresh=fresh)
    yield Case("environment", "the folder of runs may not be written",
               (*FRESH, "--set", "run.output_dir=/proc/sys/none"))  # fmt: skip
    yield Case("environment", "the cache may not be written",
               (*FRESH, "--set", "profiles.cache_dir=/proc/sys/none"))  # fmt: skip
    yield Case("environment", "a file where the folder of runs should be",
               (*FRESH, "--set", "run.output_dir={world}/data.jsonl"))  # fmt: skip
    yield Case("environment", "a path that is too long", (*FRESH, "--set", f"run.output_dir={{world}}/{'x' * 400}"))
    yield Case("environment", "a report where a file is",
               (EVALUATE, "--run", "{world}/runs/done", "--out", "{world}/data.jsonl/report"))  # fmt: skip
