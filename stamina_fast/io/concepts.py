"""The concepts to learn, from a folder of pictures for each, or from diffusers' concepts_list.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FileError, InputError
from .files import clear_errors, parse_json, read_bytes, read_json
from .images import SUFFIXES, list_images
from .names import check_distinct, check_name, inside, token_for

PROMPT = "a photo of {token}"
_KEYS = {"instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir", "name", "token",
         "initializer_token"}
_TOKEN = re.compile(r"<[^<>\s]+>|\S+\*")


@dataclass(frozen=True)
class Concept:
    """One thing to learn.

    name          what people call it; names the task and its folder
    images        picture files
    prompt        the text of every picture without a caption; holds the token
    token         the new word, such as '<cat>'
    class_prompt  what the thing is an example of, such as 'a photo of a cat'
    captions      a text for each picture, each with the token
    class_images  pictures of other things of the class, which `class_prompt` describes
    initializer_token   a word of one token, whose embedding the concept's token starts from, such as 'cat'; None: as the
                        option token_init says
    """

    name: str
    images: tuple[Path, ...]
    prompt: str
    token: str
    class_prompt: str | None = None
    captions: tuple[str, ...] | None = None
    class_images: tuple[Path, ...] = ()
    initializer_token: str | None = None

    def __post_init__(self):
        if not self.token or any(letter.isspace() for letter in self.token):
            raise InputError(f"the token of {self.name!r} must be one word, got {self.token!r}; write it as '<cat>'")
        check_name(self.name)
        word = self.initializer_token
        if word is not None and (not isinstance(word, str) or len(word.split()) != 1):
            raise InputError(f"the initializer_token of {self.name!r} must be one word, got {word!r}; write one, such as 'cat'")
        for pictures in ("images", "class_images"):
            object.__setattr__(self, pictures, tuple(Path(image) for image in getattr(self, pictures)))
        if self.captions is not None:
            object.__setattr__(self, "captions", tuple(self.captions))
        if not self.images:
            raise InputError(f"the concept {self.name!r} has no pictures; give at least one")
        if self.captions is not None and len(self.captions) != len(self.images):
            raise InputError(f"the concept {self.name!r} has {len(self.captions)} captions for {len(self.images)} pictures; "
                             "give one each")
        if self.class_images and not self.class_prompt:
            raise InputError(f"the concept {self.name!r} has class pictures without a class prompt, as 'a photo of a cat'")
        for text in (self.prompt, *(self.captions or ())):
            if self.token not in text:
                raise InputError(f"the prompt {text!r} of {self.name!r} has no token {self.token!r}; write it into the prompt")

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each picture."""
        return self.captions if self.captions is not None else (self.prompt,) * len(self.images)


def load_concepts(source: Path) -> list[Concept]:
    """The concepts of a folder or of a concepts_list.json, in the order in which they are learned.

    A folder holds a folder of pictures for each concept, named after it, or the pictures of one concept. The prompt is then
    'a photo of <name>'.

    concepts_list.json is a list of objects. Each has "instance_data_dir" and "instance_prompt", with the token in angle
    brackets or given as "token". "class_prompt", "class_data_dir" (pictures for prior preservation), "name" and
    "initializer_token" (a word that the token starts from) are optional. Relative folders start at the file.

    A caption is FILE.txt beside FILE.jpg, or "text" beside "file_name" in metadata.jsonl.

    Raises InputError or FileError that names the file, the folder or the entry.
    """
    source = Path(source)
    with clear_errors("read", source):
        source.stat()
    concepts = _from_folder(source) if source.is_dir() else _from_list(source)
    check_distinct("concept's name", [c.name for c in concepts])
    check_distinct("concept's token", [c.token for c in concepts])
    return concepts


def with_initializers(concepts: Sequence[Concept], words: str | Mapping[str, str]) -> list[Concept]:
    """The concepts with another initializer_token: one word for all of them, or a word for each of these names.

    Raises InputError for a name that no concept has.
    """
    names = [concept.name for concept in concepts]
    words = dict.fromkeys(names, words) if isinstance(words, str) else words
    if unknown := sorted(set(words) - set(names)):
        raise InputError(f"initializer_token names {unknown[0]!r}, which is no concept; the concepts are {', '.join(names)}")
    return [replace(concept, initializer_token=words.get(concept.name, concept.initializer_token)) for concept in concepts]


def parse_initializers(given: Sequence[str]) -> str | dict[str, str]:
    """What `with_initializers` takes, from the command line: a single WORD, or NAME=WORD for each of some concepts."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    words = [(name, word) for name, _, word in (text.rpartition("=") for text in given)]
    if not all(name for name, _ in words) or len(dict(words)) < len(words):
        raise InputError(f"initializer_token must be one WORD, or NAME=WORD once for a concept, got {', '.join(given)}; write "
                         "for instance cat=animal")
    return dict(words)


def _from_folder(root: Path) -> list[Concept]:
    with clear_errors("read the folder", root):
        folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    if list_images(root):
        if any(list_images(folder) for folder in folders):
            raise InputError(f"{str(root)!r} holds pictures and folders of pictures; give one concept or one folder a concept")
        folders = [root.resolve()]
    elif not folders:
        raise InputError(f"{str(root)!r} holds no pictures ({', '.join(SUFFIXES)}); put in a folder of pictures a concept")
    return [_concept(folder, folder.name, token := token_for(folder.name), PROMPT.format(token=token)) for folder in folders]


def _from_list(path: Path) -> list[Concept]:
    entries = read_json(path)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise FileError(f"{str(path)!r} must hold a list of objects with instance_data_dir and instance_prompt; correct it")
    return [_from_entry(entry, f"entry {i} of {str(path)!r}", path.parent) for i, entry in enumerate(entries, 1)]


def _from_entry(entry: dict[str, Any], where: str, root: Path) -> Concept:
    if unknown := sorted(set(entry) - _KEYS):
        raise InputError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
    for key, value in entry.items():
        if not isinstance(value, str):
            raise InputError(f"{where}: {key} must be text, got {value!r}; put it in quotes")
    for key in ("instance_data_dir", "instance_prompt"):
        if key not in entry:
            raise InputError(f"{where} has no {key}; add it")
    prompt = entry["instance_prompt"]
    found = [entry["token"]] if "token" in entry else sorted(set(_TOKEN.findall(prompt)))
    if len(found) != 1:
        raise InputError(f"{where}: instance_prompt {prompt!r} must hold one new word, found {len(found)}; write it in angle "
                         "brackets, as in 'a photo of <cat>', or give it as \"token\"")
    name = entry.get("name", found[0].strip("<>*"))
    # the folder may be missing: other trainers fill it themselves
    others = root / entry["class_data_dir"] if "class_data_dir" in entry else None
    of_class = tuple(list_images(others)) if others is not None and others.is_dir() and "class_prompt" in entry else ()
    return _concept(root / entry["instance_data_dir"], name, found[0], prompt, entry.get("class_prompt"), of_class,
                    entry.get("initializer_token"))


def _concept(folder: Path, name: str, token: str, prompt: str, class_prompt: str | None = None,
             class_images: tuple[Path, ...] = (), initializer: str | None = None) -> Concept:
    images = list_images(folder)
    if not images:
        raise InputError(f"the folder {str(folder)!r} of {name!r} holds no pictures ({', '.join(SUFFIXES)}); put some into it")
    written = _captions(folder, images)
    captions = tuple(written.get(image, prompt) for image in images) if written else None
    return Concept(name, tuple(images), prompt, token, class_prompt, captions, class_images, initializer)


def _text(data: bytes, where: str) -> str:
    try:
        text = " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: {error.reason}; save it as UTF-8") from error
    if not text:
        raise InputError(f"{where} is empty; write a caption into it or remove it")
    return text


def _captions(folder: Path, images: list[Path]) -> dict[Path, str]:
    found = {}
    for image in images:
        beside = image.with_suffix(".txt")
        if beside.exists():
            found[image] = _text(read_bytes(beside), repr(str(beside)))
    table = folder / "metadata.jsonl"
    if not table.exists():
        return found
    known = {image.resolve(): image for image in images}
    for number, line in enumerate(read_bytes(table).splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {str(table)!r}"
        try:
            row = parse_json(line)
            file, text = row["file_name"], row["text"].encode()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f'{where} must be an object with "file_name" and "text"; correct it') from error
        if (image := known.get(inside(folder, str(file)))) is None:
            raise InputError(f"{where} names {file!r}, which is no picture in that folder; correct the name or remove the line")
        caption = _text(text, where)
        if found.setdefault(image, caption) != caption:
            raise InputError(f"{where} gives {file!r} a second caption; keep one of them")
    return found
