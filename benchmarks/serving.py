"""Throughput of the server when many people ask at once, against the same requests one after another.

Real HTTP, OpenAI's client, one process. Both ways take turns, so that a drifting machine hurts them alike; medians and
their ratio are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import socket
import statistics
import threading
import time

import openai
import torch
import uvicorn
from rich.console import Console
from rich.table import Table

from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.inference.modeling import ProfileReader
from cuma_ds.inference.open import open_model
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker
from cuma_ds.serving.app import Settings, make_app
from cuma_ds.serving.scheduler import Limits, scheduler_of

COUNTRIES = ["Norway", "Ghana", "Japan", "Peru", "Jordan", "Chile", "Kenya", "Nepal"]
QUESTIONS = [
    "How important is religion in your life?",
    "What is a good life?",
    "Can most people be trusted, or need one be careful?",
]


def load(arguments: argparse.Namespace) -> Talker:
    """The backbone with 8 untrained experts of rank 8, top 2, on q and v: as fast as trained ones."""
    config = CumaConfig(num_experts=8, top_k=2, lora_r=8, profile_dim=384, target_modules=("q_proj", "v_proj"))
    opened = open_model(arguments.model, [f"model.dtype={arguments.dtype}", "profiles.template=wvs"])
    model = inject_adapters(opened.model, config).to(arguments.device).eval()
    reader = ProfileReader({"encoder": arguments.encoder, "template": "wvs"}, config.profile_dim)
    return Talker(dataclasses.replace(opened, model=model, reader=reader), Sampling())


async def tokens_per_second(client: openai.AsyncOpenAI, requests: int, together: bool, max_tokens: int) -> float:
    """Answer tokens a second over some requests of different people."""

    async def one(number: int) -> int:
        answer = await client.chat.completions.create(
            model="bench",
            messages=[{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
            temperature=0,
            max_tokens=max_tokens,
            extra_body={"profile": {"country": COUNTRIES[number % len(COUNTRIES)], "age": 20 + number}},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    start = time.perf_counter()
    tokens = (
        await asyncio.gather(*map(one, range(requests)))
        if together
        else [await one(number) for number in range(requests)]
    )
    return sum(tokens) / (time.perf_counter() - start)


async def measure(url: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Both ways in turns, after one round for warming up."""
    rates: dict[str, list[float]] = {"one at a time": [], "at once": []}
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        for round_number in range(arguments.rounds + 1):
            for name, requests in (
                ("one at a time", max(2, arguments.requests // 16)),
                ("at once", arguments.requests),
            ):
                rate = await tokens_per_second(
                    client, requests, name == "at once", arguments.max_tokens if round_number else 1
                )
                if round_number:
                    rates[name].append(rate)
    return rates


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct", help="backbone folder")
    parser.add_argument(
        "--encoder", default=".cache/models/all-MiniLM-L6-v2", help="sentence encoder folder, of width 384"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the backbone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--requests", type=int, default=32, help="requests at once, each of another person")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens of every answer")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    talker = load(arguments)
    scheduler = scheduler_of(talker, Limits(max_batch=arguments.requests), [])  # all answers are long
    app = make_app(talker, scheduler, Settings("bench", arguments.max_tokens, 2048, 100_000))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            rates = asyncio.run(measure(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", arguments))
        finally:
            server.should_exit = True
            thread.join()
    table = Table(
        title=f"served answers of {arguments.max_tokens} tokens, {arguments.dtype}, {arguments.device}, "
        f"{arguments.threads} threads, "
        f"median of {arguments.rounds} rounds"
    )
    for heading in ("requests", "tokens per second", "ratio", "min", "max"):
        table.add_column(heading, justify="left" if heading == "requests" else "right")
    base = statistics.median(rates["one at a time"])
    for name, values in rates.items():
        median = statistics.median(values)
        label = name if name == "one at a time" else f"{arguments.requests} at once"
        table.add_row(label, f"{median:.1f}", f"{median / base:.2f}", f"{min(values):.1f}", f"{max(values):.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
