"""The page itself, in a real browser without a window; what it says is what generate.py prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from ranks import ROOT, environment
from villagers import FAITH, LEAST, OPTIONS, own_shares, village_run

from cuma_ds.inference.open import open_model
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker
from cuma_ds.playground.answers import Playground

GHANA, PERU = {"country": "Ghana", "age": 44}, {"country": "Peru", "gender": "female"}
MESSAGE = "What is ${6*7} {{6*7}} <b>good</b>?"
SETTINGS = {"--max-new-tokens": "12", "--temperature": "1.5", "--seed": "7"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    return village_run(tmp_path_factory.mktemp("runs"), tiny_llama, tiny_encoder)


@pytest.fixture(scope="module")
def address(run) -> Iterator[str]:
    """Of the launcher that serves the run, as a user starts it."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'cuma-ds[playground]'")
    command = [sys.executable, "launchers/playground.py", "--run", str(run), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        assert re.fullmatch(r"village at http://127\.0\.0\.1:\d+/\n", line)
        yield line.split()[-1]
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture
def page(address, tmp_path) -> Iterator[Browser]:
    with Browser(tmp_path / "browser") as browser:
        browser.open(address)
        browser.until("document.querySelector('#ask')")
        browser.until("document.querySelector('[aria-live]')")
        yield browser


def choose(page: Browser, field: str, value: str) -> None:
    """Pick a value with the keyboard."""
    page.focus(field)
    page.until("document.querySelector('[role=option]')")
    page.type(value)
    page.until(f"document.querySelector('[role=option]').innerText.includes({value!r})")
    page.press("Enter")
    page.until(f"document.querySelector({json.dumps(f'[aria-label={json.dumps(field)}]')}).value === {value!r}", 20)


def write(page: Browser, name: str, value: str) -> None:
    page.focus(name)
    page.paste(value)
    page.press("Tab")


def two_people(page: Browser) -> list[str]:
    """Choose Ghana, 44, and a woman of Peru; what generate.py is told for the same people."""
    choose(page, "Country of A", "Ghana")
    write(page, age_of(page, "A"), "44")
    choose(page, "Country of B", "Peru")
    choose(page, "Gender of B", "female")
    page.until("document.body.innerText.includes('Country: Ghana. Age: 44.')", 30)
    page.until("document.body.innerText.includes('Country: Peru. Gender: female.')", 30)
    return ["--profile", json.dumps(GHANA), "--profile", json.dumps(PERU)]


def age_of(page: Browser, letter: str) -> str:
    """The whole name of the input, with the range of ages."""
    return next(name for role, name in page.names() if role == "textbox" and name.startswith(f"Age of {letter}"))


CELLS = """[...document.querySelectorAll('#answers table.bars')].map(table => [...table.tBodies[0].rows].map(
    row => [...row.cells].map(cell => cell.innerText.trim())))"""


def test_bars_are_those_of_generate_beside_peoples_own(run, page, launch, monkeypatch) -> None:
    people = two_people(page)
    page.click("Ask")
    page.until("document.querySelector('section.map svg')")
    monkeypatch.setenv("COLUMNS", "160")
    done = launch("generate", "--run", str(run), *people, "--compare", "--prompt", FAITH, "--options", *OPTIONS[FAITH])
    tables = page.evaluate(CELLS)
    for row, option in enumerate(OPTIONS[FAITH]):
        (line,) = [line for line in done.out.splitlines() if line.startswith(f"│ {option}")]
        assert [table[row][1] for table in tables] == re.findall(r"[\d.]+%", line)
        assert [table[row][0] for table in tables] == [option] * 2
    for table, country in zip(tables, ("Ghana", "Peru"), strict=True):  # too few of that age, too few women
        shares = [float(cells[2].rstrip("%")) / 100 for cells in table]
        assert shares == pytest.approx([one.expected for one in own_shares(FAITH, country=country)], abs=6e-4)
    experts = page.evaluate(
        "[...document.querySelectorAll('#answers .experts tbody tr')].map(row => [...row.cells].map(c => c.innerText))"
    )
    assert len(experts) == 1 + done.out.count("experts, ") == 3
    for name, *shares in experts:
        (line,) = [line for line in done.out.splitlines() if name in line]
        assert [cell.strip() for cell in line.split("│")[2:4]] == shares
    named = page.evaluate("[...document.querySelectorAll('section.map circle title')].map(title => title.textContent)")
    assert named == ["Ghana", "Norway", "Peru"]
    assert page.evaluate("document.querySelectorAll('section.map .person').length") == 2
    assert "Ghana" in page.evaluate("document.querySelector('.alike li').innerText").split("most like")[1]


def test_a_chat_is_that_of_generate(run, page, launch) -> None:
    people = two_people(page)
    page.click("A free chat")
    page.until("document.querySelector('#message').offsetParent")
    page.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText.includes('How answers')).click()")
    page.until("document.body.innerText.includes('Temperature')")
    write(page, "Longest answer, in tokens", SETTINGS["--max-new-tokens"])
    write(page, "Temperature (0: the most probable)", SETTINGS["--temperature"])
    write(page, "Seed", SETTINGS["--seed"])
    page.focus("Your message")
    page.paste(MESSAGE)
    page.press("Enter")
    page.until("document.querySelector('#conversation .experts')")
    settings = [part for pair in SETTINGS.items() for part in pair]
    shown = page.evaluate(
        "[...document.querySelectorAll('#conversation .card')].map(card => [...card.querySelectorAll('.turn p')]"
        ".map(turn => turn.textContent))"
    )
    for (said, answer), profile in zip(shown, (people[1], people[3]), strict=True):
        done = launch("generate", "--run", str(run), "--profile", profile, "--prompt", MESSAGE, *settings)
        assert said == MESSAGE  # as typed: nothing of it is run, filled in or drawn
        assert answer == done.out.strip()
    page.focus("Your message")
    page.paste("And?")
    page.press("Enter")
    page.until("document.querySelectorAll('#conversation .turn').length === 8")
    choose(page, "Country of B", "Norway")
    page.until("document.querySelector('#conversation [aria-busy=false]')")
    page.focus("Your message")
    page.paste("Hello")
    page.press("Enter")  # with somebody else it starts anew
    page.until("document.querySelectorAll('#conversation .turn').length === 4")
    page.until("document.querySelector('#conversation .experts')")
    write(page, "Longest answer, in tokens", "300")
    page.focus("Your message")
    page.paste("Go on")
    page.press("Enter")
    page.until("document.querySelectorAll('#conversation .turn').length === 8")
    page.click("Stop")
    page.until("document.querySelector('#conversation [aria-busy=false]')")
    assert page.evaluate("document.querySelectorAll('#conversation .turn').length") == 8
    assert len(page.evaluate("document.querySelector('#conversation .card .turn:last-child p').textContent")) < 280


def test_the_page_says_what_it_is_and_loads_nothing_from_elsewhere(address, page) -> None:
    text = page.text()
    assert "Predictions about groups, nobody in particular." in text
    assert f"Groups of fewer than {LEAST} people are not offered" in text
    assert "Fiji" not in page.evaluate("document.documentElement.outerHTML")
    assert page.requested
    assert all(one.startswith((address, "data:", "blob:")) for one in page.requested), page.requested
    assert page.said == []


def test_everything_that_can_be_used_has_a_name_and_its_place_on_a_phone(page) -> None:
    for role, name in page.names():
        if role in ("button", "textbox", "combobox", "spinbutton", "tab", "listbox"):
            assert name, role
    page.click("Add a person")
    page.until("document.body.innerText.includes('Person C')")
    write(page, age_of(page, "C"), "ten")
    page.click("Ask")
    page.until("document.querySelector('#answers [role=alert]')")
    assert "Person C: age takes a number from 28 to 45" in page.text()
    assert "ten" not in page.evaluate("document.querySelector('#answers').innerText")
    page.click("Remove the last")
    page.until("!document.body.innerText.includes('Country of C')")
    page.resize(390, 844)
    page.click("Ask")
    page.until("document.querySelector('section.map svg')")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_model_without_profiles_is_shown_as_everybody(tiny_llama) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'cuma-ds[playground]'")
    from cuma_ds.playground.page import Page

    playground = Playground(Talker(open_model(str(tiny_llama)), Sampling(5)), None)
    steps = list(Page(playground).ask(2, "Really?", "Yes\nNo\n"))
    (choice,) = playground.choose("Really?", ["Yes", "No"], [])
    assert "Everybody: this model takes no profile." in steps[-1][0]
    for share in choice.predicted:
        assert f"<b>{share:.1%}</b>" in steps[-1][0]
    assert 'class="own"' not in steps[-1][0]
