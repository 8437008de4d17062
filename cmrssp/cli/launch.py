"""What the two training scripts do alike once method and batches are ready."""

import argparse
from typing import Any

from cmrssp.cli import flags
from cmrssp.data import dataset
from cmrssp.data.batches import Batches
from cmrssp.data.prepare import Prepared
from cmrssp.hardware import benchmark, distributed, memory
from cmrssp.runs import figures
from cmrssp.runs.folder import Run
from cmrssp.runs.resume import Interrupted, open_run
from cmrssp.runs.settings import Settings
from cmrssp.ssp.method import Method
from cmrssp.training import Validation, train
from cmrssp.weights.provenance import Provenance


def launch(
    args: argparse.Namespace, method: Method, batches: Batches, settings: Settings, prepared: Prepared,
    validate: Validation, *, kind: str, name: str, interrupted: Interrupted | None,
    provenance: dict[str, Any], transferred: dict[str, str] | None = None,
) -> Run | None:  # fmt: skip
    """Check the memory, then measure the speed (--benchmark; returns None) or train in a run folder.

    `args` must hold data, label_suffix and split_seed as they are used. `name` is the default name of the run
    folder. `provenance` are the fields of `Provenance` that `args` and `prepared` do not give.
    """
    settings = flags.compiled(settings, args, batches)
    memory.check(method, batches, amp=settings.amp, device=batches.device, device_cache=args.device_cache)
    if args.benchmark:
        benchmark.run(method, batches, settings, args.benchmark)
        return None
    origin = Provenance(
        method=method.name,
        data=dataset.absolute(args.data),
        label_suffix=args.label_suffix,
        split=prepared.split,
        split_seed=args.split_seed,
        seed=args.seed,
        digests=prepared.digests,
        slices=len(batches.slices),
        hyperparameters=flags.hyperparameters(args, type(method), settings, batches.batch_size),
        augmentation="on" if args.augment else "off",
        **provenance,
    )
    again = args.resume == "auto"
    run, state = open_run(interrupted, args.out, name, origin.digests, origin.labels, again=again)
    if not state:
        started = {"kind": kind, **vars(args), "data": origin.data, "device": str(batches.device)}
        if transferred is not None:  # fine-tuning
            started |= {"transfer": transferred, "subjects": origin.subjects}
        run.start(started, prepared.split)
        if transferred:
            run.log({"epoch": 0, "transfer": transferred})
        if distributed.is_main():
            figures.views(method.to(batches.device), batches, run.folder / "views.png")
    content = train(method, batches, settings, run, origin, validate, state)
    if distributed.is_main():
        figures.views(method, batches, run.folder / "views.png")
        figures.curves(run.records(), run.folder / "curves.png")
    run.finish(content)
    return run
