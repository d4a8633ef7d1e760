"""Files and folders that gpmetric reads, with valid inputs that it made itself; rows of `readers.py`."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import gpmetric
from gpmetric.errors import InputError
from gpmetric.loading import DEMO_MODEL, check_path, open_model
from gpmetric.outputs import MANIFEST, OURS, check_outputs
from gpmetric.packing.pack import run_pack
from gpmetric.packing.requests import PackRequest, UnpackRequest
from gpmetric.packing.unpack import run_unpack
from gpmetric.pruning.manifest import read_manifest
from gpmetric.pruning.output_folder import check_folder
from gpmetric.pruning.taken_over import copy_code, front_matter
from gpmetric.pruning.unfinished import Record, unfinished
from gpmetric.session.splits import open_text

__all__ = [
    "Opened",
    "existing",
    "manifest",
    "of_file",
    "of_model",
    "of_text",
    "of_texts",
    "packed",
    "taken_over",
    "unfinished_one",
    "verified",
]

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


@dataclass(frozen=True)
class Opened:
    """Valid inputs, and what reads one: it ends with a value or an error of gpmetric's."""

    seeds: Sequence[bytes]
    read: Callable[[bytes], Any]
    allowed: tuple[type[BaseException], ...] = ()  # other ways to end well


def of_text(seeds: Iterable[str], read: Callable[[str], Any]) -> Opened:
    """Of what is typed: bytes that are no text come from Python with surrogates in their place."""
    return Opened([one.encode() for one in seeds], lambda content: read(content.decode("utf-8", "surrogateescape")))


def of_file(path: Path, read: Callable[[], Any], seeds: Sequence[bytes] = ()) -> Opened:
    """Of a file, which is there by now unless seeds are given."""

    def written(content: bytes) -> Any:
        path.write_bytes(content)
        return read()

    return Opened(seeds or [path.read_bytes()], written)


def of_model(name: str, source: Path = DEMO_MODEL) -> Callable[[Path], Opened]:
    """A model of which one file is another's; with an index, its weights are in two files."""

    def opened(folder: Path) -> Opened:
        model = folder / "model"
        shutil.copytree(source, model)
        if name.endswith(".index.json"):
            from transformers import AutoModelForCausalLM

            (model / "model.safetensors").unlink()
            AutoModelForCausalLM.from_pretrained(source).save_pretrained(model, max_shard_size="600kB")
        if not (model / name).exists():
            (model / name).write_text('{"base_model_name_or_path": "a/b", "peft_type": "LORA"}')

        def read() -> None:
            check_path(model)
            open_model(str(model), device="cpu")

        return of_file(model / name, read)

    return opened


def taken_over(folder: Path) -> Opened:
    """A model card and the code that a config names, of which a checkpoint takes what it may."""
    model, made = open_model(), folder / "made"
    source = folder / "model"
    shutil.copytree(DEMO_MODEL, source)
    object.__setattr__(model, "folder", source)
    made.mkdir()
    card = "---\nlicense: apache-2.0\nlicense_name: x\n---\n# A\n"
    config = '{"auto_map": {"AutoModel": "modeling_x.X"}, "model_type": "llama"}'

    def read(content: bytes) -> None:
        (source / "README.md").write_bytes(content)
        (made / "config.json").write_bytes(content)
        assert "\n---\n" not in front_matter(model, ("a",))[3:-4]
        copy_code(source, made)

    return Opened([card.encode(), config.encode()], read)


def verified(name: str) -> Callable[[Path], Opened]:
    """A file of a checkpoint that `verify` looks through; what it finds wrong is a value."""

    def opened(folder: Path) -> Opened:
        shutil.copytree(GOLDEN / "pruned", folder / "pruned")
        path = folder / "pruned" / name

        def read() -> None:
            told = gpmetric.verify(folder / "pruned")
            assert all(line.isprintable() for line in told["problems"]), told

        return of_file(path, read)

    return opened


def manifest(folder: Path) -> Opened:
    path = folder / MANIFEST

    def read() -> None:
        with suppress(InputError):
            check_folder(folder, True)
        read_manifest(folder)

    return of_file(path, read, [(GOLDEN / one / MANIFEST).read_bytes() for one in ("pruned", "slimmed")])


def of_texts(name: str, *seeds: str | Mapping[str, Sequence[Any]]) -> Callable[[Path], Opened]:
    """A text in a file of a name; a table is written as Parquet."""

    def opened(folder: Path) -> Opened:
        path = folder / name

        def made(seed: str | Mapping[str, Sequence[Any]]) -> bytes:
            if isinstance(seed, str):
                return gzip.compress(seed.encode(), mtime=0) if name.endswith(".gz") else seed.encode()
            import pyarrow as pa
            from pyarrow.parquet import write_table

            write_table(pa.table(dict(seed)), path)
            return path.read_bytes()

        def read() -> None:
            text = open_text(str(path))
            assert len(text.content) == len("".join(text.pieces()))
            assert len(text.documents) >= 1
            text.digest.encode()

        return of_file(path, read, list(map(made, seeds)))

    return opened


def packed(folder: Path) -> Opened:
    source, path, out = folder / "in", folder / "a.pack", folder / "out"
    (source / "more").mkdir(parents=True)
    weight = torch.randn(16, 16)
    save_file({"a": weight * (weight > 0), "b": weight.bfloat16()}, source / "model.safetensors")
    (source / "more" / "config.json").write_text("{}")
    run_pack(PackRequest(folder=source, output=path))

    def read() -> None:
        shutil.rmtree(out, ignore_errors=True)
        run_unpack(UnpackRequest(archive=path, output=out))

    return of_file(path, read)


def existing(folder: Path) -> Opened:
    """What an output is written over: whose it is, is told by its content."""
    path = folder / "out"
    save_file({"m": torch.ones(2, 2, dtype=torch.bool)}, path)
    seeds = [
        path.read_bytes(),
        b'{"gpmetric": "1"}',
        b'{"version": 1, "granularity": "row", "sparsity": {}}',
        b"method,sparsity,",
        b'"""Made by gpmetric 1"""\nabs(W)*X',
        b'{"formula": "W", "canonical": "W", "latex": "W"}',
        b"\x89PNG gpmetric",
    ]

    def read() -> None:
        for kind in OURS:
            with suppress(InputError):
                check_outputs({"--output": (path, kind)}, [], force=False)

    return of_file(path, read, seeds)


def unfinished_one(folder: Path) -> Opened:
    output = folder / "out"
    with unfinished(output, {"seed": 1}, resume=True) as found:
        found.save(Record(dense=2.0, block=1, layers=[{"name": "a"}]), {"hidden": torch.rand(2, 3)})
        (path,) = folder.glob(".out.*/progress.safetensors")
        content = path.read_bytes()

    def read(content: bytes) -> None:
        (path.parent / "files").mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        with unfinished(output, {"seed": 1}, resume=True) as again:
            if again.record != Record():
                dict(again.state())

    return Opened([content], read)
