"""The paper's tables from a made folder. A made run of Dice `b`, beat `h` and spread `s` scores

    b + s for Siemens and Philips, b - s for GE and Canon;  + h at ED, - h at ES;  + 0.03 LV, - 0.03 MYO

so that its mean is b, ED b + h, ES b - h, A+B b + s, C+D b - s, LV b + 0.03, and the sample standard
deviation over its four subjects s * sqrt(4 / 3).
"""

import csv
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

import evaluate
import finetune
import train_ssp
from cmrssp.errors import UserError
from cmrssp.evaluation import paper, study

SUBJECTS = {
    "mnms/a": "SIEMENS", "mnms/b": "Philips Medical Systems", "mnms2/c": "GE MEDICAL SYSTEMS",
    "mnms2/d": "TOSHIBA",
}  # fmt: skip
SIGN = {"mnms/a": 1, "mnms/b": 1, "mnms2/c": -1, "mnms2/d": -1}
OFFSET = {"LV": 0.03, "MYO": -0.03, "RV": 0.0}
ARM = {
    "n_subjects": 296, "all_subjects": False, "slices": 349, "phases": "both", "vendors": None,
    "augmentation": "on",
}  # fmt: skip
SIEMENS_PHILIPS, GE_CANON = ["Siemens", "Philips"], ["GE", "Canon"]
PAPER = """296 (6738)	0.89 ± 0.001	0.89 ± 0.002	0.89 ± 0.003	0.89 ± 0.001	0.89 ± 0.001
50 (1151)	0.87 ± 0.007	0.87 ± 0.011	0.88 ± 0.005	0.87 ± 0.006	0.88 ± 0.006
25 (582)	0.86 ± 0.003	0.86 ± 0.014	0.85 ± 0.014	0.84 ± 0.002	0.87 ± 0.007
15 (349)	0.84 ± 0.007	0.83 ± 0.024	0.85 ± 0.009	0.79 ± 0.009	0.86 ± 0.015
10 (231)	0.82 ± 0.009	0.80 ± 0.024	0.84 ± 0.009	0.74 ± 0.022	0.86 ± 0.007"""


def write(run, arm, rows):
    """rows: subject, vendor, phase, class, Dice."""
    folder = run / "evaluation-test"
    folder.mkdir(parents=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "dataset", "vendor", "pathology", "phase", "class", "dice", "hd95_mm"])
        writer.writerows([s, s.split("/")[0], v, "HCM", p, c, f"{d:.6f}", "3.5"] for s, v, p, c, d in rows)
    summary = {"split": "test", "subjects": sorted({row[0] for row in rows}), "arm": arm, "dice": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return run


def made(run, dice, *, beat=0.02, spread=0.01, subjects=SUBJECTS, **arm):
    rows = [
        (s, v, phase, name, dice + SIGN[s] * spread + sign * beat + OFFSET[name])
        for s, v in subjects.items() for phase, sign in (("ED", 1), ("ES", -1)) for name in OFFSET
    ]  # fmt: skip
    return write(run, ARM | {"seed": 0} | arm, rows)


def table(runs, name):
    (found,) = [t for t in paper.tables(runs) if t.name == name]
    return found


def seeds(root, middle, step, beats=(0.02,) * 3, spreads=(0.01,) * 3, **arm):
    """Three runs of Dice middle - step, middle, middle + step."""
    for seed, (beat, spread) in enumerate(zip(beats, spreads, strict=True)):
        dice = middle + (seed - 1) * step
        name = "-".join(map(str, [*arm.values(), seed])).translate(str.maketrans("", "", "[]', "))
        made(root / name, dice, beat=beat, spread=spread, seed=seed, **arm)


def test_table_1_is_that_of_the_paper(tmp_path):
    expected = [line.split("\t") for line in PAPER.splitlines()]
    for line in expected:
        n, slices = (int(number) for number in line[0].strip(")").split(" ("))
        for method, cell in zip(study.LABELS, line[1:], strict=True):
            mean, std = map(float, cell.split(" ± "))
            for seed in paper.SEEDS:
                made(
                    tmp_path / "deep" / method / f"{n}-{seed}", mean + (seed - 1) * std, pretraining=method,
                    seed=seed, n_subjects=n, all_subjects=n == 296, slices=slices + 30 * (seed - 1),
                )  # fmt: skip
    for row, columns in ((1, (3, 5)), (2, (5,)), (3, (5,)), (4, (5,))):
        for column in columns:
            expected[row][column] = f"**{expected[row][column]}**"
    runs = study.collect(tmp_path)
    first = table(runs, "table1")
    assert first.header == ["#subjects (#slices)", "Baseline", "SimCLR", "PCL", "DINO", "MIM"]
    assert first.rows == expected
    curves = paper.learning_curves(runs)
    assert {m: list(points) for m, points in curves.items()} == {
        m: [10, 15, 25, 50, 296] for m in ("Baseline", "SimCLR", "PCL", "DINO", "MIM")
    }
    assert curves["MIM"][15] == pytest.approx([0.845, 0.86, 0.875])


@pytest.fixture
def whole(tmp_path):
    """Every arm of tables 2 to 4, section 3 and supplement B, with three seeds."""
    root = tmp_path / "runs"
    base = {"all_subjects": True, "n_subjects": 296}
    seeds(root, 0.89, 0.001, (0.01, 0.02, 0.03), (0.01, 0.02, 0.03), pretraining="scratch", **base)
    seeds(root, 0.90, 0.002, pretraining="mim", **base)
    seeds(root, 0.69, 0.04, pretraining="scratch", augmentation="off", **base)
    seeds(root, 0.78, 0.05, pretraining="mim", augmentation="off", **base)
    seeds(root, 0.88, 0.001, pretraining="scratch", phases="ed", slices=170, **base)
    seeds(root, 0.88, 0.004, (0.03,) * 3, pretraining="mim", phases="ed", **base)
    seeds(root, 0.87, 0.007, (-0.01,) * 3, pretraining="scratch", phases="es", **base)
    seeds(root, 0.86, 0.001, (-0.03,) * 3, pretraining="mim", phases="es", **base)
    seeds(root, 0.89, 0.002, pretraining="scratch", vendors=SIEMENS_PHILIPS, **base)
    seeds(root, 0.89, 0.003, pretraining="mim", vendors=list(reversed(SIEMENS_PHILIPS)), **base)
    seeds(root, 0.88, 0.002, spreads=(-0.01,) * 3, pretraining="scratch", vendors=["C", "D"], **base)
    seeds(root, 0.886, 0.001, spreads=(-0.003,) * 3, pretraining="mim", vendors=GE_CANON, **base)
    return study.collect(root)


def test_tables_2_to_4_and_section_3(whole):
    second = table(whole, "table2")
    assert second.header[2:] == ["Both time frames", "ED time frames", "ES time frames"]
    assert second.rows == [
        ["None", "ED time frames", "0.88 ± 0.001", "0.90 ± 0.001", "0.86 ± 0.001"],
        ["MIM", "ED time frames", "0.88 ± 0.004", "**0.91 ± 0.004**", "0.85 ± 0.004"],
        ["None", "ES time frames", "0.87 ± 0.007", "0.86 ± 0.007", "0.88 ± 0.007"],
        ["MIM", "ES time frames", "0.86 ± 0.001", "0.83 ± 0.001", "**0.89 ± 0.001**"],
    ]
    third = table(whole, "table3")
    assert third.header[2:] == ["All vendors", "Vendors A+B", "Vendors C+D"]
    assert third.rows == [
        ["None", "Vendors A+B", "0.89 ± 0.002", "0.90 ± 0.002", "0.88 ± 0.002"],
        ["MIM", "Vendors A+B", "0.89 ± 0.003", "0.90 ± 0.003", "0.88 ± 0.003"],
        ["None", "Vendors C+D", "0.88 ± 0.002", "0.87 ± 0.002", "0.89 ± 0.002"],
        ["MIM", "Vendors C+D", "**0.89 ± 0.001**", "**0.88 ± 0.001**", "0.89 ± 0.001"],
    ]  # the last: 0.886, 0.883, 0.889
    fourth = table(whole, "table4")
    assert fourth.header[1:] == ["ED time frames", "ES time frames", "Vendors A+B", "Vendors C+D"]
    assert fourth.rows == [
        [
            "Yes",
            "0.91 ± 0.011",
            "0.87 ± 0.009",
            "0.91 ± 0.011",
            "0.87 ± 0.009",
        ],  # 0.001 + 0.01, |0.001 - 0.01|
        ["No", "0.71 ± 0.040", "0.67 ± 0.040", "0.70 ± 0.040", "0.68 ± 0.040"],
    ]
    assert table(whole, "section3").rows == [
        ["Baseline", "0.89 ± 0.001", "0.69 ± 0.040"],
        ["MIM", "0.90 ± 0.002", "0.78 ± 0.050"],
    ]


def test_supplement_b_spreads_over_subjects(whole):
    supplement = table(whole, "supplementB")
    assert supplement.header == ["Class", "Baseline", "SimCLR", "PCL", "DINO", "MIM"]
    assert supplement.rows == [  # sqrt(4 / 3) * 0.02, the mean of 0.01, 0.02, 0.03; sqrt(4 / 3) * 0.01
        ["LV", "0.92 ± 0.023", "", "", "", "0.93 ± 0.012"],
        ["MYO", "0.86 ± 0.023", "", "", "", "0.87 ± 0.012"],
        ["RV", "0.89 ± 0.023", "", "", "", "0.90 ± 0.012"],
    ]


def test_table_1_takes_its_own_arms_alone(whole):
    assert table(whole, "table1").rows == [
        ["296 (349)", "0.89 ± 0.001", "", "", "", "**0.90 ± 0.002**"],
        *([f"{n} (-)", "", "", "", "", ""] for n in (50, 25, 15, 10)),
    ]
    curves = paper.learning_curves(whole)
    assert set(curves) == {"Baseline", "MIM"}
    assert curves["MIM"] == {296: pytest.approx([0.898, 0.90, 0.902])}


def test_subjects_weigh_the_same_however_many_phases_they_have(tmp_path):
    rows = [("x/1", "GE", "ED", 0.8), ("x/1", "GE", "ES", 0.6), ("x/2", "GE", "ED", 0.9)]
    rows = [(s, v, p, c, d) for s, v, p, d in rows for c in OFFSET]
    write(tmp_path / "a", ARM | {"pretraining": "scratch", "seed": 0, "n_subjects": 10, "slices": 230}, rows)
    arm = ARM | {"pretraining": "mim", "seed": 5, "all_subjects": True, "n_subjects": 280, "slices": 7000}
    write(tmp_path / "b", arm, rows)
    write(tmp_path / "c", arm | {"seed": 6, "n_subjects": 281}, rows)
    runs = study.collect(tmp_path)
    first = table(runs, "table1").rows
    assert first[4] == ["10 (230)", "0.80 ± -", "", "", "", ""]  # (0.7 + 0.9) / 2
    assert first[0] == ["280–281 (7000)", "", "", "", "", "0.80 ± 0.000"]
    write(tmp_path / "d", arm | {"pretraining": "pcl", "seed": 6, "slices": 7008}, rows)
    write(tmp_path / "e", arm | {"seed": 6, "slices": 7008}, rows)
    slices = table(study.collect(tmp_path), "table1").rows[0][0]
    assert slices == "280 (7004)"  # 7000 for seed 5, 7008 for seed 6
    assert table(runs, "supplementB").rows[0][5] == "0.80 ± 0.141"  # 0.2 / sqrt(2)
    made(tmp_path / "other" / "d", 0.8, pretraining="scratch", seed=0, subjects={"mnms/a": "A"}, phases="ed")
    write(
        tmp_path / "other" / "e", ARM | {"pretraining": "mim", "seed": 0, "vendors": ["A", "B"]} | {
            "all_subjects": True
        }, [("mnms/a", "", p, c, 0.5) for p in ("ED", "ES") for c in OFFSET],
    )  # fmt: skip
    third = table(study.collect(tmp_path / "other"), "table3")
    assert third.rows[1] == ["MIM", "Vendors A+B", "0.50 ± -", "no subjects", "no subjects"]


@pytest.mark.parametrize(
    ("middles", "bold"),
    [
        ((0.841, 0.844, 0.842, 0.79, 0.80), ()),  # all print as 0.84 or less
        ((0.844, 0.846, 0.854, 0.79, 0.80), (1, 2)),  # 0.84; 0.85 and 0.85
        ((0.70, 0.71, 0.72, 0.73, 0.74), (4,)),
        ((None, 0.71, 0.72, 0.73, 0.74), ()),
        ((0.70, None, 0.72, None, None), (2,)),
    ],
)
def test_bold_is_decided_on_what_is_printed(tmp_path, middles, bold):
    for method, dice in zip(study.LABELS, middles, strict=True):
        if dice is not None:
            made(tmp_path / method, dice, pretraining=method, n_subjects=25)
    cells = table(study.collect(tmp_path), "table1").rows[2][1:]
    assert tuple(i for i, cell in enumerate(cells) if re.fullmatch(r"\*\*0.\d\d ± -\*\*", cell)) == bold
    assert [bool(cell) for cell in cells] == [dice is not None for dice in middles]


def test_seeds_that_differ_in_more_are_named(tmp_path, capsys):
    """Arms may be trained each in its own way, the seeds of one may not."""
    for method, seed, recipe in (
        ("mim", 0, {"lr": 0.1, "pretraining mask_ratio": 0.75}),
        ("mim", 1, {"lr": 0.1, "pretraining mask_ratio": 0.5}),
        ("scratch", 0, {"lr": 0.2}),
        ("scratch", 1, {"lr": 0.2}),
    ):
        run = made(tmp_path / f"{method}{seed}", 0.8, pretraining=method, seed=seed)
        path = run / "evaluation-test" / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": recipe}))
    study.collect(tmp_path)
    first = capsys.readouterr().out.splitlines()[0]
    folders = f"{tmp_path / 'mim0'}, {tmp_path / 'mim1'}"
    assert first == f"seeds of one arm that also differ in pretraining mask_ratio: {folders}"
    names = [str(tmp_path / name) for name in ("mim0", "mim1", "scratch0", "scratch1")]
    assert [len(seeds) for seeds in study.groups(names, "test").values()] == [1, 1, 2]
    apart = f"kept apart, runs of MIM that differ in pretraining mask_ratio: {folders}\n"
    assert capsys.readouterr().out == apart


def test_of_the_same_arm_and_seed_the_newest_counts(tmp_path, capsys):
    old = made(tmp_path / "z", 0.5, pretraining="mim", n_subjects=15, subjects={"mnms/a": "A"})
    new = made(tmp_path / "a", 0.8, pretraining="mim", n_subjects=15)
    os.utime(old / "evaluation-test" / "summary.json", ns=(10**18, 10**18))
    os.utime(new / "evaluation-test" / "summary.json", ns=(2 * 10**18, 2 * 10**18))
    runs = study.collect(tmp_path)
    assert table(runs, "table1").rows[3][5] == "0.80 ± -"
    assert capsys.readouterr().out == f"left out: {old}; {new} is a newer run of the same arm and seed\n"


def test_different_test_subjects_are_refused(tmp_path):
    one = made(tmp_path / "a", 0.8, pretraining="mim", n_subjects=15)
    other = made(tmp_path / "b", 0.8, pretraining="mim", seed=1, subjects=dict(list(SUBJECTS.items())[:1]))
    with pytest.raises(UserError) as error:
        study.collect(tmp_path)
    assert str(error.value).startswith(f"{one} and {other}: evaluated on different subjects or phases: 3 ")
    metrics = other / "evaluation-test" / "metrics.csv"
    metrics.write_text((one / "evaluation-test" / "metrics.csv").read_text())
    summary = other / "evaluation-test" / "summary.json"
    summary.write_text(summary.read_text().replace('["mnms/a"]', json.dumps(list(SUBJECTS))))
    assert len(study.collect(tmp_path)) == 2
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(line for line in lines if "mnms/b" not in line or ",ED," not in line))
    with pytest.raises(UserError, match=r"subjects or phases: 1 subjects differ, the first is mnms/b"):
        study.collect(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("summary.json", '"arm"', '"leg"', "'arm'"),
        ("summary.json", "{", "[", "Expecting"),
        ("summary.json", '"seed"', '"sead"', "'seed'"),
        ("summary.json", '"vendors": null', '"vendors": [1]', "'int' object"),
        ("metrics.csv", "0.830000", "", "could not convert"),
    ],
)
def test_what_cannot_be_read_is_named_and_skipped(tmp_path, capsys, file, old, new, message):
    good = made(tmp_path / "good", 0.8, pretraining="scratch", n_subjects=15)
    bad = made(tmp_path / "bad", 0.8, pretraining="mim", n_subjects=15)
    path = bad / "evaluation-test" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert [run.folder for run in study.collect(tmp_path)] == [good]
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    start = f"skipped: {bad / 'evaluation-test' / 'summary.json'}: "
    assert out.startswith(start)
    assert re.search(message, out[len(start) :])


def test_a_run_that_no_table_has_is_said(tmp_path, capsys):
    run = made(tmp_path / "run", 0.8, pretraining="mim", n_subjects=12, phases="ed")
    assert [each.folder for each in study.collect(tmp_path)] == [run]
    assert capsys.readouterr().out.startswith(f"in no table: {run}")


def test_other_splits_are_not_read(tmp_path, capsys):
    (tmp_path / "run" / "evaluation-validation").mkdir(parents=True)
    (tmp_path / "run" / "evaluation-validation" / "summary.json").write_text("{")
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert study.collect(folder) == []
    assert capsys.readouterr().out == ""
    run = made(tmp_path, 0.8, pretraining="mim", n_subjects=12)  # the folder itself is a run
    lost = made(tmp_path / "lost", 0.8, pretraining="mim", n_subjects=12)
    (lost / "evaluation-test" / "metrics.csv").unlink()
    runs = study.collect(tmp_path)
    assert [r.folder for r in runs] == [run]
    (no_metrics,) = capsys.readouterr().out.splitlines()
    assert "metrics.csv" in no_metrics
    names = [row[0] for row in paper.tables(runs)[0].rows]
    assert [name.split()[0] for name in names] == ["all", "50", "25", "15", "12", "10"]
    assert paper.learning_curves(runs) == {"MIM": {12: [pytest.approx(0.8)]}}


def commands(runs, runs_dir, script, *flags, data=()):
    """The flags of those commands of a script that hold all these ones."""
    lines = [shlex.split(part) for line in paper.missing(runs, runs_dir, data) for part in line.split(" && ")]
    return [words[2:] for words in lines if words[:2] == ["python", script] and set(flags) <= set(words)]


def test_an_empty_folder_lacks_the_whole_study(tmp_path):
    """4 pretrainings; for each of 3 seeds 5 subsets of 5 methods, and 2 methods in 5 further arms."""
    every = paper.missing([], tmp_path / "runs", ["MnM", "MnM2"])
    assert len(every) == len(set(every)) == 4 + 3 * (5 * 5 + 2 * 5)
    out = tmp_path / "runs"
    assert every[3] == f"python train_ssp.py --method mim --data MnM MnM2 --out {out}/mim --resume auto"
    assert every[4] == (
        f"python finetune.py --data MnM MnM2 --seed 0 --out {out}/scratch-all-seed0 --resume auto && "
        f"python evaluate.py --split test --checkpoint {out}/scratch-all-seed0"
    )
    assert sum("--seed 2 " in line for line in every) == 35
    assert "--data x --label-suffix=_seg " in paper.missing([], out, ["x"], "_seg")[0]


def test_a_study_with_one_run_lacks_all_others(tmp_path):
    made(tmp_path / "first", 0.8, pretraining="mim", n_subjects=15, seed=1)
    runs = study.collect(tmp_path)
    assert len(paper.missing(runs, Path("runs"))) == 4 + 3 * (5 * 5 + 4 + 4 + 2) - 1
    outs = [words[-3] for words in commands(runs, Path("runs"), "finetune.py", "15", "runs/mim")]
    assert outs == ["runs/mim-n15-seed0", "runs/mim-n15-seed2"]
    for flags in (
        ("--init", "runs/mim", "--phases", "es", "--seed", "0", "runs/mim-all-es-seed0"),
        ("--data", "DATA", "--phases", "ed", "--seed", "2", "runs/scratch-all-ed-seed2"),
        ("--init", "runs/mim", "--vendors", "Siemens", "Philips", "--seed", "1", "runs/mim-all-ab-seed1"),
        ("--data", "DATA", "--vendors", "GE", "Canon", "--seed", "1", "runs/scratch-all-cd-seed1"),
        ("--init", "runs/mim", "--augmentation", "off", "--seed", "0", "runs/mim-all-noaug-seed0"),
    ):
        assert len(commands(runs, Path("runs"), "finetune.py", *flags)) == 1, flags


def test_a_cell_with_three_seeds_lacks_none(tmp_path):
    for seed in (1, 7, 8):
        made(tmp_path / f"three-{seed}", 0.8, pretraining="dino", n_subjects=10, seed=seed)
    made(tmp_path / "one", 0.8, pretraining="dino", n_subjects=25, seed=7)
    runs = study.collect(tmp_path)
    assert commands(runs, Path("runs"), "finetune.py", "runs/dino", "10") == []
    outs = [words[-3] for words in commands(runs, Path("runs"), "finetune.py", "runs/dino", "25")]
    assert outs == ["runs/dino-n25-seed0", "runs/dino-n25-seed1"]


def test_commands_take_the_data_of_the_newest_run(tmp_path):
    root = tmp_path / "my runs"
    run = made(root / "one", 0.8, pretraining="scratch", n_subjects=15)
    args = {"data": ["/data/M&Ms", "x"], "quick": True, "skip_broken": True, "label_suffix": "_seg"}
    recipe = {"kind": "fine-tuning", "epochs": 80, "lr": 0.01, "transfer": "all", "labelled": "ten.json"}
    (run / "args.json").write_text(json.dumps(args | recipe))
    (run / "split.json").write_text("{}")
    runs = study.collect(root)
    for words in commands(runs, root, "finetune.py", "15"):  # the other seeds of this run, and other arms
        like = ["--epochs=80", "--lr=0.01", "--labelled=ten.json"] if words[0] == "--data" else []
        assert [word for word in words if "=" in word and "suffix" not in word] == like
    data = ["--data", "/data/M&Ms", "x", "--label-suffix=_seg", "--split-file", str(run / "split.json")]
    assert commands(runs, root, "train_ssp.py", "pcl") == [
        ["--method", "pcl", *data, "--skip-broken", "--quick", "--out", str(root / "pcl"), "--resume", "auto"]
    ]
    out = str(root / "scratch-all-ed-seed2")
    assert commands(runs, root, "finetune.py", out) == [
        [*data, "--phases", "ed", "--skip-broken", "--quick", "--seed", "2", "--out", out, "--resume", "auto"]
    ]
    (score,) = commands(runs, root, "evaluate.py", out)
    assert score == ["--split", "test", "--checkpoint", out, "--skip-broken"]
    (typed,) = commands(runs, root, "train_ssp.py", "pcl", data=["y"])
    assert typed[2:4] == ["--data", "y"] and "--split-file" not in typed


def test_commands_name_the_data_where_the_pretraining_had_others(tmp_path):
    tuned = made(tmp_path / "one", 0.8, pretraining="mim", n_subjects=15)
    (tmp_path / "mim").mkdir()
    (tmp_path / "mim" / "args.json").write_text('{"kind": "pretraining", "method": "mim", "data": ["/x"]}')
    init = ["--init", str(tmp_path / "mim")]
    for data, source in (("/x", []), ("/y", ["--data", "/y", "--split-file", str(tuned / "split.json")])):
        recipe = {"data": [data], "init": init[1], "transfer": "encoder", "lr": 0.01}
        (tuned / "args.json").write_text(json.dumps(recipe))
        (_, words) = commands(study.collect(tmp_path), tmp_path, "finetune.py", "15", *init)
        assert words[: len(init + source) + 4] == [*init, *source, "--n-subjects", "15", "--lr=0.01",
                                                   "--transfer=encoder"]  # fmt: skip
    (_, words) = commands(study.collect(tmp_path), tmp_path, "finetune.py", "15", *init, data=["/x"])
    assert "--data" not in words


def test_commands_start_from_finished_pretrainings_with_the_same_test_subjects(tmp_path):
    made(tmp_path / "one", 0.8, pretraining="scratch", n_subjects=15)
    for name, test, finished, age in (
        ("mim-old", SUBJECTS, True, 1),
        ("mim-new", [*SUBJECTS, "mnms/without-labels"], True, 2),
        ("mim-elsewhere", ["acdc/1"], True, 3),
        ("mim-running", SUBJECTS, False, 4),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "args.json").write_text('{"kind": "pretraining", "method": "mim"}')
        (folder / "split.json").write_text(json.dumps({"test": list(test)}))
        if finished:
            (folder / "unet.pt").touch()
            os.utime(folder / "unet.pt", (age, age))
    runs = study.collect(tmp_path)
    assert commands(runs, tmp_path, "train_ssp.py", "mim") == []
    assert commands(runs, tmp_path, "finetune.py", "--phases", "ed", str(tmp_path / "mim-new"))
    tuned = made(tmp_path / "two", 0.8, pretraining="mim", n_subjects=15)
    (tuned / "args.json").write_text(json.dumps({"init": str(tmp_path / "mim-old")}))
    runs = study.collect(tmp_path)
    assert commands(runs, tmp_path, "finetune.py", "--phases", "ed", str(tmp_path / "mim-old"))
    (tuned / "args.json").write_text(json.dumps({"init": str(tmp_path / "gone")}))
    runs = study.collect(tmp_path)
    assert commands(runs, tmp_path, "finetune.py", "--phases", "ed", str(tmp_path / "mim-new"))


@pytest.mark.parametrize("quick", [False, True])
def test_the_scripts_understand_every_command(tmp_path, quick):
    root = tmp_path / "my runs"
    run = made(root / "one", 0.8, pretraining="scratch", n_subjects=15)
    if quick:
        recipe = {"quick": True, "skip_broken": True, "epochs": 3, "lr": 0.01, "transfer": "all"}
        (run / "args.json").write_text(json.dumps({"data": ["a b", "c"], **recipe}))
        (run / "split.json").write_text("{}")
    lines = [line for each in paper.missing(study.collect(root), root) for line in each.split(" && ")]
    config = {"channels": [4, 8], "image_size": 32, "spacing_mm": 6.0, "classes": None}
    link = dict.fromkeys(("method", "data", "split", "split_seed", "seed", "subjects"), "x")
    trained, previous = set(), None
    for name, *argv in (shlex.split(line)[1:] for line in lines):
        if name == "train_ssp.py":
            args = train_ssp.parse(argv)[0]
            (root / args.method).mkdir()
            torch.save(
                {"state_dict": {}, "config": config, "provenance": link}, root / args.method / "unet.pt"
            )
            assert (args.out, args.quick) == (str(root / args.method), quick)
        elif name == "finetune.py":
            args, checkpoint, *_ = finetune.parse(argv)
            known = study.Arm(
                checkpoint.path.parent.name if checkpoint else "scratch", args.n_subjects, args.phases,
                frozenset(args.vendors or ()), "on" if args.augment else "off",
            )  # fmt: skip
            name, _ = study.arms()[known]
            assert args.out == str(root / f"{name}-seed{args.seed}")
            assert checkpoint or args.data == (["a b", "c"] if quick else ["DATA"])
            assert (args.quick, args.lr) == (quick, 0.005 if checkpoint else 0.01)
            trained.add((known, args.seed))
        else:
            args = evaluate.parse(argv)
            assert (name, args.split) == ("evaluate.py", "test") and args.checkpoint == [previous]
        previous = args.out
    assert len(trained) == 104 and len(lines) == 4 + 2 * 104


def test_a_method_that_the_paper_does_not_have_and_self_training_are_further_columns_and_rows(tmp_path):
    every = {"n_subjects": 296, "all_subjects": True}
    for name, dice, arm in (
        ("a", 0.80, {"pretraining": "scratch"}),
        ("b", 0.85, {"pretraining": "motion"}),
        ("c", 0.86, {"pretraining": "motion", "predicted": True}),
        ("d", 0.70, {"pretraining": "scratch", "phases": "ed"}),
        ("e", 0.75, {"pretraining": "motion", "phases": "ed"}),
    ):
        made(tmp_path / name, dice, beat=0, **every, **arm)
    runs = study.collect(tmp_path)
    first = table(runs, "table1")
    assert first.header[6:] == ["motion", "motion + self-training"]
    assert first.rows[0] == ["296 (349)", "0.80 ± -", "", "", "", "", "0.85 ± -", "**0.86 ± -**"]
    assert [row[0] for row in table(runs, "table2").rows] == ["None", "MIM", "motion", "None", "MIM"]
    assert list(paper.learning_curves(runs)) == ["Baseline", "motion", "motion + self-training"]
    assert not commands(runs, tmp_path, "train_ssp.py", "motion")  # the paper's study does without


def test_a_class_that_no_reference_has_is_left_out_of_the_scores(tmp_path):
    run = made(tmp_path / "a", 0.8, pretraining="mim", n_subjects=15)
    path = run / "evaluation-test" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "without_reference": ["RV"]}))
    (found,) = study.collect(tmp_path)
    assert found.dice(classes=["RV"]) == {}
    assert found.dice()["mnms/a"] == pytest.approx(0.81)  # 0.8 + 0.01, and 0.03 and -0.03 for LV and MYO


def test_markdown_and_csv(tmp_path):
    for method, dice in (("scratch", 0.8), ("mim", 0.9)):
        made(tmp_path / "runs" / method, dice, pretraining=method, n_subjects=15)
    every = paper.tables(study.collect(tmp_path / "runs"))
    names = ["table1", "table2", "table3", "table4", "section3", "supplementB"]
    assert [t.name for t in every] == names
    lines = every[0].markdown().splitlines()
    assert lines[0].startswith("Table 1: ") and lines[1] == ""
    assert lines[2:4] == [
        "| #subjects (#slices) | Baseline | SimCLR | PCL | DINO | MIM |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    assert lines[7] == "| 15 (349) | 0.80 ± - |  |  |  | **0.90 ± -** |" and len(lines) == 9
    assert all(len({len(row) for row in (t.header, *t.rows)}) == 1 for t in every)
    paper.write(every, ["python a", "python b"], tmp_path / "new" / "tables")
    folder = tmp_path / "new" / "tables"
    assert {p.name for p in folder.iterdir()} == {*(f"{n}.csv" for n in names), "commands.sh"}
    assert (folder / "commands.sh").read_text() == "python a\npython b\n"
    with open(folder / "table1.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == every[0].header
    assert rows[4] == ["15 (349)", "0.80 ± -", "", "", "", "0.90 ± -"] and len(rows) == 6
