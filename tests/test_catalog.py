import gzip
from pathlib import Path

import numpy as np
import pytest

from arae.data.catalog import DATASETS, find, read_arrays
from arae.data.images import list_folder
from arae.errors import InputError

HELD_OUT = DATASETS["images"].held_out


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def tree(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    return images, labels


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_every_entry_says_what_it_is_and_how_to_obtain_it(dataset):
    assert dataset.title
    assert dataset.terms
    assert dataset.obtain
    assert {"train", "test"} <= set(dataset.splits)
    assert dataset.kind == "folder" or (dataset.classes and set(dataset.files) == {"train", "test"})


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        find("cifar-10")


def test_idx_files_gzipped_or_not(tmp_path):
    images, labels = mnist(tmp_path)
    read = read_arrays("mnist", str(tmp_path), "train")
    assert np.array_equal(read.images, images)
    assert np.array_equal(read.labels, labels)
    assert read.classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-5], "promises 12 bytes of data, 7 are there"),
        (lambda raw: b"\0\0\x0d" + raw[3:], "not an idx file"),
        (lambda raw: b"", "not an idx file"),
        (lambda raw: gzip.compress(raw)[:-9], "can't be read"),
        (lambda raw: raw[:-1] + b"\x0b", "label 11 is out of range; mnist has 10 classes"),
        (lambda raw: idx(np.zeros(11, np.uint8)), "12 images need as many"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, damage, message):
    mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(damage(labels.read_bytes()))
    with pytest.raises(InputError, match=message):
        read_arrays("mnist", str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "train-images-idx3-ubyte is not in .*idx.gz"),
        ("cifar10", "data_batch_1.bin is not in .*binary version.*pickled"),
        ("svhn", "train_32x32.mat is not in .*npz"),
        ("imagenet", "image folder: `arae encode imagenet"),
    ],
)
def test_missing_files_say_which_where_and_how(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        read_arrays(name, str(tmp_path), "train")
    with pytest.raises(InputError, match=r"nowhere is not there|image folder"):
        read_arrays(name, str(tmp_path / "nowhere"), "train")


def test_cifar_binary(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    rows = np.concatenate([np.arange(4, dtype=np.uint8)[:, None], images.reshape(4, -1)], 1)
    (folder / "test_batch.bin").write_bytes(rows.tobytes())
    read = read_arrays("cifar10", str(tmp_path), "test")
    assert np.array_equal(read.images, images.transpose(0, 2, 3, 1))
    assert (read.labels.tolist(), read.classes[3]) == ([0, 1, 2, 3], "cat")
    (folder / "test_batch.bin").write_bytes(rows.tobytes()[:-1])
    with pytest.raises(InputError, match="not a whole number"):
        read_arrays("cifar10", str(tmp_path), "test")


def test_svhn_matlab_files(tmp_path):
    scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), np.uint8)
    scipy_io.savemat(tmp_path / "test_32x32.mat", {"X": images, "y": np.array([[1], [10], [9], [2], [10]])})
    read = read_arrays("svhn", str(tmp_path), "test")
    assert read.labels.tolist() == [1, 0, 9, 2, 0]
    assert np.array_equal(read.images[3], images[..., 3])


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"a": np.zeros(3)}, "has a; arrays named images and labels"),
        ({"x": np.zeros((2, 8, 8)), "y": np.zeros(2, int)}, "images are float64; they must be uint8"),
        ({"x": np.zeros((2, 8), np.uint8), "y": np.zeros(2, int)}, r"images have shape \(2, 8\)"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([0, -1])}, "labels run from -1 to 0"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([0, 10])}, "label 10 is out of range"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([0.0, 1.0])}, "whole-number labels"),
        ({"x": np.array([{}], object), "y": np.zeros(1, int)}, "can't be read as .npz"),
    ],
)
def test_npz_files_that_are_not_a_set(tmp_path, held, message):
    np.savez(tmp_path / "x.npz", **held)
    with pytest.raises(InputError, match=message):
        read_arrays("cifar10", str(tmp_path / "x.npz"), "all")


def test_npz_with_splits_of_its_own_and_channels_first(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x[:4], y_train=np.arange(4), x_test=x[4:], y_test=np.arange(2))
    counts = [len(read_arrays("cifar10", str(tmp_path / "x.npz"), split).labels) for split in ("train", "test", "all")]
    assert counts == [4, 2, 6]
    assert np.array_equal(read_arrays("cifar10", str(tmp_path / "x.npz"), "test").images, x[4:].transpose(0, 2, 3, 1))


def test_folder_with_splits(tmp_path):
    root = tree(tmp_path, "train/a/1.jpg", "train/b/deep/2.PNG", "val/b/3.jpg", "val/notes.txt", "val/4.jpg")
    train, test, whole = (list_folder(root, split, HELD_OUT) for split in ("train", "test", "all"))
    assert (train.paths, train.labels.tolist()) == (("train/a/1.jpg", "train/b/deep/2.PNG"), [0, 1])
    assert (test.paths, test.labels.tolist(), test.classes) == (("val/b/3.jpg",), [1], ("a", "b"))
    assert dict(test.skipped) == {"val/4.jpg": "in no class folder", "val/notes.txt": "not an image by its name"}
    assert len(whole.paths) == 3


def test_hold_out_is_a_tenth_and_stays_as_files_are_added(tmp_path):
    root = tree(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(200)))
    train, test = (set(list_folder(root, split, HELD_OUT).paths) for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == 400
    assert 20 < len(test) < 60
    tree(root, *(f"c/{i}.jpg" for i in range(50)))
    assert test == {path for path in list_folder(root, "test", HELD_OUT).paths if path[0] != "c"}


def test_a_class_may_be_called_train_and_a_folder_may_have_no_classes(tmp_path):
    vehicles = list_folder(tree(tmp_path / "v", "train/1.jpg", "plane/2.jpg"), "all", HELD_OUT)
    assert vehicles.classes == ("plane", "train")
    flat = list_folder(tree(tmp_path / "f", "1.jpg", "2.jpg"), "all", HELD_OUT)
    assert (flat.classes, flat.labels.tolist()) == (("images",), [0, 0])
    with pytest.raises(InputError, match="no image for split 'all' among 1 files"):
        list_folder(tree(tmp_path / "n", "a/readme.md"), "all", HELD_OUT)


def test_fashion_mnist(fashion_mnist):
    read = read_arrays("fashion-mnist", str(fashion_mnist), "test")
    assert read.images.shape == (10_000, 28, 28)
    assert np.bincount(read.labels).tolist() == [1000] * 10
