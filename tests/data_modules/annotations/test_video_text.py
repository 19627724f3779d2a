"""Videos in various containers and pixel formats, with gaps, with sound, and damaged."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from data_modules.extraction.video_frames import frames_of_video
from tests.data_modules.extraction.tiny_media import grey, number, sound, video

TICKS = 1000  # time stamps per second
STEP = Fraction(3, 2)
CODECS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "mov": "mpeg4", "avi": "mpeg4", "ts": "libx264"}


def film(path, times, end, *, pixel_format="yuv420p", silence=0.0):
    """Write a video whose frame ``n`` appears at ``times[n]`` seconds; in an AVI, frames are evenly spaced."""
    regular = path.suffix == ".avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=round(1 / (times[1] - times[0])) if regular else 30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixel_format
        if not regular:
            stream.codec_context.time_base = Fraction(1, TICKS)
        audio = container.add_stream("aac", rate=8000) if silence else None
        lasting = {time: after - time for time, after in zip(times, [*times[1:], end], strict=True)}
        for frame in [*_frames(times, regular, stream), None]:
            for packet in stream.encode(frame):
                time = min(times, key=lambda time, packet=packet: abs(time - packet.pts * packet.time_base))
                packet.duration = round(lasting[time] / packet.time_base)  # which the encoder does not set
                container.mux(packet)
        for start in range(0, int(silence * 8000), 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
            container.mux(audio.encode(frame))
        if audio is not None:
            container.mux(audio.encode())
    return path


def _frames(times, regular, stream):
    for place, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(grey(place % 20), "rgb24")
        frame.time_base = 1 / stream.average_rate if regular else Fraction(1, TICKS)
        frame.pts = place if regular else round(time * TICKS)
        yield frame


def seen(path, step=STEP):
    return [number(picture) for picture in frames_of_video(path, step)]


def regular(count, rate):
    return [place / rate for place in range(count)]


@pytest.mark.parametrize("kind", CODECS)
def test_the_frame_shown_at_each_time_is_taken_from_any_container(tmp_path, kind):
    path = film(tmp_path / f"v.{kind}", regular(16, 2), 8.0)
    assert seen(path) == [0, 3, 6, 9, 12, 15]
    assert seen(path, Fraction(1)) == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm"])
def test_a_frame_is_shown_until_the_next_one_appears(tmp_path, kind):
    path = film(tmp_path / f"v.{kind}", [0, 0.1, 0.2, 1.499, 1.501, 2.9, 3.0, 7.4, 7.6, 7.7], 7.8)
    #   at 0      1.5: the frame of 1.499    3.0: just appeared    4.5, 6.0: still that    7.5: the frame of 7.4
    assert seen(path) == [0, 3, 6, 6, 6, 7]


def test_times_count_from_the_first_frame(tmp_path):
    assert seen(film(tmp_path / "v.mkv", [5.0, 5.5, 6.4, 6.6], 7.0)) == [0, 2]


def test_the_last_frame_counts_as_long_as_it_is_shown(tmp_path):
    assert seen(film(tmp_path / "a.mp4", [0, 1], 3.0)) == [0, 1]  # no frame is shown at 3.0
    assert seen(film(tmp_path / "b.mp4", [0, 1], 3.1)) == [0, 1, 1]


def test_sound_that_goes_on_behind_the_last_frame_is_no_damage(tmp_path):
    assert seen(film(tmp_path / "v.mp4", regular(8, 4), 2.0, silence=6.0)) == [0, 6]


@pytest.mark.parametrize("pixel_format", ["yuv420p10le", "yuv444p", "gray"])
def test_other_pixel_formats_become_rgb(tmp_path, pixel_format):
    path = film(tmp_path / "v.mp4", [0, 2], 4, pixel_format=pixel_format)
    assert [picture.mode for picture in frames_of_video(path, STEP)] == ["RGB"] * 3
    first, again, last = seen(path)
    assert first == again < last
    assert pixel_format == "gray" or (first, last) == (0, 1)  # gray encoders differ in the range of their values


def test_a_picture_that_comes_again_is_converted_once(tmp_path):
    pictures = list(frames_of_video(film(tmp_path / "v.mkv", [0, 6], 7), STEP))
    assert pictures[0] is pictures[3]


def _cut_matroska(path):
    film(path, regular(40, 4), 10.0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    return r"cut short: it ends after \d\.\d s of 10\.0 s"


def _overwritten(path):
    rng = np.random.default_rng(0)
    video(path, range(0, 10_000, 500), [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(20)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = bytes(range(100, 120))
    path.write_bytes(content)
    return r"a damaged frame at \d\.\d s"


def _without_index(path):
    film(path.with_suffix(".mp4"), regular(40, 4), 10.0)
    path.write_bytes(path.with_suffix(".mp4").read_bytes()[:-200])
    return "Invalid data found"


def _cover_of_a_song(path):
    with av.open(str(path), "w", format="mp4") as container:
        audio, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        container.mux(cover.encode(av.VideoFrame.from_ndarray(grey(0), "rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*audio.encode(frame), *audio.encode(), *cover.encode()])
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    return "no video in it"


def _zeros_for_pictures(path):
    film(path.with_suffix(".mp4"), [0, 1], 2.0)
    content = bytearray(path.with_suffix(".mp4").read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    return "no frame in it|Invalid data"


def _song(path):
    sound(path.with_suffix(".mp4")).rename(path)
    return "no video in it"


DAMAGES = [_cut_matroska, _overwritten, _without_index, _zeros_for_pictures, _cover_of_a_song, _song]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_video_that_cannot_be_read_to_its_end_says_why(tmp_path, damage):
    path = tmp_path / "v.mkv"
    reason = damage(path)
    with pytest.raises(Exception, match=reason):
        seen(path)
