"""Measure the training step of every objective on this machine, one line each.

The network and the settings are the paper's, or on a CPU those of --quick. The networks are not compiled:
with --compile each line takes about a minute longer, or 20 s if --cache has the kernels already.
"""

import gc
import sys
from collections.abc import Sequence

import torch

from cmrssp.cli import entry, flags
from cmrssp.data import dataset, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.hardware import benchmark, memory
from cmrssp.hardware.device import prepare_torch, resolve_device
from cmrssp.segmentation import Segmentation
from cmrssp.ssp import METHODS
from cmrssp.ssp.method import Method

PROG = "python -m cmrssp.hardware"
_STEPS = 10  # at least, without --benchmark


def parse(argv: Sequence[str] | None, method: type[Method], amp: str):
    parser = entry.Parser(prog=PROG, description=__doc__)
    flags.add_training(parser, data=dataset.PHANTOM)
    method.add_flags(parser.add_argument_group(method.name))
    flags.set_defaults(parser, argv, method)
    parser.set_defaults(amp=amp, compile="off")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv, Segmentation, "off")
    device = resolve_device(args.device)
    if device.type == "cpu" and not args.quick:
        argv = ["--quick", *(sys.argv[1:] if argv is None else argv)]
    data, label_suffix = dataset.source(vars(args))
    subjects, _ = dataset.find(data, args.cache, label_suffix)
    cines = store.build(subjects, args.cache, labels=True, skip_broken=args.skip_broken)
    objectives = [(method, method.defaults["amp"]) for method in METHODS.values()]
    objectives += [(Segmentation, "off"), *[(Segmentation, "fp16")] * (device.type == "cuda")]
    columns = [*(part.removesuffix(" alone") for part in benchmark.PARTS), "step / floor", "memory"]
    lines = [f"{'objective, batch, amp':<24}" + "".join(f"{column:>13}" for column in columns)]
    for method_class, amp in objectives:
        args = parse(argv, method_class, amp)
        prepare_torch(args.seed, args.deterministic, args.cache)
        method = flags.build(method_class, args)
        labelled = method_class is Segmentation
        keys = method.usable(cines, list(cines.index))
        if labelled:
            keys = [key for key in keys if cines.labels[cines.index[key]].frames]
        if not keys:
            print(
                f"{method.name}: left out, its data has no {'labels' if labelled else 'cine of two frames'}"
            )
            continue
        slices = Slices(cines, keys, phases="both" if labelled else None)
        options = {"batch_size": args.batch_size, "seed": args.seed, "device": device}
        batches = Batches(cines, slices, labelled=labelled, motion=method.needs_motion, **options)
        settings = flags.settings(args, batches)
        memory.check(method, batches, settings, args.device_cache)
        found = benchmark.measure(method, batches, settings, args.benchmark or _STEPS)
        what = f"{method.name} {batches.batch_size} {settings.amp}"
        rates = "".join(f"{found.rate(part):>13.4g}" for part in benchmark.PARTS)
        lines.append(f"{what:<24}{rates}{found.times_floor:>13.2f}{found.peak_memory / 1e9:>10.1f} GB")
        print(lines[-1], flush=True)
        del method, batches
        torch.compiler.reset()  # its graphs, and a compiled network, which refers to itself, keep memory
        gc.collect()
    print(f"\nall together; torch {torch.__version__}; slices/s, medians\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    entry.end(main, PROG)
