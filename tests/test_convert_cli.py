"""The vmamba-jax command as a user meets it: results, reports, one clear line for each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe
import torch_writer
from PIL import Image

from vmamba_jax import VSSM, VMambaConfig, list_models
from vmamba_jax.convert import load_model, load_torch_file, read_weights, save_model
from vmamba_jax.data.augment import EvalTransform
from vmamba_jax.imagenet import imagenet_classes

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
FIXTURES = DATA / "fixtures"
RELEASED = FIXTURES / "cls_released_v2.pth"
TRAINING = FIXTURES / "cls_training_with_ema_and_yacs_config.pth"


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, size in (("a.png", (40, 52)), ("b.jpg", (64, 48)), ("inner/[c].png", (33, 90))):
        pixels = draw.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_convert_writes_a_model_and_reports_what_it_did(run, tmp_path):
    code, out, _ = run("convert", TRAINING, tmp_path / "model")
    assert code == 0
    assert "weights: model_ema" in out
    assert "70" in out
    assert "another set of weights; --weights or --entry chooses" in out
    assert "yacs.config.CfgNode, not run" in out
    saved, read = load_model(tmp_path / "model"), read_weights(TRAINING)
    jax.tree.map(np.testing.assert_array_equal, saved.variables, read.variables())


def test_convert_says_which_tensors_a_folder_rounds(run, tmp_path):
    weights = load_torch_file(RELEASED)["model"]
    weights["classifier.head.bias"] = weights["classifier.head.bias"].astype(np.float64)
    torch_writer.save(tmp_path / "a.pth", weights)
    code, out, _ = run("convert", tmp_path / "a.pth", tmp_path / "model")
    assert code == 0
    assert "not kept: 1 tensors of float64 are rounded to float32" in out
    code, out, _ = run("convert", tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert code == 0
    assert "not kept" not in out
    assert (
        read_weights(tmp_path / "b.safetensors").state_dict["classifier.head.bias"].dtype == float
    )


def test_convert_takes_the_entry_and_the_prefix_that_it_is_told(run, tmp_path):
    weights = load_torch_file(RELEASED)["model"]
    both = {f"{name}.{key}": array for name in ("one", "two") for key, array in weights.items()}
    torch_writer.save(tmp_path / "a.pth", {"net": both})
    code, _, err = run("convert", tmp_path / "a.pth", tmp_path / "model")
    assert code == 1
    assert "'one.'" in err
    assert "Choose with --prefix" in err
    code, out, _ = run(
        *("convert", tmp_path / "a.pth", tmp_path / "model"), *("--entry", "net", "--prefix", "two")
    )
    assert code == 0
    assert "prefix: two." in out


def test_convert_writes_a_folder_of_the_hugging_face_port(run, tmp_path):
    code, out, _ = run("convert", RELEASED, tmp_path / "port", "--to", "huggingface")
    assert code == 0
    assert "written: " in out
    assert "note: " not in out  # one rank in every stage
    assert run("convert", tmp_path / "port", tmp_path / "a.safetensors")[0] == 0
    expected = load_torch_file(RELEASED)["model"]
    given = read_weights(tmp_path / "a.safetensors").state_dict
    assert given.keys() == expected.keys()
    for key, array in given.items():
        np.testing.assert_array_equal(array, expected[key], strict=True)


def test_convert_back_gives_pytorch_its_own_bits(run, tmp_path):
    assert run("convert", FIXTURES / "cls_bfloat16.pth", tmp_path / "model")[0] == 0
    assert run("convert", tmp_path / "model", tmp_path / "a.safetensors")[0] == 0
    assert run("convert", tmp_path / "model", tmp_path / "b", "--to", "safetensors")[0] == 0
    expected = load_torch_file(FIXTURES / "cls_bfloat16.pth")["model"]
    given = read_weights(tmp_path / "a.safetensors").state_dict
    assert given.keys() == expected.keys()
    for key, array in given.items():
        np.testing.assert_array_equal(array, expected[key], strict=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--entry", "model"), "inside a file"),
        (("--prefix", "model."), "inside a file"),
        (("--step", "best"), "among the checkpoints of a run"),
        (("--weights", "model"), "one model, and not of plain weights"),
    ],
)
def test_a_choice_that_a_saved_model_does_not_leave_is_refused(run, tmp_path, options, fault):
    read = read_weights(RELEASED)
    about = {**read.provenance, "averaged": True}
    save_model(tmp_path / "model", read.variables(), read.config, about)
    code, _, err = run("convert", tmp_path / "model", tmp_path / "b.safetensors", *options)
    assert code == 1
    assert fault in err
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parity
def test_a_written_pth_file_is_read_by_pytorch(run, tmp_path):
    import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    for name in ("cls_released_v2", "cls_bfloat16"):
        target = tmp_path / f"{name}.pth"
        assert run("convert", FIXTURES / f"{name}.pth", target)[0] == 0
        theirs = torch.load(target, weights_only=True)["model"]
        expected = torch.load(FIXTURES / f"{name}.pth", weights_only=True)["model"]
        assert theirs.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in theirs.items())
        ours = load_torch_file(target)["model"]
        for key, array in load_torch_file(FIXTURES / f"{name}.pth")["model"].items():
            np.testing.assert_array_equal(ours[key], array, strict=True)


def test_convert_swaps_the_head_and_says_so(run, tmp_path):
    code, out, _ = run("convert", RELEASED, tmp_path / "model", "--num-classes", 3)
    assert code == 0
    assert "a new head of 3 classes in place of 10" in out
    assert load_model(tmp_path / "model").config.num_classes == 3


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("convert", FIXTURES / "bad_shape.pth", "x"), "A_logs has shape"),
        (("convert", FIXTURES / "bad_truncated.pth", "x"), "cut short"),
        (("convert", "missing.pth", "x"), "error: missing.pth: No such file"),
        (("convert", RELEASED, FIXTURES), "exists already"),
        (("convert", RELEASED, "x", "--weights", "ema"), "no averaged"),
        (("convert", RELEASED, "x", "--num-classes", "-1"), "num_classes"),
        (("convert", RELEASED, "x.onnx"), ".onnx files are not written, but .safetensors, .pth"),
        (("summary", "vmamba_tiny"), "Did you mean"),
        (("summary", "vanilla_vmamba_tiny", "--image-size", "3"), "too small"),
        (("predict", RELEASED), "give either --checkpoint PATH or --model NAME"),
        (("predict", RELEASED, "--model", "vmamba_tiny_s1l8"), "needs --pretrained"),
        (("predict", RELEASED, "--model", "nonesuch", "--pretrained"), "unknown model"),
        (("predict", RELEASED, "--checkpoint", "missing"), "No such file"),
        (("predict", RELEASED, "--checkpoint", RELEASED, "--top", "0"), "must be positive"),
        (("predict", RELEASED, "--checkpoint", RELEASED, "--save", "x.psd"), "no picture format"),
        (
            ("predict", RELEASED, "--checkpoint", FIXTURES / "mmseg_raw_with_message_hub.pth"),
            "no classification head",
        ),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else None,
)
def test_a_mistake_ends_in_one_line_and_leaves_nothing(
    run, tmp_path, monkeypatch, arguments, fault
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert fault in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
def test_models_lists_every_model_with_its_published_accuracy(run):
    code, out, _ = run("models")
    assert code == 0
    assert all(name in out for name in list_models())
    (row,) = (line for line in out.splitlines() if "vmamba_base_s1l20" in line)
    for cell in ("86.6", "15.2", "83.8", "#v2cls/vssm1_base_0229s_ckpt_epoch_225.pth"):
        assert cell in row


def test_summary_adds_up(run):
    code, out, _ = run("summary", "vmamba_tiny_s1l8")
    assert code == 0
    assert "28 x 28 x 192" in out
    (total,) = (line for line in out.splitlines() if "total" in line)
    assert "30,249,064" in total
    assert "4.906" in total


def test_predictions_are_the_softmax_of_the_model(run, photos):
    code, out, _ = run(
        "predict", photos, "--checkpoint", RELEASED, "--image-size", 48, "--json", "--batch-size", 2
    )
    assert code == 0
    results = json.loads(out)
    names = ["a.png", "b.jpg", "[c].png"]
    assert [Path(result["image"]).name for result in results] == names
    weights = read_weights(RELEASED)
    apply = jax.jit(VSSM(weights.config).apply)
    for result in results:
        pixels = EvalTransform(48)(Image.open(result["image"]).convert("RGB"))
        logits = apply(weights.variables(), jnp.asarray(pixels)[None])
        expected = np.asarray(jax.nn.softmax(logits))[0]
        best = np.argsort(-expected)[:5]
        assert [p["label"] for p in result["predictions"]] == best.tolist()
        assert [p["name"] for p in result["predictions"]] == [f"class {i}" for i in best]
        given = [p["probability"] for p in result["predictions"]]
        np.testing.assert_allclose(given, expected[best], rtol=1e-4)


def test_the_probability_of_the_only_class_is_its_sigmoid(run, photos, tmp_path):
    assert run("convert", RELEASED, tmp_path / "model", "--num-classes", 1)[0] == 0
    image = photos / "a.png"
    options = ("--checkpoint", tmp_path / "model", "--image-size", 48, "--json")
    code, out, _ = run("predict", image, *options)
    assert code == 0
    (prediction,) = json.loads(out)[0]["predictions"]
    weights = read_weights(tmp_path / "model")
    pixels = EvalTransform(48)(Image.open(image).convert("RGB"))
    logit = jax.jit(VSSM(weights.config).apply)(weights.variables(), jnp.asarray(pixels)[None])
    expected = 1 / (1 + np.exp(-np.asarray(logit).item()))
    assert prediction["probability"] == pytest.approx(expected, rel=1e-4)


def test_an_unreadable_image_is_reported_and_the_rest_go_on(run, photos, tmp_path):
    (photos / "a.png").write_bytes((photos / "a.png").read_bytes()[:50])
    missing, picture = tmp_path / "none.jpg", tmp_path / "picture.png"
    code, out, err = run(
        *("predict", photos, missing, "--checkpoint", RELEASED, "--image-size", 48),
        *("--save", picture, "--top", 3),
    )
    assert code == 1
    assert err.count("unreadable: ") == 2
    assert "a.png" in err
    assert "none.jpg" in err
    assert "[c].png" in out
    with Image.open(picture) as image:
        assert image.size == (760, 2 * 224)
        colours = image.getcolors(1 << 20)
        assert colours is not None
        assert (31, 119, 180) in {colour for _, colour in colours}  # the bars


def test_a_folder_without_images_is_said(run, tmp_path):
    code, _, err = run("predict", tmp_path, "--checkpoint", RELEASED)
    assert code == 1
    assert "no images" in err


def test_the_packaged_class_names_are_those_of_imagenet():
    names = imagenet_classes()
    assert len(names) == 1000
    assert (names[0], names[281], names[999]) == (
        "tench, Tinca tinca",
        "tabby, tabby cat",
        "toilet tissue, toilet paper, bathroom tissue",
    )


def in_a_process(script: str, *arguments: object) -> str:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_convert_and_predict_need_no_extra(photos, tmp_path):
    script = """
import sys
from vmamba_jax import cli
for arguments in (["convert", sys.argv[1], sys.argv[2]],
                  ["predict", sys.argv[3], "--checkpoint", sys.argv[2], "--image-size", "48",
                   "--save", sys.argv[2] + ".png"]):
    sys.argv[1:], kept = arguments, sys.argv[1:]
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code == 0, ended.code
    sys.argv[1:] = kept
print("imported:", {"torch", "yacs", "mmengine", "sklearn", "matplotlib"} & set(sys.modules))
"""
    out = in_a_process(script, TRAINING, tmp_path / "model", photos / "a.png")
    assert out.rstrip().endswith("imported: set()")


@pytest.mark.exhaustive
def test_a_full_size_model_converts_exactly_within_bounds_of_memory(tmp_path):
    with np.load(DATA / "golden_released" / "vmamba_base_s1l20.npz") as arrays:
        meta, expected = json.loads(str(arrays["meta"])), arrays["logits"]
    path = tmp_path / "base.pth"
    torch_writer.save(path, {"model": recipe.state_dict(meta["shapes"], meta["seed"])})
    script = """
import sys
from peak_memory import peak_memory
from vmamba_jax import cli
before = peak_memory()
sys.argv[1:] = ["convert", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as ended:
    assert ended.code == 0
print(peak_memory() - before)
"""
    extra = int(in_a_process(script, path, tmp_path / "model").splitlines()[-1])
    assert extra < 1.5 * path.stat().st_size + (200 << 20)
    saved = load_model(tmp_path / "model")
    assert isinstance(saved.config, VMambaConfig)
    images = jnp.asarray(
        recipe.images(meta["input_shape_nchw"], meta["seed"]).transpose(0, 2, 3, 1)
    )
    logits = jax.jit(VSSM(saved.config).apply)(saved.variables, images)
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=2e-5)
