"""Ask a trained model as somebody: one prompt, a choice question, several people side by side, or a chat."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from _cli import (
    add_model_arguments,
    check_model_arguments,
    check_text,
    joined_ranks,
    load_talker,
    parsed,
    read_profile,
    run_main,
    several_ranks,
    warn_in_one_line,
)

from cuma_ds.errors import ConfigError, CumaError

if TYPE_CHECKING:
    from rich.console import Console

    from cuma_ds.inference.modeling import Profile
    from cuma_ds.inference.talk import Talker

_EXAMPLES = """\
examples
  one answer, as it is written:
    python launchers/generate.py --run runs/quickstart --profile '{"country": "Norway", "age": 34}' \\
        --prompt "What is a good life?"
  a choice question, answered by two people side by side, with the experts they used:
    python launchers/generate.py --export exported --compare \\
        --profile '{"country": "Norway"}' --profile '{"country": "Jordan"}' \\
        --prompt "How important is religion in your life?" --options "Very important" "Rather important" "Not important"
  a chat; /help lists what can be typed:
    python launchers/generate.py --run runs/quickstart --profile "A 55-year-old Buddhist living in Thailand."
  an answer of two ranks that hold the model together, as the run's recipe says:
    deepspeed --num_accelerators 2 launchers/generate.py --run runs/quickstart --profile "..." --prompt "..."

Answers are what the model predicts for people like the profile; nobody in particular thinks so."""
_HELP = """\
/profile {"country": "Norway", "age": 34}    be somebody else: fields or a sentence; starts a new conversation
/profile 2                                   be the second --profile of the command line
/choose QUESTION | OPTION | OPTION ...       the answer distribution of a choice question
/clear                                       start a new conversation
/quit                                        leave"""


def main() -> None:
    """Parse, load, answer."""
    arguments = parsed(_parser())
    warn_in_one_line()
    profiles = [read_profile(text) for text in arguments.profile]
    check_model_arguments("generate", arguments)
    for name, texts in (("--prompt", [arguments.prompt or ""]), ("--options", arguments.options)):
        check_text(name, "".join(texts))
    if arguments.prompt is None and (arguments.options or arguments.compare):
        raise ConfigError(f"{'--options' if arguments.options else '--compare'} needs --prompt, the question to ask")
    if arguments.prompt is None and several_ranks():
        raise ConfigError("a chat is for one process; with several ranks give --prompt")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ConfigError("--prompt is empty")
    if arguments.options and len(arguments.options) < 2:
        raise ConfigError("--options needs at least two options")
    if arguments.compare and len(profiles) < 2:
        raise ConfigError("--compare needs at least two --profile")

    from cuma_ds.inference.sampling import Sampling

    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    with joined_ranks(arguments.run) as topology:
        _answer(arguments, load_talker(arguments, sampling, topology), profiles)


def _answer(arguments: argparse.Namespace, talker: Talker, profiles: Sequence[Profile]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if arguments.prompt is None:
        _chat(talker, profiles, console)
    elif arguments.compare:
        _compare(talker, profiles, arguments.prompt, arguments.options, console)
    else:
        for number, asked in enumerate([[profile] for profile in profiles] or [[]], start=1):
            if len(profiles) > 1:
                console.print(f"[bold]profile {number}[/bold]")
            if arguments.options:
                _bars(talker.choose(arguments.prompt, arguments.options, asked)[0], arguments.options, console)
            else:
                _stream(talker, [{"role": "user", "content": arguments.prompt}], asked)


def _stream(talker: Talker, messages: Sequence[dict[str, str]], asked: Sequence[Profile]) -> str:
    answer = talker.answers(messages, asked, write=lambda _, text: print(text, end="", flush=True))[0]
    print(flush=True)
    return answer


def _compare(
    talker: Talker, profiles: Sequence[Profile], prompt: str, options: Sequence[str], console: Console
) -> None:
    from rich.markup import escape
    from rich.table import Table

    from cuma_ds.inference.talk import experts_of

    messages = [{"role": "user", "content": prompt}]
    table = Table(show_lines=not options)
    table.add_column("")
    for number in range(1, len(profiles) + 1):
        table.add_column(f"profile {number}", overflow="fold")
    if options:
        chosen = talker.choose(prompt, options, profiles)
        for index, option in enumerate(options):
            table.add_row(escape(option), *(f"{_bar(row[index], 12)} {row[index]:6.1%}" for row in chosen))
        table.add_section()
    else:
        table.add_row("answer", *(escape(answer) for answer in talker.answers(messages, profiles)))
    gates_BRE = talker.gates(messages, profiles)
    for name, shares in [] if gates_BRE is None else experts_of(gates_BRE, talker.router_names):
        table.add_row(f"experts, {name}" if "." in name else name, *shares)
    console.print(table)


def _bars(probabilities: Sequence[float], options: Sequence[str], console: Console) -> None:
    width = max(len(option) for option in options)
    for option, probability in zip(options, probabilities, strict=True):
        console.print(
            f"{option:<{width}}  {_bar(probability, 40):<40} {probability:6.1%}", markup=False, soft_wrap=True
        )


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).rstrip().ljust(width)


def _chat(talker: Talker, given: Sequence[Profile], console: Console) -> None:
    asked: list[Profile] = list(given[:1])
    messages: list[dict[str, str]] = []
    console.print("Type a message; /help lists the commands.")
    if talker.takes_profiles and not asked:
        console.print("Say who you are first: /profile ...")
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if not line:
                continue
            check_text("the message", line)
            if command == "/quit":
                return
            if command == "/help":
                console.print(_HELP, markup=False)
            elif command == "/clear":
                messages = []
            elif command == "/profile":
                asked, messages = [_switch(talker, rest.strip(), given)], []
                console.print("A new conversation, as that person.")
            elif command == "/choose":
                question, *options = [part.strip() for part in rest.split("|")]
                if not question or len(options) < 2:
                    raise ConfigError("write /choose QUESTION | OPTION | OPTION, with at least two options")
                _bars(talker.choose(question, options, asked)[0], options, console)
            elif command.startswith("/"):
                raise ConfigError(f"there is no command {command}; /help lists them")
            else:
                turn = {"role": "user", "content": line}
                answer = _stream(talker, [*messages, turn], asked)
                messages += [turn, {"role": "assistant", "content": answer}]
        except CumaError as error:
            console.print(f"error: {error}", markup=False, soft_wrap=True)


def _switch(talker: Talker, text: str, given: Sequence[Profile]) -> Profile:
    if not text:
        raise ConfigError("/profile needs fields, a sentence, or the number of a --profile")
    if text.isdigit():
        if not 1 <= int(text) <= len(given):
            raise ConfigError(f"there is no profile {text}; the command line gave {len(given)}")
        return given[int(text) - 1]
    profile = read_profile(text)
    if talker.opened.reader is not None:
        talker.opened.reader([profile])  # a mistake shows now, not with the next message
    return profile


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--profile", action="append", default=[], metavar="JSON", help="who is asking: fields or a sentence; repeatable"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what is asked; without it a chat starts")
    parser.add_argument("--options", nargs="+", default=[], metavar="TEXT", help="makes the prompt a choice question")
    parser.add_argument("--compare", action="store_true", help="all profiles side by side, with the experts they used")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the most probable token"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from this share of the probability"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run_main(main)
