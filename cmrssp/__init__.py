"""Self-supervised pretraining for the segmentation of the heart in cardiac MR cine.

The way of a batch:
    data/layouts         folders -> Subject records
    data/store           each cine once into a file of slices
    data/splits          who trains, validates, tests
    data/batches         native slices of a step, padded: Batch
    augmentation         Batch -> views on the network's grid, on the device, in one interpolation
    ssp, segmentation    views -> loss (losses)
    training             the one loop: forward, backward, step, log, save

The way of a checkpoint:
    runs/folder          last.pt while training, from which a stopped run goes on; unet.pt at the end
    weights/provenance   who was trained on, how, from what; weights/checkpoints reads and writes it
    weights/transfer     what of it enters a network (finetune.py --init); weights/nnunet for nnU-Net
    evaluation           predicts on the grid of each file, scores (metrics), compares and draws

cli holds the flags, hardware the device, processes, memory and benchmark. No module imports one that
imports it; the package never imports the scripts.
"""

__version__ = "0.1.0"
