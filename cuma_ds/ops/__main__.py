"""``python -m cuma_ds.ops`` prints which operators were built, for which architectures, and which are in use here."""

from __future__ import annotations

import torch

from cuma_ds.ops import describe, library


def main() -> None:
    """Print it."""
    print(describe())
    print(
        f"torch {torch.__version__}, CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    if not torch.cuda.is_available():
        print("CUDA: no GPU here, or a torch without CUDA")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        wanted = f"sm_{major}{minor}"
        used = (
            "compiled kernels"
            if wanted in library.architectures
            else "kernels of a neighbouring architecture or from PTX"
        )
        used = used if library.architectures else "plain PyTorch"
        print(f"CUDA {index}: {torch.cuda.get_device_name(index)} ({wanted}): {used}")


if __name__ == "__main__":
    main()
