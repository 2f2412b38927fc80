"""Where results of images go: nothing is written over an image, or over another image's result."""

from pathlib import Path

import pytest

from vmamba_jax.picture_path import check_picture, is_folder, result_paths


def test_one_file_an_image_in_a_folder_by_the_image_s_name():
    images = [Path("a/x.jpg"), Path("b/y.png")]
    assert result_paths("--save", Path("out"), images) == [Path("out/x.png"), Path("out/y.png")]


def test_images_of_one_name_are_numbered():
    images = [Path("a/x.jpg"), Path("b/X.jpg"), Path("c/0002-x.jpg")]
    paths = result_paths("--save", Path("out"), images, ".labels.png")
    assert [path.name for path in paths] == [
        "0001-x.labels.png",
        "0002-X.labels.png",
        "0003-0002-x.labels.png",
    ]


def test_an_ending_makes_it_the_file_of_a_single_image_unless_it_is_a_folder(tmp_path):
    assert result_paths("--save", tmp_path / "x.png", [Path("a.jpg")]) == [tmp_path / "x.png"]
    (tmp_path / "v1.0").mkdir()
    assert is_folder(tmp_path / "v1.0")
    path = tmp_path / "v1.0" / "a.png"
    assert result_paths("--save", tmp_path / "v1.0", [Path("a.jpg")]) == [path]
    with pytest.raises(ValueError, match="2 images don't fit one picture: give --save a folder"):
        result_paths("--save", tmp_path / "x.png", [Path("a.jpg"), Path("b.jpg")])


def test_no_image_is_written_over(tmp_path, monkeypatch):
    image = tmp_path / "a.png"
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for given in (Path(), tmp_path / "link", Path("a.png")):
        with pytest.raises(ValueError, match=r"--save: \S*a.png is one of the images; choose"):
            result_paths("--save", given, [image])
    with pytest.raises(ValueError, match="is one of the images"):
        check_picture("--save", Path("a.png"), [image])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a folder is needed, and a file has that name"):
        result_paths("--save", tmp_path / "file", [image])


def test_what_holds_no_picture_is_refused(tmp_path):
    # Of no format, of one that Pillow only reads, and of one without colours.
    for name in ("a", "a.txt", "a.psd", "a.xbm"):
        with pytest.raises(ValueError, match="no picture format has that ending"):
            check_picture("--save", tmp_path / name, [])
    (tmp_path / "b.png").mkdir()
    with pytest.raises(ValueError, match="there is a folder of that name"):
        check_picture("--save", tmp_path / "b.png", [])
    check_picture("--save", tmp_path / "a.JPG", [])
