"""Serve a trained model over HTTP as OpenAI's chat completions, with a profile beside the messages."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from importlib.util import find_spec
from pathlib import Path

from _cli import add_model_arguments, check_model_arguments, listen, load_talker, run_main, warn_in_one_line

from cuma_ds.errors import ConfigError

_EXAMPLES = """\
examples
  serve a run, then ask it as somebody:
    python launchers/serve.py --run runs/quickstart --port 8000
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "quickstart", "profile": {"country": "Norway"},
             "messages": [{"role": "user", "content": "What is a good life?"}]}'
  with OpenAI's Python client:
    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="quickstart", messages=[...], extra_body={"profile": {"country": "Norway"}})
  for others, with a key that clients must send:
    python launchers/serve.py --export exported --host 0.0.0.0 --api-key-file key.txt

A profile is fields or a sentence. Requests of different people are answered in one batch. Logs are JSON lines on stderr
and hold neither profiles nor messages. There is no encryption: on an open network put a TLS proxy in front."""


def main() -> None:
    """Parse, load, listen."""
    arguments = _parser().parse_args()
    warn_in_one_line()
    check_model_arguments("serve", arguments)
    for name, least in (
        ("max_batch", 1),
        ("max_queue", 1),
        ("max_tokens", 1),
        ("max_length", 2),
        ("max_body", 1024),
        ("port", 0),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; at least {least} is needed")
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ConfigError("serving needs fastapi and uvicorn: pip install 'cuma-ds[serve]'")
    api_key = _api_key(arguments.api_key_file)
    listener = listen(arguments.host, arguments.port)
    # The system would hold megabytes for a client that reads nothing; here it is noticed.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)

    import uvicorn

    from cuma_ds.inference.sampling import Sampling
    from cuma_ds.serving.app import Settings, make_app
    from cuma_ds.serving.logs import configure_logs
    from cuma_ds.serving.patience import Patience
    from cuma_ds.serving.scheduler import Limits, scheduler_of

    talker = load_talker(arguments, Sampling())
    max_tokens, max_length = _lengths(arguments, talker.opened.longest)
    scheduler = scheduler_of(talker, Limits(arguments.max_batch, arguments.max_queue))
    scheduler.check()
    name = arguments.name or Path(arguments.run or arguments.export).resolve().name
    settings = Settings(name, max_tokens, max_length, arguments.max_body, api_key)
    app = make_app(talker, scheduler, settings)
    host, port = listener.getsockname()[:2]
    print(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    configure_logs()
    # uvicorn ends in good order and then sends itself the signal again, as to a process that does not know it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    config = uvicorn.Config(app, http=Patience, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])


def _api_key(file: str | None) -> str | None:
    """From the file, or from CUMA_API_KEY. A command line could be read by all users of the machine."""
    source = "the environment variable CUMA_API_KEY" if file is None else f"--api-key-file {file}"
    if file is None and not os.environ.get("CUMA_API_KEY"):
        return None
    try:
        text = os.environ["CUMA_API_KEY"] if file is None else Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"{source} cannot be read: {reason}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{source} is empty; expected the key that clients must send")
    if len(lines) > 1:
        raise ConfigError(f"{source} holds {len(lines)} lines of text; expected one key on one line")
    return lines[0]


def _lengths(arguments: argparse.Namespace, longest: int) -> tuple[int, int]:
    """Tokens of the longest answer, and of prompt and answer together."""
    length = min(longest, 4096) if arguments.max_length is None else arguments.max_length
    if length > longest:
        raise ConfigError(f"--max-length is {length}, but the model looks back {longest} tokens at most")
    answer = min(512, length // 2) if arguments.max_tokens is None else arguments.max_tokens
    if answer >= length:
        raise ConfigError(
            f"--max-length {length} leaves no room for a prompt beside --max-tokens {answer}; lower the latter"
        )
    return answer, length


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--name", metavar="NAME", help="what clients call the model; default: the folder's name")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="HOST",
        help="address to listen on (default %(default)s: this machine only)",
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port (default %(default)s); 0 takes a free one"
    )
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="file with the key clients must send; or set CUMA_API_KEY; default: none"
    )
    parser.add_argument(
        "--max-batch", type=int, default=32, metavar="N", help="answers written at a time (default %(default)s)"
    )
    parser.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="waiting requests; more get 429 (default %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest answer (default: half of --max-length, at most 512)"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of prompt and answer (default: the model's, at most 4096)"
    )
    parser.add_argument(
        "--max-body", type=int, default=262144, metavar="BYTES", help="largest request (default %(default)s)"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
