"""Whatever comes in, what comes out is a value, or one line that a user can do something about."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from asking import served
from beside import exchange
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from malformed import complaint, good, wire
from run_folder import make_run

from cuma_ds.config import DataSection, RunConfig
from cuma_ds.data import PreparedData, load_data
from cuma_ds.errors import CumaError
from cuma_ds.files import is_plain_name
from cuma_ds.identity import sealed
from cuma_ds.inference.open import open_run
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker
from cuma_ds.parallel.stored import read_adapters, read_state
from cuma_ds.profiles import linearize
from cuma_ds.recipe import load_config

FEW = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
WORDS = st.sampled_from(
    ["", " ", "nan", "null", "true", "0", "-1", "1e400", "../x", "<|im_start|>", "{", "\ud83d", "\0"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | WORDS, inner, max_size=3),
    max_leaves=6,
)


def one_line(error: CumaError) -> None:
    assert str(error)
    assert "\n" not in str(error).strip()


def of(model: type, name: str) -> list[str]:
    return list(model.model_fields[name].annotation.model_fields)  # type: ignore[union-attr]


KEYS = {name: of(RunConfig, name) for name in ("run", "model", "profiles", "data", "training", "parallel")}


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe with some keys that hold anything."""
    values: dict[str, Any] = {"model": {"path": "x"}, "profiles": {"encoder": "y"}}
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from([*KEYS, "adapters", "checkpoint"]))
        if draw(st.integers(0, 5)) == 0:
            values[section] = draw(VALUES)
        elif isinstance(values.setdefault(section, {}), dict):
            key = draw(st.sampled_from(KEYS.get(section, ["every"])) | st.text(max_size=6))
            values[section][key] = draw(VALUES)
    return values


@FEW
@given(values=recipes())
def test_recipes(values, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    try:
        file.write_text(yaml.safe_dump(values, allow_unicode=False))
    except (UnicodeError, yaml.YAMLError):
        return
    try:
        config = load_config(file)
    except CumaError as error:
        one_line(error)
    else:
        assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) is not None


@FEW
@given(
    text=st.text(alphabet=string.printable, max_size=40) | st.sampled_from(["\0", "a: &a [*a]", "? [1]", "!!python/x"])
)
def test_recipes_of_any_text(text, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(CumaError) as refused:
        load_config(file)
    one_line(refused.value)


@FEW
@given(profile=VALUES)
@example(profile={"a": [[[[1]]]]})
@example(profile='{"a": 1')
def test_profiles(profile) -> None:
    if not isinstance(profile, str | dict):
        return
    try:
        assert linearize(profile)
    except CumaError as error:
        one_line(error)


def row(draw: st.DrawFn) -> dict[str, Any]:
    values: dict[str, Any] = {
        "profile": {"country": "Norway"},
        "question": "Why?",
        "options": ["a", "b"],
        "answer": "a",
    }
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*values, "person_id", "question_id", "weight", "messages", "chosen", "scale"]))
        if draw(st.booleans()):
            values[key] = draw(VALUES)
        else:
            values.pop(key, None)
    return values


@st.composite
def rows(draw: st.DrawFn) -> str:
    """JSON lines of which some hold anything."""
    lines = [json.dumps(row(draw)) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.integers(0, 4)) == 0:
        lines.append(draw(st.text(alphabet=string.printable, max_size=10)))
    return "\n".join(lines)


@FEW
@given(text=rows())
@pytest.mark.filterwarnings("ignore")
def test_rows(text, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    try:
        data = load_data(DataSection(source="jsonl", path=str(file)))
        assert len(data.splits["train"])
    except CumaError as error:
        one_line(error)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "opinions", tiny_llama, tiny_encoder, {})[0]


@FEW
@given(key=st.sampled_from(["step", "files", "sha256", "identity", "format_version", "written_by", "sealed"]),
       value=VALUES, seal=st.booleans())  # fmt: skip
def test_metadata_of_checkpoints(key, value, seal, run) -> None:
    folder = run / "checkpoints" / "step-7"
    whole = (folder / "state.json").read_text()
    changed = {**json.loads(whole), key: value}
    if seal and key != "sealed":
        changed.pop("sealed")
        try:
            changed = sealed(changed)
        except (UnicodeError, ValueError):
            return
    try:
        (folder / "state.json").write_text(json.dumps(changed))
        assert read_adapters(folder, read_state(folder))
    except CumaError as error:
        one_line(error)
    finally:
        (folder / "state.json").write_text(whole)


@FEW
@given(key=st.sampled_from(["splits", "hashes", "kind", "format_version", "heldout_groups", "profile_fields"]),
       value=VALUES, seal=st.booleans())  # fmt: skip
def test_manifests(key, value, seal, run) -> None:
    file = run / "data" / "manifest.json"
    whole = file.read_text()
    changed = {**json.loads(whole), key: value}
    if seal:
        changed.pop("sealed", None)
        try:
            changed = sealed(changed)
        except (UnicodeError, ValueError):
            return
    try:
        file.write_text(json.dumps(changed))
        assert PreparedData.load(run / "data").keeps_text in (True, False)
    except CumaError as error:
        one_line(error)
    finally:
        file.write_text(whole)


@pytest.fixture(scope="module")
def client(run) -> Iterator[openai.OpenAI]:
    with served(Talker(open_run(run), Sampling())) as (one, _):
        yield one


PARAMETERS = [
    "model", "messages", "profile", "temperature", "top_p", "max_tokens", "stop", "seed", "stream", "stream_options",
    "tools", "user", "n", "logit_bias", "response_format",
]  # fmt: skip


@FEW
@given(key=st.sampled_from(PARAMETERS), value=VALUES)
def test_requests(key, value, client) -> None:
    request = wire(json.dumps({**good(), "max_tokens": 2, key: value}).encode())
    answer = exchange(client.base_url.port, request)
    if not answer.startswith(b"HTTP/1.1 200 "):
        assert not complaint(answer)


@FEW
@given(name=VALUES)
def test_plain_names(name, tmp_path) -> None:
    if is_plain_name(name) and "\ud83d" not in name:
        try:
            assert (tmp_path / name).resolve().parent == tmp_path.resolve()
        except OSError:
            assert len(name) > 8
