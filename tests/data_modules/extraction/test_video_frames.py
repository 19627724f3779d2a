"""Frames at regular times, identified by their shades."""

from fractions import Fraction

import numpy as np
import pytest

from data_modules.extraction.video_frames import frames_of_video
from tests.data_modules.extraction.tiny_media import number, sound, turn, video


def numbers(path, seconds="1.5"):
    return [number(image) for image in frames_of_video(path, Fraction(seconds))]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_are_those_shown_at_each_time(tmp_path, suffix):
    path = video(tmp_path / f"a{suffix}", range(0, 5000, 500))  # ten frames, two per second
    assert numbers(path) == [0, 3, 6, 9]
    assert numbers(path, "1") == [0, 2, 4, 6, 8]


def test_a_frame_of_a_changing_rate_is_shown_until_the_next(tmp_path):
    # shown at 0, 1.5, 3.0 and 4.5 s: the second since 0.1 s, twice; the fourth since 2.9 s; the sixth from 4.5 s on
    path = video(tmp_path / "a.mkv", [0, 100, 2800, 2900, 4400, 4500, 4600])
    assert numbers(path) == [0, 1, 3, 5]
    assert numbers(path, "0.7") == [0, 1, 1, 1, 2, 3, 3]


def test_a_video_of_one_frame_is_one_frame(tmp_path):
    assert numbers(video(tmp_path / "a.mp4", [0])) == [0]


def test_a_video_is_upright(tmp_path):
    wide = np.zeros((64, 96, 3), dtype=np.uint8)
    wide[:, :48] = 255  # white on the left
    path = video(tmp_path / "a.mp4", [0, 100], [wide, wide])
    turn(path)
    image = np.asarray(next(frames_of_video(path, Fraction(1))))
    assert image.shape == (96, 64, 3)
    assert image[:40].mean() > 250
    assert image[-40:].mean() < 5


def test_a_file_with_sound_alone_is_no_video(tmp_path):
    with pytest.raises(ValueError, match="no video in it"):
        numbers(sound(tmp_path / "a.mp4"))


def test_a_video_cut_short_is_not_taken_for_a_whole_one(tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(20)]
    path = video(tmp_path / "a.mp4", range(0, 10_000, 500), noise, movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Exception, match=r"cut short: it ends after \d\.\d s of|a damaged frame at \d\.\d s"):
        numbers(path)


def test_a_broken_time_stamp_does_not_fill_the_memory(tmp_path):
    with pytest.raises(ValueError, match="more than 10,000 frames"):
        numbers(video(tmp_path / "a.mkv", [0, 100_000]), "0.001")
