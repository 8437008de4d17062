"""What a cine needs of the header of a DICOM file, without the patient's name."""

import math
import os
import re
import struct
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ImplicitVRLittleEndian

from cmrssp.files import hashed

_NOT_MAGNITUDE = {"P", "R", "I", "PHASE", "PHASE MAP", "VELOCITY", "VELOCITY MAP", "REAL", "IMAGINARY"}
_GE_COMPONENT, _PHILIPS_SLOPE, _PHILIPS_INTERCEPT = 0x0043102F, 0x2005100E, 0x2005100D
_RR_MS = (250.0, 2500.0)
_ANYBODY = {"anon", "anonymous", "anonymized", "anonymised", "patient", "subject", "unknown", "none"}
# a warning of pydicom may cite a header's value
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module="pydicom")


class Image(NamedTuple):
    """One frame. Lengths in mm, times in ms; None where the header is silent."""

    path: Path
    place: str  # the path below the data folder; parts that name the patient are masked
    index: int = 0  # of the frame in its file
    reason: str = ""  # why the image cannot belong to a cine
    study: str = ""  # hash of patient and study
    patient: str = ""  # hash
    series: str = ""  # hash
    number: int = -1  # of the series
    instance: int = -1
    clock_ms: float = 0.0  # time of day of the acquisition
    trigger_ms: float | None = None  # since the R wave
    temporal: float | None = None  # position in time
    rr_ms: float | None = None
    grid: tuple[float, ...] = ()  # rows, columns, distance of the rows, distance of the columns
    position: tuple[float, ...] = ()  # of the first pixel, LPS
    axes: tuple[float, ...] = ()  # directions along a row and along a column, LPS
    slope: float = 1.0
    intercept: float = 0.0
    vendor: str = ""
    height_m: float | None = None
    weight_kg: float | None = None

    @property
    def order(self) -> tuple:
        """The order of acquisition."""
        return self.clock_ms, self.number, self.instance, self.index

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.axes[:3], self.axes[3:])


def read(path: Path) -> tuple[list[Image], set[str]]:
    """(the images of a DICOM file, words that name its patient); nothing of other files. Reads no pixels."""
    try:
        with open(path, "rb") as file:
            head = file.read(132)
            # without the preamble, a file begins with group 2 or 8
            bare = head[:2] in (b"\x02\0", b"\x08\0") and head[3:4] == b"\0"
            named = path.suffix.lower() in (".dcm", ".ima")
            if path.name.upper() == "DICOMDIR" or not (head[128:] == b"DICM" or bare or named):
                return [], set()
            file.seek(0)
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
            room = os.fstat(file.fileno()).st_size - file.tell()
        return _images(path, header, room), _identity(header)
    except Exception:  # a broken file makes pydicom raise anything
        return [Image(path, "", reason="cannot be read as a DICOM image (truncated?)")], set()


@cache
def _tag(name: str | int) -> BaseTag:
    return Tag(name)


def _values(header: pydicom.Dataset, name: str | int) -> Sequence:
    """What an element holds, as numbers or texts; () without one. Decoded here where pydicom has not done it
    yet: its own conversion takes longer than to read the file.
    """
    tag = _tag(name)
    element = header.get_item(tag) if tag in header else None
    if element is None or element.value in (None, "", b""):
        return ()
    if not isinstance(element, RawDataElement):
        return element.value if isinstance(element.value, MultiValue) else (element.value,)
    kind, value = element.VR, element.value
    if kind in (None, "UN"):
        kind = dictionary_VR(tag) if dictionary_has_tag(tag) else "FL"
    if code := {"US": "H", "SS": "h", "UL": "I", "FL": "f", "FD": "d"}.get(kind):
        order = "<" if element.is_little_endian else ">"
        return struct.unpack(f"{order}{len(value) // struct.calcsize(code)}{code}", value)
    return [text.strip(" \0") for text in value.decode("latin-1").split("\\")]


def _numbers(header: pydicom.Dataset, *names: str | int, count: int = 1) -> tuple[float, ...]:
    """The first `count` values of the first of these elements with so many finite numbers, else ()."""
    for name in names:
        with suppress(TypeError, ValueError, struct.error):  # a damaged value
            numbers = tuple(map(float, _values(header, name)[:count]))
            if len(numbers) == count and all(map(math.isfinite, numbers)):
                return numbers
    return ()


def _number(header: pydicom.Dataset, *names: str | int, low=-np.inf, high=np.inf) -> float | None:
    return next((number for number in _numbers(header, *names) if low <= number <= high), None)


def _texts(header: pydicom.Dataset, *names: str) -> list[str]:
    """The values of the first of these elements that has one."""
    found = (list(map(str, _values(header, name))) for name in names)
    return next((texts for texts in found if any(texts)), [""])


def _images(path: Path, header: pydicom.Dataset, room: int) -> list[Image]:
    """One image a frame, or one with the reason why none can be in a cine. `room`: bytes of the pixels."""
    rows, columns, bits = (_number(header, name) or 0 for name in ("Rows", "Columns", "BitsAllocated"))
    count, modality = int(_number(header, "NumberOfFrames") or 1), _texts(header, "Modality")[0] or "MR"
    if modality != "MR":
        return [_image(path, 0, header, f"no MR image (modality {modality})")]
    if not rows:
        raise ValueError("expected an image")
    compressed = header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian).is_compressed
    if not compressed and room < rows * columns * count * bits / 8:
        return [_image(path, 0, header, "truncated file")]
    groups = header.get("PerFrameFunctionalGroupsSequence", ())
    if len(groups) != count:
        return [_image(path, k, header) for k in range(count)]
    shared, images = header.get("SharedFunctionalGroupsSequence", ()), []
    for k, group in enumerate(groups):
        frame = pydicom.Dataset()
        frame.update(header)
        for element in (element for part in (*shared, group) for element in part):
            frame.update(element.value[0] if element.VR == "SQ" and element.value else {})
        images.append(_image(path, k, frame))
    return images


def _image(path: Path, index: int, header: pydicom.Dataset, reason: str = "") -> Image:
    """What is said of a frame."""
    study, patient = _texts(header, "StudyInstanceUID")[0], _texts(header, "PatientID", "PatientName")[0]
    clock = _texts(header, "FrameAcquisitionDateTime", "AcquisitionDateTime", "AcquisitionTime", "SeriesTime")
    rate = _number(header, "HeartRate", low=60000 / _RR_MS[1], high=60000 / _RR_MS[0])
    rr = _number(header, "NominalInterval", "RRIntervalTimeNominal", low=_RR_MS[0], high=_RR_MS[1])
    slope, intercept = _number(header, "RescaleSlope"), _number(header, "RescaleIntercept")
    if slope is None and (private := _number(header, _PHILIPS_SLOPE)):
        # (stored - intercept) / slope: Chenevert et al., Transl Oncol 7(1), 2014
        slope, intercept = 1 / private, -(_number(header, _PHILIPS_INTERCEPT) or 0.0) / private
    size = (*_numbers(header, "Rows"), *_numbers(header, "Columns"))
    image = Image(
        path,
        place="",
        index=index,
        study=hashed(f"{study or path.parent} {patient}"),
        patient=hashed(patient) if patient.casefold() not in {"", *_ANYBODY} else "",
        series=hashed(_texts(header, "SeriesInstanceUID")[0]),
        number=int(_number(header, "SeriesNumber") or -1),
        instance=int(_number(header, "InstanceNumber") or -1),
        clock_ms=_clock_ms(clock[0]),
        trigger_ms=_number(header, "TriggerTime", "NominalCardiacTriggerDelayTime"),
        temporal=_number(header, "TemporalPositionIndex", "TemporalPositionIdentifier"),
        rr_ms=rr or (rate and 60000 / rate),
        grid=(*size, *_numbers(header, "PixelSpacing", count=2)),
        position=_numbers(header, "ImagePositionPatient", count=3),
        axes=_numbers(header, "ImageOrientationPatient", count=6),
        slope=slope or 1.0,
        intercept=intercept or 0.0,
        vendor=_texts(header, "Manufacturer")[0],
        height_m=_number(header, "PatientSize", low=0.3, high=2.5),
        weight_kg=_number(header, "PatientWeight", low=1, high=400),
    )
    return image._replace(reason=reason or _why_no_cine(header, image))


def _why_no_cine(header: pydicom.Dataset, image: Image) -> str:
    kind = {word.upper() for word in _texts(header, "FrameType", "ImageType")}
    if "DERIVED" in kind:
        return "derived image"
    kind |= {word.upper() for word in _texts(header, "ComplexImageComponent")}
    if kind & _NOT_MAGNITUDE or _number(header, _GE_COMPONENT):
        return "phase, real or imaginary image"
    if len(image.grid) == 4 and min(image.grid) > 0 and image.position and image.axes:
        directions = np.reshape(image.axes, (2, 3))
        if np.allclose(directions @ directions.T, np.eye(2), atol=0.01):
            return ""
    return "no valid position, orientation or pixel spacing"


def _clock_ms(text: str) -> float:
    """The time of day from a time or a date with time; 0 without one."""
    found = re.fullmatch(r"(\d{8})?(\d\d)(\d\d)(\d\d(?:\.\d+)?)(\D.*)?", text)
    return 1000 * (3600 * int(found[2]) + 60 * int(found[3]) + float(found[4])) if found else 0.0


def _identity(header: pydicom.Dataset) -> set[str]:
    """Words that name the patient, small letters. The id of a file that says it is anonymous, or whose
    patient is named like the id and has no birth date, is a pseudonym.
    """
    name, id, born, order = (
        _texts(header, key)[0].casefold()
        for key in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber")
    )
    born = born if born.strip("0") else ""
    if _texts(header, "PatientIdentityRemoved")[0] == "YES" or (name == id and not born):
        return set()
    words = {*re.split(r"[\W_]+", name), id, born, order}
    return {word for word in words if len(word) > 1} - _ANYBODY
