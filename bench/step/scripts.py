"""diffusers' training scripts themselves, unmodified, on the same pictures and weights.

Each runs twice, with fewer and with more steps. Loading, set-up and saving are in both, so the difference is the steps'.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from stamina_fast.errors import InputError
from stamina_fast.io.images import write_image

from .arms import PICTURES, TOKEN, WORD, Case, Lesson

SCRIPTS = {
    "custom-diffusion": ("custom_diffusion/train_custom_diffusion.py",
                         ("--modifier_token", TOKEN, "--initializer_token", WORD, "--instance_prompt", f"a photo of {TOKEN}")),
    "lora": ("dreambooth/train_dreambooth_lora.py", ("--instance_prompt", f"a photo of {WORD}")),
    "lora of two text encoders": ("dreambooth/train_dreambooth_lora_sdxl.py", ("--instance_prompt", f"a photo of {WORD}")),
}
NEEDED = ("accelerate", "torchvision")
LENGTHS = {"cuda": (20, 120), "cpu": (2, 8)}
SECONDS = 1800


def commands(examples: Path, case: Case, model: Path, pictures: Path, output: Path) -> dict[str, list[str]]:
    """{script: command without the number of steps}. Raises InputError for a script or a package that is not there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"diffusers' scripts need {' and '.join(missing)}, not found here; pip install {' '.join(missing)}")
    precision = {torch.float32: "no", torch.bfloat16: "bf16"}[case.dtype]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
              "--dynamo_backend", "no", "--mixed_precision", precision, *(["--cpu"] if case.device == "cpu" else [])]
    wanted = ["lora of two text encoders"] if case.model.double else ["custom-diffusion", "lora"]
    found = {}
    for name in wanted:
        file, own = SCRIPTS[name]
        if not (examples / file).is_file():
            raise InputError(f"{examples} must be the examples folder of diffusers, got one without {file}; pass .../examples")
        options = {
            "pretrained_model_name_or_path": model, "instance_data_dir": pictures, "output_dir": output / name,
            "resolution": case.pixels, "train_batch_size": case.batch, "mixed_precision": precision,
            "checkpointing_steps": 10**6,
        }
        flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        checkpointing = ["--gradient_checkpointing"] if case.checkpointing else []
        found[Path(file).name] = [*launch, str(examples / file), *flags, *own, *checkpointing]
    return found


def seconds_of(command: list[str], steps: int) -> float:
    """Wall time of a script over so many steps. Raises InputError with its last words where it fails."""
    start = time.perf_counter()
    try:
        done = subprocess.run([*command, "--max_train_steps", str(steps)], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"the script took more than {SECONDS} s for {steps} steps; pass fewer --pixels") from error
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()] or ["it printed nothing"]
        # accelerate ends with a traceback of its own
        told = next((line for line in reversed(last) if "Error" in line and "CalledProcessError" not in line), last[-1])
        raise InputError(f"the script failed: {told.strip()}; run it yourself: {' '.join(command)} --max_train_steps {steps}")
    return time.perf_counter() - start


def run_scripts(examples: Path, case: Case, pipeline, lesson: Lesson) -> dict[str, dict]:
    """{file name: {"ms_a_step", "seconds": [of the shorter run, of the longer], "steps"}}."""
    lengths, found = LENGTHS[case.device.split(":")[0]], {}
    with tempfile.TemporaryDirectory(prefix="stamina-fast-") as folder:
        root = Path(folder)
        run = commands(examples, case, root / "model", root / "pictures", root / "out")
        pipeline.save_pretrained(root / "model", safe_serialization=True)
        (root / "pictures").mkdir()
        for index in range(PICTURES):
            # the first variant of each picture is the whole picture
            square = lesson.squares[index * case.options.crops].float().cpu()
            write_image(root / "pictures" / f"{index}.png", square)
        for name, command in run.items():
            seconds = [seconds_of(command, steps) for steps in lengths]
            step = 1e3 * (seconds[1] - seconds[0]) / (lengths[1] - lengths[0])
            found[name] = {"ms_a_step": step, "seconds": seconds, "steps": list(lengths), "command": command[1:]}
    return found
