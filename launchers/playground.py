"""Compare in the browser what a trained model answers for different people: bars, a chat, experts, a map."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from _cli import (
    add_model_arguments,
    check_model_arguments,
    listen,
    load_talker,
    run_main,
    several_ranks,
    warn_in_one_line,
)

from cuma_ds.errors import ConfigError

if TYPE_CHECKING:
    from cuma_ds.data.prepared import PreparedData
    from cuma_ds.inference.open import Opened

_EXAMPLES = """\
examples
  a run, with the people and the questions of its data:
    python launchers/playground.py --run runs/quickstart
  an exported folder; its data says which people there are:
    python launchers/playground.py --export exported --data prepared/mine

Nothing leaves this machine: the page loads nothing from elsewhere, and nothing that is typed is kept. There is no
password and no encryption: with --host, whoever reaches that address can ask.
It needs gradio: pip install 'cuma-ds[playground]'"""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Parse, load, listen."""
    arguments = _parser().parse_args()
    warn_in_one_line()
    check_model_arguments("playground", arguments)
    if arguments.data is not None and arguments.run is not None:
        raise ConfigError("--data belongs to --export; a run has its own")
    if several_ranks():
        raise ConfigError("the playground is for one process; start it without deepspeed or torchrun")
    if find_spec("gradio") is None:
        raise ConfigError("the playground needs gradio: pip install 'cuma-ds[playground]'")
    listener = listen(arguments.host, arguments.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    import uvicorn
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from cuma_ds.inference.sampling import Sampling
    from cuma_ds.playground.answers import Playground
    from cuma_ds.playground.page import make_app
    from cuma_ds.playground.survey import Survey

    talker = load_talker(arguments, Sampling())
    data = _data(arguments, talker.opened)
    app = make_app(Playground(talker, None if data is None else Survey(data, talker.opened.config)))
    if arguments.host in _LOOPBACK:  # a page elsewhere must not reach this one under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    host, port = listener.getsockname()[:2]
    print(f"{talker.opened.name} at http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
    if arguments.host not in _LOOPBACK:
        print("warning: whoever reaches this address can ask; there is no password", file=sys.stderr, flush=True)
    # uvicorn ends in good order and then sends itself the signal again, as to a process that does not know it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


def _data(arguments: argparse.Namespace, opened: Opened) -> PreparedData | None:
    """The data of the model, where it has any."""
    from cuma_ds.evaluation.subject import read_data
    from cuma_ds.runs import Run

    if arguments.run is not None:
        return Run.open(arguments.run).data()
    return None if arguments.data is None else read_data(arguments.data, opened.config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--data", metavar="FOLDER", help="with --export: prepared folder or file of records with people and questions"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="address to listen on (default %(default)s: this machine)"
    )
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="port (default %(default)s); 0 takes a free one"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
