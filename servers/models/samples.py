"""Makes the sample libraries that ship: ``python -m servebench_servers.models.samples``.

Everything is drawn from one seed, so the command writes the same values again. Images are coarse
(blocks of one grey level), which keeps the files small and changes nothing about the arithmetic.
What comes as ``npz`` goes to any server. Bodies (``.bin``) are for TorchServe, for models of
several inputs; the JSON files hold the same samples in perf_analyzer's format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

#: Seed of every library.
SEED = 2026

_BLOCK = 16  # pixels
_CLS, _SEP, _FIRST_WORD, _VOCABULARY = 101, 102, 1000, 30_522  # of bert-base-uncased

Sample = dict[str, NDArray[Any]]


def echo_rows(width: int) -> Sample:
    """16 rows for a model that answers with what it was sent."""
    return {"INPUT": _generator(0).standard_normal((16, width)).astype(np.float32)}


def images(count: int, channels: int, size: int) -> Sample:
    """Normalised images ``[count, channels, size, size]``, cut out of blocks."""
    blocks = -(-size // _BLOCK)
    coarse = _generator(1).standard_normal((count, channels, blocks, blocks)).astype(np.float32)
    return {"IMAGE": coarse.repeat(_BLOCK, axis=2).repeat(_BLOCK, axis=3)[:, :, :size, :size]}


def questions(count: int, shortest: int, longest: int) -> list[Sample]:
    """Token sequences of evenly drawn lengths: a question of a fifth of it, a text, and BERT's separators."""
    random = _generator(2)
    samples = []
    for length in random.integers(shortest, longest, size=count, endpoint=True):
        ids = random.integers(_FIRST_WORD, _VOCABULARY, size=length, dtype=np.int64)
        question = max(2, int(length) // 5)
        ids[0], ids[question], ids[-1] = _CLS, _SEP, _SEP
        types = (np.arange(length) > question).astype(np.int64)
        samples.append({"INPUT_IDS": ids, "ATTENTION_MASK": np.ones_like(ids), "TOKEN_TYPE_IDS": types})
    return samples


def clicks(count: int) -> list[Sample]:
    """Rows of 13 numbers (logarithms of counts, as Criteo's are fed in) and 26 categories of up to 40 million."""
    random = _generator(3)
    return [
        {
            "DENSE": np.log1p(random.exponential(50, size=13)).astype(np.float32),
            "SPARSE": random.integers(40_000_000, size=26, dtype=np.int64),
        }
        for _ in range(count)
    ]


def write_npz(path: Path, arrays: Sample) -> None:
    """One array per tensor, first axis = samples."""
    np.savez_compressed(path, **arrays)


def write_perf_analyzer(path: Path, samples: list[Sample]) -> None:
    """perf_analyzer's ``--input-data``, each tensor with its shape."""
    steps = [
        {name: {"content": array.tolist(), "shape": list(array.shape)} for name, array in sample.items()} for sample in samples
    ]
    path.write_text(json.dumps({"data": steps}, separators=(",", ":")) + "\n", encoding="utf-8")


def write_bodies(folder: Path, samples: list[Sample]) -> None:
    """One file per sample: its tensors' bytes one after another."""
    folder.mkdir(exist_ok=True)
    for number, sample in enumerate(samples):
        (folder / f"{number:03}.bin").write_bytes(b"".join(array.tobytes() for array in sample.values()))


def _generator(stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([SEED, stream]))


@click.command(help=__doc__)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path(__file__).parent, help="Folder of the models."
)
def main(out: Path) -> None:
    """Write every library."""
    for model in ("identity", "delay", "resnet50", "unet", "bert", "dlrm"):
        (out / model).mkdir(parents=True, exist_ok=True)
    for model, width in (("identity", 16), ("delay", 4)):
        rows = echo_rows(width)
        write_npz(out / model / "samples.npz", rows)
        write_npz(out / model / "golden.npz", {"OUTPUT": rows["INPUT"]})
    write_npz(out / "resnet50" / "images.npz", images(16, 3, 224))
    write_npz(out / "unet" / "tiles-572.npz", images(4, 1, 572))
    write_npz(out / "unet" / "tiles-252.npz", images(16, 1, 252))
    write_perf_analyzer(out / "bert" / "long.json", questions(32, 64, 384))
    short = questions(16, 8, 32)
    write_perf_analyzer(out / "bert" / "short.json", short)
    write_bodies(out / "bert" / "short", short)
    rows_of_clicks = clicks(64)
    write_npz(
        out / "dlrm" / "clicks.npz", {name: np.stack([row[name] for row in rows_of_clicks]) for name in rows_of_clicks[0]}
    )
    click.echo(f"libraries written to {out}, seed {SEED}")


if __name__ == "__main__":
    main()
