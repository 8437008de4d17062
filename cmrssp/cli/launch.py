"""What the two training scripts do alike: prepare device, method and data, then train in a run folder."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from cmrssp.cli import flags
from cmrssp.data import dataset
from cmrssp.data.batches import Batches
from cmrssp.data.prepare import Prepared, prepare
from cmrssp.hardware import benchmark, distributed, memory
from cmrssp.hardware.device import prepare_torch, resolve_device
from cmrssp.runs import figures
from cmrssp.runs.folder import Run
from cmrssp.ssp.method import Method
from cmrssp.training import Validation, train
from cmrssp.weights.provenance import Provenance


def set_up(args: Namespace, objective: type[Method], known: Mapping) -> tuple[Method, torch.device]:
    """The method and its device; afterwards `args` has data and label_suffix, from `known` unless typed."""
    args.data, args.label_suffix = dataset.source({**known, **vars(args)})
    dataset.announce(args.data)
    device = resolve_device(args.device)
    prepare_torch(args.seed, args.deterministic, args.cache)
    return flags.build(objective, args), device


def find_data(args: Namespace, run: Run | None, **options: Any) -> Prepared:
    """As `prepare` with these options; a run that goes on keeps its split."""
    names = ("label_suffix", "split_file", "split_seed", "keep_overlap", "skip_broken")
    options = {name: getattr(args, name) for name in names} | options
    if run:
        options |= {"inherited": run.split, "split_file": None}
    return prepare(args.data, args.cache, needed="train", **options)


def launch(
    args: Namespace,
    run: Run | None,
    method: Method,
    batches: Batches,
    prepared: Prepared,
    validate: Validation,
    name: str,
    **provenance: Any,
) -> Run | None:
    """Check the memory, then measure the speed (--benchmark; returns None) or train in a run folder. `run`:
    the one that goes on; `name`: of a new one's folder, unless --out is given; `provenance`: the fields of
    `Provenance` that `args` and `prepared` do not give.
    """
    settings = flags.settings(args, batches)
    settings = memory.check(method, batches, settings, args.device_cache, uncompile=args.compile == "auto")
    if args.benchmark:
        benchmark.run(method, batches, settings, args.benchmark)
        return None
    used = [*flags.OPTIMISATION, *flags.parameters(type(method))]
    used += ["transfer"] if vars(args).get("init") else []
    used += ["predicted_weight", "predicted_share"] if vars(args).get("predicted") else []
    hyperparameters = {flag: getattr(args, flag) for flag in used}
    hyperparameters |= {"amp": settings.amp, "batch_size": batches.batch_size}  # can be less than asked for
    provenance |= {flag: getattr(args, flag) for flag in ("label_suffix", "split_seed", "seed")}
    origin = Provenance(
        method=method.name,
        data=dataset.absolute(args.data),
        split=prepared.split,
        digests=prepared.digests,
        slices=len(batches.slices),
        hyperparameters=hyperparameters,
        augmentation="on" if args.augment else "off",
        **provenance,
    )
    state = run.go_on(origin.digests, origin.labels, batches.device) if run else None
    if not run:
        run = distributed.from_main(lambda: Run.create(args.out, name, again=args.resume == "auto"))
        run.lock()
        print(f"run folder: {run.folder}")
        kind, device = "fine-tuning" if batches.labelled else "pretraining", str(batches.device)
        run.start({"kind": kind, **vars(args), "data": origin.data, "device": device}, prepared.split)
        if distributed.is_main():
            figures.views(method.to(batches.device), batches, run.folder / "views.png")
    content = train(method, batches, settings, run, origin, validate, state)
    if distributed.is_main():
        figures.views(method, batches, run.folder / "views.png")
        figures.curves(run.records(), run.folder / "curves.png")
    run.finish(content)
    return run
