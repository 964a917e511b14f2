"""Small real data sets with features in front of their texts, made into records where they are asked for (data.source).

digits: 1,797 handwritten digits of 8 x 8 pixels (scikit-learn's load_digits, of the UCI repository, CC BY 4.0) as 16
patches of 2 x 2 pixels in [0, 1], row by row; the text is the digit's name. The last 360 are for validation; of the
others each is there five times, as it is and moved by a pixel to every side.

spoken_digits: the Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0), 3,000
recordings of six speakers at 8 kHz, read from $HDLM_DATA/fsdd/recordings/*.wav (DIGIT_SPEAKER_TAKE.wav), or from
fsdd.npz there. A vector is two log mel spectra of 20 bands, 20 ms apart; there are up to 24, as the recording is long.
The text is the digit's name. Takes 0 to 4 are for validation, by the data set's own convention; of unseen_speaker all
of the last speaker, of whom nothing is trained on.
"""

from __future__ import annotations

import functools
import os
import wave
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from hdlm_jax.common import jsons
from hdlm_jax.common.extras import package
from hdlm_jax.data.features import encoded

FEATURES, TEXT = "features", "text"  # fields of the records
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def patches(image: np.ndarray, size: int) -> np.ndarray:
    """[n, size^2] of an image [height, width] whose sides are multiples of `size`: its patches, row by row."""
    rows, columns = (n // size for n in image.shape)
    return image.reshape(rows, size, columns, size).swapaxes(1, 2).reshape(rows * columns, size * size)


def image_of(found: np.ndarray, size: int) -> np.ndarray:
    """The square image that `patches` [n, size^2] are of."""
    side = round(len(found) ** 0.5)
    return found.reshape(side, side, size, size).swapaxes(1, 2).reshape(side * size, side * size)


def moved(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """Images [n, height, width] moved by so many pixels (-1, 0 or 1), with zeros where nothing was."""
    height, width = images.shape[1:]
    wide = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return wide[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]


def _write(path: str, records: Iterable[dict]) -> str:
    jsons.write_lines(path, records)
    return path


def _digits(folder: str) -> tuple[str, str]:
    found = package("sklearn.datasets", "examples", "data.source='digits'").load_digits()
    images, names = found.images / 16, [NAMES[digit] for digit in found.target]
    many = np.concatenate([moved(images[:-360], *by) for by in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))])

    def records(images: np.ndarray, names: list[str]) -> Iterator[dict]:
        for image, name in zip(images, names, strict=True):
            yield {FEATURES: patches(image, 2).tolist(), TEXT: name}

    return (_write(os.path.join(folder, "digits_train.jsonl"), records(many, 5 * names[:-360])),
            _write(os.path.join(folder, "digits_valid.jsonl"), records(images[-360:], names[-360:])))


RATE, FRAMES, BANDS, MOST = 8000, 2, 20, 24


def log_mel(audio: np.ndarray) -> np.ndarray:
    """float32 [n, FRAMES * BANDS] of samples at 8 kHz, n <= MOST: log energies in bands of the mel scale up to 4 kHz,
    of windows of 32 ms, without the recording's mean and in units of its deviation; what is longer is cut."""
    window, hop = 256, RATE // 50
    count = min(MOST * FRAMES, max(FRAMES, 1 + (len(audio) - window) // hop) // FRAMES * FRAMES)
    audio = np.pad(audio.astype(np.float64), (0, max(0, (count - 1) * hop + window - len(audio))))
    frames = np.stack([audio[i * hop : i * hop + window] for i in range(count)]) * np.hanning(window)
    power = np.abs(np.fft.rfft(frames)) ** 2
    mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)  # noqa: E731
    at = mel(np.fft.rfftfreq(window, 1 / RATE)) / mel(RATE / 2) * (BANDS + 1)  # a band's middle is a whole number
    bands = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(1, BANDS + 1)))
    found = np.log(power @ bands + 1.0)
    found = (found - found.mean()) / max(found.std(), 1e-6)
    return found.reshape(-1, FRAMES * BANDS).astype(np.float32)


def recordings() -> Iterator[tuple[int, int, int, np.ndarray]]:
    """(digit, speaker, take, samples int16) of every recording; speakers are numbered by their names.

    Raises:
      ValueError: they are not there.
    """
    folder = Path(os.path.expandvars("$HDLM_DATA/fsdd"))
    if (folder / "fsdd.npz").exists():
        with np.load(folder / "fsdd.npz", allow_pickle=False) as found:
            audio, offset, *labels = (found[name] for name in ("audio", "offset", "digit", "speaker", "take"))
        for i, (digit, speaker, take) in enumerate(zip(*(a.tolist() for a in labels), strict=True)):
            yield digit, speaker, take, audio[offset[i] : offset[i + 1]]
        return
    names = [(path, path.stem.split("_")) for path in sorted(folder.glob("recordings/*.wav"))]
    if not names:
        raise ValueError(f"data.source='spoken_digits': no recordings/*.wav in {folder}; give the folder of a clone of "
                         "github.com/Jakobovski/free-spoken-digit-dataset this name, or set HDLM_DATA")
    speakers = sorted({parts[1] for _, parts in names})
    for path, (digit, speaker, take) in names:
        with wave.open(str(path)) as file:
            yield int(digit), speakers.index(speaker), int(take), np.frombuffer(file.readframes(-1), "<i2")


def _spoken(name: str, held_out: Callable[[int, int], bool], folder: str) -> tuple[str, str]:
    """held_out: of speaker and take, whether a recording is for validation."""
    records: tuple[list[dict], list[dict]] = [], []
    for digit, speaker, take, audio in recordings():
        record = {FEATURES: encoded(log_mel(audio).astype(np.float16)), TEXT: NAMES[digit]}
        records[held_out(speaker, take)].append(record)
    return (_write(os.path.join(folder, f"{name}_train.jsonl"), records[0]),
            _write(os.path.join(folder, f"{name}_valid.jsonl"), records[1]))


EXAMPLES: dict[str, Callable[[str], tuple[str, str]]] = {
    "digits": _digits,
    "spoken_digits": functools.partial(_spoken, "spoken_digits", lambda speaker, take: take < 5),
    "unseen_speaker": functools.partial(_spoken, "unseen_speaker", lambda speaker, take: speaker == 5)}


def write(name: str, folder: str) -> tuple[str, str]:
    """The records of an example as two files of JSON lines in a folder, for training and validation; their paths. Files
    that are there are taken as they are.

    Raises:
      ValueError: the package or folder that has the data is not there.
    """
    files = tuple(os.path.join(folder, f"{name}_{split}.jsonl") for split in ("train", "valid"))
    if all(map(os.path.exists, files)):
        return files[0], files[1]
    os.makedirs(folder, exist_ok=True)
    return EXAMPLES[name](folder)
