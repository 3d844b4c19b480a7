"""Concepts from folders and from concepts_list.json, and one clear line for everything that is wrong with them."""

import json

import pytest
from PIL import Image

from stamina_fast.errors import FileError, InputError, StaminaError
from stamina_fast.io.concepts import Concept, load_concepts, parse_initializers, with_initializers


def fill(folder, count=2, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / f"{i}{suffix}")
    return folder


def listed(tmp_path, *entries):
    path = tmp_path / "concepts_list.json"
    path.write_text(json.dumps(entries))
    return path


def test_one_folder_a_concept(tmp_path):
    for name in ("cat", "My cup", "zebra"):
        fill(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no concept")
    (tmp_path / ".hidden").mkdir()
    concepts = load_concepts(tmp_path)
    assert [c.name for c in concepts] == ["My cup", "cat", "zebra"]
    assert [c.token for c in concepts] == ["<my-cup>", "<cat>", "<zebra>"]
    assert concepts[1].prompt == "a photo of <cat>"
    assert [path.name for path in concepts[1].images] == ["0.png", "1.png"]
    assert concepts[1].captions is None
    assert concepts[1].texts == ("a photo of <cat>",) * 2


def test_one_folder_of_pictures(tmp_path, monkeypatch):
    fill(tmp_path / "cat")
    assert [c.name for c in load_concepts(tmp_path / "cat")] == ["cat"]
    monkeypatch.chdir(tmp_path / "cat")
    assert [c.name for c in load_concepts(".")] == ["cat"]


def test_the_list_of_diffusers(tmp_path):
    fill(tmp_path / "a")
    fill(tmp_path / "b" / "images")
    path = listed(
        tmp_path,
        {"instance_prompt": "a photo of <new1> cat", "class_prompt": "cat", "instance_data_dir": "./a/", "class_data_dir": "."},
        {"instance_prompt": "a photo of sks", "instance_data_dir": str(tmp_path / "b/images"), "token": "sks", "name": "Rex"},
        {"instance_prompt": "a V* cup", "instance_data_dir": "a"},
    )
    concepts = load_concepts(path)
    assert [(c.name, c.token) for c in concepts] == [("new1", "<new1>"), ("Rex", "sks"), ("V", "V*")]
    assert concepts[0].prompt == "a photo of <new1> cat"
    assert [c.class_prompt for c in concepts] == ["cat", None, None]
    assert len(concepts[1].images) == 2


def test_a_word_to_start_from(tmp_path):
    fill(tmp_path / "a")
    entry = {"instance_data_dir": "a"}
    path = listed(tmp_path, {"instance_prompt": "a <cat>", "initializer_token": "animal", **entry},
                  {"instance_prompt": "a <cup>", **entry})
    concepts = load_concepts(path)
    assert [c.initializer_token for c in concepts] == ["animal", None]
    for given, words in ((["thing"], ["thing", "thing"]), (["cup=mug"], ["animal", "mug"]),
                         (["cup=mug", "cat=pet"], ["pet", "mug"])):
        assert [c.initializer_token for c in with_initializers(concepts, parse_initializers(given))] == words
    with pytest.raises(InputError, match="'dog', which is no concept; the concepts are cat, cup"):
        with_initializers(concepts, parse_initializers(["cup=mug", "dog=pet"]))


@pytest.mark.parametrize("given", [["pet", "thing"], ["pet", "cup=mug"], ["=pet"], ["cup=mug", "cup=pet"]])
def test_words_to_start_from_that_are_unclear(given):
    with pytest.raises(InputError, match="must be one WORD, or NAME=WORD"):
        parse_initializers(given)


def test_captions(tmp_path):
    folder = fill(tmp_path / "cat", 4)
    (folder / "0.txt").write_text("  <cat> on a\n table ")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "text": "a drawing of <cat>"}\n\n{"file_name": "0.png", "text": "<cat> on a table"}\n'
    )
    (concept,) = load_concepts(folder)
    assert concept.captions == ("<cat> on a table", "a drawing of <cat>", "a photo of <cat>", "a photo of <cat>")
    assert concept.texts == concept.captions


@pytest.mark.parametrize(("file", "text", "said"), [
    ("0.txt", "a photo of a cat", "no token '<cat>'"), ("0.txt", " \n", "is empty"), ("0.txt", b"\xff<cat>", "not UTF-8"),
    ("metadata.jsonl", '{"file_name": "9.png", "text": "<cat>"}', "no picture in that folder"),
    ("metadata.jsonl", '{"file_name": "../x.png", "text": "<cat>"}', "outside"),
    ("metadata.jsonl", '{"file_name": "0.png"}', "line 1 .*must be an object"), ("metadata.jsonl", "[1]", "must be an object"),
    ("metadata.jsonl", '{"file_name": "0.png", "text": 3}', "must be an object"), ("metadata.jsonl", "{", "must be an object"),
    ("metadata.jsonl", '{"file_name": "0.png", "text": "<cat>"}\n{"file_name": "0.png", "text": "a <cat>"}', "second caption"),
])
def test_bad_captions(tmp_path, file, text, said):
    folder = fill(tmp_path / "cat")
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said) as caught:
        load_concepts(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "said"), [
    ({"instance_prompt": "a photo of a cat"}, "found 0"), ({"instance_prompt": "<a> and <b>"}, "found 2"),
    ({"instance_prompt": None}, "must be text"), ({"token": "<dog>"}, "no token '<dog>'"),
    ({"instance_data_dir": "missing"}, "missing"), ({"instance_data_dir": "empty"}, "holds no pictures"),
    ({"instance_promt": "x"}, "unknown key 'instance_promt'"),
    ({"name": "a\nb"}, "printable text"), ({"token": "two words"}, "one word"), ({"token": ""}, "one word"),
    ({"initializer_token": "two words"}, "must be one word"), ({"initializer_token": ""}, "must be one word"),
    ({"initializer_token": 3}, "must be text"),
])
def test_bad_entries(tmp_path, change, said):
    fill(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    path = listed(tmp_path, {"instance_prompt": "a photo of <cat>", "instance_data_dir": "a", **change})
    with pytest.raises(StaminaError, match=said) as caught:
        load_concepts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [
    "{}", "[]", "[1]", "3", '[{"instance_prompt": "<a>"}]', '[{"instance_data_dir": "a"}]', "no json",
])
def test_bad_lists(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(StaminaError, match=r"list\.json"):
        load_concepts(tmp_path / "list.json")


def test_bad_folders(tmp_path):
    with pytest.raises(FileError, match=r"missing.*No such file.*check the path"):
        load_concepts(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no pictures"):
        load_concepts(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="'cat' holds no pictures"):
        load_concepts(tmp_path)
    fill(tmp_path / "cat")
    fill(tmp_path)
    with pytest.raises(InputError, match="holds pictures and folders of pictures"):
        load_concepts(tmp_path)


def test_names_alike(tmp_path):
    fill(tmp_path / "cat")
    fill(tmp_path / "Cat")
    with pytest.raises(InputError, match="each concept's name must differ, got 'Cat' and 'cat'"):
        load_concepts(tmp_path)


def test_tokens_alike(tmp_path):
    fill(tmp_path / "my cat")
    fill(tmp_path / "my-cat")
    with pytest.raises(InputError, match="each concept's token must differ"):
        load_concepts(tmp_path)


def test_concepts_made_by_hand(tmp_path):
    good = {"name": "cat", "images": ["x.png"], "prompt": "a <cat>", "token": "<cat>"}
    assert Concept(**good).images[0].name == "x.png"
    for change, said in (
        ({"images": []}, "no pictures"), ({"prompt": "a cat"}, "no token"), ({"token": ""}, "one word"),
        ({"name": " "}, "printable"),
        ({"captions": ["a <cat>", "b <cat>"]}, "2 captions for 1"), ({"captions": ["a cat"]}, "no token"),
    ):
        with pytest.raises(InputError, match=said):
            Concept(**{**good, **change})
