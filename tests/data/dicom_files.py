"""Small DICOM studies for tests: what scanners write, with every element that names the patient."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

MR, ENHANCED_MR, CT = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("4", "4.1", "2"))
PATIENT = {
    "PatientName": "Sorgenfrei^Mathilda",
    "PatientID": "HX-4471-09",
    "PatientBirthDate": "19530217",
    "AccessionNumber": "ACC770815",
}
ROW, COLUMN = np.array([0.71, 0.70, -0.03]), np.array([-0.31, 0.27, -0.91])
ROW /= np.linalg.norm(ROW)
COLUMN -= COLUMN @ ROW * ROW
COLUMN /= np.linalg.norm(COLUMN)
NORMAL = np.cross(ROW, COLUMN)
ORIGIN, SPACING, PITCH, RR = np.array([-30.0, -200.0, 110.0]), (1.5, 1.25), 8.0, 900.0


def images(slices: int = 5, frames: int = 10, rows: int = 24, columns: int = 20) -> np.ndarray:
    """(slices, frames, rows, columns) uint16 noise."""
    rng = np.random.default_rng(7)
    return rng.integers(50, 1000, (slices, frames, rows, columns)).astype(np.uint16)


def dataset(pixels: np.ndarray, *, kind: str = MR, **elements) -> FileDataset:
    """A file in memory; (rows, columns) or (frames, rows, columns) of int16, uint16."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    file.Modality, file.Manufacturer, file.ImageType = "MR", "SIEMENS", ["ORIGINAL", "PRIMARY", "M"]
    file.StudyInstanceUID, file.SeriesInstanceUID = "1.2.3", "1.2.3.1"
    file.SeriesNumber, file.AcquisitionTime, file.RepetitionTime = 1, "100000.0", 3.4
    file.Rows, file.Columns = pixels.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation = 15, int(pixels.dtype == np.int16)
    file.PixelData = np.ascontiguousarray(pixels).tobytes()
    for name, value in (PATIENT | elements).items():
        if value is None:
            file.pop(name, None)
        else:
            setattr(file, name, value)
    return file


def place(z: float, row: np.ndarray = ROW, column: np.ndarray = COLUMN) -> dict:
    """The elements of the plane `z` slices from the first."""
    position = ORIGIN + z * PITCH * np.cross(row, column)
    return {
        "ImagePositionPatient": [f"{v:.6f}" for v in position],
        "ImageOrientationPatient": [f"{v:.7f}" for v in (*row, *column)],
        "PixelSpacing": list(SPACING),
        "SliceThickness": PITCH,
    }


def stack(cine: np.ndarray, *, first: float = 0, **elements) -> list[FileDataset]:
    """One file a frame of (slices, frames, rows, columns); slices from number `first` on, 30 s apart."""
    slices, frames = cine.shape[:2]
    return [
        dataset(cine[z, t], **place(first + z) | {
            "InstanceNumber": z * frames + t + 1, "TriggerTime": RR / frames * t, "NominalInterval": int(RR),
            "AcquisitionTime": f"10{z // 2:02}{30 * (z % 2):02}.0",
        } | elements)
        for z in range(slices) for t in range(frames)
    ]  # fmt: skip


def enhanced(cine: np.ndarray, **elements) -> FileDataset:
    """One multi-frame file, frames in the order time, slice."""
    slices, frames = cine.shape[:2]
    file = dataset(cine.swapaxes(0, 1).reshape(-1, *cine.shape[2:]), kind=ENHANCED_MR, **elements)
    file.NumberOfFrames = slices * frames
    shared, axes = place(0), Dataset()
    axes.ImageOrientationPatient = shared["ImageOrientationPatient"]
    measures, group = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = shared["PixelSpacing"], PITCH
    group.PlaneOrientationSequence, group.PixelMeasuresSequence = Sequence([axes]), Sequence([measures])
    file.SharedFunctionalGroupsSequence = Sequence([group])
    file.PerFrameFunctionalGroupsSequence = Sequence()
    for t in range(frames):
        for z in range(slices):
            position, heart, content, group = Dataset(), Dataset(), Dataset(), Dataset()
            position.ImagePositionPatient = place(z)["ImagePositionPatient"]
            heart.NominalCardiacTriggerDelayTime, heart.RRIntervalTimeNominal = RR / frames * t, RR
            content.TemporalPositionIndex, content.InStackPositionNumber = t + 1, z + 1
            content.StackID, content.DimensionIndexValues = "1", [z + 1, t + 1]
            group.PlanePositionSequence, group.FrameContentSequence = (
                Sequence([position]),
                Sequence([content]),
            )
            group.CardiacSynchronizationSequence = Sequence([heart])
            file.PerFrameFunctionalGroupsSequence.append(group)
    return file


def write(folder: Path, files: list[FileDataset], *, seed: int | None = 0) -> list[Path]:
    """The files under names that say nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(1 for _ in folder.iterdir())
    order = np.random.default_rng(seed).permutation(len(files)) if seed is not None else range(len(files))
    paths = [folder / f"IM{there + int(number):05}" for number in order]
    for path, file in zip(paths, files, strict=True):
        file.save_as(path, enforce_file_format=True)
    return paths


def expected_affine(rows: int = 24) -> np.ndarray:
    """By hand: RAS of (column, row from below, slice)."""
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = ROW * SPACING[1], -COLUMN * SPACING[0], NORMAL * PITCH
    affine[:3, 3] = ORIGIN + COLUMN * SPACING[0] * (rows - 1)
    affine[:2] *= -1
    return affine
