"""Data sets: every kind and every way to be wrong, exact augmentation, and loaders that repeat themselves."""

import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sysmt.errors import ConfigError, DataError
from sysmt.nn.data import pixels as pixels_module
from sysmt.nn.data.labelled_images import Loader, open_data
from sysmt.nn.data.preprocessing import add_noise, normalise, pad_crop_flip, preset

RNG = np.random.default_rng(7)
CLASSES = ("cat", "dog", "owl")


def write_npz(path: Path, size: int = 32, channels: int = 3, **replaced: np.ndarray | None) -> str:
    arrays: dict[str, np.ndarray | None] = {
        "x_train": RNG.integers(0, 256, (50, size, size, channels), dtype=np.uint8),
        "y_train": np.arange(50) % 5,
        "x_test": RNG.integers(0, 256, (23, size, size, channels), dtype=np.uint8),
        "y_test": np.arange(23) % 5,
    }
    np.savez(path, **{key: value for key, value in (arrays | replaced).items() if value is not None})
    return f"npz:{path}"


def write_folder(
    root: Path, splits: tuple[str, ...] = ("train", "val"), side: int = 32, each: int = 4
) -> str:
    for split, name in itertools.product(splits, CLASSES):
        (root / split / name).mkdir(parents=True)
        for i in range(each):
            pixels = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return f"imagefolder:{root}"


def everything(loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    assert len(batches) == len(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# -- loaders -----------------------------------------------------------------------------------


def test_test_images_arrive_in_order_and_normalised(tmp_path: Path) -> None:
    data = open_data(write_npz(tmp_path / "d.npz"))
    x, y = everything(data.loader("test", batch_size=10))
    stored = np.load(tmp_path / "d.npz")
    expected = (stored["x_test"] / 255.0 - preset("cifar").mean) / preset("cifar").std
    assert (x.dtype, y.dtype, x.shape) == (torch.float32, torch.int64, (23, 3, 32, 32))
    np.testing.assert_allclose(x.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    np.testing.assert_array_equal(y, stored["y_test"])
    assert data.num_classes == 5
    np.testing.assert_array_equal(data.class_counts("test"), [5, 5, 5, 4, 4])
    assert (data.images("train"), data.images("test")) == (50, 23)


@settings(max_examples=25, deadline=None)
@given(
    first=st.integers(1, 60), second=st.integers(1, 60), seed=st.integers(0, 5), augment=st.booleans(),
    count=st.integers(1, 50),
)  # fmt: skip
def test_a_loader_repeats_itself_whatever_the_batch_size(
    tmp_path_factory: pytest.TempPathFactory, first: int, second: int, seed: int, augment: bool, count: int
) -> None:
    data = open_data(write_npz(tmp_path_factory.mktemp("d") / "d.npz", size=8), preprocessing="small")
    data.preprocessing = data.preprocessing.replace(noise_std=0.1)
    options = {"augment": augment, "seed": seed, "images": count}
    loader = data.loader("train", batch_size=first, **options)
    x, y = everything(loader)
    assert loader.images == len(y) == count
    for again in (loader, data.loader("train", batch_size=second, **options)):
        x2, y2 = everything(again)
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_seeds_and_epochs_differ(tmp_path: Path) -> None:
    data = open_data(write_npz(tmp_path / "d.npz"), seed=3)
    x, y = everything(data.loader("train", augment=True))
    assert torch.equal(x, everything(data.loader("train", augment=True, seed=3))[0])
    other, other_y = everything(data.loader("train", augment=True, seed=4))
    later, later_y = everything(data.loader("train", augment=True, epoch=1))
    for images, labels in ((other, other_y), (later, later_y)):
        assert not torch.equal(x, images)
        assert sorted(labels.tolist()) == sorted(y.tolist())


def test_subsets(tmp_path: Path) -> None:
    data = open_data(write_npz(tmp_path / "d.npz"))

    def keys(loader: Loader) -> list[bytes]:
        return [image.numpy().tobytes() for image in everything(loader)[0]]

    few, more, everyone = (keys(data.loader("test", images=n, seed=n or 0)) for n in (5, 12, None))
    assert set(few) < set(more) < set(everyone)  # the same ones, whatever the seed
    assert few == [key for key in everyone if key in few]
    one, two = (set(keys(data.loader("train", images=10, seed=seed))) for seed in (0, 1))
    assert one != two
    assert one == set(keys(data.loader("train", images=10, seed=0, epoch=9)))
    assert keys(data.loader("train", shuffle=False)) != keys(data.loader("train"))
    with pytest.warns(UserWarning, match="24 images were asked for, the test split has 23"):
        assert data.loader("test", images=24).images == 23


def test_impossible_loaders(tmp_path: Path) -> None:
    data = open_data(write_npz(tmp_path / "d.npz", x_train=None, y_train=None))
    with pytest.raises(DataError, match="no training images"):
        data.loader("train")
    assert not data.has("train")
    assert data.images("train") == 0
    with pytest.raises(DataError, match="split='val'"):
        data.loader("val")  # type: ignore[arg-type]
    for options in ({"images": 0}, {"batch_size": 0}, {"batch_size": 2.5}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            data.loader("test", **options)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    x = np.zeros((3, 32, 32, 3), np.uint8)
    y = np.arange(3)
    one, two, three = (
        open_data(write_npz(tmp_path / f"{i}.npz", x_test=x + (i == 1), y_test=y[::-1] if i == 2 else y,
                            x_train=None, y_train=None)).fingerprint() for i in range(3)
    )  # fmt: skip
    assert len({one, two, three}) == 3
    again = write_npz(tmp_path / "again.npz", x_test=x, y_test=y, x_train=None, y_train=None)
    assert open_data(again).fingerprint() == one


# -- augmentation ------------------------------------------------------------------------------


@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_pad_crop_flip_against_the_obvious_loop(pad: int, height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, 256, (6, 2, height, width), dtype=np.uint8)
    offsets = rng.integers(0, 2 * pad + 1, (6, 2))
    flips = rng.random(6) < 0.5
    result = pad_crop_flip(torch.from_numpy(pixels), pad, torch.from_numpy(offsets), torch.from_numpy(flips))
    for image, (top, left), flip, got in zip(pixels, offsets, flips, result, strict=True):
        padded = np.zeros((2, height + 2 * pad, width + 2 * pad), np.uint8)  # black
        padded[:, pad : pad + height, pad : pad + width] = image
        crop = padded[:, top : top + height, left : left + width]
        np.testing.assert_array_equal(got.numpy(), crop[:, :, ::-1] if flip else crop)


def test_every_offset_and_both_flips_occur(tmp_path: Path) -> None:
    """A white image shows its crop: the black rows and columns tell the offset, the rest is white."""
    white = np.full((4000, 32, 32, 3), 255, np.uint8)
    white[:, :, 0] = 128  # the left column is grey: tells flips
    data = open_data(write_npz(tmp_path / "d.npz", x_train=white, y_train=np.zeros(4000, int)))
    x, _ = everything(data.loader("train", augment=True))
    black = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), data.preprocessing)
    rows = (x[:, :1, :, 16] == black[:, :1, 0, 0]).sum(dim=2)
    assert set(rows.flatten().tolist()) == {0, 1, 2, 3, 4}
    grey = normalise(torch.full((1, 3, 1, 1), 128, dtype=torch.uint8), data.preprocessing)
    columns = (x[:, 0, 16, :] == grey[0, 0, 0, 0]).float()
    share_left = float((columns[:, :16].sum(1) > 0).float().mean() / (columns.sum(1) > 0).float().mean())
    assert 0.45 < share_left < 0.55


def test_noise_has_the_asked_strength_and_stays_in_range() -> None:
    grey = torch.full((4, 1, 64, 64), 128, dtype=torch.uint8)
    noisy = add_noise(grey, 0.1, np.random.default_rng(0))
    assert noisy.dtype == torch.uint8
    assert float(noisy.float().std()) == pytest.approx(25.5, rel=0.03)
    assert set(add_noise(grey, 50.0, np.random.default_rng(0)).unique().tolist()) >= {0, 255}


def test_presets() -> None:
    assert preset("cifar").to_record() == {
        "name": "cifar", "image_size": 32, "pad_pixels": 4, "flip": True, "random_resized_crop": False,
        "noise_std": 0.0, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    assert preset("small", 64).pad_pixels == 6
    imagenet = preset("imagenet")
    assert (imagenet.resize, imagenet.image_size, imagenet.random_resized_crop) == (256, 224, True)
    assert "centre crop 224 x 224" in imagenet.describe()
    with pytest.raises(ConfigError, match="did you mean 'cifar'"):
        preset("cifer")


@pytest.mark.parametrize(
    "change",
    [{"image_size": 0}, {"pad_pixels": -1}, {"resize": 31}, {"std": (1, 0, 1)}, {"mean": (0.5,)},
     {"noise_std": float("nan")}, {"random_resized_crop": True}, {"padding": 4}],
)  # fmt: skip
def test_impossible_preprocessing(change: dict) -> None:
    with pytest.raises(ConfigError):
        preset("cifar").replace(**change)


# -- npz ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"y_test": np.full(23, -1)}, "-1"),
        ({"y_test": np.full(23, 10**9)}, "labels from"),
        ({"y_test": np.zeros(22, int)}, "23 integers"),
        ({"y_test": np.zeros(23)}, "float64"),
        ({"y_test": None}, "x_test without its counterpart"),
        ({"x_test": None}, "y_test without its counterpart"),
        ({"x_test": np.zeros((23, 32, 32, 3), np.float32)}, "float32"),
        ({"x_test": np.zeros((23, 3, 32, 32), np.uint8)}, "shape"),
        ({"x_test": np.zeros((0, 32, 32, 3), np.uint8), "y_test": np.zeros(0, int)}, "N > 0"),
        ({"x_test": np.zeros((23, 16, 16, 3), np.uint8)}, "different shapes"),
        (dict.fromkeys(("x_test", "y_test", "x_train", "y_train")), "none of the arrays"),
        ({"x_test": np.array([object()])}, "plain arrays"),
    ],
)  # fmt: skip
def test_wrong_npz(replaced: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        open_data(write_npz(tmp_path / "d.npz", **replaced))


def test_damaged_npz(tmp_path: Path) -> None:
    write_npz(tmp_path / "d.npz")
    whole = (tmp_path / "d.npz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an archive"):
        (tmp_path / "d.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"d\.npz"):
            open_data(f"npz:{tmp_path / 'd.npz'}")


def test_grey_images(tmp_path: Path) -> None:
    grey = {"x_test": np.zeros((23, 9, 9), np.uint8), "x_train": np.zeros((50, 9, 9), np.uint8)}
    data = open_data(write_npz(tmp_path / "d.npz", **grey))
    assert next(iter(data.loader("test")))[0].shape == (23, 1, 9, 9)
    with pytest.raises(DataError, match="1 channels"):
        open_data(f"npz:{tmp_path / 'd.npz'}", preprocessing=preset("small", 9))


def test_images_are_scaled_on_request_only(tmp_path: Path) -> None:
    spec = write_npz(tmp_path / "d.npz", size=20)
    with pytest.raises(DataError, match="20 x 20 pixels.*32 x 32; give image_size=32"):
        open_data(spec, preprocessing="cifar")
    data = open_data(spec, preprocessing="cifar", image_size=32)
    assert next(iter(data.loader("test")))[0].shape == (23, 3, 32, 32)
    assert open_data(spec, preprocessing="small").preprocessing.image_size == 20
    with pytest.raises(DataError, match="image_size=24 contradicts"):
        open_data(spec, preprocessing=preset("cifar"), image_size=24)


# -- specifications ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("imagefoldr:x", "did you mean 'imagefolder'"),
        ("mnist", "allowed: digits, digits32, cifar10:DIR"),
        ("npz", "needs a path"),
        ("npz:/nowhere.npz", "/nowhere.npz is missing"),
        ("imagefolder:/nowhere", "/nowhere is missing"),
        ("digits:here", "takes no path"),
    ],
)
def test_wrong_specifications(spec: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_data(spec)


@pytest.mark.parametrize(
    ("side", "name", "size"), [(32, "cifar", 32), (64, "small", 64), (200, "imagenet", 224)]
)
def test_auto_goes_by_size_and_says_so(side: int, name: str, size: int, tmp_path: Path) -> None:
    data = open_data(write_folder(tmp_path, side=side, each=1))
    assert (data.preprocessing.name, data.preprocessing.image_size) == (name, size)
    assert f"{side} x {side}" in data.notes[0]
    assert name in data.notes[0]


# -- digits ------------------------------------------------------------------------------------


def test_digits() -> None:
    data = open_data("digits")
    assert (data.images("train"), data.images("test"), data.num_classes) == (1201, 596, 10)
    assert data.class_counts("test").min() >= 58
    x, _ = everything(data.loader("test"))
    assert x.shape == (596, 1, 16, 16)
    assert torch.equal(x, everything(open_data("digits", seed=5).loader("test"))[0])
    assert data.fingerprint() == open_data("digits").fingerprint()


def test_digits32_are_the_same_digits_anywhere_on_a_black_ground() -> None:
    small, large = open_data("digits"), open_data("digits32")
    assert [large.images(split) for split in ("train", "test")] == [1201, 596]
    plain = large.loader("train", shuffle=False)
    x, labels = everything(plain)
    assert x.shape == (1201, 1, 32, 32)
    assert torch.equal(x[:, :, 8:24, 8:24], everything(small.loader("train", shuffle=False))[0])
    assert bool((x[:, :, :8] == -1).all())  # black, before augmentation
    moved, same_labels = everything(large.loader("train", shuffle=False, augment=True))
    assert torch.equal(labels, same_labels)
    ink = moved.clamp(min=0).sum(dim=(1, 2))  # by column: noise on black stays below 0
    centre = (ink * torch.arange(32)).sum(dim=1) / ink.sum(dim=1)
    assert float(centre.max() - centre.min()) > 12  # crops move by 8 pixels to either side


# -- image folders -----------------------------------------------------------------------------


def test_folder_matches_its_files(tmp_path: Path) -> None:
    data = open_data(write_folder(tmp_path))
    assert data.class_names == CLASSES
    x, y = everything(data.loader("test", batch_size=5))
    assert y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    pixels = np.array(Image.open(tmp_path / "val" / "dog" / "2.png"))
    expected = normalise(torch.from_numpy(pixels.transpose(2, 0, 1))[None].contiguous(), data.preprocessing)
    assert torch.equal(x[6], expected[0])


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test")])
def test_cifar10_as_folders(splits: tuple[str, ...], tmp_path: Path) -> None:
    root = write_folder(tmp_path, splits).partition(":")[2]
    assert open_data(f"cifar10:{root}").images("test") == 12


def test_class_folders_alone_are_for_evaluation(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = open_data(f"imagefolder:{tmp_path / 'val'}")
    assert data.images("test") == 12
    with pytest.raises(DataError, match=r"train=SPEC"):
        data.loader("train")
    for second in (f"imagefolder:{tmp_path / 'train'}", f"imagefolder:{tmp_path}"):
        both = open_data(f"imagefolder:{tmp_path / 'val'}", train=second)
        assert both.loader("train").images == 12
    (tmp_path / "train" / "dog").rename(tmp_path / "train" / "emu")
    with pytest.raises(DataError, match="different classes"):
        open_data(f"imagefolder:{tmp_path / 'val'}", train=f"imagefolder:{tmp_path / 'train'}")
    (tmp_path / "train" / "gnu").mkdir()
    with pytest.raises(DataError, match="gnu has no images"):
        open_data(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "gnu").rmdir()
    with pytest.raises(DataError, match="emu|dog"):
        open_data(f"imagefolder:{tmp_path}")


def test_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class folders"):
        open_data(f"imagefolder:{tmp_path}")
    Image.new("RGB", (32, 32)).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match="in a folder per class"):
        open_data(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match="cifar-10-batches-py"):
        open_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("preset_name", ["cifar", "imagenet"], ids=["in memory", "streamed"])
def test_unreadable_images(preset_name: str, tmp_path: Path) -> None:
    spec = write_folder(tmp_path)
    bad = tmp_path / "val" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(DataError, match=r"dog/1\.png"):
        everything(open_data(spec, preprocessing=preset_name).loader("test"))
    data = open_data(spec, preprocessing=preset_name, skip_bad_images=True)
    with pytest.warns(UserWarning, match=r"dog/1\.png.*left out"):
        labels = torch.cat([y for _, y in data.loader("test", batch_size=4)])
    assert labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert data.skipped() == [bad]


def test_decoded_images_are_cached_and_a_damaged_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_folder(tmp_path / "data")
    first, _ = everything(open_data(spec, cache_dir=tmp_path / "cache").loader("test"))
    (cached,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(pixels_module, "_decode", lambda *_: pytest.fail("decoded again"))
        again, _ = everything(open_data(spec, cache_dir=tmp_path / "cache").loader("test"))
    assert torch.equal(first, again)
    cached.write_bytes(cached.read_bytes()[:200])
    data = open_data(spec, cache_dir=tmp_path / "cache")
    with pytest.warns(UserWarning, match="damaged"):
        loader = data.loader("test")
    assert torch.equal(first, everything(loader)[0])
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "val" / "owl" / "0.png")
    changed, _ = everything(open_data(spec, cache_dir=tmp_path / "cache").loader("test"))
    assert not torch.equal(first, changed)


def test_large_images_as_torchvision_evaluates_them(tmp_path: Path) -> None:
    from sysmt.nn.torchvision_import import torchvision

    transforms = torchvision.transforms
    (tmp_path / "val" / "cat").mkdir(parents=True)
    image = Image.fromarray(RNG.integers(0, 256, (300, 411, 3), dtype=np.uint8))
    image.save(tmp_path / "val" / "cat" / "0.png")
    data = open_data(f"imagefolder:{tmp_path / 'val'}")
    theirs = transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])(image)  # fmt: skip
    for _ in range(2):  # decoded, then kept
        (x, _), *_ = data.loader("test")
        torch.testing.assert_close(x[0], theirs, atol=1e-6, rtol=0)


def test_random_resized_crops_repeat_and_vary(tmp_path: Path) -> None:
    data = open_data(write_folder(tmp_path, side=120, each=2), preprocessing="imagenet", image_size=48)
    one = everything(data.loader("train", augment=True, batch_size=4))[0]
    assert one.shape == (6, 3, 48, 48)
    assert torch.equal(one, everything(data.loader("train", augment=True, batch_size=3))[0])
    assert not torch.equal(one, everything(data.loader("train", augment=True, epoch=1))[0])


def test_streaming_gives_what_memory_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_folder(tmp_path)
    in_memory = everything(open_data(spec).loader("train", augment=True, batch_size=5))
    monkeypatch.setattr(pixels_module, "MEMORY_LIMIT_BYTES", 0)
    streamed = everything(open_data(spec).loader("train", augment=True, batch_size=5))
    assert torch.equal(in_memory[0], streamed[0])
    assert torch.equal(in_memory[1], streamed[1])


# -- CIFAR-10's own files ----------------------------------------------------------------------


def test_cifar10_python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sysmt.nn.torchvision_import import torchvision

    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch"):
        batch = {"data": RNG.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 9, 1, 2]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    with pytest.raises(DataError, match="incomplete or damaged"):
        open_data(f"cifar10:{tmp_path}")
    # The published files' checksums do not fit these; None accepts any.
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", None]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    for where in (tmp_path, folder):
        data = open_data(f"cifar10:{where}")
        assert (data.num_classes, data.images("train"), data.images("test")) == (10, 4, 4)
        assert data.preprocessing == preset("cifar")


# -- class folders that are some of the network's ------------------------------------------------


def subset(root: Path) -> str:
    """Only dog and owl have images; by position they would be 0 and 1."""
    for name, shade in (("dog", 10), ("owl", 20)):
        (root / "val" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (32, 32), (shade + i,) * 3).save(root / "val" / name / f"{i}.png")
    return f"imagefolder:{root}"


@pytest.mark.parametrize(
    "text",
    ["cat\ndog\nemu\nowl\n", "cat house cat\ndog a dog\n\nemu an emu\nowl", "cat\tx\ndog\ty\nemu\tz\nowl\tu"],
)
def test_labels_come_from_a_file_of_class_names(text: str, tmp_path: Path) -> None:
    spec = subset(tmp_path / "data")
    (tmp_path / "names.txt").write_text(text)
    for data in (
        open_data(spec, classes=tmp_path / "names.txt"),
        open_data(spec, classes=["cat", "dog", "emu", "owl"]),
    ):
        assert (data.num_classes, data.class_names) == (4, ("cat", "dog", "emu", "owl"))
        assert everything(data.loader("test"))[1].tolist() == [1, 1, 1, 3, 3, 3]
        assert "labels by the 4 class names of" in data.notes[0]
    (tmp_path / "data" / "classes.txt").write_text(text)
    assert open_data(spec).class_counts("test").tolist() == [0, 3, 0, 3]


def test_labels_come_from_the_training_folders_that_have_more_classes(tmp_path: Path) -> None:
    spec = subset(tmp_path / "some")
    full = write_folder(tmp_path / "all")
    data = open_data(spec, train=full)
    assert data.class_names == CLASSES
    assert data.class_counts("test").tolist() == [0, 3, 3]
    assert data.class_counts("train").tolist() == [4, 4, 4]
    turned = open_data(full, train=spec)  # fewer classes to train with
    assert turned.class_counts("train").tolist() == [0, 3, 3]
    ordered = open_data(spec, train=full, classes=["owl", "dog", "cat"])
    assert ordered.class_counts("test").tolist() == [3, 3, 0]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            ["cat", "dogs", "owl"],
            r"has class folders that the classes given lacks: dog \(did you mean 'dogs'\?\)",
        ),
        (["dog", "owl", "dog"], "has 'dog' more than once"),
        ([], "is empty; a name for each class"),
        ("missing.txt", r"missing\.txt is no readable list of classes"),
    ],
)
def test_lists_of_classes_that_do_not_fit_are_refused(classes: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_data(subset(tmp_path), classes=classes)


def test_classes_are_for_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="classes are for image folders"):
        open_data(write_npz(tmp_path / "d.npz"), classes=["a"])


# -- links, and what is no image ----------------------------------------------------------------


def test_a_link_back_into_a_class_folder_counts_no_image_twice(tmp_path: Path) -> None:
    spec = write_folder(tmp_path)
    (tmp_path / "val" / "cat" / "deeper").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "val" / "cat" / "deeper" / "a.png")
    (tmp_path / "val" / "cat" / "a loop").symlink_to(".")
    (tmp_path / "val" / "cat" / "deeper" / "loop").symlink_to("..")
    with pytest.warns(UserWarning, match=r"val/cat/a loop leads to .*val/cat, whose images are counted"):
        data = open_data(spec)
    assert data.class_counts("test").tolist() == [5, 4, 4]


def test_a_link_to_a_folder_elsewhere_is_followed_once(tmp_path: Path) -> None:
    spec = write_folder(tmp_path / "data")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "more" / "a.png")
    (tmp_path / "data" / "val" / "cat" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "data" / "val" / "dog" / "one.png").symlink_to(tmp_path / "more" / "a.png")
    assert open_data(spec).class_counts("test").tolist() == [5, 5, 4]
    (tmp_path / "data" / "val" / "cat" / "again").symlink_to(tmp_path / "more")
    with pytest.warns(UserWarning, match="whose images are counted already"):
        assert open_data(spec).class_counts("test").tolist() == [5, 5, 4]


def test_a_folder_of_two_classes_is_refused(tmp_path: Path) -> None:
    spec = write_folder(tmp_path)
    (tmp_path / "val" / "dog" / "cats").symlink_to(tmp_path / "val" / "cat")
    with pytest.raises(DataError, match=r"val/cat belongs to two classes, cat and dog, through links"):
        open_data(spec)


def test_pipes_are_no_images_and_links_without_a_target_are_named(tmp_path: Path) -> None:
    spec = write_folder(tmp_path)
    os.mkfifo(tmp_path / "val" / "cat" / "pipe.png")
    (tmp_path / "val" / "cat" / "itself").symlink_to("itself")
    data = open_data(spec)
    assert data.class_counts("test").tolist() == [4, 4, 4]
    (tmp_path / "val" / "dog" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png is no readable image"):
        open_data(spec).loader("test")


def test_a_damaged_deflate_stream_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    pixels = (np.random.default_rng(0).random((99, 8, 8, 3)) * 8).astype(
        np.uint8
    )  # few values, which deflate codes in few bits
    np.savez_compressed(path, x_test=pixels, y_test=np.arange(99))
    content = bytearray(path.read_bytes())
    content[200:260] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.npz is no readable \.npz file of plain arrays \(.*x_test\.npy"):
        open_data(f"npz:{path}")


def test_names_that_are_too_long_are_missing() -> None:
    for kind in ("npz", "imagefolder", "cifar10"):
        with pytest.raises(DataError, match="a is missing"):
            open_data(f"{kind}:{'a' * 300}")
