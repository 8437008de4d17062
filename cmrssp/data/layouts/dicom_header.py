"""What a cine needs of the header of a DICOM file, without the patient's name."""

import math
import os
import re
import struct
import warnings
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

_SECONDARY_CAPTURE, _DIRECTORY = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.1.3.10"
_MR_IMAGES = [f"1.2.840.10008.5.1.4.1.1.4{end}" for end in ("", ".1", ".4")]  # classic, enhanced, converted
_NOT_MAGNITUDE = {"P", "R", "I", "PHASE", "PHASE MAP", "VELOCITY", "VELOCITY MAP", "REAL", "IMAGINARY"}
_GE_COMPONENT, _PHILIPS_SLOPE, _PHILIPS_INTERCEPT = 0x0043102F, 0x2005100E, 0x2005100D
_MODALITIES = {
    "CR",
    "CT",
    "DX",
    "ECG",
    "KO",
    "MR",
    "NM",
    "OT",
    "PR",
    "PT",
    "RF",
    "SC",
    "SEG",
    "SR",
    "US",
    "XA",
}
_RR_MS = (250.0, 2500.0)
_ANYBODY = {"anon", "anonymous", "anonymized", "anonymised", "patient", "subject", "unknown", "none"}
_TAGS = [Tag(tag) for tag in (
    "SOPClassUID", "ImageType", "ComplexImageComponent", "Modality", "Manufacturer", "PatientName",
    "PatientID", "PatientBirthDate", "AccessionNumber", "PatientIdentityRemoved", "PatientSize",
    "PatientWeight", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "AcquisitionNumber",
    "InstanceNumber", "AcquisitionTime", "AcquisitionDateTime", "SeriesTime", "TriggerTime",
    "NominalCardiacTriggerDelayTime", "TemporalPositionIdentifier", "NominalInterval", "HeartRate",
    "InversionTime", "Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient",
    "SamplesPerPixel", "BitsAllocated", "NumberOfFrames", "RescaleSlope", "RescaleIntercept",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", _GE_COMPONENT, _PHILIPS_SLOPE,
    _PHILIPS_INTERCEPT,
)]  # fmt: skip
_PLAIN = {ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian}
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
    series: str = ""  # hash
    number: int = -1  # of the series
    acquisition: int = -1
    instance: int = -1
    clock_ms: float = 0.0  # time of day of the acquisition
    trigger_ms: float | None = None  # since the R wave
    temporal: float | None = None  # position in time
    rr_ms: float | None = None
    inversion_ms: float | None = None
    grid: tuple[float, ...] = ()  # rows, columns, distance of the rows, distance of the columns
    position: tuple[float, ...] = ()  # of the first pixel, LPS
    axes: tuple[float, ...] = ()  # directions along a row and along a column, LPS
    slope: float = 1.0
    intercept: float = 0.0
    syntax: str = ""  # transfer syntax UID
    vendor: str = ""
    height_m: float | None = None
    weight_kg: float | None = None

    @property
    def order(self) -> tuple:
        """The order of acquisition."""
        return self.clock_ms, self.number, self.acquisition, self.instance, self.index

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.axes[:3], self.axes[3:])


def is_dicom(path: Path) -> bool:
    """Whether a file begins, or is called, like DICOM."""
    try:
        with open(path, "rb") as file:
            head = file.read(132)
    except OSError:
        return False
    # without the preamble, a file begins with group 2 or 8
    bare = head[:2] in (b"\x02\0", b"\x08\0") and head[3:4] == b"\0"
    return head[128:] == b"DICM" or bare or path.suffix.lower() in (".dcm", ".ima")


def read(path: Path) -> tuple[list[Image], set[str]]:
    """(the images of a DICOM file, words that name its patient). Reads no pixels."""
    unreadable = Image(path, "", reason="cannot be read as DICOM (truncated?)")
    try:
        with open(path, "rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=_TAGS)
            room = os.fstat(file.fileno()).st_size - file.tell()
            said = _Elements(header)
            return _images(path, header, said, room) or [unreadable], _identity(header, said)
    except Exception:  # a broken file makes pydicom raise anything
        return [unreadable], set()


class _Elements(dict):
    """{tag: the values of an element as text or numbers}. Plain decoding of what pydicom has split; its own
    conversion takes longer than to read the file.
    """

    def __init__(self, *datasets: pydicom.Dataset) -> None:
        elements = (pair for dataset in datasets for pair in dataset.items())
        super().__init__((int(tag), _decoded(element)) for tag, element in elements)

    def numbers(self, *names: str | int, count: int = 1) -> tuple[float, ...]:
        """The first `count` values of the first of these elements with so many finite numbers, else ()."""
        for name in names:
            values = self.get(name if isinstance(name, int) else tag_for_keyword(name), ())[:count]
            try:
                numbers = tuple(map(float, values))
            except (TypeError, ValueError):
                continue
            if len(numbers) == count and all(map(math.isfinite, numbers)):
                return numbers
        return ()

    def number(self, *names: str | int) -> float | None:
        return next(iter(self.numbers(*names)), None)

    def whole(self, name: str) -> int:
        return int(next(iter(self.numbers(name)), -1))

    def within(self, low: float, high: float, *names: str) -> float | None:
        number = self.number(*names)
        return number if number is not None and low <= number <= high else None

    def texts(self, *names: str) -> list[str]:
        """The values of the first of these elements that has one."""
        found = ([str(value) for value in self.get(tag_for_keyword(name), ())] for name in names)
        return next((values for values in found if any(values)), [""])


def _decoded(element: RawDataElement | pydicom.DataElement) -> Sequence:
    if not isinstance(element, RawDataElement):
        value = element.value
        return value if isinstance(value, MultiValue | pydicom.Sequence) else [value]
    kind, value = element.VR, element.value or b""
    if kind in (None, "UN"):
        kind = dictionary_VR(element.tag) if dictionary_has_tag(element.tag) else "FL"
    if code := {"US": "H", "SS": "h", "UL": "I", "FL": "f", "FD": "d"}.get(kind):
        order = "<" if element.is_little_endian else ">"
        return struct.unpack(f"{order}{len(value) // struct.calcsize(code)}{code}", value)
    return [] if kind == "SQ" else [v.strip(" \0") for v in value.decode("latin-1").split("\\")]


def _images(path: Path, header: pydicom.Dataset, said: _Elements, room: int) -> list[Image]:
    """One image a frame. `room`: bytes from the element of the pixels to the end of the file."""
    kind = said.texts("SOPClassUID")[0] or str(header.file_meta.get("MediaStorageSOPClassUID", ""))
    if kind == _DIRECTORY:
        return [Image(path, "", reason="a DICOMDIR: not needed")]
    rows, columns, count = (said.number(name) for name in ("Rows", "Columns", "NumberOfFrames"))
    if not rows and kind in ("", *_MR_IMAGES):
        return []
    syntax = str(header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
    study, patient = said.texts("StudyInstanceUID")[0], said.texts("PatientID", "PatientName")[0]
    image = Image(
        path,
        "",
        reason=_not_mr(said, kind),
        study=hashed(f"{study or path.parent} {patient}"),
        series=hashed(said.texts("SeriesInstanceUID")[0]),
        number=said.whole("SeriesNumber"),
        instance=said.whole("InstanceNumber"),
        syntax=syntax,
        vendor=said.texts("Manufacturer")[0],
        height_m=said.within(0.3, 2.5, "PatientSize"),
        weight_kg=said.within(1, 400, "PatientWeight"),
    )
    multiple = count is not None
    groups = [
        header.get(f"{name}FunctionalGroupsSequence", ()) for name in ("Shared", "PerFrame") if multiple
    ]
    count = int(count or 1)
    needed = (rows or 0) * (columns or 0) * count * (said.number("BitsAllocated") or 16) / 8
    needed += 8 if syntax == ImplicitVRLittleEndian else 12  # the element's own header
    if not image.reason and syntax in _PLAIN and room < needed:
        image = image._replace(reason="truncated file")
    if image.reason:
        return [image]
    if not groups or len(groups[1]) != count:
        return [_frame(image, k, said) for k in range(count)]
    common = _items(groups[0])
    return [
        _frame(image, k, _Elements(header, *common, *_items([group]))) for k, group in enumerate(groups[1])
    ]


def _items(groups: Sequence[pydicom.Dataset]) -> list[pydicom.Dataset]:
    """What the functional groups of a frame hold."""
    return [e.value[0] for group in groups[:1] for e in group if e.VR == "SQ" and e.value]


def _not_mr(said: _Elements, kind: str) -> str:
    modality = said.texts("Modality")[0] or "MR"
    if kind.startswith(_SECONDARY_CAPTURE):
        return "secondary capture"
    if modality != "MR" or not said.number("Rows"):
        return f"no MR image (modality {modality if modality in _MODALITIES else 'unknown'})"
    return "colour image" if said.number("SamplesPerPixel") not in (None, 1) else ""


def _frame(image: Image, index: int, said: _Elements) -> Image:
    """`image` with what is said of a frame."""
    rate = said.within(60000 / _RR_MS[1], 60000 / _RR_MS[0], "HeartRate")
    slope, intercept = said.number("RescaleSlope"), said.number("RescaleIntercept")
    if slope is None and (private := said.number(_PHILIPS_SLOPE)):
        # (stored - intercept) / slope: Chenevert et al., Transl Oncol 7(1), 2014
        slope, intercept = 1 / private, -(said.number(_PHILIPS_INTERCEPT) or 0.0) / private
    spacing, position = said.numbers("PixelSpacing", count=2), said.numbers("ImagePositionPatient", count=3)
    axes = said.numbers("ImageOrientationPatient", count=6)
    return image._replace(
        index=index,
        reason=_not_magnitude(said) or _not_placed(spacing, position, axes),
        acquisition=said.whole("AcquisitionNumber"),
        clock_ms=_clock_ms(said.texts("FrameAcquisitionDateTime", "AcquisitionDateTime", "AcquisitionTime",
                                      "SeriesTime")[0]),
        trigger_ms=said.number("TriggerTime", "NominalCardiacTriggerDelayTime"),
        temporal=said.number("TemporalPositionIndex", "TemporalPositionIdentifier"),
        rr_ms=said.within(*_RR_MS, "NominalInterval", "RRIntervalTimeNominal") or (rate and 60000 / rate),
        inversion_ms=said.number("InversionTime", "InversionTimes"),
        grid=(*said.numbers("Rows"), *said.numbers("Columns"), *spacing),
        position=position,
        axes=axes,
        slope=slope or 1.0,
        intercept=intercept or 0.0,
    )  # fmt: skip


def _not_magnitude(said: _Elements) -> str:
    kind = {word.upper() for word in said.texts("FrameType", "ImageType")}
    if "DERIVED" in kind:
        return "derived image"
    kind |= {word.upper() for word in said.texts("ComplexImageComponent")}
    return "phase, real or imaginary image" if kind & _NOT_MAGNITUDE or said.number(_GE_COMPONENT) else ""


def _not_placed(spacing: Sequence[float], position: Sequence[float], axes: Sequence[float]) -> str:
    if spacing and position and axes and min(spacing) > 0:
        directions = np.reshape(axes, (2, 3))
        if np.abs(directions @ directions.T - np.eye(2)).max() < 0.01:
            return ""
    return "no valid position, orientation or pixel spacing"


def _clock_ms(text: str) -> float:
    """The time of day from a time or a date with time; 0 without one."""
    found = re.fullmatch(r"(\d{8})?(\d\d)(\d\d)(\d\d(?:\.\d+)?)(\D.*)?", text)
    return 1000 * (3600 * int(found[2]) + 60 * int(found[3]) + float(found[4])) if found else 0.0


def _identity(header: pydicom.Dataset, said: _Elements) -> set[str]:
    """Words that name the patient, small letters. The id of a file that says it is anonymous, or whose
    patient is named like the id and has no birth date, is a pseudonym.
    """
    name = str(header.get("PatientName") or "").casefold()  # in any character set
    id, born, order = (
        said.texts(key)[0].casefold() for key in ("PatientID", "PatientBirthDate", "AccessionNumber")
    )
    born = born if born.strip("0") else ""
    if said.texts("PatientIdentityRemoved")[0] == "YES" or (name == id and not born):
        return set()
    words = {*re.split(r"[\W_]+", name), id, born, order}
    return {word for word in words if len(word) > 1} - _ANYBODY


def hashed(text: str) -> str:
    return sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
