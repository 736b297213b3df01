from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.ped2 import list_clips, read_patches


def frames_of(count: int, value: int = 0) -> np.ndarray:
    """Frames of 2 x 3 patches of 10 pixels, with a rest of 2 pixels at the right and the bottom."""
    return np.full((count, 22, 32), value, np.uint8)


@pytest.fixture
def root(save_clip: Callable[..., Path]) -> Path:
    """Two test clips of 4 and 3 frames.

    In the first the patch (0, 1) turns to 60 in frame 1 and the patch (1, 2) grows brighter from
    frame 2 on, where its corner is anomalous; frame 1 is anomalous in the rest below the patches.
    In the second nothing moves but patch (0, 0) in its last frame.
    """
    first, masks = frames_of(4), frames_of(4)
    first[1:, :10, 10:20] = 60
    first[2, 10:20, 20:30] = 100
    first[3, 10:20, 20:30] = 200
    first[2, 20:, :] = 255
    masks[1, 21, 31] = 255
    masks[2:, 19, 29] = 255
    save_clip("Test001", first, masks)
    second = frames_of(3, 7)
    second[2, :10, :10] = 90
    return save_clip("Test002", second, frames_of(3))


def test_moving_patches_with_their_frame_and_label(root: Path) -> None:
    patches, frame_labels = read_patches(list_clips(root, False), 10, 10)
    assert (frame_labels.tolist(), frame_labels.dtype) == ([0, 1, 1, 1, 0, 0, 0], torch.int64)
    assert patches.groups is not None
    # Frame 0 is compared with frame 1; frames 4 and 5, the first of the second clip, are still.
    assert (patches.groups.tolist(), patches.groups.dtype) == ([0, 1, 2, 3, 6], torch.int64)
    assert patches.labels.tolist() == [0, 0, 1, 1, 0]
    assert patches.images.shape == (5, 3, 10, 10)
    assert patches.images.flatten(1).float().std(1).max() == 0
    assert patches.images[:, 0, 0, 0].tolist() == [0, 60, 100, 200, 90]
    batch = patches.subset([3, 4])[1]
    assert (batch["group"], batch["label"], batch["index"]) == (6, 0, 1)
    assert read_patches(list_clips(root, False), 4, 10)[0].images.shape == (5, 3, 4, 4)


def test_a_patch_moves_if_its_mean_change_exceeds_the_threshold(
    save_clip: Callable[..., Path],
) -> None:
    frames = frames_of(3, 200)
    # Brighter and darker do not cancel out: a mean absolute change of 5 in frame 1, of 6 in frame 2.
    frames[1, 0, :10] = [250, 150] * 5
    frames[2, 0, :10] = [250, 150] * 5
    frames[2, 1, :6] = 100
    clips = list_clips(save_clip("Train001", frames), True)
    patches, frame_labels = read_patches(clips, 10, 10, motion_threshold=5)
    assert patches.groups is not None
    assert patches.groups.tolist() == [2]
    assert (patches.labels.tolist(), frame_labels.tolist()) == ([0], [0, 0, 0])
    lower, _ = read_patches(clips, 10, 10, motion_threshold=4.9)
    assert lower.groups is not None
    assert lower.groups.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"nothing moves in the 3 frames of Train001 .*=6\.5 grey"):
        read_patches(clips, 10, 10, motion_threshold=6.5)


def test_patches_show_their_part_of_the_frame(save_clip: Callable[..., Path]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 22, 32), np.uint8)
    patches, _ = read_patches(list_clips(save_clip("Train001", frames), True), 10, 10)
    assert len(patches) == 12
    for place, image in enumerate(patches.images):
        frame, row, column = place // 6, place % 6 // 3 * 10, place % 3 * 10
        expected = torch.from_numpy(frames[frame, row : row + 10, column : column + 10])
        assert torch.equal(image, expected.expand(3, -1, -1))


def test_the_folder_itself_and_the_one_above_are_roots(root: Path) -> None:
    clips = list_clips(root / "UCSDped2", False)
    assert clips == list_clips(str(root), False)
    assert [(c.name, len(c.frames), len(c.masks)) for c in clips] == [
        ("Test001", 4, 4),
        ("Test002", 3, 3),
    ]


def test_missing_files_say_what_was_expected(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*--data.root DIR"):
        list_clips(tmp_path / "nowhere", True)
    with pytest.raises(FileNotFoundError, match=r"UCSDped2/Train is missing: .*tar.gz"):
        list_clips(root, True)
    (root / "UCSDped2" / "Train" / "notes").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"holds no clips; expected .*Train001/\*.tif"):
        list_clips(root, True)
    masks = root / "UCSDped2" / "Test" / "Test002_gt"
    (masks / "002.bmp").rename(masks / "002.old")
    with pytest.raises(ValueError, match=r"2 masks .* for the 3 frames of Test002"):
        list_clips(root, False)
    masks.rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match="Test002_gt is missing: without masks"):
        list_clips(root, False)


def test_broken_clips(root: Path, save_clip: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"patch_size=23 exceeds the frames of 32x22.*22 or less"):
        read_patches(list_clips(root, False), 10, 23)
    save_clip("Test003", np.zeros((2, 24, 32), np.uint8), np.zeros((2, 24, 32), np.uint8))
    with pytest.raises(ValueError, match=r"Test003/001.tif is 32x24 .* before are 32x22"):
        read_patches(list_clips(root, False), 10, 10)
    save_clip("Train001", frames_of(2))
    (root / "UCSDped2" / "Train" / "Train001" / "002.tif").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"(?s)1 of 2 images of Train001 .*002.tif"):
        read_patches(list_clips(root, True), 10, 10)
    save_clip("Train002", frames_of(1))
    with pytest.raises(ValueError, match=r"Train002 holds 1 frames .* at least two"):
        list_clips(root, True)
