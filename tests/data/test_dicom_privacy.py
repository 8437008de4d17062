"""Nothing that the reader leaves behind holds a value that names the patient."""

import gzip
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from dicom_files import PATIENT, images, stack, write
from test_prediction import network

from cmrssp.data import __main__ as report
from cmrssp.data import dataset as data
from cmrssp.data import store
from cmrssp.errors import UserError
from cmrssp.evaluation import prediction

WORDS = [word.casefold().encode() for word in (*PATIENT["PatientName"].split("^"), *PATIENT.values())][:-1]
WORDS += [PATIENT["AccessionNumber"].lower().encode()]


def leaks(text: bytes | str) -> list[bytes]:
    text = text.encode() if isinstance(text, str) else text
    return [word for word in WORDS if word in text.lower()]


@pytest.fixture
def clinic(tmp_path) -> Path:
    """A patient whose name and id are in the names of folders and files, beside another one. Among the files
    are a broken one, a truncated one, and an invalid element that repeats the name."""
    folder = tmp_path / "clinic"
    files = stack(images(3, 9), PatientSize="1.70", PatientWeight="65")
    for path in write(folder / "Mathilda_Sorgenfrei" / "HX-4471-09 heart", files):
        path.rename(path.with_name(f"HX-4471-09_{path.name}"))
    paths = sorted((folder / "Mathilda_Sorgenfrei").rglob("HX*_IM*"))
    paths[3].write_bytes(paths[3].read_bytes()[:-99])
    paths[3].with_name("Sorgenfrei.dcm").write_bytes(b"")
    content = paths[4].read_bytes()
    paths[4].write_bytes(content.replace(b"1.2.3.1\0", b"MATHILDA"))
    write(folder / "other", stack(images(3, 9), PatientID="2", PatientName="B^C", StudyInstanceUID="7"))
    return folder


def test_the_words_are_found_where_they_are(clinic):
    assert len(leaks(b"".join(path.read_bytes() for path in clinic.rglob("HX*_IM*")))) == len(WORDS)


def test_report_store_index_and_predictions(clinic, tmp_path, capfd):
    cache, out = tmp_path / "cache", tmp_path / "out"
    out.mkdir()
    assert report.main([str(clinic), "--cache", str(cache), "--figure", str(out / "sheet.png")]) == 1
    subjects, problems = data.find([str(clinic)], cache)
    rows = [prediction.predict(s, [network(1)], torch.device("cpu"), out) for s in subjects]
    said = [capfd.readouterr(), problems, rows, [(s.id, str(s.cine), s.source.notes) for s in subjects]]
    assert len(rows) == 2 and not leaks(repr(said))
    written = [path for folder in (cache, out) for path in folder.rglob("*")]
    assert len(written) > 10
    for path in written:
        assert not leaks(path.name)
        if path.is_file():
            content = path.read_bytes()
            assert not leaks(gzip.decompress(content) if path.suffix == ".gz" else content), path


def test_errors(clinic, tmp_path):
    for path in clinic.rglob("*IM0*"):
        file = pydicom.dcmread(path, force=True)
        file.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless
        file.PixelData = pydicom.encaps.encapsulate([bytes(99)])
        file.save_as(path, enforce_file_format=False, overwrite=True)
    subjects, _ = data.find([str(clinic)], tmp_path / "cache")
    with pytest.raises(UserError) as error:
        store.build(subjects, tmp_path / "cache", labels=False)
    assert "2 of 2" in str(error.value) and not leaks(str(error.value))
    assert np.size(subjects) == 2
