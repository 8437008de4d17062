"""Damaged data sets: `python fuzz.py SEED COUNT` damages one file of a small data set at a time, in every way
that is drawn, and reads it all. Prints what came of it as JSON; ends in a traceback where the reading does.
"""

import contextlib
import gzip
import io
import json
import random
import resource
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np

from cmrssp.data.__main__ import main
from cmrssp.errors import UserError

EXTREMES = (
    0,
    1,
    -1,
    2,
    7,
    127,
    255,
    256,
    -32768,
    32767,
    1 << 15,
    1 << 20,
    100_000,
    (1 << 31) - 1,
    -(1 << 31),
)
REALS = (0.0, 1.0, -1.0, 1e-40, 1e30, -1e30, float("nan"), float("inf"), float("-inf"), 0.5)


def tree(root: Path) -> list[Path]:
    """One subject of each layout, and a table; the files that can be damaged. Undamaged, nothing is odd."""
    rng = np.random.default_rng(0)
    labels = np.zeros((14, 12, 3, 4), np.uint8)
    for frame, size in ((0, 6), (3, 4)):
        labels[2 : 4 + size, 3 : 4 + size, :, frame] = 2
        labels[3 : 3 + size, 4 : 4 + size, :, frame] = 1
        labels[11:, 2:9, :, frame] = 3
    axes = np.linalg.qr(np.array([[-2, 0, -1], [-1, -1, 1], [1, -1, -1]], float))[0] * (1, 1, -1)
    affine = np.eye(4)
    affine[:3, :3] = axes * (3.9, 3.9, 12.0)

    def beating() -> np.ndarray:
        return rng.integers(0, 500, labels.shape).astype(np.int16)

    def save(name: str, array: np.ndarray) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine), root / name)

    save("mnms/A/A_sa.nii.gz", beating().astype(np.float32) / 7)
    save("mnms/A/A_sa_gt.nii.gz", labels)
    (root / "mnms/t.csv").write_text(",External code,VendorName,Vendor,ED,ES,Pathology\n0,A,GE,C,0,3,HCM\n")
    save("mnms2/001/001_SA_CINE.nii", cine := beating())
    for phase, frame in (("ED", 0), ("ES", 3)):
        save(f"mnms2/001/001_SA_{phase}.nii.gz", cine[..., frame])
        save(f"mnms2/001/001_SA_{phase}_gt.nii.gz", labels[..., frame])
    (root / "mnms2/dataset_information.csv").write_text("SUBJECT_CODE,DISEASE,VENDOR\n001,ARR,SIEMENS\n,,\n")
    save("acdc/patient001/patient001_4d.nii.gz", beating())
    for frame in (0, 3):
        theirs = np.choose(labels[..., frame], (0, 3, 2, 1)).astype(np.uint8)
        save(f"acdc/patient001/patient001_frame0{frame + 1}_gt.nii.gz", theirs)
    (root / "acdc/patient001/Info.cfg").write_text("ED: 1\nES: 4\nGroup: DCM\nNbFrame: 4\n")
    save("plain/p.nii.gz", beating())
    save("plain/p_gt.nii.gz", labels)
    (root / "plain/subjects.csv").write_text("subject,vendor,pathology,ed,es,split\np,GE,X,0,3,train\n")
    return sorted(path for path in root.rglob("*") if path.is_file())


def damaged(draw: random.Random, path: Path, content: bytes) -> tuple[str, bytes]:
    """(what was done, the bytes)."""
    nifti, packed = ".nii" in path.suffixes, path.suffix == ".gz"
    kinds = ["bytes", "cut", "longer", "empty", "noise"] + (
        ["header"] * 12 + ["voxels"] * 3 if nifti else ["text"] * 8
    )
    kind = draw.choice(kinds)
    if kind in ("header", "voxels"):
        plain = bytearray(gzip.decompress(content) if packed else content)
        if kind == "header":
            for _ in range(draw.choice((1, 1, 2, 4))):
                field(draw, plain)
        else:
            for _ in range(draw.choice((1, 50))):
                plain[draw.randrange(352, len(plain))] = draw.choice((0, 127, 128, 255, draw.randrange(256)))
        return kind, gzip.compress(bytes(plain)) if packed else bytes(plain)
    if kind == "text":
        text = content.decode()
        words = (
            "",
            ",",
            '"',
            "\n",
            "\0",
            "é",
            "-1",
            "99999999999999999999",
            "1e400",
            "nan",
            "\u00b2",
            "../../etc",
            "x" * 200_000,
        )
        at = draw.randrange(len(text) + 1)
        return kind, (text[:at] + draw.choice(words) + text[at + draw.choice((0, 0, 1, 5)) :]).encode()
    if kind == "cut":
        return kind, content[: draw.randrange(len(content))]
    if kind == "empty":
        return kind, b""
    if kind == "longer":
        return kind, content + draw.randbytes(draw.choice((1, 100)))
    if kind == "noise":
        return kind, draw.randbytes(len(content))
    some = bytearray(content)
    for _ in range(draw.choice((1, 3, 20))):
        some[draw.randrange(len(some))] = draw.randrange(256)
    return kind, bytes(some)


def field(draw: random.Random, plain: bytearray) -> None:
    """Overwrite one field of a NIfTI-1 header."""
    name = draw.choice(("dim", "dim", "pixdim", "srow", "scl", "datatype", "offset", "code", "any"))
    if name == "dim":
        struct.pack_into("<H", plain, 40 + 2 * draw.randrange(8), draw.choice(EXTREMES) & 0xFFFF)
    elif name in ("pixdim", "srow", "scl"):
        start, count = {"pixdim": (76, 8), "srow": (280, 12), "scl": (112, 2)}[name]
        struct.pack_into("<f", plain, start + 4 * draw.randrange(count), draw.choice(REALS))
    elif name == "datatype":
        value = draw.choice(
            (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 9)
        )
        struct.pack_into("<hh", plain, 70, value, draw.choice((8, 16, 32, 64, 128, value & 0x7F)))
    elif name == "offset":
        struct.pack_into("<f", plain, 108, draw.choice((*REALS, 352.0, 353.5, 1e9, -352.0)))
    elif name == "code":
        struct.pack_into("<h", plain, draw.choice((252, 254)), draw.choice((0, 1, 2, 4, 99, -1)))
    else:
        struct.pack_into("<B", plain, draw.randrange(348), draw.randrange(256))


def campaign(seed: int, count: int) -> dict:
    results: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        files = tree(root)
        words = [*map(str, sorted(root.iterdir())), "--cache", str(Path(folder) / "cache")]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            assert main(words) == 0
        assert "problems: none found" in out.getvalue(), out.getvalue()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            draw = random.Random(f"{seed}/{number}")
            path = draw.choice(files)
            whole = path.read_bytes()
            kind, content = damaged(draw, path, whole)
            path.write_bytes(content)
            out = io.StringIO()
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                    status = main(words)
            except (UserError, OSError) as error:
                assert len(str(error).splitlines()) == 1, error
                status = 2
            except BaseException:
                print(f"seed {seed}, mutation {number}: {kind} of {path.name}", file=sys.stderr)
                raise
            finally:
                path.write_bytes(whole)
            if status == 2:
                results["one clear error"] += 1
            elif status == 1:
                assert "left out: " in out.getvalue()
                results["left out and reported"] += 1
            else:
                results["read" if "problems: none found" in out.getvalue() else "read and reported"] += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return {"results": results, "grown_mb": grown}


if __name__ == "__main__":
    print(json.dumps(campaign(int(sys.argv[1]), int(sys.argv[2]))))
