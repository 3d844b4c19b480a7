"""The RUN folder. A task is finished when the manifest names it, with the SHA-256 of each of its files.

    config.yaml                the model, the concepts and all options
    manifest.json              {"tasks": [{"name", "sha256", "folder", "files", "folded_by"}, …], "config", "sha256"}
    tasks/NN-name/             factors.safetensors, token.safetensors, curve.json, task.json; method.safetensors if the method
                               keeps more of a task; and pictures, not hashed
    metrics.json, plots/, samples/, real/   what an evaluation leaves and reads, not hashed
    checkpoint-NN-STEP.safetensors   the state of an unfinished task after STEP steps, hashed in the manifest too

token.safetensors is a textual inversion: {token: [n, d]}, which diffusers' load_textual_inversion reads. A model with two text
encoders has {"clip_l": [n, d], "clip_g": [n, d]}, as is usual for Stable Diffusion XL; it reads one of them at a time.

A task's files are written and made durable before the manifest is replaced. So a run that is killed at any moment has a task
whole or not at all.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from torch import Tensor

from ..errors import FileError, InputError, StaminaError
from .files import (
    PARTIAL,
    clear_errors,
    make_folder,
    parse_json,
    read_bytes,
    read_json,
    read_tensors,
    read_yaml,
    remove,
    sha256,
    sync_folder,
    write_bytes,
    write_json,
    write_tensors,
    yaml_bytes,
)
from .names import check_distinct, inside, safe_name

# what files of textual inversions call the text encoders where there are two
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
FILES = ("factors.safetensors", "token.safetensors", "curve.json", "task.json")
KEPT = "method.safetensors"
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    """One task in the manifest; `sha256` is that of factors.safetensors."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    sha256: Digest
    folder: Annotated[str, StringConstraints(pattern=r"^[0-9]{2,}-[A-Za-z0-9._-]+$")]
    files: dict[str, Digest]
    folded_by: dict[str, str] | None = None


class _Checkpoint(BaseModel):
    """The state of the unfinished task, which follows the last one in the manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)
    task: str
    step: Annotated[int, Field(ge=1)]
    file: Annotated[str, StringConstraints(pattern=r"^checkpoint-[0-9]{2,}-[0-9]+\.safetensors$")]
    sha256: Digest


class _Manifest(BaseModel):
    """`config` is the SHA-256 of config.yaml, and `sha256` that of everything else here."""

    model_config = ConfigDict(extra="forbid", strict=True)
    tasks: list[_Record] = []
    checkpoint: _Checkpoint | None = None
    config: Digest
    sha256: str = ""

    def digest(self) -> str:
        return sha256(self.model_dump_json(exclude={"sha256", *self.absent()}).encode())

    def absent(self) -> set[str]:
        """Fields that are left out of the file because they are empty."""
        return {"checkpoint"} if self.checkpoint is None else set()


class Task(NamedTuple):
    """A finished task: tensors by name, a row of the curve for each step that was read, and task.json as `info`.

    token holds the embeddings of each text encoder: [d], or [n, d] for a token of n vectors, n > 1.
    kept: what the training method stored to go on after this task, by name; {} for most methods.
    """

    factors: dict[str, Tensor]
    token: dict[str, Tensor]
    curve: list[dict[str, Any]]
    info: dict[str, Any]
    kept: dict[str, Tensor]


class Checkpoint(NamedTuple):
    """The saved state of an unfinished task: its name, the steps done, and tensors by name."""

    task: str
    step: int
    tensors: dict[str, Tensor]


def to_inversion(embeddings: dict[str, Tensor], token: str | None) -> dict[str, Tensor]:
    """Embeddings [d] or [n, d] by text encoder as a textual inversion's file has them, [n, d]."""
    names = {"text_encoder": token or "text_encoder"} if len(embeddings) == 1 else ENCODERS
    return {names.get(part, part): torch.atleast_2d(rows) for part, rows in embeddings.items()}


def from_inversion(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `to_inversion` was given. Files of older runs have it as it is: [d] by text encoder."""
    parts = dict.fromkeys(file, "text_encoder") if len(file) == 1 else {name: part for part, name in ENCODERS.items()}
    return {parts.get(name, name): rows[0] if len(rows) == 1 and rows.ndim == 2 else rows for name, rows in file.items()}


class Run:
    """A RUN folder: `Run.create` to train into it, `Run.open` to read it. `config` is the content of config.yaml."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], resume: bool = False) -> Run:
        """A new run in a folder that does not exist or is empty.

        resume: if there is a run in the folder, remove what a kill left unfinished in it, and return it. It keeps the config
        that it was created with: compare that with `config`. Raises FileError for a folder that holds anything else.
        """
        path = make_folder(Path(path))
        with clear_errors("read the folder", path):
            there = {entry.name for entry in path.iterdir()}
        if resume and "manifest.json" in there:
            run = cls.open(path)
            run._clean()
            return run
        # what a run leaves that is killed before it has a manifest
        unborn = {"config.yaml", f".config.yaml{PARTIAL}", f".manifest.json{PARTIAL}"}
        if there - (unborn if resume else set()):
            remedy = "choose another folder" if resume else "resume it if it is a run, or choose another folder"
            raise FileError(f"{str(path)!r} is not empty; {remedy}")
        manifest = _Manifest(config=write_bytes(path / "config.yaml", yaml_bytes(config)))
        run = cls(path, read_yaml(path / "config.yaml", manifest.config))
        run._write(manifest)
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run. Only reads, so another process may train into it at the same time."""
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise FileError(f"{str(path)!r} is not a run: it has no manifest.json; give a folder that train has written")
        run = cls(path, {})
        run.config = read_yaml(path / "config.yaml", run._read().config)
        return run

    def tasks(self) -> list[dict[str, Any]]:
        """The finished tasks in order, as the manifest has them: name, sha256, folder, files, folded_by."""
        return [record.model_dump() for record in self._read().tasks]

    def folder(self, name: str) -> Path:
        """The folder of a finished task, for pictures and other files that the manifest does not name."""
        return inside(self.path, "tasks", self._record(name).folder)

    def commit_task(self, name: str, factors: dict[str, Tensor], token: dict[str, Tensor], curve: list[dict[str, Any]],
                    info: dict[str, Any], folded_by: dict[str, str] | None = None,
                    kept: dict[str, Tensor] | None = None) -> Path:
        """Store a finished task and return its folder. From then on it survives a crash and a power loss.

        token: embeddings [d] or [n, d] by text encoder; info["token"] names them. folded_by: backend and device that folded
        it; there `factors` give the same bits again. kept: see `Task`. Raises InputError for a name that is taken, and
        FileError if the disk refuses. Earlier tasks are left as they were in either case.
        """
        manifest = self._read()
        check_distinct("task's name", [*(task.name for task in manifest.tasks), name])
        folder = f"{len(manifest.tasks) + 1:02d}-{safe_name(name)}"
        self._clean()
        try:
            path = make_folder(inside(self.path, "tasks", folder))
            files = {
                "factors.safetensors": write_tensors(path / "factors.safetensors", factors),
                "token.safetensors": write_tensors(path / "token.safetensors", to_inversion(token, info.get("token"))),
                "curve.json": write_json(path / "curve.json", curve),
                "task.json": write_json(path / "task.json", info),
            }
            if kept:
                files[KEPT] = write_tensors(path / KEPT, kept)
            manifest.tasks.append(
                _Record(name=name, sha256=files["factors.safetensors"], folder=folder, files=files, folded_by=folded_by)
            )
            manifest.checkpoint = None
            self._write(manifest)
        except StaminaError:
            # report this error, not one that cleaning up may raise on the same disk
            with contextlib.suppress(StaminaError):
                self._clean()
            raise
        # the task is stored; what cannot be removed now is removed before the next task
        with contextlib.suppress(StaminaError):
            self._clean()
        return path

    def save_checkpoint(self, task: str, step: int, tensors: dict[str, Tensor]) -> None:
        """Store the state of the unfinished task after `step` steps, durably. It replaces an earlier checkpoint.

        `commit_task` removes it. Raises FileError if the disk refuses, and then leaves the earlier checkpoint as it was.
        """
        manifest = self._read()
        file = f"checkpoint-{len(manifest.tasks) + 1:02d}-{step:06d}.safetensors"
        try:
            manifest.checkpoint = _Checkpoint(task=task, step=step, file=file, sha256=write_tensors(self.path / file, tensors))
            self._write(manifest)
        finally:
            with contextlib.suppress(StaminaError):
                self._clean()

    def load_checkpoint(self) -> Checkpoint | None:
        """The checkpoint of the unfinished task, or None. Raises FileError if its file is missing or damaged."""
        found = self._read().checkpoint
        return None if found is None else Checkpoint(found.task, found.step, read_tensors(self.path / found.file, found.sha256))

    def load_task(self, name: str) -> Task:
        """A finished task. Raises FileError if a file of it is missing, or not as the manifest has it."""
        record = self._record(name)
        path, files = inside(self.path, "tasks", record.folder), record.files
        return Task(
            read_tensors(path / "factors.safetensors", files["factors.safetensors"]),
            from_inversion(read_tensors(path / "token.safetensors", files["token.safetensors"])),
            read_json(path / "curve.json", files["curve.json"]),
            read_json(path / "task.json", files["task.json"]),
            read_tensors(path / KEPT, files[KEPT]) if KEPT in files else {},
        )

    def _record(self, name: str) -> _Record:
        records = {record.name: record for record in self._read().tasks}
        if name not in records:
            known = ", ".join(map(repr, records)) or "none"
            raise InputError(f"{str(self.path)!r} has no task {name!r}; finished are {known}")
        return records[name]

    def _read(self) -> _Manifest:
        path = self.path / "manifest.json"
        try:
            manifest = _Manifest.model_validate(parse_json(read_bytes(path)))
            sound = manifest.digest() == manifest.sha256
        except ValueError as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else " ".join(str(error).split())
            raise FileError(f"{str(path)!r} is damaged: {reason}; restore it from a copy") from error
        whole = all(set(task.files) - {KEPT} == set(FILES) and task.files[FILES[0]] == task.sha256 for task in manifest.tasks)
        if not (sound and whole):
            raise FileError(f"{str(path)!r} is damaged: it does not match its own checksum; restore it from a copy")
        return manifest

    def _write(self, manifest: _Manifest) -> None:
        manifest.sha256 = manifest.digest()
        write_json(self.path / "manifest.json", manifest.model_dump(exclude=manifest.absent()))

    def _clean(self) -> None:
        """Remove what a kill left: half-written files, and folders and checkpoints that the manifest does not name."""
        manifest = self._read()
        kept = {record.folder for record in manifest.tasks} | {manifest.checkpoint.file if manifest.checkpoint else ""}
        with clear_errors("clean", self.path):
            tasks = self.path / "tasks"
            unnamed = [entry for entry in tasks.iterdir() if entry.name not in kept] if tasks.is_dir() else []
            saved = [file for file in self.path.glob("checkpoint-*.safetensors") if file.name not in kept]
            for leftover in [*self.path.glob(f".*{PARTIAL}"), *tasks.glob(f"*/.*{PARTIAL}"), *unnamed, *saved]:
                remove(leftover)
            if unnamed:
                sync_folder(tasks)
