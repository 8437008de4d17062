"""Folders of DICOM: which series is the short-axis cine, what is left out and why, the names of subjects, the
index, and bad input.
"""

import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_files import COLUMN, CT, NORMAL, dataset, images, place, stack, write
from pydicom.fileset import FileSet

from cmrssp.data import dataset as data
from cmrssp.data import store
from cmrssp.data.nifti import cine_image
from cmrssp.errors import UserError


def find(folder: Path) -> tuple[list, list]:
    return data.find([str(folder)], folder.parent / "cache")


def voxels(subject) -> np.ndarray:
    return np.asanyarray(cine_image(subject).dataobj)[:, ::-1].transpose(2, 3, 1, 0)


def small(**elements) -> list:
    return stack(images(3, 8), **elements)


def series(number: int, **elements) -> dict:
    return {"SeriesNumber": number, "SeriesInstanceUID": f"1.2.3.{number}", **elements}


def long_axis() -> list:
    return [dataset(frame, **place(0, NORMAL, COLUMN), TriggerTime=40 * t, InstanceNumber=t, **series(2))
            for t, frame in enumerate(images(1, 8)[0])]  # fmt: skip


def perfusion() -> list:
    """Three slices, a frame a heartbeat, the trigger time always the same."""
    times = [(z, t) for z in range(3) for t in range(8)]
    return [dataset(images(3, 8)[z, t], **place(z), TriggerTime=120, InstanceNumber=8 * z + t,
                    AcquisitionTime=f"1005{t:02}.{z}", **series(2)) for z, t in times]  # fmt: skip


def mapping() -> list:
    """Another inversion time in every heartbeat."""
    files = perfusion()
    for number, file in enumerate(files):
        file.InversionTime = 100 + 200 * (number % 8)
    return files


OTHERS = {
    "long axis": (long_axis, "90.0 degrees"),
    "perfusion": (perfusion, "heartbeat"),
    "mapping": (mapping, "heartbeat"),
    "late enhancement": (lambda: stack(images(3, 1), **series(2)), "fewer than 8 frames"),
    "phase": (lambda: small(**series(2, ImageType=["ORIGINAL", "PRIMARY", "P"])), "phase"),
    "derived": (lambda: small(**series(2, ImageType=["DERIVED", "SECONDARY"])), "derived"),
    "CT": (lambda: small(**series(2, kind=CT, Modality="CT")), "modality CT"),
    "fewer slices": (lambda: [*stack(images(3, 8, 30), **series(2))], "fewer slices"),
    "no position": (lambda: small(**series(2, ImagePositionPatient=None)), "no valid position"),
    "no orientation": (lambda: small(**series(2, ImageOrientationPatient=["0"] * 6)), "no valid position"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_series_are_left_out_with_the_reason(tmp_path, other):
    make, reason = OTHERS[other]
    write(tmp_path / "study", stack(images(4, 8)))
    write(tmp_path / "study" / "b", make())
    (subject,), problems = find(tmp_path / "study")
    assert (voxels(subject) == images(4, 8)).all()
    (left,) = problems
    assert (left.subject, left.file, left.done) == ("dicom/study", "series 2", "left out")
    assert reason in left.what


def test_of_two_complete_stacks_the_later_is_used(tmp_path):
    late = {"AcquisitionTime": "120000.0"}
    for number, (shift, when) in enumerate([(1, late), (0, {})]):
        write(tmp_path / "study", stack(images(4, 8) + shift, **series(number + 3, **when)))
    (subject,), (left,) = find(tmp_path / "study")
    assert (voxels(subject) == images(4, 8) + 1).all()
    assert left.file == "series 4" and "later" in left.what


def test_a_short_axis_goes_before_another_orientation(tmp_path):
    """Although it is earlier and smaller."""
    axial = stack(images(5, 8), **series(2, AcquisitionTime="120000.0"))
    for number, file in enumerate(axial):
        for key, value in place(number // 8, np.array([1.0, 0, 0]), np.array([0, 1.0, 0])).items():
            setattr(file, key, value)
    write(tmp_path / "study", small() + axial)
    (subject,), (left,) = find(tmp_path / "study")
    assert (voxels(subject) == images(3, 8)).all() and left.file == "series 2"


def test_a_complete_stack_between_the_slices_of_another(tmp_path):
    """As if the patient had moved by half a distance: no stack of twice as many slices."""
    write(tmp_path / "study", stack(images(5, 8)) + stack(images(4, 8), first=0.5, **series(2)))
    (subject,), (left,) = find(tmp_path / "study")
    assert (voxels(subject) == images(5, 8)).all() and "series 2" in left.file


@pytest.mark.parametrize("moved", [0.0, 0.25])
def test_a_single_slice_scanned_again_in_a_series_of_its_own(tmp_path, moved):
    cine, again = images(5, 8), images(5, 8)[3:4] + 1
    later = stack(again, first=3 + moved, **series(2, AcquisitionTime="110000.0"))
    write(tmp_path / "study", stack(cine) + later)
    (subject,), problems = find(tmp_path / "study")
    cine[3] = again[0]
    assert (voxels(subject) == cine).all() and not problems
    assert "slice 3" in subject.source.notes[0][0]


def test_a_stack_in_two_halves(tmp_path):
    cine = images(6, 8)
    write(tmp_path / "study", stack(cine[:3], **series(1)) + stack(cine[3:], first=3, **series(2)))
    (subject,), problems = find(tmp_path / "study")
    assert (voxels(subject) == cine).all() and not problems


def test_subjects_are_called_by_their_folders(tmp_path):
    """As much of the path as is needed; two patients in one folder get a hash each."""
    places = {"a/st/1": "1", "b/st/1": "2", "b/st/2": "3", "c": "4", "d": "5"}
    for where, uid in places.items():
        write(tmp_path / "all" / where, small(StudyInstanceUID=uid, PatientID=f"patient {uid}"))
    write(tmp_path / "all" / "d", small(StudyInstanceUID="6", PatientID="patient 6"))
    subjects, problems = find(tmp_path / "all")
    ids = [s.id for s in subjects]
    assert ids[:4] == ["a", "b/st/1", "b/st/2", "c"] and len({*ids}) == 6
    assert all(id.startswith("d/subject-") for id in ids[4:])
    assert not problems


def test_two_studies_of_a_patient_are_known_as_such(tmp_path):
    for uid, patient in (("1", "first"), ("2", "first"), ("3", "first"), ("4", ""), ("5", "Anonymous")):
        write(tmp_path / "all" / uid, small(StudyInstanceUID=uid, PatientID=patient, PatientName=patient))
    subjects, problems = find(tmp_path / "all")
    assert [p.what for p in problems if "3 of 5 studies" in p.what]
    one, again, third, nameless, anonymous = (s.patient for s in subjects)
    assert one == again == third and one and "first" not in one and nameless == anonymous == ""


def test_one_id_of_ten_studies_is_a_pseudonym(tmp_path):
    for uid in map(str, range(10, 20)):
        write(tmp_path / "all" / uid, small(StudyInstanceUID=uid, PatientID="study 7", PatientName="x"))
    write(tmp_path / "all" / "20", small(StudyInstanceUID="20", PatientID="8", PatientName="y"))
    subjects, problems = find(tmp_path / "all")
    assert [bool(s.patient) for s in subjects] == [False] * 10 + [True]
    assert [p.what for p in problems if "10 of 11 studies" in p.what]


def test_a_table_beside_studies_says_what_it_says_of_files(tmp_path):
    for uid in ("1", "2", "3"):
        write(tmp_path / "all" / uid, small(StudyInstanceUID=uid, PatientID=uid, Manufacturer="GE"))
    table = tmp_path / "all" / "subjects.csv"
    table.write_text("subject,patient,vendor,split,ed\n1,p,Philips,test,0\n2,p,,train,\n")
    subjects, problems = find(tmp_path / "all")
    assert [s.id for s in subjects] == ["1", "2", "3"]
    assert [s.part for s in subjects] == ["test", "train", ""]
    assert [s.vendor for s in subjects] == ["Philips", "GE", "GE"] and subjects[0].ed == 0
    assert subjects[0].patient == subjects[1].patient == "p" != subjects[2].patient
    assert [p.subject for p in problems] == ["dicom/3"]
    table.write_text("subject,split\n1,test\n9,train\n")
    with pytest.raises(UserError, match=r"subjects\.csv.* no cine \(9\).* without a row \(2, 3\)"):
        find(tmp_path / "all")


@pytest.mark.parametrize("where", ["Sorgenfrei_M", "x HX-4471-09", "b1953-02-17", "acc770815"])
def test_a_folder_that_names_the_patient_names_no_subject(tmp_path, where):
    write(tmp_path / "all" / where / "st", small())
    write(
        tmp_path / "all" / "other", small(StudyInstanceUID="9", PatientName="Else^Nobody", PatientID="77-1")
    )
    subjects, _ = find(tmp_path / "all")
    assert [s.id[:8] for s in subjects] == ["other", "subject-"] and len({s.id for s in subjects}) == 2
    assert all(where not in str(s.cine) for s in subjects)


def test_a_pseudonym_may_name_a_subject(tmp_path):
    """Of a file that is marked as anonymous, and where name and id are one, without a birth date."""
    said = {"PatientID": "P017", "StudyInstanceUID": "9"}
    write(tmp_path / "all" / "P016", small(PatientID="P016", PatientIdentityRemoved="YES"))
    write(
        tmp_path / "all" / "P017", small(**said, PatientName="P017", PatientBirthDate="", AccessionNumber="")
    )
    assert [s.id for s in find(tmp_path / "all")[0]] == ["P016", "P017"]


def test_a_second_start_reads_no_header_of_an_unchanged_folder(tmp_path):
    """What is overwritten behind its back, with size and time kept, is found as before."""
    paths = write(tmp_path / "study", stack(images(4, 8)))
    first = find(tmp_path / "study")
    for path in paths:
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = find(tmp_path / "study")
    assert [s.id for s in second[0]] == [s.id for s in first[0]] and second[1] == first[1]
    assert second[0][0].source.grid == first[0][0].source.grid


def test_a_changed_and_a_new_file_are_read_again(tmp_path):
    paths = write(tmp_path / "study", stack(images(3, 9)))
    find(tmp_path / "study")
    shutil.copy(paths[0], tmp_path / "keep")
    paths[0].write_bytes(paths[0].read_bytes()[:-100])
    assert any("truncated" in p.what for p in find(tmp_path / "study")[1])
    shutil.move(tmp_path / "keep", paths[0])
    write(tmp_path / "study", stack(images(1, 9), first=3))
    (subject,), problems = find(tmp_path / "study")
    assert len(subject.source.grid) == 4 and not problems


def short_header(folder: Path) -> None:
    (folder / "broken.dcm").write_bytes((folder / "IM00003").read_bytes()[:200])


BAD = {
    "nothing but a name": (lambda folder: (folder / "empty.dcm").write_bytes(b""), "cannot be read"),
    "short header": (short_header, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_row(tmp_path, what):
    make, words = BAD[what]
    write(tmp_path / "study", small())
    make(tmp_path / "study")
    (subject,), (problem,) = find(tmp_path / "study")
    assert (voxels(subject) == images(3, 8)).all()
    assert problem.done == "left out" and words in f"{problem}"


def dicomdir(folder: Path) -> None:
    files = FileSet()
    named = dict.fromkeys(("StudyDate", "StudyTime", "StudyID"), "1")
    files.add(small(**named | {"StudyDate": "20200101", "StudyTime": "100000"})[0])
    files.write(folder / "media", use_existing=False)
    shutil.move(folder / "media" / "DICOMDIR", folder / "DICOMDIR")
    shutil.rmtree(folder / "media")


UNRELATED = {
    "DICOMDIR": dicomdir,
    "text": lambda folder: (folder / "notes").write_text("x"),
    "pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "broken link": lambda folder: (folder / "link").symlink_to("nowhere"),
}


@pytest.mark.parametrize("what", UNRELATED)
def test_unrelated_files_are_ignored(tmp_path, what):
    write(tmp_path / "study", small())
    UNRELATED[what](tmp_path / "study")
    (subject,), problems = find(tmp_path / "study")
    assert (voxels(subject) == images(3, 8)).all() and not problems


def test_a_truncated_file_leaves_a_missing_frame(tmp_path):
    files = stack(images(3, 9))
    paths = write(tmp_path / "study", files)
    paths[12].write_bytes(paths[12].read_bytes()[:-100])
    (subject,), (problem,) = find(tmp_path / "study")
    assert "truncated" in problem.what and "(1 images)" in problem.what
    ((note, _),) = subject.source.notes
    assert "slice 1 (from 0) has 8 frames" in note


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLSLossless"])
def test_pixels_that_are_damaged_or_need_a_plug_in_are_one_line(tmp_path, syntax):
    for path in write(tmp_path / "study", small()):
        file = pydicom.dcmread(path)
        file.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        file.PixelData = pydicom.encaps.encapsulate([bytes(200)])
        file.save_as(path, enforce_file_format=False, overwrite=True)
    subjects, _ = find(tmp_path / "study")
    with pytest.raises(UserError, match="1 of 1 subjects") as error:
        store.build(subjects, tmp_path / "cache", labels=False)
    assert "series 1" in str(error.value) and "pylibjpeg" in str(error.value)


def test_a_folder_without_a_cine_tells_what_it_holds(tmp_path):
    write(tmp_path / "study", stack(images(3, 1)))
    with pytest.raises(FileNotFoundError, match=r"no cine found.*fewer than 8 frames"):
        find(tmp_path / "study")


def test_dicom_beside_nifti(tmp_path, beating):
    write(tmp_path / "all" / "b", small())
    nibabel.save(nibabel.Nifti1Image(beating()[0], np.eye(4)), tmp_path / "all" / "a.nii.gz")
    assert [s.key for s in find(tmp_path / "all")[0]] == ["dicom/all", "folder/a"]
